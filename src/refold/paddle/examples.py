"""What a model is recorded on: examples as the user gives them, and tensors made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import paddle

from refold.errors import InputError
from refold.frontend import AnyArray
from refold.paddle.trace import dtype_name
from refold.recording.arguments import is_shape
from refold.recording.symbols import leaves, mapped

# Sizes that stand in for open ones; two of them tell which sizes of the model follow. The pairs are tried
# in turn, for a model that is too deep for small inputs.
SIZES = ((64, 97), (224, 289))
BATCHES = (2, 3)


@final
@dataclass(frozen=True, eq=False)
class Spec:
    """One input: its shape (None for a size that may change), its type, and an array if one was given."""

    shape: tuple[int | None, ...]
    dtype: str
    array: AnyArray | None = None


def specs_of(model: Any, example: Any) -> tuple[Any, ...]:
    """The arguments of ``model`` as a nest of specs. Raises InputError."""
    if example is None:
        known = getattr(model, "input_specs", None)
        if known is not None:
            return tuple(known)
        raise InputError(
            f"'{type(model).__name__}' does not say the shape of its inputs: give an example (an input, a tuple "
            "of inputs, or a shape with None for sizes that may change)"
        )
    dtype = _float_type(model)
    if isinstance(example, tuple) and not is_shape(example):
        return tuple(_spec(entry, dtype) for entry in example)
    return (_spec(example, dtype),)


def _spec(example: Any, dtype: str) -> Any:
    if is_shape(example):
        return Spec((None, *(None if size in (None, -1) else int(size) for size in example[1:])), dtype)
    if isinstance(example, dict):
        return {key: _spec(value, dtype) for key, value in example.items()}
    if isinstance(example, tuple | list):
        return type(example)(_spec(entry, dtype) for entry in example)
    if isinstance(example, paddle.static.InputSpec):
        sizes = [None if size in (None, -1) else int(size) for size in example.shape]
        return Spec((None, *sizes[1:]), str(example.dtype).removeprefix("paddle."))
    array = array_of(example)
    if array is None:
        raise InputError(f"an example input of type {type(example).__name__} is neither a tensor nor a shape")
    if array.ndim < 1 or array.shape[0] < 1:
        raise InputError(f"an example input of shape {array.shape} holds no example: its first axis is the batch")
    kind = dtype_name(example) if isinstance(example, paddle.Tensor) else str(array.dtype)
    if kind == "float64" and not isinstance(example, paddle.Tensor):
        kind = dtype
    return Spec((None, *array.shape[1:]), kind, array)


def array_of(example: Any) -> AnyArray | None:
    """The numbers of a tensor or array; None if it is neither."""
    if isinstance(example, paddle.Tensor):
        wide = example.astype("float32") if dtype_name(example) == "bfloat16" else example
        return np.asarray(wide.numpy())
    return np.asarray(example) if isinstance(example, np.ndarray) else None


def _float_type(model: Any) -> str:
    types = [dtype_name(tensor) for tensor in model.parameters()]
    return next((dtype for dtype in types if "float" in dtype), paddle.get_default_dtype())


def feeds(specs: Sequence[Any], which: int, sizes: tuple[int, int]) -> tuple[Any, ...]:
    """Tensors to record on: of the first or second batch size and size, with numbers of their own."""
    rng = np.random.default_rng(which)

    def tensor(spec: Spec) -> Any:
        shape = (BATCHES[which], *(size or sizes[which] for size in spec.shape[1:]))
        if spec.array is not None and spec.array.dtype.kind != "f":
            rows = (np.arange(BATCHES[which]) + which) % len(spec.array)
            return paddle.to_tensor(spec.array[rows])
        if "int" in spec.dtype or spec.dtype == "bool":
            return paddle.to_tensor(rng.integers(0, 2, shape)).astype(spec.dtype)
        return paddle.to_tensor(rng.standard_normal(shape).astype("float32")).astype(spec.dtype)

    return tuple(mapped(tensor, spec) for spec in specs)


def arrays_of(example: Any) -> list[AnyArray] | None:
    """The arrays of an example, flat and in order; None if it is a shape (or nothing)."""
    found = [array_of(leaf) for leaf in leaves(example)]
    arrays = [array for array in found if array is not None]
    return arrays if arrays and len(arrays) == len(found) else None
