"""Weight normalization for Keras layers, on every backend."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, final

import keras
import numpy as np
from keras import ops
from keras.src import backend
from keras.src.backend.common import global_state

from refold.weights import (
    NUMPY,
    Centered,
    Normalization,
    Parts,
    Rows,
    TimmStandardization,
    fit_rows,
    method,
    widen,
    working_dtype,
)

Tensor = Any

# Methods that are given as themselves, because they have more parameters than an epsilon.
CHOSEN = (Centered, TimmStandardization)

# Relative to the largest weight of a row: anything above is not rounding.
ROUNDING = 1e-4


@final
@dataclass(frozen=True, slots=True)
class KernelSpec:
    """A kernel of a layer: the path of attributes to it (``kernel``, ``cell.kernel``), the axes that number the
    output units, and what its parts are called.

    The variables and the normalizer that belong to it are the attributes ``prefix + "gain"``,
    ``prefix + "offset"`` and ``prefix + "normalizer"`` of the wrapper.
    """

    path: str
    unit_axes: tuple[int, ...]
    prefix: str = ""


_DENSE = (KernelSpec("kernel", (-1,)),)
_TRANSPOSED = (KernelSpec("kernel", (-2,)),)
_DEPTHWISE = (KernelSpec("kernel", (-2, -1)),)
_SEPARABLE = (
    KernelSpec("depthwise_kernel", (-2, -1), "depthwise_"),
    KernelSpec("pointwise_kernel", (-1,), "pointwise_"),
)
_EMBEDDING = (KernelSpec("embeddings", (0,)),)
# A column of either kernel of a recurrent cell belongs to one gate of one unit.
_CELL = (
    KernelSpec("cell.kernel", (-1,)),
    KernelSpec("cell.recurrent_kernel", (-1,), "recurrent_"),
)

# Which axes of a stored kernel number the output units, by kind of layer.
KERNELS: dict[type, tuple[KernelSpec, ...]] = {
    keras.layers.Dense: _DENSE,
    keras.layers.Conv1D: _DENSE,
    keras.layers.Conv2D: _DENSE,
    keras.layers.Conv3D: _DENSE,
    keras.layers.Conv1DTranspose: _TRANSPOSED,
    keras.layers.Conv2DTranspose: _TRANSPOSED,
    keras.layers.Conv3DTranspose: _TRANSPOSED,
    keras.layers.DepthwiseConv1D: _DEPTHWISE,
    keras.layers.DepthwiseConv2D: _DEPTHWISE,
    keras.layers.SeparableConv1D: _SEPARABLE,
    keras.layers.SeparableConv2D: _SEPARABLE,
    keras.layers.Embedding: _EMBEDDING,
}

# Cells that are known to have a kernel for the input and one for the state.
_CELLS = (keras.layers.SimpleRNNCell, keras.layers.GRUCell, keras.layers.LSTMCell)
# What a cell alone would need (states in and out) is not what a wrapper passes on.
_REFUSED = (keras.layers.RNN, *_CELLS, keras.layers.StackedRNNCells)


def _called(layer: Any) -> str:
    return f"{layer.name!r} ({type(layer).__name__})"


def _einsum_axes(equation: str) -> tuple[int, ...]:
    """The axes of an EinsumDense kernel that its output has too: they tell its output units apart."""
    operands, output = equation.replace(" ", "").replace("...", "").split("->")
    kernel = operands.split(",")[1]
    return tuple(axis for axis, label in enumerate(kernel) if label in output)


def kernel_specs(layer: Any, axis: int | Sequence[int] | None) -> tuple[KernelSpec, ...]:
    """The kernels of a layer that is to be normalized.

    Raises:
        ValueError: it has none, or nothing tells which of their axes number the output units.
    """
    if isinstance(layer, WeightNormalization):
        raise ValueError(f"the layer {_called(layer)} is a WeightNormalization already.")
    specs = _recurrent_specs(layer) or next((s for kind, s in KERNELS.items() if isinstance(layer, kind)), ())
    if not specs and (isinstance(layer, _REFUSED) or hasattr(layer, "recurrent_kernel")):
        raise ValueError(
            f"the layer {_called(layer)} is a recurrent cell, or a recurrent layer with cells of another kind than "
            "SimpleRNNCell, GRUCell and LSTMCell, which WeightNormalization does not know."
        )
    if isinstance(layer, keras.layers.EinsumDense):
        specs = (KernelSpec("kernel", _einsum_axes(layer.equation)),)
        if not specs[0].unit_axes and axis is None:
            raise ValueError(
                f"the output of the layer {_called(layer)} has no axis of its kernel, "
                f"so {layer.equation!r} does not tell its output units."
            )
    if axis is not None:
        if len(specs) > 1:
            raise ValueError(f"the layer {_called(layer)} has several kernels, for which one axis cannot be given.")
        axes = (axis,) if isinstance(axis, int) else tuple(axis)
        return (KernelSpec(specs[0].path if specs else "kernel", axes),)
    if specs:
        return specs
    if type(layer).__module__.startswith("keras.") or (layer.built and not hasattr(layer, "kernel")):
        raise ValueError(f"the layer {_called(layer)} has no kernel of its own that could be normalized.")
    raise ValueError(
        f"nothing tells which axes of the kernel of the layer {_called(layer)} number its output units: pass axis."
    )


def _recurrent_specs(layer: Any) -> tuple[KernelSpec, ...]:
    """Both kernels of a recurrent layer's cell, in both directions; none for other layers."""
    if isinstance(layer, keras.layers.Bidirectional):
        directions = [(word, _recurrent_specs(getattr(layer, f"{word}_layer"))) for word in ("forward", "backward")]
        return tuple(
            KernelSpec(f"{word}_layer.{spec.path}", spec.unit_axes, f"{word}_{spec.prefix}")
            for word, specs in directions
            for spec in specs
        )
    if isinstance(layer, keras.layers.RNN) and isinstance(layer.cell, _CELLS):
        return _CELL
    return ()


@contextmanager
def _as_stored() -> Iterator[None]:
    """Read variables in the dtype that they are stored in, whatever mixed precision is around."""
    around = global_state.get_global_attribute("autocast_scope")
    global_state.set_global_attribute("autocast_scope", None)
    try:
        yield
    finally:
        global_state.set_global_attribute("autocast_scope", around)


def _check_no_epsilon(called: str, epsilon: float | None) -> None:
    if epsilon is not None:
        raise ValueError(f"epsilon is for named normalizers: {called} has its own.")


def _check_normalizer(normalizer: Any, epsilon: float | None) -> None:
    if not isinstance(normalizer, keras.Layer):
        raise ValueError(f"the normalizer must be a name, a method or a Keras layer, not {normalizer!r}.")
    _check_no_epsilon(f"the layer {_called(normalizer)}", epsilon)
    if isinstance(normalizer, keras.layers.BatchNormalization):
        raise ValueError(
            f"the layer {_called(normalizer)} normalizes over the output units, not over the weights of each."
        )
    axis = getattr(normalizer, "axis", -1)
    axes = list(axis) if isinstance(axis, list | tuple) else [axis]
    if any(axis not in (-1, 1) for axis in axes):
        raise ValueError(
            f"the layer {_called(normalizer)} normalizes over axis {axis}: the weights of an output unit are "
            "a row, so it must be -1."
        )


def _chosen(config: dict[str, Any]) -> Normalization:
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
@dataclass(frozen=True, slots=True)
class _Attached:
    """An initializer: the gain or offset with which the wrapped layer computes what it did."""

    wrapper: Any
    spec: KernelSpec
    name: str

    def __call__(self, shape: Any, dtype: Any = None) -> Tensor:
        value = getattr(self.wrapper._attached(self.spec), self.name)
        if value is None:  # an offset that was asked for and that the normalizer does not need
            return ops.zeros(shape, dtype)
        return ops.cast(ops.reshape(value, shape), dtype)


@final
class _OnEffectiveKernel:
    """A regularizer that sees the effective kernel where Keras hands it the stored direction."""

    def __init__(self, wrapper: Any, spec: KernelSpec, regularizer: Any) -> None:
        self.wrapper = wrapper
        self.spec = spec
        again = isinstance(regularizer, _OnEffectiveKernel)
        self.regularizer: Any = regularizer.regularizer if again else regularizer

    def __call__(self, direction: Tensor) -> Tensor:
        with _as_stored():
            return self.regularizer(self.wrapper._effective(self.spec))


@keras.saving.register_keras_serializable(package="refold")
class WeightNormalization(keras.layers.Wrapper):  # type: ignore[misc]
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

    By default, wrapping changes nothing that the layer computes: gain and offset start as what the stored
    kernel has. Options that do change it raise a warning when the layer is built. After setting the weights
    of the wrapped layer from elsewhere, call :meth:`reset_gain`.

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
            another choice is meant (``axis=-1`` for an Embedding normalizes its columns).
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
        **kwargs: Any,
    ) -> None:
        if isinstance(layer, keras.Layer):
            kwargs.setdefault("dtype", layer.dtype_policy)
            kwargs.setdefault("trainable", layer.trainable)
        super().__init__(layer, **kwargs)
        # An Embedding's indices must not be cast to a half type.
        self.autocast = layer.autocast
        self.supports_masking = layer.supports_masking
        self.specs = kernel_specs(layer, axis)
        self.axis = axis if axis is None or isinstance(axis, int) else tuple(axis)
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
        self.epsilon = self.method.epsilon if self.method else None
        self._centers = self.method.centered if self.method else _centers(normalizer)
        self.use_offset = self._centers and self.use_gain if offset is None else bool(offset)
        inside = [layer]
        for i, spec in enumerate(self.specs):
            if self.method is None:
                inside.append(normalizer if i == 0 else _copy(normalizer))
                setattr(self, f"{spec.prefix}normalizer", inside[-1])
            setattr(self, f"{spec.prefix}gain", None)
            setattr(self, f"{spec.prefix}offset", None)
        self._restoring = False
        if not kwargs.get("trainable", True):
            for part in inside:
                part.trainable = False

    # ---- variables -------------------------------------------------------------------------------

    def build(self, input_shape: Any = None) -> None:
        """Build the wrapped layer, the normalizer, and the gain and offset that keep the stored kernel."""
        super().build(input_shape)
        for spec in self.specs:
            variable = self._variable(spec)
            rows = self._rows(spec)
            wide = working_dtype(variable.dtype)
            if self.method is None:
                self._build_normalizer(spec, rows, wide)
            for name, used in (("gain", self.use_gain), ("offset", self.use_offset)):
                if used:
                    weight = self.add_weight(
                        name=spec.prefix + name,
                        shape=(rows.units,),
                        initializer=_Attached(self, spec, name),
                        dtype=wide,
                        autocast=False,
                    )
                    setattr(self, spec.prefix + name, weight)
            if variable.regularizer is not None:
                variable.regularizer = _OnEffectiveKernel(self, spec, variable.regularizer)
            if not self._restoring:
                self._say_what_changes(spec)

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Build as it was when it was saved; the saved weights follow, so there is nothing to warn of."""
        self._restoring = True
        try:
            super().build_from_config(config)
        finally:
            self._restoring = False

    def _variable(self, spec: KernelSpec) -> Any:
        variable: Any = self.layer
        for attribute in spec.path.split("."):
            variable = getattr(variable, attribute, None)
        if variable is None:
            raise ValueError(f"the layer {_called(self.layer)} has no kernel of its own that could be normalized.")
        if not isinstance(variable, keras.Variable):
            raise ValueError(
                f"the kernel of the layer {_called(self.layer)} is not one plain variable "
                "(it is quantized, or adapted by LoRA), so it cannot be normalized."
            )
        return variable

    def _rows(self, spec: KernelSpec) -> Rows:
        return Rows(tuple(self._variable(spec).shape), spec.unit_axes)

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
                f"the normalizer {_called(normalizer)} makes {given} of the {shape} weights of the layer "
                f"{_called(self.layer)}: it must keep their shape."
            )

    # ---- the effective kernel --------------------------------------------------------------------

    def effective_kernel(self) -> Tensor:
        """The plain kernel that the wrapped layer is called with, in its shape and dtype.

        Raises:
            ValueError: the layer has several; :meth:`effective_kernels` gives them.
        """
        kernels = self.effective_kernels()
        if len(kernels) != 1:
            raise ValueError(f"the layer {_called(self.layer)} has several kernels: {', '.join(kernels)}.")
        return next(iter(kernels.values()))

    def effective_kernels(self) -> dict[str, Tensor]:
        """The plain kernels, by the path of attributes to them in the wrapped layer: ``kernel``, ``embeddings``,
        ``depthwise_kernel`` and ``pointwise_kernel``, ``cell.kernel`` and ``cell.recurrent_kernel``.
        """
        if not self.built:
            raise ValueError(f"the layer {_called(self)} is not built, so it has no kernel yet.")
        with _as_stored():
            return {spec.path: self._effective(spec) for spec in self.specs}

    def _effective(self, spec: KernelSpec) -> Tensor:
        kernel = self._rows(spec).from_matrix(ops, self._effective_rows(spec))
        return ops.cast(kernel, self._variable(spec).dtype)

    def _direction(self, spec: KernelSpec) -> Tensor:
        stored = ops.convert_to_tensor(self._variable(spec))
        return self._rows(spec).to_matrix(ops, widen(ops, stored))

    def _effective_rows(self, spec: KernelSpec) -> Tensor:
        gain, offset = (self._column(spec, name) for name in ("gain", "offset"))
        if self.method is not None:
            return self.method.compose(ops, self._direction(spec), gain, offset)
        rows = widen(ops, getattr(self, f"{spec.prefix}normalizer")(self._direction(spec)))
        rows = rows if gain is None else rows * gain
        return rows if offset is None else rows + offset

    def _column(self, spec: KernelSpec, name: str) -> Tensor | None:
        variable = getattr(self, spec.prefix + name)
        return None if variable is None else ops.expand_dims(ops.convert_to_tensor(variable), -1)

    def _attached(self, spec: KernelSpec) -> Parts:
        """The gain and offset with which the effective kernel is the stored one."""
        with _as_stored():
            stored = self._direction(spec)
            if self.method is not None:
                return self.method.decompose(ops, stored)
            normalized = getattr(self, f"{spec.prefix}normalizer")(stored)
            return fit_rows(ops, normalized, stored, offset=self.use_offset)

    def reset_gain(self) -> None:
        """Set gain and offset so that the effective kernel is the kernel that the wrapped layer stores.

        For after weights of a plain layer were put into the wrapped one.
        """
        for spec in self.specs:
            parts = self._attached(spec)
            for name in ("gain", "offset"):
                variable = getattr(self, spec.prefix + name)
                if variable is not None:
                    variable.assign(ops.reshape(getattr(parts, name), variable.shape))

    # ---- calling ---------------------------------------------------------------------------------

    def call(self, inputs: Any, training: bool | None = None, **kwargs: Any) -> Any:
        """Call the wrapped layer with the effective kernel in the place of its own."""
        with _as_stored():
            replaced = {id(self._variable(spec)): self._effective(spec) for spec in self.specs}
            # A scope hides the one around it, so it must carry all values that the layer may read.
            values = [(v, replaced.get(id(v), v.value)) for v in self.layer.variables]
            scope = keras.StatelessScope(values, collect_losses=True, initialize_variables=False)
        given = dict(scope.state_mapping)
        with scope:
            outputs = self.layer(inputs, **self._passed_on(training, kwargs))
        for variable in self.layer.variables:
            value = scope.get_current_value(variable)
            if value is not given[id(variable)] and id(variable) not in replaced:
                variable.assign(value)
        self._keep_losses(scope.losses)
        return outputs

    def _keep_losses(self, losses: list[Tensor]) -> None:
        """Hand on the losses that a scope collected: to the scope around it, or to this layer."""
        if not backend.in_stateless_scope():
            for loss in losses:
                self.add_loss(loss)
            return
        around = backend.get_stateless_scope()
        if around.collect_losses:
            # Not by `add_loss`: the layer that made the loss knows it as its own, and both would count it.
            for loss in losses:
                around.add_loss(loss)

    def _passed_on(self, training: bool | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        if training is not None and self.layer._call_has_training_arg:
            return {**kwargs, "training": training}
        return kwargs

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The wrapped layer's."""
        return self.layer.compute_output_shape(input_shape)

    def compute_output_spec(self, inputs: Any, training: bool | None = None, **kwargs: Any) -> Any:
        """The wrapped layer's."""
        return self.layer.compute_output_spec(inputs, **self._passed_on(training, kwargs))

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """The wrapped layer's."""
        return self.layer.compute_mask(inputs, mask)

    # ---- saying what changes ---------------------------------------------------------------------

    def _say_what_changes(self, spec: KernelSpec) -> None:
        """Warn if the layer will not compute what it did, and of units that cannot learn a direction."""
        numbers = self._numbers(spec)
        if numbers is None:
            if not self.use_gain or (self._centers and not self.use_offset):
                warnings.warn(self._change("the weights of its output units"), stacklevel=4)
            return
        stored, effective = numbers
        units = len(stored)
        size = np.max(np.abs(stored), axis=-1, keepdims=True)
        changed = np.count_nonzero(np.any(np.abs(effective - stored) > ROUNDING * size, axis=-1))
        if changed:
            warnings.warn(self._change(f"the weights of {changed} of its {units} output units"), stacklevel=4)
        if self.method is None:
            return
        lost = np.count_nonzero(self.method.decompose(NUMPY, stored).gain == 0)
        if lost:
            equal = "all equal" if self._centers else "all zero"
            warnings.warn(
                f"The weights of {lost} of the {units} output units of the layer {_called(self.layer)} are "
                f"{equal}, which is no direction, and they cannot learn one.",
                stacklevel=4,
            )

    def _change(self, what: str) -> str:
        how = f"by {self.normalizer!r}" if self.method else f"by {_called(self.normalizer)}"
        if not self.use_gain:
            how += " without a gain"
        elif self._centers and not self.use_offset:
            how += " without an offset for the mean that it takes out"
        return f"Weight normalization {how} changes {what} in the layer {_called(self.layer)}, and so its output."

    def _numbers(self, spec: KernelSpec) -> tuple[Any, Any] | None:
        """The stored and the effective rows in numpy; None while they have no numbers yet."""
        if backend.in_stateless_scope():
            return None
        with _as_stored():
            pair = (self._direction(spec), self._effective_rows(spec))
        try:
            stored, effective = (np.asarray(ops.convert_to_numpy(rows)) for rows in pair)
        except (TypeError, NotImplementedError, AttributeError):  # inside a function that is being compiled
            return None
        return stored, effective

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
            "axis": self.axis,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """The layer of such a configuration."""
        config = dict(config)
        normalizer = config["normalizer"]
        if isinstance(normalizer, dict) and "method" in normalizer:
            config["normalizer"] = _chosen(normalizer)
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
