"""Models that others made of a model: right ones are accepted and wrong ones refuted, whatever they are made of.

What onnxsim and onnxslim make is judged in ``make bench-onnx``, where they are installed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_tools
import pytest
from graphs import operators
from models import ENTRIES, repvgg
from onnx import numpy_helper
from ppocr import CLASSIFIER, path_of

import refold
from refold.cli import main
from refold.onnx import files
from test_files import saved

NAMES = [
    "repvgg",
    "asymmetric_branches",
    "gemm_chain",
    "channels_last_with_bias_and_scale",
    "squeeze_excitation_and_transposed_convolution",
    "half_precision",
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    found = {e.name: saved(e.build(), folder / f"{e.name}.onnx") for e in ENTRIES if e.name in NAMES}
    return {**found, CLASSIFIER: path_of(CLASSIFIER)}


def optimized(source: Path, level: str, folder: Path) -> onnx.ModelProto:
    """What ONNX Runtime's own optimizer saves."""
    target = folder / "optimized.onnx"
    onnx_tools.onnxruntime(source, target, level)
    return onnx.load(target)


def with_a_wrong_weight(model: onnx.ModelProto, by: float = 1e-3) -> onnx.ModelProto:
    """The largest of its weights is off."""
    wrong = onnx.ModelProto.FromString(model.SerializeToString())
    tensors = [t for t in wrong.graph.initializer if numpy_helper.to_array(t).dtype.kind == "f"]
    tensor = max(tensors, key=lambda t: numpy_helper.to_array(t).size)
    array = numpy_helper.to_array(tensor).copy()
    array.flat[np.argmax(np.abs(array))] *= array.dtype.type(1 + by)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return wrong


@pytest.mark.parametrize(
    ("name", "level"),
    [*((name, level) for name in NAMES for level in ("BASIC", "EXTENDED", "ALL")), (CLASSIFIER, "EXTENDED")],
)
def test_what_onnx_runtime_makes(name: str, level: str, originals: dict[str, Path], tmp_path: Path) -> None:
    original = onnx.load(originals[name])
    made = optimized(originals[name], level, tmp_path)
    certificate = refold.prove(original, made)
    assert certificate.ok, str(certificate)
    assert str(certificate.verdict) in ("proved", "measured")
    # Where activations are rounded to 16 bits, a thousandth of a weight is nothing.
    wrong = refold.prove(original, with_a_wrong_weight(made, 0.1 if name == "half_precision" else 1e-3))
    assert str(wrong.verdict) == "refuted", str(wrong)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_folded_here_and_what_is_optimized_there(
    name: str, originals: dict[str, Path], tmp_path: Path
) -> None:
    """Two models of which neither is the other's original."""
    plain = refold.fold(onnx.load(originals[name]))
    certificate = refold.prove(optimized(originals[name], "BASIC", tmp_path), plain)
    assert certificate.ok, str(certificate)


def test_operators_of_the_runtime_are_named(originals: dict[str, Path], tmp_path: Path) -> None:
    name = "squeeze_excitation_and_transposed_convolution"
    made = optimized(originals[name], "EXTENDED", tmp_path)
    assert "FusedConv" in operators(made)
    certificate = refold.prove(onnx.load(originals[name]), made)
    assert str(certificate.verdict) == "measured"
    assert any("FusedConv" in note for note in certificate.notes)


def test_a_fold_in_the_precision_of_the_weights_is_measured_and_said_to_be_one(
    originals: dict[str, Path], tmp_path: Path
) -> None:
    certificate = refold.prove(onnx.load(originals["repvgg"]), optimized(originals["repvgg"], "BASIC", tmp_path))
    assert str(certificate.verdict) == "measured"
    (region, *_) = [r for r in certificate.regions if str(r.verdict) == "measured"]
    assert "as if they had been folded in the precision" in region.sentence
    assert region.ratio is not None
    assert 1.0 < region.ratio < 8.0


def test_defaults_of_inputs_and_constant_outputs_are_part_of_a_model(tmp_path: Path) -> None:
    (entry,) = [e for e in ENTRIES if e.name == "an_initializer_that_callers_may_replace"]
    model = entry.build()
    assert refold.prove(model, refold.fold(model)).ok
    wrong = with_a_wrong_weight(model)
    assert "where callers leave it out" in str(refold.prove(model, wrong))
    assert not refold.prove(model, wrong).ok
    without = onnx.ModelProto.FromString(model.SerializeToString())
    names = {value.name for value in without.graph.input}
    kept = [
        onnx.TensorProto.FromString(t.SerializeToString()) for t in without.graph.initializer if t.name not in names
    ]
    del without.graph.initializer[:]
    without.graph.initializer.extend(kept)
    assert "in one of the two models only" in str(refold.prove(model, without))


def constant_output(number: float) -> onnx.ModelProto:
    model = repvgg()
    model.graph.initializer.append(numpy_helper.from_array(np.float32([1.0, number]), "told"))
    model.graph.output.append(onnx.helper.make_tensor_value_info("told", onnx.TensorProto.FLOAT, [2]))
    return model


def test_a_constant_that_is_an_output(tmp_path: Path) -> None:
    model = constant_output(2.0)
    plain = refold.fold(model)
    certificate = refold.prove(model, plain)
    assert str(certificate.verdict) == "proved", str(certificate)
    assert [value.name for value in plain.graph.output] == [value.name for value in model.graph.output]
    assert not refold.prove(model, constant_output(3.0)).ok
    assert files.load(saved(plain, tmp_path / "plain.onnx")) is not None


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["repvgg", "factors_per_channel_that_are_all_the_same"])
def test_what_is_not_touched_is_proved_whatever_numbers_it_holds(name: str, poison: float, tmp_path: Path) -> None:
    """In the second one the factors behind the spoilt weights fold, and the file is written."""
    (entry,) = [e for e in ENTRIES if e.name == name]
    model = entry.build()
    array = numpy_helper.to_array(model.graph.initializer[0]).copy()
    array.flat[3] = poison
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, model.graph.initializer[0].name))
    assert main(["fold", str(saved(model, tmp_path / "model.onnx")), "-o", str(tmp_path / "plain.onnx")]) == 0
