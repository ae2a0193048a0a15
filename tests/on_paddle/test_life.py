"""What one can do with a folded model, and what is said of models that cannot be folded."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.nn import functional as F
from test_fold import assert_same_function, operators
from zoo import FREE, IMAGE, Body, Csp, LooksAtValues, RepVGG, conv, conv_bn, randomize, shuffle

import refold
from refold.proof.certificate import Certificate


def small() -> Any:
    return randomize(nn.Sequential(RepVGG(4, 4, alpha=0.5), RepVGG(4, 6), nn.Flatten(), nn.Linear(6 * 72, 3)))


def image(*shape: int, seed: int = 0) -> Any:
    return paddle.to_tensor(np.random.default_rng(seed).normal(size=shape).astype("float32"))


def test_plain_names_and_parameters_of_what_stays() -> None:
    model = randomize(Csp())
    plain = refold.fold(model, (None, 4, 16, 16))
    names = list(plain.state_dict())
    assert "attention.weight" in names
    assert "blocks.0.conv.weight" in names
    assert "stem.0.0.weight" in names
    assert all(name.rpartition(".")[2] in ("weight", "bias") for name in names), names
    np.testing.assert_array_equal(plain.state_dict()["attention.weight"].numpy(), model.attention.weight.numpy())
    assert not {id(t) for t in plain.state_dict().values()} & {id(t) for t in model.state_dict().values()}
    assert type(plain.attention) is nn.Conv2D
    assert type(plain).__name__ == "Csp"


def test_what_is_folded_into_a_transposed_convolution_has_its_name() -> None:
    up = nn.Conv2DTranspose(4, 3, 3, stride=2)
    model = randomize(nn.Sequential(nn.Conv2D(4, 4, 1), nn.ReLU(), up, nn.BatchNorm2D(3)))
    plain = refold.fold(model, IMAGE)
    assert set(plain.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert type(getattr(plain, "2")) is nn.Conv2DTranspose


def test_saves_loads_and_runs_without_refold(tmp_path: Path) -> None:
    model = randomize(Csp())
    plain = refold.fold(model, FREE)
    path = str(tmp_path / "plain")
    paddle.jit.save(plain, path, input_spec=[paddle.static.InputSpec([None, 4, None, None], "float32")])
    x = image(3, 4, 22, 17)
    np.save(tmp_path / "x.npy", x.numpy())
    code = (
        "import sys; sys.modules['refold'] = None\n"
        "import numpy as np, paddle\n"
        f"model = paddle.jit.load({path!r})\n"
        f"x = paddle.to_tensor(np.load({str(tmp_path / 'x.npy')!r}))\n"
        f"np.save({str(tmp_path / 'y.npy')!r}, model(x).numpy())"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), plain(x).numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(plain(x).numpy(), model(x).numpy(), rtol=1e-4, atol=1e-5)


def test_a_shuffle_saves_with_open_sizes(tmp_path: Path) -> None:
    model = randomize(Body(lambda m, x: F.relu(shuffle(F.relu(m.a(x)), 2)), a=conv_bn(4, 8, 3)))
    plain = refold.fold(model, FREE)
    path = str(tmp_path / "plain")
    paddle.jit.save(plain, path, input_spec=[paddle.static.InputSpec([None, 4, None, None], "float32")])
    for shape in ((1, 4, 5, 6), (3, 4, 9, 7)):
        x = image(*shape)
        np.testing.assert_allclose(paddle.jit.load(path)(x).numpy(), model(x).numpy(), rtol=1e-5, atol=1e-6)


def test_state_dict_round_trip_and_copies() -> None:
    model = small()
    plain, other = refold.fold(model, IMAGE), refold.fold(randomize(small(), 3), IMAGE)
    x = image(2, 4, 8, 9)
    assert not np.allclose(plain(x).numpy(), other(x).numpy())
    missing, unexpected = other.set_state_dict(plain.state_dict())
    assert not missing
    assert not unexpected
    np.testing.assert_array_equal(plain(x).numpy(), other(x).numpy())
    np.testing.assert_array_equal(copy.deepcopy(plain)(x).numpy(), plain(x).numpy())


def test_both_train_on_after_folding_apart_from_each_other() -> None:
    model = small()
    plain = refold.fold(model, IMAGE)
    x = image(4, 4, 8, 9)
    kept = plain(x).numpy()
    for part in (model, plain):
        part.train()
        optimizer = paddle.optimizer.SGD(0.01, parameters=part.parameters())
        loss = part(x).square().mean()
        loss.backward()
        trained = [p for p in part.parameters() if not p.stop_gradient]
        assert all(p.grad is not None for p in trained)
        if part is model:
            optimizer.step()
            plain.eval()
            np.testing.assert_array_equal(kept, plain(x).numpy())
        else:
            optimizer.step()
            assert not np.allclose(kept, plain(x).numpy())


def test_the_code_can_be_read() -> None:
    plain = refold.fold(small(), IMAGE)
    assert plain.code.startswith("def forward(self, input):")
    assert "F.relu" in plain.code or ".act(" in plain.code


def test_frozen_weights_stay_frozen() -> None:
    model = small()
    for parameter in model[0].parameters():
        parameter.stop_gradient = True
    plain = refold.fold(model, IMAGE)
    frozen = {name for name, parameter in plain.named_parameters() if parameter.stop_gradient}
    assert frozen == {"0.conv.weight", "0.conv.bias"}


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.norm = nn.LayerNorm(4)
            self.mix = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))

        def forward(self, tokens: Any) -> Any:
            x = self.norm(F.gelu(self.mix(self.embedding(tokens))))
            return paddle.matmul(x, self.embedding.weight, transpose_y=True)

    model = randomize(Tied())
    tokens = paddle.to_tensor([[1, 2, 6], [0, 3, 5]])
    plain = refold.fold(model, tokens)
    assert len([name for name in plain.state_dict() if "embedding" in name]) == 1
    np.testing.assert_allclose(plain(tokens).numpy(), model(tokens).numpy(), rtol=1e-4, atol=1e-5)
    assert refold.prove(model, plain, tokens).verdict.value == "proved"


def test_hooks_act_once() -> None:
    model = nn.Sequential(conv(4, 4, 3), nn.ReLU(), conv_bn(4, 4, 1))
    model[0].register_forward_post_hook(lambda layer, inputs, output: output * 2.0)
    model[1].register_forward_pre_hook(lambda layer, inputs: (inputs[0] + 1.0,))
    randomize(model)
    plain = refold.fold(model, IMAGE)
    assert_same_function(model, plain, IMAGE)
    assert operators(plain, IMAGE) == 3


@pytest.mark.parametrize("size", [7, 8, 9, 12])
def test_fold_at_an_unknown_size_holds_at_every_size(size: int) -> None:
    model = randomize(nn.Sequential(RepVGG(4, 4), RepVGG(4, 6, stride=2), nn.Conv2D(6, 3, 3, stride=2)))
    assert_same_function(model, refold.fold(model, FREE), FREE, size=size)


def test_double_precision_models() -> None:
    model = small()
    model.to(dtype="float64")
    x = paddle.to_tensor(np.random.default_rng(0).normal(size=(2, 4, 8, 9)))
    plain = refold.fold(model, x)
    assert all(parameter.dtype == paddle.float64 for parameter in plain.parameters())
    np.testing.assert_allclose(plain(x).numpy(), model(x).numpy(), rtol=1e-12, atol=1e-13)
    assert refold.prove(model, plain, x).verdict.value == "proved"


def test_plans_and_certificates_are_data() -> None:
    model = small()
    plan = refold.inspect(model, IMAGE)
    assert json.loads(json.dumps(plan.to_json()))["schema"] == "refold.plan/1"
    certificate = refold.prove(model, refold.fold(model, IMAGE), image(2, 4, 8, 9))
    data = json.loads(json.dumps(certificate.to_json()))
    assert Certificate.from_json(data) == certificate
    assert data["versions"]["paddle"] == paddle.__version__
    assert {entry.inputs for entry in certificate.end_to_end} >= {"given", "normal"}


@pytest.mark.parametrize("edit", [lambda w: w * 1.001, lambda w: w[[1, 0, 2, 3]], lambda w: w[..., ::-1].copy()])
def test_a_damaged_fold_is_refuted_where_it_is_damaged(edit: Any) -> None:
    model = small()
    plain = refold.fold(model, IMAGE)
    weight = plain.state_dict()["0.conv.weight"]
    weight.set_value(paddle.to_tensor(edit(weight.numpy()).astype("float32")))
    certificate = refold.prove(model, plain, IMAGE)
    assert certificate.verdict.value == "refuted"
    assert [region.where for region in certificate.regions if region.verdict.value == "refuted"] == ["0.add#2"]


def test_timing() -> None:
    model = small()
    timing = refold.bench(model, refold.fold(model, IMAGE), IMAGE, repeats=2)
    assert timing.cost_after.operators < timing.cost_before.operators


# ---- sentences -----------------------------------------------------------------------------------------


def test_training_mode_is_refused_in_one_sentence() -> None:
    model = small()
    model[1].three.train()
    with pytest.raises(refold.InputError, match=r"in training mode \(its layer '1.three' is\).*call model.eval"):
        refold.fold(model, IMAGE)
    model.train()
    with pytest.raises(refold.InputError, match=r"'Sequential' is in training mode, in which"):
        refold.inspect(model, IMAGE)


def test_examples_are_asked_for_and_checked() -> None:
    model = small()
    with pytest.raises(refold.InputError, match="does not say the shape of its inputs: give an example"):
        refold.fold(model)
    with pytest.raises(refold.InputError, match="neither a tensor nor a shape"):
        refold.fold(model, "four")
    with pytest.raises(refold.InputError, match="cannot be followed"):
        refold.fold(model, (None, 5, 8, 9))
    with pytest.raises(refold.InputError, match="holds no example"):
        refold.fold(model, paddle.zeros([0, 4, 8, 9]))
    assert not refold.inspect(refold.fold(model, IMAGE)).changes_something  # a folded model knows


def test_a_model_that_looks_at_values_is_refused() -> None:
    model = LooksAtValues()
    model.eval()
    with pytest.raises(refold.InputError, match="its forward looks at the values of a tensor"):
        refold.fold(model, IMAGE)


class Random(nn.Layer):
    def forward(self, x: Any) -> Any:
        return x + paddle.rand([4, 1, 1])


class Caught(nn.Layer):
    def forward(self, x: Any) -> Any:
        try:
            return x if float(x.sum()) > 0 else -x
        except Exception:
            return x * 3.0


class ViewWritten(nn.Layer):
    def forward(self, x: Any) -> Any:
        y = x * 1.0
        view = y[:, :2]
        view.add_(paddle.ones([1]))
        return y


class Numpy(nn.Layer):
    def forward(self, x: Any) -> Any:
        return paddle.to_tensor(np.maximum(x.detach().numpy(), 0.0))


@pytest.mark.parametrize("kind", [Random, Caught, Numpy, ViewWritten])
def test_what_cannot_be_followed_is_kept_whole_or_the_model_is_refused(kind: Any) -> None:
    model = randomize(nn.Sequential(conv_bn(4, 4, 3), kind(), conv_bn(4, 4, 3)))
    if kind in (Random, ViewWritten):
        with pytest.raises(refold.InputError, match="cannot be followed"):
            refold.fold(model, IMAGE)
        return
    plain = refold.fold(model, IMAGE)
    x = image(2, 4, 8, 9)
    np.testing.assert_allclose(plain(x).numpy(), model(x).numpy(), rtol=1e-4, atol=1e-5)


class Writes(nn.Layer):
    """Functions that write in place, as far as they can be followed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(4, 4, 3), conv_bn(4, 4, 1)

    def forward(self, x: Any) -> Any:
        y = self.a(x)
        y.add_(self.b(x))
        y.scale_(0.5)
        return F.relu_(y)


def test_functions_in_place_fold_too() -> None:
    model = randomize(Writes())
    plain = refold.fold(model, IMAGE)
    assert operators(plain, IMAGE) == 2
    x = image(2, 4, 8, 9)
    np.testing.assert_allclose(plain(x).numpy(), model(x).numpy(), rtol=1e-4, atol=1e-5)


class Clears(nn.Layer):
    """Writes into what it is given, as ``how`` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Any) -> Any:
        if self.how == "piece":
            x[:, :1] = 0.5
            return x
        return F.relu_(x) if self.how == "activation" else x.scale_(2.0)


class WritesUpstream(nn.Layer):
    """A layer writes into a tensor after a convolution read it, and before that is folded."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.norm, self.clears = conv(4, 4, 3), nn.BatchNorm2D(4), Clears(how)

    def forward(self, x: Any) -> Any:
        x = F.tanh(x)
        y = self.conv(x)
        cleared = self.clears(x)
        return self.norm(y) + F.tanh(cleared)


@pytest.mark.parametrize("how", ["piece", "activation", "scale"])
def test_layers_that_write_into_what_they_are_given(how: str) -> None:
    for model in (
        nn.Sequential(conv_bn(4, 4, 3), Clears(how), conv_bn(4, 4, 3)),
        nn.Sequential(Clears(how), conv_bn(4, 4, 3)),
        nn.Sequential(WritesUpstream(how)),
    ):
        plain, x = refold.fold(randomize(model), IMAGE), image(2, 4, 8, 9)
        assert "BatchNorm2D" not in str(plain)
        assert refold.prove(model, plain, IMAGE).verdict.value == "proved"
        before = x.clone()
        np.testing.assert_allclose(plain(x).numpy(), model(before.clone()).numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(x.numpy(), before.numpy())  # a folded model leaves its input alone


def made_of_sizes(m: Any, x: Any) -> Any:
    channels = x.shape[1]
    same = F.conv2d(x, paddle.eye(channels).reshape([channels, channels, 1, 1]))
    ramp = paddle.arange(channels).astype("float32").reshape([1, -1, 1, 1])
    return m.a(x) + same * paddle.full([channels, 1, 1], 0.5) - ramp / 3


def made_of_open_sizes(m: Any, x: Any) -> Any:
    return m.a(x) * paddle.full([1, 1, x.shape[2], 1], 0.5)


def made_by_chance(m: Any, x: Any) -> Any:
    return m.a(x) * paddle.randint(1, 2, [x.shape[1], 1, 1]).astype("float32")


@pytest.mark.parametrize(("forward", "left"), [(made_of_sizes, 1), (made_of_open_sizes, 3), (made_by_chance, 4)])
def test_constants_that_are_made_of_sizes(forward: Any, left: int) -> None:
    model = randomize(Body(forward, a=conv_bn(4, 4, 3)))
    plain = refold.fold(model, FREE)
    assert refold.inspect(model, FREE).after.operators == left
    assert refold.prove(model, plain, FREE).ok
    x = image(2, 4, 7, 5)
    np.testing.assert_allclose(plain(x).numpy(), model(x).numpy(), rtol=1e-4, atol=1e-5)


def test_looking_at_a_model_changes_nothing_in_paddle_or_the_model() -> None:
    class Counts(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", paddle.full([1], 7.0))

        def forward(self, x: Any) -> Any:
            self.calls.add_(paddle.ones([1]))
            return F.relu(x)

    tensor, call, relu = dict(vars(paddle.Tensor)), nn.Layer.__call__, F.relu
    model = randomize(nn.Sequential(conv_bn(4, 4, 3), Counts()))
    model[1].calls.set_value(paddle.full([1], 7.0))
    refold.fold(model, IMAGE)
    assert model[1].calls.item() == 7.0
    assert dict(vars(paddle.Tensor)) == tensor
    assert nn.Layer.__call__ is call
    assert F.relu is relu


def test_an_activation_inside_a_batch_norm() -> None:
    model = randomize(nn.Sequential(conv(4, 5, 3), nn.BatchNorm(5, act="relu"), nn.BatchNorm(5, act="sigmoid")))
    plain = refold.fold(model, IMAGE)
    assert_same_function(model, plain, IMAGE)
    assert operators(plain, IMAGE) == 4


def test_a_pickle_is_read_in_another_process(tmp_path: Path) -> None:
    model, x = Csp(), paddle.to_tensor(np.random.default_rng(0).normal(size=(2, 4, 16, 16)).astype("float32"))
    randomize(model)
    plain = refold.fold(model, x)
    plain(x)
    wanted = plain(x).numpy()
    np.savez(tmp_path / "given.npz", x=x.numpy(), wanted=wanted)
    (tmp_path / "plain.pickle").write_bytes(pickle.dumps(plain))
    code = """
import pickle, sys
import numpy as np, paddle
given = np.load(sys.argv[1] + "/given.npz")
with open(sys.argv[1] + "/plain.pickle", "rb") as file:
    plain = pickle.load(file)
np.testing.assert_array_equal(plain(paddle.to_tensor(given["x"])).numpy(), given["wanted"])
paddle.jit.save(plain, sys.argv[1] + "/saved", input_spec=[paddle.static.InputSpec([None, 4, 16, 16], "float32")])
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(refold.__file__).parents[1])}
    command = [sys.executable, "-c", code, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
