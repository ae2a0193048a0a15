"""Types of stored numbers, under the codes of safetensors, and the one rounding that a conversion does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, final

import numpy as np
import numpy.typing as npt

# Bits per number. What is not computed with is copied, so every type can be in a file.
BITS: Mapping[str, int] = MappingProxyType(
    {
        "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
        "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
        "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
        "I32": 32, "U32": 32, "F32": 32,
        "I64": 64, "U64": 64, "F64": 64, "C64": 64,
    }
)  # fmt: skip

# How numpy reads the bytes; it has no bfloat16, which is the upper half of a float32.
_RAW = MappingProxyType(
    {
        "BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "BF16": "<u2", "I32": "<i4",
        "U32": "<u4", "F32": "<f4", "I64": "<i8", "U64": "<u8", "F64": "<f8", "C64": "<c8",
    }
)  # fmt: skip
_CODES = MappingProxyType(
    {np.dtype(raw).name: code for code, raw in _RAW.items() if code != "BF16"} | {"bfloat16": "BF16"}
)

# The types that weights with a norm may have.
WEIGHTS = ("BF16", "F16", "F32", "F64")


@final
@dataclass(frozen=True, slots=True)
class Spec:
    """The type and the shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return prod(self.shape)

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return self.count * BITS[self.dtype] // 8


def code_of(dtype: Any) -> str | None:
    """The code of a numpy dtype (bfloat16 by its name, whoever registered it), or None if there is none."""
    return _CODES.get(np.dtype(dtype).name)


def raw_dtype(code: str) -> np.dtype[Any]:
    """The numpy dtype that the bytes of a tensor are read as. Raises KeyError for the narrow floats."""
    return np.dtype(_RAW[code])


def wide_code(code: str) -> str:
    """The type in which the gains of a weight are stored: float32 or wider."""
    return "F64" if code == "F64" else "F32"


def widened(data: bytes | memoryview, code: str) -> npt.NDArray[np.float64]:
    """Stored numbers of one of the types of :data:`WEIGHTS`, exactly, as a vector."""
    numbers: npt.NDArray[np.float64] = as_floats(np.frombuffer(data, raw_dtype(code)), code).astype(np.float64)
    return numbers


def as_floats(stored: npt.NDArray[Any], code: str) -> npt.NDArray[Any]:
    """Numbers as they are stored in a type of :data:`WEIGHTS`, as floats that numpy knows."""
    if code != "BF16":
        return stored
    upper: npt.NDArray[np.uint32] = stored.astype(np.uint32) << np.uint32(16)
    return upper.view(np.float32)


def rounded(numbers: npt.NDArray[np.float64], code: str) -> npt.NDArray[Any]:
    """``numbers`` as they are stored in the type ``code``: each rounded once, to the nearest, ties to even.

    What is too large for the type becomes infinite; whoever calls looks for that.
    """
    with np.errstate(over="ignore", under="ignore"):
        if code != "BF16":
            return np.asarray(numbers, dtype=raw_dtype(code))
        # Through float32 would round twice. A bfloat16 has 8 bits, and its smallest step is 2**-133.
        exponent = np.maximum(np.frexp(numbers)[1], -125)
        nearest = np.ldexp(np.rint(np.ldexp(numbers, 8 - exponent)), exponent - 8)
        bits: npt.NDArray[np.uint32] = nearest.astype(np.float32).view(np.uint32) >> np.uint32(16)
        return bits.astype(np.uint16)
