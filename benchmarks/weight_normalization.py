"""What weight normalization costs in PyTorch: the step of one layer, forward and backward, against the plain layer.

Run with ``make bench-weights``. All forms of a layer run in turn (A B C ... A B C ...) in one process on one
thread; a ratio is the median, over the rounds, of a form's processor seconds over the plain layer's. timm's
``StdConv2d`` is written here from its formula, for Linear too. Writes
``benchmarks/results/weight_normalization.json``.
"""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from measure import environment, times_as_fast, write
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from refold.torch import weight_normalization

LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "Linear 1024, batch 64": (lambda: nn.Linear(1024, 1024), (64, 1024)),
    "Linear 1024, batch 256": (lambda: nn.Linear(1024, 1024), (256, 1024)),
    "Conv2d 64, 3x3, 8 of 32x32": (lambda: nn.Conv2d(64, 64, 3, padding=1), (8, 64, 32, 32)),
}


class _ByBatchNorm(nn.Module):
    """timm's ``StdConv2d``: the weight through a batch norm in training mode, epsilon 1e-6 in the root."""

    def forward(self, weight: Any) -> Any:
        rows = weight.reshape(1, weight.shape[0], -1)
        return functional.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(weight)


class _StandardizedLinear(nn.Linear):
    def forward(self, x: Any) -> Any:
        return functional.linear(x, _ByBatchNorm()(self.weight), self.bias)


class _StandardizedConv(nn.Conv2d):
    def forward(self, x: Any) -> Any:
        return self._conv_forward(x, _ByBatchNorm()(self.weight), self.bias)


def _timm(layer: Any) -> Any:
    layer.__class__ = _StandardizedLinear if isinstance(layer, nn.Linear) else _StandardizedConv
    return layer


FORMS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda layer: layer,
    "torch weight_norm (old)": nn.utils.weight_norm,
    "torch parametrizations.weight_norm": parametrizations.weight_norm,
    'refold "unit"': weight_normalization,
    'refold "rms"': lambda layer: weight_normalization(layer, normalizer="rms"),
    "timm StdConv2d": _timm,
    'refold "timm-standardization"': lambda layer: weight_normalization(
        layer, normalizer="timm-standardization", gain=False, offset=False
    ),
    'refold "layer"': lambda layer: weight_normalization(layer, normalizer="layer"),
    "torch parametrizations.spectral_norm": parametrizations.spectral_norm,
}


def _step(module: Any, parameters: list[Any], x: Any, cotangent: Any) -> Callable[[], None]:
    def step() -> None:
        for tensor in (x, *parameters):
            tensor.grad = None
        module(x).backward(cotangent)

    return step


def _processor_seconds(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of the processor that each step takes on its one thread, all in turn after five uncounted rounds.

    What else the machine does counts for less than in seconds of a clock.
    """
    seconds: dict[str, list[float]] = {form: [] for form in steps}
    for repeat in range(-5, repeats):
        for form, step in steps.items():
            before = time.thread_time()
            step()
            if repeat >= 0:
                seconds[form].append(time.thread_time() - before)
    return seconds


def _measured(name: str, repeats: int, *, compiled: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    plain, x = build(), torch.randn(shape).requires_grad_()
    cotangent = torch.randn_like(plain(x))
    steps = {}
    for form, attach in FORMS.items():
        layer = attach(copy.deepcopy(plain))
        steps[form] = _step(torch.compile(layer) if compiled else layer, list(layer.parameters()), x, cotangent)
    seconds = _processor_seconds(steps, repeats)
    # Seconds of the form over seconds of the plain layer.
    return {form: times_as_fast(values, seconds["plain"]) for form, values in seconds.items()}


def main() -> int:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # The wrappers share their frames, and each is compiled by itself.
    torch._dynamo.config.recompile_limit = 64
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    rows = []
    for name in LAYERS:
        row = {"layer": name}
        for mode in ("eager", "compiled"):
            row[mode] = _measured(name, repeats, compiled=mode == "compiled")
            print(name, mode, {form: round(found["median"], 2) for form, found in row[mode].items()}, flush=True)
        rows.append(row)
    write("weight_normalization", {**environment("torch"), "threads": 1, "rounds": repeats, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
