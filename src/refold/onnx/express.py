"""Affine convolutions as plain ONNX nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, final

import numpy as np
import onnx_ir as ir

from refold.algebra.affine import AffineConv, Array, turned_around
from refold.algebra.geometry import Window, crop, same
from refold.algebra.refusal import Refusal
from refold.onnx.reference import AnyArray

Space = tuple[int | None, ...]

# The most numbers of a new initializer that is not computed anew when it is needed.
_MOST_KEPT = 2**16

UNSAID = "no ConvTranspose pads or crops its output like this"


def helpers(conv: AffineConv, space: Space) -> int | Refusal:
    """How many nodes beside the convolution ONNX needs for it: one to crop with."""
    if conv.is_scale:
        return 0
    if not conv.windows and conv.groups > 1:
        return Refusal("ONNX has no dense layer in groups")
    if any(window.floating for window in conv.windows):
        return 0 if _same_everywhere(conv.windows) else Refusal("ONNX pads with SAME_UPPER on all axes or on none")
    if conv.is_transposed:
        return 0 if all(_is_said_transposed(window) for window in conv.windows) else Refusal(UNSAID)
    return int(any(window.before < 0 or window.after < 0 for window in conv.windows))


def _same_everywhere(windows: Sequence[Window]) -> bool:
    return all(w.floating or w == same(w.taps, w.stride, w.dilation, None) for w in windows)


def _is_said_transposed(window: Window) -> bool:
    """Whether a ConvTranspose has such a window: it crops before, and adds less than a step behind."""
    before, after = crop(window)
    return window.stride == 1 and before >= 0 and -after < window.spread


@final
@dataclass(eq=False)
class Writer:
    """New nodes and initializers of a graph. ``unique`` makes a name that is free of one that is wanted."""

    graph: ir.Graph
    version: int
    dtype: ir.DataType
    unique: Callable[[str], str]
    nodes: list[ir.Node]

    def constant(self, name: str, array: AnyArray, dtype: ir.DataType | None = None) -> ir.Value:
        """A new initializer, rounded once to its type."""
        return self.computed(name, np.shape(array), lambda: array, dtype)

    def computed(
        self, name: str, shape: tuple[int, ...], numbers: Callable[[], AnyArray], dtype: ir.DataType | None = None
    ) -> ir.Value:
        """A new initializer, rounded once to its type; a large one is computed when it is read or written, for
        all of them together may not fit into memory."""
        kind = self.dtype if dtype is None else dtype
        name = self.unique(name)

        def rounded() -> ir.Tensor[Any]:
            with np.errstate(over="ignore"):
                stored = np.ascontiguousarray(np.asarray(numbers()).astype(kind.numpy()))
            return ir.Tensor(stored, dtype=kind, name=name)

        large = prod(shape) > _MOST_KEPT
        tensor = ir.LazyTensor(rounded, kind, ir.Shape(shape), name=name) if large else rounded()
        value = ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def integers(self, name: str, numbers: Sequence[int]) -> ir.Value:
        """A new list of whole numbers."""
        return self.constant(name, np.asarray(numbers, dtype=np.int64), ir.DataType.INT64)

    def node(
        self, kind: str, inputs: Sequence[ir.Value | None], name: str, attributes: dict[str, Any] | None = None
    ) -> ir.Value:
        """A new node; returns what it gives."""
        name = self.unique(name)
        output = ir.Value(name=self.unique(f"{name}_output"), type=ir.TensorType(self.dtype))
        self.nodes.append(ir.node(kind, inputs, attributes or {}, outputs=[output], name=name))
        return output

    # ---- what an affine convolution is in nodes --------------------------------------------------

    def affine(
        self, x: ir.Value, conv: AffineConv, bias: Array | None, axes: tuple[int, int], rank: int, name: str
    ) -> ir.Value:
        """``conv(x) + bias``; the channels of ``x`` are on the first of ``axes``, those of the result on
        the second."""
        axis_in, axis_out = axes
        if conv.is_scale:
            x = self.turned(x, axis_in, axis_out, rank, name)
            if not conv.is_identity:
                scale = _along(conv.scale, axis_out, rank)
                x = self.node("Mul", [x, self.constant(f"{name}_scale", scale)], name)
            return self.shifted(x, bias, axis_out, rank, name)
        if not conv.windows:
            return self._dense(x, conv, bias, name)
        if axis_in == axis_out == rank - 1 != 1 and conv.is_pointwise and conv.groups == 1:
            x = self.node("MatMul", [x, self._matrix(conv, name)], name)
            return self.shifted(x, bias, axis_out, rank, name)
        x = self.turned(x, axis_in, 1, rank, name)
        x = x if conv.is_transposed else self._cropped(x, conv.windows, name)
        inputs = [x, self._kernel(conv, name)]
        if bias is not None:
            inputs.append(self.constant(f"{name}_bias", bias))
        y = self.node("ConvTranspose" if conv.is_transposed else "Conv", inputs, name, _settings(conv))
        return self.turned(y, 1, axis_out, rank, name)

    def _matrix(self, conv: AffineConv, name: str) -> ir.Value:
        shape = conv.weights.shape[:2]
        return self.computed(f"{name}_weight", shape[::-1], lambda: conv.kernel.reshape(shape).T)

    def _kernel(self, conv: AffineConv, name: str) -> ir.Value:
        shape = conv.weights.shape
        if not conv.is_transposed:
            return self.computed(f"{name}_weight", shape, lambda: conv.kernel)
        per_group = shape[0] // conv.groups
        return self.computed(
            f"{name}_weight",
            (conv.channels_in, per_group, *shape[2:]),
            lambda: turned_around(conv.kernel, conv.groups),
        )

    def shifted(self, x: ir.Value, bias: Array | None, axis: int, rank: int, name: str) -> ir.Value:
        """``x + bias`` along an axis."""
        if bias is None or not np.any(bias):
            return x
        return self.node("Add", [x, self.constant(f"{name}_bias", _along(bias, axis, rank))], f"{name}_shift")

    def turned(self, x: ir.Value, axis_in: int, axis_out: int, rank: int, name: str) -> ir.Value:
        """``x`` with one axis moved, all else in order."""
        if axis_in == axis_out:
            return x
        order = [axis for axis in range(rank) if axis != axis_in]
        order.insert(axis_out, axis_in)
        return self.node("Transpose", [x], f"{name}_transpose", {"perm": order})

    def total(self, parts: Sequence[ir.Value], name: str) -> ir.Value:
        """The sum of tensors of one shape, two at a time: a runtime joins an Add with the convolution before it."""
        total, *rest = parts
        for part in rest:
            total = self.node("Add", [total, part], f"{name}_sum")
        return total

    def joined(self, parts: Sequence[ir.Value], axis: int, name: str) -> ir.Value:
        """The tensors, one behind the other."""
        return self.node("Concat", parts, f"{name}_join", {"axis": axis})

    def _dense(self, x: ir.Value, conv: AffineConv, bias: Array | None, name: str) -> ir.Value:
        weight = self._matrix(conv, name)
        if bias is None:
            return self.node("MatMul", [x, weight], name)
        return self.node("Gemm", [x, weight, self.constant(f"{name}_bias", bias)], name)

    def _cropped(self, x: ir.Value, windows: Sequence[Window], name: str) -> ir.Value:
        """What is left of ``x`` after negative padding is cut off."""
        cuts = [(axis, -min(w.before, 0), -min(w.after, 0)) for axis, w in enumerate(windows, 2)]
        cuts = [cut for cut in cuts if cut[1] or cut[2]]
        if not cuts:
            return x
        starts = [before for _, before, _ in cuts]
        ends = [-after if after else 2**31 - 1 for _, _, after in cuts]
        axes = [axis for axis, _, _ in cuts]
        if self.version < 10:
            return self.node("Slice", [x], f"{name}_crop", {"starts": starts, "ends": ends, "axes": axes})
        lists = {"starts": starts, "ends": ends, "axes": axes}
        given = [self.integers(f"{name}_{word}", numbers) for word, numbers in lists.items()]
        return self.node("Slice", [x, *given], f"{name}_crop")


def _along(numbers: Array, axis: int, rank: int) -> Array:
    """Numbers along an axis of a tensor, as they broadcast; one number if they are all the same."""
    if np.all(numbers == numbers[0]):
        return numbers[:1].reshape((1,) * (rank - axis))
    return numbers.reshape([-1 if place == axis else 1 for place in range(axis, rank)])


def _settings(conv: AffineConv) -> dict[str, Any]:
    windows = conv.windows
    settings: dict[str, Any] = {
        "kernel_shape": [window.taps for window in windows],
        "strides": [window.stride for window in windows],
        "dilations": [window.dilation for window in windows],
        "group": conv.groups,
    }
    if conv.is_transposed:
        crops = [crop(window) for window in windows]
        settings["strides"] = [window.spread for window in windows]
        settings["pads"] = [before for before, _ in crops] + [max(after, 0) for _, after in crops]
        if any(after < 0 for _, after in crops):
            settings["output_padding"] = [max(-after, 0) for _, after in crops]
        return settings
    if any(window.floating for window in windows):
        return {**settings, "auto_pad": "SAME_UPPER"}
    pads = [max(window.before, 0) for window in windows] + [max(window.after, 0) for window in windows]
    return {**settings, "pads": pads}
