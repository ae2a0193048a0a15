"""Checkpoints from file to file, whatever their formats."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, final

from refold.checkpoints.dtypes import Spec
from refold.checkpoints.hdf import read_hdf, write_hdf
from refold.checkpoints.header import layout
from refold.checkpoints.pdparams import pickled, read_pdparams
from refold.checkpoints.plan import Plan, Wish
from refold.checkpoints.shards import SINGLE, is_safetensors, open_checkpoint
from refold.checkpoints.state import Arrays, NewArrays, converted_arrays, wish_of
from refold.checkpoints.stream import convert_stream
from refold.errors import InputError
from refold.files import open_regular, write_atomically
from refold.shown import printable
from refold.weights import Normalization

KERAS = (".keras", ".weights.h5")
# It numbers the variables of a layer.
_OF_KERAS_3 = re.compile(r"(^|/)vars/\d+$")
PADDLE, HDF, TORCH = (".pdparams",), (".h5", ".hdf5"), (".pt", ".pth", ".bin")


@final
@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion did.

    ``converted`` has one entry per weight: its name, the forms that it had and has, and how many output units.
    ``kept`` is how many tensors stayed as they were, ``dropped`` the tensors that the result has no more.
    """

    to: str
    converted: tuple[Mapping[str, Any], ...]
    kept: int
    dropped: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "to": self.to,
            "converted": [dict(entry) for entry in self.converted],
            "kept": self.kept,
            "dropped": list(self.dropped),
        }

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for entry in self.converted:
            counts[entry["from"]] = counts.get(entry["from"], 0) + 1
        parts = [f"{count} from {form}" for form, count in counts.items()] or ["none"]
        return f"weights made {self.to}: {', '.join(parts)}; {self.kept} tensors stayed as they were"


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str = "plain",
    *,
    axes: Sequence[str] = (),
    skip: Sequence[str] = (),
    method: str | Normalization | None = None,
    epsilon: float | None = None,
    architecture: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Convert a checkpoint on the disk; the options are those of :func:`convert_state`.

    Args:
        source: a ``.safetensors`` file, the index of several or the folder that they are in; a ``.pdparams`` of
            Paddle; a ``.h5`` of Keras 2; a ``.keras`` or ``.weights.h5`` of Keras 3; a ``.pt``, ``.pth`` or
            ``.bin`` of torch with nothing but tensors in it. Whatever it is, nothing in it is executed.
        target: a name with one of these endings; or, from several safetensors files, a folder. Files of Keras are
            written from files of their kind only.
        to, axes, skip, method, epsilon: see :func:`convert_state`. Of Keras 3, the patterns are of names of layers,
            whose class says the axis.
        architecture: the ``.keras`` file of the model that a ``.weights.h5`` is of.
        overwrite: whether files that exist may be replaced. A file of the source never is.
        progress: told, for safetensors, the bytes that are done and all of them.

    From safetensors to safetensors no tensor is ever whole in memory. Files are written whole or not at all.

    Raises:
        InputError: a file cannot be read or written, a weight's form cannot become the other exactly, or not all
            that this needs is known. Nothing is written then.
    """
    wish = wish_of(to, axes, skip, method, epsilon)
    here, there = Path(source), Path(target)
    if any(path.name.endswith(KERAS[0]) for path in (here, there)) or architecture is not None:
        model = None if architecture is None else Path(architecture)
        plan = _of_keras(here).convert_model(here, there, wish, architecture=model, overwrite=overwrite)
    elif is_safetensors(here) and (is_safetensors(there) or not there.suffix):
        plan = convert_stream(here, there, wish, overwrite=overwrite, progress=progress)
    else:
        plan = _convert_in_memory(here, there, wish, overwrite)
    return _conversion(plan)


def _conversion(plan: Plan) -> Conversion:
    converted = tuple(
        {"name": entry.name, "from": entry.source.value, "to": entry.to.value, "units": entry.units}
        for entry in plan.converted
    )
    return Conversion(plan.to.value, converted, plan.kept, tuple(plan.dropped))


def _convert_in_memory(source: Path, target: Path, wish: Wish, overwrite: bool) -> Plan:
    shown = printable(target)
    if source.is_dir() or source.name.endswith(".index.json"):
        raise InputError(f"{shown}: a checkpoint of several files becomes safetensors only; give a folder")
    if not target.name.endswith((SINGLE, *PADDLE, *HDF, *TORCH)):
        raise InputError(
            f"{shown}: checkpoints are written to names that end in .safetensors, .pdparams, .h5 or .pt; choose one"
        )
    if target.name.endswith(HDF) and not source.name.endswith(HDF):
        raise InputError(f"{shown}: .h5 is written from .h5 only, whose layers it takes over; choose .safetensors")
    if target.exists() and source.exists() and target.samefile(source):
        raise InputError(f"{shown}: this is the file that is being read; choose another name for the result")
    arrays = _read(source)
    if any(_OF_KERAS_3.search(name) for name in arrays.specs):
        raise InputError(
            f"{printable(source)}: weights of Keras 3 do not say which layers they belong to; convert the .keras "
            "file of the model, or pass it with --architecture"
        )
    try:
        plan, made = converted_arrays(arrays, wish)
    except InputError as error:
        raise InputError(f"{printable(source)}: {error}") from error
    write_atomically(target, _writer(source, target, made), overwrite=overwrite, inputs=[source])
    return plan


def _read(path: Path) -> Arrays:
    """The tensors of a file, by what it begins with and, where that is a zip, by its name."""
    shown = printable(path)
    with ExitStack() as stack:
        file = stack.enter_context(open_regular(path))
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        file.seek(0)
        if start.startswith(b"\x89HDF"):
            return read_hdf(file, shown)
        if path.name.endswith(TORCH):
            arrays: Arrays = _torch_checkpoints(shown).read_arrays(path)
            return arrays
        if start[:1] == b"\x80":
            return read_pdparams(file, size, shown)
        if path.name.endswith(SINGLE):
            return _whole(path)
    raise InputError(
        f"{shown}: this is no checkpoint of safetensors, Paddle (.pdparams), Keras 2 (.h5) or torch (.pt); for a "
        "whole model use refold fold"
    )


def _whole(path: Path) -> Arrays:
    with ExitStack() as stack:
        checkpoint = open_checkpoint(path, stack)
        specs = checkpoint.specs
        data = {name: memoryview(checkpoint.read(name, 0, spec.size)) for name, spec in specs.items()}
        return Arrays(specs, data)


def _of_keras(source: Path) -> Any:
    shown = printable(source)
    if not source.name.endswith(KERAS):
        raise InputError(
            f"{shown}: files of Keras 3 are made from files of Keras 3; choose another name for the result"
        )
    try:
        return import_module("refold.keras.checkpoints")
    except ImportError as error:
        raise InputError(
            f"{shown}: files of Keras 3 need Keras and one of its backends: pip install keras"
        ) from error


def _torch_checkpoints(shown: str) -> Any:
    try:
        return import_module("refold.torch.checkpoints")
    except ImportError as error:
        raise InputError(f"{shown}: files of torch need torch: pip install torch, or use .safetensors") from error


def _writer(source: Path, target: Path, made: NewArrays) -> Callable[[Path], None]:
    if target.name.endswith(HDF):
        return lambda path: write_hdf(source, path, made)
    if target.name.endswith(TORCH):
        torch_checkpoints = _torch_checkpoints(printable(target))
        return lambda path: torch_checkpoints.write_arrays(made, path)
    if target.name.endswith(PADDLE):
        data = pickled(made)

        def write_pickle(path: Path) -> None:
            path.write_bytes(data)

        return write_pickle
    return lambda path: _write_safetensors(made.specs, made, path)


def _write_safetensors(specs: Mapping[str, Spec], made: NewArrays, path: Path) -> None:
    header, entries, _ = layout(specs, {})
    with path.open("wb") as file:
        file.write(header)
        for name in sorted(entries, key=lambda name: entries[name].start):
            file.write(made.data[name])
