"""A plain Keras model, unfolded to train on, is the same function, in inference and on real data in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import refold
from refold.blocks import BLOCKS
from refold.cli import main
from refold.keras import ExpressionBlock
from refold.verbs import rich_of


def plain() -> Any:
    keras.utils.set_random_seed(0)
    inner = keras.Sequential(
        [keras.Input((None, None, 8)), layers.Conv2D(8, 3, padding="same", name="wide"), layers.Dropout(0.5)],
        name="inner",
    )
    inputs = keras.Input((None, None, 3))
    x = layers.Conv2D(8, 3, padding="same", activation="relu", name="first")(inputs)
    x = layers.DepthwiseConv2D(3, padding="same", bias_initializer="ones", name="depthwise")(x)
    x = inner(x)
    x = layers.Conv2D(8, 3, strides=2, padding="same", name="moving")(x)
    x = layers.Conv2D(4, 1, name="point")(x)
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))


def images() -> Any:
    return (np.random.default_rng(1).normal(size=(8, 8, 8, 3)) * 3 + 1).astype("float32")


def apart(one: Any, two: Any, x: Any, training: bool = False) -> float:
    a = keras.ops.convert_to_numpy(one(x, training=training))
    b = keras.ops.convert_to_numpy(two(x, training=False))
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_computes_the_same_in_inference_and_in_training(block: Any) -> None:
    model, x = plain(), images()
    found = rich_of(model, block.__name__, x)
    assert found.unfolded == ("first", "depthwise", "inner/wide", "point")
    ((where, reason),) = found.kept
    assert where == "moving"
    assert "moves with the size of the input" in reason
    rich = found.model
    assert isinstance(rich.get_layer("inner").layers[0], ExpressionBlock)
    assert apart(rich, model, x) < 1e-6
    rich.get_layer("inner").layers[1].rate = 0.0
    assert apart(rich, model, x, training=True) < 1e-5
    again = refold.unfold(model, block.__name__, x)
    assert all(map(np.array_equal, again.get_weights(), rich_of(model, block.__name__, x).model.get_weights()))


def test_it_trains_saves_and_folds_back(tmp_path: Path) -> None:
    model, x = plain(), images()
    before = model.get_weights()
    rich = refold.unfold(model, "repvgg", x)
    assert apart(rich, model, x) < 1e-6
    rich.compile(keras.optimizers.SGD(0.01), "mse")
    rich.fit(x, np.ones((8, 3), "float32"), verbose=0)
    model.predict(x, verbose=0)  # its weights are its own, whatever happened to the copy's
    assert all(map(np.array_equal, before, model.get_weights()))
    rich.save(tmp_path / "rich.keras")
    loaded = keras.saving.load_model(tmp_path / "rich.keras")
    assert apart(loaded, rich, x) == 0.0
    folded = refold.fold(loaded)
    assert refold.prove(loaded, folded).ok
    kinds = (layers.Conv2D, layers.DepthwiseConv2D)
    assert sum(isinstance(layer, kinds) for layer in folded._flatten_layers()) <= 5


def test_types_and_frozen_layers_stay() -> None:
    model = keras.Sequential([keras.Input((8, 4)), layers.Conv1D(4, 3, padding="same", dtype="mixed_bfloat16")])
    model.layers[0].trainable = False
    rich = refold.unfold(model, "mobileone")
    assert rich.layers[0].dtype_policy.name == "mixed_bfloat16"
    assert not rich.trainable_weights


class Own(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.conv = layers.Conv2D(4, 3, padding="same")

    def call(self, x: Any) -> Any:
        return keras.ops.relu(self.conv(x))


def test_bad_input_is_told_in_words() -> None:
    own = Own()
    own(images())
    with pytest.raises(refold.InputError, match=r"no Functional or Sequential model.*fold it first"):
        refold.unfold(own, "repvgg")
    folded = refold.fold(own, images())
    assert apart(refold.unfold(folded, "repvgg", images()), own, images()) < 1e-6
    with pytest.raises(refold.InputError, match="is not built"):
        refold.unfold(keras.Sequential([layers.Conv2D(2, 3)]), "repvgg")
    with pytest.raises(refold.InputError, match="the model has no convolutions"):
        refold.unfold(keras.Sequential([keras.Input((3,)), layers.Dense(2)]), "repvgg")
    with pytest.raises(refold.InputError, match="nothing was unfolded: conv1d: it reads 3 positions"):
        refold.unfold(keras.Sequential([keras.Input((9, 2)), layers.Conv1D(2, 3, name="conv1d")]), "repvgg")
    with pytest.raises(refold.InputError, match="does not run on the example"):
        refold.unfold(plain(), "repvgg", np.zeros((2, 8, 8, 7), "float32"))


def test_the_command_writes_a_model_to_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target, data = tmp_path / "plain.keras", tmp_path / "rich.keras", tmp_path / "images.npy"
    model = plain()
    model.save(source)
    np.save(data, images())
    command = ["unfold", str(source), "-o", str(target)]
    assert main([*command, "--only", "inner/*", "--data", str(data), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["unfolded"] == ["inner/wide"]
    assert len(found["kept"]) == 4
    assert apart(keras.saving.load_model(target), model, images()) < 1e-6
    assert main(command) == 2
    assert "exists; choose another name, or replace it with --force" in capsys.readouterr().err
    assert main([*command, "--force", "--block", "acnet"]) == 0
    assert "4 convolutions are blocks now; 1 stay as they are" in capsys.readouterr().out

    target.unlink()
    data.write_bytes(b"no array")
    for more, words in (
        (["--data", str(data)], "this is no array of numbers (.npy)"),
        (["--only", "nothing"], "no convolution has a path like nothing"),
    ):
        assert main([*command, *more]) == 2
        assert words in capsys.readouterr().err
    assert main(["unfold", str(source), "-o", str(tmp_path / "rich.pt2")]) == 2
    assert "only a .keras file can be trained on" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.npy", "plain.keras"]
