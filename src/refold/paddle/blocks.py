"""Train-time blocks as Paddle Layers: several branches to train, one convolution to ship."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, assert_never

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional

from refold import blocks
from refold.algebra import AffineConv, Refusal, Window
from refold.algebra.affine import Array
from refold.blocks import AveragePool, BatchNorm, Conv, Expression, Leaf, Scale
from refold.paddle.axes import layout
from refold.paddle.perform import rounded
from refold.paddle.places import beside
from refold.paddle.tensors import computed_weights, numbers
from refold.paddle.trace import dtype_name

Sizes = int | tuple[int, ...]

CONVOLUTIONS = {1: nn.Conv1D, 2: nn.Conv2D, 3: nn.Conv3D}
NORMS = {1: nn.BatchNorm1D, 2: nn.BatchNorm2D, 3: nn.BatchNorm3D}
AVERAGE_POOLS = {1: nn.AvgPool1D, 2: nn.AvgPool2D, 3: nn.AvgPool3D}

# What Paddle sets a batch norm up with; its momentum means what refold's does.
EPSILON, MOMENTUM = 1e-5, 0.9


def activation(act: Any) -> Any:
    """An activation from its name in ``paddle.nn.functional``, a dict ``{"name": ..., **its arguments}``, a
    callable, or None. A dict's other entries go to the function. Raises ValueError for other things."""
    if act is None or callable(act):
        return act
    settings = {"name": act} if isinstance(act, str) else dict(act) if isinstance(act, dict) else {}
    name = settings.pop("name", None)
    function = getattr(functional, name, None) if isinstance(name, str) and name in functional.__all__ else None
    if name in ("linear", "identity") or (name is None and isinstance(act, dict)):
        return None
    if function is None:
        raise ValueError(f"act is the name of an activation, a dict with a 'name', a callable or None, got {act!r}")

    def apply(x: Any) -> Any:
        return function(x, **settings)

    return apply


def check_inference(block: Any) -> None:
    """Raise ValueError if a block, or a layer in it, is in training mode."""
    if any(layer.training for layer in block.sublayers(include_self=True)):
        raise ValueError("the block is in training mode, in which it is no one convolution: call eval() first")


def check_stored(block: Any) -> None:
    """Raise ValueError if a block does not store the weights that it computes with (``weight_norm`` is on it)."""
    for path, layer in block.named_sublayers(include_self=True):
        if computed_weights(layer):
            raise ValueError(
                f"the weight of '{path}' is computed from other parameters at each call, so it cannot be read off: "
                "fold the block with refold.fold"
            )


def as_weights(folded: AffineConv, parameters: list[Any]) -> tuple[Any, Any]:
    """The kernel and the bias of a convolution, rounded once to the type of ``parameters`` and beside them.

    Raises ValueError if that type has no such numbers.
    """
    with beside(parameters), np.errstate(over="ignore"):
        made = [rounded(array, dtype_name(parameters[0])) for array in (folded.kernel, folded.bias)]
    if not all(np.isfinite(numbers(tensor)).all() for tensor in made):
        raise ValueError(
            f"the block is not one convolution: a weight would not be finite in {dtype_name(parameters[0])}"
        )
    return made[0], made[1]


def set_weights(conv: Any, kernel: Any, bias: Any, *, frozen: bool) -> None:
    """Give a convolution a kernel and a bias, in their type."""
    if kernel.dtype != conv.weight.dtype:
        conv.to(dtype=dtype_name(kernel))
    conv.weight.set_value(kernel)
    conv.bias.set_value(bias)
    conv.weight.stop_gradient = conv.bias.stop_gradient = frozen


def as_stored(epsilon: float) -> float:
    """The epsilon that Paddle's kernels compute with: they have it in 32 bits, whatever the precision."""
    return float(np.float32(epsilon))


class BranchScale(nn.Layer):
    """``y = factor * x`` with one trainable factor, or one ``per_channel``, that starts at ``initial``.

    ``shape`` is the shape in which the factor broadcasts: ``[]``, or ``[channels, 1, 1]``.
    """

    def __init__(self, initial: float, shape: Sequence[int]) -> None:
        super().__init__()
        start = nn.initializer.Constant(initial)
        self.factor = self.create_parameter(list(shape), default_initializer=start)

    def forward(self, x: Any) -> Any:
        """``x`` times the factor."""
        return x * self.factor


class FixedScale(nn.Layer):
    """``y = factor * x`` with a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Any) -> Any:
        """``x`` times the factor."""
        return x * self.factor


class Block(nn.Layer):
    """A layer that computes an expression of branches (see :mod:`refold.blocks`), then an activation.

    Input and output are ``(batch, channels, *space)`` with 1 to 3 spatial axes. A block of your own is an
    :class:`ExpressionBlock`.

    Args:
        expression: what to compute.
        in_channels: channels of the input.
        act: applied to the sum of the branches; see :func:`activation`.
        axes: number of spatial axes.
        deploy: make the one convolution instead of the branches, to load what a converted block saved.
    """

    def __init__(
        self,
        expression: Expression,
        in_channels: int,
        act: Any = None,
        *,
        axes: int = 2,
        deploy: bool = False,
    ) -> None:
        super().__init__()
        blocks.parameters(expression, in_channels, axes)  # raises in words where something does not fit
        self.in_channels = in_channels
        self.axes = axes
        self.act = activation(act)
        self.deploy = deploy
        if deploy:
            plain = blocks.equivalent(expression, in_channels, axes)
            if isinstance(plain, Refusal):
                raise ValueError(f"the block is not one convolution: {plain.reason}")
            expression = plain
        self.expression = expression
        self.parts = self._make_parts(expression)

    def forward(self, x: Any) -> Any:
        """The activation of what the expression makes of ``x``."""

        total = self._branches(x)
        return total if self.act is None else self.act(total)

    # Which way it takes depends on no tensor, and Paddle cannot translate its syntax.
    @paddle.jit.not_to_static  # type: ignore[untyped-decorator]  # Paddle has no types
    def _branches(self, x: Any) -> Any:
        # No closure over self: Paddle's other translator (of bytecode) loses it.
        return blocks.interpret(self.expression, x, partial(_apply, self.parts), _sum)

    def get_equivalent_kernel_bias(self) -> tuple[Any, Any]:
        """The one convolution that the block is in inference: its kernel ``(out, in/groups, *taps)`` and its
        bias ``(out,)``, computed in float64 and rounded once to the type of the weights.

        Raises ValueError if no convolution equals the block.
        """
        return as_weights(self._folded(), self.parameters())

    def convert_to_deploy(self) -> None:
        """Replace the branches by the one convolution that they are in inference; for good, in place.

        Does nothing if the block is converted already. :func:`refold.fold` folds whole models and leaves the
        original as it is. Raises ValueError in training mode (the statistics still move) and if no convolution
        equals the block.
        """
        if self.deploy:
            return
        check_inference(self)
        folded = self._folded()
        kernel, bias = as_weights(folded, self.parameters())
        frozen = all(parameter.stop_gradient for parameter in self.parameters())
        self.expression = Conv(folded.channels_out, folded.windows, folded.groups, bias=True)
        with beside(self.parameters()):
            self.parts = self._make_parts(self.expression)
        set_weights(self.parts["conv"], kernel, bias, frozen=frozen)
        self.parts.eval()
        self.deploy = True

    def part(self, path: str) -> Any:
        """The layer of a leaf of the expression: ``block.part("branch0/conv")``."""
        part = self.parts[_key(path)]
        return part[-1] if isinstance(part, nn.Sequential) else part

    def set_numbers(self, values: Mapping[str, Array]) -> None:
        """Set parameters and statistics, given under the names and in the layout of the expression (see
        :func:`refold.blocks.parameters`); each is rounded once to the type of the weights."""
        for name, tensor in self._tensors().items():
            if name in values:
                tensor.set_value(rounded(values[name].reshape(tensor.shape), dtype_name(tensor)))

    # ---- parts ---------------------------------------------------------------------------------------

    def _folded(self) -> AffineConv:
        check_stored(self)
        folded = blocks.fold(self.expression, self._part_weights(), self.in_channels, self.axes)
        if isinstance(folded, Refusal):
            raise ValueError(f"the block is not one convolution: {folded.reason}")
        return folded

    def _part_weights(self) -> dict[str, Array]:
        """The weights of all parts, under the names and in the layout of the expression."""
        shapes = blocks.parameters(self.expression, self.in_channels, self.axes)
        return {name: numbers(tensor).reshape(shapes[name]) for name, tensor in self._tensors().items()}

    def _tensors(self) -> dict[str, Any]:
        """The parameters and statistics of all parts by their names in the expression."""
        found: dict[str, Any] = {}

        def note(path: str, leaf: Leaf, before: None) -> None:
            names: dict[str, str] = {}
            match leaf:
                case Conv():
                    names = {"kernel": "weight"} | ({"bias": "bias"} if leaf.bias else {})
                case BatchNorm():
                    names = {"gamma": "weight", "beta": "bias", "mean": "_mean", "variance": "_variance"}
                case Scale(trainable=True):
                    names = {"factor": "factor"}
                case _:
                    pass
            part = self.part(path)
            found.update({f"{path}/{name}": getattr(part, own) for name, own in names.items()})

        blocks.interpret(self.expression, None, note, lambda branches: None)
        return found

    def _make_parts(self, expression: Expression) -> nn.LayerDict:
        parts: dict[str, nn.Layer] = {}

        def apply(path: str, leaf: Leaf, channels: int) -> int:
            parts[_key(path)] = self._make_part(leaf, channels)
            return leaf.filters if isinstance(leaf, Conv) else channels

        blocks.interpret(expression, self.in_channels, apply, lambda branches: branches[0])
        return nn.LayerDict(parts)

    def _make_part(self, leaf: Leaf, channels: int) -> nn.Layer:
        match leaf:
            case Conv():
                return CONVOLUTIONS[self.axes](
                    channels,
                    leaf.filters,
                    _of(leaf.windows, "taps"),
                    stride=_of(leaf.windows, "stride"),
                    padding=_padding(leaf.windows),
                    dilation=_of(leaf.windows, "dilation"),
                    groups=leaf.groups,
                    bias_attr=None if leaf.bias else False,
                )
            case BatchNorm():
                norm = NORMS[self.axes]
                return norm(channels, leaf.momentum, leaf.epsilon, data_format=layout(self.axes, 1))
            case Scale(trainable=False):
                return FixedScale(leaf.initial)
            case Scale():
                return BranchScale(leaf.initial, [channels, *(1,) * self.axes] if leaf.per_channel else [])
            case AveragePool():
                return self._make_pool(leaf)
            case _:
                assert_never(leaf)

    def _make_pool(self, leaf: AveragePool) -> nn.Layer:
        sizes: list[Any] = [_of(leaf.windows, "taps"), _of(leaf.windows, "stride")]
        if self.axes == 1:
            sizes = [value[0] for value in sizes]
        pool = AVERAGE_POOLS[self.axes](*sizes, 0, exclusive=False)
        widths = [width for window in reversed(leaf.windows) for width in (window.before, window.after)]
        if not any(widths):
            return pool
        pads = {1: nn.Pad1D, 2: nn.Pad2D, 3: nn.Pad3D}
        return nn.Sequential(pads[self.axes](widths), pool)


class ExpressionBlock(Block):
    """Any expression as a layer: ``ExpressionBlock(Sum(conv(3) | bn, Identity() | bn), 64, act="relu")``.

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
        act: applied to the sum of the branches; see :func:`activation`.
        epsilon, momentum: of the batch norms.
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
        act: Any = "relu",
        *,
        epsilon: float = EPSILON,
        momentum: float = MOMENTUM,
        axes: int = 2,
        deploy: bool = False,
        **options: Any,
    ) -> None:
        norm = BatchNorm(as_stored(epsilon), momentum)
        sizes = (kernel_size, stride, dilation, groups)
        expression = type(self).make(in_channels, out_channels, *sizes, norm=norm, axes=axes, **options)
        super().__init__(expression, in_channels, act, axes=axes, deploy=deploy)


class RepVGGBlock(KernelBlock):
    """A k x k convolution, (``alpha`` times) a 1x1 convolution and the input, each with a batch norm.

    RepVGG: Making VGG-style ConvNets Great Again (arXiv:2101.03697, section 3.2). Options: ``alpha`` (False)
    gives the 1x1 branch a learnable factor, which starts at 1; ``identity`` (True) adds the input, with a batch
    norm, where stride and channels allow.
    """

    make = staticmethod(blocks.repvgg)

    @property
    def alpha(self) -> Any:
        """The parameter that scales the 1x1 branch; None without one, and once it is folded."""
        key = _key("branch1/scale")
        return self.parts[key].factor if key in self.parts else None


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
    """The name of a part's layer: dots and slashes mean something else in names of parameters."""
    return path.replace("/", "_")


def _apply(parts: Any, path: str, leaf: Leaf, x: Any) -> Any:
    return parts[_key(path)](x)


def _sum(branches: Sequence[Any]) -> Any:
    total = branches[0]
    for branch in branches[1:]:
        total = total + branch
    return total


def _of(windows: tuple[Window, ...], name: str) -> list[int]:
    return [getattr(window, name) for window in windows]


def _padding(windows: tuple[Window, ...]) -> list[int]:
    """Paddle's padding: per axis, or before and after per axis."""
    if all(window.before == window.after for window in windows):
        return [window.before for window in windows]
    return [width for window in windows for width in (window.before, window.after)]
