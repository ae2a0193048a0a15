"""Weights of TensorFlow Addons, as Keras 2 writes them; and HDF5 files that only look like that.

``data/tf_addons.h5`` was written by TensorFlow Addons 0.23 (TensorFlow 2.14) after three steps of training, and
``data/tf_addons.npz`` holds the kernels that its layers then computed with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from safetensors.numpy import load_file

import refold
from refold.errors import InputError

DATA = Path(__file__).parent / "data"
KERNELS = {
    "conv": "conv/conv/kernel:0",
    "dense": "dense/dense/kernel:0",
    "lstm": "lstm/lstm/lstm_cell/recurrent_kernel:0",
}


def test_kernels_are_those_that_addons_computes_with(tmp_path: Path) -> None:
    done = refold.convert(DATA / "tf_addons.h5", tmp_path / "plain.safetensors")
    assert {entry["name"] for entry in done.converted} == set(KERNELS.values())
    plain = load_file(tmp_path / "plain.safetensors")
    with np.load(DATA / "tf_addons.npz") as computed:
        for layer, name in KERNELS.items():
            np.testing.assert_allclose(plain[name], computed[layer], rtol=5e-7)
    # No gain, no flag and no copy of the untrained layer is left.
    assert sorted(plain) == sorted(
        [*KERNELS.values(), "conv/conv/bias:0", "dense/dense/bias:0", "lstm/lstm/lstm_cell/bias:0",
         "lstm/lstm/lstm_cell/kernel:0", "plain/plain/bias:0", "plain/plain/kernel:0"]
    )  # fmt: skip


def listed(path: Path) -> dict[str, list[str]]:
    with h5py.File(path) as file:
        return {layer: [str(name) for name in file[layer].attrs["weight_names"]] for layer in file}


def test_files_are_as_keras_reads_them(tmp_path: Path) -> None:
    """Keras goes by the order of the layers and of each one's weights."""
    refold.convert(DATA / "tf_addons.h5", tmp_path / "plain.h5")
    found = {
        layer: [name.rpartition("/")[2] for name in names] for layer, names in listed(tmp_path / "plain.h5").items()
    }
    assert found["conv"] == found["dense"] == found["plain"] == ["kernel:0", "bias:0"]
    assert found["lstm"] == ["kernel:0", "recurrent_kernel:0", "bias:0"]
    with h5py.File(tmp_path / "plain.h5") as new, h5py.File(DATA / "tf_addons.h5") as old:
        assert list(new.attrs["layer_names"]) == list(old.attrs["layer_names"])
    refold.convert(
        tmp_path / "plain.h5", tmp_path / "again.h5", "tf-addons", axes=["conv/*kernel:0=-1", "dense/*kernel:0=-1"]
    )
    found = listed(tmp_path / "again.h5")
    assert found["dense"] == ["dense/g:0", "dense/kernel:0", "dense/bias:0", "dense/initialized:0"]
    assert found["plain"] == ["plain/kernel:0", "plain/bias:0"]
    refold.convert(tmp_path / "again.h5", tmp_path / "back.safetensors")
    refold.convert(tmp_path / "plain.h5", tmp_path / "plain.safetensors")
    plain = load_file(tmp_path / "plain.safetensors")
    for name, array in load_file(tmp_path / "back.safetensors").items():
        np.testing.assert_allclose(array, plain[name], rtol=3e-7)


def test_weights_of_a_whole_model(tmp_path: Path) -> None:
    with h5py.File(DATA / "tf_addons.h5") as old, h5py.File(tmp_path / "model.h5", "w") as new:
        old.copy(old["/"], new, "model_weights")
        new.attrs["model_config"] = "{}"
    refold.convert(tmp_path / "model.h5", tmp_path / "a.safetensors")
    refold.convert(DATA / "tf_addons.h5", tmp_path / "b.safetensors")
    one, two = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert set(one) == set(two)
    assert all(np.array_equal(one[name], two[name]) for name in one)


def faulty(kind: str, path: Path) -> None:
    with h5py.File(path, "w") as file:
        group = file.create_group("d")
        match kind:
            case "a soft link":
                group["kernel"] = h5py.SoftLink("/elsewhere")
            case "a link to another file":
                group["kernel"] = h5py.ExternalLink("/etc/passwd", "/")
            case "a linked model":
                file["model_weights"] = h5py.ExternalLink("/etc/passwd", "/")
            case "external storage":
                group.create_dataset("kernel", (4,), "u1", external=[("/etc/passwd", 0, 4)])
            case "virtual storage":
                layout = h5py.VirtualLayout((4,), "f4")
                layout[:] = h5py.VirtualSource("other.h5", "x", (4,))
                group.create_virtual_dataset("kernel", layout)
            case "a bomb":
                group.create_dataset("kernel", (30_000, 30_000), "f4", chunks=(1000, 1000), compression="gzip")
            case "words":
                group["kernel"] = ["a", "b"]
            case "two names of one":
                group["kernel"] = np.zeros(4)
                group["again"] = group["kernel"]
            case "a cycle":
                group["inner"] = group


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("a soft link", "is a link"),
        ("a link to another file", "is a link"),
        ("a linked model", "is a link"),
        ("external storage", "kept in another file"),
        ("virtual storage", "kept in another file"),
        ("a bomb", "decompression bomb"),
        ("words", "holds no numbers"),
        ("two names of one", "twice under two names"),
        ("a cycle", "twice under two names"),
    ],
)
def test_hostile_files(kind: str, sentence: str, tmp_path: Path) -> None:
    faulty(kind, tmp_path / "a.h5")
    with pytest.raises(InputError, match=sentence):
        refold.convert(tmp_path / "a.h5", tmp_path / "b.safetensors")


def test_damaged_files(tmp_path: Path) -> None:
    whole = (DATA / "tf_addons.h5").read_bytes()
    path: Any = tmp_path / "a.h5"
    for part in range(16):
        path.write_bytes(whole[: max(8, len(whole) * part // 16)])
        with pytest.raises(InputError, match="damaged"):
            refold.convert(path, tmp_path / "b.safetensors")
