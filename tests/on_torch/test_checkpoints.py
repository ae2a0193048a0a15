"""State dicts that torch wrote, and that torch loads, in every form: the modules compute the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations

import refold
from refold.errors import InputError
from refold.torch import convert_state, weight_normalization

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")


def network(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, stride=2), nn.Flatten(), nn.Linear(784, 5)
    )
    return model.eval()


X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))
WEIGHTS = ("0", "2", "4")
# How the weights become what each form is a checkpoint of; and what the units are, where shapes do not say it.
WRAPPED: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "torch": (parametrizations.weight_norm, {}),
    "torch-legacy": (nn.utils.weight_norm, {}),
    "refold": (weight_normalization, {"method": "unit", "axes": ["0.*=0", "2.*=1", "4.*=0"]}),
    "spectral": (parametrizations.spectral_norm, {}),
    "spectral-legacy": (nn.utils.spectral_norm, {}),
}


def wrapped(form: str, seed: int = 0) -> Any:
    model = network(seed)
    for name in WEIGHTS:
        WRAPPED[form][0](model.get_submodule(name))
    if form.startswith("spectral"):
        model.train()(X)
    with torch.no_grad():  # trained, so that gains are no norms
        for parameter in model.parameters():
            parameter.mul_(1.25).add_(0.01)
    return model.eval()


@pytest.mark.parametrize("form", WRAPPED)
def test_plain_weights_compute_what_the_wrapped_module_computes(form: str) -> None:
    model = wrapped(form)
    state = model.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    plain = network(1)
    plain.load_state_dict(convert_state(state, **WRAPPED[form][1]))
    assert torch.allclose(plain(X), model(X), atol=1e-6)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("form", ["torch", "torch-legacy", "refold"])
def test_wrapped_modules_load_plain_weights(form: str) -> None:
    plain, model = network(), wrapped(form, seed=1)
    transposed = "2.weight=1" if form == "refold" else "2.weight=0"
    options = WRAPPED[form][1] | {"axes": ["0.weight=0", transposed, "4.weight=0"]}
    model.load_state_dict(convert_state(plain.state_dict(), form, **options))
    assert torch.allclose(model(X), plain(X), atol=1e-6)


def test_of_gains_that_another_form_cannot_say() -> None:
    """torch gives a transposed convolution a gain per input; refold one per output: through the weight."""
    model, other = wrapped("torch"), wrapped("refold", seed=1)
    square = weight_normalization(nn.ConvTranspose2d(4, 4, 2)).state_dict()
    with pytest.raises(InputError, match="does not say which axis"):
        convert_state(square, method="unit")
    state = convert_state(model.state_dict(), "refold", axes=["0.weight=0", "2.weight=1", "4.weight=0"])
    other.load_state_dict(state)
    assert torch.allclose(other(X), model(X), atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_grouped_transposed_convolutions_of_refold(groups: int) -> None:
    torch.manual_seed(0)
    module = weight_normalization(nn.ConvTranspose1d(4, 4, 3, groups=groups))
    with torch.no_grad():
        module.parametrizations.weight.original1.mul_(torch.arange(1.0, 5.0))
    plain = convert_state(module.state_dict(), method="unit", axes=[f"weight=1/{groups}"])
    assert torch.allclose(plain["weight"], module.weight, atol=1e-6)


@pytest.mark.parametrize("ending", [".pt", ".safetensors", ".bin"])
def test_files(ending: str, tmp_path: Path) -> None:
    model = wrapped("torch").to(torch.bfloat16)
    source = tmp_path / f"a{ending}"
    if ending == ".safetensors":
        save_file(model.state_dict(), source)
    else:
        torch.save({"state_dict": model.state_dict()}, source)
    refold.convert(source, tmp_path / "b.safetensors")
    refold.convert(source, tmp_path / "b.pt")
    state = load_file(tmp_path / "b.safetensors")
    again = torch.load(tmp_path / "b.pt", weights_only=True)
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    plain = network(1).to(torch.bfloat16)
    plain.load_state_dict(state)
    exact = copy.deepcopy(model).double()
    error = (plain(X.to(torch.bfloat16)).double() - exact(X.double())).abs().max()
    assert error < 0.1


class Evil:
    def __reduce__(self) -> Any:
        return (eval, ("open('canary', 'w')",))


def test_files_of_more_than_tensors_are_not_read(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(2), "b": Evil()}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="more than tensors"):
        refold.convert(tmp_path / "a.pt", tmp_path / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_tensors_that_are_none() -> None:
    with pytest.raises(InputError, match="'a' is no plain tensor"):
        convert_state({"a": torch.ones(2, 2).to_sparse()})
    assert convert_state({"a": torch.zeros(0, 3)})["a"].shape == (0, 3)
