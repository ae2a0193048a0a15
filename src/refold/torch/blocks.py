"""Train-time blocks as torch modules: several branches to train, one convolution to ship."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, assert_never

import numpy as np
import torch
from torch import nn

from refold import blocks
from refold.algebra import AffineConv, Refusal, Window
from refold.algebra.affine import Array
from refold.blocks import AveragePool, BatchNorm, Conv, Expression, Leaf, Scale
from refold.torch.express import rounded

Sizes = int | tuple[int, ...]

CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
AVERAGE_POOLS: dict[int, Any] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
ZERO_PADDINGS: dict[int, Any] = {1: nn.ZeroPad1d, 2: nn.ZeroPad2d, 3: nn.ZeroPad3d}


class BranchScale(nn.Module):
    """``y = factor * x`` with one trainable factor, or one per channel.

    ``shape`` is the shape in which the factor broadcasts: ``()``, or ``(channels, 1, 1)``.
    """

    def __init__(self, initial: float, shape: Sequence[int]) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full(tuple(shape), float(initial)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` times the factor."""
        return x * self.factor


class FixedScale(nn.Module):
    """``y = factor * x`` with a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` times the factor."""
        return x * self.factor


class Block(nn.Module):
    """A module that computes an expression of branches (see :mod:`refold.blocks`), then an activation.

    Input and output are ``(batch, channels, *space)`` with 1 to 3 spatial axes. A block of your own is an
    :class:`ExpressionBlock`. Its parts are plain modules, in ``parts``, under the names of the expression's leaves
    (``parts.branch0_conv.weight``); :func:`refold.fold` folds whole models and leaves the original as it is.

    Args:
        expression: what to compute.
        in_channels: channels of the input.
        act: a module or function that is applied to the sum of the branches, or None.
        axes: number of spatial axes.
        deploy: make the one convolution instead of the branches, to load what a converted block saved.

    Raises:
        ValueError: the expression does not fit the channels or the axes, or, with ``deploy``, is no convolution.
    """

    def __init__(
        self,
        expression: Expression,
        in_channels: int,
        act: Callable[[Any], Any] | None = None,
        *,
        axes: int = 2,
        deploy: bool = False,
    ) -> None:
        super().__init__()
        blocks.parameters(expression, in_channels, axes)  # raises in words where something does not fit
        if act is not None and not callable(act):
            raise ValueError(f"act is a module, a function or None, got {act!r}")
        self.in_channels = in_channels
        self.axes = axes
        self.act = act
        self.deploy = deploy
        if deploy:
            plain = blocks.equivalent(expression, in_channels, axes)
            if isinstance(plain, Refusal):
                raise ValueError(f"the block is not one convolution: {plain.reason}")
            expression = plain
        self.expression = expression
        self.parts = self._make_parts(expression)

    def forward(self, x: torch.Tensor) -> Any:
        """The activation of what the expression makes of ``x``."""

        def apply(path: str, leaf: Leaf, tensor: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = self.parts[_key(path)](tensor)
            return made

        total = blocks.interpret(self.expression, x, apply, _sum)
        return total if self.act is None else self.act(total)

    def get_equivalent_kernel_bias(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The one convolution that the block is in inference: its kernel ``(out, in/groups, *taps)`` and its
        bias ``(out,)``, computed in float64 and rounded once to the type of the weights.

        Raises ValueError if no convolution equals the block.
        """
        folded, like = self._folded(), next(self.parameters())
        return rounded(folded.kernel, like), rounded(folded.bias, like)

    def convert_to_deploy(self) -> None:
        """Replace the branches by the one convolution that they are in inference; for good, in place.

        Does nothing if the block is converted already. Raises ValueError in training mode (the statistics still
        move) and if no convolution equals the block.
        """
        if self.deploy:
            return
        if self.training:
            raise ValueError("the block is in training mode, in which it is no one convolution: call eval() first")
        folded, like = self._folded(), next(self.parameters())
        trainable = any(parameter.requires_grad for parameter in self.parameters())
        self.expression = Conv(folded.channels_out, folded.windows, folded.groups, bias=True)
        self.parts = self._make_parts(self.expression).to(like.device, like.dtype).eval()
        self.set_numbers({"conv/kernel": folded.kernel, "conv/bias": folded.bias})
        self.requires_grad_(trainable)
        self.deploy = True

    def part(self, path: str) -> Any:
        """The module of a leaf of the expression: ``block.part("branch0/conv")``."""
        part: Any = self.parts[_key(path)]
        return part[-1] if isinstance(part, nn.Sequential) else part

    def set_numbers(self, values: Mapping[str, Array]) -> None:
        """Set parameters and statistics, given under the names and in the layout of the expression (see
        :func:`refold.blocks.parameters`); each is rounded once to the type of the weights."""
        for name, tensor in self._tensors().items():
            if name in values:
                tensor.data = rounded(values[name].reshape(tensor.shape), tensor)

    # ---- parts ---------------------------------------------------------------------------------------

    def _folded(self) -> AffineConv:
        folded = blocks.fold(self.expression, self._part_weights(), self.in_channels, self.axes)
        if isinstance(folded, Refusal):
            raise ValueError(f"the block is not one convolution: {folded.reason}")
        return folded

    def _part_weights(self) -> dict[str, Array]:
        """The weights of all parts, under the names and in the layout of the expression."""
        shapes = blocks.parameters(self.expression, self.in_channels, self.axes)
        return {name: _numbers(tensor).reshape(shapes[name]) for name, tensor in self._tensors().items()}

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The parameters and statistics of all parts by their names in the expression."""
        found: dict[str, torch.Tensor] = {}

        def note(path: str, leaf: Leaf, before: None) -> None:
            names: dict[str, str] = {}
            match leaf:
                case Conv():
                    names = {"kernel": "weight"} | ({"bias": "bias"} if leaf.bias else {})
                case BatchNorm():
                    names = {"gamma": "weight", "beta": "bias", "mean": "running_mean", "variance": "running_var"}
                case Scale(trainable=True):
                    names = {"factor": "factor"}
                case _:
                    pass
            part = self.part(path)
            found.update({f"{path}/{name}": getattr(part, own) for name, own in names.items()})

        blocks.interpret(self.expression, None, note, lambda branches: None)
        return found

    def _make_parts(self, expression: Expression) -> nn.ModuleDict:
        parts: dict[str, nn.Module] = {}

        def apply(path: str, leaf: Leaf, channels: int) -> int:
            parts[_key(path)] = self._make_part(leaf, channels)
            return leaf.filters if isinstance(leaf, Conv) else channels

        blocks.interpret(expression, self.in_channels, apply, lambda branches: branches[0])
        return nn.ModuleDict(parts)

    def _make_part(self, leaf: Leaf, channels: int) -> nn.Module:
        match leaf:
            case Conv():
                settings = {"dilation": _of(leaf.windows, "dilation"), "groups": leaf.groups, "bias": leaf.bias}
                conv = CONVOLUTIONS[self.axes]
                return self._padded(leaf.windows, conv, (channels, leaf.filters), settings)
            case BatchNorm():
                norm: nn.Module = NORMS[self.axes](channels, leaf.epsilon, 1.0 - leaf.momentum)
                return norm
            case Scale(trainable=False):
                return FixedScale(leaf.initial)
            case Scale():
                return BranchScale(leaf.initial, [channels, *(1,) * self.axes] if leaf.per_channel else [])
            case AveragePool():
                # torch would take a padding of half the window at most.
                return self._padded(leaf.windows, AVERAGE_POOLS[self.axes], (), {})
            case _:
                assert_never(leaf)

    def _padded(self, windows: Sequence[Window], kind: Any, sizes: Any, settings: dict[str, Any]) -> nn.Module:
        """A convolution or pool, behind a padding of its own where it cannot pad so itself."""
        taps, strides = _of(windows, "taps"), _of(windows, "stride")
        itself = all(w.before == w.after and (sizes or 2 * w.before <= w.taps) for w in windows)
        padding = _of(windows, "before") if itself else (0,) * len(windows)
        module: nn.Module = kind(*sizes, taps, stride=strides, padding=padding, **settings)
        if itself:
            return module
        widths = tuple(width for window in reversed(windows) for width in (window.before, window.after))
        return nn.Sequential(ZERO_PADDINGS[self.axes](widths), module)


class ExpressionBlock(Block):
    """Any expression as a module: ``ExpressionBlock(Sum(conv(3) | bn, Identity() | bn), 64, nn.ReLU())``.

    Takes what :class:`Block` takes.
    """


class KernelBlock(Block):
    """A block in the place of one convolution with a k x k kernel; what the named blocks have in common.

    Padding is k // 2 on each side, whatever the stride, so there are ``ceil(size / stride)`` outputs (for an
    even k, one more position behind than before).

    Args:
        in_channels, out_channels: channels of the input and of the output.
        kernel_size: k, one number or one per spatial axis, as the next two.
        stride: step of the output.
        dilation: distance between taps.
        groups: number of groups of channels that do not see each other.
        act: makes the activation of the sum of the branches (``nn.ReLU``, ``lambda: nn.LeakyReLU(0.1)``); None for
            none.
        eps, momentum: of the batch norms, with torch's meaning.
        axes, deploy: as in :class:`Block`.
        options: of the block's own expression.
    """

    make: Callable[..., Expression]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes = 3,
        stride: Sizes = 1,
        dilation: Sizes = 1,
        groups: int = 1,
        act: Callable[[], Any] | None = nn.ReLU,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        axes: int = 2,
        deploy: bool = False,
        **options: Any,
    ) -> None:
        norm = BatchNorm(eps, 1.0 - momentum)
        sizes = (kernel_size, stride, dilation, groups)
        expression = type(self).make(in_channels, out_channels, *sizes, norm=norm, axes=axes, **options)
        super().__init__(expression, in_channels, None if act is None else act(), axes=axes, deploy=deploy)


class RepVGGBlock(KernelBlock):
    """A k x k convolution, (``alpha`` times) a 1x1 convolution and the input, each with a batch norm.

    RepVGG: Making VGG-style ConvNets Great Again (arXiv:2101.03697, section 3.2). Options: ``alpha`` (False)
    gives the 1x1 branch a learnable factor, which starts at 1; ``identity`` (True) adds the input, with a batch
    norm, where stride and channels allow.
    """

    make = staticmethod(blocks.repvgg)

    @property
    def alpha(self) -> nn.Parameter | None:
        """The parameter that scales the 1x1 branch; None without one, and once it is folded."""
        part = dict(self.parts.named_children()).get(_key("branch1/scale"))
        return part.factor if isinstance(part, BranchScale) else None


class ACBlock(KernelBlock):
    """A k x k, a k x 1 and a 1 x k convolution, each with a batch norm.

    ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution Blocks
    (arXiv:1908.03930, section 3).
    """

    make = staticmethod(blocks.acnet)


class DiverseBranchBlock(KernelBlock):
    """k x k; 1x1; 1x1 and then k x k; 1x1 and then an average pool; a batch norm after each of them.

    Diverse Branch Block: Building a Convolution as an Inception-like Unit (arXiv:2103.13425, section 3.3);
    how the borders stay exact is told at :func:`refold.blocks.diverse_branch`. Options: ``hidden`` channels
    between 1x1 and k x k, by default as many as the input has; ``average`` (True) for the branch with a pool.
    """

    make = staticmethod(blocks.diverse_branch)


class MobileOneBlock(KernelBlock):
    """Several equal k x k convolutions, a 1x1 convolution and the input, each with a batch norm.

    MobileOne: An Improved One millisecond Mobile Backbone (arXiv:2206.04040, section 3.3). With ``groups`` equal
    to the channels it is the paper's depthwise block, with ``kernel_size=1`` its pointwise one. Option:
    ``branches`` (4), the number of k x k convolutions.
    """

    make = staticmethod(blocks.mobileone)


def _key(path: str) -> str:
    """The name of a part's module: dots and slashes mean something else in names of parameters."""
    return path.replace("/", "_")


def _sum(branches: Sequence[torch.Tensor]) -> torch.Tensor:
    total = branches[0]
    for branch in branches[1:]:
        total = total + branch
    return total


def _of(windows: Sequence[Window], name: str) -> tuple[int, ...]:
    return tuple(getattr(window, name) for window in windows)


def _numbers(tensor: Any) -> Array:
    return np.asarray(tensor.detach().double().cpu().numpy())
