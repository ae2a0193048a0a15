"""What every tensor of a model is: its type, its shape, and its numbers where they follow from constants.

The model is walked once with input sizes that stand in for the unknown ones, or rather with two sets of
them side by side. A size that is the same in both is taken for known; numbers computed from sizes (as
exporters do it, with chains of Shape, Gather and Concat) are known at each set, and marked entry by entry
if they depend on a size that is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, final

import numpy as np
import onnx
import onnx_ir as ir
from onnx.shape_inference import infer_node_outputs

from refold.errors import InputError
from refold.files import size_in_words
from refold.onnx.carried import Carried, formals, results
from refold.onnx.facts import Computed, Facts, Sizes
from refold.onnx.reference import FLOATS, AnyArray, Operators, describe, to_double
from refold.onnx.subgraphs import Body, bodies_of, captured_values, graphs_of
from refold.shown import printable

# Sizes that stand in for unknown ones: multiples of 32, as networks with five halvings need, and all
# different, so that swapped axes show.
_FREE = ((64, 96, 128, 160, 192), (96, 160, 64, 192, 128))
_FREE_VOLUME = ((16, 24, 32), (24, 32, 16))  # of tensors with three axes or more
_FREE_ALIKE = ((64,) * 5, (96,) * 5)
_FREE_LINES = ((48, 96, 128, 160, 192), (40, 160, 64, 192, 128))  # models of text read lines of one low height
_BATCH = (2, 3)

# The most numbers of a constant that is computed, and of a value that depends on sizes.
_MOST_CONSTANT = 2**25
_MOST_SIZED = 2**22
# The most numbers of a computed constant that are kept.
_MOST_KEPT = 2**16
# A tensor with more numbers than this is not a model but a trap.
_MOST_NUMBERS = 2**33
# How deep bodies are looked into, and how many nodes in them are looked at in all, counted again in every round
# that it takes to find out which sizes stay.
_MOST_DEPTH = 8
_MOST_STEPS = 50_000

# Operators that are not functions of their inputs, or whose constants are meant to stay as they are.
_NOT_EVALUATED = frozenset(
    {
        "Bernoulli",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "Dropout",
    }
)
# Operators that move numbers and compute nothing, with the inputs that hold what is moved.
MOVING: Mapping[str, tuple[int, ...]] = {
    "CenterCropPad": (0,),
    "Concat": (),  # all
    "DepthToSpace": (0,),
    "Expand": (0,),
    "Flatten": (0,),
    "Gather": (0,),
    "GatherElements": (0,),
    "GatherND": (0,),
    "Identity": (0,),
    "Pad": (0, 2),
    "Reshape": (0,),
    "ScatterElements": (0, 2),
    "ScatterND": (0, 2),
    "Slice": (0,),
    "SpaceToDepth": (0,),
    "Split": (0,),
    "Squeeze": (0,),
    "Tile": (0,),
    "Transpose": (0,),
    "Unsqueeze": (0,),
    "Where": (1, 2),
}
# Operators that work entry by entry.
_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Neg", "Cast", "Equal", "Where", "Abs", "Floor", "Ceil"})


@final
@dataclass(frozen=True, eq=False)
class Survey:
    """The facts of every value, by identity, of a model's main graph and of the bodies in ``opened``: those of each
    node that was looked into. ``sets`` is how many sets of sizes there are: one if all sizes are known."""

    facts: Mapping[int, Facts]
    sets: int
    opened: Mapping[int, tuple[Body, ...]]

    def of(self, value: ir.Value | None) -> Facts:
        """The facts of a value; of one that is left out, a constant without numbers."""
        if value is None:
            return Facts("", ((),) * self.sets)
        return self.facts[id(value)]


def survey(model: ir.Model, inputs: Sequence[ir.Value], operators: Operators) -> Survey:
    """Walk ``model``. ``inputs`` are the inputs of the graph that callers give; every other initializer is
    a constant. Raises InputError for tensors that no machine holds."""
    symbols = list(dict.fromkeys(_symbols(inputs)))
    if not symbols:
        # Sizes inside of bodies may change from run to run, whatever those of the inputs are.
        count = 2 if any(True for node in model.graph for _ in graphs_of(node)) else 1
        return _Walk(model, inputs, operators, ({},) * count).result()
    batch = {name for value in inputs for name in list(_symbols([value]))[:1] if _first_is_free(value)}
    attempts = []
    volumes = any(len(list(_symbols([value]))) > 3 for value in inputs)
    for free in (_FREE_VOLUME if volumes else _FREE, _FREE_ALIKE, _FREE_LINES):
        sets = []
        for place, sizes in enumerate(free):
            others = [name for name in symbols if name not in batch]
            given = {name: sizes[number % len(sizes)] for number, name in enumerate(others)}
            sets.append({**dict.fromkeys(batch, _BATCH[place]), **given})
        attempts.append(_Walk(model, inputs, operators, tuple(sets)).result())
        if all(facts.rank is not None for facts in attempts[-1].facts.values()):
            return attempts[-1]
    unknown = [sum(facts.rank is None for facts in attempt.facts.values()) for attempt in attempts]
    return attempts[int(np.argmin(unknown))]


def _symbols(values: Sequence[ir.Value]) -> Iterator[str]:
    """The names of the sizes that are not known, made up where the file has none."""
    for value in values:
        for axis, size in enumerate(value.shape or ()):
            if not _is_size_known(size):
                yield _symbol(value, axis, size)


def _is_size_known(size: Any) -> bool:
    """Whether a declared size is a number; some exporters write -1 for one that is not."""
    return isinstance(size, int) and size >= 0


def _symbol(value: ir.Value, axis: int, size: Any) -> str:
    named = not isinstance(size, int) and size.value
    return str(size.value) if named else f"{value.name}[{axis}]"


def _first_is_free(value: ir.Value) -> bool:
    shape = value.shape
    return shape is not None and len(shape) > 0 and not _is_size_known(shape[0])


@final
class _Walk:
    def __init__(
        self,
        model: ir.Model,
        inputs: Sequence[ir.Value],
        operators: Operators,
        sets: tuple[Mapping[str, int], ...],
    ) -> None:
        self.model, self.operators, self.sets = model, operators, sets
        self.facts: dict[int, Facts] = {}
        self.opened: dict[int, tuple[Body, ...]] = {}
        self.room = _MOST_STEPS
        self.largest = 0  # the most numbers of a stored tensor
        self.opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in operators.opsets.items()]
        for value in inputs:
            self.facts[id(value)] = self._declared(value)
        given = {id(value) for value in inputs}
        for value in model.graph.initializers.values():
            if id(value) not in given:
                self.facts[id(value)] = self._stored(value)

    def result(self) -> Survey:
        self._graph(self.model.graph, 0)
        return Survey(self.facts, len(self.sets), self.opened)

    def _graph(self, graph: ir.Graph, depth: int) -> None:
        for node in graph:
            found = self._node(node)
            if depth < _MOST_DEPTH:
                found = self._inside(node, found, depth)
            for value, facts in zip(node.outputs, found, strict=True):
                _refuse_trap(value, facts)
                self.facts[id(value)] = facts

    # ---- bodies ----------------------------------------------------------------------------------

    def _inside(self, node: ir.Node, found: list[Facts], depth: int) -> list[Facts]:
        """The facts of what a node gives, where shape inference does not know them, from its bodies, of which all
        values are looked at on the way."""
        self.opened.pop(id(node), None)
        bodies = bodies_of(node, self.operators.opsets.get(node.domain, 1))
        carried, ends = [], []
        for body in bodies:
            inputs = [None if value is None else self.facts[id(value)] for value in node.inputs]
            carried.append(Carried(body, formals(body, inputs, [self._declared(v) for v in body.graph.inputs])))
            end = self._settled(carried[-1], depth)
            if end is None:
                return found
            ends.append(end)
        if not bodies:
            return found
        self.opened[id(node)] = bodies
        told = results(bodies, carried, ends)
        return [
            facts if facts.rank is not None or inside is None or inside.rank is None else inside
            for facts, inside in zip(found, told, strict=True)
        ]

    def _settled(self, carried: Carried, depth: int) -> list[Facts] | None:
        """The outputs of a body with inputs that hold in every run; None if there is no room to find out."""
        graph = carried.body.graph
        while True:
            self.room -= len(graph)
            if self.room < 0:
                return None
            for value in graph.initializers.values():
                self.facts[id(value)] = self._stored(value)
            self.facts.update((id(v), facts) for v, facts in zip(graph.inputs, carried.inputs, strict=True))
            self._graph(graph, depth + 1)
            end = [self.facts[id(value)] for value in graph.outputs]
            if not carried.loosen(end):
                return end

    # ---- inputs and constants --------------------------------------------------------------------

    def _declared(self, value: ir.Value) -> Facts:
        """What the file says of a value."""
        dtype = _type_name(value.dtype) if isinstance(value.type, ir.TensorType) else ""
        if value.shape is None:
            return Facts(dtype, (None,) * len(self.sets))
        shapes: list[Sizes | None] = []
        for sizes in self.sets:
            shape = [
                size if isinstance(size, int) and size >= 0 else sizes.get(_symbol(value, axis, size))
                for axis, size in enumerate(value.shape)
            ]
            shapes.append(None if None in shape else tuple(size or 0 for size in shape))
        return Facts(dtype, tuple(shapes))

    def _stored(self, value: ir.Value) -> Facts:
        tensor = value.const_value
        if tensor is None:
            return self._declared(value)
        return self._tensor(tensor)

    def _tensor(self, tensor: Any) -> Facts:
        shape = tuple(int(size) for size in tensor.shape.numpy())
        self.largest = max(self.largest, prod(shape))
        return Facts(_type_name(tensor.dtype), (shape,) * len(self.sets), stored=tensor)

    # ---- nodes -----------------------------------------------------------------------------------

    def _node(self, node: ir.Node) -> list[Facts]:
        for value in (*node.inputs, *captured_values(node)):
            if value is not None and id(value) not in self.facts:
                raise InputError(
                    f"'{printable(describe(node))}' reads '{printable(value.name)}', which nothing before it "
                    "gives: this is no valid ONNX model"
                )
        inputs = [None if value is None else self.facts[id(value)] for value in node.inputs]
        if node.op_type == "Constant" and node.domain == "":
            return [self._constant(node)]
        proto = ir.to_proto(node)
        per_set = [self._inferred(node, proto, inputs, place) for place in range(len(self.sets))]
        outputs = []
        for number, value in enumerate(node.outputs):
            declared = self._declared(value)
            shapes = tuple(
                found[number][1] if found[number][1] is not None else declared.shapes[place]
                for place, found in enumerate(per_set)
            )
            outputs.append(Facts(per_set[0][number][0] or declared.dtype, shapes))
        return self._with_numbers(node, inputs, outputs)

    def _inferred(
        self, node: ir.Node, proto: onnx.NodeProto, inputs: Sequence[Facts | None], place: int
    ) -> list[tuple[str, Sizes | None]]:
        """Type and shape of the outputs at one set of sizes, by ONNX's own shape inference."""
        nothing: list[tuple[str, Sizes | None]] = [("", None)] * len(node.outputs)
        version = self.operators.opsets.get(node.domain, 1)
        try:
            schema = onnx.defs.get_schema(node.op_type, version, node.domain)
        except onnx.defs.SchemaError:
            return nothing
        types: dict[str, onnx.TypeProto] = {}
        data: dict[str, onnx.TensorProto] = {}
        for name, facts in zip(proto.input, inputs, strict=True):
            if facts is None:
                continue
            if not facts.dtype:
                return nothing
            types[name] = onnx.helper.make_tensor_type_proto(_type_number(facts.dtype), facts.shapes[place])
            numbers = facts.at(place) if _is_size(facts) else None
            if numbers is not None:
                data[name] = onnx.numpy_helper.from_array(_as(numbers, facts.dtype), name)
        for value in captured_values(node):
            facts = self.facts.get(id(value))
            if facts is not None and facts.dtype:
                types.setdefault(
                    str(value.name),
                    onnx.helper.make_tensor_type_proto(_type_number(facts.dtype), facts.shapes[place]),
                )
        try:
            found = infer_node_outputs(schema, proto, types, data, None, self.opsets, self.model.ir_version)
        except Exception:  # sizes that do not fit each other, or an operator without inference
            return nothing
        return [_type_and_shape(found.get(str(value.name))) for value in node.outputs]

    def _constant(self, node: ir.Node) -> Facts:
        for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
            attribute = node.attributes.get(name)
            if attribute is None or attribute.is_ref():
                continue
            if name == "value":
                tensor = attribute.as_tensor()
            else:
                kind = np.float32 if "float" in name else np.int64
                tensor = ir.Tensor(np.asarray(attribute.value, dtype=kind))
            return self._tensor(tensor)
        return self._declared(node.outputs[0])

    def _with_numbers(self, node: ir.Node, inputs: Sequence[Facts | None], outputs: list[Facts]) -> list[Facts]:
        if node.op_type == "Shape" and node.domain == "" and inputs[0] is not None:
            return [self._shape_of(node, inputs[0], outputs[0])]
        if node.op_type == "CastLike" and node.domain == "" and inputs[0] is not None:
            return [_cast(inputs[0], outputs[0])]
        given = [facts for facts in inputs if facts is not None]
        known = all(facts.is_constant or facts.numbers is not None for facts in given)
        deterministic = node.domain == "" and node.op_type not in _NOT_EVALUATED
        if not known or not deterministic or any(True for _ in graphs_of(node)):
            return outputs
        constant = all(facts.is_constant for facts in given)
        # A model with large weights may compute such, but little does not become much.
        most = min(max(_MOST_SIZED, 4 * self.largest), _MOST_CONSTANT) if constant else _MOST_SIZED
        sizes = [shape for facts in outputs for shape in facts.shapes]
        if any(shape is None or prod(shape) > most for shape in sizes):
            return outputs
        try:
            sets = 1 if constant else len(self.sets)
            results = [
                self.operators.run(node, [None if f is None else f.at(place) for f in inputs])
                for place in range(sets)
            ]
        except InputError:
            return outputs
        free = None if constant else self._free(node, inputs, results[0])
        arithmetic = any(facts.arithmetic for facts in given) or bool(given and node.op_type not in MOVING)
        found = []
        for number, facts in enumerate(outputs):
            numbers = tuple(np.asarray(result[number]) for result in results)
            mask = None if free is None else free[number]
            if mask is not None and not mask.any():
                mask = None
            shapes = tuple(array.shape for array in numbers) if sets > 1 else (numbers[0].shape,) * len(self.sets)
            if constant and numbers[0].size > _MOST_KEPT:
                again = Computed(partial(self._again, node, inputs, number))
                found.append(Facts(facts.dtype, shapes, stored=again, arithmetic=arithmetic))
            else:
                found.append(Facts(facts.dtype, shapes, numbers, mask, None, arithmetic))
        return found

    def _again(self, node: ir.Node, inputs: Sequence[Facts | None], number: int) -> AnyArray:
        arrays = [None if facts is None else facts.at(0) for facts in inputs]
        return np.asarray(self.operators.run(node, arrays)[number])

    def _shape_of(self, node: ir.Node, source: Facts, output: Facts) -> Facts:
        if source.shape is None:
            return output
        start = int(node.attributes.get_int("start", 0) or 0)
        end = node.attributes.get_int("end", len(source.shape))
        numbers = tuple(np.asarray(shape, dtype=np.int64)[start:end] for shape in source.shapes)
        free = np.asarray([size is None for size in source.shape], dtype=bool)[start:end]
        shapes = tuple(array.shape for array in numbers)
        return Facts("int64", shapes, numbers, free if free.any() else None)

    def _free(self, node: ir.Node, inputs: Sequence[Facts | None], results: Sequence[Any]) -> list[AnyArray]:
        """Which numbers of the results depend on sizes that are not known."""
        everything = [np.ones(np.shape(result), dtype=bool) for result in results]
        masks = [None if facts is None else _mask(facts) for facts in inputs]
        if node.op_type in MOVING:
            moved = MOVING[node.op_type] or range(len(inputs))
            others = [mask for place, mask in enumerate(masks) if mask is not None and place not in moved]
            if any(mask.any() for mask in others):
                return everything
            arrays = [
                masks[place].astype(np.int64)  # type: ignore[union-attr]  # the masks are arrays here
                if facts is not None and place in moved
                else None
                if facts is None
                else facts.at(0)
                for place, facts in enumerate(inputs)
            ]
            try:
                return [np.asarray(result) != 0 for result in self.operators.run(node, arrays)]
            except InputError:
                return everything
        if node.op_type in _ELEMENTWISE:
            present = [mask for mask in masks if mask is not None]
            joined = np.zeros((), dtype=bool)
            for mask in present:
                joined = joined | mask
            return [np.broadcast_to(joined, np.shape(result)) for result in results]
        return everything


def _cast(source: Facts, output: Facts) -> Facts:
    """What CastLike gives: its second input says a type and nothing else, so this is a constant if the first is."""
    if not output.dtype:
        return output
    if {source.dtype, output.dtype} <= FLOATS or source.dtype == output.dtype:
        return replace(source, dtype=output.dtype)
    if source.numbers is None and (source.stored is None or prod(source.shapes[0] or ()) > _MOST_KEPT):
        return output
    arrays = source.numbers or (source.array(),)
    numbers = tuple(to_double(_as(array, output.dtype)) for array in arrays)
    return Facts(output.dtype, source.shapes, numbers, source.free, None, source.arithmetic)


def _mask(facts: Facts) -> AnyArray:
    if facts.free is not None:
        return facts.free
    return np.zeros(facts.shapes[0] or (), dtype=bool)


def _is_size(facts: Facts) -> bool:
    """Whether shape inference may want to see the numbers: few of them."""
    shape = facts.shapes[0]
    return shape is not None and prod(shape) <= 4096


def _refuse_trap(value: ir.Value, facts: Facts) -> None:
    for shape in facts.shapes:
        if shape is not None and prod(shape) > _MOST_NUMBERS:
            raise InputError(
                f"the tensor '{printable(value.name)}' would have {size_in_words(prod(shape) * 4)}: no machine "
                "computes this model, so nothing is done with it"
            )


def _type_name(dtype: Any) -> str:
    if dtype is None or dtype in (ir.DataType.UNDEFINED, ir.DataType.STRING):
        return ""
    return str(dtype.numpy().name)


def _type_number(name: str) -> int:
    return int(_NUMBERS[name])


def _as(array: AnyArray, dtype: str) -> AnyArray:
    return array.astype(_NUMBERS[dtype].numpy())


def _numbers() -> dict[str, ir.DataType]:
    found: dict[str, ir.DataType] = {}
    for kind in ir.DataType:
        if kind not in (ir.DataType.UNDEFINED, ir.DataType.STRING):
            found.setdefault(kind.numpy().name, kind)
    return found


_NUMBERS = _numbers()


def _type_and_shape(found: onnx.TypeProto | None) -> tuple[str, Sizes | None]:
    if found is None or not found.HasField("tensor_type"):
        return "", None
    tensor = found.tensor_type
    dtype = _type_name(ir.DataType(tensor.elem_type)) if tensor.elem_type else ""
    if not tensor.HasField("shape"):
        return dtype, None
    sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim]
    return dtype, None if None in sizes else tuple(int(size or 0) for size in sizes)
