"""Telling what chains of reshapes, transposes, scatters and the like do.

Such a chain moves numbers and computes nothing, so sending marks through it shows where every number
goes and which constants it puts beside them. That is how the dozens of nodes into which exporters turn
"pad with the bias of the batch norm" are read as one padding.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from typing import final

import numpy as np
import onnx_ir as ir

from refold.algebra.affine import scale_shift
from refold.errors import InputError
from refold.graph import rearrangement
from refold.graph.graph import Affine, Gain, Op, Pad, Passage
from refold.onnx.reference import FLOATS, AnyArray, Operators
from refold.onnx.sizes import MOVING, Survey

# How many steps back a chain may start, and the most numbers of the tensor where it does.
_MOST_VIEWS = 6
_MOST_MARKS = 2**22


@final
@dataclass(frozen=True, eq=False)
class View:
    """A tensor seen from ``base``: for each set of sizes where each of its numbers comes from. A mark
    above 0 is a place in ``base``, plus 1; 0 is the number 0; one below 0 is a constant. ``steps`` are
    the nodes on the way. ``scaled`` is the factor and shift per channel of one of them, seen as one of ``base``:
    batch norms of tokens stand between two reshapes."""

    base: ir.Value
    marks: tuple[AnyArray, ...]
    steps: tuple[ir.Node, ...]
    scaled: Affine | None = None


@final
@dataclass(frozen=True, slots=True)
class Found:
    """What a chain does: ``op`` applied to ``base``. ``constants`` lists, for a border with one number per
    channel, where those numbers are stored: the value and the place in it."""

    base: ir.Value
    op: Op
    steps: tuple[ir.Node, ...]
    constants: tuple[tuple[tuple[ir.Value, int], ...], ...] = ()


@final
@dataclass(eq=False)
class Moves:
    """The chains of one model, followed node by node in order."""

    survey: Survey
    operators: Operators
    views: dict[int, list[View]] = field(default_factory=dict)
    constants: list[tuple[float, ir.Value, int]] = field(default_factory=list)
    marked: dict[int, AnyArray] = field(default_factory=dict)
    between: set[int] = field(default_factory=set)

    def follow(self, node: ir.Node, linear: bool) -> dict[int, Found]:
        """What the outputs of ``node`` are, seen from an earlier tensor, by their place; only outputs of
        which that can be said. ``linear`` says that the node is known by itself."""
        found = self._follow(node, linear)
        if node.op_type in MOVING and (not linear or node.op_type == "Identity"):
            # No chain need start in the middle of another.
            self.between.update(id(value) for place, value in enumerate(node.outputs) if place not in found)
        return found

    def _follow(self, node: ir.Node, linear: bool) -> dict[int, Found]:
        payload = self._payload(node)
        if payload is None:
            return {}
        source = node.inputs[payload]
        assert source is not None
        if any(
            shape is None or prod(shape) > _MOST_MARKS for v in node.outputs for shape in self.survey.of(v).shapes
        ):
            return {}
        views = [*self._fresh(source), *self.views.get(id(source), [])][:_MOST_VIEWS]
        grown: dict[int, list[View]] = {}
        for view in views:
            results = [self._moved(node, payload, view, place) for place in range(self.survey.sets)]
            for number, output in enumerate(node.outputs):
                marks = [None if result is None else result[number] for result in results]
                kept = tuple(mark for mark in marks if mark is not None)
                if len(kept) == len(marks):
                    grown.setdefault(number, []).append(replace(view, marks=kept, steps=(*view.steps, node)))
                    self.views.setdefault(id(output), []).append(grown[number][-1])
        if linear:
            return {}
        found: dict[int, Found] = {}
        for number, seen in grown.items():
            for view in seen:
                told = self._tell(view)
                if told is not None:
                    found[number] = told
                    break
        return found

    def scale(self, source: ir.Value, node: ir.Node, op: Affine) -> None:
        """Let the chains that lead to ``source`` go on through ``node``, a factor and a shift per channel."""
        for view in self.views.get(id(source), ()):
            axis = None if view.scaled else self._axis_of_base(view, op)
            if axis is not None:
                conv = scale_shift(op.conv.scale, op.conv.bias, (self.survey.of(view.base).rank or 2) - 2)
                scaled = replace(view, steps=(*view.steps, node), scaled=Affine(conv, axis, op.biased))
                self.views.setdefault(id(node.outputs[0]), []).append(scaled)

    def _axis_of_base(self, view: View, op: Affine) -> int | None:
        """The axis of the tensor where a chain starts that runs along the channels which ``op`` has at its end."""
        shapes = [shape for shape in self.survey.of(view.base).shapes if shape is not None]
        if any(bool(np.any(marks <= 0)) for marks in view.marks):
            return None  # constants among them
        places = [
            np.unravel_index(np.ascontiguousarray(marks) - 1, shape)
            for marks, shape in zip(view.marks, shapes, strict=True)
        ]
        along = np.arange(op.conv.channels_out).reshape([-1] + [1] * (view.marks[0].ndim - 1 - op.axis))
        for axis in range(len(shapes[0]) - 1, 0, -1):
            known = all(shape[axis] == op.conv.channels_out for shape in shapes)
            if known and all(bool(np.all(index[axis] == along)) for index in places):
                return axis
        return None

    def passages(self, node: ir.Node, place: int) -> tuple[Passage, ...]:
        """The ways on which maps per channel pass through a node that moves numbers, to its output ``place``."""
        payload = self._payload(node)
        source = None if payload is None else node.inputs[payload]
        if payload is None or source is None:
            return ()
        shapes = [shape for shape in self.survey.of(source).shapes if shape is not None and len(shape) >= 2]
        if len(shapes) < self.survey.sets or any(prod(shape) > _MOST_MARKS for shape in shapes):
            return ()
        view = View(source, tuple(rearrangement.positions(shape) + 1 for shape in shapes), ())
        results = [self._moved(node, payload, view, number) for number in range(self.survey.sets)]
        marks = [result[place] - 1 for result in results if result is not None]
        if len(marks) < len(shapes) or any(bool(np.any(own < 0)) for own in marks):
            return ()
        return rearrangement.passages(list(zip(shapes, marks, strict=True)))

    # ---- one step --------------------------------------------------------------------------------

    def _payload(self, node: ir.Node) -> int | None:
        """The place of the one input whose numbers are moved and no constants, if all else is known."""
        if node.domain not in ("", "ai.onnx") or node.op_type not in MOVING:
            return None
        moved = MOVING[node.op_type] or range(len(node.inputs))
        dynamic = None
        for place, value in enumerate(node.inputs):
            if value is None:
                continue
            facts = self.survey.of(value)
            if facts.is_constant or facts.numbers is not None:
                continue
            if place not in moved or dynamic is not None or facts.dtype not in FLOATS:
                return None
            dynamic = place
        if node.op_type == "Pad" and node.attributes.get("value") is not None:
            return None  # the number of the border is no input before version 11
        return dynamic

    def _fresh(self, value: ir.Value) -> list[View]:
        if id(value) in self.between:
            return []
        shapes = self.survey.of(value).shapes
        known = [shape for shape in shapes if shape is not None and len(shape) >= 2 and prod(shape) <= _MOST_MARKS]
        if len(known) < len(shapes):
            return []
        return [View(value, tuple(rearrangement.positions(shape) + 1 for shape in known), ())]

    def _moved(self, node: ir.Node, payload: int, view: View, place: int) -> list[AnyArray] | None:
        moved = MOVING[node.op_type] or range(len(node.inputs))
        arrays: list[AnyArray | None] = []
        for number, value in enumerate(node.inputs):
            if value is None:
                arrays.append(None)
            elif number == payload:
                arrays.append(view.marks[place])
            elif number in moved:
                marks = self._marks(value, place)
                if marks is None:
                    return None
                arrays.append(marks)
            else:
                arrays.append(self.survey.of(value).at(place))
        try:
            return [np.asarray(result) for result in self.operators.run(node, arrays)]
        except InputError:
            return None

    def _marks(self, value: ir.Value, place: int) -> AnyArray | None:
        """Marks for the numbers of a constant: one for each place where a number is stored. A constant
        that was moved itself (an Expand of a stored one) has the marks of what it was made from."""
        facts = self.survey.of(value)
        if facts.is_constant and id(value) in self.marked:
            return self.marked[id(value)]
        node = value.producer()
        if node is not None and node.op_type in MOVING and node.op_type != "Pad" and node.domain == "":
            moved = MOVING[node.op_type] or range(len(node.inputs))
            arrays: list[AnyArray | None] = []
            for number, source in enumerate(node.inputs):
                if source is None:
                    arrays.append(None)
                else:
                    arrays.append(
                        self._marks(source, place) if number in moved else self.survey.of(source).at(place)
                    )
            try:
                results = self.operators.run(node, arrays)
            except InputError:
                return None
            marks = np.asarray(results[list(node.outputs).index(value)])
        else:
            numbers = facts.at(place) if facts.is_constant else None
            if numbers is None or numbers.size > _MOST_MARKS:
                return None
            flat = np.asarray(numbers, dtype=np.float64).reshape(-1)
            start = len(self.constants)
            self.constants += [(float(number), value, spot) for spot, number in enumerate(flat)]
            marks = -1 - start - np.arange(flat.size, dtype=np.int64)
            marks = np.where(flat == 0.0, 0, marks).reshape(numbers.shape)
        if facts.is_constant:
            self.marked[id(value)] = marks
        return marks

    # ---- what came out ---------------------------------------------------------------------------

    def _tell(self, view: View) -> Found | None:
        facts = self.survey.of(view.base)
        samples = [
            (shape, marks - 1) for shape, marks in zip(facts.shapes, view.marks, strict=True) if shape is not None
        ]
        if all(bool(np.all(marks >= 0)) for _, marks in samples):
            op = rearrangement.classify(samples)
            if view.scaled is not None:
                op = view.scaled if op == Gain() else None
            return None if op is None else Found(view.base, op, view.steps)
        if view.scaled is not None:
            return None
        borders = [self._border(shape, marks) for shape, marks in samples]
        first = borders[0]
        if first is None or any(border is None or border[:2] != first[:2] for border in borders):
            return None
        op, _, constants = first
        return Found(view.base, op, view.steps, constants)

    def _border(
        self, shape: tuple[int, ...], marks: AnyArray
    ) -> tuple[Op, int, tuple[tuple[tuple[ir.Value, int], ...], ...]] | None:
        """The padding of a tensor of this shape that gives these marks (less 1), if one does."""
        if marks.ndim != len(shape) or marks.ndim < 3:
            return None
        inside = marks >= 0
        if not inside.any():
            return None
        places = np.nonzero(inside)
        starts = [int(axis.min()) for axis in places]
        box = tuple(slice(start, start + size) for start, size in zip(starts, shape, strict=True))
        widths = tuple(
            (start, total - start - size) for start, total, size in zip(starts, marks.shape, shape, strict=True)
        )
        if any(after < 0 for _, after in widths) or int(inside.sum()) != prod(shape):
            return None
        if not np.array_equal(marks[box], rearrangement.positions(shape)) or widths[0] != (0, 0):
            return None
        for axis in (1, len(shape) - 1):
            if widths[axis] != (0, 0):
                continue
            numbers, sources = [], []
            for lane in np.moveaxis(marks, axis, 0):
                spots = np.unique(lane[lane < 0])
                stored = [self.constants[-2 - int(spot)] if spot < -1 else None for spot in spots]
                values = {0.0 if entry is None else entry[0] for entry in stored}
                if len(values) != 1:
                    break
                numbers.append(values.pop())
                sources.append(tuple((entry[1], entry[2]) for entry in stored if entry is not None))
            else:
                if len(set(numbers)) == 1:
                    return Pad(widths, numbers[0]), axis, tuple(sources)
                return Pad(widths, tuple(numbers), axis), axis, tuple(sources)
        return None
