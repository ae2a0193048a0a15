"""Train-time blocks, and their folds by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Case:
    """Two models in inference, an input of both, and whether the second is the first one's fold. ``source`` says
    where a fault comes from."""

    name: str
    before: nn.Module
    after: nn.Module
    example: torch.Tensor
    equal: bool
    source: str = ""


Folded = tuple[torch.Tensor, torch.Tensor]  # a kernel and a bias in float64


class RepBlock(nn.Module):
    """Branches of square convolutions with batch norms, one of them an identity where ``skip`` says so
    (RepVGG, MobileOne)."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernels: Sequence[int] = (3, 1),
        *,
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
        skip: bool = True,
    ) -> None:
        super().__init__()
        self.size, self.stride, self.groups, self.dilation = max(kernels), stride, groups, dilation
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for k in kernels:
            pad = dilation * (k // 2)
            self.convs.append(nn.Conv2d(channels_in, channels_out, k, stride, pad, dilation, groups, bias=False))
            self.norms.append(nn.BatchNorm2d(channels_out))
        has_skip = skip and channels_in == channels_out and stride == 1
        self.skip = nn.BatchNorm2d(channels_in) if has_skip else None

    def forward(self, x: Any) -> Any:
        y = self.norms[0](self.convs[0](x))
        for conv, norm in zip(self.convs[1:], self.norms[1:], strict=True):
            y = y + norm(conv(x))
        return y if self.skip is None else y + self.skip(x)


def scale_and_shift(norm: nn.BatchNorm2d) -> Folded:
    """What a batch norm in inference multiplies with and adds."""
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def normed(kernel: torch.Tensor, norm: nn.BatchNorm2d) -> Folded:
    """A kernel without bias, and the batch norm behind it."""
    scale, shift = scale_and_shift(norm)
    return kernel.double() * scale[:, None, None, None], shift


def identity_kernel(channels: int, groups: int) -> torch.Tensor:
    """The 1x1 kernel that changes nothing."""
    kernel = torch.zeros(channels, channels // groups, 1, 1, dtype=torch.float64)
    kernel[torch.arange(channels), torch.arange(channels) % (channels // groups)] = 1.0
    return kernel


def centered(kernel: torch.Tensor, size: int) -> torch.Tensor:
    """A kernel in the middle of a larger one."""
    down, right = size - kernel.shape[2], size - kernel.shape[3]
    return F.pad(kernel, (right // 2, right - right // 2, down // 2, down - down // 2))


def parts(block: RepBlock) -> list[Folded]:
    """The branches of a block, each as a kernel of the block's size and a bias."""
    found = [normed(conv.weight, norm) for conv, norm in zip(block.convs, block.norms, strict=True)]
    if block.skip is not None:
        found.append(normed(identity_kernel(block.skip.num_features, block.groups), block.skip))
    return [(centered(kernel, block.size), bias) for kernel, bias in found]


def total(found: Sequence[Folded]) -> Folded:
    """The sum of branches."""
    kernels, biases = zip(*found, strict=True)
    return torch.stack(kernels).sum(dim=0), torch.stack(biases).sum(dim=0)


def conv_of(folded: Folded, **settings: Any) -> nn.Conv2d:
    """A convolution with these weights, each rounded once."""
    kernel, bias = folded
    out, per_group, *size = kernel.shape
    conv = nn.Conv2d(per_group * settings.get("groups", 1), out, tuple(size), **settings)
    with torch.no_grad():
        conv.weight.copy_(kernel)
        conv.bias.copy_(bias)
    return conv


def folded_block(block: RepBlock) -> nn.Conv2d:
    """The convolution that a block equals."""
    return conv_of(total(parts(block)), **settings_of(block))


def settings_of(block: RepBlock) -> dict[str, Any]:
    """The settings of that convolution."""
    reach = block.dilation * (block.size // 2)
    return {"stride": block.stride, "padding": reach, "dilation": block.dilation, "groups": block.groups}


def trained(model: nn.Module, seed: int, spread: float = 0.5) -> nn.Module:
    """The model as if it had been trained: batch norms with statistics of their own, gains of both signs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.3, 2.0, generator=generator)
                module.weight.uniform_(1 - spread, 1 + spread, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
            elif isinstance(module, nn.Conv2d | nn.Linear):
                fan = module.weight[0].numel()
                module.weight.normal_(0, fan**-0.5, generator=generator)
                if module.bias is not None:
                    module.bias.normal_(0, 0.3, generator=generator)
    return model.eval()


def stack(blocks: Sequence[nn.Module]) -> nn.Sequential:
    """Blocks with activations between, and a classifier."""
    body: list[nn.Module] = []
    for block in blocks:
        body += [block, nn.ReLU()]
    last = blocks[-1]
    channels = last.norms[0].num_features if isinstance(last, RepBlock) else last.out_channels
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def folded_stack(model: nn.Sequential) -> nn.Sequential:
    """The same with every block folded; all other layers are those of the model."""
    return nn.Sequential(*(folded_block(layer) if isinstance(layer, RepBlock) else layer for layer in model)).eval()


def image(channels: int, size: int = 12, seed: int = 0) -> torch.Tensor:
    """A random input."""
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(seed))
