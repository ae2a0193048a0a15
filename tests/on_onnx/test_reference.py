"""What is computed beside the reference evaluator is what the operators mean."""

from __future__ import annotations

from itertools import product

import numpy as np
import onnx_ir as ir
import pytest
from graphs import Builder, run
from onnx import numpy_helper

from refold.onnx.reference import Operators


@pytest.mark.parametrize("kind", ["AveragePool", "MaxPool"])
@pytest.mark.parametrize("axes", [1, 2])
def test_pooling_by_definition(kind: str, axes: int) -> None:
    # Against ONNX Runtime: the reference evaluator gets the shapes of MaxPool with uneven borders wrong.
    x = np.random.default_rng(0).normal(size=(2, 3, *(7, 6)[:axes])).astype("float32")
    counted = [{"count_include_pad": 0}, {"count_include_pad": 1}] if kind == "AveragePool" else [{}]
    for k, s, p, extra in product((1, 2, 3), (1, 2), ((0, 0), (1, 0), (1, 1)), counted):
        if max(p) >= k:
            continue
        b = Builder(opset=19)
        name = b.input(*x.shape)
        settings = {"kernel_shape": [k] * axes, "strides": [s] * axes, "pads": [p[0]] * axes + [p[1]] * axes}
        model = b.model(b.op(kind, name, **settings, **extra))
        (node,) = ir.from_proto(model).graph
        (found,) = Operators({"": 19}).run(node, [x.astype("float64")])
        np.testing.assert_allclose(found, run(model, {"x": x})[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axes", [1, 2])
def test_transposed_convolution_by_definition(axes: int) -> None:
    # Against ONNX Runtime, for the same reason: the reference evaluator falls over with groups.
    x = np.random.default_rng(0).normal(size=(2, 4, *(5, 4)[:axes])).astype("float32")
    cases = product((1, 2, 3), (1, 2, 3), (1, 2), ((0, 0), (1, 0), (0, 1)), (1, 2, 4), (0, 1))
    for k, s, d, p, groups, extra in cases:
        if extra >= s or d * (k - 1) < sum(p):
            continue
        b = Builder(opset=19)
        name = b.input(*x.shape)
        kernel, bias = b.random(4, 3, *(k,) * axes), b.random(3 * groups)
        settings = {"strides": s, "dilations": d, "output_padding": extra}
        repeated = {key: [value] * axes for key, value in settings.items()}
        pads = [p[0]] * axes + [p[1]] * axes
        model = b.model(b.op("ConvTranspose", name, kernel, bias, pads=pads, group=groups, **repeated))
        (node,) = ir.from_proto(model).graph
        weights = [numpy_helper.to_array(tensor).astype("float64") for tensor in model.graph.initializer]
        (found,) = Operators({"": 19}).run(node, [x.astype("float64"), *weights])
        np.testing.assert_allclose(found, run(model, {"x": x})[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_convolution_by_definition(axes: int) -> None:
    x = np.random.default_rng(0).normal(size=(2, 4, *(6, 5, 5)[:axes])).astype("float32")
    cases = product((1, 2, 3), (1, 2, 3), (1, 2), ((0, 0), (1, 0), (1, 2)), (1, 2, 4), (False, True))
    for k, s, d, p, groups, bias in cases:
        b = Builder(opset=19)
        name = b.input(*x.shape)
        inputs = [b.random(8, 4 // groups, *(k,) * axes), *([b.random(8)] if bias else [])]
        repeated = {key: [value] * axes for key, value in {"strides": s, "dilations": d}.items()}
        pads = [p[0]] * axes + [p[1]] * axes
        model = b.model(b.op("Conv", name, *inputs, pads=pads, group=groups, **repeated))
        (node,) = ir.from_proto(model).graph
        weights = [numpy_helper.to_array(tensor).astype("float64") for tensor in model.graph.initializer]
        (found,) = Operators({"": 19}).run(node, [x.astype("float64"), *weights])
        np.testing.assert_allclose(found, run(model, {"x": x})[0], rtol=1e-5, atol=1e-5)
