"""Blocks to train with that Keras itself exported to ONNX, by accident: the file folds to what it should be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnx
import onnxruntime
import pytest

import refold
from refold.keras import DiverseBranchBlock, MobileOneBlock, RepVGGBlock, WeightNormalization

BACKEND = keras.backend.backend()

pytestmark = pytest.mark.skipif(
    BACKEND == "jax", reason="Keras exports from JAX by jax2onnx, which is not among the pinned packages"
)

BLOCKS: dict[str, Callable[[], Any]] = {
    "repvgg": lambda: RepVGGBlock(4, alpha=True),
    "mobileone": lambda: MobileOneBlock(4),
    "diverse branch": lambda: DiverseBranchBlock(4),
    "weight normalization": lambda: WeightNormalization(keras.layers.Conv2D(4, 3, padding="same")),
}


def trained(block: Callable[[], Any]) -> keras.Model:
    """Two blocks with statistics and scales as training leaves them: none is 0 or 1."""
    layers = [block(), keras.layers.ReLU(), block(), keras.layers.ReLU()]
    model = keras.Sequential([keras.Input((8, 8, 4)), *layers])
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if weight.name in ("gamma", "moving_variance", "g"):
            weight.assign(rng.uniform(0.5, 2.0, weight.shape))
        elif "kernel" in weight.name or weight.name in ("beta", "moving_mean", "bias", "v"):
            weight.assign(rng.normal(0.0, 0.5, weight.shape))
    return model


@pytest.mark.parametrize("name", BLOCKS)
def test_one_convolution_per_block(name: str, tmp_path: Path) -> None:
    model = trained(BLOCKS[name])
    x = np.random.default_rng(1).normal(size=(1, 8, 8, 4)).astype("float32")
    expected = keras.ops.convert_to_numpy(model(x))
    path = tmp_path / "model.onnx"
    model.export(path, format="onnx", verbose=False)
    exported = onnx.load(path)
    plain = refold.fold(exported)
    onnx.checker.check_model(plain, full_check=True)
    left = Counter(node.op_type for node in plain.graph.node)
    assert left["Conv"] == 2
    assert not left.keys() & {"BatchNormalization", "Mul", "Add", "Sub", "Div", "AveragePool", "Pad", "Cast"}
    session = onnxruntime.InferenceSession(plain.SerializeToString())
    found = session.run(None, {session.get_inputs()[0].name: x})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert not refold.inspect(plain).changes_something
    certificate = refold.prove(exported, plain)
    assert str(certificate.verdict) == "proved", str(certificate)
