"""How affine convolutions combine, and when that is exact.

Every law returns the one affine convolution that the combination is, or a :class:`Refusal`; none is
ever "nearly" right. ``space`` gives the spatial sizes of the input where they are known (None where
not): some laws hold at one size and not at all of them. Derivations: ``docs/laws.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import gcd, prod

import numpy as np
import numpy.typing as npt

from refold.algebra import geometry
from refold.algebra.affine import AffineConv, Array, Channels, Deferred, Reach, scale_shift
from refold.algebra.geometry import Window
from refold.algebra.refusal import Refusal

Space = tuple[int | None, ...]

# A law that would build a larger kernel is refused instead of filling the memory: no plan could want it.
MOST_WEIGHTS = 2**27

ZERO_AFTER_BIAS = "zero padding after a bias is not a convolution at the border"
ZERO_BETWEEN = "a transposed convolution puts zeros between its inputs, and a bias before it is not there"

NOT_POSITIVE = "a factor that is not positive does not pass through a maximum"
DIFFERENT_FACTORS = "what is made of several channels takes no factors and shifts that differ among them"


def pad(
    inner: AffineConv,
    widths: Sequence[tuple[int, int]],
    value: Array | float = 0.0,
    space: Space | None = None,
) -> AffineConv | Refusal:
    """``inner``, then its output padded by ``widths`` with ``value`` (negative widths crop).

    Exact if what ``inner`` would give out there is that value: it reads only zeros there, and its bias
    is ``value`` (a scalar, or one number per channel).
    """
    windows: list[Window] = []
    pads = False
    for axis, (window, (before, after)) in enumerate(zip(inner.windows, widths, strict=True)):
        zero_before, zero_after = geometry.zero_outside(window, space[axis] if space else None)
        if (before > 0 and not zero_before) or (after > 0 and not zero_after):
            return Refusal(
                f"padding after a convolution with {window.taps} taps is not a convolution at the border"
            )
        pads = pads or before > 0 or after > 0
        moved = geometry.padded(window, before, after)
        if isinstance(moved, Refusal):
            return moved
        windows.append(moved)
    if pads and not np.array_equal(inner.bias, np.broadcast_to(value, inner.bias.shape)):
        if np.all(np.asarray(value) == 0.0):
            return Refusal(ZERO_AFTER_BIAS)
        return Refusal("padding with another constant than the bias before it is not a convolution at the border")
    return AffineConv(inner.weights, inner.bias, tuple(windows), inner.groups)


def compose(outer: AffineConv, inner: AffineConv, space: Space | None = None) -> AffineConv | Refusal:
    """``outer`` after ``inner``: taps at ``s*d*v + u``, kernel ``sum_m outer[o,m,v] inner[m,c,u]``,
    bias ``b_outer + sum outer b_inner``.

    Exact if ``outer`` pads nothing, or pads zeros where ``inner`` would give zeros (see :func:`pad`). The
    zeros that a transposed ``outer`` reads between its inputs allow no bias there either.
    """
    if outer.channels_in != inner.channels_out or len(outer.windows) != len(inner.windows):
        return Refusal(
            f"{outer.channels_in} channels on {len(outer.windows)} axes cannot be read from "
            f"{inner.channels_out} channels on {len(inner.windows)} axes"
        )
    if outer.is_transposed and np.any(inner.bias):
        return Refusal(ZERO_BETWEEN)
    extended = pad(inner, [geometry.read_beyond(window) for window in outer.windows], 0.0, space)
    if isinstance(extended, Refusal):
        return extended
    windows: list[Window] = []
    for outer_window, inner_window in zip(outer.windows, inner.windows, strict=True):
        if outer_window.floating and np.any(inner.bias != 0.0):
            return Refusal(ZERO_AFTER_BIAS)
        window = geometry.composed(outer_window, inner_window)
        if isinstance(window, Refusal):
            return window
        windows.append(window)
    taps = tuple(window.taps for window in windows)
    if outer.is_channelwise:
        groups = inner.groups
    elif inner.is_channelwise:
        groups = outer.groups
    else:
        groups = gcd(outer.groups, inner.groups)
    shape = (outer.channels_out, inner.channels_in // groups, *taps)
    if prod(shape) > MOST_WEIGHTS:
        return Refusal("the combined kernel would not fit in memory")
    kernel = Deferred(
        shape,
        lambda: _composed_kernel(outer, inner, tuple(windows), groups),
        reach=lambda: _composed_reach(outer, inner),
        most=lambda: outer.weights.shape[1] * outer.taps * outer.most * inner.most,
    )
    carried = _apply_to_constant(outer, inner.bias) if np.any(inner.bias) else 0.0
    return AffineConv(kernel, outer.bias + carried, tuple(windows), groups)


def add(terms: Sequence[AffineConv], space: Space | None = None) -> AffineConv | Refusal:
    """The sum of maps of one tensor: the union of their taps, on the finest grouping all respect.

    Exact if they have one stride and one output size (for every input size, or for the known one).
    """
    windows = _common_windows(terms, space)
    if isinstance(windows, Refusal):
        return windows
    if len({(term.channels_out, term.channels_in) for term in terms}) > 1:
        return Refusal("the branches have different numbers of channels")
    groups = reduce(gcd, (term.groups for term in terms))
    shape = (terms[0].channels_out, terms[0].channels_in // groups, *(window.taps for window in windows))
    if prod(shape) > MOST_WEIGHTS:
        return Refusal("the combined kernel would not fit in memory")

    def total() -> Array:
        # A term that fills the whole window is where to start.
        full = next((place for place, term in enumerate(terms) if _fills(term, windows)), None)
        kernel = np.zeros(shape) if full is None else regroup(terms[full], groups).kernel.copy()
        for place, term in enumerate(terms):
            if place != full:
                kernel[_places(term, windows)] += regroup(term, groups).kernel
        return kernel

    bias = np.sum([term.bias for term in terms], axis=0)

    def reach() -> Reach:
        low, high = zip(*map(_reach, terms), strict=True)
        return np.min(low, axis=0), np.max(high, axis=0)

    kernel = Deferred(shape, total, reach, most=lambda: sum(term.most for term in terms))
    return AffineConv(kernel, bias, windows, groups)


def stack(parts: Sequence[AffineConv | int], channels_in: int, space: Space | None = None) -> AffineConv | Refusal:
    """The concatenation, over output channels, of maps of one tensor; a number stands for that many
    channels that are 0. Exact under the conditions of :func:`add`; at sizes of the input at which their outputs
    differ in number there is no concatenation (every second row beside the others), so those do not count."""
    maps = [part for part in parts if isinstance(part, AffineConv)]
    if any(part.channels_in != channels_in for part in maps):
        return Refusal(f"the branches do not all read {channels_in} channels")
    windows = _common_windows(maps, space, joined=True)
    if isinstance(windows, Refusal):
        return windows
    taps = tuple(window.taps for window in windows)
    total = sum(part if isinstance(part, int) else part.channels_out for part in parts)
    if total * channels_in * prod(taps) > MOST_WEIGHTS:
        return Refusal("the combined kernel would not fit in memory")
    reach = [_nothing(part, channels_in) if isinstance(part, int) else _reach(part) for part in parts]
    low, high = (np.concatenate(ends) for ends in zip(*reach, strict=True))
    groups = _finest(low, high, total, channels_in)

    def kernel() -> Array:
        whole = np.zeros((total, channels_in, *taps))
        start = 0
        for part in parts:
            size = part if isinstance(part, int) else part.channels_out
            if isinstance(part, AffineConv):
                whole[start : start + size][_places(part, windows)] = regroup(part, 1).kernel
            start += size
        return _diagonal(whole, groups)

    bias = np.concatenate([np.zeros(part) if isinstance(part, int) else part.bias for part in parts])
    weights = Deferred((total, channels_in // groups, *taps), kernel, reach=lambda: (low, high))
    return AffineConv(weights, bias, windows, groups)


def select(inner: AffineConv, channels: Sequence[int]) -> AffineConv:
    """The output channels ``channels`` of ``inner``, in that order (slice, split, shuffle). Always exact."""
    index = np.asarray(channels, dtype=np.intp)
    per_group = inner.channels_out // inner.groups
    kept = index.size // inner.groups
    same_share = index.size % inner.groups == 0 and np.array_equal(
        index // per_group, np.repeat(np.arange(inner.groups), max(kept, 1))[: index.size]
    )
    if same_share and kept:
        shape = (index.size, *inner.weights.shape[1:])
        picked = Deferred(
            shape, lambda: inner.kernel[index], lambda: _picked_reach(inner, index), lambda: inner.most
        )
        return AffineConv(picked, inner.bias[index], inner.windows, inner.groups)
    dense = regroup(inner, 1)
    return refine_groups(AffineConv(dense.kernel[index], dense.bias[index], dense.windows))


def pass_through(
    scale: AffineConv,
    pairs: tuple[Sequence[int], Sequence[int]] | None,
    channels: int,
    axes: int,
    *,
    rising: bool = False,
) -> AffineConv | Refusal:
    """A factor and a shift per channel, on the other side of an operator that takes means of numbers of single
    channels, with weights that sum to one: ``sum_i w_i (a x_i + b) = a sum_i w_i x_i + b``.

    ``scale`` is moved from the side on which the operator has the channels ``pairs[0][k]`` to one with ``axes``
    spatial axes on which it has the ``channels`` channels ``pairs[1][k]``, where numbers of the one are made of
    numbers of the other; None: every channel is made of itself. Exact if all that one channel is made of, or that
    is made of it, has one factor and shift. ``rising``: the operator takes maxima, and ``max_i (a x_i + b) = a
    max_i x_i + b`` for positive ``a`` only.
    """
    if rising and not np.all(scale.scale > 0.0):
        return Refusal(NOT_POSITIVE)
    if pairs is None:
        return scale_shift(scale.scale, scale.bias, axes)
    here, there = (np.asarray(own, dtype=np.intp) for own in pairs)
    moved = []
    for numbers, start in ((scale.scale, 1.0), (scale.bias, 0.0)):  # a channel that nothing is made of is free
        placed = np.full(channels, start)
        placed[there] = numbers[here]
        if not np.array_equal(placed[there], numbers[here], equal_nan=True):
            return Refusal(DIFFERENT_FACTORS)
        moved.append(placed)
    return scale_shift(moved[0], moved[1], axes)


def regroup(conv: AffineConv, groups: int) -> AffineConv:
    """The same map written with fewer groups; ``groups`` divides ``conv.groups``."""
    if groups == conv.groups:
        return conv
    if conv.groups % groups:
        raise ValueError(f"{conv.groups} groups cannot be written as {groups}")
    per_out, per_in = conv.channels_out // conv.groups, conv.weights.shape[1]
    rows = np.arange(conv.channels_out)
    place = (rows // per_out) % (conv.groups // groups)
    columns = place[:, None] * per_in + np.arange(per_in)
    kernel = np.zeros((conv.channels_out, conv.channels_in // groups, *conv.weights.shape[2:]))
    kernel[rows[:, None], columns] = conv.kernel
    return AffineConv(kernel, conv.bias, conv.windows, groups)


def refine_groups(conv: AffineConv) -> AffineConv:
    """The same map written with as many groups as its zeros allow."""
    groups = _finest(*_reach(conv), conv.channels_out, conv.channels_in, conv.groups)
    if groups == conv.groups:
        return conv
    return AffineConv(_diagonal(regroup(conv, 1).kernel, groups), conv.bias, conv.windows, groups)


def _reach(conv: AffineConv) -> Reach:
    """The first and the last input channel that each output channel reads; last before first if none."""
    told = conv.weights.reach() if isinstance(conv.weights, Deferred) else None
    if told is not None:
        return told
    per_out, per_in = conv.channels_out // conv.groups, conv.weights.shape[1]
    first = np.arange(conv.channels_out) // per_out * per_in
    if per_in == 1:
        return first, first
    used = _used(conv)
    low = first + np.argmax(used, axis=1)
    high = first + per_in - 1 - np.argmax(used[:, ::-1], axis=1)
    low, high = np.where(used.any(axis=1), (low, high), _nothing(conv.channels_out, conv.channels_in))
    return low, high


def _nothing(channels: int, channels_in: int) -> Reach:
    """The reach of output channels that read nothing."""
    return np.full(channels, channels_in), np.full(channels, -1)


def _used(conv: AffineConv) -> npt.NDArray[np.bool_]:
    """Which input channels of its group each output channel reads at some tap."""
    used: npt.NDArray[np.bool_] = np.any(conv.kernel != 0.0, axis=tuple(range(2, conv.weights.ndim)))
    return used


def _composed_reach(outer: AffineConv, inner: AffineConv) -> Reach:
    """What ``outer`` after ``inner`` reads: for each output channel, what those read that it reads."""
    low, high = _reach(inner)
    per_out, per_in = outer.channels_out // outer.groups, outer.weights.shape[1]
    middle = (np.arange(outer.channels_out) // per_out * per_in)[:, None] + np.arange(per_in)
    told = outer.weights.reach() if isinstance(outer.weights, Deferred) else None
    if told is None:
        used = _used(outer)
    else:
        used = (middle >= told[0][:, None]) & (middle <= told[1][:, None])
    used = used & (high >= low)[middle]
    return (
        np.min(np.where(used, low[middle], inner.channels_in), axis=1, initial=inner.channels_in),
        np.max(np.where(used, high[middle], -1), axis=1, initial=-1),
    )


def _picked_reach(conv: AffineConv, index: Channels) -> Reach:
    low, high = _reach(conv)
    return low[index], high[index]


def _finest(low: Channels, high: Channels, channels_out: int, channels_in: int, least: int = 1) -> int:
    """The most groups, a multiple of ``least``, into which maps of that reach fall apart."""
    rows = np.flatnonzero(high >= low)
    low, high = low[rows], high[rows]
    most = gcd(channels_out, channels_in)
    for groups in (n for n in range(most, least, -1) if most % n == 0 and n % least == 0):
        own = rows // (channels_out // groups)
        columns = channels_in // groups
        if np.array_equal(low // columns, own) and np.array_equal(high // columns, own):
            return groups
    return least


def _diagonal(kernel: Array, groups: int) -> Array:
    """The blocks on the diagonal of a kernel that has no others, as the kernel of a grouped map."""
    if groups == 1:
        return kernel
    rows, columns = kernel.shape[0] // groups, kernel.shape[1] // groups
    blocks = [kernel[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] for g in range(groups)]
    return np.concatenate(blocks)


def _apply_to_constant(conv: AffineConv, constant: Array) -> Array:
    """What the linear part of ``conv`` gives on a tensor that is constant over space."""
    gain = conv.kernel.sum(axis=tuple(range(2, conv.weights.ndim)))
    per_group = constant.reshape(conv.groups, 1, -1)
    gain = gain.reshape(conv.groups, -1, gain.shape[1])
    result: Array = (gain * per_group).sum(axis=-1).reshape(-1)
    return result


def _composed_kernel(outer: AffineConv, inner: AffineConv, windows: tuple[Window, ...], groups: int) -> Array:
    taps = tuple(window.taps for window in windows)
    # One of the two often has one tap only: then there is nothing to place.
    if inner.is_scale and taps == outer.weights.shape[2:]:
        return outer.kernel if inner.is_identity else _scaled_inputs(outer, inner.scale)
    if outer.taps == 1 and taps == inner.weights.shape[2:]:
        return _mix(outer.kernel.reshape(outer.weights.shape[:2]), outer, inner, groups)
    kernel: Array = np.zeros((outer.channels_out, inner.channels_in // groups, *taps))
    read, held = outer.kernel, inner.kernel  # for as long as they are needed
    for tap in np.ndindex(*read.shape[2:]):
        places = tuple(
            _inner_places(v, outer_window, inner_window, window)
            for v, outer_window, inner_window, window in zip(
                tap, outer.windows, inner.windows, windows, strict=True
            )
        )
        weights = read[(slice(None), slice(None), *tap)]  # (out, mid/groups of the outer)
        kernel[(slice(None), slice(None), *places)] += _mix(weights, outer, inner, groups)
    del held
    return kernel


def _scaled_inputs(conv: AffineConv, scale: Array) -> Array:
    """The kernel of ``conv`` after a factor for each of its input channels."""
    kernel = conv.kernel
    by_channel = scale.reshape(conv.groups, 1, -1, *(1,) * len(conv.windows))
    return (kernel.reshape(conv.groups, -1, *kernel.shape[1:]) * by_channel).reshape(kernel.shape)


def _inner_places(v: int, outer: Window, inner: Window, window: Window) -> slice:
    """Where the taps of ``inner`` land when read through tap ``v`` of ``outer``."""
    start = v * outer.dilation * inner.stride // window.dilation
    step = inner.dilation * outer.spread // window.dilation if inner.taps > 1 else 1
    return slice(start, start + step * (inner.taps - 1) + 1, step)


def _mix(weights: Array, outer: AffineConv, inner: AffineConv, groups: int) -> Array:
    """``sum_m weights[o,m] inner[m,c,...]`` for one tap of the outer map, group by group."""
    if outer.is_channelwise:
        return weights.reshape((-1, 1) + (1,) * len(inner.windows)) * inner.kernel
    if inner.is_channelwise:
        by_channel = inner.kernel.reshape(outer.groups, 1, -1, *inner.kernel.shape[2:])
        columns = weights.reshape(outer.groups, -1, weights.shape[1], *(1,) * len(inner.windows))
        mixed = by_channel * columns
        return mixed.reshape(outer.channels_out, -1, *inner.kernel.shape[2:])
    source = regroup(inner, groups).kernel
    matrix = _regroup_matrix(weights, outer, groups)
    middle = source.shape[0] // groups
    product = matrix.reshape(groups, -1, middle) @ source.reshape(groups, middle, -1)
    return product.reshape(outer.channels_out, *source.shape[1:])


def _regroup_matrix(weights: Array, outer: AffineConv, groups: int) -> Array:
    if outer.groups == groups:
        return weights
    return regroup(AffineConv(weights, outer.bias, (), outer.groups), groups).kernel


def _common_windows(
    terms: Sequence[AffineConv], space: Space | None, *, joined: bool = False
) -> tuple[Window, ...] | Refusal:
    if len({len(term.windows) for term in terms}) != 1:
        return Refusal("the branches have different numbers of spatial axes")
    windows: list[Window] = []
    for axis in range(len(terms[0].windows)):
        own = [term.windows[axis] for term in terms]
        window = geometry.union(own, space[axis] if space else None, joined=joined)
        if isinstance(window, Refusal):
            return window
        windows.append(window)
    return tuple(windows)


def _fills(term: AffineConv, windows: tuple[Window, ...]) -> bool:
    """Whether a term has a tap wherever its sum with others has one."""
    return all(own.taps == common.taps for own, common in zip(term.windows, windows, strict=True))


def _places(term: AffineConv, windows: tuple[Window, ...]) -> tuple[slice, ...]:
    spots = (geometry.positions(own, common) for own, common in zip(term.windows, windows, strict=True))
    return (slice(None), slice(None), *spots)
