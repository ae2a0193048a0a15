"""Bad input gets one sentence, and the model stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from zoo import conv_bn, made, randomize

import refold

IMAGE = torch.zeros(2, 4, 9, 9)


def plain_model() -> Any:
    return randomize(nn.Sequential(conv_bn(4, 4), nn.ReLU()))


def with_bad_statistics(value: float) -> Any:
    model = plain_model()
    model[0][1].running_var[0] = value
    return model


def writes_into_a_piece(s: Any, x: Any) -> Any:
    y = x * 2
    first, _ = y.chunk(2, 1)
    first.add_(1)
    return y


def looks(s: Any, x: Any) -> Any:
    return x * 2 if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("build", "example", "sentence"),
    [
        (lambda: plain_model().train(), IMAGE, "is in training mode, in which it is another function"),
        (plain_model, None, "does not say the shape of its inputs: give an example"),
        (plain_model, torch.zeros(2, 3, 9, 9), "cannot be followed"),
        (plain_model, "image", "an example input of type str is neither a tensor nor a shape"),
        (plain_model, torch.zeros(()), "holds no example: its first axis is the batch"),
        (plain_model, IMAGE.to(torch.complex64), "holds complex numbers"),
        (lambda: nn.Linear(3, 3).to(torch.complex64).eval(), torch.zeros(2, 3), "holds complex numbers"),
        (lambda: plain_model().to("meta"), IMAGE, "has no numbers .* load its weights first"),
        (lambda: made(looks), IMAGE, "cannot be followed: its forward looks at the values of a tensor"),
        (lambda: made(lambda s, x: x.shape[0]), IMAGE, "it returns no tensor"),
        (lambda: made(lambda s, x: s.w, w=nn.Parameter(torch.ones(1))), IMAGE, "does not depend on its inputs"),
        (lambda: made(lambda s, x: x.relu_()), IMAGE, "writes into its input"),
        (lambda: made(writes_into_a_piece), IMAGE, "reads a view of a tensor after that was"),
        (lambda: torch.jit.script(plain_model()), IMAGE, "is scripted, which hides what it computes"),
        (lambda: made(lambda s, x: x + torch.rand_like(x)), IMAGE, "chance"),
    ],
)
def test_one_sentence(build: Any, example: Any, sentence: str) -> None:
    model = build()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(refold.InputError, match=sentence) as caught:
        refold.fold(model, example)
    assert "\n" not in str(caught.value)
    after = model.state_dict()
    assert all(after[name].is_meta or torch.equal(tensor, after[name]) for name, tensor in state.items())


@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_statistics_that_make_no_number_are_kept_apart(value: float) -> None:
    model = with_bad_statistics(value)
    kept = [str(kept) for kept in refold.inspect(model, IMAGE).kept]
    assert any("a variance plus epsilon is not positive, or a statistic is not finite" in k for k in kept)


def test_integer_weights_are_left_alone() -> None:
    def forward(s: Any, x: Any) -> Any:
        return nn.functional.conv2d(x.long(), s.kernel).float()

    model = made(forward)
    model.register_buffer("kernel", torch.ones(4, 4, 1, 1, dtype=torch.long))
    assert not refold.inspect(model, torch.ones(2, 4, 9, 9)).regions


def test_a_weight_beyond_the_largest_number_is_refused() -> None:
    model = randomize(conv_bn(4, 4))
    with torch.no_grad():
        model[0].weight[0] = 1e30
        model[1].weight[0] = 1e30
    kept = [str(kept) for kept in refold.inspect(model, IMAGE).kept]
    assert any("a weight would not be finite" in k for k in kept)
