"""Which axis of a stored Paddle kernel is what. Declared here once, as data, and converted at the border.

Convolutions store their kernels as the engine has them, ``(out, in/groups, *taps)``; dense layers have
``(in, out)``.
"""

from __future__ import annotations

import numpy as np

from refold.algebra.affine import AffineConv, Array

# Layouts by number of spatial axes: channels first, channels last.
LAYOUTS = {0: ("NC", "NC"), 1: ("NCL", "NLC"), 2: ("NCHW", "NHWC"), 3: ("NCDHW", "NDHWC")}


def layout(axes: int, channel_axis: int) -> str:
    """Paddle's word for tensors with so many spatial axes and their channels on ``channel_axis``."""
    return LAYOUTS[axes][0 if channel_axis == 1 else 1]


def dense_weight(conv: AffineConv) -> Array:
    """The weight ``(in, out)`` of a dense layer that computes a pointwise ``conv`` of one group."""
    return np.ascontiguousarray(conv.kernel.reshape(conv.channels_out, conv.channels_in).T)
