"""Modules as people write them, each with what folding must leave of it.

Every entry builds a module with non-trivial weights (random batch norm statistics, biases, negative scales)
and says how many operators must remain: ``operators`` counts the calls of the folded module, without those
that only take a result apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Entry:
    name: str
    build: Callable[[], Any]
    operators: int
    says: tuple[str, ...] = ()  # what the plan must say of what is kept apart
    shape: tuple[int, ...] = (2, 4, 9, 9)


ZOO: list[Entry] = []


def entry(operators: int, *says: str, shape: tuple[int, ...] = (2, 4, 9, 9)) -> Callable[[Any], Any]:
    def note(build: Callable[[], Any]) -> Callable[[], Any]:
        ZOO.append(Entry(build.__name__, build, operators, says, shape))
        return build

    return note


def randomize(model: Any, seed: int = 0) -> Any:
    """Weights of ordinary size, none of them at a value that hides a mistake (0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point():
                continue
            if "running_var" in name:
                tensor.uniform_(0.3, 2.0, generator=generator)
            elif tensor.ndim > 1:
                tensor.normal_(0.0, tensor[0].numel() ** -0.5, generator=generator)
            else:
                sign = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
                tensor.uniform_(0.3, 1.2, generator=generator).mul_(sign)
    return model.eval()


def conv_bn(c: int, d: int, k: int = 3, **settings: Any) -> Any:
    settings.setdefault("padding", k // 2)
    return nn.Sequential(nn.Conv2d(c, d, k, bias=False, **settings), nn.BatchNorm2d(d))


class Lambda(nn.Module):
    """A forward in one line, on parts by name."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.body = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Any) -> Any:
        return self.body(self, x)


def made(forward: Callable[..., Any], **parts: Any) -> Any:
    return randomize(Lambda(forward, **parts))


class RepVGG(nn.Module):
    """RepVGG as published: three branches, and the activation behind their sum."""

    def __init__(self, c: int, d: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.dense = conv_bn(c, d, 3, stride=stride, groups=groups)
        self.pointwise = conv_bn(c, d, 1, stride=stride, groups=groups)
        self.identity = nn.BatchNorm2d(c) if c == d and stride == 1 else None
        self.alpha = nn.Parameter(torch.tensor(0.3))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Any) -> Any:
        y = self.dense(x) + self.alpha * self.pointwise(x)
        if self.identity is not None:
            y += self.identity(x)
        return self.act(y)


@entry(2)
def repvgg() -> Any:
    return randomize(RepVGG(4, 4))


@entry(6)
def repvgg_network() -> Any:
    return randomize(nn.Sequential(RepVGG(4, 8, stride=2), RepVGG(8, 8, groups=4), RepVGG(8, 8)))


@entry(1)
def acnet() -> Any:
    return made(
        lambda s, x: s.square(x) + s.tall(x) + s.wide(x),
        square=conv_bn(4, 6),
        tall=nn.Sequential(nn.Conv2d(4, 6, (3, 1), padding=(1, 0), bias=False), nn.BatchNorm2d(6)),
        wide=nn.Sequential(nn.Conv2d(4, 6, (1, 3), padding=(0, 1), bias=False), nn.BatchNorm2d(6)),
    )


@entry(1, shape=(2, 4, 14, 14))
def acnet_that_crops() -> Any:
    """ACNet without padding: the narrow kernels read a cropped input."""
    return made(
        lambda s, x: s.square(x) + s.tall(x[:, :, :, 1:-1]) + s.wide(x[:, :, 1:-1, :]),
        square=conv_bn(4, 6, padding=0),
        tall=nn.Sequential(nn.Conv2d(4, 6, (3, 1), bias=False), nn.BatchNorm2d(6)),
        wide=nn.Sequential(nn.Conv2d(4, 6, (1, 3), bias=False), nn.BatchNorm2d(6)),
    )


class BorderBN(nn.Module):
    """A batch norm that pads with what it makes of 0, as in DiverseBranchBlock's code."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(c)

    def forward(self, x: Any) -> Any:
        y = self.bn(x)
        border = self.bn.bias.detach() - self.bn.running_mean * self.bn.weight.detach() / torch.sqrt(
            self.bn.running_var + self.bn.eps
        )
        y = F.pad(y, [1] * 4)
        border = border.view(1, -1, 1, 1)
        y[:, :, 0:1, :] = border
        y[:, :, -1:, :] = border
        y[:, :, :, 0:1] = border
        y[:, :, :, -1:] = border
        return y


@entry(1)
def multiplied_paths() -> Any:
    return made(
        lambda s, x: s.three(s.one(x)) + s.pool(s.again(x)),
        one=nn.Conv2d(4, 8, 1),
        three=conv_bn(8, 5, 3, padding=0),
        again=nn.Conv2d(4, 5, 1),
        pool=nn.Sequential(nn.AvgPool2d(3, 1), nn.BatchNorm2d(5)),
    )


@entry(1)
def mobileone() -> Any:
    def forward(s: Any, x: Any) -> Any:
        return sum(branch(x) for branch in s.branches) + s.scale(x) + s.skip(x)

    branches = nn.ModuleList([conv_bn(4, 4, 3, groups=4) for _ in range(4)])
    return made(forward, branches=branches, scale=conv_bn(4, 4, 1, groups=4), skip=nn.BatchNorm2d(4))


@entry(1)
def large_and_small_kernels() -> Any:
    return made(
        lambda s, x: s.large(x) + s.small(x) + s.dilated(x),
        large=conv_bn(4, 4, 7, groups=4),
        small=conv_bn(4, 4, 3, groups=4),
        dilated=conv_bn(4, 4, 3, groups=4, dilation=2, padding=2),
    )


@entry(2, shape=(2, 7, 4))
def dense_residual() -> Any:
    """LeViT: a linear layer and a batch norm that sees every position of every example alike."""

    def forward(s: Any, x: Any) -> Any:
        y = s.linear(x)
        return F.hardswish(s.bn(y.flatten(0, 1)).reshape_as(y))

    return made(forward, linear=nn.Linear(4, 6, bias=False), bn=nn.BatchNorm1d(6))


@entry(2)
def dropout_and_identity_vanish() -> Any:
    return randomize(
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.Identity(), nn.Dropout2d(), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU())
    )


@entry(2, shape=(1, 3, 12, 12))
def space_to_depth() -> Any:
    """Focus of YOLOv5: every second row and column beside the others, where there are as many of both."""

    def forward(s: Any, x: Any) -> Any:
        corners = x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]
        return F.silu(s.conv(torch.cat(corners, 1)))

    return made(forward, conv=conv_bn(12, 8, 3))


@entry(5)
def halves_of_whatever_there_is() -> Any:
    """PicoDet's shuffle block splits by the number of channels that it finds."""

    def forward(s: Any, x: Any) -> Any:
        y = F.hardswish(s.conv(x))
        one, two = torch.split(y, y.shape[1] // 2, dim=1)
        return torch.cat([F.relu(one), two], 1)

    return made(forward, conv=conv_bn(4, 8, 1))


@entry(11)
def sums_of_many_are_many_sums() -> Any:
    """C3k2 of YOLO11: the last sum may go into the convolution behind it only if that saves operators."""

    def forward(s: Any, x: Any) -> Any:
        y = list(F.relu(s.first(x)).chunk(2, 1))
        y.append(y[-1] + F.relu(s.inner(y[-1])))
        y.append(y[-1] + F.relu(s.deeper(y[-1])))
        return s.last(torch.cat(y, 1))

    parts = {"first": conv_bn(4, 8, 1), "inner": conv_bn(4, 4, 3), "deeper": conv_bn(4, 4, 3)}
    return made(forward, **parts, last=conv_bn(16, 8, 1))


@entry(5)
def shared_convolution_with_two_norms() -> Any:
    return made(
        lambda s, x: torch.cat([F.relu(s.first(s.conv(x))), s.second(s.conv(F.relu(x)))], 1),
        conv=nn.Conv2d(4, 4, 3, padding=1),
        first=nn.BatchNorm2d(4),
        second=nn.BatchNorm2d(4),
    )


@entry(2)
def tapped_intermediate() -> Any:
    def forward(s: Any, x: Any) -> Any:
        y = s.conv(x)
        return y, s.bn(y)

    return made(forward, conv=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4))


@entry(1)
def weights_computed_in_forward() -> Any:
    def forward(s: Any, x: Any) -> Any:
        w = s.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        kernel = torch.zeros(6, 4, 3, 3)
        kernel[:, :, 1:2, 1:2] = s.point
        return s.bn(F.conv2d(x, w + kernel, s.bias, padding=1))

    return made(
        forward,
        weight=nn.Parameter(torch.empty(6, 4, 3, 3)),
        point=nn.Parameter(torch.empty(6, 4, 1, 1)),
        bias=nn.Parameter(torch.empty(6)),
        bn=nn.BatchNorm2d(6),
    )


@entry(1, shape=(3, 5))
def low_rank_adaptation() -> Any:
    return made(
        lambda s, x: s.linear(x) + 0.5 * s.up(s.down(x)),
        linear=nn.Linear(5, 7),
        down=nn.Linear(5, 2, bias=False),
        up=nn.Linear(2, 7, bias=False),
    )


@entry(1)
def asymmetric_padding() -> Any:
    return made(lambda s, x: s.conv(F.pad(x, (1, 1, 1, 1))), conv=conv_bn(4, 4, 3, padding=0))


@entry(2)
def one_sided_padding() -> Any:
    return made(lambda s, x: s.conv(F.pad(x, (0, 1, 2, 1))), conv=conv_bn(4, 4, 3, padding=0))


@entry(2, "padding with 'reflect' is not a convolution at the border")
def reflected_padding() -> Any:
    return randomize(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4)))


@entry(3, "padded")
def pool_without_counting() -> Any:
    return randomize(
        nn.Sequential(
            nn.Conv2d(4, 4, 1), nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.BatchNorm2d(4), nn.ReLU()
        )
    )


@entry(4)
def split_and_shuffle() -> Any:
    def forward(s: Any, x: Any) -> Any:
        b, c, h, w = x.shape
        y = s.conv(x)
        y = y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        first, second = y.chunk(2, 1)
        return torch.cat([s.bn(first), F.relu(second)], 1)

    return made(forward, conv=nn.Conv2d(4, 4, 3, padding=1), bn=nn.BatchNorm2d(2))


@entry(1, shape=(2, 4, 11))
def one_axis() -> Any:
    return randomize(nn.Sequential(nn.Conv1d(4, 6, 3, stride=2, padding="valid"), nn.BatchNorm1d(6)))


@entry(1, shape=(2, 3, 5, 5, 5))
def three_axes() -> Any:
    return randomize(nn.Sequential(nn.Conv3d(3, 4, 3, padding="same", dilation=2), nn.BatchNorm3d(4)))


@entry(1, shape=(3, 5))
def features() -> Any:
    return randomize(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)))


@entry(1, shape=(3, 7, 5))
def sequences() -> Any:
    return randomize(nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4)))


@entry(3, "statistics of the batch")
def batch_statistics() -> Any:
    return randomize(
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 4, 1))
    )


@entry(2)
def weight_norm() -> Any:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
    return randomize(nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU()))


@entry(3)
def spectral_norm_of_a_transposed_convolution() -> Any:
    conv = nn.utils.parametrizations.spectral_norm(nn.ConvTranspose2d(4, 3, 3))
    return randomize(nn.Sequential(conv, nn.ReLU(), nn.utils.parametrizations.orthogonal(nn.Conv2d(3, 3, 1))))


@entry(2)
def old_weight_norm() -> Any:
    with torch.no_grad():
        conv = nn.utils.weight_norm(nn.Conv2d(4, 4, 3))
    return randomize(nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU()))


@entry(4)
def written_in_place() -> Any:
    def forward(s: Any, x: Any) -> Any:
        y = s.conv(x)
        y *= 2
        y.add_(s.other(x))
        z = s.bn(y)
        y = F.relu(y, inplace=True)
        return z + y

    return made(forward, conv=nn.Conv2d(4, 4, 3, padding=1), other=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act, self.conv = nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Any) -> Any:
        return self.conv(self.act(x)) + x


@entry(4)
def writes_into_what_others_read() -> Any:
    """The activation of a block writes into its input, which a folded branch reads too."""

    def forward(s: Any, x: Any) -> Any:
        y = s.stem(x)
        side = s.side(y)
        out = s.block(y)
        return s.bn(side), out

    return made(forward, stem=conv_bn(4, 4), side=nn.Conv2d(4, 4, 1), block=Block(), bn=nn.BatchNorm2d(4))


class Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Any) -> Any:
        return self.conv(x) if x.mean() > -1e9 else x


@entry(3, "looks at the values")
def partly_traceable() -> Any:
    return randomize(nn.Sequential(conv_bn(4, 4), Looks(), conv_bn(4, 4)))


@entry(6)
def nests() -> Any:
    def forward(s: Any, x: Any) -> Any:
        levels = [s.stem(x)]
        levels.append(F.max_pool2d(levels[-1], 2))
        up = F.interpolate(levels[1], size=levels[0].shape[2:])
        return {"levels": levels, "sum": s.head(up + levels[0])}

    return made(forward, stem=nn.Sequential(*conv_bn(4, 4), nn.ReLU()), head=conv_bn(4, 2, 1))


@entry(9, shape=(2, 6, 8))
def attention() -> Any:
    def forward(s: Any, x: Any) -> Any:
        b, n, c = x.shape
        q, k, v = s.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        return x + s.gamma * s.out(y)

    return made(forward, qkv=nn.Linear(8, 24), out=nn.Linear(8, 8), gamma=nn.Parameter(torch.empty(8)))


@entry(1)
def scales_and_shifts() -> Any:
    return made(
        lambda s, x: (1 - s.conv(x * s.gain[:, None, None] - s.shift.view(1, -1, 1, 1))) / 3.0,
        conv=nn.Conv2d(4, 4, 3),
        gain=nn.Parameter(torch.empty(4)),
        shift=nn.Parameter(torch.empty(4)),
    )


@entry(5)
def squeeze_and_excite() -> Any:
    return made(
        lambda s, x: s.conv(x) * torch.sigmoid(s.gate(x.mean((2, 3), keepdim=True))),
        conv=conv_bn(4, 4),
        gate=nn.Sequential(nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)),
    )


@entry(1)
def channels_last_of_a_linear() -> Any:
    """ConvNeXt's scale and permutes around a pointwise layer."""
    return made(
        lambda s, x: s.conv(x.permute(0, 2, 3, 1).mul(s.gamma).permute(0, 3, 1, 2)),
        gamma=nn.Parameter(torch.empty(4)),
        conv=nn.Conv2d(4, 4, 3),
    )


@entry(5, shape=(2, 16, 4))
def tokens_are_no_channels() -> Any:
    """LeViT's subsampling: some tokens are picked, between layers that have their channels last."""

    def forward(s: Any, x: Any) -> Any:
        b, _, c = x.shape
        picked = s.first(x).view(b, 4, 4, c)[:, ::2, ::2].reshape(b, -1, c)
        y = s.second(picked)
        return s.bn(y.flatten(0, 1)).reshape_as(y)

    return made(forward, first=nn.Linear(4, 4), second=nn.Linear(4, 6), bn=nn.BatchNorm1d(6))


@entry(1)
def diverse_branch() -> Any:
    """DiverseBranchBlock as published: the batch norm of two branches pads with what it makes of 0."""

    def branch(k: int, last: Any) -> Any:
        return nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), BorderBN(4), *last)

    return made(
        lambda s, x: s.origin(x) + s.point(x) + s.average(x) + s.squeezed(x),
        origin=conv_bn(4, 6, 3),
        point=conv_bn(4, 6, 1),
        average=branch(1, [nn.AvgPool2d(3, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1)]),
        squeezed=branch(1, [nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)]),
    )


@entry(2)
def edge_oriented() -> Any:
    """ECBSR: a pointwise convolution, a border of its bias, and a scaled Sobel mask per channel."""

    def forward(s: Any, x: Any) -> Any:
        y = F.conv2d(x, s.k0, s.b0)
        y = F.pad(y, (1, 1, 1, 1), "constant", 0)
        border = s.b0.view(1, -1, 1, 1)
        y[:, :, 0:1, :] = border
        y[:, :, -1:, :] = border
        y[:, :, :, 0:1] = border
        y[:, :, :, -1:] = border
        edges = F.conv2d(y, s.scale * s.mask, s.bias, groups=4)
        return F.prelu(s.conv(x) + edges + x, s.slope)

    model = made(
        forward,
        k0=nn.Parameter(torch.empty(4, 4, 1, 1)),
        b0=nn.Parameter(torch.empty(4)),
        scale=nn.Parameter(torch.empty(4, 1, 1, 1)),
        bias=nn.Parameter(torch.empty(4)),
        conv=nn.Conv2d(4, 4, 3, padding=1),
        slope=nn.Parameter(torch.empty(4)),
    )
    model.register_buffer("mask", torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]).expand(4, 1, 3, 3).clone())
    return model


@entry(8, shape=(2, 4, 8, 8))
def windows() -> Any:
    """Windows as MaxViT cuts them: what is put in order in memory is viewed afterwards."""

    def forward(s: Any, x: Any) -> Any:
        b, c, h, w = x.shape
        y = s.conv(x).permute(0, 2, 3, 1).contiguous().view(b, 2, h // 2, 2, w // 2, c)
        y = y.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, h // 2, w // 2, c)
        return F.softmax(y, 1)

    return made(forward, conv=conv_bn(4, 4))


@entry(8, shape=(2, 7, 4))
def pieces_of_parameters_stay_parameters() -> Any:
    """A matrix product with a transposed parameter, and a slice of one added."""

    def forward(s: Any, x: Any) -> Any:
        return F.softmax(F.relu(x) @ s.matrix.transpose(0, 1), -1) ** 2 + s.table[:7]

    parts = {"matrix": nn.Parameter(torch.empty(5, 4)), "table": nn.Parameter(torch.empty(9, 5))}
    parts["fold"] = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    return made(lambda s, x: forward(s, s.fold(x)), **parts)


@entry(1)
def grouped_branches_and_identity() -> Any:
    """YOLOv7's RepConv with groups, where its own fold is wrong."""
    return made(
        lambda s, x: s.dense(x) + s.pointwise(x) + s.identity(x),
        dense=conv_bn(4, 4, 3, groups=2),
        pointwise=conv_bn(4, 4, 1, groups=2),
        identity=nn.BatchNorm2d(4),
    )


@entry(1)
def residual_of_a_dense_convolution() -> Any:
    """RepViT's Residual, whose own fold takes every convolution for a depthwise one."""
    return made(lambda s, x: x + s.conv(x), conv=conv_bn(4, 4, 3))


@entry(1)
def depthwise_with_identity_and_a_norm_behind() -> Any:
    """RepViT's RepVGGDW: k x k, 1 x 1 with a bias and the input, and a batch norm behind their sum."""
    return made(
        lambda s, x: s.bn(s.conv(x) + s.point(x) + x),
        conv=conv_bn(4, 4, 5, groups=4),
        point=nn.Conv2d(4, 4, 1, groups=4),
        bn=nn.BatchNorm2d(4),
    )


@entry(1)
def dilated_branches() -> Any:
    return made(
        lambda s, x: s.one(x) + s.two(x) + s.three(x),
        one=conv_bn(4, 4, 7, groups=4),
        two=conv_bn(4, 4, 3, groups=4, dilation=2, padding=2),
        three=conv_bn(4, 4, 3, groups=4, dilation=3, padding=3),
    )


@entry(1)
def weights_summed_before_one_convolution() -> Any:
    """OREPA: branches that are summed as weights, each with a factor per channel, and one batch norm behind."""

    def forward(s: Any, x: Any) -> Any:
        point = F.pad(s.point, (1, 1, 1, 1))
        average = torch.einsum("oi,hw->oihw", s.average, torch.full((3, 3), 1 / 9))
        deep = torch.einsum("mihw,om->oihw", s.inner, s.outer)
        parts = torch.stack([s.origin, point, average, deep])
        return s.bn(F.conv2d(x, torch.einsum("boihw,bo->oihw", parts, s.vector), padding=1))

    shapes = {"origin": (6, 4, 3, 3), "point": (6, 4, 1, 1), "average": (6, 4), "inner": (3, 4, 3, 3)}
    shapes |= {"outer": (6, 3), "vector": (4, 6)}
    parts = {name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()}
    return made(forward, bn=nn.BatchNorm2d(6), **parts)


@entry(1, shape=(3, 4))
def norm_in_front_of_two_averaged_heads() -> Any:
    """LeViT's heads: a batch norm in front of each, and the mean of both."""
    return made(
        lambda s, x: (s.one(x) + s.two(x)) / 2,
        one=nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 5)),
        two=nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 5)),
    )


@entry(3)
def implicit_knowledge() -> Any:
    """YOLOv7's detection layer: a shift in front of a pointwise convolution, a factor behind it."""
    return made(
        lambda s, x: torch.sigmoid(s.factor * s.conv(s.shift + F.silu(x))),
        shift=nn.Parameter(torch.empty(1, 4, 1, 1)),
        factor=nn.Parameter(torch.empty(1, 6, 1, 1)),
        conv=nn.Conv2d(4, 6, 1),
    )


@entry(1)
def padding_per_axis() -> Any:
    """The last axis comes first in what ``F.pad`` takes."""
    return made(lambda s, x: s.conv(F.pad(x, (1, 1, 2, 2))), conv=nn.Conv2d(4, 4, (5, 3)))


@entry(7, shape=(2, 4, 4))
def norm_over_tokens() -> Any:
    """As many tokens as channels, and a batch norm that has the tokens for its channels."""

    def forward(s: Any, x: Any) -> Any:
        y = F.relu(s.first(x)).transpose(1, 2)
        return s.bn(y.flatten(0, 1)).reshape_as(y).transpose(1, 2)

    return made(forward, first=nn.Linear(4, 4), bn=nn.BatchNorm1d(4))


@entry(7)
def part_written_in_place() -> Any:
    def forward(s: Any, x: Any) -> Any:
        y = s.conv(x)
        y[:, :2] *= 2
        return F.relu(y) + x

    return made(forward, conv=conv_bn(4, 4))


# ---- batch norms behind concatenations ---------------------------------------------------------------


@entry(6)
def cross_stage_partial() -> Any:
    """YOLOv5's BottleneckCSP: two plain convolutions, concatenated, and one batch norm for both."""
    return made(
        lambda s, x: F.silu(s.bn(torch.cat((s.deep(F.silu(s.stem(x))), s.short(x)), 1))),
        stem=conv_bn(4, 4),
        deep=nn.Conv2d(4, 3, 1, bias=False),
        short=nn.Conv2d(4, 5, 1, bias=False),
        bn=nn.BatchNorm2d(8),
    )


@entry(9)
def chunks_through_depthwise_convolutions() -> Any:
    """RepNeXt's mixer: pieces of the channels through kernels of several shapes, one batch norm behind them."""

    def forward(s: Any, x: Any) -> Any:
        a, b, c = F.relu(x).split((4, 4, 4), 1)
        return F.gelu(s.bn(torch.cat((s.square(a), s.tall(b), s.wide(F.relu(c))), 1)))

    kernels = {"square": (3, 3), "tall": (5, 1), "wide": (1, 5)}
    convs = {n: nn.Conv2d(4, 4, k, padding=(k[0] // 2, k[1] // 2), groups=4) for n, k in kernels.items()}
    return nn.Sequential(conv_bn(4, 12), made(forward, bn=nn.BatchNorm2d(12), **convs)).eval()


@entry(5)
def norm_behind_a_concatenation_with_an_activation() -> Any:
    """What no convolution gives keeps a factor per channel of its own."""
    return made(
        lambda s, x: s.bn(torch.cat([F.relu(s.a(x)), s.b(x)], 1)) * 0.5,
        a=conv_bn(4, 4),
        b=nn.Conv2d(4, 2, 3, padding=1),
        bn=nn.BatchNorm2d(6),
    )


@entry(4, "what conv gives is needed elsewhere too, so folding it in would do it twice")
def norm_behind_a_concatenation_that_is_tapped() -> Any:
    def forward(s: Any, x: Any) -> Any:
        y = s.conv(x)
        z = torch.cat([y, F.relu(y)], 1)
        return s.bn(z), z

    return made(forward, conv=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(8))


# ---- transposed convolutions -------------------------------------------------------------------------


@entry(2)
def decoder_step() -> Any:
    return randomize(nn.Sequential(nn.ConvTranspose2d(4, 6, 4, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU()))


@entry(3)
def transposed_in_groups_with_everything() -> Any:
    turned = nn.ConvTranspose2d(4, 6, 3, 3, 2, output_padding=1, dilation=2, groups=2)
    return randomize(nn.Sequential(conv_bn(4, 4), nn.ReLU(), turned, nn.BatchNorm2d(6)))


@entry(1)
def transposed_branches_are_one() -> Any:
    return made(
        lambda s, x: s.b(s.a(x)) + s.d(s.c(x)) * 2,
        a=nn.ConvTranspose2d(4, 6, 4, 2, 1, bias=False),
        b=nn.BatchNorm2d(6),
        c=nn.ConvTranspose2d(4, 6, 2, 2),
        d=nn.BatchNorm2d(6),
    )


@entry(1)
def cropped_transposed_convolution() -> Any:
    return made(lambda s, x: s.b(s.a(x)[:, :, 1:-1, 1:-1]), a=nn.ConvTranspose2d(4, 6, 4, 2), b=nn.BatchNorm2d(6))


@entry(2, "a transposed convolution puts zeros between its inputs, and a bias before it is not there")
def a_bias_before_a_transposed_convolution() -> Any:
    return randomize(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 6, 2, 2), nn.BatchNorm2d(6)))


@entry(1)
def transposed_without_a_stride_is_a_convolution() -> Any:
    return made(lambda s, x: s.a(x) + s.b(x), a=nn.ConvTranspose2d(4, 6, 3, 1, 1), b=nn.Conv2d(4, 6, 1))


@entry(2, shape=(2, 4, 7))
def transposed_along_one_axis() -> Any:
    return randomize(nn.Sequential(nn.ConvTranspose1d(4, 6, 5, 3, 1), nn.BatchNorm1d(6), nn.ReLU()))


@entry(1, shape=(2, 4, 4, 3, 5))
def transposed_along_three_axes() -> Any:
    return randomize(nn.Sequential(nn.ConvTranspose3d(4, 6, (2, 3, 1), (2, 1, 3)), nn.BatchNorm3d(6)))


# ---- blocks as detectors and mobile networks have them -----------------------------------------------


class WritingSwish(nn.Module):
    """Writes into what it reads, and gives it back."""

    def forward(self, x: Any) -> Any:
        x.mul_(torch.sigmoid(x))
        return x


@entry(17, shape=(2, 4, 8, 8))
def stage_of_reversed_blocks() -> Any:
    """DAMO-YOLO's necks: two branches, and a number in the place of an identity, before a plain convolution; in the
    end everything is put beside each other."""

    def block(c: int) -> Any:
        return Lambda(
            lambda s, x: x + s.behind(s.act(s.dense(x) + s.point(x) + 0)),
            dense=conv_bn(c, c),
            point=conv_bn(c, c, 1),
            act=WritingSwish(),
            behind=nn.Sequential(*conv_bn(c, c), WritingSwish()),
        )

    def forward(s: Any, x: Any) -> Any:
        found = [s.one(x)]
        y = s.two(x)
        for part in s.parts:
            y = part(y)
            found.append(y)
        return s.last(torch.cat(found, axis=1))

    one, two = (nn.Sequential(*conv_bn(4, 4, 1), WritingSwish()) for _ in range(2))
    last = nn.Sequential(*conv_bn(12, 8, 1), WritingSwish())
    return made(forward, one=one, two=two, parts=nn.Sequential(block(4), block(4)), last=last)


@entry(4)
def mean_of_two_heads() -> Any:
    """RepViT's classifier: two batch norms, each with its dense layer, and the mean of both."""

    def forward(s: Any, x: Any) -> Any:
        x = F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1)
        both = s.one(x), s.two(x)
        return (both[0] + both[1]) / 2

    one, two = (nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 5)) for _ in range(2))
    return made(forward, one=one, two=two)


@entry(6, shape=(2, 4, 14, 14))
def large_kernel_beside_a_small_one() -> Any:
    """RepLKNet's block."""
    return made(
        lambda s, x: x + s.out(F.relu(s.large(y := s.into(s.norm(x))) + s.small(y))),
        norm=nn.BatchNorm2d(4),
        into=nn.Sequential(*conv_bn(4, 4, 1), nn.ReLU()),
        large=conv_bn(4, 4, 13, groups=4),
        small=conv_bn(4, 4, 5, groups=4),
        out=conv_bn(4, 4, 1),
    )


@entry(8)
def kernels_of_several_sizes_on_pieces() -> Any:
    """MixNet's depthwise convolutions."""

    def forward(s: Any, x: Any) -> Any:
        pieces = s.into(x).split([4, 4], 1)
        y = torch.cat([conv(piece) for conv, piece in zip(s.convs, pieces, strict=True)], 1)
        return s.out(F.relu(s.norm(y)))

    convs = nn.ModuleList([nn.Conv2d(4, 4, k, padding=k // 2, groups=4) for k in (3, 5)])
    into = nn.Sequential(*conv_bn(4, 8, 1), nn.ReLU())
    return made(forward, into=into, convs=convs, norm=nn.BatchNorm2d(8), out=conv_bn(8, 4, 1))


# ---- operators through which factors and shifts per channel pass ------------------------------------------


def positive(model: Any) -> Any:
    """The same with factors that are positive."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.weight.abs_()
    return model


@entry(5)
def norm_before_a_global_average_and_a_dense_layer() -> Any:
    return randomize(
        nn.Sequential(
            nn.ReLU(), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3), nn.ReLU()
        )
    )


@entry(6)
def sum_of_branches_with_a_norm_before_a_mean() -> Any:
    return made(
        lambda s, x: s.head(s.bn(s.conv(x.tanh()) + x.relu()).mean((2, 3))),
        conv=nn.Conv2d(4, 4, 3, padding=1),
        bn=nn.BatchNorm2d(4),
        head=nn.Linear(4, 3),
    )


@entry(3)
def norm_before_a_flattening() -> Any:
    return randomize(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 81, 3)))


@entry(4)
def norms_before_an_average_that_leaves_out_its_padding_and_a_flattening() -> Any:
    pool = nn.AvgPool2d(3, 2, 1, count_include_pad=False)
    norms = nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(), nn.BatchNorm2d(4))
    return randomize(nn.Sequential(nn.ReLU(), norms, pool, nn.Flatten(), nn.Linear(100, 3)))


@entry(4)
def norm_on_channels_that_are_moved_last_before_a_mean() -> Any:
    return made(
        lambda s, x: s.head(s.bn(x.relu()).permute(0, 2, 3, 1).mean((1, 2))),
        bn=nn.BatchNorm2d(4),
        head=nn.Linear(4, 3),
    )


@entry(3)
def norm_behind_a_maximum_pool() -> Any:
    return positive(
        randomize(nn.Sequential(nn.Conv2d(4, 6, 3), nn.MaxPool2d(3, 2, 1), nn.BatchNorm2d(6), nn.Sigmoid()))
    )


@entry(4, "a factor that is not positive does not pass through a maximum")
def norm_with_negative_factors_behind_a_maximum_pool() -> Any:
    return randomize(nn.Sequential(nn.Conv2d(4, 6, 3), nn.MaxPool2d(2), nn.BatchNorm2d(6), nn.Sigmoid()))


@entry(3)
def norm_behind_an_upsampling() -> Any:
    return made(
        lambda s, x: s.bn(F.interpolate(s.conv(x), scale_factor=2, mode="bilinear")).tanh(),
        conv=nn.Conv2d(4, 6, 3),
        bn=nn.BatchNorm2d(6),
    )


@entry(3)
def norm_before_an_upsampling_and_a_convolution_that_pads_nothing() -> Any:
    return randomize(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Upsample(scale_factor=3), nn.Conv2d(4, 6, 3)))


@entry(4, "zero padding after a bias is not a convolution at the border")
def norm_before_an_upsampling_and_a_convolution_that_pads() -> Any:
    return randomize(
        nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Upsample(scale_factor=2), nn.Conv2d(4, 6, 3, padding=1))
    )


@entry(4)
def norm_behind_a_pixel_shuffle_and_a_maximum_pool() -> Any:
    return positive(
        randomize(
            nn.Sequential(
                nn.Conv2d(4, 8, 3), nn.PixelShuffle(2), nn.MaxPool2d(2), nn.BatchNorm2d(2), nn.LeakyReLU()
            )
        )
    )


@entry(4, "what is made of several channels takes no factors and shifts that differ among them")
def norm_before_a_pixel_shuffle() -> Any:
    return randomize(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.PixelShuffle(2), nn.Conv2d(1, 3, 1)))


@entry(3)
def norm_before_a_pixel_unshuffle() -> Any:
    return randomize(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.PixelUnshuffle(3), nn.Conv2d(36, 3, 1)))


@entry(5, "zero padding after a bias is not a convolution at the border")
def norm_before_an_average_that_counts_its_padding() -> Any:
    pool = nn.AvgPool2d(3, 2, 1)
    return randomize(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), pool, nn.Flatten(), nn.Linear(100, 3)))


@entry(6)
def norm_that_is_read_beside_the_average_too() -> Any:
    def forward(s: Any, x: Any) -> Any:
        y = s.bn(s.point(x.relu()).relu())
        return y, s.head(y.mean((2, 3)))

    return made(
        forward,
        point=nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)),
        bn=nn.BatchNorm2d(4),
        head=nn.Linear(4, 4),
    )
