"""Running recorded Keras models: in float64 for proofs, and as they ship.

The float64 reference is made of the original layers, rebuilt from their own configurations with 64-bit
weights, and of Keras' own operations. Nothing of the engine's arithmetic is in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import keras
import numpy as np
from keras.src import backend
from keras.src.backend.common import dtypes
from keras.src.ops import core as core_ops

from refold.errors import InputError
from refold.keras.lift import Record
from refold.keras.trace import AnyArray, Call, Constant, is_custom

layers = keras.layers


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Let the backend compute in float64: JAX does so only when asked, and Keras takes the results of
    many operations back to 32 bits on all of them."""
    with contextlib.ExitStack() as stack:
        if keras.config.backend() == "jax":
            import jax

            stack.enter_context(jax.enable_x64(True))
        stack.enter_context(mock.patch.dict(dtypes.BIT64_TO_BIT32_DTYPE, {"float64": "float64"}))
        stack.callback(keras.config.set_floatx, keras.config.floatx())
        keras.config.set_floatx("float64")
        yield


def evaluate(
    record: Record, cache: dict[int, Any], feeds: Mapping[str, AnyArray], wanted: Sequence[str]
) -> dict[str, AnyArray]:
    """The values ``wanted`` in float64 from ``feeds``; ``cache`` keeps the rebuilt layers between calls."""
    with double_precision():
        known = {id(record.tensors[name]): _tensor(array) for name, array in feeds.items()}
        for call in _needed(record, known, wanted):
            try:
                outputs = _run(record, cache, call, known)
            except InputError:
                raise
            except Exception as error:  # whatever the backend raises on sizes or types it does not take
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise InputError(f"'{call.name}' does not run in float64 at this size: {reason[:200]}") from error
            for symbol, output in zip(call.outputs, outputs, strict=True):
                dtype = backend.standardize_dtype(output.dtype)
                if backend.is_float_dtype(dtype) and dtype != "float64":
                    raise InputError(f"'{call.name}' gives {dtype} where it is asked for float64")
                known[id(symbol)] = output
        return {name: np.asarray(backend.convert_to_numpy(known[id(record.tensors[name])])) for name in wanted}


def _tensor(array: AnyArray) -> Any:
    data = np.asarray(array)
    return backend.convert_to_tensor(data.astype("float64") if data.dtype.kind == "f" else data)


def _needed(record: Record, known: Mapping[int, Any], wanted: Sequence[str]) -> list[Call]:
    """The steps between what is known and what is wanted, in the recorded order."""
    waiting = [record.tensors[name] for name in wanted]
    needed: dict[int, Call] = {}
    while waiting:
        tensor = record.canonical(waiting.pop())
        if id(tensor) in known:
            continue
        if id(tensor) not in record.producers:
            raise InputError(f"the value '{record.names[id(tensor)]}' is needed and was not given")
        call = record.producers[id(tensor)][0]
        if id(call) not in needed:
            needed[id(call)] = call
            waiting += call.tensors
    # Not by a look at each recorded step: a proof asks this once for every region.
    return [needed[key] for key in sorted(needed, key=record.places.__getitem__)]


def _run(record: Record, cache: dict[int, Any], call: Call, known: Mapping[int, Any]) -> list[Any]:
    def argument(leaf: Any) -> Any:
        if isinstance(leaf, keras.KerasTensor):
            return known[id(record.canonical(leaf))]
        if isinstance(leaf, Constant):
            return _tensor(leaf.value)
        return leaf

    if isinstance(call.operation, core_ops.Cast) and backend.is_float_dtype(call.operation.dtype):
        return [known[id(record.canonical(call.tensors[0]))]]
    args, kwargs = keras.tree.map_structure(argument, (call.args, call.kwargs))
    if isinstance(call.operation, keras.Layer):
        if any(value is not None for key, value in kwargs.items() if key.endswith("mask")):
            raise InputError(f"'{call.name}' reads a mask, which the float64 reference does not follow")
        layer = cache.get(id(call))
        if layer is None:
            layer = cache[id(call)] = _in_double(call, args)
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
        outputs = _on_cpu(layer, args, kwargs)
    else:
        outputs = _on_cpu(call.operation.call, args, kwargs)
    return [leaf for leaf in keras.tree.flatten(outputs) if leaf is not None]


def _on_cpu(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Call ``function``. TensorFlow's own CPU kernels have no channels-first convolutions; its compiler
    has them."""
    if keras.config.backend() != "tensorflow":
        return function(*args, **kwargs)
    import tensorflow as tf

    try:
        return function(*args, **kwargs)
    except (tf.errors.UnimplementedError, tf.errors.InvalidArgumentError):
        return tf.function(function, jit_compile=True)(*args, **kwargs)


def _in_double(call: Call, args: Any) -> Any:
    """The layer of a step (or the part of it that the step is) with 64-bit weights."""
    layer = call.operation
    try:
        config = dict(layer.get_config(), dtype="float64")
        if not is_custom(layer):  # its weights are set below: drawing random ones takes longer than running it
            config.update((key, "zeros") for key in config if key.endswith("_initializer"))
        kind, weights = type(layer), list(call.weights)
        if call.part:
            config["activation"] = None
        if call.part in ("depthwise", "pointwise"):
            kind, config, weights = _separable_part(layer, call.part, config, weights)
        double = kind.from_config(config)
        if isinstance(double, layers.Rescaling):
            # TensorFlow takes a plain number through float32 on its way to any other type.
            double.scale, double.offset = np.float64(double.scale), np.float64(double.offset)
        symbols = keras.tree.map_structure(_symbol, args)
        double(*symbols)  # builds it
        double.set_weights([np.asarray(weight, dtype=_wide(weight)) for weight in weights])
        if hasattr(double, "finalize_state"):
            double.finalize_state()
    except Exception as error:  # whatever a user's get_config or __init__ may raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"'{call.name}' cannot be rebuilt in float64: {reason[:200]}") from error
    return double


def _symbol(leaf: Any) -> Any:
    is_tensor = backend.is_tensor(leaf)
    return keras.KerasTensor(leaf.shape, backend.standardize_dtype(leaf.dtype)) if is_tensor else leaf


def _wide(weight: AnyArray) -> Any:
    return weight.dtype if weight.dtype.kind in "iub" else "float64"


def _separable_part(
    layer: Any, part: str, config: dict[str, Any], weights: list[AnyArray]
) -> tuple[Any, dict[str, Any], list[AnyArray]]:
    one = isinstance(layer, layers.SeparableConv1D)
    common = {"name": layer.name, "dtype": "float64", "data_format": layer.data_format}
    if part == "depthwise":
        kind = layers.DepthwiseConv1D if one else layers.DepthwiseConv2D
        words = ("kernel_size", "strides", "padding", "dilation_rate", "depth_multiplier")
        settings = {word: config[word] for word in words}
        if one:
            for word in ("kernel_size", "strides", "dilation_rate"):
                value = settings[word]
                settings[word] = value if isinstance(value, int) else value[0]
        return kind, {**settings, **common, "use_bias": False}, weights[:1]
    kind = layers.Conv1D if one else layers.Conv2D
    settings = {"filters": layer.filters, "kernel_size": 1, "use_bias": layer.use_bias}
    return kind, {**settings, **common}, weights[1:]
