"""Paddle's programs as they stand in a file: operators, parameters, attributes and types, in Python's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from refold.errors import InputError
from refold.shown import printable

# Attributes that Paddle's kernels divide by.
_POSITIVE = ("strides", "dilations", "groups", "num", "upscale_factor", "downscale_factor")

# A program's words for types.
_TYPES = {
    "t_bool": "bool",
    "t_ui8": "uint8",
    "t_i8": "int8",
    "t_i16": "int16",
    "t_i32": "int32",
    "t_i64": "int64",
    "t_f16": "float16",
    "t_bf16": "bfloat16",
    "t_f32": "float32",
    "t_f64": "float64",
}


@final
@dataclass(frozen=True)
class Stored:
    """A parameter or buffer that a program names."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool


def operations(program: Any) -> list[dict[str, Any]]:
    """The operators of a decoded program, in order. Raises InputError if it is none of Paddle 3."""
    match program:
        case {"base_code": {"magic": "pir"}, "program": {"regions": [{"blocks": [{"ops": list(ops)}]}]}} if all(
            isinstance(op, dict) for op in ops
        ):
            return ops
    raise InputError("this is no inference program of Paddle 3 (what paddle.jit.save writes)")


def stored_in(ops: Sequence[Mapping[str, Any]]) -> list[Stored]:
    """The parameters and buffers of a program, in its order. Raises InputError."""
    found = []
    for op in ops:
        if op.get("#") != "p":
            continue
        try:
            shape, dtype = type_of(op["O"])
            found.append(Stored(str(op["A"][3]), shape, dtype, bool(op["OA"][2])))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise InputError("a parameter of the program is not described as Paddle does it") from error
    if len({entry.name for entry in found}) < len(found):
        raise InputError("two parameters of the program have one name")
    return found


def attributes_of(op: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of an operator, by name. Raises InputError where Paddle's kernels would divide by 0."""
    found = {entry["N"]: _attribute(entry["AT"]) for entry in op["A"]}
    for name in _POSITIVE:
        value = found.get(name, 1)
        if min(value, default=1) < 1 if isinstance(value, list) else value < 1:
            raise InputError(f"the '{name}' of the program's operator '{printable(op['#'])}' are 0 or less")
    return found


def _attribute(entry: Mapping[str, Any]) -> Any:
    """An attribute's value."""
    value = entry["D"]
    return [_attribute(part) for part in value] if entry["#"] == "0.a_array" else value


def type_of(result: Mapping[str, Any]) -> tuple[tuple[int, ...], str]:
    """The shape and type of a tensor."""
    element, shape = result["TT"]["D"][:2]
    return tuple(int(size) for size in shape), _TYPES[element["#"].partition(".")[2]]
