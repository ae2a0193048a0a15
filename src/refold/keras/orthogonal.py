"""Orthogonal weights for Keras layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from refold.keras.effective import EffectiveKernel, Tensor
from refold.keras.kernels import KernelSpec
from refold.weights import Orthogonal, Rows


@keras.saving.register_keras_serializable(package="refold")
class OrthogonalWeights(EffectiveKernel):
    """Trains the kernel of a layer as a matrix with orthonormal rows, perhaps times a learned gain.

    The kernel is a matrix with one row per output unit (as in :class:`~refold.keras.WeightNormalization`). Its
    rows are orthonormal, or its columns where there are more units than inputs: ``base``, a weight that does not
    train, turned by a rotation that the stored kernel, a free matrix, parameterizes. Formula and sources:
    :class:`refold.weights.Orthogonal`. The kernel stays orthogonal to rounding however long it trains; no call
    writes to any weight.

    Wrapping keeps a kernel whose singular values are all equal (with ``gain=False``: all 1), such as
    ``keras.initializers.Orthogonal`` gives, and replaces any other by the nearest: then it warns if the layer had
    weights before. A fold ships what inference computes.

    Args:
        layer: the layer; built or not.
        map: ``"cayley"``, or ``"exponential"``, which takes longer.
        gain: whether to learn one number that multiplies the kernel, and that starts as its mean singular value.
        axis: as for :class:`~refold.keras.WeightNormalization`.
        **kwargs: as for that one, too.

    The kernel of a convolution is the matrix ``(filters, taps * channels)``: the convolution as a map of images
    is not orthogonal then.

    Raises:
        ValueError: as for :class:`~refold.keras.WeightNormalization`, or there is no such map.
    """

    def __init__(
        self,
        layer: Any,
        map: str = "cayley",
        gain: bool = False,
        axis: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(layer, axis, **kwargs)
        self.use_gain = bool(gain)
        self.method = Orthogonal(map)

    def _build_parts(self, spec: KernelSpec, rows: Rows) -> None:
        if self.use_gain:
            self._add_part(spec, "gain", ())
        self._add_part(spec, "base", (rows.units, rows.fan_in), trainable=False)

    def _attached(self, spec: KernelSpec) -> Mapping[str, Any]:
        parts = self.method.attach(self._stored_numbers(spec))
        return {"base": parts.base, "gain": parts.gain}

    def _effective_rows(self, spec: KernelSpec) -> Tensor:
        # The stored kernel is the direction as it is: it does not turn a base that was made of it.
        gain = self._part_as(spec, "gain", (1, 1))
        return self.method.compose(
            ops, self._stored_rows(spec), ops.convert_to_tensor(self._part(spec, "base")), gain
        )

    def _say_what_changes(self, spec: KernelSpec) -> None:
        if self._was_built:
            super()._say_what_changes(spec)

    def _how(self) -> tuple[str, bool]:
        return "Making them orthogonal" + ("" if self.use_gain else " without a gain"), True

    def get_config(self) -> dict[str, Any]:
        """All arguments of the constructor, the layer serialized."""
        return {**super().get_config(), "map": self.method.map, "gain": self.use_gain}
