"""Weights over their largest singular value, which power iteration tracks in a state of its own.

The state goes in and comes out: :meth:`Spectral.advance` takes the weight and the state and returns the next
state, and nothing is ever written into the weight. ``compose`` takes a state and never advances it. So the
function of inference is ``compose`` with the last state, and the fold is that value, exactly: not what a full
singular value decomposition would give, which is another function as long as the iteration has not arrived.
:func:`spectral_error` says how far it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt

from refold.weights.namespace import Array, MatrixNamespace, widen
from refold.weights.scaling import scale_rows


class SpectralState(NamedTuple):
    """Estimates of the first singular vectors: ``left`` is ``(1, units)``, ``right`` ``(1, fan_in)``.

    Both have length 1, are float32 (float64 for float64 weights), and are constants for the gradient.
    """

    left: Array
    right: Array


@final
@dataclass(frozen=True, slots=True)
class Spectral:
    """``w = g * v / (sigma(v) + epsilon)``, with ``sigma = left @ v @ right`` of the state, and one ``g`` for all.

    Sources: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", arXiv 1802.05957, section
    2.1 and algorithm 1 (no gain: ``g`` is 1); Zhai et al., "Stabilizing Transformer Training by Preventing
    Attention Entropy Collapse" (sigma-Reparam), arXiv 2303.06296 (a learned ``g``). The papers have no
    epsilon, and 0 is the default. :meth:`attach` keeps the weight where the gain that it gives is used. A matrix
    of zeros gives 0, and passes no gradient. The gradient goes through sigma, not through the state.
    """

    epsilon: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < float("inf"):
            raise ValueError(f"epsilon must be a finite number that is not negative, not {self.epsilon}")

    def attach(self, weight: npt.ArrayLike) -> tuple[SpectralState, npt.NDArray[Any]]:
        """The first singular vectors, decomposed in float64, and the gain ``(1, 1)`` that keeps the weight."""
        rows = np.asarray(weight)
        wide = rows.dtype if rows.dtype in (np.float32, np.float64) else np.dtype(np.float32)
        scale = np.max(np.abs(rows.astype("float64"))) or 1.0
        left, _, right = np.linalg.svd(rows.astype("float64") / scale, full_matrices=False)
        state = SpectralState(left[:, :1].T.astype(wide), right[:1].astype(wide))
        return state, (_sigma_in_float64(rows, state) + self.epsilon).astype(wide)

    def advance(self, xp: MatrixNamespace, weight: Array, state: SpectralState, steps: int = 1) -> SpectralState:
        """The state after ``steps`` power iterations on ``weight``: what a training step calls first.

        A matrix of zeros leaves the state as it is.

        Raises:
            ValueError: ``steps`` is negative.
        """
        if steps < 0:
            raise ValueError(f"the number of power iterations must not be negative, and {steps} is")
        rows = xp.stop_gradient(_scaled(xp, widen(xp, weight))[0])
        left, right = state
        for _ in range(steps):
            right = _unit_or(xp, xp.matmul(left, rows), right)
            left = _unit_or(xp, xp.matmul(right, xp.transpose(rows, (1, 0))), left)
        return SpectralState(xp.stop_gradient(left), xp.stop_gradient(right))

    def compose(
        self, xp: MatrixNamespace, direction: Array, state: SpectralState, gain: Array | None = None
    ) -> Array:
        """The weight ``(units, fan_in)`` for this state; ``gain`` is ``(1, 1)``, 1 if None."""
        rows, scale = _scaled(xp, widen(xp, direction))
        left, right = (xp.stop_gradient(vector) for vector in state)
        sigma = xp.matmul(xp.matmul(left, rows), xp.transpose(right, (1, 0)))
        empty = sigma == 0
        one = xp.ones_like(sigma)
        size = xp.where(empty, one, sigma + self.epsilon / scale)
        rows = xp.where(empty, xp.zeros_like(rows), rows)
        return rows / size if gain is None else rows * (gain / size)


def spectral_error(weight: npt.ArrayLike, state: SpectralState) -> float:
    """How far the state's sigma is below the largest singular value of ``weight``, relative to it, in float64."""
    rows = np.asarray(weight).astype("float64")
    true = np.linalg.norm(rows, 2)
    return float((true - _sigma_in_float64(rows, state)[0, 0]) / true) if true else 0.0


def _sigma_in_float64(rows: npt.NDArray[Any], state: SpectralState) -> npt.NDArray[Any]:
    left, right = (np.asarray(vector).astype("float64") for vector in state)
    return np.asarray(left @ rows.astype("float64") @ right.T)


def _scaled(xp: MatrixNamespace, rows: Array) -> tuple[Array, Array]:
    """The matrix over a power of two near its largest magnitude, and that power ``(1, 1)``."""
    values, scale, _ = scale_rows(xp, xp.reshape(rows, (1, rows.shape[0] * rows.shape[1])))
    return xp.reshape(values, (rows.shape[0], rows.shape[1])), scale


def _unit_or(xp: MatrixNamespace, row: Array, otherwise: Array) -> Array:
    values = scale_rows(xp, row).values
    square = xp.sum(values * values, axis=-1, keepdims=True)
    empty = square <= 0
    return xp.where(empty, otherwise, values / xp.sqrt(xp.where(empty, xp.ones_like(square), square)))
