"""Trained models that people ship: the text detector, recognizer and classifier of PP-OCR, out of the wheel
rapidocr-onnxruntime, which is installed for its files alone (its dependencies are not)."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import operators, run
from onnx import numpy_helper
from ppocr import CLASSIFIER, DETECTOR, MODELS, RECOGNIZER, SIZES, lines_of_text, path_of

import refold
from refold.cli import main


@cache
def folded(name: str) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    model = onnx.load(path_of(name))
    return model, refold.fold(model)


def arithmetic_behind_convolutions(model: onnx.ModelProto) -> list[str]:
    """Factors, shifts and norms by constants of what a convolution gives to nobody else."""
    constants = {t.name for t in model.graph.initializer}
    constants |= {n.output[0] for n in model.graph.node if n.op_type == "Constant"}
    readers = Counter(name for node in model.graph.node for name in node.input)
    given = {name: node for node in model.graph.node for name in node.output}
    found = []
    for node in model.graph.node:
        if node.op_type in ("Mul", "Add", "Sub", "Div", "BatchNormalization"):
            read = [name for name in node.input if name not in constants]
            source = given.get(read[0]) if len(read) == 1 else None
            if source is not None and source.op_type.startswith("Conv") and readers[read[0]] == 1:
                found.append(node.name)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left_behind_convolutions(name: str) -> None:
    model, plain = folded(name)
    assert arithmetic_behind_convolutions(model)
    assert not arithmetic_behind_convolutions(plain)
    assert "BatchNormalization" not in operators(plain)
    assert [v.name for v in plain.graph.output] == [v.name for v in model.graph.output]
    assert (plain.producer_name, plain.opset_import, plain.graph.input) == (
        model.producer_name,
        model.opset_import,
        model.graph.input,
    )
    onnx.checker.check_model(plain, full_check=True)
    onnx.shape_inference.infer_shapes(plain, strict_mode=True)
    assert not refold.inspect(plain).changes_something


def test_fewer_operators_of_each_kind() -> None:
    left = {name: operators(folded(name)[1]) for name in MODELS}
    before = operators(folded(DETECTOR)[0])
    assert before.total() - before["Constant"] == 330
    assert left[DETECTOR].total() - left[DETECTOR]["Constant"] == 224
    assert (before["Conv"], before["Mul"], before["Add"]) == (62, 86, 89)
    assert (left[DETECTOR]["Conv"], left[DETECTOR]["Mul"], left[DETECTOR]["Add"]) == (61, 48, 49)
    assert (left[RECOGNIZER]["Mul"], left[RECOGNIZER]["Add"]) == (66, 66)
    assert left[CLASSIFIER]["Conv"] == 52


def test_only_the_bottleneck_that_costs_more_is_merged() -> None:
    def pointwise(model: onnx.ModelProto) -> set[tuple[int, int]]:
        shapes = (numpy_helper.to_array(t).shape for t in model.graph.initializer)
        constants = (
            numpy_helper.to_array(n.attribute[0].t).shape
            for n in model.graph.node
            if n.op_type == "Constant" and n.attribute[0].name == "value"
        )
        return {(s[1], s[0]) for s in (*shapes, *constants) if len(s) == 4 and s[2:] == (1, 1)}

    before, after = (pointwise(model) for model in folded(DETECTOR))
    assert {(384, 360), (360, 96)} <= before
    assert not {(384, 360), (360, 96)} & after
    assert (384, 96) in after
    assert {(192, 42), (42, 96), (96, 18), (18, 96), (48, 12), (12, 96)} <= before & after


@pytest.mark.parametrize("name", MODELS)
def test_they_still_read(name: str) -> None:
    model, plain = folded(name)
    feeds = {model.graph.input[0].name: lines_of_text(*SIZES[name])}
    (expected,), (found,) = run(model, feeds), run(plain, feeds)
    assert expected.max() > 0.6  # it sees something
    np.testing.assert_allclose(found, expected, atol=2e-4)
    if name == DETECTOR:
        np.testing.assert_array_equal(found > 0.3, expected > 0.3)
    else:
        np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("name", [DETECTOR, CLASSIFIER])
def test_proved_for_every_size(name: str) -> None:
    certificate = refold.prove(*folded(name))
    assert str(certificate.verdict) == "proved", str(certificate)


def test_the_linter_finds_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tmp_path / "plain.onnx"
    plain.write_bytes(folded(CLASSIFIER)[1].SerializeToString())
    assert main(["inspect", str(path_of(CLASSIFIER)), "--fail-if-foldable"]) == 1
    assert "still holds 53 foldable regions: -1 convolution, -5 % multiply-adds" in capsys.readouterr().err
    assert main(["inspect", str(plain), "--fail-if-foldable"]) == 0
