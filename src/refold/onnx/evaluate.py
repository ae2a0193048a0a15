"""Running ONNX models in float64, for proofs.

The reference is made of ONNX's own reference operators, one after the other, and of If, Loop and Scan by their
definitions. Nothing of the engine's arithmetic is in it. Values inside of bodies can be asked for and given as all
others can. Where they are asked for and a body's inputs were not given, one run is computed: with what it captures,
and with random numbers of the right shapes in the place of what a loop carries along.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import onnx_ir as ir

from refold.errors import InputError
from refold.onnx import control
from refold.onnx.functions import loops
from refold.onnx.lift import Record
from refold.onnx.reference import AnyArray, describe, to_double
from refold.onnx.session import Session
from refold.onnx.subgraphs import Body, Scope, bodies_of
from refold.shown import printable

# Operators that treat every example of a batch by itself, whatever its size. With others, a model that
# was made for one batch size runs in batches of that size.
# fmt: off
_BY_EXAMPLE = frozenset(
    [
        "Abs", "Acos", "Add", "And", "Asin", "Atan", "AveragePool", "BatchNormalization", "Cast", "Ceil",
        "Celu", "Clip", "Conv", "ConvTranspose", "Cos", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu",
        "Gemm", "GlobalAveragePool", "GlobalMaxPool", "Greater", "GroupNormalization", "HardSigmoid",
        "HardSwish", "Identity", "InstanceNormalization", "LRN", "LayerNormalization", "LeakyRelu", "Less",
        "Log", "LpPool", "MatMul", "Max", "MaxPool", "Mean", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or",
        "PRelu", "Pad", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus",
        "Softsign", "Sqrt", "Sub", "Sum", "Tan", "Tanh", "ThresholdedRelu",
    ]
)
# fmt: on


# One step: a node of a scope, or (None) the inputs of the scope's body.
Step = tuple[Scope, ir.Node | None]


def evaluate(session: Session, feeds: Mapping[str, AnyArray], wanted: Sequence[str]) -> dict[str, AnyArray]:
    """The values ``wanted`` in float64 from ``feeds``."""
    record = session.record
    arrays = {name: to_double(np.asarray(array)) for name, array in feeds.items()}
    steps = _Search(session, arrays).needed(wanted)
    batch = _fixed_batch(record, arrays, wanted)
    rows = {array.shape[0] for array in arrays.values() if array.ndim}
    by_example = all(node is not None and node.op_type in _BY_EXAMPLE and not node.domain for _, node in steps)
    if batch is None or by_example or rows <= {batch}:
        return _Run(session, arrays).values(steps, wanted)
    if len(rows) != 1 or any(not array.ndim for array in arrays.values()):
        raise InputError(f"the model is made for batches of {batch}")
    (count,) = rows
    parts = []
    for start in range(0, count, batch):
        part = {name: array[start : start + batch] for name, array in arrays.items()}
        short = batch - min(batch, count - start)
        if short:
            part = {n: np.concatenate([a, np.repeat(a[-1:], short, axis=0)]) for n, a in part.items()}
        parts.append(_Run(session, part).values(steps, wanted))
    return {name: _joined([part[name] for part in parts], batch, count) for name in wanted}


def _joined(parts: Sequence[AnyArray], batch: int, count: int) -> AnyArray:
    if all(part.ndim and part.shape[0] == batch for part in parts):
        return np.concatenate(parts)[:count]
    return parts[0]


def _fixed_batch(record: Record, feeds: Mapping[str, AnyArray], wanted: Sequence[str]) -> int | None:
    """The batch size that a model is made for, if it is made for one: that of its inputs, or of what is given
    where values inside of bodies are wanted."""
    values: Sequence[ir.Value] = record.inputs
    if any(record.values[name][0].body is not None for name in (*feeds, *wanted)):
        values = [record.values[name][1] for name in feeds]
        if all(_has_its_batch(record, record.values[name][1], array) for name, array in feeds.items()):
            return None
    shapes = [record.survey.of(value).shape for value in values]
    sizes = {shape[0] for shape in shapes if shape}
    return sizes.pop() if len(sizes) == 1 else None


def _has_its_batch(record: Record, value: ir.Value, array: AnyArray) -> bool:
    shape = record.survey.of(value).shape
    return not shape or shape[0] is None or array.shape[:1] == shape[:1]


@final
class _Search:
    """What has to be computed."""

    def __init__(self, session: Session, feeds: Mapping[str, AnyArray]) -> None:
        self.session, self.record = session, session.record
        self.known = {(id(scope), id(value)) for scope, value in map(self.record.values.__getitem__, feeds)}
        self.reached: set[tuple[int, int]] | None = None

    def needed(self, wanted: Sequence[str]) -> list[Step]:
        """The steps between what is known and what is wanted, in order."""
        waiting = [self.record.values[name] for name in wanted]
        found: dict[int, Step] = {}
        while waiting:
            scope, value = waiting.pop()
            if (id(scope), id(value)) in self.known or self.session.is_constant(value):
                continue
            if not scope.owns(value):
                assert scope.parent is not None
                waiting.append((scope.parent, value))
                continue
            node = value.producer()
            if node is None and scope.body is not None:
                assert scope.parent is not None
                found[id(scope)] = scope, None
                waiting += [(scope.parent, v) for v in scope.body.owner.inputs if v is not None]
                continue
            if node is None or (scope.body is None and any(value is known for known in self.record.inputs)):
                raise InputError(f"the value '{value.name}' is needed and was not given")
            if id(node) not in found:
                found[id(node)] = scope, node
                if not self._is_told(scope, node):
                    waiting += [(scope, v) for v in self.session.reads(node)]
        return [found[key] for key in sorted(found, key=self.session.places.__getitem__)]

    def _is_told(self, scope: Scope, node: ir.Node) -> bool:
        """Whether a node asks for the shape of a tensor that is not computed here, but whose shape is known, up
        to the number of examples."""
        if node.op_type != "Shape" or node.domain or node.inputs[0] is None:
            return False
        if self.reached is None:
            self.reached = set(self.known)
            self._reach(self.record.scopes[0])
        if self._is_reached(scope, node.inputs[0]):
            return False
        shape = self.record.survey.of(node.inputs[0]).shape
        return shape is not None and None not in shape[1:]

    def _reach(self, scope: Scope) -> None:
        """Note what can be computed from what is known."""
        assert self.reached is not None
        for node in scope.graph:
            for inner in self.session.inside.get(id(node), ()):
                assert inner.body is not None
                if all(self._is_reached(scope, v) for v in inner.body.owner.inputs if v is not None):
                    self.reached.update((id(inner), id(value)) for value in inner.graph.inputs)
                self._reach(inner)
            if all(self._is_reached(scope, value) for value in self.session.reads(node)):
                self.reached.update((id(scope), id(value)) for value in node.outputs)

    def _is_reached(self, scope: Scope, value: ir.Value) -> bool:
        assert self.reached is not None
        if self.session.is_constant(value) or (id(scope), id(value)) in self.reached:
            return True
        return scope.parent is not None and not scope.owns(value) and self._is_reached(scope.parent, value)


@final
@dataclass(eq=False)
class _Frame:
    """The values of one graph that are known, by identity; others are those of the graph around it."""

    known: dict[int, Any] = field(default_factory=dict)
    parent: _Frame | None = None


@final
class _Run:
    """One computation. Every scope has one frame; bodies that are run by their nodes get one for each run."""

    def __init__(self, session: Session, feeds: Mapping[str, AnyArray]) -> None:
        self.session, self.record, self.feeds = session, session.record, feeds
        self.runner = control.Runner(
            lambda body, inputs: self._outputs(self.frame, body, inputs), self._empty, session.endless
        )
        self.frames: dict[int, _Frame] = {}
        for scope in self.record.scopes:
            self.frames[id(scope)] = _Frame(parent=None if scope.parent is None else self.frames[id(scope.parent)])
        for name, array in feeds.items():
            scope, value = self.record.values[name]
            self.frames[id(scope)].known[id(value)] = array
        self.frame = self.frames[id(self.record.scopes[0])]

    def values(self, steps: Sequence[Step], wanted: Sequence[str]) -> dict[str, AnyArray]:
        """Take the steps; gives what is wanted."""
        for scope, node in steps:
            self.frame = self.frames[id(scope)]
            if node is None:
                self._start(scope)
            else:
                self._step(node)
        found = {}
        for name in wanted:
            scope, value = self.record.values[name]
            self.frame = self.frames[id(scope)]
            found[name] = self._read(value)
            if not isinstance(found[name], np.ndarray):
                raise InputError(f"the value '{name}' is no tensor")
        return found

    def _read(self, value: ir.Value) -> Any:
        frame: _Frame | None = self.frame
        while frame is not None:
            if id(value) in frame.known:
                return frame.known[id(value)]
            frame = frame.parent
        return constant(self.session, value)

    def _step(self, node: ir.Node) -> None:
        results = self._results(node)
        outputs = [value for value in node.outputs if value.name]
        for value, result in zip(outputs, results, strict=False):
            self.frame.known.setdefault(id(value), result)  # what was given stays

    def _results(self, node: ir.Node) -> list[Any]:
        source = node.inputs[0] if node.inputs else None
        if node.op_type == "Shape" and not node.domain and source is not None and not self._is_there(source):
            return [self._told_shape(node)]
        arrays = [None if value is None else self._read(value) for value in node.inputs]
        bodies = bodies_of(node, self.record.operators.opsets.get(node.domain, 1))
        if bodies:
            return self.runner.perform(bodies, arrays)
        if node.op_type in ("Loop", "Scan") and node.domain in ("", "ai.onnx"):
            raise InputError(f"'{printable(describe(node))}' is not as its operator says")
        if loops(self.record.model, node):
            raise InputError(f"'{printable(describe(node))}' calls a function with loops; that is not followed")
        captured = {str(value.name): self._read(value) for value in self.session.captured(node)}
        return self.record.operators.run(node, arrays, captured)

    def _is_there(self, value: ir.Value) -> bool:
        frame: _Frame | None = self.frame
        while frame is not None and id(value) not in frame.known:
            frame = frame.parent
        return frame is not None or self.session.is_constant(value)

    def _told_shape(self, node: ir.Node) -> AnyArray:
        rows = {array.shape[0] for array in self.feeds.values() if array.ndim}
        assert node.inputs[0] is not None
        shape = self.record.survey.of(node.inputs[0]).shape or ()
        if len(rows) != 1:
            raise InputError(f"the shape of '{node.inputs[0].name}' is needed and not known")
        numbers = np.asarray([rows.copy().pop() if size is None else size for size in shape], dtype=np.int64)
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(shape))
        return numbers[start:end]

    # ---- bodies ----------------------------------------------------------------------------------

    def _outputs(self, around: _Frame, body: Body, inputs: Sequence[Any]) -> list[Any]:
        """The outputs of one run of a body, inside of a frame."""
        self.frame = _Frame({id(v): array for v, array in zip(body.graph.inputs, inputs, strict=True)}, around)
        for value in body.graph.initializers.values():
            if id(value) not in self.record.survey.facts and value.const_value is not None:
                self.frame.known.setdefault(id(value), to_double(np.asarray(value.const_value.numpy())))
        for node in self.session.needed(body.graph):
            self._step(node)
        found = [self._read(value) for value in body.graph.outputs]
        self.frame = around
        return found

    def _empty(self, value: ir.Value) -> AnyArray:
        facts = self.record.survey.facts.get(id(value))
        shape = (facts.shape if facts is not None else None) or ()
        kind = facts.dtype if facts is not None else ""
        return np.zeros([size or 0 for size in shape], np.int64 if kind.startswith("int") else kind or np.float64)

    def _start(self, scope: Scope) -> None:
        """Some inputs for a body: indices and other whole numbers are those of the first run."""
        body = scope.body
        assert body is not None
        assert scope.parent is not None
        frame = self.frame
        self.frame = self.frames[id(scope.parent)]
        given = [None if value is None else self._read(value) for value in body.owner.inputs]
        self.frame = frame
        first, _ = body.before_states
        count = len(body.states)
        start = len(given) - count - body.scanned
        own = [np.zeros(1, dtype=np.int64), np.ones(1, dtype=bool)][:first]
        arrays: list[Any] = [
            array.reshape((1,) * (self.record.survey.of(value).rank or 0))
            for array, value in zip(own, body.graph.inputs, strict=False)
        ]
        arrays += given[start : start + count]
        axes = body.owner.attributes.get_ints("scan_input_axes") or [0] * body.scanned
        for array, axis in zip(given[start + count :], axes, strict=True):
            if not isinstance(array, np.ndarray) or not array.size or not -array.ndim <= axis < array.ndim:
                raise InputError(f"'{printable(describe(body.owner))}' has nothing to scan")
            arrays.append(np.take(array, 0, axis))
        number = self.record.scopes.index(scope)  # the same one in a folded model
        for place, (value, array) in enumerate(zip(body.graph.inputs, arrays, strict=True)):
            if isinstance(array, np.ndarray) and array.dtype.kind == "f":
                array = np.random.default_rng((number, place)).standard_normal(array.shape)
            frame.known.setdefault(id(value), array)


def constant(session: Session, value: ir.Value) -> AnyArray:
    """The numbers of a constant in float64, with the borders that are taken for biases as they are taken."""
    record = session.record
    if id(value) in record.exact:
        return record.exact[id(value)]
    facts = record.survey.facts.get(id(value))
    if facts is None or not facts.is_constant:
        raise InputError(f"the value '{value.name}' is needed and was not given")
    known = session.constants.get(id(value))
    if known is not None:
        return known
    node = value.producer()
    array = facts.array()
    if node is not None and _reads_exact(record, node):
        # What depends on sizes has no effect on a constant, whatever they are.
        arrays = [
            None
            if read is None
            else constant(session, read)
            if record.survey.of(read).is_constant
            else record.survey.of(read).at(0)
            for read in node.inputs
        ]
        array = record.operators.run(node, arrays)[list(node.outputs).index(value)]
    session.constants.put(id(value), array)
    return array


def _reads_exact(record: Record, node: ir.Node) -> bool:
    """Whether a constant is computed from one that is taken for a bias."""
    waiting = [node] if record.exact else []
    seen: set[int] = set()
    while waiting:
        step = waiting.pop()
        if id(step) in seen or step.op_type == "Shape":
            continue
        seen.add(id(step))
        for value in step.inputs:
            if value is None or not record.survey.of(value).is_constant:
                continue
            if id(value) in record.exact:
                return True
            producer = value.producer()
            if producer is not None:
                waiting.append(producer)
    return False
