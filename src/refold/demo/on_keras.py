"""The demo's network in Keras."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np

from refold.demo import Digits, Report
from refold.keras import RepVGGBlock, WeightNormalization, files

ENDING = ".keras"


def words() -> str:
    """The framework in words."""
    return f"Keras on {keras.config.backend()}"


def arranged(pixels: Any) -> Any:
    """Images ``(count, 8, 8)`` with their one channel last."""
    return pixels[..., None]


def network() -> Any:
    """RepVGG blocks with learnable branch scales, and a weight-normalized head with LayerNormalization."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((8, 8, 1), name="image")
    for index, (filters, strides) in enumerate([(16, 1), (16, 1), (32, 2), (32, 1), (32, 1)]):
        x = RepVGGBlock(filters, strides=strides, alpha=True, momentum=0.9, name=f"block{index + 1}")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    x = WeightNormalization(keras.layers.Dense(64, activation="relu", name="hidden"), name="normalized")(x)
    x = keras.layers.LayerNormalization(name="layer_norm")(x)
    return keras.Model(inputs, keras.layers.Dense(10, name="digit")(x), name="digits")


def size(model: Any) -> int:
    """The number of its parameters."""
    return int(model.count_params())


def train(model: Any, train: Digits, test: Digits, epochs: int, report: Report) -> None:
    """Train with Adam in batches of 64."""
    steps = epochs * -(-len(train[0]) // 64)
    model.compile(
        optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(3e-3, steps)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    callback = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: report(epoch + 1, logs["loss"], logs["val_accuracy"])
    )
    model.fit(*train, batch_size=64, epochs=epochs, validation_data=test, verbose=0, callbacks=[callback])


def scores(model: Any, images: Any) -> Any:
    """The scores ``(count, 10)`` of the digits."""
    return model.predict(images, verbose=0)


def scales(model: Any) -> dict[str, float]:
    """The learnable branch scales, by block."""
    return {layer.name: float(np.asarray(layer.alpha)) for layer in model.layers if hasattr(layer, "alpha")}


def save(model: Any, path: Path) -> None:
    """Write a model, in the place of an earlier one."""
    files.save(model, path, overwrite=True)
