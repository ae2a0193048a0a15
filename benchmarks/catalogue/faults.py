"""Right folds with one fault in them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from catalogue.nets import (
    Case,
    Folded,
    RepBlock,
    conv_of,
    folded_stack,
    image,
    parts,
    settings_of,
    stack,
    total,
    trained,
)

Tensor = torch.Tensor


def faults() -> list[Case]:
    """Every fault, in the middle of three blocks (where it can be there)."""
    found = [_in_a_stack(name, edit) for name, edit in KERNELS.items()]
    found += [_in_a_stack(name, _with_norms(edit)) for name, edit in NORMS.items()]
    found += [_in_a_stack(name, edit) for name, edit in GEOMETRY.items()]
    found += [
        _pixel("one border pixel of one channel off by 1e-3", (3, 0, 5), 1e-3),
        _pixel("one corner of one channel off by 1e-5", (3, 0, 0), 1e-5),
    ]
    return [*found, _groups(), _tied(), _bias_before_padding(), _axes(), *hidden()]


def _in_a_stack(name: str, edit: Callable[[RepBlock, nn.Conv2d], nn.Module]) -> Case:
    model = trained(stack([RepBlock(3, 8), RepBlock(8, 8), RepBlock(8, 8)]), seed=1)
    after = folded_stack(model)
    with torch.no_grad():
        after[2] = edit(model[2], after[2])
    return Case(name, model, after.eval(), image(3), equal=False)


# ---- one kernel or bias --------------------------------------------------------------------------


def _changed(change: Callable[[Tensor, Tensor], Folded]) -> Callable[[RepBlock, nn.Conv2d], nn.Module]:
    def edit(block: RepBlock, conv: nn.Conv2d) -> nn.Module:
        wrong = copy.deepcopy(conv)
        weight, bias = change(conv.weight.clone(), conv.bias.clone())
        wrong.weight.copy_(weight)
        wrong.bias.copy_(bias)
        return wrong

    return edit


def _at(place: tuple[int, ...], factor: float) -> Callable[[Tensor, Tensor], Folded]:
    def change(weight: Tensor, bias: Tensor) -> Folded:
        weight[place] *= factor
        return weight, bias

    return change


def _swapped(tensor: Tensor) -> Tensor:
    return tensor[torch.tensor([1, 0, *range(2, len(tensor))])]


KERNELS: Mapping[str, Callable[[RepBlock, nn.Conv2d], nn.Module]] = {
    "one weight off by 1e-5": _changed(_at((3, 2, 0, 1), 1 + 1e-5)),
    "one channel off by 1e-5": _changed(_at((3,), 1 + 1e-5)),
    "one channel off by 1e-4": _changed(_at((3,), 1 + 1e-4)),
    "one weight gone": _changed(_at((3, 2, 0, 1), 0.0)),
    "one weight not a number": _changed(_at((3, 2, 0, 1), float("nan"))),
    "one weight infinite": _changed(_at((3, 2, 0, 1), float("inf"))),
    "inputs and outputs transposed": _changed(lambda w, b: (w.transpose(0, 1), b)),
    "taps transposed": _changed(lambda w, b: (w.transpose(2, 3), b)),
    "taps flipped": _changed(lambda w, b: (w.flip(2, 3), b)),
    "two channels swapped": _changed(lambda w, b: (_swapped(w), _swapped(b))),
    "two biases swapped": _changed(lambda w, b: (w, _swapped(b))),
    "bias doubled": _changed(lambda w, b: (w, 2 * b)),
    "bias dropped": _changed(lambda w, b: (w, 0 * b)),
    "weights taken through half precision": _changed(lambda w, b: (w.half().float(), b)),
    "weights taken through bfloat16": _changed(lambda w, b: (w.bfloat16().float(), b)),
}


# ---- batch norms ---------------------------------------------------------------------------------


def _with_norms(change: Callable[[RepBlock], list[Folded]]) -> Callable[[RepBlock, nn.Conv2d], nn.Module]:
    return lambda block, conv: conv_of(total(change(block)), **settings_of(block))


def _first_norm(change: Callable[[nn.BatchNorm2d], Any]) -> Callable[[RepBlock], list[Folded]]:
    def edit(block: RepBlock) -> list[Folded]:
        wrong = copy.deepcopy(block)
        change(wrong.norms[0])
        return parts(wrong)

    return edit


def _without_root(block: RepBlock) -> list[Folded]:
    norm = block.norms[0]
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps)
    shift = norm.bias.double() - norm.running_mean.double() * scale
    return [(block.convs[0].weight.double() * scale[:, None, None, None], shift), *parts(block)[1:]]


NORMS: Mapping[str, Callable[[RepBlock], list[Folded]]] = {
    "epsilon 1e-3 for 1e-5": _first_norm(lambda norm: setattr(norm, "eps", 1e-3)),
    "epsilon left out": _first_norm(lambda norm: setattr(norm, "eps", 0.0)),
    "momentum taken for epsilon": _first_norm(lambda norm: setattr(norm, "eps", norm.momentum)),
    "gamma left out": _first_norm(lambda norm: norm.weight.fill_(1.0)),
    "mean left out": _first_norm(lambda norm: norm.running_mean.zero_()),
    "variance taken for its root": _without_root,
    "one branch left out": lambda block: [part for i, part in enumerate(parts(block)) if i != 1],
    "identity left out": lambda block: parts(block)[:-1],
    "identity twice": lambda block: [*parts(block), parts(block)[-1]],
    "1x1 in a corner": lambda block: [
        part if i != 1 else (part[0].roll((-1, -1), (2, 3)), part[1]) for i, part in enumerate(parts(block))
    ],
}


# ---- geometry ------------------------------------------------------------------------------------


class Shifted(nn.Module):
    """A constant added at one place."""

    def __init__(self, conv: nn.Module, place: tuple[int, ...], size: tuple[int, ...], by: float) -> None:
        super().__init__()
        self.conv = conv
        extra = torch.zeros(1, *size)
        extra[(0, *place)] = by
        self.register_buffer("extra", extra)

    def forward(self, x: Any) -> Any:
        return self.conv(x) + self.extra


def _moved(block: RepBlock, conv: nn.Conv2d) -> nn.Module:
    other = conv_of((conv.weight, conv.bias), stride=conv.stride)
    return nn.Sequential(nn.ZeroPad2d((1, 1, 2, 0)), other)


def _like(**changes: Any) -> Callable[[RepBlock, nn.Conv2d], nn.Module]:
    return lambda block, conv: conv_of((conv.weight, conv.bias), **{**settings_of(block), **changes})


GEOMETRY: Mapping[str, Callable[[RepBlock, nn.Conv2d], nn.Module]] = {
    "stride 2 for 1": _like(stride=2),
    "dilation 2 for 1": _like(dilation=2, padding=2),
    "padding moved by one": _moved,
    "padding one too small": _like(padding=0),
    "replicated for zero padding": _like(padding_mode="replicate"),
}


def _pixel(name: str, place: tuple[int, ...], by: float) -> Case:
    """One output of a block is off, at one place."""
    model = trained(stack([RepBlock(3, 8), RepBlock(8, 8), RepBlock(8, 8)]), seed=1)
    after = folded_stack(model)
    size = (8, 12, 12)
    model[2], after[2] = Shifted(model[2], place, size, 0.0), Shifted(after[2], place, size, by)
    return Case(name, model.eval(), after.eval(), image(3), equal=False)


def _groups() -> Case:
    """The channels of the two groups read each other's inputs."""
    model = trained(stack([RepBlock(4, 8, groups=2), RepBlock(8, 8, groups=2)]), seed=2)
    after = folded_stack(model)
    right = after[2]
    wrong = copy.deepcopy(right)
    with torch.no_grad():
        wrong.weight.copy_(right.weight.roll(4, 0))
    after[2] = wrong
    return Case("groups exchanged", model, after, image(4), equal=False)


class Twice(nn.Module):
    """One convolution used twice, with a batch norm each time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.first, self.second = nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def forward(self, x: Any) -> Any:
        return self.second(self.conv(torch.relu(self.first(self.conv(x)))))


class Tied(nn.Module):
    """A matrix used twice, with an activation between."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Any) -> Any:
        return self.inner(torch.tanh(self.norm(self.inner(x))))


def _tied() -> Case:
    """A layer that is used twice is edited: also where nothing was folded."""
    model = trained(Tied(), seed=3)
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.inner.weight[2, 3] *= 1 + 1e-5
    return Case("tied weight edited", model, wrong, torch.randn(2, 8, generator=torch.manual_seed(0)), equal=False)


def _bias_before_padding() -> Case:
    """A 1x1 convolution with a bias, then a padded 3x3 one, merged: right but for the border."""
    model = trained(nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 5, 3, padding=1), nn.ReLU()), seed=4)
    one, three = model[0], model[1]
    kernel = torch.einsum("omhw,mc->ochw", three.weight.double(), one.weight.double()[:, :, 0, 0])
    bias = three.bias.double() + torch.einsum("omhw,m->o", three.weight.double(), one.bias.double())
    merged = nn.Sequential(conv_of((kernel, bias), padding=1), nn.ReLU()).eval()
    return Case("bias before zero padding", model, merged, image(4), equal=False)


def _axes() -> Case:
    """A 1x3 and a 3x1 branch, exchanged."""
    model = trained(nn.Sequential(Crossed(), nn.ReLU()), seed=5)
    block = model[0]
    kernel = torch.zeros(6, 4, 3, 3, dtype=torch.float64)
    kernel[:, :, :, 1:2] += block.wide.weight.double().transpose(2, 3)
    kernel[:, :, 1:2, :] += block.tall.weight.double().transpose(2, 3)
    bias = block.wide.bias.double() + block.tall.bias.double()
    return Case(
        "axes exchanged",
        model,
        nn.Sequential(conv_of((kernel, bias), padding=1), nn.ReLU()).eval(),
        image(4),
        equal=False,
    )


class Crossed(nn.Module):
    """A wide and a tall kernel (ACNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(4, 6, (1, 3), padding=(0, 1))
        self.tall = nn.Conv2d(4, 6, (3, 1), padding=(1, 0))

    def forward(self, x: Any) -> Any:
        return self.wide(x) + self.tall(x)


# ---- what random inputs do not show --------------------------------------------------------------


def hidden() -> list[Case]:
    """Changes with an effect on few inputs only, or below any tolerance that does not know the layer."""
    model = trained(stack([RepBlock(3, 8), RepBlock(8, 8)]), seed=6)

    def with_last(*layers: nn.Module) -> nn.Sequential:
        return nn.Sequential(*folded_stack(model)[:-3], *layers).eval()

    found = []
    capped = nn.Sequential(*model[:-3], nn.Hardtanh(-1e3, 1e3), nn.Flatten()).eval()
    opened = with_last(nn.Identity(), nn.Flatten())
    found.append(Case("a limit of 1000 left out", capped, opened, image(3), equal=False))

    quiet = trained(stack([RepBlock(3, 8), RepBlock(8, 8)]), seed=7)
    with torch.no_grad():
        quiet[0].norms[0].weight[2], quiet[0].norms[1].weight[2] = 1e-6, 1e-6
        quiet[0].norms[0].bias[2], quiet[0].norms[1].bias[2] = 1e-6, 1e-6
    wrong = folded_stack(quiet)
    wrong[0] = copy.deepcopy(wrong[0])
    with torch.no_grad():
        wrong[0].weight[2] *= 1.5
    found.append(Case("a quiet channel half as large again", quiet, wrong, image(3), equal=False))

    table = nn.Sequential(nn.Flatten(), nn.Linear(3 * 36, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    dead = copy.deepcopy(table)
    with torch.no_grad():
        for net in (table, dead):
            net[1].weight.copy_(torch.randn(16, 108, generator=torch.Generator().manual_seed(8)) * 0.1)
            net[1].bias[5] = -50.0
        dead[3].load_state_dict(table[3].state_dict())
        dead[3].weight[1, 5] += 1.0
        dead[1].load_state_dict(table[1].state_dict())
    found.append(Case("a weight of a unit that is hardly ever on", table, dead, image(3, 6), equal=False))
    return found
