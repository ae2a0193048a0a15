"""Spectral normalization and sigma-Reparam for torch modules, as a parametrization."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from refold.torch.attach import ParametrizedRows, attach
from refold.torch.fused import is_ordinary, span
from refold.torch.namespace import TORCH
from refold.torch.rows import as_matrix, as_weight
from refold.weights import Rows, Spectral, SpectralState, spectral_error, working_dtype
from refold.weights.namespace import dtype_name

Tensor = torch.Tensor


class SpectralWeight(ParametrizedRows):
    """A parametrization: the stored weight over its largest singular value, perhaps times a learned ``gain``.

    ``left`` ``(1, units)`` and ``right`` ``(1, fan_in)`` are buffers, ``gain`` ``(1,)`` is a parameter; all in
    float32 or wider.
    """

    left: Tensor
    right: Tensor

    def __init__(self, rows: Rows, like: Tensor, method: Spectral, power_iterations: int, gain: bool) -> None:
        super().__init__(rows)
        self.method = method
        self.power_iterations = power_iterations
        settings: Any = {"dtype": getattr(torch, working_dtype(dtype_name(like))), "device": like.device}
        self.gain = nn.Parameter(torch.ones(1, **settings), like.requires_grad) if gain else None
        self.register_buffer("left", torch.zeros(1, rows.units, **settings))
        self.register_buffer("right", torch.zeros(1, rows.fan_in, **settings))

    def weight(self, *originals: Tensor) -> Tensor:
        """The weight; in training mode after some power iterations, if the weight trains."""
        matrix = as_matrix(self.rows, originals[0])
        state = self._state()
        ordinary = _is_ordinary(matrix)
        if self.training and originals[0].requires_grad and not torch._C._are_functorch_transforms_active():
            with torch.no_grad():
                state = self.method.advance(TORCH, matrix, state, self.power_iterations, ordinary=ordinary)
                self.left.copy_(state.left)
                self.right.copy_(state.right)
        gain = None if self.gain is None else self.gain.reshape(1, 1)
        made = self.method.compose(TORCH, matrix, state, gain, ordinary=ordinary)
        return as_weight(self.rows, made, originals[0])

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The weight itself, its singular vectors, and the gain that keeps it."""
        state, gain = self.method.attach(_numbers(self.rows, weight))
        self.left.copy_(torch.from_numpy(state.left))
        self.right.copy_(torch.from_numpy(state.right))
        if self.gain is not None:
            self.gain.copy_(torch.from_numpy(gain).reshape(1))
        return weight

    def settle(self, stored: Tensor) -> None:
        """Make ``left`` and ``right`` the singular vectors of the stored weight, decomposed in float64."""
        state, _ = self.method.attach(_numbers(self.rows, stored))
        with torch.no_grad():
            self.left.copy_(torch.from_numpy(state.left))
            self.right.copy_(torch.from_numpy(state.right))

    def error(self, stored: Tensor) -> float:
        """How far sigma is below the largest singular value of the stored weight, relative to it."""
        left, right = (vector.detach().double().cpu().numpy() for vector in (self.left, self.right))
        return spectral_error(_numbers(self.rows, stored), SpectralState(left, right))

    def extra_repr(self) -> str:
        """Shown with the module."""
        gain = ", gain" if self.gain is not None else ""
        return f"{self.rows}, {self.method}, power_iterations={self.power_iterations}{gain}"

    def _state(self) -> SpectralState:
        # Copies: a second call in training writes the next state in their place.
        like = torch.float64 if self.left.dtype == torch.float64 else torch.float32
        return SpectralState(*(vector.to(like, copy=True) for vector in (self.left, self.right)))


def _is_ordinary(matrix: Tensor) -> bool:
    """Whether a look at the numbers costs little and says that their squares need no care."""
    plain = type(matrix) in (Tensor, nn.Parameter) and matrix.device.type == "cpu"
    if not plain or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    found = span(matrix)
    if found is None:
        return False
    largest = max(-found[0], found[1])
    return is_ordinary(largest, largest, matrix.dtype)


def _numbers(rows: Rows, weight: Tensor) -> Any:
    return as_matrix(rows, weight.detach()).cpu().numpy()


def spectral_normalization(
    module: nn.Module,
    name: str = "weight",
    *,
    power_iterations: int = 1,
    epsilon: float = 0.0,
    gain: bool = False,
    axis: int | Sequence[int] | None = None,
) -> Any:
    """Train the weight ``name`` of ``module`` over its largest singular value; returns the module.

    ``gain * v / (sigma(v) + epsilon)``: the weight is a matrix with one row per output unit (as in
    :func:`weight_normalization`), and ``sigma`` comes from power iteration. Its two vectors are buffers of the
    parametrization, ``left`` and ``right``. They start as the exact singular vectors, so a model in eval mode is
    right before any training. Each use of the weight in training mode advances them, unless the weight is frozen
    or inside a transform of ``torch.func``; nothing else writes anything, and nothing ever writes into the
    stored weight. The gradient goes through ``sigma``.

    Sources: spectral normalization (``gain=False``), arXiv 1802.05957; sigma-Reparam (``gain=True``: one learned
    number, ``parametrizations.weight.0.gain``), arXiv 2303.06296. With a gain, attaching changes nothing that the
    module computes; without one it divides by sigma. :func:`refold.fold` ships what eval mode computes, with the
    vectors as they are; :func:`settle` makes them exact first, :func:`spectral_errors` says how far they are.

    Args:
        module: a module of torch, in place.
        name: of the parameter.
        power_iterations: how many steps a use in training makes, at least 1.
        epsilon: added to ``sigma``; 0 by default, as in the papers.
        gain: whether to learn a gain, which starts as ``sigma + epsilon``.
        axis: as for :func:`weight_normalization`.

    A weight of zeros gives zeros and passes no gradient. With activation checkpointing a weight is used, and its
    vectors are advanced, once more.

    Raises:
        ValueError: as for :func:`weight_normalization`; or ``power_iterations`` is not at least 1, or epsilon is
            negative.
    """
    if power_iterations < 1:
        raise ValueError(f"power_iterations must be at least 1, not {power_iterations}")
    method = Spectral(float(epsilon))
    attach(module, name, axis, lambda rows, weight: SpectralWeight(rows, weight, method, power_iterations, gain))
    return module


def settle(model: nn.Module) -> None:
    """Set the vectors of every spectral normalization in ``model`` to the singular vectors of its stored weight.

    They are decomposed in float64; then ``sigma`` is the largest singular value to rounding. This changes what the
    model computes as far as power iteration had not arrived.
    """
    for _, parametrization, stored in _spectral(model):
        parametrization.settle(stored)


def spectral_errors(model: nn.Module) -> dict[str, float]:
    """How far each ``sigma`` is below the largest singular value, relative to it, by the name of the weight."""
    return {name: parametrization.error(stored) for name, parametrization, stored in _spectral(model)}


def _spectral(model: nn.Module) -> Iterator[tuple[str, SpectralWeight, Tensor]]:
    for path, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        parametrizations: Any = module.parametrizations
        for name, found in parametrizations.items():
            if isinstance(found[0], SpectralWeight):
                yield f"{path}.{name}".lstrip("."), found[0], found.original
