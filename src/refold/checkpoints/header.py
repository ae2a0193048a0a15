"""The header of a safetensors file, read as if an enemy had written it.

The format: 8 bytes, a little-endian length; so many bytes of JSON, from the first a ``{``; then the tensors' bytes.
This reader is stricter than the common ones: it refuses duplicate names and a header that begins with spaces.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, final

from refold.checkpoints.dtypes import BITS, Spec
from refold.errors import InputError
from refold.files import size_in_words
from refold.shown import printable

MOST_HEADER = 100_000_000  # bytes, as in the reference implementation
MOST_TENSORS = 1_000_000
MOST_AXES = 64
METADATA = "__metadata__"


@final
@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file: what it is, and where its bytes begin, counted from the beginning of the file."""

    spec: Spec
    start: int


@final
@dataclass(frozen=True, slots=True)
class Header:
    """What a file holds. ``metadata`` are words of whoever wrote it."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def read_header(file: BinaryIO, size: int, shown: str) -> Header:
    """The header of a file of ``size`` bytes; ``shown`` names it in errors. No tensor is read.

    Raises:
        InputError: the header is not as the format says, or does not fit the file.
    """
    if size < 10:
        raise InputError(f"{shown}: this is no safetensors file (it has {size_in_words(size)})")
    file.seek(0)
    (length,) = struct.unpack("<Q", _exactly(file, 8, shown))
    if length > min(MOST_HEADER, size - 8):
        raise InputError(
            f"{shown}: this is no safetensors file, or it is cut off (a header of {size_in_words(length)} in "
            f"{size_in_words(size)})"
        )
    text = _exactly(file, length, shown)
    if text[:1] != b"{":
        raise InputError(f"{shown}: this is no safetensors file (its header does not begin with '{{')")
    # What the JSON would cost in memory is looked at before it is read.
    if text.count(b"{") > MOST_TENSORS + 2 or text.count(b"[") > 2 * MOST_TENSORS:
        raise InputError(f"{shown}: its header has more than {MOST_TENSORS} tensors, or nests them; no model does")
    found = _json(text, shown)
    metadata = found.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{shown}: its metadata are not words by name")
    begin = 8 + length
    entries = {name: _entry(name, told, begin, size, shown) for name, told in found.items()}
    _check_layout(entries, begin, size, shown)
    return Header(entries, metadata)


def layout(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, Entry], int]:
    """The beginning of a file that is to hold these tensors, where each goes, and the size of the file.

    Wide types come first, so that every tensor lies at a multiple of its numbers' size.
    """
    order = sorted(specs, key=lambda name: -BITS[specs[name].dtype])  # stable
    told: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    offsets, at = {}, 0
    for name in order:
        spec = specs[name]
        offsets[name] = at
        told[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [at, at + spec.size]}
        at += spec.size
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    entries = {name: Entry(specs[name], begin + offset) for name, offset in offsets.items()}
    return struct.pack("<Q", len(text)) + text, entries, begin + at


def _exactly(file: BinaryIO, size: int, shown: str) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise InputError(f"{shown}: the file ends before its header does")
    return data


def _json(text: bytes, shown: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise InputError(f"{shown}: its header has '{printable(twice)}' twice")
        return found

    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, numbers of endless digits
        raise InputError(f"{shown}: this is no safetensors file (its header is not JSON)") from error
    assert isinstance(found, dict)  # it begins with a brace
    return found


def _entry(name: str, told: Any, begin: int, size: int, shown: str) -> Entry:
    what = f"{shown}: the tensor '{printable(name)}'"
    if not isinstance(told, dict) or told.keys() != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{what} is not described by a type, a shape and its place")
    dtype, shape, offsets = told["dtype"], told["shape"], told["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise InputError(f"{what} has the unknown type {printable(dtype)}")
    if not _sizes(shape) or len(shape) > MOST_AXES:
        raise InputError(f"{what} has a shape that is none")
    if not _sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - begin:
        raise InputError(f"{what} lies outside the file")
    spec = Spec(dtype, tuple(shape))
    if spec.count * BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise InputError(f"{what} has {offsets[1] - offsets[0]} bytes, which is not what its type and shape need")
    return Entry(spec, begin + offsets[0])


def _sizes(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(number) is int and 0 <= number < 2**63 for number in numbers)


def _check_layout(entries: Mapping[str, Entry], begin: int, size: int, shown: str) -> None:
    """Tensors lie one behind the other, without holes, to the end of the file."""
    at = begin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].spec.size)):
        if entry.start != at:
            what = "overlaps another tensor" if entry.start < at else "has bytes before it that belong to no tensor"
            raise InputError(f"{shown}: the tensor '{printable(name)}' {what}")
        at += entry.spec.size
    if at != size:
        raise InputError(f"{shown}: it has {size - at} bytes behind its last tensor")
