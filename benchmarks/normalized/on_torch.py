"""PyTorch: torch's own forms, and timm's convolutions."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from normalized.form import Form, Layer
from refold.torch import spectral_normalization, weight_normalization
from refold.weights import TimmStandardization

PACKAGES = ("torch", "timm")
MODES = ("eager", "compiled")


class _FormulaOfTimm(nn.Linear):
    """timm has convolutions only: what its ``StdConv2d`` does to the weight, on a Linear's."""

    def forward(self, x: Any) -> Any:
        rows = self.weight.unsqueeze(0)
        weight = functional.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-6)
        return functional.linear(x, weight.squeeze(0), self.bias)


def _formula_of_timm(layer: Any) -> Any:
    layer.__class__ = _FormulaOfTimm
    return layer


def _timm(kind: Any) -> Callable[[Any], Any]:
    def made(layer: Any) -> Any:
        found = kind(layer.in_channels, layer.out_channels, 3, padding=1)
        found.load_state_dict(layer.state_dict(), strict=False)
        return found

    return made


def _standardized(layer: Any) -> Any:
    return weight_normalization(layer, normalizer="timm-standardization", gain=False, offset=False)


def _scaled(layer: Any) -> Any:
    return weight_normalization(layer, normalizer=TimmStandardization(scaled=True), offset=False)


def _ways(layer: Layer) -> dict[str, tuple[str, Callable[[Any], Any]]]:
    """The method of each form, and how it comes from the plain layer."""
    convolutions: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "timm StdConv2d": ("timm-standardization", _timm(StdConv2d)),
        'refold "timm-standardization"': ("timm-standardization", _standardized),
        "timm ScaledStdConv2d": ("timm-standardization, scaled", _timm(ScaledStdConv2d)),
        'refold "timm-standardization", scaled': ("timm-standardization, scaled", _scaled),
    }
    dense: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "timm StdConv2d's formula": ("timm-standardization", _formula_of_timm),
        'refold "timm-standardization"': ("timm-standardization", _standardized),
    }
    return {
        "torch": ("plain", lambda layer: layer),
        "torch weight_norm (old)": ("unit", nn.utils.weight_norm),
        "torch parametrizations.weight_norm": ("unit", parametrizations.weight_norm),
        'refold "unit"': ("unit", weight_normalization),
        'refold "rms"': ("rms", lambda layer: weight_normalization(layer, normalizer="rms")),
        'refold "layer"': ("layer", lambda layer: weight_normalization(layer, normalizer="layer")),
        **(dense if layer.dense else convolutions),
        "torch spectral_norm (old)": ("spectral", nn.utils.spectral_norm),
        "torch parametrizations.spectral_norm": ("spectral", parametrizations.spectral_norm),
        "refold spectral": ("spectral", spectral_normalization),
    }


def forms(layer: Layer, *, compiled: bool) -> list[Form]:
    warnings.simplefilter("ignore")  # that the old forms are old
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # The wrappers share their frames, and each is compiled by itself.
    torch._dynamo.config.recompile_limit = 64
    channels = layer.channels
    plain = nn.Linear(channels, channels) if layer.dense else nn.Conv2d(channels, channels, 3, padding=1)
    x = torch.randn(layer.shape()).requires_grad_()
    cotangent = torch.randn_like(plain(x))
    found = []
    for name, (method, make) in _ways(layer).items():
        module = make(copy.deepcopy(plain))
        step = _step(torch.compile(module) if compiled else module, list(module.parameters()), x, cotangent)
        found.append(Form(name, method, "torch", step))
    return found


def _step(module: Any, parameters: list[Any], x: Any, cotangent: Any) -> Callable[[], None]:
    def step() -> None:
        for tensor in (x, *parameters):
            tensor.grad = None
        module(x).backward(cotangent)

    return step
