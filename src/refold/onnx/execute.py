"""Running ONNX models as they ship: in ONNX Runtime, without its graph optimizations, which would fold too."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from refold.errors import CannotRunError, InputError
from refold.onnx import bounds, stepwise
from refold.onnx.lift import Record
from refold.onnx.reference import AnyArray
from refold.onnx.session import Session
from refold.shown import printable

# A protobuf holds 2 GiB; beyond, weights go beside it.
_MOST_INLINE = 2**31 - 2**24
# Bytes of weights that a runtime may hold all at once where it is not timed.
_MOST_AT_ONCE = 2**28
# What ONNX Runtime says of operators that it does not know, or not for these types.
_NOT_THERE = ("is not a registered function/op", "NOT_IMPLEMENTED")


def run(session: Session, inputs: Sequence[AnyArray], optimized: bool = False) -> list[AnyArray]:
    """The outputs of the model in ONNX Runtime, with its default graph optimizations if ``optimized``."""
    record = session.record
    names = [str(value.name) for value in record.inputs]
    outputs = [str(value.name) for value in record.model.graph.outputs]
    feeds = {}
    for name, value, array in zip(names, record.inputs, inputs, strict=True):
        dtype = record.survey.of(value).dtype
        if not dtype:
            raise CannotRunError(f"the model is not run: its input '{printable(name)}' has no type, or is text")
        feeds[name] = np.asarray(array).astype(np.dtype(dtype) if dtype != "bfloat16" else array.dtype)
    if not optimized:
        bounds.check(session, feeds)
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
    values = (value for graph in model.graphs() for value in graph.initializers.values())
    return sum(tensor.nbytes for value in values if (tensor := value.const_value))


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
    values = (value for graph in model.graphs() for value in graph.initializers.values())
    if not any(isinstance(value.const_value, ir.ExternalTensor) for value in values):
        return model
    copied = model.clone()
    for graph in copied.graphs():
        for value in graph.initializers.values():
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
