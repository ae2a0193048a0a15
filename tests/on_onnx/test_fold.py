"""Folding ONNX models: few operators, the same function, everything else as it was."""

from __future__ import annotations

import onnx
import pytest
from graphs import assert_same_function, operators
from models import ENTRIES, Entry

import refold


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_folds_to_its_minimum_and_stays_the_same_function(entry: Entry) -> None:
    model = entry.build()
    onnx.checker.check_model(model, full_check=True)
    before = model.SerializeToString()
    plain = refold.fold(model)
    assert model.SerializeToString() == before
    assert isinstance(plain, onnx.ModelProto)
    onnx.checker.check_model(plain, full_check=True)
    assert operators(plain) == entry.left
    assert [v.name for v in plain.graph.output] == [v.name for v in model.graph.output]
    for size in entry.sizes:
        assert_same_function(model, plain, size, entry.u)
    again = refold.fold(plain)
    assert operators(again) == entry.left
    assert not refold.inspect(plain).changes_something
    certificate = refold.prove(model, plain)
    assert certificate.ok, str(certificate)
    assert str(certificate.verdict) == entry.proof, str(certificate)
