"""Affine convolutions as plain torch modules."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from refold.algebra.affine import AffineConv, Array
from refold.algebra.refusal import Refusal

nn = torch.nn

_CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

Space = tuple[int | None, ...]


def helpers(conv: AffineConv, space: Space) -> int | Refusal:
    """How many functions beside the convolution torch needs for it: one that pads and crops."""
    axes = len(conv.windows)
    if conv.is_scale:
        return 0
    if axes > 3 and not (conv.is_pointwise and conv.groups == 1):
        return Refusal(f"torch has no convolution over {axes} axes")
    if axes == 0 and conv.groups > 1:
        return Refusal("torch has no dense layer with groups")
    if any(window.floating for window in conv.windows):
        return Refusal("torch has no padding that follows the size of its input")
    return int(borders(conv) is not None)


def borders(conv: AffineConv) -> tuple[int, ...] | None:
    """The widths for ``torch.nn.functional.pad``, negative where it crops, that must go before torch's
    convolution; None where its own padding does."""
    if all(window.before == window.after >= 0 for window in conv.windows):
        return None
    return tuple(width for window in reversed(conv.windows) for width in (window.before, window.after))


def module_for(
    conv: AffineConv,
    bias: Array | None,
    *,
    channel_axis: int,
    dense: bool,
    like: Any,
    trainable: bool,
) -> Any:
    """The module that computes ``conv(x) + bias`` on what :func:`borders` leaves, with its numbers rounded once.

    ``channel_axis`` is 1 or the last one; ``dense`` prefers a Linear for pointwise maps; ``like`` is a tensor of
    the type, on the device and in the memory format that it gets.
    """
    axes = len(conv.windows)
    settings = {"bias": bias is not None, "dtype": like.dtype, "device": "meta"}
    pointwise = conv.is_pointwise and conv.groups == 1
    weight = conv.kernel
    module: Any
    if is_dense(conv, channel_axis=channel_axis, dense=dense):
        module = nn.Linear(conv.channels_in, conv.channels_out, **settings)
        weight = weight.reshape(weight.shape[:2])
    else:
        assert axes in _CONV
        assert channel_axis == 1 or pointwise
        padded = borders(conv) is None
        module = _CONV[axes](
            conv.channels_in,
            conv.channels_out,
            tuple(window.taps for window in conv.windows),
            stride=tuple(window.stride for window in conv.windows),
            padding=tuple(window.before if padded else 0 for window in conv.windows),
            dilation=tuple(window.dilation for window in conv.windows),
            groups=conv.groups,
            **settings,
        )
    module.weight = parameter(weight, like, trainable)
    if bias is not None:
        module.bias = parameter(bias, like, trainable)
    return module.eval()


def is_dense(conv: AffineConv, *, channel_axis: int, dense: bool) -> bool:
    """Whether a map is written as a Linear: it needs the channels on the last axis."""
    axes = len(conv.windows)
    fits = conv.is_pointwise and conv.groups == 1 and channel_axis == axes + 1
    return fits and (dense or axes not in _CONV)


def parameter(array: Array, like: Any, trainable: bool) -> Any:
    """A parameter that holds ``array``, each number rounded once to the type of ``like``."""
    tensor = rounded(array, like)
    channels_last = like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last)
    if tensor.ndim == 4 and channels_last and not like.is_contiguous():
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(tensor, requires_grad=trainable)


def rounded(array: Array, like: Any) -> Any:
    """``array`` as a tensor of the type of ``like``, each number rounded once."""
    tensor = torch.from_numpy(np.array(array, dtype=np.float64))
    return tensor.to(like.dtype).to(like.device)


def per_channel(array: Array, axis: int, rank: int) -> Array:
    """One number per channel in the shape in which it broadcasts."""
    return array.reshape([array.size if place == axis else 1 for place in range(rank)][axis:])
