"""Running single operators with ONNX's own reference implementation, in float64.

Constants, size arithmetic and proofs are all computed here: nothing of the engine's arithmetic is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from refold.errors import InputError
from refold.onnx import convolution, pooling, transposed

AnyArray = npt.NDArray[Any]

FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})

_NARROW = frozenset({onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT})
# Attributes that name the type of a result.
_TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype"})

# Versions of operators that the reference gets wrong (it takes batch norms before version 14 for training)
# or lacks, and the version that computes the same and has it right.
_RIGHT_SINCE = {"BatchNormalization": 15, "QuantizeLinear": 19, "DequantizeLinear": 19}

Definition = Callable[[ir.Node, Sequence[AnyArray | None]], AnyArray | None]

_BY_DEFINITION: dict[str, Definition] = {
    "AveragePool": pooling.average,
    "Conv": convolution.convolution,
    "MaxPool": pooling.largest,
    "ConvTranspose": transposed.convolution,
}


@final
@dataclass(eq=False)
class Operators:
    """The operators of one model: ``opsets`` are the versions it imports, ``functions`` its local ones.
    What was built for a node is kept."""

    opsets: Mapping[str, int]
    functions: Sequence[onnx.FunctionProto] = ()
    built: dict[int, tuple[ir.Node, ReferenceEvaluator]] = field(default_factory=dict)

    def run(
        self, node: ir.Node, arrays: Sequence[AnyArray | None], captured: Mapping[str, AnyArray] | None = None
    ) -> list[Any]:
        """The outputs of ``node`` on ``arrays``, one per input (None: left out). ``captured`` are the values
        that its subgraphs read from outside. Floating results are float64.

        Raises InputError where the operator has no reference implementation or does not run on these.
        """
        quick = _BY_DEFINITION.get(node.op_type) if not node.domain else None
        feeds = dict(captured or {})
        for value, array in zip(node.inputs, arrays, strict=True):
            if value is not None and array is not None:
                feeds[str(value.name)] = array
        try:
            with np.errstate(all="ignore"):
                if quick is not None and arrays[0] is not None:
                    result = quick(node, arrays)
                    if result is not None:
                        return [result]
                results = self._evaluator(node).run(None, feeds, attributes={})
        except InputError:
            raise
        except Exception as error:  # whatever the implementation raises on what it does not take
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"'{describe(node)}' does not run in float64: {reason[:200]}") from error
        assert isinstance(results, list)
        return [_double(result) for result in results]

    def _evaluator(self, node: ir.Node) -> ReferenceEvaluator:
        known = self.built.get(id(node))
        if known is None:
            proto = widened(ir.to_proto(node))
            opsets = dict(self.opsets)
            since = _RIGHT_SINCE.get(node.op_type, 0)
            if node.domain == "" and opsets.get("", since) < since:
                opsets[""] = since
                kept = [attribute for attribute in proto.attribute if attribute.name != "spatial"]
                del proto.attribute[:]
                proto.attribute.extend(kept)
            function = onnx.helper.make_function(
                "",
                "one_operator",
                list(dict.fromkeys(name for name in proto.input if name)),
                [name for name in proto.output if name],
                [proto],
                [onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items()],
            )
            functions: list[Any] = [_widened_function(function) for function in self.functions]
            known = node, ReferenceEvaluator(function, functions=functions)
            self.built[id(node)] = known
        return known[1]


def describe(node: ir.Node) -> str:
    """What a user knows a node by."""
    name = node.name or next((output.name for output in node.outputs if output.name), "")
    return f"{node.op_type} {name}".strip()


def widened(node: onnx.NodeProto) -> onnx.NodeProto:
    """A copy of ``node`` whose constants and conversions are in float64, its subgraphs' as well."""
    copied = onnx.NodeProto()
    copied.CopyFrom(node)
    _widen(copied)
    return copied


def _widened_function(function: onnx.FunctionProto) -> onnx.FunctionProto:
    copied = onnx.FunctionProto()
    copied.CopyFrom(function)
    for node in copied.node:
        _widen(node)
    return copied


def _widen(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.name in _TYPE_ATTRIBUTES and attribute.i in _NARROW:
            attribute.i = onnx.TensorProto.DOUBLE
        if attribute.type == onnx.AttributeProto.TENSOR:
            _widen_tensor(attribute.t)
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            for tensor in graph.initializer:
                _widen_tensor(tensor)
            for inner in graph.node:
                _widen(inner)


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in _NARROW:
        wide = numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))


def _double(result: Any) -> Any:
    if isinstance(result, np.ndarray | np.generic):
        return to_double(np.asarray(result))
    return result


def to_double(array: AnyArray) -> AnyArray:
    """The array in float64 if it holds real numbers, else as it is."""
    if array.dtype.name in FLOATS and array.dtype != np.float64:
        return array.astype(np.float64)
    return array
