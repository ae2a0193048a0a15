"""Training on after a fold with the same optimizer, and what else people do with folded weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import refold
from refold.torch import continue_training, low_rank_adaptation, spectral_normalization, weight_normalization


def network() -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(weight_normalization(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.PReLU(8))
    return model, torch.randn(16, 6)


def step(model: Any, optimizer: Any, x: Any) -> float:
    optimizer.zero_grad()
    loss = (model(x) - 0.5).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss)


def folded(model: Any, x: Any) -> Any:
    plain = refold.fold(model.eval(), x)
    model.train()
    return plain


@pytest.mark.parametrize("named", [False, True])
def test_goes_on_with_groups_states_and_schedules(named: bool) -> None:
    model, x = network()
    listed = [list(part.named_parameters(prefix) if named else part.parameters()) for part, prefix in
              ((model[0], "0"), (model[2], "2"), (model[4], "4"))]  # fmt: skip
    optimizer = torch.optim.Adam([{"params": listed[0], "lr": 0.02}, {"params": listed[1] + listed[2]}], lr=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for _ in range(5):
        last = step(model, optimizer, x)
        schedule.step()
    plain = folded(model, x)
    moments = {
        name: optimizer.state[model.get_parameter(name)]["exp_avg"].clone() for name in ("2.weight", "4.weight")
    }
    assert continue_training(optimizer, model, plain) == ["0.weight", "0.bias"][:1]
    first, second = optimizer.param_groups
    assert [id(p) for p in first["params"]] == [id(plain.get_parameter(n)) for n in ("0.weight", "0.bias")]
    assert [id(p) for p in second["params"]] == [
        id(plain.get_parameter(n)) for n in ("2.weight", "2.bias", "4.weight")
    ]
    if named:
        assert first["param_names"] == ["0.weight", "0.bias"]
    assert first["lr"] == pytest.approx(0.02 * 0.9**5)
    for name, value in moments.items():
        assert torch.equal(optimizer.state[plain.get_parameter(name)]["exp_avg"], value)
    assert set(optimizer.state) <= set(plain.parameters())
    before = copy.deepcopy(plain.state_dict())
    for _ in range(5):
        now = step(plain, optimizer, x)
        schedule.step()
    assert now < last
    assert all(not torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())


def test_parameters_of_others_and_frozen_ones_stay_as_they_are() -> None:
    model, x = network()
    model[2].requires_grad_(False)
    other = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([other, *(p for p in model.parameters() if p.requires_grad)], 0.1)
    plain = folded(model, x)
    assert continue_training(optimizer, model, plain) == [
        "0.weight",
        "0.bias",
        "4.weight",
    ]  # plain SGD has no state
    (group,) = optimizer.param_groups
    wanted = [other, *(plain.get_parameter(name) for name in ("0.weight", "0.bias", "4.weight"))]
    assert [id(p) for p in group["params"]] == [id(p) for p in wanted]
    with pytest.raises(ValueError, match="trains none of the model's parameters"):
        continue_training(torch.optim.SGD([other], 0.1), model, plain)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning")
@pytest.mark.parametrize(
    "attach", [weight_normalization, spectral_normalization, lambda m: low_rank_adaptation(m, 2)]
)
def test_dynamic_quantization_after_a_fold(attach: Any) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(attach(nn.Linear(16, 8)), nn.ReLU(), attach(nn.Linear(8, 4))), torch.randn(5, 16)
    plain = folded(model, x)
    quantized = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear})
    kinds = [type(module).__module__ for module in quantized.modules() if type(module).__name__ == "Linear"]
    assert len(kinds) == 2
    assert all("quantized" in kind for kind in kinds)
    assert torch.allclose(quantized(x), model.eval()(x), atol=0.1)
