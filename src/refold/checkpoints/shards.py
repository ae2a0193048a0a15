"""Safetensors checkpoints: one file, or several with an index; opened, and read piece by piece."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, final

from refold.checkpoints.dtypes import Spec
from refold.checkpoints.header import Entry, Header, read_header
from refold.errors import InputError
from refold.files import open_regular
from refold.shown import printable

SINGLE, INDEX = ".safetensors", ".safetensors.index.json"
MOST_INDEX = 2**28  # bytes


@final
@dataclass(frozen=True, slots=True)
class Shard:
    """An open file of tensors. ``name`` is its base name."""

    name: str
    path: Path
    file: BinaryIO
    header: Header


@final
@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Open files of tensors. ``index`` is what the index file says besides the place of each tensor, and its base
    name, if there is one. The tensors are in the order of the files."""

    shards: tuple[Shard, ...]
    index: tuple[str, Mapping[str, Any]] | None
    homes: Mapping[str, int]

    @property
    def specs(self) -> Mapping[str, Spec]:
        """The type and shape of each tensor."""
        return {name: self._entry(name).spec for name in self.homes}

    @property
    def paths(self) -> list[Path]:
        """The files that are read."""
        return [shard.path for shard in self.shards]

    def read(self, name: str, start: int, size: int) -> bytes:
        """So many bytes of a tensor, from the byte ``start`` of it. Raises InputError if the file has shrunk."""
        shard = self.shards[self.homes[name]]
        data = os.pread(shard.file.fileno(), size, self._entry(name).start + start)
        if len(data) != size:
            raise InputError(f"'{printable(shard.name)}' was cut off while it was read")
        return data

    def _entry(self, name: str) -> Entry:
        return self.shards[self.homes[name]].header.entries[name]


def is_safetensors(path: Path) -> bool:
    """Whether a name is that of a safetensors file, of an index of several, or of a folder."""
    return path.name.endswith((SINGLE, INDEX)) or path.is_dir()


def open_checkpoint(path: Path, stack: ExitStack) -> Checkpoint:
    """A ``.safetensors`` file, an index of several, or a folder with one of these. ``stack`` closes them.

    Raises:
        InputError: there is no such checkpoint, a header or the index is not as it must be, an index names a file
            outside its folder, or the tensors that it names are not those of the files.
    """
    if path.is_dir():
        path = _only_checkpoint(path)
    if not path.name.endswith(INDEX):
        shard = _open_shard(path, path.name, stack)
        return Checkpoint((shard,), None, dict.fromkeys(shard.header.entries, 0))
    shown = printable(path)
    places, rest = _read_index(path, shown)
    names = sorted(set(places.values()))
    roots = {os.path.realpath(path.parent), os.path.dirname(os.path.realpath(path))}
    shards = []
    for name in names:
        file = path.parent / name
        if os.path.dirname(os.path.realpath(file)) not in roots:
            raise InputError(f"{shown}: '{printable(name)}' is a link out of the checkpoint's folder")
        shards.append(_open_shard(file, name, stack))
    homes: dict[str, int] = {}
    for number, shard in enumerate(shards):
        for tensor in shard.header.entries:
            if tensor in homes:
                one, two = printable(shards[homes[tensor]].name), printable(shard.name)
                raise InputError(f"{shown}: the tensor '{printable(tensor)}' is in '{one}' and in '{two}'")
            homes[tensor] = number
    for tensor, number in homes.items():
        if places.get(tensor) != shards[number].name:
            raise InputError(
                f"{shown}: the tensor '{printable(tensor)}' is in '{printable(shards[number].name)}', which the "
                "index does not say"
            )
    for tensor, place in places.items():
        if tensor not in homes:
            raise InputError(f"{shown}: the tensor '{printable(tensor)}' is not in '{printable(place)}'")
    return Checkpoint(tuple(shards), (path.name, rest), homes)


def _only_checkpoint(folder: Path) -> Path:
    for ending in (INDEX, SINGLE):
        found = sorted(path for path in folder.iterdir() if path.name.endswith(ending))
        if len(found) == 1:
            return found[0]
        if found:
            break
    what = "several" if found else "no"
    raise InputError(f"{printable(folder)}: there are {what} checkpoints in this folder; name the file")


def _open_shard(path: Path, name: str, stack: ExitStack) -> Shard:
    file = stack.enter_context(open_regular(path))
    header = read_header(file, os.fstat(file.fileno()).st_size, printable(path))
    return Shard(name, path, file, header)


def _read_index(path: Path, shown: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Which file each tensor is said to be in, and the rest of what the index says."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise InputError(f"{shown}: '{printable(twice)}' is there twice")
        return found

    with open_regular(path, MOST_INDEX) as file:
        text = file.read()
    try:
        index = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{shown}: this is no index of a checkpoint (it is not JSON)") from error
    places = index.pop("weight_map", None) if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise InputError(f"{shown}: this is no index of a checkpoint (it has no 'weight_map')")
    for tensor, place in places.items():
        if not isinstance(place, str) or not _is_base_name(place):
            raise InputError(
                f"{shown}: the tensor '{printable(tensor)}' is said to be in '{printable(place)}'; only "
                ".safetensors files in the index's own folder are read"
            )
    return places, index


def _is_base_name(name: str) -> bool:
    plain = not any(character in "/\\:" or ord(character) < 32 for character in name)
    return plain and name.endswith(SINGLE) and not name.startswith(".")
