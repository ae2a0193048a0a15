"""Keras archives that load and are saved, as they were or not at all."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from archives import (
    SOURCE,
    Members,
    archived,
    layer,
    refused,
    refuses,
    same_weights,
    small_model,
    with_config,
    with_weights,
)

from refold.keras.files import load, save
from refold.keras.normalization import WeightNormalization

# ---- what must load ----------------------------------------------------------------------------------


def mixed() -> Any:
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, dtype="mixed_bfloat16")])


def half() -> Any:
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, dtype="bfloat16")])


def nested() -> Any:
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, kernel_regularizer="l2")], name="inner")
    inner.compile("adam", "mse")
    inputs = keras.Input((4,))
    return keras.Model(inputs, [inner(inputs), inner(inputs * 2.0)])


def recurrent() -> Any:
    layers = [
        keras.layers.Bidirectional(keras.layers.LSTM(3, return_sequences=True)),
        keras.layers.TimeDistributed(keras.layers.Dense(2)),
    ]
    return keras.Sequential([keras.Input((5, 2)), *layers])


def attention() -> Any:
    inputs = keras.Input((5,), dtype="int32")
    x = keras.layers.Embedding(11, 4)(inputs)
    return keras.Model(inputs, keras.layers.MultiHeadAttention(2, 2)(x, x))


def preprocessing() -> Any:
    layers = [
        keras.layers.RandomFlip(),
        keras.layers.Normalization(mean=[1.0, 2.0, 3.0], variance=[1.0, 1.0, 1.0]),
        keras.layers.SpectralNormalization(keras.layers.Conv2D(3, 2)),
        keras.layers.Activation(keras.activations.swish),
    ]
    return keras.Sequential([keras.Input((8, 8, 3)), *layers])


def ours() -> Any:
    layers = [
        WeightNormalization(keras.layers.Conv2D(4, 3, padding="same")),
        keras.layers.Flatten(),
        WeightNormalization(keras.layers.Dense(2), normalizer=keras.layers.LayerNormalization()),
    ]
    return keras.Sequential([keras.Input((4, 4, 2)), *layers])


def weightless() -> Any:
    return keras.Sequential([keras.Input((4,)), keras.layers.ReLU()])


@pytest.mark.parametrize(
    "make", [small_model, mixed, half, nested, recurrent, attention, preprocessing, ours, weightless]
)
def test_what_is_saved_loads_with_the_same_weights(tmp_path: Path, make: Callable[[], Any]) -> None:
    model = make()
    save(model, tmp_path / "model.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load(tmp_path / "model.keras")
    assert same_weights(model, loaded)
    assert [path.name for path in tmp_path.iterdir()] == ["model.keras"]


def test_a_model_with_assets_loads(tmp_path: Path) -> None:
    if keras.backend.backend() != "tensorflow":
        pytest.skip("text layers need TensorFlow")
    words = keras.layers.StringLookup(vocabulary=["one", "two"])
    model = keras.Sequential([keras.Input((1,), dtype="string"), words, keras.layers.Embedding(4, 2)])
    save(model, tmp_path / "model.keras")
    assert load(tmp_path / "model.keras").layers[0].get_vocabulary() == words.get_vocabulary()


def test_a_recompressed_archive_and_nan_weights_load(tmp_path: Path, members: Members) -> None:
    def poison(file: Any) -> None:
        file["layers/conv2d/vars/0"][0, 0] = np.nan

    path = archived(tmp_path / "m.keras", with_weights(members, poison), zipfile.ZIP_DEFLATED)
    assert np.isnan(load(path).get_weights()[0]).any()


def test_loading_leaves_nothing_behind_in_keras(tmp_path: Path, members: Members) -> None:
    path = archived(tmp_path / "m.keras", members)

    def huge(config: Any) -> None:
        layer(config, "head")["config"]["units"] = 10**9

    refuses(archived(tmp_path / "huge.keras", with_config(members, huge)), "parameters")
    load(path)
    # A variable of the refused model would be made now, all of its gigabytes.
    with keras.StatelessScope():
        pass
    assert load(path).count_params() == small_model().count_params()


def test_strange_names_of_layers_load_and_make_no_path(tmp_path: Path, members: Members) -> None:
    strange = "<script>\x1b[2J\u202e" + "n" * 100_000

    def rename(config: Any) -> Any:
        return json.loads(json.dumps(config).replace('"conv"', json.dumps(strange)))

    load(archived(tmp_path / "m.keras", with_config(members, rename)))

    def climb(config: Any) -> Any:
        return json.loads(json.dumps(config).replace('"conv"', '"../../\\u001b[2J"'))

    refuses(archived(tmp_path / "c.keras", with_config(members, climb)), "\\x1b")


# ---- saving ------------------------------------------------------------------------------------------


def test_saving_replaces_only_on_request(tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / "m.keras"
    save(model, path)
    before = path.read_bytes()
    with refused("m.keras", "exists already"):
        save(model, path)
    assert path.read_bytes() == before
    path.chmod(0o640)
    save(model, path, overwrite=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [found.name for found in tmp_path.iterdir()] == ["m.keras"]


@pytest.mark.parametrize("name", ["model", "model.h5", "model.keras.zip", ".keras"])
def test_saving_needs_the_right_ending(tmp_path: Path, name: str) -> None:
    with refused(name, ".keras"):
        save(small_model(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_saved_leaves_the_old_file(tmp_path: Path) -> None:
    class Unsaved(keras.Layer):
        def call(self, x: Any) -> Any:
            return x

        def get_config(self) -> Any:
            raise NotImplementedError("not written\nyet")

    path = tmp_path / "m.keras"
    path.write_bytes(b"old")
    with refused("m.keras", "cannot save", "not written"):
        save(keras.Sequential([keras.Input((2,)), Unsaved()]), path, overwrite=True)
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["m.keras"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    save(small_model(), path)
    before = path.read_bytes()
    code = f"""
import resource, sys
sys.path.insert(0, {SOURCE!r})
import keras
from refold.errors import InputError
from refold.keras.files import save
model = keras.Sequential([keras.Input((100,)), keras.layers.Dense(100)])
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    save(model, sys.argv[1], overwrite=True)
except InputError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert "cannot be written" in ran.stdout
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["m.keras"]
