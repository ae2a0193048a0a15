"""State dicts of torch in other forms: what :mod:`refold.checkpoints` does with arrays, on tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from refold.checkpoints.dtypes import Spec
from refold.checkpoints.state import Arrays, NewArrays, converted_arrays, wish_of
from refold.errors import InputError
from refold.shown import printable
from refold.torch.files import read_weights
from refold.weights import Normalization

# The types of tensors by the codes of safetensors.
_CODES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
    torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def read_arrays(path: Path) -> Arrays:
    """The tensors in a file of nothing but tensors, as they are stored. Raises InputError."""
    return arrays_of(read_weights(path), printable(path))


def arrays_of(state: Mapping[str, Any], shown: str = "the state dict") -> Arrays:
    """The tensors of a state dict, as they are stored. Raises InputError."""
    specs, data = {}, {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.dtype not in _CODES:
            raise InputError(f"{shown}: '{printable(name)}' is no plain tensor")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        specs[name] = Spec(_CODES[tensor.dtype], tuple(tensor.shape))
        data[name] = flat.view(torch.uint8).numpy().data
    return Arrays(specs, data)


def tensors_of(arrays: NewArrays) -> dict[str, torch.Tensor]:
    """New tensors of the same numbers."""
    dtypes = {code: dtype for dtype, code in _CODES.items()}
    return {
        name: torch.frombuffer(arrays.data[name], dtype=dtypes[spec.dtype]).reshape(spec.shape)
        if spec.size
        else torch.empty(spec.shape, dtype=dtypes[spec.dtype])
        for name, spec in arrays.specs.items()
    }


def write_arrays(arrays: NewArrays, path: Path) -> None:
    """A file of nothing but these tensors, which ``torch.load`` reads with ``weights_only=True``."""
    with path.open("wb") as file:
        torch.save(tensors_of(arrays), file)


def convert_state(
    state: Mapping[str, torch.Tensor],
    to: str = "plain",
    *,
    axes: Sequence[str] = (),
    skip: Sequence[str] = (),
    method: str | Normalization | None = None,
    epsilon: float | None = None,
) -> dict[str, torch.Tensor]:
    """A state dict whose weights are stored in another form: :func:`refold.convert_state` on tensors.

    The result is new tensors on the CPU; nothing in ``state`` is changed.

    Raises:
        InputError: a weight's form cannot become the other exactly, or not all that this needs is known.
    """
    return tensors_of(converted_arrays(arrays_of(state), wish_of(to, axes, skip, method, epsilon))[1])
