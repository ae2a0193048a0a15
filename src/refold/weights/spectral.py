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

    def advance(
        self,
        xp: MatrixNamespace,
        weight: Array,
        state: SpectralState,
        steps: int = 1,
        *,
        axis: int = -1,
        ordinary: bool = False,
    ) -> SpectralState:
        """The state after ``steps`` power iterations on ``weight``: what a training step calls first.

        A matrix of zeros leaves the state as it is. Here and in :meth:`compose`: with ``axis`` 0 the matrix is
        ``(fan_in, units)``; ``ordinary`` says that the square of its largest magnitude is far from overflow and
        underflow, which saves looking at it.

        Raises:
            ValueError: ``steps`` is negative.
        """
        if steps < 0:
            raise ValueError(f"the number of power iterations must not be negative, and {steps} is")
        lines = xp.stop_gradient(widen(xp, weight))
        scaled = _UNSCALED if ordinary else _scaled(xp, lines)
        left, right = state
        for _ in range(steps):
            right = _unit_or(xp, scaled.product(xp, left, lines, not axis), right, ordinary)
            left = _unit_or(xp, scaled.product(xp, right, lines, bool(axis)), left, ordinary)
        return SpectralState(xp.stop_gradient(left), xp.stop_gradient(right))

    def compose(
        self,
        xp: MatrixNamespace,
        direction: Array,
        state: SpectralState,
        gain: Array | None = None,
        *,
        axis: int = -1,
        ordinary: bool = False,
    ) -> Array:
        """The weight ``(units, fan_in)`` for this state; ``gain`` is ``(1, 1)``, 1 if None."""
        lines = widen(xp, direction)
        scaled = _UNSCALED if ordinary else _scaled(xp, lines)
        left, right = (xp.stop_gradient(vector) for vector in state)
        product = scaled.product(xp, left, lines, not axis)
        sigma = xp.matmul(product, xp.transpose(right, (1, 0)))
        empty = sigma == 0
        size = xp.where(empty, xp.ones_like(sigma), sigma + self.epsilon / scaled.scale)
        factor = xp.where(empty, xp.zeros_like(sigma), (xp.ones_like(sigma) if gain is None else gain) / size)
        return (lines if scaled.inverse is None else lines * scaled.inverse) * factor


def spectral_error(weight: npt.ArrayLike, state: SpectralState) -> float:
    """How far the state's sigma is below the largest singular value of ``weight``, relative to it, in float64."""
    rows = np.asarray(weight).astype("float64")
    true = np.linalg.norm(rows, 2)
    return float((true - _sigma_in_float64(rows, state)[0, 0]) / true) if true else 0.0


def _sigma_in_float64(rows: npt.NDArray[Any], state: SpectralState) -> npt.NDArray[Any]:
    left, right = (np.asarray(vector).astype("float64") for vector in state)
    return np.asarray(left @ rows.astype("float64") @ right.T)


class _Scaled(NamedTuple):
    """A power of two near the largest magnitude of a matrix, and its inverse, or 0 for no numbers: ``(1, 1)``.

    Or 1 and None: then nothing is scaled.
    """

    scale: Array | float
    inverse: Array | None

    def product(self, xp: MatrixNamespace, row: Array, matrix: Array, turned: bool) -> Array:
        """``row @ matrix / scale``, or with the matrix turned, without a second matrix and without overflow."""
        if self.inverse is None:
            return _product(xp, row, matrix, turned)
        # Half of the scale in front and half of it behind, or small numbers of the row would become zeros.
        root = xp.sqrt(self.scale)
        return _product(xp, row * (root * self.inverse), matrix, turned) / root


_UNSCALED = _Scaled(1.0, None)


def _scaled(xp: MatrixNamespace, matrix: Array) -> _Scaled:
    largest = xp.stop_gradient(xp.max(xp.abs(matrix), axis=-1, keepdims=True))
    return _Scaled(*scale_rows(xp, xp.reshape(largest, (1, -1)))[1:])


def _product(xp: MatrixNamespace, row: Array, matrix: Array, turned: bool) -> Array:
    """``row @ matrix``, or ``row @ matrix.T`` without turning the matrix."""
    if not turned:
        return xp.matmul(row, matrix)
    return xp.reshape(xp.matmul(matrix, xp.reshape(row, (-1, 1))), (1, -1))


def _unit_or(xp: MatrixNamespace, row: Array, otherwise: Array, ordinary: bool) -> Array:
    values = row if ordinary else scale_rows(xp, row).values
    square = xp.sum(values * values, axis=-1, keepdims=True)
    empty = square <= 0
    return xp.where(empty, otherwise, values / xp.sqrt(xp.where(empty, xp.ones_like(square), square)))
