"""The certificate on Keras models: right folds are proved, wrong ones are refuted where they are wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from test_fold import example_of
from zoo import ZOO, Entry, functional, randomize, repvgg

import refold
from refold.proof.certificate import Certificate, Verdict


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_every_fold_of_the_zoo_is_proved(entry: Entry) -> None:
    model, example = entry.build(), example_of(entry.name)
    certificate = refold.prove(model, refold.fold(model, example), example)
    assert certificate.ok, certificate
    assert certificate.verdict is Verdict.PROVED, certificate


def test_a_norm_passes_through_an_interpolation_where_that_can_be_proved() -> None:
    """TensorFlow has none in float64."""

    def body(x: Any) -> Any:
        y = layers.UpSampling2D(2, interpolation="bilinear")(layers.Conv2D(6, 3)(x))
        return layers.Softmax()(layers.BatchNormalization()(y))

    model = randomize(functional((8, 8, 4), body))
    plain = refold.fold(model)
    assert refold.inspect(plain).before.operators == (4 if keras.config.backend() == "tensorflow" else 3)
    assert refold.prove(model, plain).verdict is Verdict.PROVED


def two_blocks() -> Any:
    def body(x: Any) -> Any:
        x = layers.ReLU()(repvgg(x, 4))
        x = layers.ReLU()(repvgg(x, 4))
        return layers.Dense(3)(layers.Flatten()(x))

    return functional((6, 6, 4), body)


def change(index: int, edit: Callable[[np.ndarray], Any]) -> Callable[[Any], Any]:
    def damage(plain: Any) -> Any:
        weights = [np.array(w) for w in plain.get_weights()]
        edited = edit(weights[index])
        weights[index] = weights[index] if edited is None else edited
        plain.set_weights(weights)
        return plain

    return damage


def one_weight(w: np.ndarray) -> None:
    w.flat[5] *= 1 + 1e-5


def swapped(w: np.ndarray) -> np.ndarray:
    return w[..., [1, 0, 2, 3]]


def not_a_number(w: np.ndarray) -> None:
    w.flat[0] = np.nan


FAULTS: dict[str, Callable[[Any], Any]] = {
    "one weight off by 1e-5": change(2, one_weight),
    "kernel transposed": change(2, lambda w: np.swapaxes(w, 0, 1)),
    "input and output channels swapped": change(2, lambda w: np.swapaxes(w, 2, 3)),
    "two channels swapped": change(2, swapped),
    "bias dropped": change(3, lambda w: np.zeros_like(w)),
    "bias doubled": change(3, lambda w: 2 * w),
    "kernel flipped": change(2, lambda w: w[::-1, ::-1].copy()),
    "a gain of one permille": change(2, lambda w: w * np.float32(1.001)),
    "not a number": change(2, not_a_number),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_fold_is_refuted_where_it_is_damaged(fault: str) -> None:
    model = two_blocks()
    plain = refold.fold(model)
    assert refold.prove(model, plain).ok
    certificate = refold.prove(model, FAULTS[fault](plain))
    assert not certificate.ok
    assert certificate.verdict is Verdict.REFUTED
    wrong = [region.where for region in certificate.regions if region.verdict is Verdict.REFUTED]
    assert wrong == [certificate.regions[1].where]


def test_a_changed_layer_that_was_not_folded_is_noticed() -> None:
    model = two_blocks()
    plain = refold.fold(model)
    certificate = refold.prove(model, change(4, one_weight)(plain))
    assert not certificate.ok


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ({"padding": "same"}, {"padding": "same", "dilation_rate": 2}),
        ({"padding": "same", "strides": 2}, {"padding": "same", "strides": 2, "shift": True}),
        ({"padding": "same"}, {"padding": "same", "groups": 2}),
    ],
)
def test_other_geometry_with_the_same_weights_is_refuted(right: Any, wrong: Any) -> None:
    def build(**options: Any) -> Any:
        shift = options.pop("shift", False)
        x = inputs = keras.Input((8, 8, 4))
        if shift:
            x = layers.ZeroPadding2D(((1, 0), (1, 0)))(x)
            options["padding"] = "valid"
        return keras.Model(inputs, layers.ReLU()(layers.Conv2D(4, 3, **options)(x)))

    one, other = build(**right), build(**wrong)
    weights = [np.array(w) for w in one.get_weights()]
    if other.get_weights()[0].shape == weights[0].shape:
        other.set_weights(weights)
    assert not refold.prove(one, other).ok


def test_bias_before_zero_padding_is_caught_at_the_border() -> None:
    """The trap: merged as if the border did not matter, the interior is equal to the last bit."""
    model = functional((7, 7, 4), lambda x: layers.Conv2D(3, 3, padding="same")(layers.Conv2D(4, 1)(x)))
    inner, outer = (layer.get_weights() for layer in model.layers[1:])
    merged = np.einsum("io,hwop->hwip", inner[0][0, 0], outer[0])
    bias = outer[1] + np.einsum("o,hwop->p", inner[1], outer[0])
    wrong = functional((7, 7, 4), lambda x: layers.Conv2D(3, 3, padding="same")(x))
    wrong.set_weights([merged, bias])
    x = np.random.default_rng(0).normal(size=(1, 7, 7, 4)).astype("float32")
    inside = (slice(None), slice(1, -1), slice(1, -1))
    np.testing.assert_allclose(
        model.predict(x, verbose=0)[inside], wrong.predict(x, verbose=0)[inside], rtol=1e-4, atol=1e-5
    )
    certificate = refold.prove(model, wrong)
    assert certificate.verdict is Verdict.REFUTED


def test_a_removed_activation_is_not_ok() -> None:
    model = functional((6,), lambda x: layers.Dense(3)(layers.ReLU()(layers.Dense(5)(x))))
    other = functional((6,), lambda x: layers.Dense(3)(layers.Dense(5)(x)))
    other.set_weights(model.get_weights())
    certificate = refold.prove(model, other)
    assert not certificate.ok


def test_other_shapes_are_refuted_in_words() -> None:
    one, other = (functional((n,), lambda x: layers.Dense(3)(x)) for n in (4, 5))
    certificate = refold.prove(one, other)
    assert not certificate.ok
    assert any("4" in entry.sentence for entry in certificate.structure)


def test_a_fold_by_hand_is_proved_too() -> None:
    """The models need not come from our fold."""
    model = functional((5,), lambda x: layers.ReLU()(layers.Dense(4)(layers.Dense(8)(x))))
    first, second = (layer.get_weights() for layer in model.layers[1:3])
    exact = [np.asarray(w, dtype=np.float64) for w in (*first, *second)]
    plain = functional((5,), lambda x: layers.ReLU()(layers.Dense(4)(x)))
    plain.set_weights([exact[0] @ exact[2], exact[1] @ exact[2] + exact[3]])
    assert refold.prove(model, plain).verdict is Verdict.PROVED


def test_wide_regions_are_proved_weight_by_weight() -> None:
    model = functional((8, 8, 96), lambda x: layers.ReLU()(repvgg(x, 96)))
    plain = refold.fold(model)
    certificate = refold.prove(model, plain)
    assert certificate.verdict is Verdict.PROVED
    assert not refold.prove(model, change(0, one_weight)(plain)).ok


def test_certificates_are_data_and_can_be_read() -> None:
    model = two_blocks()
    certificate = refold.prove(model, refold.fold(model), seed=3)
    data = json.loads(json.dumps(certificate.to_json()))
    assert Certificate.from_json(data) == certificate
    assert data["verdict"] == "proved"
    assert keras.__version__ == data["versions"]["keras"]
    assert str(certificate).startswith("PROVED: the same function")
    assert refold.prove(model, refold.fold(model), seed=3) == certificate
    with pytest.raises(ValueError, match="certificate"):
        Certificate.from_json({})
