"""If, Loop and Scan: what is inside of them folds by the same rules, and is proved as everything else."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from bodies import ENTRIES, everywhere
from graphs import assert_same_function, feeds_of, run
from models import Entry
from onnx import numpy_helper

import refold


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_bodies_fold_to_their_minimum_and_stay_the_same_function(entry: Entry) -> None:
    model = entry.build()
    onnx.checker.check_model(model, full_check=True)
    before = model.SerializeToString()
    plain = refold.fold(model)
    assert model.SerializeToString() == before
    onnx.checker.check_model(plain, full_check=True)
    assert everywhere(plain) == entry.left
    for size in entry.sizes:
        _assert_same(model, plain, size, entry.u)
    assert not refold.inspect(plain).changes_something
    certificate = refold.prove(model, plain)
    assert str(certificate.verdict) == entry.proof, str(certificate)


def _assert_same(model: onnx.ModelProto, plain: onnx.ModelProto, size: int, u: float) -> None:
    """ONNX's reference evaluator lacks scans from behind: these are run as they ship."""
    if b"scan_input_directions" not in model.SerializeToString():
        assert_same_function(model, plain, size, u)
        return
    feeds = feeds_of(model, size)
    for one, two in zip(run(model, feeds), run(plain, feeds), strict=True):
        np.testing.assert_allclose(one, two, atol=64 * u * np.abs(one).max())


# ---- wrong folds ---------------------------------------------------------------------------------


def _inner_weights(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """The kernels and biases in bodies."""
    found = []
    waiting = [a.g for node in model.graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    while waiting:
        graph = waiting.pop()
        found += [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
        waiting += [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return found


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_one_weight_that_is_off_in_a_body_is_found(entry: Entry) -> None:
    model = entry.build()
    plain = refold.fold(model)
    for number in range(len(_inner_weights(plain))):
        wrong = onnx.ModelProto()
        wrong.CopyFrom(plain)
        tensor = _inner_weights(wrong)[number]
        array = numpy_helper.to_array(tensor).copy()
        array.flat[array.size // 2] += 1e-3 * (np.abs(array).max() or 1.0)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        certificate = refold.prove(model, wrong, end_to_end=False)
        assert str(certificate.verdict) == "refuted", str(certificate)
