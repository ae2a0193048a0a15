"""Pooling by its definition, on arrays. The reference evaluator loops over every output in Python, which
takes minutes where a proof asks for thousands of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

AnyArray = npt.NDArray[Any]


def average(node: ir.Node, arrays: Sequence[AnyArray | None]) -> AnyArray | None:
    """https://onnx.ai/onnx/operators/onnx__AveragePool.html; None for the settings that are left to the
    reference evaluator."""
    (x,) = arrays
    assert x is not None
    seen = _windows(node, x, 0.0)
    if seen is None:
        return None
    taps = tuple(range(x.ndim, seen.ndim))
    if node.attributes.get_int("count_include_pad", 0):
        return np.asarray(seen.mean(axis=taps))
    counted = _windows(node, np.ones_like(x[:1, :1]), 0.0)
    assert counted is not None
    return np.asarray(seen.sum(axis=taps) / counted.sum(axis=taps))


def largest(node: ir.Node, arrays: Sequence[AnyArray | None]) -> AnyArray | None:
    """https://onnx.ai/onnx/operators/onnx__MaxPool.html; None for the settings that are left to the
    reference evaluator."""
    (x,) = arrays
    assert x is not None
    if len(node.outputs) > 1 or x.dtype.kind != "f":
        return None
    seen = _windows(node, x, -np.inf)
    return None if seen is None else np.asarray(seen.max(axis=tuple(range(x.ndim, seen.ndim))))


def _windows(node: ir.Node, x: AnyArray, fill: float) -> AnyArray | None:
    """What each output reads, ``(batch, channels, *outputs, *taps)``, with ``fill`` outside of ``x``."""
    kernel = node.attributes["kernel_shape"].as_ints()
    axes = len(kernel)
    settings = {name: node.attributes.get_ints(name) for name in ("strides", "dilations", "pads")}
    word = node.attributes.get_string("auto_pad", "NOTSET")
    if word not in ("NOTSET", "VALID") or node.attributes.get_int("ceil_mode") or x.ndim != axes + 2:
        return None
    strides, dilations = (settings[name] or [1] * axes for name in ("strides", "dilations"))
    pads = (settings["pads"] if word == "NOTSET" else None) or [0] * (2 * axes)
    widths = [(0, 0), (0, 0), *((pads[axis], pads[axis + axes]) for axis in range(axes))]
    wide = np.pad(x, widths, constant_values=fill)
    reach = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True))
    if any(size < r for size, r in zip(wide.shape[2:], reach, strict=True)):
        return None
    seen = np.lib.stride_tricks.sliding_window_view(wide, reach, axis=tuple(range(2, 2 + axes)))
    picked = (slice(None), slice(None), *(slice(None, None, step) for step in (*strides, *dilations)))
    return np.asarray(seen[picked])
