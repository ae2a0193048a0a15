"""The formulas of :mod:`refold.weights` on Keras' operations, each as one step of the backend.

Outside of a compiled function JAX runs one operation at a time, and most of them pass over the whole weight. So
there each formula is compiled by itself, its derivative too; inside of a compiled function, an export or another
transformation it becomes a part of that. The other backends take the operations as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from keras import ops
from keras.src import backend

from refold import weights
from refold.weights import Normalization, Parts, Spectral, SpectralState

Tensor = Any
Formula = TypeVar("Formula", bound=Callable[..., Any])


def _at_once(*constants: str) -> Callable[[Formula], Formula]:
    """The formula, compiled where that pays: once for each value of the hashable ``constants``."""

    def compiled(formula: Formula) -> Formula:
        if backend.backend() != "jax":
            return formula
        import jax

        made: Formula = jax.jit(formula, static_argnames=constants)
        return made

    return compiled


@_at_once("method", "axis")
def compose(
    method: Normalization, direction: Tensor, gain: Tensor | None, offset: Tensor | None, *, axis: int
) -> Tensor:
    """``method.compose``."""
    return method.compose(ops, direction, gain, offset, axis=axis)


@_at_once("method", "axis")
def decompose(method: Normalization, weight: Tensor, *, axis: int) -> Parts:
    """``method.decompose``."""
    return method.decompose(ops, weight, axis=axis)


@_at_once("method", "axis")
def outputs(
    method: Normalization,
    x: Tensor,
    direction: Tensor,
    gain: Tensor | None,
    offset: Tensor | None,
    *,
    axis: int,
) -> Tensor:
    """:func:`refold.weights.outputs`."""
    return weights.outputs(ops, method, x, direction, gain, offset, axis=axis)


@_at_once("method", "axis")
def compose_spectral(
    method: Spectral, direction: Tensor, state: SpectralState, gain: Tensor | None, *, axis: int
) -> Tensor:
    """``method.compose``."""
    return method.compose(ops, direction, state, gain, axis=axis)


@_at_once("method", "steps", "axis")
def advance(method: Spectral, weight: Tensor, state: SpectralState, steps: int, *, axis: int) -> SpectralState:
    """``method.advance``."""
    return method.advance(ops, weight, state, steps, axis=axis)
