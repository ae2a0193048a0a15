"""The weights: an HDF5 file whose every object is looked at, and none of whose numbers is read."""

from __future__ import annotations

import io
import math
from typing import Any

import h5py

from refold.files import size_in_words
from refold.keras.files.archive import EXPANSION, SMALL
from refold.keras.files.refused import RefusedError, sentence
from refold.shown import printable

MAX_OBJECTS = 100_000  # groups and datasets

# HDF5's own filters (deflate, shuffle, fletcher32) and h5py's lzf: all others are plug-ins that load code.
FILTERS = {1, 2, 3, 32000}
LINKS = {h5py.SoftLink: "a soft link", h5py.ExternalLink: "a link to another file"}


def screen_weights(content: io.BytesIO) -> int:
    """How many numbers a weights file stores, after a look at every object in it; no number is read."""
    try:
        with h5py.File(content, "r") as file:
            numbers = _screen_groups(file, content.getbuffer().nbytes)
    except RefusedError:
        raise
    except Exception as error:  # h5py turns the library's errors into many types
        raise RefusedError(f"its weights are damaged ({sentence(error)}); copy the file again") from error
    finally:
        content.seek(0)
    return numbers


def _screen_groups(file: Any, size: int) -> int:
    seen: set[Any] = set()
    waiting = [file["/"]]
    numbers = declared = 0
    while waiting:
        group = waiting.pop()
        for key in group:
            shown = f"its weight '{printable(f'{group.name}/{key}'.lstrip('/'), 120)}'"
            link = group.get(key, getlink=True)
            if type(link) is not h5py.HardLink:
                raise RefusedError(f"{shown} is {LINKS.get(type(link), 'a link of an unknown kind')}, not a weight")
            found = group[key]
            address = h5py.h5o.get_info(found.id).addr
            if address in seen:
                continue
            seen.add(address)
            if len(seen) > MAX_OBJECTS:
                raise RefusedError(f"its weights have more than {MAX_OBJECTS} parts; no model needs that")
            if isinstance(found, h5py.Group):
                waiting.append(found)
            else:
                count = _screen_dataset(found, shown)
                numbers += count
                declared += count * found.dtype.itemsize
    if declared > max(SMALL, EXPANSION * size):
        raise RefusedError(f"its weights say that they have {size_in_words(declared)} in {size_in_words(size)}")
    return numbers


def _screen_dataset(dataset: Any, shown: str) -> int:
    if not isinstance(dataset, h5py.Dataset):
        raise RefusedError(f"{shown} is no array")
    if dataset.external or dataset.is_virtual:
        raise RefusedError(f"{shown} is kept in another file")
    dtype = dataset.dtype
    # bfloat16 and 8-bit floats are stored as raw bytes.
    if not (dtype.kind in "biuf" or (dtype.kind == "c") or (dtype.kind == "V" and not dtype.fields)):
        raise RefusedError(f"{shown} holds no numbers")
    if dtype.itemsize > 16 or dataset.shape is None:
        raise RefusedError(f"{shown} holds no numbers")
    creation = dataset.id.get_create_plist()
    if any(creation.get_filter(i)[0] not in FILTERS for i in range(creation.get_nfilters())):
        raise RefusedError(f"{shown} is compressed in a way that Keras does not use; save the model again")
    count = math.prod(map(int, dataset.shape))
    stored = int(dataset.id.get_storage_size())
    # A chunk is unpacked whole, however little of it is used.
    declared = max(count, math.prod(map(int, dataset.chunks or ()))) * int(dtype.itemsize)
    if declared > max(SMALL, EXPANSION * stored):
        raise RefusedError(
            f"{shown} says that it has {size_in_words(declared)} but stores {size_in_words(stored)}, "
            "as a decompression bomb would"
        )
    return count
