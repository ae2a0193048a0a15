"""Weight normalization for Keras layers, on every backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from math import prod
from typing import Any, final

import keras
import numpy as np
from keras import ops

from refold.keras import formulas
from refold.keras.effective import EffectiveKernel, Tensor, as_stored
from refold.keras.kernels import KernelSpec, called
from refold.weights import (
    NUMPY,
    Centered,
    MagnitudePreserving,
    Normalization,
    Rows,
    TimmStandardization,
    fit_rows,
    method,
    pays,
    widen,
    working_dtype,
)

# Methods that are given as themselves, because they have more parameters than an epsilon.
CHOSEN = (Centered, TimmStandardization)


def _check_no_epsilon(called: str, epsilon: float | None) -> None:
    if epsilon is not None:
        raise ValueError(f"epsilon is for named normalizers: {called} has its own.")


def _check_normalizer(normalizer: Any, epsilon: float | None) -> None:
    if not isinstance(normalizer, keras.Layer):
        raise ValueError(f"the normalizer must be a name, a method or a Keras layer, not {normalizer!r}.")
    _check_no_epsilon(f"the layer {called(normalizer)}", epsilon)
    if isinstance(normalizer, keras.layers.BatchNormalization):
        raise ValueError(
            f"the layer {called(normalizer)} normalizes over the output units, not over the weights of each."
        )
    axis = getattr(normalizer, "axis", -1)
    axes = list(axis) if isinstance(axis, list | tuple) else [axis]
    if any(axis not in (-1, 1) for axis in axes):
        raise ValueError(
            f"the layer {called(normalizer)} normalizes over axis {axis}: the weights of an output unit are "
            "a row, so it must be -1."
        )


def method_of(config: dict[str, Any]) -> Normalization:
    """The method that ``get_config`` wrote.

    Raises:
        ValueError: it is none of :data:`CHOSEN`, or has other parameters.
    """
    parameters = {name: value for name, value in config.items() if name != "method"}
    for kind in CHOSEN:
        if kind.__name__ == config["method"] and parameters.keys() <= {field.name for field in fields(kind)}:
            return kind(**parameters)
    raise ValueError(f"there is no weight normalization {config['method']!r} with {', '.join(parameters)}.")


def _centers(normalizer: Any) -> bool:
    """Whether a Keras layer takes the mean of each row out."""
    if isinstance(normalizer, keras.layers.LayerNormalization):
        return not getattr(normalizer, "rms_scaling", False)
    return isinstance(normalizer, keras.layers.GroupNormalization)


def _copy(normalizer: Any) -> Any:
    """A second layer of the same configuration: its weights have another size."""
    config = normalizer.get_config()
    config.pop("name", None)
    return type(normalizer).from_config(config)


@final
class _Forced(keras.constraints.Constraint):
    """The rows that magnitude preserving normalization stores after a step."""

    def __init__(self, method: Any, rows: Rows) -> None:
        self.method = method
        self.rows = rows

    def __call__(self, kernel: Tensor) -> Tensor:
        matrix = self.method.force(ops, self.rows.to_matrix(ops, widen(ops, kernel)))
        return ops.cast(self.rows.from_matrix(ops, matrix), kernel.dtype)


@keras.saving.register_keras_serializable(package="refold")
class WeightNormalization(EffectiveKernel):
    """Trains the kernel of a layer as a direction and a gain per output unit.

    The kernel is seen as a matrix with one row per output unit; each row goes through the normalizer, is
    multiplied by the unit's gain, and goes back to its place. The wrapped layer is then called with this
    *effective* kernel. Its own variable keeps the direction ``v``; the gain is a new variable, ``gain``, of
    shape ``(units,)``. A call never writes to any of them.

    What counts as an output unit: a column of a Dense kernel, a filter of a convolution (transposed ones
    too), a channel times multiplier of a depthwise convolution, an entry of all kernel axes that the output
    of an EinsumDense has, and the vector of a token (a row of the table) for an Embedding. Both kernels of a
    separable convolution are normalized, with ``depthwise_gain`` and ``pointwise_gain``; so are both of a
    SimpleRNN, GRU or LSTM, each gate of each unit being a row, with ``gain`` and ``recurrent_gain`` (behind
    ``forward_`` and ``backward_`` in a Bidirectional). The kernels are normalized once a call, not once a step.
    Of an attention layer, all projections are (``query_gain``, ``key_gain``, ``value_gain``, ``output_gain``), one
    row per entry of each head.

    By default, wrapping changes nothing that the layer computes: gain and offset start as what the stored
    kernel has. Options that do change it raise a warning when the layer is built. After setting the weights
    of the wrapped layer from elsewhere, call :meth:`reset_gain`, or set the effective kernel by
    :meth:`assign_kernel`. Where the wrapped layer is also called bare, it computes with the direction.

    Args:
        layer: the layer to normalize; built or not.
        normalizer: ``"unit"``, weight normalization (arXiv 1602.07868), ``g * v / (|v| + epsilon)``;
            ``"layer"``, weight standardization (arXiv 1903.10520),
            ``g * (v - mean(v)) / (std(v) + epsilon)``; ``"rms"``, ``g * v / (rms(v) + epsilon)``; any other name
            in :data:`refold.weights.METHODS`; all row by row. Or a method with its parameters, such as
            ``refold.weights.Centered(activation="relu")``. Or a Keras layer that maps ``(units, fan_in)`` to the
            same shape row by row, such as ``LayerNormalization()``, with its own epsilon and weights; it is used
            as it is and made to compute in float32 (float64 for float64 weights).
        epsilon: added to the row's norm, standard deviation or root mean square, not under the root; by
            default 0 for ``"unit"`` and ``"rms"`` and 1e-10 for ``"layer"``; where it sits in the other methods,
            they say. Only for named normalizers.
        gain: whether each output unit has a learnable gain. Without it the rows keep the size that the
            normalizer gives them: this changes what the layer computes.
        offset: whether each output unit has a learnable number ``offset`` that is added to all its weights.
            By default there is one where the normalizer takes the row's mean out (``"layer"``, ``"centered"``,
            all standardizations, ``LayerNormalization``, ``GroupNormalization``) and there is a gain, because
            without it the mean is lost and the layer computes something else. False is weight standardization
            with a gain, as in the papers, and says that it changes the layer.
        axis: the axes of the kernel that number the output units, where it is not one of the layers above or
            another choice is meant (``axis=-1`` for an Embedding normalizes its columns, ``()`` is one norm over
            the whole kernel).
        force: for ``"magnitude"``, whether the stored rows are set to length ``sqrt(fan_in)`` after every step of
            an optimizer, as EDM2 does before every step: a constraint of the stored kernel, never a side effect of
            a call. What the layer computes stays the same, but for what epsilon is beside the old length.
        **kwargs: as for any Keras layer. ``dtype`` and ``trainable`` are by default the wrapped layer's.

    The weights are normalized in float32 or wider whatever the dtype policy, and rounded once to the kernel's
    dtype; gain and offset are float32 (float64 for float64 kernels). A row without direction (all zero;
    all equal, where the mean is taken out) normalizes to 0 and passes no gradient.

    The regularizer of the wrapped layer's kernel sees the effective kernel, since the size of the direction
    means nothing. Its constraint is applied to the stored direction, as is an optimizer's weight decay.

    Raises:
        ValueError: the layer has no kernel, or nothing tells its output units; the normalizer
            is not a name or layer of the kind above; or epsilon is negative or given for a layer.
    """

    def __init__(
        self,
        layer: Any,
        normalizer: Any = "unit",
        epsilon: float | None = None,
        gain: bool = True,
        offset: bool | None = None,
        axis: int | Sequence[int] | None = None,
        force: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(layer, axis, **kwargs)
        self.use_gain = bool(gain)
        self.normalizer = normalizer
        self.method: Normalization | None = None
        if isinstance(normalizer, str):
            self.method = method(normalizer, epsilon)
        elif isinstance(normalizer, CHOSEN):
            _check_no_epsilon(repr(normalizer), epsilon)
            self.method = normalizer
        else:
            _check_normalizer(normalizer, epsilon)
        if force and not isinstance(self.method, MagnitudePreserving):
            raise ValueError("only magnitude preserving normalization has rows that can be forced.")
        self.force = bool(force)
        self.epsilon = self.method.epsilon if self.method else None
        self._centers = self.method.centered if self.method else _centers(normalizer)
        self.use_offset = self._centers and self.use_gain if offset is None else bool(offset)
        for i, spec in enumerate(self.specs):
            if self.method is None:
                own = normalizer if i == 0 else _copy(normalizer)
                if not self.trainable:
                    own.trainable = False
                setattr(self, f"{spec.prefix}normalizer", own)
            setattr(self, f"{spec.prefix}gain", None)
            setattr(self, f"{spec.prefix}offset", None)

    def _build_parts(self, spec: KernelSpec, rows: Rows) -> None:
        if self.method is None:
            self._build_normalizer(spec, rows, working_dtype(self._variable(spec).dtype))
        for name, used in (("gain", self.use_gain), ("offset", self.use_offset)):
            if used:
                self._add_part(spec, name, (rows.units,))
        if self.force:
            variable = self._variable(spec)
            if not isinstance(variable.constraint, _Forced | None):
                raise ValueError(f"the layer {called(self.layer)} has a constraint on its kernel already.")
            variable.constraint = _Forced(self.method, rows)

    def _build_normalizer(self, spec: KernelSpec, rows: Rows, dtype: str) -> None:
        normalizer = getattr(self, f"{spec.prefix}normalizer")
        shape = (rows.units, rows.fan_in)
        if normalizer.compute_dtype != dtype:
            normalizer.dtype_policy = dtype
        if not normalizer.built:
            normalizer.build(shape)
        given = tuple(normalizer.compute_output_spec(keras.KerasTensor(shape, dtype=dtype)).shape)
        if given != shape:
            raise ValueError(
                f"the normalizer {called(normalizer)} makes {given} of the {shape} weights of the layer "
                f"{called(self.layer)}: it must keep their shape."
            )

    def _effective_rows(self, spec: KernelSpec) -> Tensor:
        if self.method is not None:
            return self._rows(spec).to_matrix(ops, self._composed(spec))
        gain, offset = (self._part_as(spec, name, (-1, 1)) for name in ("gain", "offset"))
        rows = widen(ops, getattr(self, f"{spec.prefix}normalizer")(self._stored_rows(spec)))
        rows = rows if gain is None else rows * gain
        return rows if offset is None else rows + offset

    def _composed(self, spec: KernelSpec) -> Tensor:
        rows, method = self._rows(spec), self.method
        if method is None:
            return super()._composed(spec)
        parts = (self._part(spec, name) for name in ("gain", "offset"))
        columns = [None if part is None else rows.as_column(ops, ops.convert_to_tensor(part)) for part in parts]
        return rows.from_lines(ops, formulas.compose(method, self._stored_lines(spec), *columns, axis=rows.axis))

    def call(self, inputs: Any, training: bool | None = None, **kwargs: Any) -> Any:
        """Call the wrapped layer with the effective kernel; in training, where that is faster, do what it does."""
        if training and not kwargs and self._normalizes_outputs(inputs):
            return self._called_by_outputs(inputs)
        return super().call(inputs, training, **kwargs)

    def _normalizes_outputs(self, inputs: Any) -> bool:
        """Whether this is a plain Dense layer on few inputs, in one type: see :func:`refold.weights.outputs`."""
        layer = self.layer
        if type(layer) is not keras.layers.Dense or self.method is None or self.specs[0].unit_axes != (-1,):
            return False
        if layer.activity_regularizer is not None or {layer.compute_dtype, layer.variable_dtype} not in (
            {"float32"},
            {"float64"},
        ):
            return False
        kernel = self._variable(self.specs[0])
        known = keras.backend.standardize_dtype(inputs.dtype) == kernel.dtype and None not in inputs.shape
        fits = known and len(inputs.shape) > 1 and inputs.shape[-1] == kernel.shape[0]
        return fits and pays(prod(inputs.shape), prod(kernel.shape))

    def _called_by_outputs(self, inputs: Any) -> Tensor:
        (spec,) = self.specs
        assert self.method is not None
        with as_stored():
            parts = (self._part_as(spec, name, (1, -1)) for name in ("gain", "offset"))
            axis = self._rows(spec).axis
            out = formulas.outputs(self.method, inputs, self._stored_lines(spec), *parts, axis=axis)
            out = out if self.layer.bias is None else ops.add(out, self.layer.bias)
        return out if self.layer.activation is None else self.layer.activation(out)

    def _attached(self, spec: KernelSpec) -> Mapping[str, Any]:
        with as_stored():
            stored = self._stored_rows(spec)
            if self.method is not None:
                parts = formulas.decompose(self.method, self._stored_lines(spec), axis=self._rows(spec).axis)
            else:
                normalized = getattr(self, f"{spec.prefix}normalizer")(stored)
                parts = fit_rows(ops, normalized, stored, offset=self.use_offset)
        # An offset may be asked for that the normalizer does not need.
        offset = ops.zeros_like(parts.gain) if parts.offset is None else parts.offset
        return {"gain": parts.gain, "offset": offset}

    # ---- saying what changes ---------------------------------------------------------------------

    def _say_what_changes(self, spec: KernelSpec) -> None:
        """Warn if the layer will not compute what it did, and of units that cannot learn a direction."""
        super()._say_what_changes(spec)
        numbers = self._numbers(spec)
        if numbers is None or self.method is None:
            return
        stored, _ = numbers
        lost = np.count_nonzero(self.method.decompose(NUMPY, stored).gain == 0)
        if lost:
            equal = "all equal" if self._centers else "all zero"
            self._warn(
                f"The weights of {lost} of the {len(stored)} output units of the layer {called(self.layer)} are "
                f"{equal}, which is no direction, and they cannot learn one."
            )

    def _how(self) -> tuple[str, bool]:
        how = "Weight normalization by " + (repr(self.normalizer) if self.method else called(self.normalizer))
        if not self.use_gain:
            return f"{how} without a gain", True
        if self._centers and not self.use_offset:
            return f"{how} without an offset for the mean that it takes out", True
        return how, False

    # ---- saving ----------------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """All arguments of the constructor, the layers serialized."""
        normalizer, epsilon = self.normalizer, self.epsilon
        if isinstance(normalizer, CHOSEN):
            normalizer, epsilon = {"method": type(normalizer).__name__, **asdict(normalizer)}, None
        elif self.method is None:
            normalizer = keras.saving.serialize_keras_object(normalizer)
        return {
            **super().get_config(),
            "normalizer": normalizer,
            "epsilon": epsilon,
            "gain": self.use_gain,
            "offset": self.use_offset,
            "force": self.force,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """The layer of such a configuration."""
        config = dict(config)
        normalizer = config["normalizer"]
        if isinstance(normalizer, dict) and "method" in normalizer:
            config["normalizer"] = method_of(normalizer)
        for name in ("layer", "normalizer"):
            if not isinstance(config[name], (str, *CHOSEN)):
                config[name] = keras.saving.deserialize_keras_object(config[name], custom_objects=custom_objects)
        return cls(**config)


def weight_normalization(layer: Any, normalizer: Any = "unit", **options: Any) -> WeightNormalization:
    """The layer under :class:`WeightNormalization`, built at once if the layer is built.

    ``options`` are the arguments of :class:`WeightNormalization`, which also says what is raised.
    """
    wrapped = WeightNormalization(layer, normalizer, **options)
    if layer.built:
        wrapped.build()
    return wrapped
