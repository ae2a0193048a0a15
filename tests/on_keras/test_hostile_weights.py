"""Weights in Keras archives that are no weights, or lie elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from archives import (
    WEIGHTS,
    Members,
    archived,
    refuses,
    with_weights,
)

from refold.keras.files import load

# ---- weights -----------------------------------------------------------------------------------------

KERNEL = "layers/conv2d/vars/0"


def external_link(file: Any) -> None:
    del file[KERNEL]
    file[KERNEL] = h5py.ExternalLink("/etc/passwd", "/")


def external_group(file: Any) -> None:
    del file["layers/conv2d"]
    file["layers/conv2d"] = h5py.ExternalLink("other.h5", "/layers/conv2d")


def soft_link(file: Any) -> None:
    del file[KERNEL]
    file[KERNEL] = h5py.SoftLink("/layers/dense/vars/0")


def external_storage(file: Any) -> None:
    shape = file[KERNEL].shape
    del file[KERNEL]
    file.create_dataset(KERNEL, shape, "float32", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])


def virtual(file: Any) -> None:
    shape = file[KERNEL].shape
    del file[KERNEL]
    layout = h5py.VirtualLayout(shape, "float32")
    layout[:] = h5py.VirtualSource("other.h5", "x", shape=shape)
    file.create_virtual_dataset(KERNEL, layout)


def strings(file: Any) -> None:
    del file[KERNEL]
    file.create_dataset(KERNEL, (3,), h5py.string_dtype())


def compound(file: Any) -> None:
    file.create_dataset("layers/more", (3,), np.dtype([("a", "f4"), ("b", "i4")]))


def named_type(file: Any) -> None:
    file["layers/more"] = np.dtype("float32")


def scale_offset(file: Any) -> None:
    file.create_dataset("layers/more", (30,), "int32", scaleoffset=True)


def null(file: Any) -> None:
    file["layers/more"] = h5py.Empty("float32")


def wrong_shape(file: Any) -> None:
    del file[KERNEL]
    file[KERNEL] = np.zeros((3, 3, 3, 5), "float32")


def missing(file: Any) -> None:
    del file[KERNEL]


def missing_layer(file: Any) -> None:
    del file["layers/conv2d"]


def escapes(file: Any) -> None:
    file["layers/\x1b[2J"] = h5py.SoftLink("/layers")


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (external_link, "a link to another file"),
        (external_group, "a link to another file"),
        (soft_link, "a soft link"),
        (external_storage, "in another file"),
        (virtual, "in another file"),
        (strings, "no numbers"),
        (compound, "no numbers"),
        (null, "no numbers"),
        (named_type, "no array"),
        (scale_offset, "compressed in a way"),
        (wrong_shape, "conv"),
        (missing, "conv"),
        (missing_layer, "conv"),
        (escapes, "\\x1b[2J"),
    ],
)
def test_weights_that_are_no_weights(
    tmp_path: Path, members: Members, change: Callable[[Any], None], fragment: str
) -> None:
    refuses(archived(tmp_path / "m.keras", with_weights(members, change)), fragment)


def test_weights_that_contain_themselves(tmp_path: Path, members: Members) -> None:
    def loop(file: Any) -> None:
        file["layers/conv2d/again"] = file["layers"]

    load(archived(tmp_path / "m.keras", with_weights(members, loop)))


@pytest.mark.parametrize("content", [b"", b"no weights", b"\x89HDF\r\n\x1a\n", b"PK\x05\x06" + bytes(18)])
def test_weights_that_are_no_hdf5(tmp_path: Path, members: Members, content: bytes) -> None:
    refuses(archived(tmp_path / "m.keras", members | {WEIGHTS: content}), "weights are damaged")
