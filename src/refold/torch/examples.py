"""What a model is recorded on: examples as the user gives them, and tensors made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, final

import numpy as np
import torch

from refold.errors import InputError
from refold.frontend import AnyArray
from refold.recording.arguments import is_shape
from refold.recording.symbols import leaves, mapped
from refold.torch.hollow import Hollow
from refold.torch.trace import dtype_name

# Two batch sizes, and two sizes for every open axis, tell which sizes of the model follow which. What is added
# to a size or taken from it is a multiple of 64, as models with many levels want it.
BATCHES = (2, 3)
OPEN_SIZES = ((64, 128), (224, 288))

# An input of more numbers is taken for a mistake: 8 GiB in float32.
MOST_NUMBERS = 2**31

# By how much open axes change, and the two sizes for axes of which nothing is known: see attempts().
Attempt = tuple[int | None, tuple[int, int]]


@final
@dataclass(frozen=True, eq=False)
class Spec:
    """One input: its shape (None for a size that the user leaves open, and for the batch), its type and device,
    and a tensor if one was given."""

    shape: tuple[int | None, ...]
    dtype: str
    device: Any
    sample: Any = None


def specs_of(model: Any, example: Any) -> tuple[Any, ...]:
    """The arguments of ``model`` as a nest of specs. Raises InputError."""
    if example is None:
        example = getattr(model, "meta", {}).get("refold.example") if isinstance(model, torch.nn.Module) else None
    if example is None:
        raise InputError(
            f"'{type(model).__name__}' does not say the shape of its inputs: give an example (a tensor, a "
            "tuple of arguments, or a shape with None for sizes that may change; on the command line --shape)"
        )
    tensor = next((t for t in model.parameters() if t.is_floating_point()), None)
    dtype = torch.get_default_dtype() if tensor is None else tensor.dtype
    device = torch.device("cpu") if tensor is None else tensor.device
    name = str(dtype).removeprefix("torch.")
    if isinstance(example, tuple) and not is_shape(example):
        specs = tuple(_spec(entry, name, device) for entry in example)
    else:
        specs = (_spec(example, name, device),)
    if not tensor_specs(specs):
        raise InputError(f"an example input of type {type(example).__name__} is neither a tensor nor a shape")
    return specs


def tensor_specs(specs: Any) -> list[Spec]:
    """The specs in a nest of arguments, in order, without the numbers, texts and Nones between them."""
    return [leaf for leaf in leaves(specs) if isinstance(leaf, Spec)]


def _spec(example: Any, dtype: str, device: Any) -> Any:
    if is_shape(example):
        if any(size is not None and size < 1 and size != -1 for size in example[1:]):
            raise InputError(
                f"the shape {tuple(example)} has a size below 1; give sizes, with None for those that may change"
            )
        return Spec((None, *(None if size in (None, -1) else int(size) for size in example[1:])), dtype, device)
    if isinstance(example, dict):
        return {key: _spec(value, dtype, device) for key, value in example.items()}
    if isinstance(example, tuple | list):
        return type(example)(_spec(entry, dtype, device) for entry in example)
    if example is None or isinstance(example, bool | int | float | str):
        return example  # as it is: what the model does may depend on it
    if not isinstance(example, torch.Tensor | np.ndarray):
        raise InputError(f"an example input of type {type(example).__name__} is neither a tensor nor a shape")
    try:
        tensor = torch.as_tensor(example)
    except (TypeError, ValueError, RuntimeError) as error:  # an array of objects or texts
        raise InputError(f"an example input of type {example.dtype} holds no numbers that torch has") from error
    spec = spec_of(tensor)
    if isinstance(example, np.ndarray) and spec.dtype == "float64":
        spec = replace(spec, dtype=dtype)  # numpy's default says nothing about the model
    return replace(spec, device=device)


def spec_of(tensor: Any) -> Spec:
    """What an example tensor says. Raises InputError."""
    if tensor.ndim < 1 or tensor.shape[0] < 1:
        raise InputError(
            f"an example input of shape {tuple(tensor.shape)} holds no example: its first axis is the batch"
        )
    if tensor.is_complex():
        raise InputError("an example input holds complex numbers, which refold does not fold")
    if tensor.layout != torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else f"stored as {tensor.layout}"
        raise InputError(f"an example input is {kind}: give a dense one of ordinary numbers")
    sample = None if tensor.is_meta else tensor.detach()  # a tensor without numbers is a shape
    return Spec((None, *tensor.shape[1:]), dtype_name(tensor), tensor.device, sample)


def attempts(specs: Sequence[Any]) -> list[Attempt]:
    """The ways to choose sizes, most general first: by how much the later axes of images and sequences change
    although the example says them (less than 0: smaller, where they are large enough; None: nothing changes, not
    even the batch), and two sizes for axes of which nothing is known."""
    given = tensor_specs(specs)
    known = [spec for spec in given if None not in spec.shape[1:]]
    changes: list[int] = []
    if any(_can_open(spec) for spec in known):
        large = all((size or 0) >= 192 for spec in known if _can_open(spec) for size in spec.shape[2:])
        changes = [-128, 128] if large else [64]
    pairs = OPEN_SIZES if len(known) < len(given) else OPEN_SIZES[:1]
    found: list[Attempt] = [(change, pair) for change in (*changes, 0) for pair in pairs]
    if known and all(spec.sample is not None for spec in given):
        found.append((None, OPEN_SIZES[0]))
    return found


def _can_open(spec: Spec) -> bool:
    return spec.sample is not None and len(spec.shape) > 2 and "float" in spec.dtype


def feeds(specs: Sequence[Any], which: int, change: int | None, pair: tuple[int, int]) -> tuple[Any, ...]:
    """Tensors to record on: of the first or second batch size and size, with numbers of their own."""
    generator = torch.Generator().manual_seed(which)

    def size(spec: Spec, axis: int) -> int:
        known = spec.shape[axis]
        if known is None:
            return pair[which]
        return known + (change or 0) if which and axis > 1 and _can_open(spec) else known

    def tensor(spec: Any) -> Any:
        if not isinstance(spec, Spec):
            return spec
        batch = len(spec.sample) if change is None else BATCHES[which]
        shape = (batch, *(size(spec, axis) for axis in range(1, len(spec.shape))))
        dtype = getattr(torch, spec.dtype)
        if prod(shape) > MOST_NUMBERS:
            raise InputError(
                f"an example input of shape {shape} would have {prod(shape):.1e} numbers: give a smaller one"
            )
        if not dtype.is_floating_point:
            if spec.sample is not None:
                rows = (torch.arange(batch) + which) % len(spec.sample)
                return spec.sample.cpu()[rows].to(spec.device)
            return torch.randint(0, 2, shape, generator=generator).to(spec.device, dtype)
        return torch.randn(shape, generator=generator).to(spec.device, dtype)

    return tuple(mapped(tensor, spec) for spec in specs)


def runs(model: Any, specs: Sequence[Any], attempt: Attempt) -> bool:
    """Whether a model runs at certain sizes."""
    try:
        with torch.no_grad(), Hollow():
            model.forward(*feeds(specs, 1, *attempt))
    except Exception:  # whatever torch raises on sizes that do not fit
        return False
    return True


def plain_example(specs: Sequence[Any]) -> tuple[Any, ...]:
    """An example that says what ``specs`` say, of tensors with no numbers in them and nothing of ours."""

    def tensor(spec: Any) -> Any:
        if not isinstance(spec, Spec):
            return spec
        if spec.sample is None and "float" in spec.dtype:
            return spec.shape
        shape = [size or OPEN_SIZES[0][0] for size in spec.shape[1:]]
        dtype = getattr(torch, spec.dtype)
        return torch.zeros(1 if spec.sample is None else len(spec.sample), *shape, dtype=dtype, device=spec.device)

    return tuple(mapped(tensor, spec) for spec in specs)


def arrays_of(example: Any) -> list[AnyArray] | None:
    """The arrays of an example, flat and in order; None if a shape is in it, or a tensor without numbers."""
    found: list[AnyArray] = []
    waiting = [example]
    while waiting:
        entry = waiting.pop()
        if is_shape(entry):
            return None
        if isinstance(entry, dict | list | tuple):
            waiting += reversed(list(entry.values() if isinstance(entry, dict) else entry))
        elif isinstance(entry, torch.Tensor) and entry.is_meta:
            return None
        elif isinstance(entry, torch.Tensor | np.ndarray):
            found.append(to_numpy(entry))
    return found or None


def to_numpy(tensor: Any) -> AnyArray:
    """The numbers of a tensor; numpy has no bfloat16, so those come as float32. A complex one comes as real numbers
    with a last axis of their real and imaginary parts."""
    if isinstance(tensor, np.ndarray):
        return tensor
    tensor = tensor.detach().cpu()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())
