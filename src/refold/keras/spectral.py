"""Spectral normalization and sigma-Reparam for Keras layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from refold.keras import formulas
from refold.keras.effective import EffectiveKernel, Tensor
from refold.keras.kernels import KernelSpec
from refold.weights import Rows, Spectral, SpectralState, spectral_error


@keras.saving.register_keras_serializable(package="refold")
class SpectralNormalization(EffectiveKernel):
    """Trains the kernel of a layer divided by its largest singular value, perhaps times a learned gain.

    ``g * v / (sigma(v) + epsilon)``: the kernel is a matrix with one row per output unit (as in
    :class:`~refold.keras.WeightNormalization`), and ``sigma`` comes from power iteration. Its two vectors,
    ``left`` of shape ``(1, units)`` and ``right`` of shape ``(1, fan_in)``, are weights that do not train. They
    start as the exact singular vectors, so inference is right before any training. A call in training advances
    them by ``power_iterations`` steps, unless the layer is frozen; no other call writes anything, and none
    ever writes to the kernel. The gradient goes through ``sigma``.

    Sources: spectral normalization (``gain=False``), arXiv 1802.05957; sigma-Reparam (``gain=True``: one
    learned number ``gain`` per kernel), arXiv 2303.06296.

    With a gain, wrapping changes nothing that the layer computes. Without one it does, and warns if the layer
    had weights before. A fold ships what inference computes, with the vectors as they are;
    :meth:`settle` makes them exact first, :meth:`spectral_errors` says how far they are.

    Args:
        layer: the layer to normalize; built or not.
        power_iterations: how many steps a call in training makes, at least 1.
        epsilon: added to ``sigma``; 0 by default, as in the papers.
        gain: whether to learn a gain, which starts as ``sigma + epsilon``.
        axis: as for :class:`~refold.keras.WeightNormalization`.
        **kwargs: as for that one, too.

    A kernel of zeros gives zeros and passes no gradient. Of a depthwise convolution the matrix has a row per
    channel and multiple; its singular value is that of this matrix, not of the convolution as a map of images.

    Raises:
        ValueError: as for :class:`~refold.keras.WeightNormalization`; or ``power_iterations`` is not at least 1,
            or epsilon is negative.
    """

    def __init__(
        self,
        layer: Any,
        power_iterations: int = 1,
        epsilon: float = 0.0,
        gain: bool = False,
        axis: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(layer, axis, **kwargs)
        if power_iterations < 1:
            raise ValueError(f"power_iterations must be at least 1, not {power_iterations}.")
        self.power_iterations = int(power_iterations)
        self.use_gain = bool(gain)
        self.method = Spectral(float(epsilon))

    def settle(self) -> None:
        """Set ``left`` and ``right`` to the singular vectors of the stored kernel, decomposed in float64.

        Then ``sigma`` is its largest singular value to rounding. This changes what the layer computes as far as
        power iteration had not arrived.
        """
        for spec in self.specs:
            parts = self._attached(spec)
            for name in ("left", "right"):
                self._part(spec, name).assign(parts[name])

    def spectral_errors(self) -> dict[str, float]:
        """How far ``sigma`` is below the largest singular value, relative to it, by the path of the kernel."""
        return {
            spec.path: spectral_error(
                self._stored_numbers(spec),
                SpectralState(*(ops.convert_to_numpy(self._part(spec, name)) for name in ("left", "right"))),
            )
            for spec in self.specs
        }

    # ---- the effective kernel --------------------------------------------------------------------

    def _build_parts(self, spec: KernelSpec, rows: Rows) -> None:
        if self.use_gain:
            self._add_part(spec, "gain", ())
        self._add_part(spec, "left", (1, rows.units), trainable=False)
        self._add_part(spec, "right", (1, rows.fan_in), trainable=False)

    def _attached(self, spec: KernelSpec) -> Mapping[str, Any]:
        state, gain = self.method.attach(self._stored_numbers(spec))
        return {"left": state.left, "right": state.right, "gain": gain}

    def _effective_rows(self, spec: KernelSpec) -> Tensor:
        return self._rows(spec).to_matrix(ops, self._composed(spec))

    def _composed(self, spec: KernelSpec) -> Tensor:
        rows, gain = self._rows(spec), self._part_as(spec, "gain", (1, 1))
        stored, state = self._stored_lines(spec), self._state(spec)
        lines = formulas.compose_spectral(self.method, stored, state, gain, axis=rows.axis)
        return rows.from_lines(ops, lines)

    def _advance(self) -> None:
        for spec in self.specs:
            axis = self._rows(spec).axis
            stored, state = self._stored_lines(spec), self._state(spec)
            state = formulas.advance(self.method, stored, state, self.power_iterations, axis=axis)
            self._part(spec, "left").assign(state.left)
            self._part(spec, "right").assign(state.right)

    def _state(self, spec: KernelSpec) -> SpectralState:
        # Copies: torch writes in place, and a second call must not change what the first one differentiates.
        left, right = (ops.copy(ops.convert_to_tensor(self._part(spec, name))) for name in ("left", "right"))
        return SpectralState(left, right)

    # ---- saying what changes, saving -------------------------------------------------------------

    def _say_what_changes(self, spec: KernelSpec) -> None:
        if self._was_built:
            super()._say_what_changes(spec)

    def _how(self) -> tuple[str, bool]:
        return "Spectral normalization" + ("" if self.use_gain else " without a gain"), not self.use_gain

    def get_config(self) -> dict[str, Any]:
        """All arguments of the constructor, the layer serialized."""
        return {
            **super().get_config(),
            "power_iterations": self.power_iterations,
            "epsilon": self.method.epsilon,
            "gain": self.use_gain,
        }
