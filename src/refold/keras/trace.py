"""Recording what a Keras model computes, layer by layer and inside custom layers.

The model is called on symbolic tensors. Keras' own machinery does the rest (standardizing inputs,
casting to compute types, passing ``training`` and masks); only two things change while a recording runs:
a symbolic call is written down here instead of on the layers, which therefore stay untouched, and a layer
that Keras does not ship is called through, so that what its ``call`` does is recorded instead of the
layer. A layer whose ``call`` cannot be traced so (it uses the backend directly, or looks at values) is
recorded whole, with the reason.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, final
from unittest import mock

import keras
import numpy as np
import numpy.typing as npt
from keras.src import backend
from keras.src.backend.common import stateless_scope
from keras.src.layers import layer as layer_module
from keras.src.ops.operation import Operation

AnyArray = npt.NDArray[Any]

# Layers of Keras that only pass on to others, or to a function: what they call is what matters.
CALLED_THROUGH = (
    keras.Sequential,
    keras.Model,
    keras.layers.Activation,
    keras.layers.SpectralNormalization,
)

# Layers that are one linear operator and then an activation: recorded as the two.
WITH_ACTIVATION = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
    keras.layers.Dense,
    keras.layers.EinsumDense,
)


@final
@dataclass(eq=False)
class Scope:
    """One call of a layer that was called through; ``outputs`` is the nest that it returned."""

    layer: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parent: Scope | None
    path: str
    outputs: Any = None
    evaluates: bool = False

    @property
    def chain(self) -> list[Scope]:
        """This scope and all around it, outermost first."""
        around = self.parent.chain if self.parent else []
        return [*around, self]


@final
@dataclass(eq=False)
class Call:
    """One recorded step. ``operation`` is a Keras layer or operation; ``part`` says which of the linear
    parts of a layer this is ("linear", or "depthwise" and "pointwise"), empty for the whole.

    ``weights`` are the values of a layer's variables at that moment, in the order of ``layer.weights``:
    a wrapper may have put others in their place. ``reason`` says why a custom layer was recorded whole.
    """

    name: str
    operation: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Any]
    scope: Scope | None
    weights: tuple[AnyArray, ...] = ()
    part: str = ""
    reason: str = ""

    @property
    def tensors(self) -> list[Any]:
        """The symbolic tensors that it reads."""
        return symbolic_tensors((self.args, self.kwargs))

    @property
    def layer(self) -> Any:
        """The layer that stands nearest: the step itself, or the one whose ``call`` made it."""
        if isinstance(self.operation, keras.Layer):
            return self.operation
        return self.scope.layer if self.scope else None


@final
@dataclass(eq=False)
class Trace:
    """A recorded model: its steps in order, and the nests of its inputs and outputs."""

    calls: list[Call] = field(default_factory=list)
    scopes: list[Scope] = field(default_factory=list)
    inputs: Any = None
    outputs: Any = None

    def producers(self) -> dict[int, tuple[Call, int]]:
        """Which step gives each symbolic tensor, as which of its outputs."""
        return {id(tensor): (call, i) for call in self.calls for i, tensor in enumerate(call.outputs)}


class UntraceableError(Exception):
    """The model as a whole could not be traced."""


class NotBuiltError(UntraceableError):
    """A layer of the model has no weights yet."""


def symbolic_tensors(nest: Any) -> list[Any]:
    """All symbolic tensors in a nest."""
    return [leaf for leaf in keras.tree.flatten(nest) if isinstance(leaf, keras.KerasTensor)]


def stored_value(variable: Any) -> AnyArray:
    """The number array behind a variable, as stateless scopes around see it and without autocasting."""
    value = None
    if stateless_scope.in_stateless_scope():
        value = stateless_scope.get_stateless_scope().get_current_value(variable)
    return np.asarray(backend.convert_to_numpy(variable._value if value is None else value))


def record(model: Any, inputs: Any) -> Trace:
    """Call ``model`` on the nest ``inputs`` of symbolic tensors and write down what happens."""
    recorder = _Recorder(model)
    recorder.trace.inputs = inputs
    with recorder.listening():
        try:
            recorder.trace.outputs = model(inputs, **_inference(model))
        except NotBuiltError:
            raise
        except Exception as error:  # whatever a user's call may raise
            raise UntraceableError(first_line(error)) from error
    return recorder.trace


def _inference(layer: Any) -> dict[str, bool]:
    return {"training": False} if getattr(layer, "_call_has_training_arg", True) else {}


def is_custom(layer: Any) -> bool:
    """Whether Keras itself does not ship the class of this layer."""
    return not type(layer).__module__.startswith(("keras.", "keras_"))


@final
class _Recorder:
    def __init__(self, model: Any) -> None:
        self.model = model
        self.trace = Trace()
        self.scope: Scope | None = None
        self.names: dict[str, int] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Receive all symbolic calls of Keras; nothing is written on the model's layers meanwhile."""
        recorder = self

        def layer_call(layer: Any, *args: Any, **kwargs: Any) -> Any:
            return recorder.layer_call(layer, args, kwargs)

        def operation_call(operation: Any, *args: Any, **kwargs: Any) -> Any:
            return recorder.operation_call(operation, args, kwargs)

        with contextlib.ExitStack() as stack:
            # What a layer's `call` assigns (a counter, say) stays in this scope and is forgotten with it.
            stack.enter_context(keras.StatelessScope())
            stack.enter_context(mock.patch.object(keras.Layer, "symbolic_call", layer_call))
            stack.enter_context(mock.patch.object(Operation, "symbolic_call", operation_call))
            stack.enter_context(mock.patch.object(keras.Layer, "_maybe_build", _must_be_built))
            stack.enter_context(mock.patch.object(layer_module, "Node"))
            for name, function in _VARIABLE_ARITHMETIC.items():
                original = getattr(backend.Variable, name)
                stack.enter_context(mock.patch.object(backend.Variable, name, _on_symbolic(original, function)))
            yield

    # ---- layers ----------------------------------------------------------------------------------

    def layer_call(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if layer is self.model and self.scope is None and not self.trace.scopes and self.calls_through(layer):
            return self.called_through(layer, args, kwargs, top=True)
        if getattr(layer, "quantization_mode", None) is not None:
            return self.whole(layer, args, kwargs, "its weights are quantized")
        if self.calls_through(layer):
            steps, scopes = len(self.trace.calls), len(self.trace.scopes)
            try:
                return self.called_through(layer, args, kwargs)
            except NotBuiltError:
                raise
            except Exception as error:  # whatever a user's `call` may raise on symbolic tensors
                del self.trace.calls[steps:], self.trace.scopes[scopes:]
                return self.whole(layer, args, kwargs, f"its call cannot be traced ({first_line(error)})")
        if type(layer) in WITH_ACTIVATION and not keyword_tensors(kwargs):
            return self.in_parts(layer, args, kwargs)
        return self.whole(layer, args, kwargs)

    def calls_through(self, layer: Any) -> bool:
        return is_custom(layer) or type(layer) in CALLED_THROUGH or isinstance(layer, keras.Model)

    def called_through(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], top: bool = False) -> Any:
        if top:
            return layer.call(*args, **kwargs)
        scope = self.open_scope(layer, args, kwargs)
        try:
            outputs = layer.call(*args, **kwargs)
        finally:
            self.scope = scope.parent
        flat = keras.tree.flatten(outputs)
        if not flat or not all(isinstance(leaf, keras.KerasTensor) for leaf in flat):
            raise TypeError("it returns something that is not a tensor")
        scope.outputs = outputs
        return outputs

    def open_scope(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Scope:
        scope = Scope(layer, args, kwargs, self.scope, self.unique(self.path(layer.name)))
        self.trace.scopes.append(scope)
        self.scope = scope
        return scope

    def in_parts(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A layer of :data:`WITH_ACTIVATION`: its linear parts, then its activation."""
        spec = layer.compute_output_spec(*args, **kwargs)
        scope = self.open_scope(layer, args, kwargs)
        try:
            weights = tuple(stored_value(variable) for variable in layer.weights)
            tensor = args[0]
            parts = ["linear"]
            if isinstance(layer, keras.layers.SeparableConv1D | keras.layers.SeparableConv2D):
                parts = ["depthwise", "pointwise"]
            for part in parts:
                shape = _separable_middle(layer, spec.shape) if part == "depthwise" else spec.shape
                output = keras.KerasTensor(shape, dtype=spec.dtype)
                name = scope.path if len(parts) == 1 else f"{scope.path}/{part}"
                call = Call(name, layer, (tensor,), {}, [output], scope, weights, part)
                self.trace.calls.append(call)
                tensor = output
            if layer.activation is not None and layer.activation is not keras.activations.linear:
                tensor = layer.activation(tensor)
        finally:
            self.scope = scope.parent
        scope.outputs = tensor
        return tensor

    def whole(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str = "") -> Any:
        spec = layer.compute_output_spec(*args, **kwargs)
        outputs = keras.tree.map_structure(_fresh, spec)
        weights = tuple(stored_value(variable) for variable in layer.weights)
        name = self.unique(self.path(layer.name))
        flat = symbolic_tensors(outputs)
        self.trace.calls.append(Call(name, layer, args, kwargs, flat, self.scope, weights, reason=reason))
        return outputs

    # ---- operations ------------------------------------------------------------------------------

    def operation_call(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        outputs = keras.tree.map_structure(_fresh, operation.compute_output_spec(*args, **kwargs))
        name = self.unique(self.path(type(operation).__name__.lower()))
        args, kwargs = keras.tree.map_structure(_constant, (args, kwargs))
        self.trace.calls.append(Call(name, operation, args, kwargs, symbolic_tensors(outputs), self.scope))
        return outputs

    # ---- names -----------------------------------------------------------------------------------

    def path(self, name: str) -> str:
        return f"{self.scope.path}/{name}" if self.scope else name

    def unique(self, path: str) -> str:
        seen = self.names[path] = self.names.get(path, 0) + 1
        return path if seen == 1 else f"{path}#{seen}"


@final
@dataclass(frozen=True, eq=False)
class Constant:
    """A constant that an operation reads, and the variable that holds it, if one does."""

    value: AnyArray
    variable: Any = None


def _constant(leaf: Any) -> Any:
    """Variables and tensors as constants, at their values of this moment."""
    if isinstance(leaf, backend.Variable):
        return Constant(stored_value(leaf), leaf)
    if backend.is_tensor(leaf) or isinstance(leaf, np.ndarray):
        return Constant(np.asarray(backend.convert_to_numpy(leaf)))
    return leaf


def _fresh(spec: Any) -> Any:
    """A symbolic tensor of its own: some layers hand their input on as their output."""
    if not isinstance(spec, keras.KerasTensor):
        return spec
    return keras.KerasTensor(spec.shape, dtype=spec.dtype, sparse=spec.sparse, ragged=spec.ragged)


def keyword_tensors(kwargs: dict[str, Any]) -> bool:
    """Whether tensors (masks, say) come in by keyword."""
    return bool(symbolic_tensors(kwargs))


def _separable_middle(layer: Any, shape: tuple[Any, ...]) -> tuple[Any, ...]:
    channels = layer.depthwise_kernel.shape[-2] * layer.depth_multiplier
    middle = list(shape)
    middle[-1 if layer.data_format == "channels_last" else 1] = channels
    return tuple(middle)


def _must_be_built(layer: Any, call_spec: Any) -> None:
    """In the place of what builds a layer on its first call: that is for the user to do, on real data."""
    if not layer.built:
        raise NotBuiltError(f"its layer '{layer.name}' is not built")


def first_line(error: Exception) -> str:
    """What an exception says, in one line, without what Keras puts around it."""
    text = re.sub("\x1b\\[[0-9;]*m", "", str(error)).strip() or type(error).__name__  # Keras prints in bold
    for line in text.splitlines():
        if line.strip() and not line.startswith(("Exception encountered", "Could not automatically")):
            return line.strip()[:160].rstrip(".:")
    return text.splitlines()[0][:160]


def _on_symbolic(original: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """``variable * tensor`` fails in Keras where the tensor is symbolic (``tensor * variable`` works)."""

    def arithmetic(variable: Any, other: Any) -> Any:
        if isinstance(other, keras.KerasTensor):
            return function(variable, other)
        return original(variable, other)

    return arithmetic


_VARIABLE_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "__add__": keras.ops.add,
    "__sub__": keras.ops.subtract,
    "__mul__": keras.ops.multiply,
    "__truediv__": keras.ops.true_divide,
    "__matmul__": keras.ops.matmul,
}
