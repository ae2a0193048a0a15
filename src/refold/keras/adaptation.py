"""Low-rank adaptation (LoRA) and its weight-decomposed form (DoRA) for Keras layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from refold.keras.effective import EffectiveKernel, Tensor, as_stored
from refold.keras.kernels import KernelSpec
from refold.weights import LowRank, Rows, Unit


@keras.saving.register_keras_serializable(package="refold")
class LowRankAdaptation(EffectiveKernel):
    """Adapts a layer by a product of two thin matrices, while its own weights stay as they are.

    ``w0 + alpha / rank * up @ down``, or (``magnitude=True``) ``gain`` times the rows of that over their norms. The
    kernel is a matrix with one row per output unit (as in :class:`~refold.keras.WeightNormalization`); ``up`` is
    ``(units, rank)`` and starts at zero, ``down`` is ``(rank, fan_in)``, ``gain`` ``(units,)``. They train; all
    weights of the wrapped layer are frozen, and stay so when ``trainable`` is set on a layer around it.

    Sources: LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353, whose norm is a constant for the gradient.
    Wrapping changes nothing that the layer computes. A fold ships the sum. Regularizers of the wrapped layer do not
    count, as for any frozen layer.

    Unlike ``layer.enable_lora`` of Keras this is for every kind of layer that
    :class:`~refold.keras.WeightNormalization` knows, each of its kernels for itself.

    Args:
        layer: the layer to adapt, built or not.
        rank: how many columns and rows the thin matrices have.
        alpha: the size of the change, over the rank; by default the rank, so that the factor is 1.
        magnitude: whether each output unit has a magnitude of its own (DoRA).
        down_initializer: an initializer for a kernel ``(fan_in, rank)``: the start of ``down``, transposed.
        axis: as for :class:`~refold.keras.WeightNormalization`.
        **kwargs: as for any Keras layer. ``dtype`` is by default the wrapped layer's.

    Raises:
        ValueError: as for :class:`~refold.keras.WeightNormalization`; or the rank is not at least 1.
    """

    def __init__(
        self,
        layer: Any,
        rank: int,
        alpha: float | None = None,
        magnitude: bool = False,
        down_initializer: Any = "he_uniform",
        axis: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        # A frozen layer is what one adapts.
        super().__init__(layer, axis, **{"trainable": True, **kwargs})
        self.method = LowRank.of_rank(rank, alpha, bool(magnitude))
        self.rank = int(rank)
        self.alpha = float(rank if alpha is None else alpha)
        self.down_initializer = keras.initializers.get(down_initializer)
        layer.trainable = False

    @property
    def trainable(self) -> bool:
        """Whether the adaptation trains; the layer that it adapts never does."""
        return bool(self._trainable)

    @trainable.setter
    def trainable(self, value: bool) -> None:
        keras.Layer.trainable.fset(self, value)
        self.layer.trainable = False

    def _build_parts(self, spec: KernelSpec, rows: Rows) -> None:
        self.layer.trainable = False  # its variables did not exist before
        self._add_part(spec, "up", (rows.units, self.rank))
        self._add_part(spec, "down", (self.rank, rows.fan_in), initializer=self._start)
        if self.method.magnitude:
            self._add_part(spec, "gain", (rows.units,))

    def _start(self, shape: Any, dtype: Any = None) -> Tensor:
        return ops.transpose(self.down_initializer(tuple(shape)[::-1], dtype=dtype))

    def _attached(self, spec: KernelSpec) -> Mapping[str, Any]:
        with as_stored():
            gain = Unit().decompose(ops, self._stored_rows(spec)).gain
        return {"up": ops.zeros((gain.shape[0], self.rank), gain.dtype), "gain": gain}

    def _effective_rows(self, spec: KernelSpec) -> Tensor:
        up, down = (ops.convert_to_tensor(self._part(spec, name)) for name in ("up", "down"))
        return self.method.compose(ops, self._stored_rows(spec), up, down, self._part_as(spec, "gain", (-1, 1)))

    def _how(self) -> tuple[str, bool]:
        return "Low-rank adaptation", False

    def get_config(self) -> dict[str, Any]:
        """All arguments of the constructor, the layer serialized."""
        return {
            **super().get_config(),
            "rank": self.rank,
            "alpha": self.alpha,
            "magnitude": self.method.magnitude,
            "down_initializer": keras.initializers.serialize(self.down_initializer),
        }
