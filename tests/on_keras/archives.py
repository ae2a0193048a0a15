"""A small Keras archive, ways to damage it, and what a refusal of it must look like."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

import refold
from refold.keras.files import load
from refusing import refused

SOURCE = str(Path(refold.__file__).parents[1])
MIB = 2**20
WEIGHTS = "model.weights.h5"
Members = dict[str, bytes]


def small_model() -> Any:
    inputs = keras.Input((6, 6, 3))
    x = keras.layers.Conv2D(4, 3, activation="relu", name="conv")(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.ops.add(x, keras.ops.relu(x)) * 2.0
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x), name="small")
    model.compile("sgd", "mse")
    return model


def archived(path: Path, members: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression, compresslevel=1) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def with_config(members: Members, change: Callable[[Any], Any]) -> Members:
    config = json.loads(members["config.json"])
    changed = change(config)
    return members | {"config.json": json.dumps(config if changed is None else changed).encode()}


def with_weights(members: Members, change: Callable[[Any], Any]) -> Members:
    content = io.BytesIO(members[WEIGHTS])
    with h5py.File(content, "r+") as file:
        change(file)
    return members | {WEIGHTS: content.getvalue()}


def layer(config: Any, name: str = "conv") -> Any:
    return next(found for found in config["config"]["layers"] if found["name"] == name)


def refuses(path: Path, *fragments: str, **options: Any) -> None:
    """``path`` is refused in a sentence that names it, and nothing beside it changes."""
    before = sorted(path.parent.iterdir())
    with refused(path.name, *fragments):
        load(path, **options)
    assert sorted(path.parent.iterdir()) == before


def same_weights(left: Any, right: Any) -> bool:
    pairs = zip(left.get_weights(), right.get_weights(), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)
