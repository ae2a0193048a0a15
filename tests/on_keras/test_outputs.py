"""Dense layers that normalize what comes out, against the same layers with their effective kernel."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from kinds import BACKEND, close, gradients, image, number

from refold.keras import WeightNormalization
from refold.weights import METHODS

SMALL_MODELS = True  # see conftest.py
SETTINGS = {
    "default": {},
    "nothing": {"gain": False, "offset": False},
    "all": {"gain": True, "offset": True},
}
X = image(2, 3, 24)


def built(name="unit", layer=None, shape=X.shape, **settings):
    wrapped = WeightNormalization(layer or layers.Dense(20, activation="tanh"), name, **settings)
    wrapped.build(shape)
    for variable in wrapped.trainable_variables:
        variable.assign(ops.convert_to_tensor(variable) + 0.1 * ops.convert_to_tensor(image(*variable.shape)))
    return wrapped


def by_the_kernel(wrapped, x):
    out = ops.matmul(x, wrapped.effective_kernel()) + ops.convert_to_tensor(wrapped.layer.bias)
    return ops.tanh(out)


@pytest.fixture
def made_outputs(monkeypatch):
    """How many calls normalized their output."""
    made = []
    called = WeightNormalization._called_by_outputs
    monkeypatch.setattr(
        WeightNormalization, "_called_by_outputs", lambda self, x: made.append(x.shape) or called(self, x)
    )
    return made


@pytest.mark.filterwarnings("ignore:Weight normalization")
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_outputs_and_gradients_are_those_of_the_effective_kernel(name, settings, made_outputs):
    wrapped = built(name, **SETTINGS[settings])
    close(wrapped(X, training=True), by_the_kernel(wrapped, X), 3e-6)
    weights = ops.convert_to_tensor(image(2, 3, 20))
    variables = wrapped.trainable_variables
    found = gradients(lambda: ops.sum(wrapped(X, training=True) * weights), variables)
    wanted = gradients(lambda: ops.sum(by_the_kernel(wrapped, X) * weights), variables)
    assert len(made_outputs) == 2
    for one, other in zip(found, wanted, strict=True):
        close(one, other, 1e-5 * max(1, np.max(np.abs(other))))


@pytest.mark.filterwarnings("ignore:.*no direction")
@pytest.mark.parametrize("name", sorted(METHODS))
def test_extreme_rows_are_finite_forward_and_backward(name, made_outputs):
    pattern = np.array([1.0, -2.0, 3.0, -4.0, 5.0, 0.5])[:, None]
    sizes = np.array([0.0, 1e-45, 1e-40, 1e-30, 1.0, 1e30, 1e37])
    layer = layers.Dense(len(sizes), use_bias=False)
    layer.build((None, 6))
    layer.kernel.assign((pattern * sizes).astype("float32"))
    wrapped = WeightNormalization(layer, name, epsilon=0.0)
    x = np.asarray(image(3, 6))
    made = number(wrapped(x, training=True))
    exact = x.astype("float64") @ np.where(sizes < 1e-38, 0, pattern * sizes)
    assert np.all(np.abs(made - exact) <= 2e-6 * np.abs(x).sum(-1, keepdims=True) * 5 * sizes)
    weigh = ops.convert_to_tensor((image(3, 7) / np.maximum(sizes, 1)).astype("float32"))
    for found in gradients(lambda: ops.sum(wrapped(x, training=True) * weigh), [layer.kernel, wrapped.gain]):
        assert np.all(np.isfinite(found))
    assert made_outputs


class Own(layers.Dense):
    """A layer whose call may be any."""


@pytest.mark.parametrize(
    ("make", "x", "training"),
    [
        (lambda: layers.Dense(20), X, False),
        (lambda: layers.Dense(20), X, None),
        (lambda: layers.Dense(2), X, True),
        (lambda: layers.Dense(20), image(40, 24), True),
        (lambda: layers.Dense(20, dtype="mixed_float16"), X, True),
        (lambda: layers.Dense(20, dtype="bfloat16"), X, True),
        (lambda: layers.Dense(20, activity_regularizer="l2"), X, True),
        (lambda: Own(20), X, True),
        (lambda: layers.EinsumDense("abc,cd->abd", (3, 20)), X, True),
    ],
    ids=["inference", "not said", "few units", "many inputs", "mixed", "half", "regularized", "own", "einsum"],
)
def test_everything_else_is_called_with_the_kernel(make, x, training, made_outputs):
    wrapped = WeightNormalization(make())
    wrapped(x, training=training)
    assert not made_outputs


def test_an_axis_that_somebody_chose_is_kept(made_outputs):
    wrapped = built(axis=0)
    close(wrapped(X, training=True), by_the_kernel(wrapped, X), 3e-6)
    assert not made_outputs


def test_fitting_goes_by_outputs_where_the_batch_is_known(made_outputs):
    inputs = keras.Input(batch_shape=(2, 24))
    wrapped = WeightNormalization(layers.Dense(20))
    model = keras.Model(inputs, wrapped(inputs))
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=BACKEND == "jax")
    gain = number(wrapped.gain)
    model.fit(image(4, 24), image(4, 20), batch_size=2, verbose=0)
    assert np.all(number(wrapped.gain) != gain)
    if BACKEND == "torch":  # the others compile, and may know less of the batch
        assert made_outputs
    close(model.predict(image(4, 24), batch_size=2, verbose=0), wrapped(image(4, 24), training=True), 1e-5)
