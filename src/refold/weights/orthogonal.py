"""Weights with orthonormal rows (or columns), as a fixed one that a free matrix turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt

from refold.weights.namespace import Array, MatrixNamespace, widen

MAPS = ("cayley", "exponential")

# The exponential is r(M / 2**SQUARINGS) ** (2**SQUARINGS), with r(X) = p(X) / p(-X) the diagonal Padé approximant
# of degree 7. It is orthogonal for every skew M, and the exponential to rounding in float64 while |M| is below 15:
# Higham, "The Scaling and Squaring Method for the Matrix Exponential Revisited", SIAM J. Matrix Anal. Appl. 2005.
SQUARINGS = 4
PADE = (1.0, 1 / 2, 3 / 26, 5 / 312, 5 / 3432, 1 / 11440, 1 / 308880, 1 / 17297280)


class OrthogonalParts(NamedTuple):
    """A weight that ``compose`` turns: ``direction`` and ``base`` are ``(units, fan_in)``, ``gain`` is ``(1, 1)``.

    ``base`` is a constant, with orthonormal rows (columns, where there are more units than inputs).
    """

    direction: Array
    base: Array
    gain: Array


@final
@dataclass(frozen=True, slots=True)
class Orthogonal:
    """``w = g * base @ q(A)`` with ``A = base.T @ v - v.T @ base``: orthonormal rows, and one ``g`` for all.

    Where there are more units than inputs, all of this holds for the transposed matrices: orthonormal columns.
    ``q`` is ``(I + A/2) @ inv(I - A/2)`` for the map ``"cayley"`` and the matrix exponential for
    ``"exponential"``. ``A`` is skew, so both are rotations.

    Sources: Lezcano-Casado, "Trivializations for Gradient-Based Optimization on Manifolds", arXiv 1909.09501 (a
    free matrix around a ``base``, with the exponential of "Cheap Orthogonal Constraints in Neural Networks",
    arXiv 1901.08428); Helfrich et al., "Orthogonal Recurrent Neural Networks with Scaled Cayley Transform", arXiv
    1707.09520, and Wen and Yin, "A feasible method for optimization with orthogonality constraints",
    Mathematical Programming 2013 (its form for few rows). There is no epsilon.

    :meth:`attach` keeps a weight whose singular values are all equal (to 1, without the gain). Any other weight
    it replaces by the nearest of these, which changes the function. The direction starts at ``base``, not at
    the weight. The fold is the value of ``compose``.

    Raises:
        ValueError: there is no such map.
    """

    map: str = "cayley"

    def __post_init__(self) -> None:
        if self.map not in MAPS:
            raise ValueError(f"there is no map {self.map!r} to orthogonal matrices: choose {' or '.join(MAPS)}")

    def attach(self, weight: npt.ArrayLike) -> OrthogonalParts:
        """The orthogonal factor of ``weight`` and its mean singular value, decomposed in float64.

        Their product is the nearest to ``weight``, in the Frobenius norm, of all that ``compose`` can give.
        """
        rows = np.asarray(weight)
        wide = rows.dtype if rows.dtype in (np.float32, np.float64) else np.dtype(np.float32)
        scale = np.max(np.abs(rows.astype("float64"))) or 1.0
        left, values, right = np.linalg.svd(rows.astype("float64") / scale, full_matrices=False)
        base = (left @ right).astype(wide)
        return OrthogonalParts(base.copy(), base, np.full((1, 1), np.mean(values) * scale, wide))

    def compose(self, xp: MatrixNamespace, direction: Array, base: Array, gain: Array | None = None) -> Array:
        """The weight ``(units, fan_in)``; ``gain`` is ``(1, 1)``, 1 if None."""
        fixed, free = xp.stop_gradient(widen(xp, base)), widen(xp, direction)
        if fixed.shape[0] > fixed.shape[1]:
            turned = _transposed(xp, self._turned(xp, _transposed(xp, fixed), _transposed(xp, free)))
        else:
            turned = self._turned(xp, fixed, free)
        return turned if gain is None else turned * gain

    def _turned(self, xp: MatrixNamespace, base: Array, free: Array) -> Array:
        # A of the change is A of the free matrix, and exactly 0 where nothing has changed yet.
        change = free - base
        if 2 * base.shape[0] < base.shape[1]:
            return self._turned_in_span(xp, base, change)
        product = xp.matmul(_transposed(xp, base), change)
        return xp.matmul(base, self._turn(xp, product - _transposed(xp, product)))

    def _turned_in_span(self, xp: MatrixNamespace, base: Array, change: Array) -> Array:
        """The same by matrices of twice the number of rows.

        Let ``P`` have the rows of ``base`` and of ``change / c``. Then ``-A @ P.T`` is ``P.T @ core`` with the
        small matrix below, so ``q(-A) @ P.T`` is ``P.T @ q(core)`` for either ``q``, and its first columns are the
        turned rows. Any number does for ``c``: the size of the change keeps the two halves of ``core`` alike.
        """
        count = base.shape[0]
        square = xp.stop_gradient(xp.sum(xp.reshape(change * change, (1, -1)), axis=-1, keepdims=True)) / count
        size = xp.sqrt(xp.where(square > 0, square, xp.ones_like(square)))
        span = xp.concatenate([base, change / size], axis=0)
        gram = size * xp.matmul(span, _transposed(xp, span))
        core = xp.concatenate([-gram[count:], gram[:count]], axis=0)
        return xp.matmul(_transposed(xp, self._turn(xp, core)[:, :count]), span)

    def _turn(self, xp: MatrixNamespace, matrix: Array) -> Array:
        """``q`` of a square matrix."""
        one = xp.diag(xp.ones_like(matrix[0]))
        if self.map == "cayley":
            return xp.solve(one - matrix / 2, one + matrix / 2)
        small = matrix / 2**SQUARINGS
        second = xp.matmul(small, small)
        fourth = xp.matmul(second, second)
        sixth = xp.matmul(fourth, second)
        odd = xp.matmul(small, PADE[7] * sixth + PADE[5] * fourth + PADE[3] * second + PADE[1] * one)
        even = PADE[6] * sixth + PADE[4] * fourth + PADE[2] * second + one
        power = xp.solve(even - odd, even + odd)
        for _ in range(SQUARINGS):
            power = xp.matmul(power, power)
        return power


def _transposed(xp: MatrixNamespace, matrix: Array) -> Any:
    return xp.transpose(matrix, (1, 0))
