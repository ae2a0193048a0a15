"""The Keras front end (TensorFlow, JAX and torch backends): lift, lower, run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any, final

import keras
import numpy as np
from keras.src import backend

from refold.algebra.affine import AffineConv
from refold.algebra.refusal import Refusal
from refold.blocks.unfold import Choose
from refold.errors import InputError
from refold.frontend import AnyArray, Identity, Lifted, Rich
from refold.graph.plan import Plan
from refold.keras import execute, express
from refold.keras.lift import Record, lift_trace
from refold.keras.lower import lower_plan
from refold.keras.trace import (
    Call,
    Constant,
    NotBuiltError,
    Trace,
    UntraceableError,
    first_line,
    record,
    symbolic_tensors,
)

# The size that stands in for an unknown one where costs are counted.
NOMINAL_SIZE = 64


def owns(model: Any) -> bool:
    """Whether this front end reads ``model``."""
    return isinstance(model, keras.Layer)


@final
@dataclass(frozen=True, eq=False)
class Session:
    """What the front end remembers of a lifted model: the record, and the layers rebuilt in float64."""

    record: Record
    doubles: dict[int, Any] = field(default_factory=dict)


@final
class KerasFrontend:
    """See :class:`refold.frontend.Frontend`."""

    name = "keras"

    def lift(self, model: Any, example: Any = None) -> Lifted:
        """The neutral graph of a Keras model or layer, in inference."""
        if not model.built:
            raise _not_built(model, "")
        specs = _input_specs(model, example)
        try:
            trace = record(model, _symbols(specs, None))
        except NotBuiltError as error:
            raise _not_built(model, f" ({first_line(error)})") from error
        except UntraceableError as error:
            raise InputError(f"the model '{model.name}' cannot be traced: {error}") from error
        nominal = _nominal_shapes(model, specs, trace)
        floats = [v for v in model.weights if backend.is_float_dtype(v.dtype)]
        largest = min((_largest(v.dtype) for v in floats), default=float(np.finfo(np.float32).max))
        parameters = sum(prod(v.shape) for v in floats)
        graph, lifted = lift_trace(trace, nominal, parameters, largest)
        evaluating = [scope for scope in trace.scopes if id(scope) in lifted.evaluating]
        around = {id(outer) for scope in evaluating for outer in scope.chain[:-1]}
        innermost = dict.fromkeys(scope.path for scope in evaluating if id(scope) not in around)
        return Lifted(graph, model, Session(lifted), tuple(innermost))

    def helpers(self, conv: AffineConv, space: tuple[int | None, ...]) -> int | Refusal:
        """See :func:`refold.keras.express.helpers`."""
        return express.helpers(conv, space)

    def lower(self, lifted: Lifted, plan: Plan) -> Any:
        """A functional model of plain layers that follows the plan."""
        return lower_plan(lifted.graph, lifted.record.record, plan, lifted.model.name)

    def unfold(self, model: Any, choose: Choose, example: Any = None) -> Rich:
        """See :func:`refold.keras.unfold.unfold`."""
        from refold.keras.unfold import unfold

        return unfold(model, choose, example)

    def evaluate(self, lifted: Lifted, feeds: Mapping[str, AnyArray], wanted: Sequence[str]) -> dict[str, AnyArray]:
        """Float64 values, by Keras' own layers and operations."""
        return execute.evaluate(lifted.record.record, lifted.record.doubles, feeds, wanted)

    def run(self, lifted: Lifted, inputs: Sequence[AnyArray], *, optimized: bool = False) -> list[AnyArray]:
        """The model's outputs; a keras.Model runs compiled, as in ``predict``."""
        model = lifted.model
        nest = keras.tree.pack_sequence_as(lifted.record.record.trace.inputs, list(inputs))
        if isinstance(model, keras.Model):
            outputs = model.predict_on_batch(nest)
        else:
            outputs = model(keras.tree.map_structure(backend.convert_to_tensor, nest))
        return [np.asarray(backend.convert_to_numpy(leaf)) for leaf in keras.tree.flatten(outputs)]

    def arrays(self, example: Any) -> list[AnyArray] | None:
        """The arrays of an example, flat and in order; None if it is a shape (or nothing)."""
        leaves = keras.tree.flatten(example)
        if not leaves or not all(hasattr(leaf, "shape") for leaf in leaves):
            return None
        return [np.asarray(backend.convert_to_numpy(leaf)) for leaf in leaves]

    def versions(self) -> dict[str, str]:
        """The versions of Keras and of its backend."""
        name = keras.config.backend()
        return {"keras": keras.__version__, name: str(import_module(name).__version__)}

    def identity(self, lifted: Lifted, node: str) -> Identity:
        """The class and configuration of a step, and its weights."""
        call = lifted.record.record.step(lifted.graph.node[node].outputs[0])
        return _identity(call)

    def storage(self, lifted: Lifted, node: str) -> str:
        """The type of the kernel (or else of any weight) of a step."""
        call = lifted.record.record.step(lifted.graph.node[node].outputs[0])
        types = [str(weight.dtype) for weight in sorted(call.weights, key=lambda w: -w.ndim)]
        constants = keras.tree.flatten((call.args, call.kwargs))
        types += [str(leaf.value.dtype) for leaf in constants if isinstance(leaf, Constant)]
        floats = [name for name in types if backend.is_float_dtype(name)]
        return floats[0] if floats else "float32"

    def load(self, path: Path, *, imports: Sequence[str] = (), trust: bool = False) -> Any:
        """See :func:`refold.keras.files.load`."""
        from refold.keras import files

        return files.load(path, imports=imports, trust=trust)

    def save(self, model: Any, path: Path, *, overwrite: bool = False, example: Any = None) -> None:
        """See :func:`refold.keras.files.save`."""
        from refold.keras import files

        files.save(model, path, overwrite=overwrite)

    def restore(self, model: Any, weights: Path | None) -> Any:
        """The model as it is; its weights are in it."""
        if weights is not None:
            raise InputError(
                f"{weights}: a Keras model loads its weights itself: call model.load_weights() in the factory"
            )
        return model


def _not_built(model: Any, which: str) -> InputError:
    return InputError(f"the model '{model.name}' is not built{which}: call it once on an input, then fold it")


FRONTEND = KerasFrontend()


# ---- inputs --------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Spec:
    """Shape, type and name of one input."""

    shape: tuple[int | None, ...]
    dtype: str
    name: str | None = None


def _input_specs(model: Any, example: Any) -> Any:
    """The nest of inputs that ``model`` is traced on."""
    own = getattr(model, "_inputs_struct", None)
    if own is None and isinstance(model, keras.Sequential) and model.inputs:
        own = model.inputs if len(model.inputs) > 1 else model.inputs[0]
    if own is not None:
        return keras.tree.map_structure(lambda t: Spec(tuple(t.shape), t.dtype, t.name), own)
    if example is None:
        raise InputError(
            f"'{model.name}' does not say the shape of its inputs: give an example (an input, a nest of "
            "inputs, or a shape with None for sizes that may change)"
        )
    return _example_specs(example)


def _example_specs(example: Any) -> Any:
    if isinstance(example, tuple | list) and example and all(isinstance(n, int | None) for n in example):
        return Spec((None, *example[1:]), keras.config.floatx())
    if isinstance(example, dict):
        return {key: _named(_example_specs(value), str(key)) for key, value in example.items()}
    if isinstance(example, tuple | list):
        return type(example)(_example_specs(value) for value in example)
    if not hasattr(example, "shape") or not hasattr(example, "dtype"):
        raise InputError(f"an example input of type {type(example).__name__} is neither an array nor a shape")
    dtype = backend.standardize_dtype(example.dtype)
    if dtype == "float64":
        dtype = keras.config.floatx()
    return Spec((None, *example.shape[1:]), dtype)


def _named(specs: Any, name: str) -> Any:
    return replace(specs, name=name) if isinstance(specs, Spec) else specs


def _symbols(specs: Any, size: int | None) -> Any:
    """Symbolic inputs; unknown sizes become ``size``, but for the batch, which then becomes 1."""

    def symbol(spec: Spec) -> Any:
        shape = spec.shape
        if size is not None:
            shape = (1, *(n or size for n in shape[1:]))
        return keras.KerasTensor(shape, dtype=spec.dtype, name=spec.name or "input")

    return keras.tree.map_structure(symbol, specs)


def _nominal_shapes(model: Any, specs: Any, trace: Trace) -> dict[int, tuple[int, ...]]:
    """A shape without unknown sizes for every recorded tensor. Where sizes are unknown the model is
    recorded a second time at a nominal size; if that goes another way, unknown sizes count as that size
    everywhere."""
    tensors = _all_tensors(trace)
    fixed = tensors
    if any(None in tensor.shape[1:] for tensor in tensors):
        try:
            again = _all_tensors(record(model, _symbols(specs, NOMINAL_SIZE)))
        except UntraceableError:
            again = []
        if len(again) == len(tensors):
            fixed = again
    return {
        id(tensor): (1, *(size or NOMINAL_SIZE for size in at_size.shape[1:]))
        for tensor, at_size in zip(tensors, fixed, strict=True)
    }


def _all_tensors(trace: Trace) -> list[Any]:
    return [*symbolic_tensors(trace.inputs), *(output for call in trace.calls for output in call.outputs)]


def _largest(dtype: str) -> float:
    if dtype == "bfloat16":
        return float(np.float32(2.0) ** 127 * np.float32(2.0 - 2.0**-7))
    return float(np.finfo(dtype).max)


# ---- what a step is ------------------------------------------------------------------------------

# Settings of a layer that do not change what it computes in inference.
_IMMATERIAL = ("name", "dtype", "trainable", "build_config", "seed", "batch_shape", "module", "registered_name")
_IMMATERIAL_ENDS = ("_initializer", "_regularizer", "_constraint")


def _identity(call: Call) -> Identity:
    operation = call.operation
    kind = f"{type(operation).__module__}.{type(operation).__qualname__}"
    try:
        config = operation.get_config()
    except Exception:  # whatever a user's get_config may raise
        config = {"unknown": id(operation)}
    constants = [leaf for leaf in keras.tree.flatten((call.args, call.kwargs)) if isinstance(leaf, Constant)]
    plain = [
        repr(leaf)
        for leaf in keras.tree.flatten((call.args, call.kwargs))
        if not isinstance(leaf, Constant | keras.KerasTensor) and leaf is not None and leaf is not False
    ]
    parameters = (*call.weights, *(constant.value for constant in constants))
    return Identity(f"{kind} {_material(config)} {plain}", parameters)


def _material(config: Any) -> Any:
    if isinstance(config, Mapping):
        return {
            key: _material(value)
            for key, value in sorted(config.items(), key=lambda item: str(item[0]))
            if key not in _IMMATERIAL and not str(key).endswith(_IMMATERIAL_ENDS)
        }
    if isinstance(config, list | tuple):
        return [_material(value) for value in config]
    return config if isinstance(config, str | int | float | bool | None) else repr(config)
