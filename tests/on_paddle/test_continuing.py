"""Training on after a fold with the same optimizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from paddle import nn

import refold
from refold.paddle import continue_training, weight_normalization


def network() -> tuple[Any, Any]:
    paddle.seed(0)
    model = nn.Sequential(weight_normalization(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.PReLU(8))
    return model, paddle.to_tensor(np.random.default_rng(0).normal(size=(16, 6)).astype("float32"))


def step(model: Any, optimizer: Any, x: Any) -> float:
    loss = (model(x) - 0.5).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.clear_grad()
    return float(loss)


def folded(model: Any, x: Any) -> Any:
    model.eval()
    plain = refold.fold(model, x)
    plain.train()
    return plain


@pytest.mark.parametrize("grouped", [False, True])
def test_goes_on_with_groups_states_and_schedules(grouped: bool) -> None:
    model, x = network()
    schedule = paddle.optimizer.lr.ExponentialDecay(0.02, 0.9)
    parts = [model[0].parameters(), [*model[2].parameters(), *model[4].parameters()]]
    parameters = (
        [{"params": parts[0], "learning_rate": 0.5}, {"params": parts[1]}] if grouped else [*parts[0], *parts[1]]
    )
    optimizer = paddle.optimizer.AdamW(schedule, parameters=parameters)
    for _ in range(5):
        last = step(model, optimizer, x)
        schedule.step()
    plain = folded(model, x)
    moments = {name: optimizer._accumulators["moment1"][getattr(model[i], own).name].numpy().copy()
               for name, i, own in (("2.weight", 2, "weight"), ("4._weight", 4, "_weight"))}  # fmt: skip
    assert continue_training(optimizer, model, plain) == ["0.weight"]
    named = dict(plain.named_parameters())
    known = optimizer._accumulators["moment1"]
    for name, moment in moments.items():
        np.testing.assert_array_equal(known[named[name].name].numpy(), moment)
    assert set(known) == {parameter.name for name, parameter in named.items() if name != "0.weight"}
    if grouped:
        groups = [{p.name for p in group["params"]} for group in optimizer._param_groups]
        assert groups[0] == {named[name].name for name in ("0.weight", "0.bias")}
        assert named["0.weight"].optimize_attr["learning_rate"] == 0.5
        assert named["2.weight"].optimize_attr["learning_rate"] == 1.0
    rate = optimizer.get_lr()
    assert rate == pytest.approx(0.02 * 0.9**5)
    before = {name: parameter.numpy().copy() for name, parameter in named.items()}
    for _ in range(5):
        now = step(plain, optimizer, x)
        schedule.step()
    assert now < last
    assert all(not np.array_equal(parameter.numpy(), before[name]) for name, parameter in named.items())
    assert set(known) == {parameter.name for parameter in named.values()}


def test_parameters_of_others_and_frozen_ones_stay_as_they_are() -> None:
    model, x = network()
    for parameter in model[2].parameters():
        parameter.stop_gradient = True
    other = paddle.create_parameter([2], "float32")
    mine = [parameter for parameter in model.parameters() if not parameter.stop_gradient]
    optimizer = paddle.optimizer.SGD(0.1, parameters=[other, *mine])
    plain = folded(model, x)
    names = [name for name, parameter in plain.named_parameters() if not parameter.stop_gradient]
    assert set(names) == {"0.weight", "0.bias", "4._weight"}
    assert continue_training(optimizer, model, plain) == names  # plain SGD has no state
    named = dict(plain.named_parameters())
    assert [id(p) for p in optimizer._parameter_list] == [id(p) for p in (other, *(named[name] for name in names))]
    with pytest.raises(ValueError, match="trains none of the model's parameters"):
        continue_training(paddle.optimizer.SGD(0.1, parameters=[other]), model, plain)
