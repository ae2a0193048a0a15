"""PaddlePaddle: Paddle's own forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle
from paddle import nn

from normalized.form import Form, Layer
from refold.paddle import spectral_normalization, weight_normalization

PACKAGES = ("paddlepaddle",)
MODES = ("eager", "compiled")


def _ways(layer: Layer) -> dict[str, tuple[str, Callable[[Any], Any]]]:
    """The method of each form, and how it comes from the plain layer."""
    # Paddle's own default is the axis of the inputs of a Linear.
    units = 1 if layer.dense else 0
    return {
        "paddle": ("plain", lambda layer: layer),
        "paddle weight_norm": ("unit", lambda layer: nn.utils.weight_norm(layer, dim=units)),
        'refold "unit"': ("unit", weight_normalization),
        'refold "layer"': ("layer", lambda layer: weight_normalization(layer, normalizer="layer")),
        "paddle spectral_norm": ("spectral", nn.utils.spectral_norm),
        "refold spectral": ("spectral", spectral_normalization),
    }


def forms(layer: Layer, *, compiled: bool) -> list[Form]:
    paddle.set_device("cpu")
    paddle.seed(0)
    x = paddle.randn(list(layer.shape()))
    x.stop_gradient = False
    cotangent = paddle.randn(list(layer.shape()))
    found = []
    for name, (method, make) in _ways(layer).items():
        channels = layer.channels
        plain = nn.Linear(channels, channels) if layer.dense else nn.Conv2D(channels, channels, 3, padding=1)
        module = make(plain)
        parameters = module.parameters()
        step = _step(paddle.jit.to_static(module) if compiled else module, parameters, x, cotangent)
        found.append(Form(name, method, "paddle", step))
    return found


def _step(module: Any, parameters: list[Any], x: Any, cotangent: Any) -> Callable[[], None]:
    def step() -> None:
        for tensor in (x, *parameters):
            tensor.clear_gradient(set_to_zero=False)
        paddle.autograd.backward([module(x)], [cotangent])

    return step
