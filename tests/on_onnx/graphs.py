"""Building small ONNX models, and running them in float64 with ONNX's reference evaluator alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

Array = Any


@dataclass
class Builder:
    """One graph in the making; ``op`` adds a node and returns the name of what it gives."""

    opset: int = 18
    dtype: Any = "float32"
    ir_version: int = 9
    seed: int = 0
    nodes: list[Any] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    initializers: list[Any] = field(default_factory=list)
    count: int = 0

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    @property
    def type(self) -> int:
        return int(helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype)))

    def input(self, *shape: Any, name: str = "x", type: int | None = None) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, type or self.type, list(shape)))
        return name

    def constant(self, array: Any, name: str | None = None, dtype: Any = None) -> str:
        self.count += 1
        name = name or f"c{self.count}"
        array = np.asarray(array)
        kind = dtype or (self.dtype if array.dtype.kind == "f" else array.dtype)
        self.initializers.append(numpy_helper.from_array(array.astype(kind), name))
        return name

    def random(self, *shape: int, name: str | None = None) -> str:
        return self.constant(self.rng.normal(size=shape), name)

    def op(self, kind: str, *inputs: str, name: str | None = None, outputs: int = 1, **attributes: Any) -> Any:
        self.count += 1
        names = [name or f"{kind.lower()}{self.count}"]
        names += [f"{names[0]}_{i}" for i in range(1, outputs)]
        domain = attributes.pop("domain", "")
        self.nodes.append(
            helper.make_node(kind, list(inputs), names, name=f"n_{names[0]}", domain=domain, **attributes)
        )
        return names[0] if outputs == 1 else names

    def conv(self, x: str, i: int, o: int, k: int = 3, axes: int = 2, bias: bool = True, **attributes: Any) -> str:
        group = attributes.get("group", 1)
        settings = {"pads": [k // 2] * 2 * axes, **attributes}
        if "auto_pad" in settings:
            settings.pop("pads")
        w = self.random(o, i // group, *(k,) * axes)
        inputs = [x, w] + ([self.random(o)] if bias else [])
        return str(self.op("Conv", *inputs, **settings))

    def bn(self, x: str, c: int, **attributes: Any) -> str:
        draw = [self.rng.uniform(0.5, 2.0, c), self.rng.normal(size=c), self.rng.normal(size=c)]
        inputs = [self.constant(array) for array in (*draw, self.rng.uniform(0.3, 2.0, c))]
        return str(self.op("BatchNormalization", x, *inputs, **attributes))

    def ints(self, *numbers: int) -> str:
        return self.constant(np.asarray(numbers, dtype=np.int64))

    def model(self, *outputs: str, functions: Sequence[Any] = (), domains: Sequence[str] = ()) -> onnx.ModelProto:
        if self.ir_version < 4:
            infos = [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in self.initializers]
            self.inputs += infos
        infos = [helper.make_empty_tensor_value_info(name) for name in outputs]
        graph = helper.make_graph(self.nodes, "g", self.inputs, infos, self.initializers)
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(d, 1) for d in domains)]
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=self.ir_version, functions=list(functions)
        )
        typed = onnx.shape_inference.infer_shapes(model)
        for info in typed.graph.output:
            if not info.type.HasField("tensor_type"):
                info.type.CopyFrom(helper.make_tensor_type_proto(self.type, None))
        return typed


# ---- an independent float64 reference --------------------------------------------------------------


def in_double(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every real constant in float64, for the reference evaluator."""
    double = onnx.ModelProto()
    double.CopyFrom(model)
    narrow = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)

    def widen(tensor: Any) -> None:
        if tensor.data_type in narrow:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float64"), tensor.name))

    def visit(graph: Any) -> None:
        for tensor in graph.initializer:
            widen(tensor)
        for node in graph.node:
            floats = [a for a in node.attribute if node.op_type == "Constant" and a.name.startswith("value_float")]
            for attribute in floats:
                value = np.asarray(helper.get_attribute_value(attribute), dtype="float64")
                del node.attribute[:]
                node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(value)))
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.TENSOR:
                    widen(attribute.t)
                if attribute.name == "to" and attribute.i in narrow:
                    attribute.i = TensorProto.DOUBLE
                if attribute.type == onnx.AttributeProto.GRAPH:
                    visit(attribute.g)

    visit(double.graph)
    return double


def outputs_of(model: onnx.ModelProto, feeds: dict[str, Array]) -> list[Array]:
    """The outputs in float64."""
    wide = {k: v.astype("float64") if v.dtype.kind == "f" else v for k, v in feeds.items()}
    with np.errstate(all="ignore"):
        return [np.asarray(y) for y in ReferenceEvaluator(in_double(model)).run(None, wide)]


def run(model: onnx.ModelProto, feeds: dict[str, Array]) -> list[Array]:
    """The outputs in ONNX Runtime, which folds nothing."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return list(onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, feeds))


def feeds_of(model: onnx.ModelProto, size: int = 9, batch: int = 2, seed: int = 1) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    feeds = {}
    optional = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        if value.name in optional:
            continue
        tensor = value.type.tensor_type
        shape = [
            dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else (batch if place == 0 else size)
            for place, dim in enumerate(tensor.shape.dim)
        ]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        draw = rng.normal(size=shape) if np.dtype(dtype).kind not in "iub" else rng.integers(0, 2, shape)
        feeds[value.name] = draw.astype(dtype)
    return feeds


def assert_same_function(
    model: onnx.ModelProto, plain: onnx.ModelProto, size: int = 9, u: float = 2.0**-24, batch: int = 2
) -> None:
    """Both in float64 on one random input: what is left of the difference are the roundings of weights.

    The reference evaluator takes old batch norms for training and lacks old quantization: such models are run
    as they ship."""
    feeds = feeds_of(model, size, batch)
    if model.opset_import[0].version < 15 or "QuantizeLinear" in operators(model):
        exact, folded = ([np.asarray(y, "float64") for y in run(m, feeds)] for m in (model, plain))
    else:
        exact, folded = outputs_of(model, feeds), outputs_of(plain, feeds)
    assert len(exact) == len(folded)
    for one, two in zip(exact, folded, strict=True):
        assert one.shape == two.shape
        assert np.array_equal(np.isfinite(one), np.isfinite(two))
        scale = float(np.abs(one).max(initial=0.0))
        assert float(np.abs(one - two).max(initial=0.0)) <= 16 * u * scale + 1e-300


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)
