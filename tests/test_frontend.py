"""Finding the front end for a model, whatever is installed."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

import refold
from refold import frontend


@pytest.fixture
def half_of_onnx(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A process that has imported onnx where onnx_ir is not installed."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("onnx", "onnx_ir")]:
        monkeypatch.delitem(sys.modules, name)
    onnx = ModuleType("onnx")
    monkeypatch.setitem(sys.modules, "onnx", onnx)
    found = frontend.find_spec
    monkeypatch.setattr(frontend, "find_spec", lambda name: None if name == "onnx_ir" else found(name))
    return onnx


def test_a_half_installed_framework_stands_in_nobodys_way(half_of_onnx: Any) -> None:
    with pytest.raises(refold.InputError, match="int is not a model that refold reads"):
        refold.inspect(3)


def test_its_own_models_say_what_is_missing(half_of_onnx: Any) -> None:
    class ModelProto:
        __module__ = "onnx.onnx_ml_pb2"

    with pytest.raises(
        refold.InputError, match=r"this model needs onnx; install it with: pip install 'refold\[onnx\]'"
    ):
        refold.inspect(ModelProto())


def test_a_file_says_what_is_missing(half_of_onnx: Any, tmp_path: Any) -> None:
    with pytest.raises(refold.InputError, match=r"reading it needs onnx; install it with"):
        frontend.frontend_for(tmp_path / "model.onnx")
