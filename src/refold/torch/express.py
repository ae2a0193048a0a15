"""Affine convolutions as plain torch modules."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from refold.algebra.affine import AffineConv, Array, turned_around
from refold.algebra.geometry import Window, crop
from refold.algebra.refusal import Refusal
from refold.torch.layout import laid_out

nn = torch.nn

_CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}

Space = tuple[int | None, ...]

UNSAID = "no transposed convolution of torch pads or crops its output like this"


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
    if conv.is_transposed:
        return 0 if all(_is_said_transposed(window) for window in conv.windows) else Refusal(UNSAID)
    return int(borders(conv) is not None)


def _is_said_transposed(window: Window) -> bool:
    """Whether torch's transposed convolution has such a window: it crops, behind by less than before."""
    before, after = crop(window)
    return window.stride == 1 and before >= 0 and 0 <= before - after < max(window.spread, window.dilation)


def borders(conv: AffineConv) -> tuple[int, ...] | None:
    """The widths for ``torch.nn.functional.pad``, negative where it crops, that must go before torch's
    convolution; None where its own padding does."""
    if conv.is_transposed or all(window.before == window.after >= 0 for window in conv.windows):
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
    settings: dict[str, Any] = {"bias": bias is not None, "dtype": like.dtype, "device": "meta"}
    pointwise = conv.is_pointwise and conv.groups == 1
    weight = conv.kernel
    module: Any
    if is_dense(conv, channel_axis=channel_axis, dense=dense):
        module = nn.Linear(conv.channels_in, conv.channels_out, **settings)
        weight = weight.reshape(weight.shape[:2])
    else:
        assert axes in _CONV
        assert channel_axis == 1 or pointwise
        settings |= {"dilation": tuple(window.dilation for window in conv.windows), "groups": conv.groups}
        sizes = (conv.channels_in, conv.channels_out, tuple(window.taps for window in conv.windows))
        if conv.is_transposed:
            crops = [crop(window) for window in conv.windows]
            module = _TRANSPOSED[axes](
                *sizes,
                stride=tuple(window.spread for window in conv.windows),
                padding=tuple(before for before, _ in crops),
                output_padding=tuple(before - after for before, after in crops),
                **settings,
            )
            weight = turned_around(conv.kernel, conv.groups)
        else:
            padded = borders(conv) is None
            module = _CONV[axes](
                *sizes,
                stride=tuple(window.stride for window in conv.windows),
                padding=tuple(window.before if padded else 0 for window in conv.windows),
                **settings,
            )
    module.weight = parameter(np.ascontiguousarray(weight), like, trainable)
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
    return nn.Parameter(laid_out(rounded(array, like), like), requires_grad=trainable)


def rounded(array: Array, like: Any) -> Any:
    """``array`` as a tensor of the type of ``like``, each number rounded once."""
    array = np.require(array, np.float64, ["C", "W"])  # torch reads arrays that may be written only
    return torch.empty(array.shape, dtype=like.dtype).copy_(torch.from_numpy(array)).to(like.device)


def per_channel(array: Array, axis: int, rank: int) -> Array:
    """One number per channel in the shape in which it broadcasts."""
    return array.reshape([array.size if place == axis else 1 for place in range(rank)][axis:])
