"""Models as onnxruntime.quantization makes them: what stays real numbers folds, and nothing across a rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Builder, feeds_of, operators, run
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

import refold


class Batches(CalibrationDataReader):
    def __init__(self, model: onnx.ModelProto) -> None:
        self.left = [feeds_of(model, 8, seed=seed) for seed in range(3)]

    def get_next(self) -> Any:
        return self.left.pop() if self.left else None


def network() -> onnx.ModelProto:
    """Two blocks with norms behind their convolutions, the second of which stays as it is, and a classifier."""
    b = Builder(opset=17)
    x = b.input("N", 3, 8, 8)
    y = b.op("Relu", b.bn(b.conv(x, 3, 4, name="quantized"), 4))
    y = b.op("Relu", b.bn(b.op("Add", b.conv(y, 4, 4, name="real"), b.conv(y, 4, 4, 1, name="real_too")), 4))
    y = b.op("Flatten", b.op("GlobalAveragePool", y))
    model = b.model(b.op("Mul", b.op("MatMul", y, b.random(4, 5)), b.random(5)))
    for node in model.graph.node:
        node.name = node.output[0]
    return model


def quantized(how: str, folder: Path) -> onnx.ModelProto:
    model = network()
    source, target = folder / "model.onnx", folder / "quantized.onnx"
    onnx.save(model, source)
    real = [name for name in ("real", "real_too") if how != "all"]
    real += [node.name for node in model.graph.node if node.op_type in ("BatchNormalization", "Add")]
    if how == "dynamic":
        quantize_dynamic(source, target, nodes_to_exclude=real, weight_type=QuantType.QInt8)
    else:
        quantize_static(
            source,
            target,
            Batches(model),
            quant_format=QuantFormat.QOperator if how == "operators" else QuantFormat.QDQ,
            per_channel=how != "per tensor",
            nodes_to_exclude=[] if how == "all" else real,
        )
    return onnx.load(target)


def roundings(model: onnx.ModelProto) -> dict[str, int]:
    return {kind: count for kind, count in operators(model).items() if "Linear" in kind or "Integer" in kind}


@pytest.mark.parametrize("how", ["per tensor", "per channel", "all", "operators", "dynamic"])
def test_only_what_is_not_rounded_folds(how: str, tmp_path: Path) -> None:
    model = quantized(how, tmp_path)
    assert roundings(model)
    plain = refold.fold(model)
    onnx.checker.check_model(plain, full_check=True)
    assert roundings(plain) == roundings(model)
    feeds = feeds_of(model, 8)
    (expected,), (found,) = run(model, feeds), run(plain, feeds)
    # A step of a rounding that the last bits of a real number tip over would be seen far above this.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * float(np.abs(expected).max()))
    assert not refold.inspect(plain).changes_something
    certificate = refold.prove(model, plain)
    assert certificate.ok, str(certificate)


@pytest.mark.parametrize("how", ["per channel", "operators", "dynamic"])
def test_what_stays_in_real_numbers_reaches_its_minimum(how: str, tmp_path: Path) -> None:
    model = quantized(how, tmp_path)
    plain = refold.fold(model)
    real = [node for node in model.graph.node if node.op_type == "Conv" and node.name.startswith("real")]
    assert len(real) == 2
    gone = {name for node in real for name in node.output}
    assert not any(name in gone for node in plain.graph.node for name in node.output)
    assert operators(model)["BatchNormalization"] - operators(plain)["BatchNormalization"] >= 1


def test_the_plan_says_why_what_is_rounded_stays(tmp_path: Path) -> None:
    model = quantized("per channel", tmp_path)
    kept = {part.where: part.reason for part in refold.inspect(model).kept}
    assert any("quantized" in where and "kernel" in reason for where, reason in kept.items()), kept
