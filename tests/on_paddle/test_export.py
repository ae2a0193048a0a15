"""paddle2onnx exports what a fold gives, and layers to train with: ONNX Runtime computes what Paddle does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import paddle
import paddle2onnx
import pytest
from paddle import nn
from zoo import Csp, randomize

import refold
from refold.paddle import (
    ACBlock,
    DiverseBranchBlock,
    MobileOneBlock,
    RepVGGBlock,
    RepVggBlock,
    low_rank_adaptation,
    orthogonal_weights,
    spectral_normalization,
    weight_normalization,
)

MODELS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "csp": (Csp, (4, 16, 16)),
    "repvgg": (lambda: RepVGGBlock(4, 4, groups=2), (4, 9, 8)),
    "ppdet": (lambda: RepVggBlock(4, 4, act="swish", alpha=True), (4, 9, 8)),
    "acnet": (lambda: ACBlock(4, 3), (4, 9, 8)),
    "diverse": (lambda: DiverseBranchBlock(4, 3), (4, 9, 8)),
    "mobileone": (lambda: MobileOneBlock(4, 4, groups=4), (4, 9, 8)),
    "transposed": (lambda: nn.Sequential(nn.Conv2DTranspose(4, 3, 3, stride=2), nn.BatchNorm2D(3)), (4, 9, 8)),
    "one_axis": (lambda: nn.Sequential(nn.Conv1D(4, 3, 3), nn.BatchNorm1D(3)), (4, 9)),
    "normalized": (lambda: nn.Sequential(weight_normalization(nn.Linear(6, 3)), nn.ReLU()), (6,)),
}


def exported(model: Any, shape: tuple[int, ...], path: Path) -> onnx.ModelProto:
    spec = paddle.static.InputSpec([None, *shape], "float32", "x")
    paddle.jit.save(model, str(path), input_spec=[spec])
    file = f"{path}.onnx"
    # Its optional optimizer installs packages while it runs.
    paddle2onnx.export(f"{path}.json", f"{path}.pdiparams", file, opset_version=17, optimize_tool="None")
    return onnx.load(file)


def in_onnx_runtime(model: onnx.ModelProto, x: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run(None, {"x": x.numpy()})[0]


def kernels(model: onnx.ModelProto) -> int:
    return sum(node.op_type in ("Conv", "ConvTranspose", "BatchNormalization", "Gemm") for node in model.graph.node)


@pytest.mark.parametrize("name", MODELS)
def test_both_forms_are_exported(name: str, tmp_path: Path) -> None:
    build, shape = MODELS[name]
    model = randomize(build())
    x = paddle.to_tensor(np.random.default_rng(0).normal(size=(2, *shape)).astype("float32"))
    expected = model(x).numpy()
    plain = refold.fold(model, (None, *shape))
    rich, folded = exported(model, shape, tmp_path / "rich"), exported(plain, shape, tmp_path / "plain")
    for file in (rich, folded):
        np.testing.assert_allclose(in_onnx_runtime(file, x), expected, rtol=1e-4, atol=1e-5)
    assert kernels(folded) < kernels(rich) or name == "normalized"
    assert "BatchNormalization" not in {node.op_type for node in folded.graph.node}


WAYS: dict[str, Callable[[Any], Any]] = {
    "centered": partial(weight_normalization, normalizer="centered"),
    "spectral": spectral_normalization,
    "sigma": partial(spectral_normalization, gain=True),
    "cayley": orthogonal_weights,
    "exponential": partial(orthogonal_weights, map="exponential"),
    "lora": partial(low_rank_adaptation, rank=2),
    "dora": partial(low_rank_adaptation, rank=2, magnitude=True),
}


@pytest.mark.parametrize("name", WAYS)
def test_computed_weights_are_exported(name: str, tmp_path: Path) -> None:
    """paddle2onnx has no operator for what an orthogonal weight is made with: such a model is folded first."""
    model = nn.Sequential(WAYS[name](nn.Linear(6, 3)), nn.ReLU())
    for parameter in model.parameters():
        parameter.set_value(parameter + 0.1)
    model.eval()
    x = paddle.to_tensor(np.random.default_rng(0).normal(size=(2, 6)).astype("float32"))
    expected = model(x).numpy()
    forms = {"plain": refold.fold(model, (None, 6))}
    if name not in ("cayley", "exponential"):
        forms["rich"] = model
    for form, layer in forms.items():
        file = exported(layer, (6,), tmp_path / form)
        np.testing.assert_allclose(in_onnx_runtime(file, x), expected, rtol=1e-4, atol=1e-5)
