"""Layers that are called with a kernel that is computed from other variables."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import keras
import numpy as np
from keras import ops
from keras.src import backend
from keras.src.backend.common import global_state

from refold.keras.kernels import ATTENTION, KernelSpec, called, kernel_specs
from refold.weights import Rows, widen, working_dtype

Tensor = Any

# Relative to the largest weight of a row: anything above is not rounding.
ROUNDING = 1e-4


@contextmanager
def as_stored() -> Iterator[None]:
    """Read variables in the dtype that they are stored in, whatever mixed precision is around."""
    around = global_state.get_global_attribute("autocast_scope")
    global_state.set_global_attribute("autocast_scope", None)
    try:
        yield
    finally:
        global_state.set_global_attribute("autocast_scope", around)


@final
@dataclass(frozen=True, slots=True)
class _Attached:
    """An initializer: the part with which the wrapped layer computes what it did.

    ``values`` is shared by the parts of a kernel, so that they are computed once.
    """

    wrapper: Any
    spec: KernelSpec
    name: str
    values: dict[str, Any]

    def __call__(self, shape: Any, dtype: Any = None) -> Tensor:
        if backend.in_stateless_scope():
            return ops.zeros(shape, dtype)  # shapes are traced here; the variable gets its value after that
        if self.name not in self.values:
            self.values.update(self.wrapper._attached(self.spec))
        return ops.cast(ops.reshape(ops.convert_to_tensor(self.values.pop(self.name)), shape), dtype)


@final
class _OnEffectiveKernel:
    """A regularizer that sees the effective kernel where Keras hands it the stored direction."""

    def __init__(self, wrapper: Any, spec: KernelSpec, regularizer: Any) -> None:
        self.wrapper = wrapper
        self.spec = spec
        again = isinstance(regularizer, _OnEffectiveKernel)
        self.regularizer: Any = regularizer.regularizer if again else regularizer

    def __call__(self, direction: Tensor) -> Tensor:
        with as_stored():
            return self.regularizer(self.wrapper._effective(self.spec))


class EffectiveKernel(keras.layers.Wrapper):
    """A layer that is called with an *effective* kernel in the place of the one that it stores.

    The kernel is seen as a matrix with one row per output unit (:class:`refold.weights.Rows`), and a subclass
    says what the rows are, as a function of the stored ones and of *parts*: variables of its own, one of each
    name and kernel. What is effective is computed in float32 or wider whatever the dtype policy, and rounded
    once to the kernel's dtype. A call writes to no variable but the parts that a subclass advances in training.

    Attention layers are called as ever (``layer(query, value, key)``, by position or name); what they are built,
    saved and recorded with is the list of these tensors.

    Args:
        layer: the layer to wrap; built or not.
        axis: the axes of the kernel that number the output units, where the kind of layer does not tell.
        **kwargs: as for any Keras layer. ``dtype`` and ``trainable`` are by default the wrapped layer's.

    Raises:
        ValueError: the layer has no kernel, or nothing tells its output units, or it is such a layer already.
    """

    def __init__(self, layer: Any, axis: int | Sequence[int] | None = None, **kwargs: Any) -> None:
        if isinstance(layer, keras.Layer):
            kwargs.setdefault("dtype", layer.dtype_policy)
            kwargs.setdefault("trainable", layer.trainable)
        super().__init__(layer, **kwargs)
        if isinstance(layer, EffectiveKernel):
            raise ValueError(f"the layer {called(layer)} is a {type(layer).__name__} already.")
        # An Embedding's indices must not be cast to a half type.
        self.autocast = layer.autocast
        self.supports_masking = layer.supports_masking
        self.specs = kernel_specs(layer, axis)
        self.axis = axis if axis is None or isinstance(axis, int) else tuple(axis)
        self._restoring = False
        self._was_built = layer.built
        self._starts: dict[str, dict[str, Any]] = {spec.prefix: {} for spec in self.specs}
        if not self.trainable:
            layer.trainable = False

    # ---- what a subclass says --------------------------------------------------------------------

    @abstractmethod
    def _build_parts(self, spec: KernelSpec, rows: Rows) -> None:
        """Make the parts of a kernel that was built, by :meth:`_add_part`."""

    @abstractmethod
    def _attached(self, spec: KernelSpec) -> Mapping[str, Any]:
        """The values of all parts with which the effective kernel is the stored one, or as near as can be."""

    @abstractmethod
    def _effective_rows(self, spec: KernelSpec) -> Tensor:
        """The effective rows ``(units, fan_in)``, in float32 or wider."""

    @abstractmethod
    def _how(self) -> tuple[str, bool]:
        """What is done to the layer, as the subject of a sentence, and whether that is meant to change it."""

    def _advance(self) -> None:
        """Called before a call in training, for parts that such a call moves on."""

    # ---- variables -------------------------------------------------------------------------------

    def build(self, input_shape: Any = None) -> None:
        """Build the wrapped layer, and the parts that keep the stored kernel."""
        if isinstance(self.layer, ATTENTION) and not self.layer.built:
            self.layer.build(*(tuple(shape) for shape in input_shape))
        super().build(input_shape)
        for spec in self.specs:
            variable = self._variable(spec)
            self._build_parts(spec, self._rows(spec))
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

    def _add_part(
        self,
        spec: KernelSpec,
        name: str,
        shape: tuple[int, ...],
        *,
        trainable: bool = True,
        initializer: Any = None,
    ) -> None:
        weight = self.add_weight(
            name=spec.prefix + name,
            shape=shape,
            initializer=initializer or _Attached(self, spec, name, self._starts[spec.prefix]),
            dtype=working_dtype(self._variable(spec).dtype),
            autocast=False,
            trainable=trainable,
            # Every replica computes the same from the same weights.
            aggregation="none" if trainable else "only_first_replica",
        )
        setattr(self, spec.prefix + name, weight)

    def _part(self, spec: KernelSpec, name: str) -> Any:
        """The variable of this name, or None."""
        return getattr(self, spec.prefix + name, None)

    def _part_as(self, spec: KernelSpec, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """The value of the variable of this name in another shape, or None."""
        variable = self._part(spec, name)
        return None if variable is None else ops.reshape(ops.convert_to_tensor(variable), shape)

    def _variable(self, spec: KernelSpec) -> Any:
        variable: Any = self.layer
        for attribute in spec.path.split("."):
            variable = getattr(variable, attribute, None)
        if variable is None:
            raise ValueError(f"the layer {called(self.layer)} has no kernel of its own that could be normalized.")
        if not isinstance(variable, keras.Variable):
            raise ValueError(
                f"the kernel of the layer {called(self.layer)} is not one plain variable "
                "(it is quantized, or adapted by LoRA), so it cannot be normalized."
            )
        if not backend.is_float_dtype(variable.dtype):
            raise ValueError(
                f"the kernel of the layer {called(self.layer)} was quantized to {variable.dtype}: "
                "fold the model first (refold.fold), and quantize the plain one."
            )
        return variable

    def _rows(self, spec: KernelSpec) -> Rows:
        return Rows(tuple(self._variable(spec).shape), spec.unit_axes)

    def reset_gain(self) -> None:
        """Set all parts so that the effective kernel is the kernel that the wrapped layer stores, or the nearest.

        For after weights of a plain layer were put into the wrapped one.
        """
        for spec in self.specs:
            self._attach(spec)

    def _attach(self, spec: KernelSpec) -> None:
        for name, value in self._attached(spec).items():
            variable = self._part(spec, name)
            if variable is not None:
                variable.assign(ops.reshape(ops.convert_to_tensor(value), variable.shape))

    def assign_kernel(self, value: Any, path: str | None = None) -> None:
        """Make ``value`` the effective kernel: an initializer's numbers, or weights from elsewhere.

        The wrapped layer stores it, and all parts are set to what it has. (Written to the wrapped layer's variable
        alone it would be a direction, with the size that the parts had before.) Where no parts give this kernel
        (without a gain, say), the nearest is taken, with a warning.

        Args:
            value: an array or tensor in the kernel's shape.
            path: which kernel, of a layer with several, as :meth:`effective_kernels` names them.

        Raises:
            ValueError: the layer is not built, it has no such kernel or several, or the shape is another.
        """
        if not self.built:
            raise ValueError(f"the layer {called(self)} is not built, so it has no kernel yet.")
        specs = [spec for spec in self.specs if path in (None, spec.path)]
        if len(specs) != 1:
            kernels = ", ".join(spec.path for spec in self.specs)
            raise ValueError(f"say which kernel of the layer {called(self.layer)} is meant: {kernels}.")
        (spec,) = specs
        self._variable(spec).assign(value)
        self._attach(spec)
        self._was_built = True  # there are weights now that can be changed
        self._say_what_changes(spec)

    # ---- the effective kernel --------------------------------------------------------------------

    def effective_kernel(self) -> Tensor:
        """The plain kernel that the wrapped layer is called with, in its shape and dtype.

        Raises:
            ValueError: the layer has several; :meth:`effective_kernels` gives them.
        """
        kernels = self.effective_kernels()
        if len(kernels) != 1:
            raise ValueError(f"the layer {called(self.layer)} has several kernels: {', '.join(kernels)}.")
        return next(iter(kernels.values()))

    def effective_kernels(self) -> dict[str, Tensor]:
        """The plain kernels, by the path of attributes to them in the wrapped layer: ``kernel``, ``embeddings``,
        ``depthwise_kernel`` and ``pointwise_kernel``, ``cell.kernel`` and ``cell.recurrent_kernel``.
        """
        if not self.built:
            raise ValueError(f"the layer {called(self)} is not built, so it has no kernel yet.")
        with as_stored():
            return {spec.path: self._effective(spec) for spec in self.specs}

    def _effective(self, spec: KernelSpec) -> Tensor:
        return ops.cast(self._composed(spec), self._variable(spec).dtype)

    def _composed(self, spec: KernelSpec) -> Tensor:
        """The effective kernel in its shape, in float32 or wider."""
        return self._rows(spec).from_matrix(ops, self._effective_rows(spec))

    def _stored_rows(self, spec: KernelSpec) -> Tensor:
        """What the wrapped layer stores, as rows in float32 or wider."""
        stored = ops.convert_to_tensor(self._variable(spec))
        return self._rows(spec).to_matrix(ops, widen(ops, stored))

    def _stored_lines(self, spec: KernelSpec) -> Tensor:
        """The same matrix, moved as little as can be: :meth:`refold.weights.Rows.to_lines`."""
        return self._rows(spec).to_lines(ops, widen(ops, ops.convert_to_tensor(self._variable(spec))))

    def _stored_numbers(self, spec: KernelSpec) -> Any:
        """The same in numpy."""
        with as_stored():
            return np.asarray(ops.convert_to_numpy(self._stored_rows(spec)))

    # ---- calling ---------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer; the tensors that an attention layer takes become one list."""
        if isinstance(self.layer, ATTENTION) and not (args and isinstance(args[0], list | tuple)):
            args, kwargs = _listed(args, kwargs)
        return super().__call__(*args, **kwargs)

    def call(self, inputs: Any, training: bool | None = None, **kwargs: Any) -> Any:
        """Call the wrapped layer with the effective kernel in the place of its own."""
        with as_stored():
            if training and self.trainable:
                self._advance()
            replaced = {id(self._variable(spec)): self._effective(spec) for spec in self.specs}
            # A scope hides the one around it, so it must carry all values that the layer may read.
            values = [(v, replaced.get(id(v), v.value)) for v in self.layer.variables]
            scope = keras.StatelessScope(values, collect_losses=True, initialize_variables=False)
        given = dict(scope.state_mapping)
        with scope:
            outputs = self.layer(*self._several(inputs), **self._passed_on(training, kwargs))
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

    def _several(self, inputs: Any) -> tuple[Any, ...]:
        """What the wrapped layer takes by position."""
        return tuple(inputs) if isinstance(self.layer, ATTENTION) else (inputs,)

    def _passed_on(self, training: bool | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        if training is not None and self.layer._call_has_training_arg:
            return {**kwargs, "training": training}
        return kwargs

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The wrapped layer's."""
        return self.layer.compute_output_shape(*self._several(input_shape))

    def compute_output_spec(self, inputs: Any, training: bool | None = None, **kwargs: Any) -> Any:
        """The wrapped layer's."""
        return self.layer.compute_output_spec(*self._several(inputs), **self._passed_on(training, kwargs))

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """The wrapped layer's; an attention layer's is its query's."""
        if isinstance(self.layer, ATTENTION):
            return mask[0] if isinstance(mask, list | tuple) else mask
        return self.layer.compute_mask(inputs, mask)

    # ---- saying what changes ---------------------------------------------------------------------

    def _say_what_changes(self, spec: KernelSpec) -> None:
        """Warn if the layer will not compute what it did."""
        how, changes = self._how()
        what = "the weights of its output units"
        numbers = self._numbers(spec)
        if numbers is not None:
            stored, effective = numbers
            size = np.max(np.abs(stored), axis=-1, keepdims=True)
            changed = np.count_nonzero(np.any(np.abs(effective - stored) > ROUNDING * size, axis=-1))
            changes, what = bool(changed), f"the weights of {changed} of its {len(stored)} output units"
        if changes:
            self._warn(f"{how} changes {what} in the layer {called(self.layer)}, and so its output.")

    @staticmethod
    def _warn(message: str) -> None:
        warnings.warn(message, stacklevel=5)

    def _numbers(self, spec: KernelSpec) -> tuple[Any, Any] | None:
        """The stored and the effective rows in numpy; None while they have no numbers yet."""
        if backend.in_stateless_scope():
            return None
        with as_stored():
            pair = (self._stored_rows(spec), self._effective_rows(spec))
        try:
            stored, effective = (np.asarray(ops.convert_to_numpy(rows)) for rows in pair)
        except (TypeError, NotImplementedError, AttributeError):  # inside a function that is being compiled
            return None
        return stored, effective

    # ---- saving ----------------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, the layer serialized."""
        return {**super().get_config(), "axis": self.axis}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """The layer of such a configuration."""
        wrapper = super().from_config(dict(config), custom_objects=custom_objects)
        wrapper._was_built = False  # a configuration brings no weights, even where it builds
        return wrapper


def _listed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The tensors of a call of an attention layer as the list of query, value and, if there is one, key.

    Raises:
        ValueError: a mask is given by position.
    """
    if len(args) > 3:
        raise ValueError("give the masks of an attention layer by name: only query, value and key have a position.")
    named = [kwargs[name] for name in ("query", "value", "key")[len(args) :] if kwargs.get(name) is not None]
    rest = {name: value for name, value in kwargs.items() if name not in ("query", "value", "key")}
    return ([*args[:3], *named],), rest
