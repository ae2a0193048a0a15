"""Whole state dicts: arrays by name, in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt

from refold.checkpoints.dtypes import Spec, code_of, raw_dtype
from refold.checkpoints.naming import Form
from refold.checkpoints.plan import Plan, Wish, make_plan
from refold.checkpoints.run import run
from refold.checkpoints.units import parse_choice
from refold.errors import InputError
from refold.shown import printable
from refold.weights import Normalization
from refold.weights import method as method_of


def wish_of(
    to: str,
    axes: Sequence[str] = (),
    skip: Sequence[str] = (),
    method: str | Normalization | None = None,
    epsilon: float | None = None,
) -> Wish:
    """What is wished for, from words. Raises InputError."""
    try:
        form = Form(to)
        choices = tuple(parse_choice(text) for text in axes)
        if epsilon is not None and not isinstance(method, str):
            raise ValueError("an epsilon is for a method that is named; say which")
        chosen = method_of(method, epsilon) if isinstance(method, str) else method
    except ValueError as error:
        if to not in {form.value for form in Form}:
            known = ", ".join(form.value for form in Form)
            raise InputError(f"there is no form '{printable(to)}' of checkpoints: choose one of {known}") from error
        raise InputError(str(error)) from error
    return Wish(form, choices, tuple(skip), chosen)


@final
@dataclass(frozen=True, slots=True)
class Arrays:
    """Tensors in memory, as they are stored: type, shape, and the bytes in order."""

    specs: Mapping[str, Spec]
    data: Mapping[str, memoryview]

    def read(self, name: str, start: int, size: int) -> memoryview:
        """So many bytes of a tensor, from the byte ``start`` of it."""
        return self.data[name][start : start + size]


@final
@dataclass(frozen=True, slots=True)
class NewArrays:
    """Tensors in memory while they are made."""

    specs: Mapping[str, Spec]
    data: Mapping[str, bytearray]

    def write(self, name: str, start: int, data: bytes | memoryview) -> None:
        """These bytes of a tensor, from the byte ``start`` of it."""
        self.data[name][start : start + len(data)] = data


def arrays_of(state: Mapping[str, Any]) -> Arrays:
    """Arrays of numpy (with or without ml_dtypes' types) as they are stored.

    Raises:
        InputError: something in ``state`` is no array of numbers.
    """
    specs, data = {}, {}
    for name, value in state.items():
        array = np.asarray(value)
        code = code_of(array.dtype)
        if code is None:
            raise InputError(
                f"'{printable(name)}' is no array of numbers that a checkpoint can hold ({array.dtype})"
            )
        stored = np.ascontiguousarray(array).reshape(-1)
        if stored.dtype.byteorder == ">":
            stored = stored.astype(stored.dtype.newbyteorder("<"))
        specs[name] = Spec(code, tuple(array.shape))
        data[name] = stored.view(np.uint8).data
    return Arrays(specs, data)


def converted_arrays(arrays: Arrays, wish: Wish) -> tuple[Plan, NewArrays]:
    """What :func:`convert_state` does, on tensors as they are stored, and how. Raises InputError."""
    plan = make_plan(arrays.specs, wish)
    made = NewArrays(plan.specs, {name: bytearray(spec.size) for name, spec in plan.specs.items()})
    run(plan.steps, arrays, made)
    return plan, made


def convert_state(
    state: Mapping[str, Any],
    to: str = "plain",
    *,
    axes: Sequence[str] = (),
    skip: Sequence[str] = (),
    method: str | Normalization | None = None,
    epsilon: float | None = None,
) -> dict[str, npt.NDArray[Any]]:
    """The state dict of a model whose weights are stored in another form; nothing in ``state`` is changed.

    Args:
        state: arrays by name. bfloat16 as of ml_dtypes, if there is any.
        to: ``"plain"``, ``"torch"`` (``parametrizations.weight.original0``), ``"torch-legacy"`` (``weight_g``,
            ``weight_v``), ``"refold"``, ``"paddle"``, ``"tf-addons"``, ``"spectral"`` or ``"spectral-legacy"``.
        axes: ``"PATTERN=AXIS"``, which axis of the weights of these names numbers the output units: needed where
            the shape of a gain does not say it, and for plain weights, of which these are the ones that are
            converted. The last pattern that matches counts. ``AXIS`` is a number, several with commas, ``none`` for
            a norm over all of the weight, or ``1/G`` for a transposed convolution with ``G`` groups; for models of
            Keras ``auto``, which is what the kind of layer has.
        skip: patterns of names that stay as they are.
        method: of the weights in refold's own form; names do not say it.
        epsilon: of the method, if it is named.

    Returns:
        New arrays of the types of ``state``; new gains and offsets are float32, or float64 where the weight is.

    Raises:
        InputError: a weight's form cannot become the other exactly, or not all that this needs is known.
    """
    arrays = arrays_of(state)
    _, made = converted_arrays(arrays, wish_of(to, axes, skip, method, epsilon))
    bfloat16 = next((np.asarray(v).dtype for v in state.values() if np.asarray(v).dtype.name == "bfloat16"), None)
    result = {}
    for name, spec in made.specs.items():
        array = np.frombuffer(made.data[name], raw_dtype(spec.dtype)).reshape(spec.shape)
        result[name] = array.view(bfloat16) if spec.dtype == "BF16" and bfloat16 is not None else array
    return result
