"""A plain Layer, unfolded to train on, is the same function, in inference and on real data in training."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from paddle import nn

import refold
from refold.blocks import BLOCKS
from refold.paddle import ExpressionBlock
from refold.verbs import rich_of


def plain() -> Any:
    paddle.seed(0)
    model = nn.Sequential(
        nn.Conv2D(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2D(8, 8, 3, padding="same"),
        nn.ReLU(),
        nn.Conv2D(8, 16, 3, padding=[1, 1], stride=2, groups=2),
        nn.Sequential(nn.Conv2D(16, 4, 1, bias_attr=False)),
        nn.Flatten(),
        nn.Linear(4 * 36, 5),
    )
    model.eval()
    return model


def images() -> Any:
    return paddle.to_tensor((np.random.default_rng(1).normal(size=(8, 3, 12, 12)) * 3 + 1).astype("float32"))


def apart(one: Any, two: Any, x: Any) -> float:
    with paddle.no_grad():
        a, b = one(x), two(x)
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_computes_the_same_in_inference_and_in_training(block: Any) -> None:
    model, x = plain(), images()
    rich = refold.unfold(model, block.__name__, x)
    assert all(isinstance(rich[place], ExpressionBlock) for place in (0, 2, 4))
    assert not rich.training
    assert apart(rich, model, x) < 1e-6
    rich.train()
    assert apart(rich, model, x) < 1e-5


def test_it_trains_and_folds_back() -> None:
    model, x = plain(), images()
    rich = refold.unfold(model, "repvgg", x)
    rich.train()
    optimizer = paddle.optimizer.SGD(0.01, parameters=rich.parameters())
    for _ in range(3):
        (rich(x) ** 2).mean().backward()
        optimizer.step()
        optimizer.clear_grad()
    rich.eval()
    assert apart(rich, model, x) > 1e-3
    folded = refold.fold(rich, x)
    assert refold.prove(rich, folded, x).ok
    assert sum(isinstance(layer, nn.Conv2D) for layer in folded.sublayers()) <= 4


def test_types_frozen_weights_and_shared_layers_stay() -> None:
    model = plain()
    model.to(dtype="float64")
    model[0].weight.stop_gradient = True
    rich = refold.unfold(model, "mobileone", images().astype("float64"))
    assert {str(parameter.dtype) for parameter in rich[0].parameters()} == {"paddle.float64"}
    assert all(parameter.stop_gradient for parameter in rich[0].parameters())
    assert not any(parameter.stop_gradient for parameter in rich[2].parameters())

    conv = nn.Conv2D(4, 4, 3, padding=1)
    shared = nn.Sequential(conv, nn.ReLU(), conv)
    shared.eval()
    x = paddle.randn([2, 4, 5, 5])
    rich = refold.unfold(shared, "repvgg", x)
    assert rich[0] is rich[2]
    assert apart(rich, shared, x) < 1e-6
    assert isinstance(refold.unfold(conv, "acnet"), ExpressionBlock)  # the model itself


def test_a_layer_in_training_stays_in_training() -> None:
    model = plain()
    model.train()
    rich = refold.unfold(model, "repvgg", images())
    assert all(layer.training for layer in rich.sublayers(include_self=True))


class Halved(nn.Conv2D):  # type: ignore[misc]  # Paddle's classes have no types
    def forward(self, x: Any) -> Any:
        return super().forward(x) / 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Linear(3, 3), "the model has no convolutions"),
        (lambda: Halved(2, 2, 1), "0: it is a Halved"),
        (lambda: nn.utils.weight_norm(nn.Conv2D(2, 2, 1)), "0: it has hooks"),
        (
            lambda: nn.Conv2D(2, 2, 3, padding=1, padding_mode="reflect"),
            "pads with other numbers than zeros",
        ),
        (lambda: nn.Conv2D(2, 2, 1, data_format="NHWC"), "its layout is NHWC, and blocks work on NCHW"),
        (lambda: nn.Conv2D(2, 2, 3, padding="same", stride=2), "moves with the size of the input"),
        (lambda: nn.Conv2D(2, 2, 3, padding=[1, 0, 1, 0]), "it reads 3 positions with a padding of (1, 0)"),
    ],
)
def test_what_is_kept_is_kept_with_its_reason(make: Any, words: str) -> None:
    model = nn.Sequential(make())
    model.eval()
    with pytest.raises(refold.InputError, match="nothing was unfolded") as caught:
        refold.unfold(model, "repvgg")
    assert words in str(caught.value)


def test_paths_are_those_of_the_model() -> None:
    assert rich_of(plain(), "repvgg", only=("5.*",)).unfolded == ("5.0",)
    with pytest.raises(refold.InputError, match="the model does not run on the example"):
        refold.unfold(plain(), "repvgg", np.zeros((2, 5, 12, 12), "float32"))
