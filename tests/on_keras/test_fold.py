"""Folding Keras models: few operators, the same function, the original untouched."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops
from zoo import ZOO, Branches, Entry, functional, randomize, repvgg

import refold
from refold.keras.frontend import FRONTEND


def example_of(name: str) -> Any:
    shape = (None, 6, 6, 3)
    return {"left": shape, "right": shape} if name.startswith("subclassed") else None


def inputs_of(lifted: Any, seed: int = 1, size: int = 9) -> list[Any]:
    rng = np.random.default_rng(seed)
    shapes = [lifted.graph.values[name].shape for name in lifted.graph.inputs]
    return [rng.normal(size=(2, *(n or size for n in shape[1:]))).astype("float32") for shape in shapes]


def errors(model: Any, plain: Any, example: Any = None, size: int = 9) -> tuple[float, float]:
    """The largest errors of the folded and of the original model against the original's layers in float64,
    relative to the largest output."""
    before, after = FRONTEND.lift(model, example), FRONTEND.lift(plain)
    inputs = inputs_of(before, size=size)
    reference = FRONTEND.evaluate(before, dict(zip(before.graph.inputs, inputs, strict=True)), before.graph.outputs)
    exact = [reference[name] for name in before.graph.outputs]
    scale = max(float(np.abs(array).max()) for array in exact) or 1.0
    folded, original = (
        max(float(np.abs(a - b).max()) for a, b in zip(FRONTEND.run(lifted, inputs), exact, strict=True))
        for lifted in (after, before)
    )
    return folded / scale, original / scale


def assert_same_function(model: Any, plain: Any, example: Any = None, size: int = 9) -> None:
    folded, original = errors(model, plain, example, size)
    assert folded <= max(4 * original, 3e-6)


def operators(model: Any) -> int:
    return sum(not isinstance(operation, layers.InputLayer) for operation in model.operations)


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_zoo_folds_to_its_minimum_and_stays_the_same_function(entry: Entry, tmp_path: Path) -> None:
    model, example = entry.build(), example_of(entry.name)
    plan = refold.inspect(model, example)
    plain = refold.fold(model, example)
    assert operators(plain) == entry.operators
    assert_same_function(model, plain, example)
    assert plan.after.operators <= plan.before.operators
    assert plan.after.multiply_adds <= plan.before.multiply_adds
    kept = [str(kept) for kept in plan.kept]
    for sentence in entry.says:
        assert any(sentence in reason for reason in kept), kept
    assert not refold.inspect(plain).changes_something, "folding a folded model changes nothing"
    floats = sum(int(np.prod(v.shape)) for v in plain.weights if "float" in v.dtype)
    assert floats <= plan.parameters_after


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_original_stays_untouched(entry: Entry) -> None:
    model, example = entry.build(), example_of(entry.name)
    weights = [np.array(w) for w in model.get_weights()]
    nodes = [(len(x._inbound_nodes), len(x._outbound_nodes)) for x in model._flatten_layers()]
    refold.fold(model, example)
    assert [(len(x._inbound_nodes), len(x._outbound_nodes)) for x in model._flatten_layers()] == nodes
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_layer_that_assigns_in_its_call_is_not_changed_by_looking_at_it() -> None:
    class Counts(layers.Layer):
        def build(self, shape: Any) -> None:
            self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

        def call(self, x: Any) -> Any:
            self.calls.assign(self.calls + 1.0)
            return ops.relu(x)

    model = functional((6, 6, 4), lambda x: Counts()(repvgg(x, 4)))
    model.layers[-1].calls.assign(7.0)
    refold.inspect(model)
    refold.fold(model)
    assert float(ops.convert_to_numpy(model.layers[-1].calls)) == 7.0


def test_result_shares_no_variable_with_the_original() -> None:
    model = functional((8, 8, 4), lambda x: layers.Dense(3)(layers.ReLU()(repvgg(x, 4))))
    own = {id(variable) for variable in model.variables}
    assert not own & {id(variable) for variable in refold.fold(model).variables}


def test_what_is_left_alone_keeps_names_and_weights() -> None:
    def body(x: Any) -> Any:
        x = layers.Conv2D(4, 3, name="first", activation="gelu")(x)
        x = layers.ReLU()(repvgg(x, 4))
        return layers.Dense(3, name="head", kernel_regularizer="l2")(layers.Flatten(name="flat")(x))

    model = functional((6, 6, 3), body)
    plain = refold.fold(model)
    for name in ("first", "flat", "head"):
        old, new = model.get_layer(name), plain.get_layer(name)
        assert old.get_config() == new.get_config()
        for a, b in zip(old.get_weights(), new.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


def test_plain_model_loads_where_refold_is_not_installed(tmp_path: Path) -> None:
    model = functional((8, 8, 4), lambda x: layers.Softmax()(Branches(4)(x)[:, ::2, 1:-1, :]))
    plain = refold.fold(model)
    path = tmp_path / "plain.keras"
    plain.save(path)
    with zipfile.ZipFile(path) as archive:
        assert "refold" not in json.dumps(json.loads(archive.read("config.json")))
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    code = (
        "import sys; sys.modules['refold'] = None\n"
        "import keras, numpy as np\n"
        f"m = keras.models.load_model({str(path)!r})\n"
        f"np.save({str(tmp_path / 'y.npy')!r}, m.predict(np.load({str(tmp_path / 'x.npy')!r}), verbose=0))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), plain.predict(x, verbose=0))


@pytest.mark.parametrize("size", [7, 8, 9, 12])
def test_fold_at_an_unknown_size_holds_at_every_size(size: int) -> None:
    def body(x: Any) -> Any:
        x = layers.ReLU()(repvgg(x, 4))
        x = layers.ReLU()(repvgg(x, 6, strides=2, identity=False))
        return layers.Conv2D(3, 3, strides=2)(layers.BatchNormalization()(x))

    model = functional((None, None, 4), body)
    assert_same_function(model, refold.fold(model), size=size)


POLICIES = ["mixed_float16", "mixed_bfloat16", "bfloat16"]
POLICIES += [] if keras.config.backend() == "jax" else ["float64"]  # JAX has none unless told so


@pytest.mark.parametrize("policy", POLICIES)
def test_precision_policies_survive(policy: str) -> None:
    keras.config.set_dtype_policy(policy)
    try:
        model = functional((8, 8, 4), lambda x: layers.ReLU()(repvgg(x, 4)))
    finally:
        keras.config.set_dtype_policy("float32")
    plain = refold.fold(model)
    (conv,) = [layer for layer in plain.layers if isinstance(layer, layers.Conv2D)]
    assert conv.dtype_policy.name == policy
    assert operators(plain) == 2
    folded, original = errors(model, plain)
    assert folded <= 2 * original + 1e-12


def test_precision_that_changes_within_a_chain_is_kept() -> None:
    def body(x: Any) -> Any:
        return layers.Dense(3, dtype="float32")(layers.Dense(8, dtype="mixed_bfloat16")(x))

    model = functional((6,), body)
    plan = refold.inspect(model)
    assert not plan.regions
    assert any("the precision changes from bfloat16 to float32" in str(kept) for kept in plan.kept)


def test_batch_norm_with_batch_statistics_is_named() -> None:
    class Always(layers.Layer):
        def build(self, shape: Any) -> None:
            self.norm = layers.BatchNormalization()
            self.norm.build(shape)

        def call(self, x: Any) -> Any:
            return self.norm(x, training=True)

    model = functional((6, 6, 3), lambda x: Always()(layers.Conv2D(4, 3)(x)))
    plan = refold.inspect(model)
    assert not plan.regions
    assert any("statistics of the batch" in kept.reason for kept in plan.kept)


def test_a_layer_that_cannot_be_traced_is_kept_whole_and_named() -> None:
    model = functional((8, 8, 4), lambda x: repvgg(LooksAtValuesEager()(repvgg(x, 4)), 4))
    plan = refold.inspect(model)
    assert len(plan.regions) == 2
    assert any("its call cannot be traced" in kept.reason for kept in plan.kept)
    assert_same_function(model, refold.fold(model))


class LooksAtValuesEager(layers.Layer):
    """Uses the backend directly, which takes no symbolic tensors of Keras."""

    def call(self, x: Any) -> Any:
        if keras.config.backend() == "tensorflow":
            import tensorflow as tf

            return tf.nn.relu(x)
        if keras.config.backend() == "jax":
            import jax

            return jax.nn.relu(x)
        import torch

        return torch.relu(x)


@pytest.mark.parametrize(
    ("variable", "number"), [("moving_variance", -3.0), ("moving_variance", np.nan), ("gamma", np.inf)]
)
def test_statistics_that_are_no_numbers_are_refused_in_words(variable: str, number: float) -> None:
    model = functional((6, 6, 3), lambda x: layers.BatchNormalization(name="bn")(layers.Conv2D(4, 3)(x)))
    weight = getattr(model.get_layer("bn"), variable)
    values = np.array(keras.ops.convert_to_numpy(weight))
    values[1] = number
    weight.assign(values)
    plan = refold.inspect(model)
    assert not plan.regions
    assert any("not positive, or a statistic is not finite" in kept.reason for kept in plan.kept)


def test_a_gain_that_would_overflow_is_refused_in_words() -> None:
    model = functional((6, 6, 3), lambda x: layers.BatchNormalization(name="bn")(layers.Conv2D(4, 3)(x)))
    model.get_layer("bn").gamma.assign(np.full(4, 3e38))
    model.get_layer("bn").moving_variance.assign(np.full(4, 1e-6))
    plan = refold.inspect(model)
    assert not plan.regions
    assert any("would not be finite" in kept.reason for kept in plan.kept)


def test_an_unbuilt_model_and_a_missing_example_are_one_sentence() -> None:
    class Later(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, x: Any) -> Any:
            return self.dense(x)

    with pytest.raises(refold.InputError, match="is not built"):
        refold.fold(Later())
    model = Later()
    model(np.zeros((1, 4), "float32"))
    with pytest.raises(refold.InputError, match="give an example"):
        refold.fold(model)
    with pytest.raises(refold.InputError, match="neither an array nor a shape"):
        refold.fold(model, "four")
    with pytest.raises(refold.InputError, match="not a model that refold reads"):
        refold.fold(object())
    assert operators(refold.fold(model, (None, 4))) == 1


def test_a_single_layer_folds_too() -> None:
    block = Branches(4)
    block(np.zeros((1, 6, 6, 4), "float32"))
    plain = refold.fold(randomize(block), (None, 6, 6, 4))
    assert operators(plain) == 2


def test_original_trains_on_after_folding() -> None:
    model = functional((8, 8, 4), lambda x: layers.Dense(2)(layers.Flatten()(Branches(4)(x))))
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).normal(size=(16, 8, 8, 4)).astype("float32")
    y = np.zeros((16, 2), "float32")
    model.fit(x, y, epochs=1, verbose=0)
    plain = refold.fold(model)
    first = plain.predict(x, verbose=0)
    model.fit(x, y, epochs=1, verbose=0)
    np.testing.assert_array_equal(first, plain.predict(x, verbose=0))
    plain.compile("sgd", "mse")
    plain.fit(x, y, epochs=1, verbose=0)


def test_plan_is_readable_and_becomes_json() -> None:
    plan = refold.inspect(functional((8, 8, 3), lambda x: layers.Conv2D(4, 3, padding="same")(repvgg(x, 3))))
    text = str(plan)
    assert "kept apart: padding after a convolution with 3 taps is not a convolution at the border" in text
    data = json.loads(json.dumps(plan.to_json()))
    assert data["schema"] == "refold.plan/1"
    assert data["before"]["operators"] > data["after"]["operators"]


def test_operations_of_numbers_and_arrays_fold() -> None:
    def body(x: Any) -> Any:
        y = layers.Dense(6, use_bias=False)(x)
        y = ops.matmul(y - np.arange(6, dtype="float32"), np.ones((6, 5), "float32"))
        return 3.0 - ops.einsum("bi,io->bo", y, np.eye(5, 4, dtype="float32")) / np.array([1, 2, 4, 8], "float32")

    model = functional((4,), body)
    assert operators(refold.fold(model)) == 1
    assert_same_function(model, refold.fold(model))


def test_a_model_with_layers_that_are_not_built_is_refused_and_stays_as_it_is() -> None:
    class Mine(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.conv = layers.Conv2D(4, 3)

        def call(self, x: Any) -> Any:
            return self.conv(x)

    model = Mine()
    with pytest.warns(UserWarning, match="not actually built|not being actually built|unbuilt state"):
        model.build((None, 8, 8, 3))
    with pytest.raises(
        refold.errors.InputError, match=r"not built \(its layer 'conv2d\w*' is not built\): call it"
    ):
        refold.fold(model, (None, 8, 8, 3))
    assert not model.conv.built
