"""A plain module, unfolded to train on, is the same function, in inference and on real data in training."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import refold
from refold.blocks import BLOCKS, BatchNorm, Sum, convolution
from refold.torch import ExpressionBlock
from refold.verbs import rich_of


def plain() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding="same", dilation=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, stride=2, groups=2),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(16, 4, 1)),
        nn.Flatten(),
        nn.Linear(4 * 36, 5),
    ).eval()


def images() -> Any:
    return torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(1)) * 3 + 1


def apart(one: Any, two: Any, x: Any) -> float:
    with torch.no_grad():
        a, b = one(x), two(x)
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_computes_the_same_in_inference_and_in_training(block: Any) -> None:
    model, x = plain(), images()
    if block.__name__ == "diverse_branch":
        model[2] = nn.Conv2d(8, 8, 3, padding="same").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rich = refold.unfold(model, block.__name__, x)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert isinstance(rich[0], ExpressionBlock)
    assert isinstance(rich[7][0], ExpressionBlock)
    assert not rich.training
    assert apart(rich, model, x) < 1e-6
    assert apart(rich, model, torch.randn(2, 3, 12, 12)) < 1e-6
    trained = copy.deepcopy(rich).train()
    trained[3].eval()  # the model's own batch norm has statistics of its own
    assert apart(trained, model, x) < 1e-5
    assert torch.equal(rich[3].running_mean, model[3].running_mean)


def test_it_trains_and_folds_back() -> None:
    model, x = plain(), images()
    rich = refold.unfold(model, "repvgg", x).train()
    optimizer = torch.optim.SGD(rich.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        (rich(x) ** 2).mean().backward()
        assert all(
            parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in rich[0].parameters()
        )
        optimizer.step()
    assert apart(rich.eval(), model, x) > 1e-3
    folded = refold.fold(pickle.loads(pickle.dumps(rich)), x)
    assert refold.prove(rich, folded, x).ok
    convolutions = [module for module in folded.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 4


def test_without_data_the_statistics_are_the_usual_ones() -> None:
    rich = refold.unfold(plain(), "repvgg", (None, 3, 12, 12))
    norm = rich[0].part("branch0/batch_norm")
    assert torch.equal(norm.running_var, torch.ones(8))
    assert torch.equal(norm.running_mean, torch.zeros(8))
    assert apart(rich, plain(), images()) < 1e-6


def test_types_frozen_weights_and_shared_modules_stay() -> None:
    model = plain().to(torch.bfloat16)
    model[0].requires_grad_(False)
    model[7] = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 1)).to(torch.bfloat16)
    rich = refold.unfold(model, "mobileone")
    assert {tensor.dtype for tensor in rich.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in rich[0].parameters())
    assert all(parameter.requires_grad for parameter in rich[7].parameters())

    conv = nn.Conv2d(4, 4, 3, padding=1)
    shared = nn.Sequential(conv, nn.ReLU(), conv).eval()
    x = torch.randn(2, 4, 5, 5)
    rich = refold.unfold(shared, "repvgg", x)
    assert rich[0] is rich[2]
    assert apart(rich, shared, x) < 1e-6
    assert isinstance(refold.unfold(conv.eval(), "acnet"), ExpressionBlock)  # the model itself
    wrapped = torch.optim.swa_utils.AveragedModel(shared)
    assert isinstance(refold.unfold(wrapped, "repvgg")[0], ExpressionBlock)


def test_a_model_in_training_stays_in_training_and_its_own_statistics_stay() -> None:
    model = plain().train()
    rich = refold.unfold(model, "repvgg", images())
    assert all(module.training for module in rich.modules())
    assert torch.equal(rich[3].running_mean, plain()[3].running_mean)


def test_a_function_of_ones_own_chooses_block_and_place() -> None:
    def twice(channels_in: int, filters: int, *sizes: Any, norm: BatchNorm, axes: int) -> Any:
        if sizes[0] != (3,) * axes or sizes[1] != (1,) * axes:
            return None
        conv = convolution(filters, *sizes[:3], groups=sizes[3], axes=axes)
        return Sum(conv | norm, 0.5 * (conv | norm))

    found = rich_of(plain(), twice, images(), seed=3)
    assert found.unfolded == ("0", "2")
    assert dict(found.kept) == {"5": "the block leaves it", "7.0": "the block leaves it"}
    assert rich_of(plain(), "repvgg", only=("7.*",)).unfolded == ("7.0",)


def odd(module: Any) -> Any:
    return nn.Sequential(module).eval()


class Halved(nn.Conv2d):
    def forward(self, input: Any) -> Any:
        return super().forward(input) / 2


def hooked() -> Any:
    conv = nn.Conv2d(2, 2, 1)
    conv.register_forward_hook(lambda module, inputs, output: output * 2)
    return conv


def tied() -> Any:
    one, two = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
    two.weight = one.weight
    return nn.Sequential(one, two)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Linear(3, 3), "the model has no convolutions"),
        (lambda: Halved(2, 2, 1), "0: it is a Halved"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 1)), "0: it is a ParametrizedConv2d"),
        (
            lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
            "pads with other numbers than zeros",
        ),
        (hooked, "0: it has hooks"),
        (tied, "0.0: its weight is that of another module"),
        (lambda: nn.Conv2d(2, 2, 3), "it reads 3 positions with a padding of (0, 0)"),
    ],
)
def test_what_is_kept_is_kept_with_its_reason(make: Any, words: str) -> None:
    with pytest.raises(refold.InputError, match="nothing was unfolded") as caught:
        refold.unfold(odd(make()), "repvgg")
    assert words in str(caught.value)


def test_bad_input_is_told_in_words() -> None:
    with pytest.raises(refold.InputError, match="there is no block 'vgg'; there are repvgg, acnet"):
        refold.unfold(plain(), "vgg")
    with pytest.raises(refold.InputError, match="no convolution has a path like stage1"):
        refold.unfold(plain(), "repvgg", only=("stage1.*",))
    with pytest.raises(refold.InputError, match="the model does not run on the example"):
        refold.unfold(plain(), "repvgg", np.zeros((2, 5, 12, 12), "float32"))


@pytest.mark.parametrize(
    ("kind", "layout"), [(nn.Conv2d, torch.channels_last), (nn.Conv3d, torch.channels_last_3d)]
)
def test_channels_stay_last(kind: Any, layout: Any) -> None:
    model = nn.Sequential(kind(3, 8, 3, padding=1)).to(memory_format=layout).eval()
    rich = refold.unfold(model, "repvgg")
    kernels = [parameter for parameter in rich.parameters() if parameter.ndim > 1]
    assert len(kernels) == 2
    assert all(kernel.is_contiguous(memory_format=layout) for kernel in kernels)
