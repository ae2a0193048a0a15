"""Spectral normalization and sigma-Reparam for Paddle's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from refold.paddle.attach import ComputedWeight, Start, as_numbers, attach, computed
from refold.paddle.namespace import PADDLE
from refold.paddle.rows import as_lines, as_weight, is_ordinary
from refold.weights import Rows, Spectral, SpectralState, spectral_error


@final
class SpectralWeight(ComputedWeight):
    """The stored weight over its largest singular value, perhaps times a learned ``weight_gain``.

    ``weight_left`` ``(1, units)`` and ``weight_right`` ``(1, fan_in)`` are buffers, ``weight_gain`` ``(1, 1)`` is a
    parameter; all in float32 or wider.
    """

    def __init__(self, name: str, rows: Rows, method: Spectral, power_iterations: int, gain: bool) -> None:
        super().__init__(name, rows)
        self.method = method
        self.power_iterations = power_iterations
        self.gain = gain

    def starts(self, matrix: Any) -> Mapping[str, Start]:
        """The singular vectors, and the gain that keeps the weight."""
        state, gain = self.method.attach(as_numbers(matrix))
        vectors = {"left": Start(state.left, trains=False), "right": Start(state.right, trains=False)}
        return {**vectors, "gain": Start(gain)} if self.gain else vectors

    def compute(self, layer: Any) -> Any:
        """The weight over sigma, for the vectors as they are."""
        stored, axis = self.part(layer, "v"), self.rows.axis
        lines = as_lines(self.rows, stored)
        state, gain, ordinary = self._state(layer), self.part(layer, "gain"), is_ordinary(stored)
        made = self.method.compose(PADDLE, lines, state, gain, axis=axis, ordinary=ordinary)
        return as_weight(self.rows, made, stored)

    def advance(self, layer: Any) -> None:
        """Some power iterations."""
        stored = self.part(layer, "v")
        self._keep(
            layer,
            self.method.advance(
                PADDLE,
                as_lines(self.rows, stored),
                self._state(layer),
                self.power_iterations,
                axis=self.rows.axis,
                ordinary=is_ordinary(stored),
            ),
        )

    def settle(self, layer: Any) -> None:
        """Make the vectors those of the stored weight, decomposed in float64."""
        self._keep(layer, self.method.attach(as_numbers(self.stored(layer)))[0])

    def error(self, layer: Any) -> float:
        """How far sigma is below the largest singular value of the stored weight, relative to it."""
        state = SpectralState(*(as_numbers(vector) for vector in self._state(layer)))
        return spectral_error(as_numbers(self.stored(layer)), state)

    def _state(self, layer: Any) -> SpectralState:
        # Copies: a second call in training writes the next state in their place.
        return SpectralState(*(self.part(layer, end).clone() for end in ("left", "right")))

    def _keep(self, layer: Any, state: SpectralState) -> None:
        self.part(layer, "left").set_value(state.left)
        self.part(layer, "right").set_value(state.right)


def spectral_normalization(
    layer: Any,
    name: str = "weight",
    *,
    power_iterations: int = 1,
    epsilon: float = 0.0,
    gain: bool = False,
    axis: int | Sequence[int] | None = None,
) -> Any:
    """Train the weight ``name`` of ``layer`` over its largest singular value; returns the layer.

    ``gain * v / (sigma(v) + epsilon)``: the weight is a matrix with one row per output unit (as in
    :func:`weight_normalization`), and ``sigma`` comes from power iteration. Its two vectors are buffers of the
    layer, ``weight_left`` and ``weight_right``. They start as the exact singular vectors, so a model in eval mode
    is right before any training. Each call in training mode advances them, unless the weight is frozen; in a
    program that Paddle translated (``to_static``) they stay as they are. Nothing else writes anything, and nothing
    ever writes into the stored weight, ``weight_v``. The gradient goes through ``sigma``.

    Sources: spectral normalization (``gain=False``), arXiv 1802.05957; sigma-Reparam (``gain=True``: one learned
    number, ``weight_gain``), arXiv 2303.06296. With a gain, attaching changes nothing that the layer computes;
    without one it divides by sigma. :func:`refold.fold` ships what eval mode computes, with the vectors as they
    are; :func:`settle` makes them exact first, :func:`spectral_errors` says how far they are.

    Args:
        layer: a layer of Paddle, in place.
        name: of the parameter.
        power_iterations: how many steps a call in training makes, at least 1.
        epsilon: added to ``sigma``; 0 by default, as in the papers.
        gain: whether to learn a gain, which starts as ``sigma + epsilon``.
        axis: as for :func:`weight_normalization`.

    A weight of zeros gives zeros and passes no gradient.

    Raises:
        ValueError: as for :func:`weight_normalization`; or ``power_iterations`` is not at least 1, or epsilon is
            negative.
    """
    if power_iterations < 1:
        raise ValueError(f"power_iterations must be at least 1, not {power_iterations}")
    method = Spectral(float(epsilon))
    attach(layer, name, axis, lambda name, rows: SpectralWeight(name, rows, method, power_iterations, gain))
    return layer


def settle(model: Any) -> None:
    """Set the vectors of every spectral normalization in ``model`` to the singular vectors of its stored weight.

    They are decomposed in float64; then ``sigma`` is the largest singular value to rounding. This changes what the
    model computes as far as power iteration had not arrived.
    """
    for _, layer, hook in computed(model):
        if isinstance(hook, SpectralWeight):
            hook.settle(layer)


def spectral_errors(model: Any) -> dict[str, float]:
    """How far each ``sigma`` is below the largest singular value, relative to it, by the name of the weight."""
    return {
        f"{path}.{hook.name}".lstrip("."): hook.error(layer)
        for path, layer, hook in computed(model)
        if isinstance(hook, SpectralWeight)
    }
