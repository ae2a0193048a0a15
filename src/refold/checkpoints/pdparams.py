"""Paddle's ``.pdparams``, which are Python pickles, read without executing anything that is in them.

A pickle is a program: it may name any function and call it. Here a name is looked up in the few that real state
dicts use, and each stands for a function of this module that only takes notes; arrays are made from the notes once
they are checked. What names anything else is refused, Paddle's own ``eval`` among them.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from math import prod
from types import MappingProxyType
from typing import Any, BinaryIO, final

import numpy as np
import numpy.typing as npt

from refold.checkpoints.dtypes import Spec, code_of
from refold.checkpoints.state import Arrays, NewArrays
from refold.errors import InputError
from refold.shown import printable

# Beside the tensors: the names that parameters have inside of programs.
_NOT_TENSORS = ("StructuredToParameterName@@",)


@final
class _Dtype:
    """Notes on a dtype: its kind and size, such as ``f4``, and the order of its bytes."""

    def __init__(self, name: object = None, align: object = None, copy: object = None) -> None:
        self.name = name
        self.order: object = "<"

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1:
            self.order = state[1]

    def made(self) -> np.dtype[Any]:
        if self.name not in _DTYPES or self.order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"it has an array of the type {printable(self.name, 40)}")
        return np.dtype(f">{self.name}" if self.order == ">" else f"<{self.name}")


_DTYPES = ("b1", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8")


@final
class _Array:
    """Notes on an array."""

    def __init__(self, *_: object) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def made(self) -> npt.NDArray[Any]:
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            raise pickle.UnpicklingError("it has an array that is none")
        _, shape, dtype, fortran, data = self.state
        return _array(data, dtype, shape, bool(fortran))


def _array(data: object, dtype: object, shape: object, fortran: bool) -> npt.NDArray[Any]:
    sizes = isinstance(shape, tuple) and all(type(size) is int and 0 <= size < 2**48 for size in shape)
    if not isinstance(data, bytes | bytearray) or not isinstance(dtype, _Dtype) or not sizes:
        raise pickle.UnpicklingError("it has an array that is none")
    assert isinstance(shape, tuple)
    made = dtype.made()
    if len(shape) > 32 or prod(shape) * made.itemsize != len(data):
        raise pickle.UnpicklingError("it has an array of another size than its data")
    return np.frombuffer(data, made).reshape(shape, order="F" if fortran else "C")


def _from_buffer(data: object, dtype: object, shape: object, order: object) -> _Array:
    array = _Array()
    array.state = (1, shape, dtype, order == "F", data)
    return array


def _scalar(dtype: object, data: object) -> _Array:
    return _from_buffer(data, dtype, (), "C")


def _encode(text: object, encoding: object = None) -> bytes:
    """Bytes of pickles that an old protocol writes as text."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("it has text that is no array's bytes")
    return text.encode("latin-1")


def _ordered(items: object = ()) -> dict[Any, Any]:
    if not isinstance(items, list | tuple):
        raise pickle.UnpicklingError("it has a dict that is none")
    return dict(items)


def _as_tuple(items: object = ()) -> tuple[Any, ...]:
    if not isinstance(items, list | tuple):
        raise pickle.UnpicklingError("it has a tuple that is none")
    return tuple(items)


_OF_NUMPY: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {"multiarray._reconstruct": _Array, "multiarray.scalar": _scalar, "numeric._frombuffer": _from_buffer}
)
# What real state dicts name, and what it is taken for here.
NAMES: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        **{f"numpy.core.{name}": stand_in for name, stand_in in _OF_NUMPY.items()},
        **{f"numpy._core.{name}": stand_in for name, stand_in in _OF_NUMPY.items()},
        "numpy.ndarray": _Array,
        "numpy.dtype": _Dtype,
        "_codecs.encode": _encode,
        "collections.OrderedDict": _ordered,
        "builtins.tuple": _as_tuple,
    }
)


class _Bounded(io.RawIOBase):
    """A file that is never asked for more than it has: how long a string is, a pickle says itself."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size

    def read(self, size: int = -1) -> bytes:
        if size > self._size - self._file.tell():
            raise pickle.UnpicklingError("the file is cut off")
        return self._file.read(size)

    def readline(self, size: int | None = -1) -> bytes:
        return self._file.readline(-1 if size is None else size)


# Python's own implementation, not the faster one in C: that one makes room for as many notes as a pickle claims to
# need, which can be more than the machine has.
@final
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for what is named."""
        if f"{module}.{name}" not in NAMES:
            raise pickle.UnpicklingError(
                f"it names {printable(f'{module}.{name}', 80)}, which no weights need and which could run code"
            )
        return NAMES[f"{module}.{name}"]

    def persistent_load(self, pid: object) -> Any:
        """Nothing lies outside of the file."""
        raise pickle.UnpicklingError("it refers to something outside of the file")


def read_pdparams(file: BinaryIO, size: int, shown: str) -> Arrays:
    """The tensors of a state dict that ``paddle.save`` wrote. bfloat16, which it writes as uint16, is that again.

    Raises:
        InputError: it is damaged, it holds something else than arrays by name, or it names anything that could run.
    """
    try:
        found = _Unpickler(_Bounded(file, size), encoding="latin1").load()
        if not isinstance(found, dict):
            raise pickle.UnpicklingError("it holds no weights by name")
        return _arrays(found)
    except InputError as error:
        raise InputError(f"{shown}: {error}") from error
    except MemoryError as error:
        raise InputError(f"{shown}: there is not enough memory to read it") from error
    except Exception as error:  # whatever a damaged pickle makes its reader raise
        reason = str(error) if isinstance(error, pickle.UnpicklingError) else type(error).__name__
        raise InputError(
            f"{shown}: these are no weights of Paddle that can be read ({printable(reason)})"
        ) from error


def _arrays(found: Mapping[Any, Any]) -> Arrays:
    if "UnpackBigParamInfor@@" in found:
        raise InputError("Paddle cut its large weights into slices; save it again with protocol=4")
    specs, data = {}, {}
    for name, value in found.items():
        if name in _NOT_TENSORS:
            continue
        # Some versions write (name, array) for a parameter.
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], _Array):
            value = value[1]
        if not isinstance(name, str) or not isinstance(value, _Array):
            raise InputError(
                f"'{printable(name)}' is no array; the file must hold a state dict and nothing else (an "
                "optimizer's .pdopt is none)"
            )
        array = value.made()
        code = "BF16" if array.dtype.newbyteorder("=") == np.uint16 else code_of(array.dtype.newbyteorder("="))
        assert code is not None  # each of _DTYPES has one
        stored = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1)
        specs[name] = Spec(code, tuple(array.shape))
        data[name] = stored.view(np.uint8).data
    return Arrays(specs, data)


def pickled(arrays: NewArrays) -> bytes:
    """A ``.pdparams`` of these tensors, which ``paddle.load`` reads. Raises InputError for types Paddle has not."""
    state = {}
    for name, spec in arrays.specs.items():
        raw = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8", "BOOL": "?", "C64": "<c8"}.get(spec.dtype)
        if raw is None and spec.dtype in ("U8", "I8", "I16", "I32", "I64"):
            raw = f"<{spec.dtype[0].lower()}{int(spec.dtype[1:]) // 8}"
        if raw is None:
            raise InputError(f"'{printable(name)}' is stored as {spec.dtype}, which Paddle's files do not have")
        state[name] = np.frombuffer(arrays.data[name], raw).reshape(spec.shape)
    return pickle.dumps(state, protocol=4)
