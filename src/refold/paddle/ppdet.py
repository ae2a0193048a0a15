"""PaddleDetection's RepVGG block: the same interface and the same names, folded by the algebra.

Source of the interface: PaddlePaddle/PaddleDetection, ppdet/modeling/backbones/cspresnet.py (PP-YOLOE).
"""

from __future__ import annotations

from typing import Any, final

from paddle import nn

from refold import blocks
from refold.algebra import AffineConv, Refusal
from refold.blocks import BatchNorm, Expression
from refold.paddle.blocks import (
    EPSILON,
    MOMENTUM,
    activation,
    as_stored,
    as_weights,
    check_inference,
    check_stored,
    set_weights,
)
from refold.paddle.places import beside
from refold.paddle.tensors import numbers


@final
class ConvBNLayer(nn.Layer):
    """A convolution without bias (``conv``), a batch norm (``bn``) and an activation; PaddleDetection's names."""

    def __init__(
        self,
        ch_in: int,
        ch_out: int,
        filter_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        padding: int = 0,
        act: Any = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2D(ch_in, ch_out, filter_size, stride, padding, groups=groups, bias_attr=False)
        self.bn = nn.BatchNorm2D(ch_out, MOMENTUM, EPSILON)
        self.act = activation(act)

    def forward(self, x: Any) -> Any:
        """The activation of the normalized convolution of ``x``."""
        x = self.bn(self.conv(x))
        return x if self.act is None else self.act(x)


@final
class RepVggBlock(nn.Layer):
    """A 3x3 convolution and (``alpha`` times) a 1x1 convolution, each with a batch norm, then an activation.

    Input ``(batch, ch_in, height, width)``, output ``(batch, ch_out, height, width)``. Checkpoints of
    PaddleDetection's block load as they are: ``conv1.conv.weight``, ``conv1.bn._mean``, ..., ``alpha``; those
    of converted ones (``conv.weight``, ``conv.bias``) into a block that is converted, or made with
    ``deploy=True``.

    Args:
        ch_in, ch_out: channels of the input and of the output.
        act: applied to the sum: the name of a function of ``paddle.nn.functional``, a dict
            ``{"name": ..., **arguments}``, a callable or None.
        alpha: whether the 1x1 branch has a learnable factor. It starts at 1 and may become any number, 0 and
            negative ones included.
        deploy: make the one convolution instead of the branches.
    """

    def __init__(
        self, ch_in: int, ch_out: int, act: Any = "relu", alpha: bool = False, *, deploy: bool = False
    ) -> None:
        super().__init__()
        self.ch_in = ch_in
        self.ch_out = ch_out
        self.act = activation(act)
        self.alpha: Any = None
        if deploy:
            self.conv = nn.Conv2D(ch_in, ch_out, 3, padding=1)
            return
        self.conv1 = ConvBNLayer(ch_in, ch_out, 3, padding=1)
        self.conv2 = ConvBNLayer(ch_in, ch_out, 1)
        if alpha:
            start = nn.initializer.Constant(1.0)
            self.alpha = self.create_parameter([1], default_initializer=start)

    def forward(self, x: Any) -> Any:
        """The activation of the sum of the branches, or of the one convolution."""
        if hasattr(self, "conv"):
            y = self.conv(x)
        elif self.alpha is not None:
            y = self.conv1(x) + self.alpha * self.conv2(x)
        else:
            y = self.conv1(x) + self.conv2(x)
        return y if self.act is None else self.act(y)

    def get_equivalent_kernel_bias(self) -> tuple[Any, Any]:
        """The one 3x3 convolution that the block is in inference: its kernel ``(ch_out, ch_in, 3, 3)`` and its
        bias ``(ch_out,)``, computed in float64 and rounded once to the type of the weights.

        Raises ValueError if the weights of the convolution would not be finite.
        """
        if hasattr(self, "conv"):
            return self.conv.weight.clone(), self.conv.bias.clone()
        return as_weights(self._folded(), self.parameters())

    def convert_to_deploy(self) -> None:
        """Replace the branches by the one convolution that they are in inference; for good, in place.

        Does nothing if the block is converted already. Raises ValueError in training mode (the statistics still
        move) and if the weights of the convolution would not be finite; the block is then as it was.
        """
        if hasattr(self, "conv"):
            return
        check_inference(self)
        kernel, bias = self.get_equivalent_kernel_bias()
        frozen = all(parameter.stop_gradient for parameter in self.parameters())
        with beside(self.parameters()):
            conv = nn.Conv2D(self.ch_in, self.ch_out, 3, padding=1)
        set_weights(conv, kernel, bias, frozen=frozen)
        conv.eval()
        self.conv = conv
        del self.conv1, self.conv2
        if self.alpha is not None:
            del self.alpha
            self.alpha = None

    def _expression(self) -> Expression:
        norm = BatchNorm(as_stored(self.conv1.bn._epsilon), self.conv1.bn._momentum)
        return blocks.repvgg(self.ch_in, self.ch_out, alpha=self.alpha is not None, identity=False, norm=norm)

    def _folded(self) -> AffineConv:
        check_stored(self)
        values = {}
        for branch, part in (("branch0", self.conv1), ("branch1", self.conv2)):
            values[f"{branch}/conv/kernel"] = numbers(part.conv.weight)
            for name, tensor in (
                ("gamma", part.bn.weight),
                ("beta", part.bn.bias),
                ("mean", part.bn._mean),
                ("variance", part.bn._variance),
            ):
                values[f"{branch}/batch_norm/{name}"] = numbers(tensor)
        if self.alpha is not None:
            values["branch1/scale/factor"] = numbers(self.alpha).reshape(())
        folded = blocks.fold(self._expression(), values, self.ch_in)
        if isinstance(folded, Refusal):
            raise ValueError(f"the block is not one convolution: {folded.reason}")
        return folded
