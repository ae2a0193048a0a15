"""WeightNormalization of recurrent layers and of attention."""

import keras
import numpy as np
import pytest
from keras import layers
from kinds import close, image, number

import refold
from refold.keras.normalization import WeightNormalization

SMALL_MODELS = True  # see conftest.py
pytestmark = pytest.mark.filterwarnings("error:.*(Weight normalization|no direction)")


RECURRENT = {
    "SimpleRNN": lambda: layers.SimpleRNN(3),
    "GRU": lambda: layers.GRU(3, return_sequences=True),
    "LSTM": lambda: layers.LSTM(3, dropout=0.5),
    "Bidirectional": lambda: layers.Bidirectional(layers.LSTM(3)),
    "RNN": lambda: layers.RNN(layers.GRUCell(3, reset_after=False)),
}


@pytest.mark.parametrize("kind", RECURRENT)
def test_every_gate_of_a_recurrent_layer_is_a_row_of_both_kernels(kind):
    data, layer = image(4, 5, 2), RECURRENT[kind]()
    plain = number(layer(data))
    wrapped = WeightNormalization(layer)
    close(wrapped(data), plain)
    stored = {spec.path: number(wrapped._variable(spec)) for spec in wrapped.specs}
    assert len(stored) == (4 if kind == "Bidirectional" else 2)
    for spec in wrapped.specs:
        variable = wrapped._variable(spec)
        variable.assign(2.0 * number(variable))  # the size of a direction means nothing
        gain = number(getattr(wrapped, spec.prefix + "gain"))
        close(gain, np.linalg.norm(stored[spec.path], axis=0))
    close(wrapped(data), plain)


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_layers_train_save_and_fold(kind, tmp_path):
    data = image(4, 5, 2)
    model = keras.Sequential([keras.Input((5, 2)), WeightNormalization(RECURRENT[kind]()), layers.Dense(2)])
    before = [number(variable) for variable in model.trainable_variables]
    model.compile("sgd", "mse")
    model.fit(data, model.predict(data, verbose=0) + 1.0, verbose=0)
    assert all(
        np.any(number(variable) != old) for variable, old in zip(model.trainable_variables, before, strict=True)
    )
    expected = model.predict(data, verbose=0)
    model.save(tmp_path / "model.keras")
    close(keras.saving.load_model(tmp_path / "model.keras").predict(data, verbose=0), expected)
    plain = refold.fold(model)
    assert not any(type(layer).__module__.startswith("refold") for layer in plain.layers)
    close(plain.predict(data, verbose=0), expected, tolerance=1e-6)


WORDS = ("query", "key", "value", "output")
ATTENTION = {
    "heads": lambda: layers.MultiHeadAttention(2, 3, value_dim=4, dropout=0.5),
    "heads with outputs": lambda: layers.MultiHeadAttention(2, 3, output_shape=(2, 4), use_bias=False),
    "grouped": lambda: layers.GroupQueryAttention(3, 4, 2),
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_every_entry_of_every_head_is_a_row_of_its_projection(kind):
    """Scaling a unit's direction changes nothing; scaling its gain is scaling its column of the projection."""
    query, value, layer = image(2, 4, 6), image(2, 3, 5) + 1, ATTENTION[kind]()
    plain = number(layer(query, value))
    kernels = {f"_{word}_dense.kernel": getattr(layer, f"_{word}_dense").kernel for word in WORDS}
    wrapped = WeightNormalization(layer)
    for call in (
        lambda: wrapped(query, value),
        lambda: wrapped(query, value=value),
        lambda: wrapped([query, value]),
    ):
        close(call(), plain)
    assert set(wrapped.effective_kernels()) == set(kernels)
    for word, (path, kernel) in zip(WORDS, kernels.items(), strict=True):
        inputs = 2 if word == "output" else 1  # an output reads all heads
        units = kernel.shape[inputs:]
        scales = 2.0 ** np.arange(np.prod(units)).reshape(units)
        kernel.assign(number(kernel) * scales)
        close(wrapped(query, value), plain)
        gain = getattr(wrapped, f"{word}_gain")
        before = number(wrapped.effective_kernels()[path])
        gain.assign(number(gain) * scales.reshape(-1))
        close(wrapped.effective_kernels()[path], before * scales)
        gain.assign(number(gain) / scales.reshape(-1))
    with pytest.raises(ValueError, match="masks of an attention layer by name"):
        wrapped(query, value, value, None)


def test_attention_trains_saves_and_folds(tmp_path):
    entry = keras.Input((4, 6))
    masked = layers.Masking()(entry)
    attention, pool = layers.MultiHeadAttention(2, 3), layers.GlobalAveragePooling1D()
    before = keras.Model(entry, pool(attention(masked, masked, use_causal_mask=True)))
    x = WeightNormalization(attention, "layer")(masked, masked, use_causal_mask=True)
    model = keras.Model(entry, pool(x))
    data = image(3, 4, 6)
    data[0, 2:] = 0
    close(model(data), before(data))
    before = [number(variable) for variable in model.trainable_variables]
    assert len(before) == 4 * 4
    model.compile("sgd", "mse")
    model.fit(data, model.predict(data, verbose=0) + 1.0, verbose=0)
    moved = [np.any(number(v) != old) for v, old in zip(model.trainable_variables, before, strict=True)]
    assert sum(moved) >= 15  # the softmax does not see the bias of the keys
    expected = model.predict(data, verbose=0)
    model.save(tmp_path / "model.keras")
    close(keras.saving.load_model(tmp_path / "model.keras").predict(data, verbose=0), expected)
    plain = refold.fold(model)
    assert not any(type(layer).__module__.startswith("refold") for layer in plain.layers)
    close(plain.predict(data, verbose=0), expected)
