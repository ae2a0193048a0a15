"""Published train-time blocks, each in the place of one k x k convolution."""

from __future__ import annotations

from typing import Any

import keras

from refold import blocks
from refold.blocks import BatchNorm, Expression
from refold.keras.blocks import Block

Sizes = int | tuple[int, ...]


class KernelBlock(Block):
    """A block in the place of one convolution with a k x k kernel; what the named blocks have in common.

    Padding is k // 2 on each side, whatever the stride (for an even k, one more behind than before), so
    there are ``ceil(size / strides)`` outputs. At stride 1 this is Keras' ``"same"``; at other strides
    ``"same"`` would move with the size of the input, and differently in each branch.

    Args:
        filters: number of output channels.
        kernel_size: k, one number or one per spatial axis, as the next two.
        strides: step of the output.
        dilation_rate: distance between taps. Keras has no layers with strides and dilation at once.
        groups: number of groups of channels that do not see each other.
        activation: applied to the sum of the branches.
        momentum: of the batch norms' moving statistics.
        epsilon: of the batch norms.
        kwargs: as in :class:`Block`.
    """

    def __init__(
        self,
        filters: int,
        kernel_size: Sizes = 3,
        strides: Sizes = 1,
        dilation_rate: Sizes = 1,
        groups: int = 1,
        activation: Any = "relu",
        *,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        **kwargs: Any,
    ) -> None:
        super().__init__(activation=activation, **kwargs)
        self.filters = filters
        self.kernel_size = _sizes(kernel_size)
        self.strides = _sizes(strides)
        self.dilation_rate = _sizes(dilation_rate)
        self.groups = groups
        self.momentum = momentum
        self.epsilon = epsilon

    @property
    def _arguments(self) -> tuple[int, Sizes, Sizes, Sizes, int]:
        return self.filters, self.kernel_size, self.strides, self.dilation_rate, self.groups

    @property
    def _norm(self) -> BatchNorm:
        return BatchNorm(self.epsilon, self.momentum)

    def get_config(self) -> dict[str, Any]:
        """What the constructor takes."""
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "dilation_rate": self.dilation_rate,
            "groups": self.groups,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
        }


@keras.saving.register_keras_serializable(package="refold")
class RepVGGBlock(KernelBlock):
    """A k x k convolution, (``alpha`` times) a 1x1 convolution and the input, each with a batch norm.

    RepVGG: Making VGG-style ConvNets Great Again (arXiv:2101.03697, section 3.2).

    Args:
        alpha: whether the 1x1 branch has a learnable factor; it starts at 1 and may become any number,
            0 and negative ones included. :attr:`alpha` is its variable.
        identity: whether the input is added, with a batch norm, where the shapes allow: stride 1 and as many
            filters as input channels.
        filters, kernel_size, strides, dilation_rate, groups, activation, kwargs: as in :class:`KernelBlock`.
    """

    def __init__(
        self,
        filters: int,
        kernel_size: Sizes = 3,
        strides: Sizes = 1,
        dilation_rate: Sizes = 1,
        groups: int = 1,
        activation: Any = "relu",
        alpha: bool = False,
        identity: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(filters, kernel_size, strides, dilation_rate, groups, activation, **kwargs)
        self.has_alpha = bool(alpha)
        self.identity = bool(identity)

    @property
    def alpha(self) -> Any:
        """The variable that scales the 1x1 branch; None without one, and once it is folded."""
        scale = self.parts.get("branch1/scale") if self.built else None
        return None if scale is None else scale.factor

    def make_expression(self, channels_in: int, axes: int) -> Expression:
        """See :func:`refold.blocks.repvgg`."""
        options = {"alpha": self.has_alpha, "identity": self.identity}
        return blocks.repvgg(channels_in, *self._arguments, **options, norm=self._norm, axes=axes)

    def get_config(self) -> dict[str, Any]:
        """What the constructor takes."""
        return {**super().get_config(), "alpha": self.has_alpha, "identity": self.identity}


@keras.saving.register_keras_serializable(package="refold")
class ACBlock(KernelBlock):
    """A k x k, a k x 1 and a 1 x k convolution, each with a batch norm.

    ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution Blocks
    (arXiv:1908.03930, section 3). Takes what :class:`KernelBlock` takes.
    """

    def make_expression(self, channels_in: int, axes: int) -> Expression:
        """See :func:`refold.blocks.acnet`."""
        return blocks.acnet(channels_in, *self._arguments, norm=self._norm, axes=axes)


@keras.saving.register_keras_serializable(package="refold")
class DiverseBranchBlock(KernelBlock):
    """k x k; 1x1; 1x1 and then k x k; 1x1 and then an average pool; a batch norm after each of them.

    Diverse Branch Block: Building a Convolution as an Inception-like Unit (arXiv:2103.13425, section 3.3);
    how the borders stay exact is told at :func:`refold.blocks.diverse_branch`.

    Args:
        hidden: channels between the 1x1 and the k x k convolution, by default as many as the input has.
        average: whether there is a branch with a pool; there can be none in a dilated block.
        filters, kernel_size, strides, dilation_rate, groups, activation, kwargs: as in :class:`KernelBlock`.
    """

    def __init__(self, filters: int, *args: Any, hidden: int | None = None, average: bool = True, **kwargs: Any):
        super().__init__(filters, *args, **kwargs)
        self.hidden = hidden
        self.average = bool(average)

    def make_expression(self, channels_in: int, axes: int) -> Expression:
        """See :func:`refold.blocks.diverse_branch`."""
        options: dict[str, Any] = {"hidden": self.hidden, "average": self.average}
        return blocks.diverse_branch(channels_in, *self._arguments, **options, norm=self._norm, axes=axes)

    def get_config(self) -> dict[str, Any]:
        """What the constructor takes."""
        return {**super().get_config(), "hidden": self.hidden, "average": self.average}


@keras.saving.register_keras_serializable(package="refold")
class MobileOneBlock(KernelBlock):
    """Several equal k x k convolutions, a 1x1 convolution and the input, each with a batch norm.

    MobileOne: An Improved One millisecond Mobile Backbone (arXiv:2206.04040, section 3.3). With ``groups`` equal
    to the channels it is the paper's depthwise block, with ``kernel_size=1`` its pointwise one.

    Args:
        branches: number of k x k convolutions.
        filters, kernel_size, strides, dilation_rate, groups, activation, kwargs: as in :class:`KernelBlock`.
    """

    def __init__(self, filters: int, *args: Any, branches: int = 4, **kwargs: Any) -> None:
        super().__init__(filters, *args, **kwargs)
        self.branches = branches

    def make_expression(self, channels_in: int, axes: int) -> Expression:
        """See :func:`refold.blocks.mobileone`."""
        return blocks.mobileone(channels_in, *self._arguments, branches=self.branches, norm=self._norm, axes=axes)

    def get_config(self) -> dict[str, Any]:
        """What the constructor takes."""
        return {**super().get_config(), "branches": self.branches}


def _sizes(value: Sizes) -> Sizes:
    return value if isinstance(value, int) else tuple(value)
