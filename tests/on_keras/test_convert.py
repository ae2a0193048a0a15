"""``refold convert`` on files of Keras 3: models and weights, both ways, without making a model."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from keras import layers
from kinds import close, image, number

import refold
from refold.cli import main
from refold.errors import InputError
from refold.keras import (
    LowRankAdaptation,
    OrthogonalWeights,
    RepVGGBlock,
    SpectralNormalization,
    WeightNormalization,
)
from refold.keras.checkpoints import snake_case
from refold.weights import Centered

SMALL_MODELS = True  # see conftest.py
pytestmark = pytest.mark.filterwarnings("ignore:Weight normalization")


def network() -> Any:
    """Several kinds of layer, wrapped and plain of one class mixed, one inside a model, one over steps."""
    inner = keras.Sequential(
        [
            keras.Input((4, 4)),
            WeightNormalization(layers.Conv1D(3, 2), Centered(activation="relu")),
            layers.Conv1D(3, 1),
        ]
    )
    entry = keras.Input((5, 6))
    x = layers.Dense(4, name="first")(entry)
    x = layers.TimeDistributed(WeightNormalization(layers.Dense(4), "layer", 1e-5))(x)
    x = layers.Activation("relu")(WeightNormalization(layers.SeparableConv1D(4, 2), "rms")(x))
    x = WeightNormalization(layers.LSTM(4, return_sequences=True))(inner(x)[:, :3])
    x = WeightNormalization(layers.Dense(2, activation="tanh"), "unit", gain=False, name="bounded")(x)
    return keras.Model(entry, layers.Dense(2, name="last")(layers.BatchNormalization()(x)))


def disturbed(model: Any) -> Any:
    rng = np.random.default_rng(3)
    for variable in model.weights:
        variable.assign(number(variable) + 0.2 * rng.uniform(0.5, 1.0, variable.shape))
    return model


def test_a_model_becomes_plain(tmp_path: Path) -> None:
    model, x = disturbed(network()), image(3, 5, 6)
    model.compile("adam", "mse", jit_compile=False)
    model.save(tmp_path / "rich.keras")
    done = refold.convert(tmp_path / "rich.keras", tmp_path / "plain.keras")
    assert [entry["units"] for entry in done.converted] == [4, 4, 4, 3, 16, 16, 2]
    assert {entry["from"] for entry in done.converted} == {"refold"}
    with zipfile.ZipFile(tmp_path / "plain.keras") as archive:
        assert "refold" not in archive.read("config.json").decode()
    plain = keras.saving.load_model(tmp_path / "plain.keras")
    assert not any(isinstance(layer, WeightNormalization) for layer in plain._flatten_layers())
    assert [layer.name for layer in plain.layers] == [layer.name for layer in model.layers]
    close(plain(x), number(model(x)), 1e-5)
    # And the weights alone.
    model.save_weights(tmp_path / "rich.weights.h5")
    refold.convert(
        tmp_path / "rich.weights.h5", tmp_path / "plain.weights.h5", architecture=tmp_path / "rich.keras"
    )
    again = keras.models.clone_model(plain)
    again.load_weights(tmp_path / "plain.weights.h5")
    close(again(x), number(model(x)), 1e-5)


@pytest.mark.parametrize("method", ["unit", "centered", "timm-scaled-standardization"])
def test_a_plain_model_becomes_rich_and_computes_the_same(method: str, tmp_path: Path) -> None:
    entry = keras.Input((6, 6, 3))
    x = layers.Conv2D(4, 3, name="conv")(entry)
    x = layers.Conv2DTranspose(3, 2, name="up")(layers.DepthwiseConv2D(2, depth_multiplier=2, name="depth")(x))
    model = disturbed(keras.Model(entry, layers.Dense(2, name="head")(layers.Flatten()(x))))
    model.save(tmp_path / "plain.keras")
    axes = ["conv=-1", "up=2", "depth=2,3", "head=0"]
    done = refold.convert(tmp_path / "plain.keras", tmp_path / "rich.keras", "refold", axes=axes, method=method)
    assert [entry["units"] for entry in done.converted] == [
        4,
        8,
        3,
        model.get_layer("head").kernel.shape[0],
    ]
    rich = keras.saving.load_model(tmp_path / "rich.keras")
    wrapped = [layer for layer in rich.layers if isinstance(layer, WeightNormalization)]
    assert [layer.name for layer in wrapped] == ["conv", "depth", "up", "head"]
    assert [layer.axis for layer in wrapped] == [None, None, None, (0,)]
    assert all(variable.trainable for variable in rich.weights)
    inputs = image(2, 6, 6, 3)
    close(rich(inputs), number(model(inputs)), 1e-5)
    refold.convert(tmp_path / "rich.keras", tmp_path / "back.keras")
    back = keras.saving.load_model(tmp_path / "back.keras")
    assert [layer.name for layer in back.layers] == [layer.name for layer in model.layers]
    for ours, theirs in zip(back.weights, model.weights, strict=True):
        close(ours, theirs, 3e-7)


def attentive(wrap: Any) -> Any:
    """Attention, called in every way, and recurrent layers in both directions; each through ``wrap``."""
    entry = keras.Input((5, 6))
    heads = wrap(layers.MultiHeadAttention(2, 3, output_shape=4, name="heads"))
    x = heads(entry, value=entry, use_causal_mask=True)
    x = wrap(layers.GroupQueryAttention(3, 4, 2, name="grouped"))(query=x, value=x[:, :3], key=x[:, 1:4])
    x = wrap(layers.Bidirectional(layers.LSTM(3, return_sequences=True), name="both"))(x)
    x = wrap(
        layers.Bidirectional(
            layers.GRU(3, return_sequences=True),
            backward_layer=layers.RNN(layers.SimpleRNNCell(3), return_sequences=True, go_backwards=True),
            name="unlike",
        )
    )(x)
    x = wrap(layers.SeparableConv1D(4, 2, name="apart"))(x)
    x = wrap(layers.RNN(layers.GRUCell(3, reset_after=False), name="steps"))(x)
    return keras.Model(entry, wrap(layers.Dense(2, name="head"))(x))


@pytest.mark.parametrize("method", ["unit", "layer"])
def test_attention_and_both_directions_there_and_back(method: str, tmp_path: Path) -> None:
    model, x = disturbed(attentive(lambda layer: layer)), image(3, 5, 6)
    model.save(tmp_path / "plain.keras")
    rich_file = tmp_path / "rich.keras"
    done = refold.convert(tmp_path / "plain.keras", rich_file, "refold", axes=["*=auto"], method=method)
    assert len(done.converted) == 4 + 4 + 4 + 4 + 2 + 2 + 1
    rich = keras.saving.load_model(rich_file)
    normalized = [layer for layer in rich.layers if isinstance(layer, WeightNormalization)]
    assert [layer.name for layer in normalized] == ["heads", "grouped", "both", "unlike", "apart", "steps", "head"]
    close(rich(x), number(model(x)), 1e-5)
    # What code makes is the same.
    code = attentive(lambda layer: WeightNormalization(layer, method, name=layer.name))
    code.set_weights(rich.get_weights())
    close(code(x), number(model(x)), 1e-5)
    disturbed(rich)
    rich.save(tmp_path / "trained.keras")
    refold.convert(tmp_path / "trained.keras", tmp_path / "back.keras")
    back = keras.saving.load_model(tmp_path / "back.keras")
    assert [type(layer) for layer in back.layers] == [type(layer) for layer in model.layers]
    close(back(x), number(rich(x)), 1e-5)


def test_methods_of_whole_matrices_become_plain(tmp_path: Path) -> None:
    entry = keras.Input((6, 6, 3))
    x = SpectralNormalization(layers.SeparableConv2D(4, 2), gain=True, name="sigma")(entry)
    x = SpectralNormalization(layers.Conv2DTranspose(3, 2), epsilon=1e-3, name="spectral")(x)
    x = OrthogonalWeights(layers.Conv2D(5, 2), name="turned")(x)
    x = layers.Reshape((25, 5))(OrthogonalWeights(layers.Dense(5), "exponential", gain=True, name="exponential")(x))
    x = LowRankAdaptation(layers.LSTM(4, return_sequences=True), 2, alpha=3.0, name="adapted")(x)
    x = LowRankAdaptation(layers.MultiHeadAttention(2, 3), 2, magnitude=True, name="attention")(x, x)
    model = disturbed(keras.Model(entry, x))
    model.save(tmp_path / "rich.keras")
    done = refold.convert(tmp_path / "rich.keras", tmp_path / "plain.keras")
    assert len(done.converted) == 2 + 1 + 1 + 1 + 2 + 4
    with zipfile.ZipFile(tmp_path / "plain.keras") as archive:
        assert "refold" not in archive.read("config.json").decode()
    plain, images = keras.saving.load_model(tmp_path / "plain.keras"), image(2, 6, 6, 3)
    assert [layer.name for layer in plain.layers] == [layer.name for layer in model.layers]
    close(plain(images), number(model(images)), 2e-5)
    assert all(variable.trainable for variable in plain.weights if "seed" not in variable.name)  # as a fold's are


def test_what_is_left_stays_to_the_last_bit(tmp_path: Path) -> None:
    model = disturbed(network())
    model.save(tmp_path / "rich.keras")
    done = refold.convert(tmp_path / "rich.keras", tmp_path / "same.keras", skip=["*"])
    assert done.converted == ()
    same = keras.saving.load_model(tmp_path / "same.keras")
    for ours, theirs in zip(same.weights, model.weights, strict=True):
        np.testing.assert_array_equal(number(ours), number(theirs))


def test_the_names_of_groups_are_keras() -> None:
    from keras.src.utils import naming

    for kind in vars(layers).values():
        if isinstance(kind, type):
            assert snake_case(kind.__name__) == naming.to_snake_case(kind.__name__)


# ---- refusals ----------------------------------------------------------------------------------------


def edited(path: Path, change: Any) -> Path:
    """A copy whose configuration ``change`` has changed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    change(config, members)
    members["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path.with_name("edited.keras"), "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path.with_name("edited.keras")


def the_wrapper(config: Any) -> Any:
    return next(entry for entry in config["config"]["layers"] if entry["class_name"] == "WeightNormalization")


def the_adapted(config: Any) -> Any:
    return next(entry for entry in config["config"]["layers"] if entry["class_name"] == "LowRankAdaptation")


def link(config: Any, members: Any) -> None:
    content = io.BytesIO(members["model.weights.h5"])
    with h5py.File(content, "r+") as file:
        del file["layers/dense/vars/0"]
        file["layers/dense/vars/0"] = h5py.ExternalLink("/etc/passwd", "/")
    members["model.weights.h5"] = content.getvalue()


def deep(config: Any, members: Any) -> None:
    for _ in range(300):
        config["config"]["layers"] = [
            {"class_name": "Sequential", "config": {"layers": config["config"]["layers"]}}
        ]


HOSTILE = {
    "no layer inside": (lambda c, m: the_wrapper(c)["config"].update(layer=None), "normalizes no layer"),
    "another class": (
        lambda c, m: the_wrapper(c)["config"]["layer"].update(class_name="Lambda"),
        "is a Lambda, whose weights have no places that are known",
    ),
    "no class": (
        lambda c, m: the_wrapper(c)["config"]["layer"].update(class_name="__class__"),
        "whose weights have no places",
    ),
    "a method that is none": (
        lambda c, m: the_wrapper(c)["config"].update(normalizer="os.system"),
        "no weight normalization named 'os.system'",
    ),
    "parameters of a method": (
        lambda c, m: the_wrapper(c)["config"].update(normalizer={"method": "Centered", "__class__": "x"}),
        "no weight normalization 'Centered' with __class__",
    ),
    "a layer as method": (
        lambda c, m: the_wrapper(c)["config"].update(normalizer={"class_name": "LayerNormalization"}),
        "normalized by a layer of Keras",
    ),
    "an axis": (lambda c, m: the_wrapper(c)["config"].update(axis="x"), "an axis that is none"),
    "an axis too many": (lambda c, m: the_wrapper(c)["config"].update(axis=7), "has no axes"),
    "a gain that is not there": (
        lambda c, m: the_wrapper(c)["config"].update(offset=True),
        "has not the weights that its configuration says",
    ),
    "a rank": (lambda c, m: the_adapted(c)["config"].update(rank=3), "has not the weights that its configuration"),
    "no rank": (lambda c, m: the_adapted(c)["config"].update(rank="x"), "its options are none"),
    "rank 0": (lambda c, m: the_adapted(c)["config"].update(rank=0), "its options are none"),
    "another computed form": (
        lambda c, m: the_adapted(c).update(registered_name="refold>OrthogonalWeights"),
        "its options are none",
    ),
    "no configuration": (lambda c, m: c.pop("config"), "describes no Keras 3 model"),
    "no layers": (lambda c, m: c["config"].update(layers=[1]), "describes no Keras 3 model"),
    "depth": (deep, "nested too deeply"),
    "a link": (link, "is a link"),
    "a member": (lambda c, m: m.update({"../x": b""}), "could leave its folder"),
    "no weights": (lambda c, m: m.update({"model.weights.h5": b"x"}), "no HDF5 file, or a damaged one"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    adapted = LowRankAdaptation(layers.Dense(2), 2)
    model = keras.Sequential([keras.Input((3,)), layers.Dense(3), WeightNormalization(layers.Dense(2)), adapted])
    model.save(tmp_path / "rich.keras")
    change, said = HOSTILE[case]
    path = edited(tmp_path / "rich.keras", change)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=said):
        refold.convert(path, tmp_path / "plain.keras")
    assert sorted(tmp_path.iterdir()) == before


def with_a_mask(config: Any, members: Any) -> None:
    node = config["config"]["layers"][-1]["inbound_nodes"][0]
    node["args"] += [node["args"][0], None]


def test_what_cannot_be_converted_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    block = keras.Sequential([keras.Input((4, 4, 3)), RepVGGBlock(3)])
    rich, weights = tmp_path / "rich.keras", tmp_path / "rich.weights.h5"
    block.save(rich)
    block.save_weights(weights)
    layered = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="d")])
    layered.save(tmp_path / "plain.keras")
    plain = tmp_path / "plain.keras"
    entry = keras.Input((4, 6))
    called = keras.Model(entry, layers.MultiHeadAttention(2, 3, name="a")(entry, entry))
    called.save(tmp_path / "called.keras")
    masked, auto = edited(tmp_path / "called.keras", with_a_mask), ["--to", "refold", "--axis", "*=auto"]
    files = sorted(path.name for path in tmp_path.iterdir())
    for arguments, said in (
        ([masked, "-o", tmp_path / "a.keras", *auto], "is called with masks by their places"),
        ([rich, "-o", tmp_path / "a.keras"], "is or holds a RepVGGBlock; fold it"),
        ([rich, "-o", tmp_path / "a.safetensors"], "from a .keras file comes a .keras file"),
        ([rich, "-o", tmp_path / "a.keras", "--to", "torch"], "can be made plain or refold, not torch"),
        ([rich, "-o", tmp_path / "a.keras", "--method", "unit"], "says itself by which method"),
        ([weights, "-o", tmp_path / "a.weights.h5"], "do not say which layers they belong to"),
        ([plain, "-o", tmp_path / "a.keras", "--to", "refold", "--axis", "d=1/3"], "not one kernel with units"),
        ([plain, "-o", tmp_path / "a.keras", "--architecture", rich], "has its own"),
        ([weights, "-o", tmp_path / "a.keras", "--architecture", rich], "comes a .weights.h5 file"),
    ):
        status = main(["convert", *map(str, arguments)])
        error = capsys.readouterr().err
        assert status == 2
        assert said in error
        assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == files
