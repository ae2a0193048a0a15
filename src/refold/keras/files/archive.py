"""The archive: which members it may have, and how much they may hold."""

from __future__ import annotations

import io
import json
import re
import stat
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, final

from refold.files import size_in_words
from refold.keras.files.configuration import CONFIG, parse
from refold.keras.files.refused import RefusedError, sentence
from refold.shown import printable

MIB = 2**20
# Keras stores everything uncompressed. Up to SMALL nothing is suspicious; above, what a file says it holds
# may be this many times what it stores.
SMALL = 16 * MIB
EXPANSION = 8
MAX_DIRECTORY = MIB  # of the archive: some twenty thousand members
MAX_CONFIG = 16 * MIB
MAX_METADATA = MIB

METADATA, WEIGHTS, ASSETS = "metadata.json", "model.weights.h5", "assets/"


@final
@dataclass(frozen=True, slots=True, eq=False)
class Archive:
    """The members of an archive, out of it."""

    config: Any
    written_by: str
    weights: io.BytesIO
    assets: Mapping[str, io.BytesIO]


class _ShortReads:
    """A file that is never asked for much at once: how large an archive's table of contents is, the archive
    says itself, and `zipfile` believes it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY:
            raise RefusedError(f"the archive's table of contents has {size_in_words(size)}; no model needs that")
        return self._file.read(size)


def read_archive(file: BinaryIO) -> Archive:
    """All members of a file, screened and taken out. Raises RefusedError."""
    start = file.read(16)
    if start[:2] != b"PK":
        raise RefusedError(_other_format(start))
    size = file.seek(0, io.SEEK_END)
    try:
        with zipfile.ZipFile(_ShortReads(file)) as archive:
            members = _screen_members(archive.infolist(), size)
            config = _read_member(archive, members[CONFIG])
            metadata = parse(_read_member(archive, members[METADATA]), METADATA)
            weights = _read_member(archive, members[WEIGHTS])
            assets = {
                name: _read_member(archive, info)
                for name, info in members.items()
                if name.startswith(ASSETS) and not info.is_dir()
            }
    except RefusedError:
        raise
    except MemoryError as error:
        raise RefusedError("there is not enough memory to read it") from error
    except Exception as error:  # zipfile has no common base for what a damaged archive makes it raise
        raise RefusedError(f"the archive is damaged or cut off ({sentence(error)}); copy the file again") from error
    version = metadata.get("keras_version") if isinstance(metadata, dict) else None
    return Archive(parse(config, CONFIG), str(version or ""), weights, assets)


def _other_format(start: bytes) -> str:
    if start.startswith(b"\x89HDF"):
        return (
            "this is a model in Keras' old HDF5 format, which cannot be read safely; load it where it came from "
            "and save it again under a name that ends in .keras"
        )
    what = "this is no Keras archive"
    if start[:1] == b"\x80":
        what = "this looks like a Python pickle (an old PyTorch or Paddle file)"
    elif start[8:9] == b"{":
        what = "this looks like a safetensors file"
    elif start[:1] == b"\x08":
        what = "this looks like an ONNX or TensorFlow file"
    elif start[:2] == b"\x1f\x8b":
        what = "this is a gzip archive"
    return f"{what}; give the .keras file that model.save() writes"


def _screen_members(infos: Sequence[zipfile.ZipInfo], size: int) -> dict[str, zipfile.ZipInfo]:
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name, shown = info.filename, f"the archive's member '{printable(info.orig_filename, 80)}'"
        if name in members:
            raise RefusedError(f"{shown} is there twice")
        if info.orig_filename != name or not _is_plain(name):
            raise RefusedError(f"{shown} has a name that could leave its folder")
        if info.flag_bits & 0x1:
            raise RefusedError(f"{shown} is encrypted; save the model without a password")
        mode = info.external_attr >> 16
        if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise RefusedError(f"{shown} is a link or a device, not a file")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise RefusedError(f"{shown} is compressed in a way that Keras does not use; save the model again")
        if info.file_size > max(SMALL, EXPANSION * info.compress_size):
            raise RefusedError(
                f"{shown} says that it holds {size_in_words(info.file_size)} "
                f"but stores {size_in_words(info.compress_size)}, as a decompression bomb would"
            )
        if name not in (CONFIG, METADATA, WEIGHTS) and not name.startswith(ASSETS):
            raise RefusedError(_unexpected(name, shown, [other.filename for other in infos]))
        members[name] = info
    for name, limit in ((CONFIG, MAX_CONFIG), (METADATA, MAX_METADATA), (WEIGHTS, None)):
        if name not in members:
            raise RefusedError(f"the archive has no member '{name}', so it is no Keras model")
        if limit is not None and members[name].file_size > limit:
            raise RefusedError(
                f"its '{name}' has {size_in_words(members[name].file_size)}, more than {size_in_words(limit)}"
            )
    # Members that share their bytes are each as small as they say.
    total = sum(info.file_size for info in infos)
    if total > max(SMALL, EXPANSION * size):
        raise RefusedError(
            f"the archive says that it holds {size_in_words(total)} in {size_in_words(size)}, "
            "as a decompression bomb would"
        )
    return members


def _is_plain(name: str) -> bool:
    """Whether a name stays where it is put, on every system."""
    parts = name.removesuffix("/").split("/")
    return not any(part in ("", ".", "..") or re.search(r"[\\:\x00-\x1f\x7f]", part) for part in parts)


def _unexpected(name: str, shown: str, names: Sequence[str]) -> str:
    if name == "model.weights.npz":
        return "its weights are in NumPy's format, which Keras no longer reads; save the model again without that"
    if name.startswith("model.weights"):
        return (
            f"{shown} is part of weights in several files, which are read from no .keras file; save the model whole"
        )
    if any(other.endswith("data.pkl") for other in names):
        return "this is a PyTorch file; give the .keras file that model.save() writes"
    return f"{shown} is nothing that Keras writes; remove it or save the model again"


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> io.BytesIO:
    """All of a member, and not more than it says it holds."""
    content = io.BytesIO()
    with archive.open(info) as stream:
        while chunk := stream.read(MIB):
            content.write(chunk)
            if content.tell() > info.file_size:
                raise RefusedError(f"its '{printable(info.filename, 80)}' holds more than it says")
    if content.tell() != info.file_size:
        raise RefusedError(f"its '{printable(info.filename, 80)}' holds less than it says; copy the file again")
    content.seek(0)
    return content


def clean_copy(archive: Archive) -> io.BytesIO:
    """An archive of what was screened, as it was understood."""
    copy = io.BytesIO()
    members = {METADATA: io.BytesIO(b"{}"), CONFIG: io.BytesIO(json.dumps(archive.config).encode())}
    members |= {WEIGHTS: archive.weights, **archive.assets}
    with zipfile.ZipFile(copy, "w") as target:
        for name, content in members.items():
            with target.open(name, "w", force_zip64=True) as stream:
                stream.write(content.getbuffer())
            content.close()
    copy.seek(0)
    return copy
