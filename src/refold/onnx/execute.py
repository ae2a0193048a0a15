"""Running ONNX models: in float64 for proofs, and as they ship.

The float64 reference is made of ONNX's own reference operators. Nothing of the engine's arithmetic is in
it. As they ship, models run in ONNX Runtime without its graph optimizations, which would fold too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
import onnx
import onnx_ir as ir

from refold.errors import CannotRunError, InputError
from refold.onnx import stepwise
from refold.onnx.lift import Record
from refold.onnx.reference import AnyArray, to_double
from refold.onnx.subgraphs import captured_values

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

# A protobuf holds 2 GiB; beyond, weights go beside it.
_MOST_INLINE = 2**31 - 2**24
# Bytes of constants in float64 that are kept, and of weights that a runtime may hold all at once where it is
# not timed.
_MOST_KEPT = 2**26
_MOST_AT_ONCE = 2**28
# What ONNX Runtime says of operators that it does not know, or not for these types.
_NOT_THERE = ("is not a registered function/op", "NOT_IMPLEMENTED")


@final
@dataclass(eq=False)
class Recent:
    """The arrays that were used last, by a number; together they have ``most`` bytes at most."""

    most: int = _MOST_KEPT
    arrays: dict[int, AnyArray] = field(default_factory=dict)
    size: int = 0

    def get(self, key: int) -> AnyArray | None:
        """The array of that number, if it is still known."""
        array = self.arrays.pop(key, None)
        if array is not None:
            self.arrays[key] = array
        return array

    def put(self, key: int, array: AnyArray) -> None:
        """Know one more; those that were not used for the longest time are forgotten for it."""
        self.arrays[key] = array
        self.size += array.nbytes
        while self.size > self.most:
            self.size -= self.arrays.pop(next(iter(self.arrays))).nbytes


@final
@dataclass(eq=False)
class Session:
    """What the front end remembers of a lifted model."""

    record: Record
    gives_proto: bool
    constants: Recent = field(default_factory=lambda: Recent())
    runtimes: dict[bool, Any] = field(default_factory=dict)  # by whether it may optimize the graph

    @cached_property
    def reads(self) -> dict[int, tuple[ir.Value, ...]]:
        """What every node reads that is no constant, its subgraphs included, by identity."""
        of = self.record.survey.of
        return {
            id(node): tuple(
                value
                for value in (*node.inputs, *captured_values(node))
                if value is not None and not of(value).is_constant
            )
            for node in self.record.model.graph
        }

    @cached_property
    def places(self) -> dict[int, int]:
        """The place of every node in the order of the model, by identity."""
        return {id(node): place for place, node in enumerate(self.record.model.graph)}


# ---- float64 -------------------------------------------------------------------------------------


def evaluate(session: Session, feeds: Mapping[str, AnyArray], wanted: Sequence[str]) -> dict[str, AnyArray]:
    """The values ``wanted`` in float64 from ``feeds``."""
    record = session.record
    arrays = {name: to_double(np.asarray(array)) for name, array in feeds.items()}
    steps = _needed(session, frozenset(arrays), wanted)
    batch = _fixed_batch(record)
    rows = {array.shape[0] for array in arrays.values() if array.ndim}
    everywhere = all(step.op_type in _BY_EXAMPLE and not step.domain for step in steps)
    if batch is None or everywhere or rows <= {batch}:
        return _run_steps(session, steps, arrays, wanted)
    if len(rows) != 1 or any(not array.ndim for array in arrays.values()):
        raise InputError(f"the model is made for batches of {batch}")
    (count,) = rows
    parts = []
    for start in range(0, count, batch):
        part = {name: array[start : start + batch] for name, array in arrays.items()}
        short = batch - min(batch, count - start)
        if short:
            part = {n: np.concatenate([a, np.repeat(a[-1:], short, axis=0)]) for n, a in part.items()}
        parts.append(_run_steps(session, steps, part, wanted))
    return {name: _joined([part[name] for part in parts], batch, count) for name in wanted}


def _joined(parts: Sequence[AnyArray], batch: int, count: int) -> AnyArray:
    if all(part.ndim and part.shape[0] == batch for part in parts):
        return np.concatenate(parts)[:count]
    return parts[0]


def _fixed_batch(record: Record) -> int | None:
    """The batch size that a model is made for, if it is made for one."""
    sizes = set()
    for value in record.inputs:
        shape = record.survey.of(value).shape
        if shape:
            sizes.add(shape[0])
    return sizes.pop() if len(sizes) == 1 else None


def _needed(session: Session, known: frozenset[str], wanted: Sequence[str]) -> list[ir.Node]:
    """The nodes between what is known and what is wanted, in order."""
    record = session.record
    waiting = [record.values[name] for name in wanted]
    inputs = {id(value) for value in record.inputs}
    reached: set[int] | None = None
    needed: dict[int, ir.Node] = {}
    while waiting:
        value = waiting.pop()
        if value.name in known or record.survey.of(value).is_constant:
            continue
        node = value.producer()
        if node is None or id(value) in inputs:
            raise InputError(f"the value '{value.name}' is needed and was not given")
        if id(node) not in needed:
            needed[id(node)] = node
            if node.op_type == "Shape":
                reached = _reached(session, known) if reached is None else reached
                if _is_told(record, node, reached):
                    continue
            waiting += session.reads[id(node)]
    return sorted(needed.values(), key=lambda node: session.places[id(node)])


def _reached(session: Session, known: frozenset[str]) -> set[int]:
    """The values (by identity) that can be computed from what is known."""
    reached = {id(value) for name, value in session.record.values.items() if name in known}
    for node in session.record.model.graph:
        if all(id(value) in reached for value in session.reads[id(node)]):
            reached.update(id(value) for value in node.outputs)
    return reached


def _is_told(record: Record, node: ir.Node, reached: set[int]) -> bool:
    """Whether a node asks for the shape of a tensor that is not computed here, but whose shape is known, up
    to the number of examples."""
    if node.op_type != "Shape" or node.domain or node.inputs[0] is None or id(node.inputs[0]) in reached:
        return False
    shape = record.survey.of(node.inputs[0]).shape
    return shape is not None and None not in shape[1:]


def _told_shape(record: Record, node: ir.Node, feeds: Mapping[str, AnyArray]) -> AnyArray:
    rows = {array.shape[0] for array in feeds.values() if array.ndim}
    assert node.inputs[0] is not None
    shape = record.survey.of(node.inputs[0]).shape or ()
    if len(rows) != 1:
        raise InputError(f"the shape of '{node.inputs[0].name}' is needed and not known")
    numbers = np.asarray([rows.copy().pop() if size is None else size for size in shape], dtype=np.int64)
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(shape))
    return numbers[start:end]


def _run_steps(
    session: Session, steps: Sequence[ir.Node], feeds: Mapping[str, AnyArray], wanted: Sequence[str]
) -> dict[str, AnyArray]:
    record = session.record
    known: dict[str, Any] = dict(feeds)

    def read(value: ir.Value) -> Any:
        name = str(value.name)
        return known[name] if name in known else constant(session, value)

    for node in steps:
        source = node.inputs[0] if node.inputs else None
        asks = source if node.op_type == "Shape" and not node.domain else None
        if asks is not None and asks.name not in known and not record.survey.of(asks).is_constant:
            known[str(node.outputs[0].name)] = _told_shape(record, node, feeds)
            continue
        arrays = [None if value is None else read(value) for value in node.inputs]
        captured = {str(value.name): read(value) for value in captured_values(node)}
        results = record.operators.run(node, arrays, captured)
        outputs = [value for value in node.outputs if value.name]
        for value, result in zip(outputs, results, strict=False):
            if value.name not in feeds:
                known[str(value.name)] = result
    found = {}
    for name in wanted:
        array = read(record.values[name])
        if not isinstance(array, np.ndarray):
            raise InputError(f"the value '{name}' is no tensor")
        found[name] = array
    return found


def constant(session: Session, value: ir.Value) -> AnyArray:
    """The numbers of a constant in float64, with the borders that are taken for biases as they are taken."""
    record = session.record
    if id(value) in record.exact:
        return record.exact[id(value)]
    facts = record.survey.of(value)
    if not facts.is_constant:
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


# ---- as it ships ---------------------------------------------------------------------------------


def run(session: Session, inputs: Sequence[AnyArray], optimized: bool = False) -> list[AnyArray]:
    """The outputs of the model in ONNX Runtime, with its default graph optimizations if ``optimized``."""
    record = session.record
    names = [str(value.name) for value in record.inputs]
    outputs = [str(value.name) for value in record.model.graph.outputs]
    feeds = {}
    for name, value, array in zip(names, record.inputs, inputs, strict=True):
        dtype = record.survey.of(value).dtype
        feeds[name] = np.asarray(array).astype(np.dtype(dtype) if dtype != "bfloat16" else array.dtype)
    try:
        if not optimized and _stored_bytes(record.model) > _MOST_AT_ONCE:
            return stepwise.run(record.model, feeds, outputs)
        if optimized not in session.runtimes:
            session.runtimes[optimized] = _runtime(record.model, optimized)
        results = session.runtimes[optimized].run(outputs, feeds)
    except Exception as error:  # an operator or a type that ONNX Runtime does not have
        return _run_reference(record, feeds, outputs, error)
    return [np.asarray(result) for result in results]


def stored(tensor: Any) -> AnyArray:
    """The numbers of a tensor of the file; nothing of what lies beside it stays in memory."""
    array = np.array(tensor.numpy())
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return array


def _stored_bytes(model: ir.Model) -> int:
    return sum(tensor.nbytes for value in model.graph.initializers.values() if (tensor := value.const_value))


def _runtime(model: ir.Model, optimized: bool) -> Any:
    import onnxruntime

    options = stepwise.options()
    if optimized:
        options.graph_optimization_level = onnxruntime.SessionOptions().graph_optimization_level
    providers = ["CPUExecutionProvider"]
    if _stored_bytes(model) < _MOST_INLINE:
        proto = ir.to_proto(_inline(model))
        return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=providers)
    with tempfile.TemporaryDirectory(prefix="refold-") as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model.clone(), path, external_data="model.data")
        return onnxruntime.InferenceSession(str(path), options, providers=providers)


def _inline(model: ir.Model) -> ir.Model:
    """The model with the numbers that lie in other files in it."""
    values = list(model.graph.initializers.values())
    if not any(isinstance(value.const_value, ir.ExternalTensor) for value in values):
        return model
    copied = model.clone()
    for value in copied.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=tensor.name)
    return copied


def _run_reference(
    record: Record, feeds: Mapping[str, AnyArray], outputs: Sequence[str], reason: Exception
) -> list[AnyArray]:
    from onnx.reference import ReferenceEvaluator

    try:
        proto: onnx.ModelProto = ir.to_proto(_inline(record.model))
        results = ReferenceEvaluator(proto).run(list(outputs), dict(feeds))
    except Exception:  # neither of the two runs it: what the first one said is what matters
        lines = str(reason).strip().splitlines() or [type(reason).__name__]
        if any(words in lines[0] for words in _NOT_THERE):
            raise CannotRunError(f"nothing that is installed runs the model: {lines[0][:300]}") from reason
        raise InputError(f"the model does not run: {lines[0][:300]}") from reason
    assert isinstance(results, list)
    return [np.asarray(result) for result in results]


def identify(record: Record, node: str) -> tuple[str, tuple[AnyArray, ...]]:
    """What an operator is: its kind with all settings, and its constants."""
    step = record.nodes[node]
    proto = ir.to_proto(step)
    settings = sorted(str(attribute) for attribute in proto.attribute)
    places = []
    parameters = []
    for place, value in enumerate(step.inputs):
        if value is not None and record.survey.of(value).is_constant:
            places.append(place)
            parameters.append(record.survey.of(value).as_stored())
    left_out = [place for place, value in enumerate(step.inputs) if value is None]
    kind = f"{step.domain}:{step.op_type}:{step.overload} {settings} {places} {left_out}"
    return kind, tuple(parameters)
