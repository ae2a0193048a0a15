"""Weights that Keras 2 wrote as HDF5 (``save_weights("x.h5")``, ``model.save("x.h5")``): numbers and nothing else.

A name here is the path of a dataset: ``wn_conv/wn_conv/kernel:0``. A written file has the layers of the one
that was read.
"""

from __future__ import annotations

from collections import deque
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from refold.checkpoints.dtypes import Spec, code_of, raw_dtype
from refold.checkpoints.state import Arrays, NewArrays
from refold.errors import InputError
from refold.files import size_in_words
from refold.shown import printable

MOST_OBJECTS = 100_000  # groups and datasets
# HDF5's own filters (deflate, shuffle, fletcher32) and h5py's lzf: all others are plug-ins that load code.
_FILTERS = {1, 2, 3, 32000}
# What a dataset says that it has may be this many times what it stores, unless it is small.
_SMALL, _EXPANSION = 2**24, 8
_MODEL = "model_weights"
_ATTRIBUTES = ("layer_names", "backend", "keras_version")


def read_hdf(file: BinaryIO, shown: str) -> Arrays:
    """The numbers of every dataset by its path; of a whole model only those of its weights.

    Raises:
        InputError: h5py is not installed; a dataset is a link, is kept in another file, needs a plug-in, claims
            more than it stores, or holds no numbers; the file is damaged.
    """
    h5py = _h5py(shown)
    try:
        with h5py.File(file, "r") as opened:
            return _read(h5py, opened)
    except InputError as error:
        raise InputError(f"{shown}: {error}") from error
    except Exception as error:  # h5py turns the library's errors into many types
        reason = printable(str(error).splitlines()[0] if str(error) else type(error).__name__, 120)
        raise InputError(f"{shown}: this is no HDF5 file, or a damaged one ({reason})") from error


def _h5py(shown: str) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise InputError(f"{shown}: reading it needs h5py: pip install h5py") from error
    return h5py


def _read(h5py: Any, opened: Any) -> Arrays:
    specs: dict[str, Spec] = {}
    data: dict[str, memoryview] = {}
    seen: set[Any] = set()
    root = opened["/"]
    if type(opened.get(_MODEL, getlink=True)) is h5py.HardLink and isinstance(opened[_MODEL], h5py.Group):
        root = opened[_MODEL]
    waiting = deque([("", root)])
    while waiting:
        prefix, group = waiting.popleft()
        for key in group:
            name = f"{prefix}{key}"
            what = f"'{printable(name)}'"
            if type(group.get(key, getlink=True)) is not h5py.HardLink:
                raise InputError(f"{what} is a link, not a weight")
            found = group[key]
            address = h5py.h5o.get_info(found.id).addr
            if address in seen:
                raise InputError(f"{what} is there twice under two names")
            seen.add(address)
            if len(seen) > MOST_OBJECTS:
                raise InputError(f"it has more than {MOST_OBJECTS} parts; no model does")
            if isinstance(found, h5py.Group):
                waiting.append((f"{name}/", found))
            else:
                specs[name], data[name] = _numbers(h5py, found, what)
    listed = [f"{layer}/{name}" for layer in root for name in _listed(root[layer])]
    order = [*(name for name in listed if name in specs), *specs]
    return Arrays({name: specs[name] for name in order}, data)


def _listed(group: Any) -> list[str]:
    """The weights of a layer in the order in which Keras hands them out."""
    names = group.attrs.get("weight_names", ())
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def _numbers(h5py: Any, dataset: Any, what: str) -> tuple[Spec, memoryview]:
    if not isinstance(dataset, h5py.Dataset) or dataset.shape is None:
        raise InputError(f"{what} is no array")
    if dataset.external or dataset.is_virtual:
        raise InputError(f"{what} is kept in another file")
    code = code_of(dataset.dtype.newbyteorder("=")) if dataset.dtype.kind in "biufc" else None
    if code is None:
        raise InputError(f"{what} holds no numbers that a checkpoint has")
    creation = dataset.id.get_create_plist()
    if any(creation.get_filter(i)[0] not in _FILTERS for i in range(creation.get_nfilters())):
        raise InputError(f"{what} is compressed in a way that Keras does not use")
    count = prod(map(int, dataset.shape))
    # A chunk is unpacked whole, however little of it is used.
    declared = max(count, prod(map(int, dataset.chunks or ()))) * int(dataset.dtype.itemsize)
    stored = int(dataset.id.get_storage_size())
    if declared > max(_SMALL, _EXPANSION * stored):
        raise InputError(
            f"{what} says that it has {size_in_words(declared)} but stores {size_in_words(stored)}, as a "
            "decompression bomb would"
        )
    numbers = np.ascontiguousarray(dataset[()], dtype=raw_dtype(code)).reshape(-1)
    return Spec(code, tuple(map(int, dataset.shape))), numbers.view(np.uint8).data


def write_hdf(source: Path, target: Path, arrays: NewArrays) -> None:
    """A file of weights with the layers of ``source``, which :func:`read_hdf` has read, and these weights in them.

    Raises:
        InputError: a weight belongs to no layer of the source.
    """
    h5py = _h5py(printable(target))
    with h5py.File(source, "r") as old, h5py.File(target, "w") as new:
        before = old.get(_MODEL, old)
        for name in _ATTRIBUTES:
            if name in before.attrs:
                new.attrs[name] = before.attrs[name]
        listed: dict[str, list[str]] = {layer: [] for layer in before}
        groups = {layer: new.create_group(layer) for layer in listed}
        for name, spec in arrays.specs.items():
            layer, _, inner = name.partition("/")
            if layer not in groups or not inner:
                raise InputError(f"'{printable(name)}' belongs to no layer of {printable(source)}")
            listed[layer].append(inner)
            array = np.frombuffer(arrays.data[name], raw_dtype(spec.dtype)).reshape(spec.shape)
            groups[layer].create_dataset(inner, data=array)
        for layer, group in groups.items():
            group.attrs["weight_names"] = [name.encode() for name in _as_keras_orders(listed[layer])]


# The order of a layer's weights among themselves: Addons' gain first, what does not train last.
_RANKS = {"g": 0, "kernel": 1, "recurrent_kernel": 2, "initialized": 4}


def _as_keras_orders(names: list[str]) -> list[str]:
    """Keras hands a file's weights out by their order. Addons changes that of a recurrent layer's kernels."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name.rpartition("/")[0], []).append(place)
    ordered = list(names)
    for own in places.values():
        ranked = sorted((names[place] for place in own), key=_rank)
        for place, name in zip(own, ranked, strict=True):
            ordered[place] = name
    return ordered


def _rank(name: str) -> int:
    return _RANKS.get(name.rpartition("/")[2].removesuffix(":0"), 3)
