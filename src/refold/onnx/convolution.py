"""Convolutions by their definition, on arrays: a sum over the taps. The reference evaluator copies every
window instead, which takes minutes where a proof asks for thousands of convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

AnyArray = npt.NDArray[Any]

# Numbers that stay in a processor's cache.
_AT_ONCE = 2**16


def convolution(node: ir.Node, arrays: Sequence[AnyArray | None]) -> AnyArray | None:
    """https://onnx.ai/onnx/operators/onnx__Conv.html; None for the settings that are left to the reference
    evaluator, and where shapes do not fit each other."""
    x, kernel, bias = [*arrays, None][:3]
    if x is None or kernel is None or x.ndim < 3 or kernel.ndim != x.ndim or x.dtype.kind != "f":
        return None
    axes, groups = x.ndim - 2, node.attributes.get_int("group", 1) or 0
    strides = node.attributes.get_ints("strides") or (1,) * axes
    dilations = node.attributes.get_ints("dilations") or (1,) * axes
    pads = node.attributes.get_ints("pads") or (0,) * (2 * axes)
    word = node.attributes.get_string("auto_pad", "NOTSET")
    if word not in ("NOTSET", "", "VALID") or {len(strides), len(dilations), len(pads) // 2} != {axes}:
        return None
    if tuple(node.attributes.get_ints("kernel_shape") or kernel.shape[2:]) != kernel.shape[2:]:
        return None
    if groups < 1 or x.shape[1] != groups * kernel.shape[1] or kernel.shape[0] % groups:
        return None
    if min(*pads, *(n - 1 for n in (*strides, *dilations))) < 0:
        return None
    if word != "VALID" and any(pads):
        x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:axes], pads[axes:], strict=True)])
    taps = kernel.shape[2:]
    reach = [dilation * (tap - 1) for tap, dilation in zip(taps, dilations, strict=True)]
    sizes = [(n - r - 1) // s + 1 for n, r, s in zip(x.shape[2:], reach, strides, strict=True)]
    if min(sizes) < 1:
        return None
    batch, per_channel, per_group = len(x), kernel.shape[1], kernel.shape[0] // groups
    weights = kernel.reshape(groups, per_group, per_channel, *taps)
    total = np.zeros((batch, groups, per_group, int(np.prod(sizes))), dtype=np.result_type(x, kernel))
    # Without sums over channels, products are faster than matrices, if what they work on is small.
    rows = max(_AT_ONCE // (total[:1].size + 1), 1) if per_channel == 1 else batch
    for start in range(0, batch, rows):
        part, some = total[start : start + rows], x[start : start + rows]
        for tap in np.ndindex(*taps):
            starts = [dilation * place for dilation, place in zip(dilations, tap, strict=True)]
            cut = tuple(
                slice(first, first + stride * (size - 1) + 1, stride)
                for first, stride, size in zip(starts, strides, sizes, strict=True)
            )
            read = some[(slice(None), slice(None), *cut)].reshape(len(part), groups, per_channel, -1)
            seen = weights[(slice(None), slice(None), slice(None), *tap)]
            part += seen * read if per_channel == 1 else seen @ read
    if bias is not None:
        total += bias.reshape(groups, per_group, 1)
    return total.reshape(batch, kernel.shape[0], *sizes)
