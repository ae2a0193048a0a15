"""Running a model in ONNX Runtime one operator after the other, for models with more weights than memory has
room for. Without graph optimizations that is what a session does as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx import helper

from refold.onnx.subgraphs import captured_values, graphs_of

AnyArray = npt.NDArray[Any]

# Bytes of a constant that is part of an operator's model; some operators want theirs there.
_MOST_INSIDE = 2**20


def options() -> Any:
    """How ONNX Runtime runs what is measured: on one thread, and it folds nothing."""
    import onnxruntime

    found = onnxruntime.SessionOptions()
    found.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    found.log_severity_level = 4
    found.intra_op_num_threads = 1
    return found


def run(model: ir.Model, feeds: Mapping[str, AnyArray], outputs: Sequence[str]) -> list[AnyArray]:
    """The outputs of a model, of which only the weights of one operator are in memory at a time. Raises whatever
    ONNX Runtime raises."""
    known: dict[str, AnyArray] = dict(feeds)
    stored = model.graph.initializers
    reads = [
        [value for value in dict.fromkeys([*node.inputs, *captured_values(node)]) if value is not None]
        for node in model.graph
    ]
    last = {value.name: place for place, values in enumerate(reads) for value in values}
    for place, (node, values) in enumerate(zip(model.graph, reads, strict=True)):
        given, constants = {}, []
        for value in values:
            name = str(value.name)
            if name in known:
                given[name] = known[name]
                continue
            tensor = stored[name].const_value
            assert tensor is not None
            if tensor.nbytes <= _MOST_INSIDE or tensor.dtype.numpy().kind not in "fiub":
                constants.append(ir.to_proto(ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=name)))
            else:
                given[name] = np.array(tensor.numpy())
            if isinstance(tensor, ir.ExternalTensor):
                tensor.release()
        names = [str(value.name) for value in node.outputs if value.name]
        known.update(zip(names, _one(model, node, given, constants, names), strict=True))
        for value in values:
            if last[value.name] == place and value.name not in outputs:
                known.pop(str(value.name), None)
    return [known[name] for name in outputs]


def _one(
    model: ir.Model, node: ir.Node, given: Mapping[str, AnyArray], constants: Sequence[Any], names: Sequence[str]
) -> list[AnyArray]:
    import onnxruntime

    graph = helper.make_graph(
        [_with_numbers(node)],
        "one_operator",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in given.items()
        ],
        [helper.make_empty_tensor_value_info(name) for name in names],
        constants,
    )
    proto = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()],
        functions=[ir.to_proto(function) for function in model.functions.values()],
        ir_version=model.ir_version,
    )
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options(), providers=["CPUExecutionProvider"])
    return [np.asarray(result) for result in session.run(list(names), dict(given))]


def _with_numbers(node: ir.Node) -> Any:
    """A node, with the numbers of its bodies' weights that lie in other files in it."""
    proto = ir.to_proto(node)
    _bring(node, proto)
    return proto


def _bring(node: ir.Node, proto: Any) -> None:
    inner = [graph for a in proto.attribute for graph in (*([a.g] if a.HasField("g") else []), *a.graphs)]
    for graph, copied in zip(graphs_of(node), inner, strict=True):
        for tensor in copied.initializer:
            stored = graph.initializers[tensor.name].const_value
            if isinstance(stored, ir.ExternalTensor):
                numbers = ir.Tensor(np.array(stored.numpy()), dtype=stored.dtype, name=tensor.name)
                tensor.CopyFrom(ir.to_proto(numbers))
                stored.release()
        for one, two in zip(graph, copied.node, strict=True):
            _bring(one, two)
