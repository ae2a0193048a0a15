"""What all parametrizations of weights share, on every kind of module."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import refold
from refold.torch import (
    low_rank_adaptation,
    orthogonal_weights,
    spectral_normalization,
    weight_normalization,
)
from refold.torch.attach import ParametrizedRows

METHODS: dict[str, Callable[..., Any]] = {
    "unit": weight_normalization,
    "layer": lambda module, name="weight": weight_normalization(module, name, "layer"),
    "spectral": spectral_normalization,
    "sigma-reparam": lambda module, name="weight": spectral_normalization(module, name, gain=True, epsilon=1e-3),
    "cayley": orthogonal_weights,
    "exponential": lambda module, name="weight": orthogonal_weights(module, name, "exponential", gain=True),
    "lora": lambda module, name="weight": low_rank_adaptation(module, 2, name, alpha=3.0),
    "dora": lambda module, name="weight": low_rank_adaptation(module, 2, name, magnitude=True),
}
KEEPING = ("unit", "layer", "sigma-reparam", "lora", "dora")


class Attention(nn.Module):
    """Every projection in one weight, or each in its own."""

    def __init__(self, keys: int) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, kdim=keys, vdim=keys, batch_first=True)
        self.keys = keys

    def forward(self, x: Any) -> Any:
        given = x[..., : self.keys]
        return self.inner(x, given, given)[0]


class Recurrent(nn.Module):
    """A recurrent layer, of which the outputs count."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Any) -> Any:
        return self.inner(x)[0]


class Loop(Recurrent):
    """A cell, called twice."""

    def forward(self, x: Any) -> Any:
        return self.inner(x[:, 1], self.inner(x[:, 0]))


# What to build, the shape of its input, and how many units its weights have.
KINDS: dict[str, tuple[Callable[[], Any], tuple[int, ...], dict[str, int]]] = {
    "linear": (lambda: nn.Linear(5, 4), (3, 5), {"weight": 4}),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9), {"weight": 6}),
    "conv2d in groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7), {"weight": 6}),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 7, 7), {"weight": 8}),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4), {"weight": 3}),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5), {"weight": 6}),
    "transposed in groups": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (2, 4, 5), {"weight": 6}),
    "lstm": (
        lambda: Recurrent(nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2)),
        (5, 2, 3),
        {"inner.weight_ih_l0": 16, "inner.weight_hh_l1_reverse": 16, "inner.weight_hr_l0": 2},
    ),
    "gru": (lambda: Recurrent(nn.GRU(3, 4)), (5, 2, 3), {"inner.weight_ih_l0": 12, "inner.weight_hh_l0": 12}),
    "cell": (lambda: Loop(nn.GRUCell(3, 4)), (5, 2, 3), {"inner.weight_ih": 12, "inner.weight_hh": 12}),
    "attention": (lambda: Attention(4), (2, 5, 4), {"inner.in_proj_weight": 12, "inner.out_proj.weight": 4}),
    "attention on other keys": (
        lambda: Attention(3),
        (2, 5, 4),
        {"inner.q_proj_weight": 4, "inner.k_proj_weight": 4, "inner.v_proj_weight": 4},
    ),
}  # fmt: skip


def owner(model: Any, path: str) -> tuple[Any, str]:
    before, _, name = path.rpartition(".")
    return model.get_submodule(before), name


def made(kind: str, method: str | None = None) -> tuple[Any, Any]:
    torch.manual_seed(0)
    build, shape, names = KINDS[kind]
    model, x = build().eval(), torch.randn(shape)
    if method is not None:
        for path in names:
            METHODS[method](*owner(model, path))
    return model, x


def weights(model: Any, kind: str) -> dict[str, Any]:
    return {path: getattr(*owner(model, path)) for path in KINDS[kind][2]}


def train(model: Any, x: Any, steps: int = 3) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.02)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    model.eval()


# ---- for every kind of module ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_attaching_training_folding(kind: str, method: str) -> None:
    model, x = made(kind)
    before, stored, names = model(x), weights(model, kind), set(model.state_dict())
    values = {path: weight.detach().clone() for path, weight in stored.items()}
    for path, units in KINDS[kind][2].items():
        METHODS[method](*owner(model, path))
        found = getattr(owner(model, path)[0].parametrizations, owner(model, path)[1])
        assert found[0].rows.units == units
        # The parameter that it was, so that an optimizer keeps it.
        assert any(parameter is stored[path] for parameter in found.parameters(recurse=False))
    if method in KEEPING:
        assert torch.allclose(model(x), before, atol=1e-5)
        for path, weight in weights(model, kind).items():
            assert torch.allclose(weight, values[path], rtol=1e-5, atol=1e-6)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, x)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name]) is not parameter.requires_grad, name
    if "lora" not in method and "dora" not in method:
        assert all(parameter.requires_grad for parameter in model.parameters())
    plain = refold.fold(nn.Sequential(model).eval(), x)
    assert not any("parametrizations" in name for name in plain.state_dict())
    assert len(plain.state_dict()) == len(names)
    assert torch.allclose(plain(x), model(x), atol=1e-5)
    assert refold.prove(nn.Sequential(model).eval(), plain, x).ok


@pytest.mark.parametrize("kind", ["transposed in groups", "gru", "attention"])
@pytest.mark.parametrize("method", METHODS)
def test_copies_checkpoints_averages(kind: str, method: str) -> None:
    model, x = made(kind, method)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    train(model, x)
    average.update_parameters(model)
    wanted = model(x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), average.module):
        assert torch.equal(again(x), wanted)
        train(again, x, 1)  # it is still parametrized, and apart
        assert not torch.equal(again(x), wanted)
    file = io.BytesIO()
    torch.save(model, file)
    torch.save(model.state_dict(), states := io.BytesIO())
    file.seek(0), states.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), wanted)
    other, _ = made(kind, method)
    other.load_state_dict(torch.load(states, weights_only=True))
    assert torch.equal(other(x), wanted)
    assert torch.equal(model(x), wanted)


def write_rows(weight: Any, new: Any) -> None:
    for index, row in enumerate(new):
        weight[index].view(1, -1)[:].copy_(row)


# Ways to write into a weight that people use.
WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "init": lambda module, new: nn.init.orthogonal_(module.weight),
    "data": lambda module, new: module.weight.data.copy_(new),
    "set data": lambda module, new: setattr(module.weight, "data", new),
    "assign": lambda module, new: setattr(module, "weight", new),
    "no_grad": torch.no_grad()(lambda module, new: module.weight.copy_(new)),
    "detach": lambda module, new: module.weight.detach().copy_(new),
    "item": torch.no_grad()(lambda module, new: module.weight.__setitem__(slice(None), new)),
    "views": lambda module, new: write_rows(module.weight.data, new),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_a_weight_can_be_initialized_after_attaching(method: str, way: str) -> None:
    torch.manual_seed(0)
    module = METHODS[method](nn.Linear(5, 4))
    new = nn.init.orthogonal_(torch.empty(4, 5))
    parts = [(p, p.detach().clone()) for p in module.parametrizations.parameters()]
    train(module, torch.randn(3, 5))
    WAYS[way](module, new)
    wanted = new if way != "init" else module.weight.detach().clone()
    if way == "init":
        assert torch.allclose(wanted @ wanted.T, torch.eye(4), atol=1e-6)
    assert torch.allclose(module.weight, wanted, atol=1e-6)
    assert torch.allclose(copy.deepcopy(module).weight, wanted, atol=1e-6)
    assert {id(p) for p, _ in parts} == {id(p) for p in module.parametrizations.parameters()}


def test_what_is_no_write_writes_nothing() -> None:
    module = weight_normalization(nn.Linear(5, 4))
    before = copy.deepcopy(module.state_dict())
    module.weight * 2
    with torch.no_grad():
        module.weight.clone().zero_()
        torch.stack([module.weight, module.weight]).zero_()
    assert type(module.weight + 0) is torch.Tensor
    assert type(module(torch.randn(3, 5))) is torch.Tensor
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    file = io.BytesIO()
    torch.save(module.weight, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=True)) is torch.Tensor


@pytest.mark.parametrize("method", METHODS)
def test_initialization_of_the_module_is_not_lost(method: str) -> None:
    """``reset_parameters``, as ``model.apply`` of many codes calls it, and what hifi-gan does to its layers."""
    torch.manual_seed(0)
    module = METHODS[method](nn.Conv1d(3, 4, 3))
    before = module.weight.detach().clone()
    module.reset_parameters()
    again = module.weight.detach().clone()
    assert not torch.allclose(again, before)
    nn.Sequential(module).apply(lambda m: m.weight.data.normal_(0.0, 0.01) if isinstance(m, nn.Conv1d) else None)
    assert not torch.allclose(module.weight, again)
    if method in KEEPING:
        assert 0.005 < module.weight.std() < 0.02


# ---- compiled, exported, transformed -----------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_compiles_and_exports(method: str, tmp_path: Any) -> None:
    model, x = made("linear", method)
    model = nn.Sequential(model, nn.Tanh())
    train(model, x)
    wanted = model(x)
    assert torch.allclose(torch.export.export(model, (x,)).module()(x), wanted, atol=1e-6)
    # torch's exporter has no solving of equations: an orthogonal weight is folded first.
    exported = refold.fold(model, x) if method in ("cayley", "exponential") else model
    torch.onnx.export(exported, (x,), tmp_path / "a.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.allclose(found, wanted.detach().numpy(), atol=1e-5)
    eager, compiled = copy.deepcopy(model), copy.deepcopy(model)
    train(eager, x)
    train(torch.compile(compiled, backend="aot_eager", fullgraph=True), x)
    for name, value in eager.state_dict().items():
        assert torch.allclose(compiled.state_dict()[name], value, atol=1e-5), name


@pytest.mark.parametrize("method", METHODS)
def test_gradients_in_both_modes(method: str) -> None:
    module, x = made("transposed in groups", method)
    module, x = module.double(), x.double()
    train(module, x)
    module.train()  # inside torch.func no vector advances
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    values = tuple(module.get_parameter(name).detach().clone() for name in names)

    def run(*given: Any) -> Any:
        return torch.func.functional_call(module, dict(zip(names, given, strict=True)), (x,))

    tangents = tuple(torch.randn_like(value) for value in values)
    before = copy.deepcopy(dict(module.named_buffers()))
    _, forward = torch.func.jvp(run, values, tangents)
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())
    module.eval()
    _, pull = torch.func.vjp(run, *values)
    cotangent = torch.randn_like(forward)
    backward = sum((g * t).sum() for g, t in zip(pull(cotangent), tangents, strict=True))
    assert torch.allclose((forward * cotangent).sum(), backward, rtol=1e-9)
    if method != "dora":  # whose gradient takes the norm for a constant, and so is not that of its function
        given = tuple(value.clone().requires_grad_() for value in values)
        assert torch.autograd.gradcheck(run, given, fast_mode=True)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_half_types(method: str, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    module = nn.Linear(40, 30).to(kind)
    before = module.weight.detach().clone()
    METHODS[method](module)
    if method in KEEPING:
        assert torch.allclose(module.weight, before, atol=2e-3)
    assert module.weight.dtype == kind
    own = [*module.parametrizations.weight[0].parameters(), *module.parametrizations.weight[0].buffers()]
    assert all(part.dtype == torch.float32 for part in own)
    wide = copy.deepcopy(module).double()
    assert torch.allclose(module.weight.double(), wide.weight, rtol=4e-3, atol=1e-4)
    module(torch.randn(3, 40, dtype=kind)).sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", METHODS)
def test_channels_stay_last(method: str) -> None:
    """torch's own parametrizations drop the memory format."""
    torch.manual_seed(0)
    for module, shape in ((nn.Conv2d(4, 6, 3), (2, 4, 5, 5)), (nn.Conv3d(4, 6, 2), (2, 4, 3, 3, 3))):
        layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        module = module.to(memory_format=layout)
        x = torch.randn(shape).to(memory_format=layout)
        METHODS[method](module)
        assert module.weight.is_contiguous(memory_format=layout)
        wanted = copy.deepcopy(module).to(memory_format=torch.contiguous_format)
        train(module, x)
        assert next(module.parametrizations.weight.parameters()).is_contiguous(memory_format=layout)
        plain = refold.fold(nn.Sequential(module).eval(), x)
        assert plain.get_submodule("0").weight.is_contiguous(memory_format=layout)
        assert torch.allclose(plain(x), module(x), atol=1e-5)
        if method not in ("lora", "dora"):  # whose start is drawn
            train(wanted, x)
            assert torch.allclose(wanted(x), module(x), atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_traces(method: str) -> None:
    """What the older exporters do."""
    model, x = made("linear", method)
    model = nn.Sequential(model, nn.Tanh())
    train(model, x)
    traced = torch.jit.trace(model, (x,))
    other = torch.randn(2, *x.shape[1:])
    assert torch.allclose(traced(other), model(other), atol=1e-6)


# ---- frozen and shared -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_frozen_stays_frozen(method: str) -> None:
    module = nn.Linear(5, 4)
    module.weight.requires_grad_(False)
    module.bias.requires_grad_(False)
    METHODS[method](module)
    trains = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    if method in ("lora", "dora"):  # a frozen weight is what one adapts
        assert {name.rpartition(".")[2] for name in trains} == {"up", "down", *["gain"][method == "lora" :]}
    else:
        assert not trains
        before = copy.deepcopy(module.state_dict())
        module.train()(torch.randn(3, 5))
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    plain = refold.fold(nn.Sequential(module).eval(), torch.randn(3, 5))
    assert plain.get_submodule("0").weight.requires_grad is (method in ("lora", "dora"))


class Tied(nn.Module):
    """An embedding whose table is also the last layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Any) -> Any:
        return self.head(torch.tanh(self.table(x)))


@pytest.mark.parametrize("method", METHODS)
def test_shared_weights_stay_shared(method: str) -> None:
    torch.manual_seed(0)
    model, x = Tied(), torch.arange(7)
    alone = copy.deepcopy(model)
    METHODS[method](model.table)
    METHODS[method](model.head)
    assert torch.equal(model.table.weight, model.head.weight)
    assert len(list(model.parameters())) == len(list(METHODS[method](nn.Linear(4, 7, bias=False)).parameters()))
    if method in KEEPING:
        assert torch.allclose(model(x), alone(x), atol=1e-6)
    train(model, x)
    again = copy.deepcopy(model)
    train(again, x)
    assert torch.equal(again.table.weight, again.head.weight)
    plain = refold.fold(model.eval(), x)
    assert torch.equal(plain.head.weight, plain.table.weight)
    assert plain.head.weight is not plain.table.weight  # as docs/torch.md says
    assert torch.allclose(plain(x), model(x), atol=1e-6)


def test_a_shared_weight_has_one_method() -> None:
    model = Tied()
    weight_normalization(model.table)
    with pytest.raises(ValueError, match="shared with a module where it is parametrized in another way"):
        weight_normalization(model.head, normalizer="rms")


def test_torch_takes_them_off_again() -> None:
    for attach in METHODS.values():
        module, x = attach(nn.LSTM(3, 4), "weight_hh_l0").eval(), torch.randn(5, 2, 3)
        assert isinstance(module.parametrizations.weight_hh_l0[0], ParametrizedRows)
        before = module(x)[0]
        parametrize.remove_parametrizations(module, "weight_hh_l0")
        assert type(module) is nn.LSTM
        assert torch.equal(module(x)[0], before)
        assert torch.equal(pickle.loads(pickle.dumps(module))(x)[0], before)
