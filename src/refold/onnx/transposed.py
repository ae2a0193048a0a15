"""Transposed convolution by its definition, on arrays. The reference evaluator falls over with groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

AnyArray = npt.NDArray[Any]


def convolution(node: ir.Node, arrays: Sequence[AnyArray | None]) -> AnyArray | None:
    """https://onnx.ai/onnx/operators/onnx__ConvTranspose.html: every input adds its own copy of the kernel.
    None for the settings that are left to the reference evaluator."""
    x, kernel, *rest = arrays
    settings = node.attributes
    word = settings.get_string("auto_pad", "NOTSET")
    if x is None or kernel is None or settings.get_ints("output_shape") or word not in ("NOTSET", "VALID"):
        return None
    axes, groups = x.ndim - 2, settings.get_int("group", 1) or 1
    ones = [1] * axes
    strides, dilations = (settings.get_ints(name) or ones for name in ("strides", "dilations"))
    extra = settings.get_ints("output_padding") or [0] * axes
    pads = (settings.get_ints("pads") if word == "NOTSET" else None) or [0] * (2 * axes)
    if kernel.ndim != x.ndim or x.shape[1] != kernel.shape[0] or x.shape[1] % groups or len(pads) != 2 * axes:
        return None
    taps, space = kernel.shape[2:], x.shape[2:]
    reach = [s * (n - 1) + d * (k - 1) + 1 for n, k, s, d in zip(space, taps, strides, dilations, strict=True)]
    rest_behind = [more - pad for more, pad in zip(extra, pads[axes:], strict=True)]
    per_in, per_out = x.shape[1] // groups, kernel.shape[1]
    room = [size + max(more, 0) for size, more in zip(reach, rest_behind, strict=True)]
    full = np.zeros((len(x), groups * per_out, *room), dtype=np.result_type(x, kernel))
    for tap in np.ndindex(*taps):
        spots = tuple(
            slice(d * t, d * t + s * (n - 1) + 1, s)
            for t, n, s, d in zip(tap, space, strides, dilations, strict=True)
        )
        for group in range(groups):
            ins, outs = (slice(group * size, (group + 1) * size) for size in (per_in, per_out))
            weights = kernel[(ins, slice(None), *tap)]
            full[(slice(None), outs, *spots)] += np.einsum("nc...,co->no...", x[:, ins], weights)
    kept = tuple(slice(pad, size + more) for pad, size, more in zip(pads, reach, rest_behind, strict=False))
    result: AnyArray = full[(slice(None), slice(None), *kept)]
    bias = rest[0] if rest else None
    return result if bias is None else result + bias.reshape(-1, *ones)
