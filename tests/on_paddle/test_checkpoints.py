"""State dicts that Paddle wrote, and that Paddle loads: the layers compute the same."""

from __future__ import annotations

import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import nn

import refold
from refold.errors import InputError
from refold.paddle import weight_normalization

X = np.random.default_rng(0).normal(size=(2, 2, 7, 7)).astype("float32")


def network() -> Any:
    return nn.Sequential(nn.Conv2D(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(125, 3))


def trained(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.set_value(parameter * 1.25 + 0.01)
    model.eval()
    return model


def wrapped(kind: str) -> Any:
    model = network()
    if kind == "paddle":
        nn.utils.weight_norm(model[0], dim=0)
        nn.utils.weight_norm(model[3], dim=1)
    else:
        weight_normalization(model[0])
        weight_normalization(model[3])
    return trained(model)


@pytest.mark.parametrize("kind", ["paddle", "refold"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_plain_weights_compute_what_the_wrapped_layers_compute(kind: str, protocol: int, tmp_path: Path) -> None:
    model = wrapped(kind)
    paddle.save(model.state_dict(), str(tmp_path / "a.pdparams"), protocol=protocol)
    refold.convert(tmp_path / "a.pdparams", tmp_path / "b.pdparams", method=None if kind == "paddle" else "unit")
    plain = network()
    plain.set_state_dict(paddle.load(str(tmp_path / "b.pdparams")))
    plain.eval()
    x = paddle.to_tensor(X)
    np.testing.assert_allclose(plain(x).numpy(), model(x).numpy(), atol=1e-5)


def test_wrapped_layers_load_plain_weights(tmp_path: Path) -> None:
    plain, model = trained(network()), wrapped("paddle")
    paddle.save(plain.state_dict(), str(tmp_path / "a.pdparams"))
    refold.convert(tmp_path / "a.pdparams", tmp_path / "b.pdparams", "paddle", axes=["0.weight=0", "3.weight=1"])
    state = paddle.load(str(tmp_path / "b.pdparams"))
    model.set_state_dict(state)
    x = paddle.to_tensor(X)
    np.testing.assert_allclose(model(x).numpy(), plain(x).numpy(), atol=1e-5)


def test_one_norm_for_the_whole_weight() -> None:
    layer = nn.utils.weight_norm(nn.Linear(4, 3), dim=None)
    trained(layer)
    state = {name: tensor.numpy() for name, tensor in layer.state_dict().items()}
    x = paddle.to_tensor(X[0, 0, :, :4])
    plain = refold.convert_state(state)
    np.testing.assert_allclose(x.numpy() @ plain["weight"] + plain["bias"], layer(x).numpy(), rtol=1e-5)


def test_bfloat16(tmp_path: Path) -> None:
    layer = nn.Linear(4, 3)
    layer.to(dtype="bfloat16")
    paddle.save(layer.state_dict(), str(tmp_path / "a.pdparams"))
    refold.convert(tmp_path / "a.pdparams", tmp_path / "b.pdparams", "paddle", axes=["weight=1"])
    refold.convert(tmp_path / "b.pdparams", tmp_path / "c.pdparams")
    again = nn.Linear(4, 3)
    again.to(dtype="bfloat16")
    again.set_state_dict(paddle.load(str(tmp_path / "c.pdparams")))
    assert np.array_equal(again.weight.astype("float32").numpy(), layer.weight.astype("float32").numpy())


class Evil:
    def __reduce__(self) -> Any:
        return (eval, ("open('canary', 'w')",))


def test_what_paddles_own_reader_would_run_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pdparams").write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(InputError, match="could run code"):
        refold.convert("a.pdparams", "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pdparams"]
    with suppress(NotImplementedError):  # of what the call gave, once it was made
        paddle.load("a.pdparams")
    assert (tmp_path / "canary").exists()
