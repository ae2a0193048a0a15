"""Saved inference programs: ``NAME.json`` with its weights in ``NAME.pdiparams`` beside it.

Both are read as data, here: nothing is unpickled, nothing in them can be code, and Paddle's own loader does not
see them. What may be in them is told at :mod:`refold.paddle.program`.
"""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np
import paddle
import safetensors.numpy

from refold.errors import InputError
from refold.files import open_regular, size_in_words, write_atomically
from refold.frontend import AnyArray
from refold.paddle.examples import specs_of
from refold.paddle.perform import rounded
from refold.paddle.pir import Stored, operations, stored_in
from refold.paddle.program import layer_of
from refold.paddle.sentences import first_line
from refold.paddle.trace import dtype_name
from refold.recording.symbols import leaves
from refold.shown import printable

PROGRAM, WEIGHTS = ".json", ".pdiparams"
MOST_PROGRAM, MOST_WEIGHTS = 2**28, 2**36

# Paddle's numbers for types (framework.proto, VarType.Type).
_TYPES = {
    0: "bool",
    1: "int16",
    2: "int32",
    3: "int64",
    4: "float16",
    5: "float32",
    6: "float64",
    20: "uint8",
    21: "int8",
    22: "bfloat16",
}


def load(path: Path, *, imports: Sequence[str] = (), trust: bool = False) -> Any:
    """The program in ``path`` as a Layer in eval mode. Raises InputError.

    ``imports`` and ``trust`` change nothing: a program holds no code.
    """
    shown = printable(path)
    with open_regular(path, MOST_PROGRAM) as file:
        text = file.read()
    try:
        program = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{shown}: this is no inference program of Paddle 3 (it is not JSON)") from error
    try:
        ops = operations(program)
        stored = stored_in(ops)
    except InputError as error:
        raise InputError(f"{shown}: {error}") from error
    arrays = _read_weights(path.with_suffix(WEIGHTS), stored) if stored else {}
    try:
        return layer_of(ops, arrays)
    except InputError as error:
        raise InputError(f"{shown}: {error}") from error


def save(model: Any, path: Path, *, overwrite: bool = False, example: Any = None) -> None:
    """Write ``model`` as an inference program: ``path``, and its weights beside it. Raises InputError.

    ``example`` is an input or a shape; what :func:`load` and ``refold.fold`` gave needs none. Each file is
    written whole or not at all, the weights first.
    """
    if path.suffix != PROGRAM:
        raise InputError(f"{printable(path)}: Paddle's programs end in '{PROGRAM}'; choose such a name")
    weights = path.with_suffix(WEIGHTS)
    for target in (path, weights):
        if target.exists() and not overwrite:
            raise InputError(
                f"{printable(target)}: the file exists already; choose another name, or overwrite it with --force"
            )
    specs = [
        paddle.static.InputSpec(list(spec.shape), spec.dtype, f"input{place}")
        for place, spec in enumerate(leaves(specs_of(model, example)))
    ]
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "model"
        try:
            paddle.jit.save(model, str(prefix), input_spec=specs)
        except Exception as error:  # whatever Paddle's translation of a forward raises
            raise InputError(f"{printable(path)}: Paddle cannot save this model ({first_line(error)})") from error
        for target, ending in ((weights, WEIGHTS), (path, PROGRAM)):
            made = prefix.with_suffix(ending)
            if made.exists():
                write_atomically(target, _copier(made), overwrite=overwrite)


def restore(model: Any, weights: Path | None) -> Any:
    """A Layer that a user's function made, in eval mode, with the weights of a ``.safetensors`` file under the
    names of its ``state_dict``. Raises InputError."""
    if weights is not None:
        shown = printable(weights)
        if weights.suffix != ".safetensors":
            raise InputError(
                f"{shown}: weights are read from .safetensors files; .pdparams files hold pickled Python objects, "
                f"which can run code; make {printable(weights.with_suffix('.safetensors').name)} of it with refold "
                "convert, which runs none"
            )
        with open_regular(weights, MOST_WEIGHTS) as file:
            data = file.read()
        try:
            arrays = safetensors.numpy.load(data)
        except Exception as error:  # whatever its reader raises
            raise InputError(f"{shown}: these are no safetensors ({first_line(error)})") from error
        tensors = model.state_dict()
        for name in sorted(tensors.keys() ^ arrays.keys()):
            where = "the file" if name in tensors else "the model"
            raise InputError(f"{shown}: there is no '{printable(name)}' in {where}")
        for name, tensor in tensors.items():
            there, here = list(arrays[name].shape), list(tensor.shape)
            if there != here:
                raise InputError(f"{shown}: '{printable(name)}' is {there} there and {here} in the model")
            tensor.set_value(rounded(arrays[name], dtype_name(tensor)))
    model.eval()
    return model


def _copier(made: Path) -> Callable[[Path], None]:
    def copy(target: Path) -> None:
        shutil.copyfile(made, target)

    return copy


# ---- weights ---------------------------------------------------------------------------------------


def _read_weights(path: Path, stored: Sequence[Stored]) -> dict[str, AnyArray]:
    """The arrays of a file of weights, which holds them one behind the other in the order of their names. They
    must be of the types and shapes that the program says. Raises InputError."""
    shown = printable(path)
    with open_regular(path, MOST_WEIGHTS) as file:
        reader = _Reader(shown, file, path.stat().st_size)
        found = {entry.name: reader.array(entry) for entry in sorted(stored, key=lambda entry: entry.name)}
        reader.finish()
    return found


@final
@dataclass
class _Reader:
    """A file of weights while it is read."""

    shown: str
    file: BinaryIO
    left: int

    def take(self, size: int) -> bytes:
        if size > self.left:
            raise InputError(
                f"{self.shown}: {size_in_words(size)} are announced where {size_in_words(self.left)} are left"
            )
        self.left -= size
        return self.file.read(size)

    def array(self, entry: Stored) -> AnyArray:
        """The next tensor: versions and levels of detail (all 0), its description, its numbers."""
        version, levels, inner, length = struct.unpack("<IQIi", self.take(20))
        if version or levels or inner or not 0 <= length < 2**12:
            raise InputError(f"{self.shown}: these are no weights that Paddle 3 saved with a program")
        kind, shape = _description(self.take(length), self.shown)
        if (kind, shape) != (entry.dtype, entry.shape):
            raise InputError(
                f"{self.shown}: '{printable(entry.name)}' is {kind} {list(shape)} here and {entry.dtype} "
                f"{list(entry.shape)} in the program; the two files do not belong together"
            )
        stored = np.dtype("uint16" if kind == "bfloat16" else kind).newbyteorder("<")
        numbers = np.frombuffer(self.take(prod(shape) * stored.itemsize), stored).reshape(shape)
        if kind == "bfloat16":  # the upper half of a float32
            return (numbers.astype(np.uint32) << 16).view(np.float32)
        return numbers.astype(stored.newbyteorder("="))

    def finish(self) -> None:
        if self.left:
            raise InputError(f"{self.shown}: it holds more than the program's weights; is it another program's?")


def _description(data: bytes, shown: str) -> tuple[str, tuple[int, ...]]:
    """The type and the shape in a ``TensorDesc`` of framework.proto: field 1 is the type, field 2 a size."""
    kind, shape, numbers = "", [], iter(data)
    for tag in numbers:
        value = shift = 0
        for byte in numbers:
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        if tag == 0x08 and value in _TYPES:
            kind = _TYPES[value]
        elif tag == 0x10 and value < 2**40:
            shape.append(value)
        else:
            raise InputError(f"{shown}: a tensor is not described as Paddle 3 does it")
    return kind, tuple(shape)
