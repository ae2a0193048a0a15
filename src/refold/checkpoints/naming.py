"""The names under which a reparameterized weight is stored, by the library that trained it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import final

from refold.errors import InputError
from refold.shown import printable


class Form(Enum):
    """A way to store a weight; the values are the words of the command line."""

    PLAIN = "plain"
    TORCH = "torch"
    TORCH_LEGACY = "torch-legacy"
    REFOLD = "refold"
    PADDLE = "paddle"
    ADDONS = "tf-addons"
    SPECTRAL = "spectral"
    SPECTRAL_LEGACY = "spectral-legacy"


SPECTRAL = (Form.SPECTRAL, Form.SPECTRAL_LEGACY)

# What is behind the name of a weight in the forms that put it there.
_SUFFIXES: Mapping[Form, Mapping[str, str]] = MappingProxyType(
    {
        Form.TORCH_LEGACY: {"direction": "_v", "gain": "_g"},
        Form.PADDLE: {"direction": "_v", "gain": "_g", "offset": "_offset"},
        Form.SPECTRAL_LEGACY: {"direction": "_orig", "left": "_u", "right": "_v"},
    }
)
# What is behind "parametrizations.NAME." in the forms of torch's parametrizations.
_PARAMETRIZED: Mapping[Form, Mapping[str, str]] = MappingProxyType(
    {
        Form.TORCH: {"gain": "original0", "direction": "original1"},
        Form.REFOLD: {"direction": "original0", "gain": "original1", "offset": "original2"},
        Form.SPECTRAL: {"direction": "original", "left": "0._u", "right": "0._v"},
    }
)
_OF_PARAMETRIZATION = re.compile(r"((?:.*\.)?)parametrizations\.([^.]+)\.(.+)", re.DOTALL)
# Keras: LAYER/kernel:0; a wrapper's gain lies beside it. Recurrent layers have it one level up.
_KERNEL = re.compile(r"(.*/)?((?:recurrent_)?kernel)(:0)?", re.DOTALL)


@final
@dataclass(frozen=True, slots=True)
class Stored:
    """The tensors that one weight is stored as.

    ``name`` is what the plain weight is called. ``parts`` are names by role: ``direction``, ``gain``,
    ``offset``; ``left`` and ``right``, the singular vectors; ``initialized``. ``unneeded`` are the names of
    what else belongs to it and does not enter the weight.
    """

    form: Form
    name: str
    parts: Mapping[str, str]
    unneeded: tuple[str, ...] = ()


def part_names(form: Form, name: str) -> dict[str, str]:
    """What the parts of the weight ``name`` are called in a form, by their roles.

    Raises:
        InputError: the form's names are not made from such a name.
    """
    if form is Form.PLAIN:
        return {"direction": name}
    if form is Form.ADDONS:
        kernel = _KERNEL.fullmatch(name)
        if kernel is None or kernel[2] != "kernel":
            raise InputError(
                f"'{printable(name)}': TensorFlow Addons normalizes kernels of Keras layers, whose names end in "
                "'/kernel:0'"
            )
        around, ending = kernel[1] or "", kernel[3] or ""
        return {
            "direction": name,
            "gain": f"{around}g{ending}",
            "initialized": f"{around}initialized{ending}",
        }
    if form in _SUFFIXES:
        return {role: name + suffix for role, suffix in _SUFFIXES[form].items()}
    owner, _, leaf = name.rpartition(".")
    prefix = f"{owner}.parametrizations.{leaf}." if owner else f"parametrizations.{leaf}."
    return {role: prefix + ending for role, ending in _PARAMETRIZED[form].items()}


def find_stored(shapes: Mapping[str, tuple[int, ...]]) -> list[Stored]:
    """The reparameterized weights among tensors of these names and shapes, in their order.

    Raises:
        InputError: a weight is parametrized in a way whose formula a checkpoint does not say.
    """
    found = [*_parametrized(shapes), *_with_suffixes(shapes), *_addons(shapes)]
    order = {name: place for place, name in enumerate(shapes)}
    return sorted(found, key=lambda stored: order[stored.parts["direction"]])


def _parametrized(shapes: Mapping[str, tuple[int, ...]]) -> Iterable[Stored]:
    by_weight: dict[str, dict[str, str]] = {}
    for name in shapes:
        if match := _OF_PARAMETRIZATION.fullmatch(name):
            by_weight.setdefault(match[1] + match[2], {})[match[3]] = name
    for weight, endings in by_weight.items():
        form = _form_of(endings, shapes)
        if form is None:
            raise InputError(
                f"'{printable(weight)}' is parametrized by something whose formula a checkpoint does not say; fold "
                "the model itself (refold.fold), or leave this weight as it is with --skip"
            )
        roles = {ending: role for role, ending in _PARAMETRIZED[form].items()}
        yield Stored(form, weight, {roles[ending]: name for ending, name in endings.items()})


def _form_of(endings: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> Form | None:
    known = set(endings)
    if known == {"original", "0._u", "0._v"}:
        return Form.SPECTRAL
    if not {"original0", "original1"} <= known <= {"original0", "original1", "original2"}:
        return None
    first, second = shapes[endings["original0"]], shapes[endings["original1"]]
    # torch's gain has as many axes as the weight, or none at all; refold's has one.
    if len(first) > 1 and len(second) == 1:
        return Form.REFOLD
    return Form.TORCH if known == {"original0", "original1"} and len(second) > 1 else None


def _with_suffixes(shapes: Mapping[str, tuple[int, ...]]) -> Iterable[Stored]:
    for name, shape in shapes.items():
        base, _, ending = name.rpartition("_")
        if ending not in ("orig", "v") or not _is_weight(base):
            continue
        if ending == "orig" and f"{base}_u" in shapes and f"{base}_v" in shapes:
            yield Stored(Form.SPECTRAL_LEGACY, base, part_names(Form.SPECTRAL_LEGACY, base))
        if ending == "v" and f"{base}_g" in shapes and f"{base}_orig" not in shapes:
            # torch's gain has as many axes as the weight; Paddle's has one.
            gain = shapes[f"{base}_g"]
            parts = {role: part for role, part in part_names(Form.PADDLE, base).items() if part in shapes}
            paddle = "offset" in parts or (len(gain) == 1 and len(shape) > 1)
            yield Stored(Form.PADDLE if paddle else Form.TORCH_LEGACY, base, parts)


def _is_weight(name: str) -> bool:
    """Whether ``X_v`` beside ``X_g`` are a weight's parts, and not two parameters of a user's own."""
    leaf = name.rpartition(".")[2]
    return "weight" in leaf or "kernel" in leaf


def _addons(shapes: Mapping[str, tuple[int, ...]]) -> Iterable[Stored]:
    copies: dict[str, list[str]] = {}
    recurrent: dict[str, list[str]] = {}
    for name in shapes:
        around, copied, _ = name.rpartition("data_dep_init/")
        if copied:  # the layer as it was before its initialization from data
            copies.setdefault(around, []).append(name)
        elif name.endswith(("/recurrent_kernel", "/recurrent_kernel:0")):
            cell = name.rpartition("/")[0]  # a recurrent layer keeps its kernels one level below
            recurrent.setdefault(cell[: cell.rfind("/") + 1], []).append(name)
    for name in shapes:
        match = re.fullmatch(r"(.*/)?g(:0)?", name, re.DOTALL)
        if match is None or f"{match[1] or ''}initialized{match[2] or ''}" not in shapes:
            continue
        around, ending = match[1] or "", match[2] or ""
        kernels = recurrent.get(around) or [kernel for kernel in (f"{around}kernel{ending}",) if kernel in shapes]
        if len(kernels) != 1:
            raise InputError(f"'{printable(name)}' is a gain of TensorFlow Addons, and no kernel lies beside it")
        parts = {"direction": kernels[0], "gain": name, "initialized": f"{around}initialized{ending}"}
        yield Stored(Form.ADDONS, kernels[0], parts, tuple(copies.get(around, ())))
