"""Where a convolution reads, along one axis. Integers only, no arrays.

An axis of length ``n`` is 0 outside ``[0, n)``. A window with stride ``s`` reads, for its output ``i``,
the positions ``s*i + offset`` for every offset of its lattice ``-before, -before + dilation, ...``.
It gives ``floor((n - 1 + slack)/s) + 1`` outputs, where ``slack = before + after - dilation*(taps - 1)``.
Two windows are interchangeable for every ``n`` exactly if stride, lattice and slack agree; everything
below follows from that.

A window with *spread* ``u`` reads the axis with ``u - 1`` zeros put between neighbors, which makes it
``u*(n - 1) + 1`` long: a transposed convolution is one of these, with stride 1 and its kernel turned
around (Dumoulin and Visin 2016, arXiv:1603.07285, chapter 4). Offsets, padding and slack count positions
of that longer axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import final

from refold.algebra.refusal import Refusal


@final
@dataclass(frozen=True, slots=True)
class Window:
    """The taps of a convolution along one axis.

    ``before`` and ``after`` count padded positions; negative values crop. ``floating`` is TensorFlow's
    padding ``'same'`` at a size that is not known: the padding follows the size of the input, and
    ``before`` and ``after`` are 0 and mean nothing. ``spread`` is the stride of a transposed convolution.
    ``loose`` says that up to so much more slack gives no more outputs, at no size at which the window is used.
    """

    taps: int = 1
    stride: int = 1
    dilation: int = 1
    before: int = 0
    after: int = 0
    floating: bool = False
    spread: int = 1
    loose: int = 0

    def __post_init__(self) -> None:
        if self.taps < 1 or self.stride < 1 or self.dilation < 1 or self.spread < 1:
            raise ValueError(f"taps, stride, dilation and spread are at least 1, got {self}")
        if self.floating and (self.before or self.after or self.spread > 1):
            raise ValueError(f"a floating window has no padding of its own and no spread, got {self}")

    @property
    def reach(self) -> int:
        """Distance from the first tap to the last."""
        return self.dilation * (self.taps - 1)

    @property
    def slack(self) -> int:
        """What decides the output size: ``before + after - reach``."""
        return self.before + self.after - self.reach

    @property
    def is_unit(self) -> bool:
        """One tap that reads its own position: the window of a pointwise map."""
        return self.taps == self.stride == self.spread == 1 and self.before == self.after == 0

    def output_size(self, size: int) -> int:
        """Number of outputs for an input of ``size`` positions."""
        if self.floating:
            return -(-size // self.stride)
        return (self.spread * (size - 1) + self.slack) // self.stride + 1


UNIT = Window()


def transposed(taps: int, stride: int, dilation: int, crop: tuple[int, int]) -> Window:
    """The window of a transposed convolution, which gives ``stride*(n - 1) + dilation*(taps - 1) + 1`` outputs
    without the first and the last ones that ``crop`` counts (negative: with so many more).

    The kernel that it reads with is that of the transposed convolution turned around along this axis."""
    reach = dilation * (taps - 1)
    return Window(taps, 1, dilation if taps > 1 else 1, reach - crop[0], reach - crop[1], spread=stride)


def crop(window: Window) -> tuple[int, int]:
    """What :func:`transposed` was given to give this window, whose stride is 1."""
    return window.reach - window.before, window.reach - window.after


def same(taps: int, stride: int, dilation: int, size: int | None) -> Window:
    """The window of TensorFlow's padding ``'same'``: ``ceil(size/stride)`` outputs, the odd one after.

    At a size that is not known the window floats, unless it starts at the same place for every size
    (stride 1, one or two taps, an even kernel with stride 2).
    """
    reach = dilation * (taps - 1)
    if size is None:
        # It pads reach + 1 - r in all, where r = 1 ... stride depends on the size, half of it before.
        if reach // 2 == max(reach + 1 - stride, 0) // 2:
            return Window(taps, stride, dilation, reach // 2, reach - reach // 2)
        return Window(taps, stride, dilation, floating=True)
    total = max((-(-size // stride) - 1) * stride + reach + 1 - size, 0)
    return Window(taps, stride, dilation, total // 2, total - total // 2)


def composed(outer: Window, inner: Window) -> Window | Refusal:
    """The window of ``outer`` after ``inner``, where ``outer`` reads nothing beyond ``inner``'s outputs
    or reads zeros there (see :func:`zero_outside`)."""
    if outer.floating or inner.floating:
        if inner.is_unit:
            return outer
        if outer.is_unit:
            return inner
        return Refusal(
            "padding 'same' with a stride depends on the size of the input, which is not known here "
            "(fix the input size to let this fold)"
        )
    if outer.spread > 1 and inner.stride > 1:
        return Refusal("a transposed convolution after a stride is no convolution with one step")
    inner = _spread_out(inner, outer.spread)
    steps = [outer.dilation * inner.stride] * (outer.taps > 1) + [inner.dilation] * (inner.taps > 1)
    step = gcd(*steps) or 1
    reach = inner.stride * outer.reach + inner.reach
    return Window(
        taps=reach // step + 1,
        stride=inner.stride * outer.stride,
        dilation=step,
        before=inner.before + inner.stride * outer.before,
        after=inner.after + inner.stride * outer.after,
        spread=inner.spread,
        loose=inner.loose + inner.stride * outer.loose,
    )


def _spread_out(window: Window, spread: int) -> Window:
    """The window, with stride 1, that gives the outputs of ``window`` with zeros between them."""
    return (
        Window(
            window.taps,
            window.stride,
            window.dilation * spread if window.taps > 1 else 1,
            window.before * spread,
            window.after * spread,
            spread=window.spread * spread,
        )
        if spread > 1
        else window
    )


def read_beyond(window: Window) -> tuple[int, int]:
    """How many positions before the first and behind the last one of its input a window reads, at most."""
    if window.floating:
        return 0, 0
    return max(window.before, 0) // window.spread, max(window.after, 0) // window.spread


def zero_outside(window: Window, size: int | None) -> tuple[bool, bool]:
    """Whether the outputs that ``window`` would give before its first and after its last one read only
    zeros: only then may a later window pad them with a constant."""
    if window.floating:
        return False, False
    before = window.reach < window.stride + window.before
    if size is None:
        after = window.after + window.loose >= window.reach
    else:
        after = window.stride * window.output_size(size) - window.before > window.spread * (size - 1)
    return before, after


def padded(window: Window, before: int, after: int) -> Window | Refusal:
    """The window whose outputs are those of ``window`` with ``before`` and ``after`` more (or, negative,
    fewer) of them at the ends."""
    if before == after == 0:
        return window
    if window.floating:
        return Refusal("padding 'same' with a stride depends on the size of the input, which is not known here")
    return Window(
        window.taps,
        window.stride,
        window.dilation,
        window.before + window.stride * before,
        window.after + window.stride * after,
        spread=window.spread,
        loose=window.loose,
    )


def union(windows: list[Window], size: int | None, *, joined: bool = False) -> Window | Refusal:
    """The smallest window that holds all taps of ``windows`` at their absolute offsets. ``joined`` says that their
    outputs are put side by side, which nobody does at a size at which they differ in number."""
    first = windows[0]
    if all(window == first for window in windows):
        return first
    if any(window.floating for window in windows):
        return _floating_union(windows)
    if any(window.stride != first.stride for window in windows):
        strides = ", ".join(str(stride) for stride in sorted({window.stride for window in windows}))
        return Refusal(f"the branches have different strides ({strides})")
    if any(window.spread != first.spread for window in windows):
        return Refusal("a transposed convolution with a stride and another one do not add up to one")
    low = min(-window.before for window in windows)
    high = max(window.reach - window.before for window in windows)
    distances = [window.dilation for window in windows if window.taps > 1]
    distances += [-window.before - low for window in windows]
    step = gcd(*distances) or 1
    common = _common_slack(windows, size, joined)
    if common is None:
        return Refusal("the branches give outputs of different sizes")
    slack, loose = common
    return Window(
        taps=(high - low) // step + 1,
        stride=first.stride,
        dilation=step,
        before=-low,
        after=slack + high,
        spread=first.spread,
        loose=loose,
    )


def _floating_union(windows: list[Window]) -> Window | Refusal:
    """Windows that float alike: their starts stay at one distance, whatever the size."""
    stride = windows[0].stride
    widest = max(windows, key=lambda window: window.reach)
    offsets: list[int] = []
    for window in windows:
        distances = {
            max(widest.reach + 1 - r, 0) // 2 - max(window.reach + 1 - r, 0) // 2 for r in range(1, stride + 1)
        }
        if not window.floating or window.stride != stride or len(distances) > 1:
            return Refusal(
                "the branches pad with 'same' and a stride at a size that is not known, so their taps do not keep "
                "their places (fix the input size to let this fold)"
            )
        offsets += distances
    step = gcd(*offsets, *(window.dilation for window in windows if window.taps > 1)) or 1
    return Window(widest.reach // step + 1, stride, step, floating=True)


def _common_slack(windows: list[Window], size: int | None, joined: bool) -> tuple[int, int] | None:
    """The least slack that gives the output size of all windows, for every size or for this one, and how loose."""
    least = min(window.slack for window in windows)
    most = max(window.slack + window.loose for window in windows)
    if max(window.slack for window in windows) <= min(window.slack + window.loose for window in windows):
        return least, most - least
    if size is not None and len({window.output_size(size) for window in windows}) == 1:
        return least, 0  # any slack of the right output size will do: the one that pads least
    if joined and most - least < windows[0].stride and windows[0].spread == 1:
        return least, most - least
    return None


def positions(window: Window, within: Window) -> slice:
    """The places of ``window``'s taps among the taps of ``within``, one of :func:`union`'s answers."""
    if window.floating:
        distance = within.reach // 2 - window.reach // 2
    else:
        distance = within.before - window.before
    start = distance // within.dilation
    step = window.dilation // within.dilation if window.taps > 1 else 1
    return slice(start, start + step * (window.taps - 1) + 1, step)
