"""Bugs planted into the algebra, and into what the graph does with it, one at a time: a quick part of the grid must
notice each of them."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import checks
import numpy as np
import pytest
from cases import conv, windows, x

from oracle import average_pool, batch_norm, padded, run, tensorflow_same
from refold import algebra as real
from refold import graph as real_graph
from refold.algebra import Window

# name -> (file, what stands there, what a tired person might write)
BUGS = {
    "compose: guard of padding after a bias dropped": (
        "laws.py",
        "if pads and not np.array_equal(inner.bias, np.broadcast_to(value, inner.bias.shape)):",
        "if False:",
    ),
    "pad: guard of what lies outside dropped": (
        "laws.py",
        "if (before > 0 and not zero_before) or (after > 0 and not zero_after):",
        "if False:",
    ),
    "pad: guard looks at one side only": (
        "laws.py",
        "if (before > 0 and not zero_before) or (after > 0 and not zero_after):",
        "if before > 0 and not zero_before:",
    ),
    "pad: constant not compared with the bias": (
        "laws.py",
        "np.array_equal(inner.bias, np.broadcast_to(value, inner.bias.shape))",
        "np.all(inner.bias == inner.bias)",
    ),
    "pad: stride forgotten": (
        "geometry.py",
        "window.before + window.stride * before",
        "window.before + before",
    ),
    "outside: one position too many": (
        "geometry.py",
        "before = window.reach < window.stride + window.before",
        "before = window.reach <= window.stride + window.before",
    ),
    "outside: stride counted behind as well": (
        "geometry.py",
        "after = window.after + window.loose >= window.reach",
        "after = window.after + window.stride > window.reach",
    ),
    "outside: refused although it is zero": (
        "geometry.py",
        "before = window.reach < window.stride + window.before",
        "before = window.taps == 1",
    ),
    "compose: inner stride forgotten for the taps": (
        "laws.py",
        "start = v * outer.dilation * inner.stride // window.dilation",
        "start = v * outer.dilation // window.dilation",
    ),
    "compose: outer dilation forgotten": (
        "laws.py",
        "start = v * outer.dilation * inner.stride // window.dilation",
        "start = v * inner.stride // window.dilation",
    ),
    "compose: inner dilation forgotten": (
        "laws.py",
        "step = inner.dilation * outer.spread // window.dilation if inner.taps > 1 else 1",
        "step = 1",
    ),
    "compose: lattice as coarse as the outer one": (
        "geometry.py",
        "step = gcd(*steps) or 1",
        "step = max(steps, default=1)",
    ),
    "compose: inner stride forgotten for the padding": (
        "geometry.py",
        "before=inner.before + inner.stride * outer.before",
        "before=inner.before + outer.before",
    ),
    "compose: padding before and after swapped": (
        "geometry.py",
        "after=inner.after + inner.stride * outer.after",
        "after=inner.after + inner.stride * outer.before",
    ),
    "compose: stride of the outer only": (
        "geometry.py",
        "stride=inner.stride * outer.stride",
        "stride=outer.stride",
    ),
    "compose: inner bias not carried": (
        "laws.py",
        "return AffineConv(kernel, outer.bias + carried,",
        "return AffineConv(kernel, outer.bias,",
    ),
    "compose: bias carried through the middle of the kernel only": (
        "laws.py",
        "gain = conv.kernel.sum(axis=tuple(range(2, conv.weights.ndim)))",
        "gain = conv.kernel[(slice(None), slice(None), *(n // 2 for n in conv.weights.shape[2:]))]",
    ),
    "compose: bias of another group": (
        "laws.py",
        "per_group = constant.reshape(conv.groups, 1, -1)",
        "per_group = constant.reshape(conv.groups, 1, -1)[::-1]",
    ),
    "compose: as many groups as the finer map": (
        "laws.py",
        "groups = gcd(outer.groups, inner.groups)",
        "groups = max(outer.groups, inner.groups)",
    ),
    "compose: rows of the kernel transposed": (
        "laws.py",
        "product = matrix.reshape(groups, -1, middle) @",
        "product = matrix.reshape(groups, middle, -1).swapaxes(1, 2) @",
    ),
    "compose: groups forgotten after a depthwise map": (
        "laws.py",
        "by_channel = inner.kernel.reshape(outer.groups, 1, -1,",
        "by_channel = inner.kernel[::-1].reshape(outer.groups, 1, -1,",
    ),
    "compose: floating window after a bias": (
        "laws.py",
        "if outer_window.floating and np.any(inner.bias != 0.0):",
        "if False:",
    ),
    "compose: zeros between inputs forgotten after a bias": (
        "laws.py",
        "if outer.is_transposed and np.any(inner.bias):",
        "if False:",
    ),
    "compose: inner taps not spread": (
        "laws.py",
        "step = inner.dilation * outer.spread // window.dilation if inner.taps > 1 else 1",
        "step = inner.dilation // window.dilation if inner.taps > 1 else 1",
    ),
    "compose: inner padding not spread": ("geometry.py", "window.before * spread,", "window.before,"),
    "compose: spread of the outer only": ("geometry.py", "spread=window.spread * spread,", "spread=spread,"),
    "compose: transposed after a stride let through": (
        "geometry.py",
        "if outer.spread > 1 and inner.stride > 1:",
        "if False:",
    ),
    "outside: zeros between inputs counted as inputs": (
        "geometry.py",
        "max(window.before, 0) // window.spread",
        "0",
    ),
    "add: different spreads let through": (
        "geometry.py",
        "if any(window.spread != first.spread for window in windows):",
        "if False:",
    ),
    "transposed: cropped at the wrong end": (
        "geometry.py",
        "reach - crop[0], reach - crop[1]",
        "reach - crop[1], reach - crop[0]",
    ),
    "transposed: kernel not turned around": (
        "affine.py",
        "turned = np.flip(per_group, axis=tuple(range(3, per_group.ndim)))",
        "turned = per_group",
    ),
    "transposed: channels of another group": (
        "affine.py",
        "per_group = weights.reshape(groups, -1, *weights.shape[1:]).swapaxes(1, 2)",
        "per_group = weights.reshape(-1, groups, *weights.shape[1:]).swapaxes(0, 1).swapaxes(1, 2)",
    ),
    "add: different strides let through": (
        "geometry.py",
        "if any(window.stride != first.stride for window in windows):",
        "if False:",
    ),
    "add: slack ignored": (
        "geometry.py",
        "return None\n\n\ndef positions",
        "return most, 0\n\n\ndef positions",
    ),
    "add: slack of the first branch at a known size": (
        "geometry.py",
        "len({window.output_size(size) for window in windows}) == 1",
        "True",
    ),
    "add: taps at the wrong end": (
        "geometry.py",
        "distance = within.before - window.before",
        "distance = within.after - window.after",
    ),
    "add: dilation forgotten": (
        "geometry.py",
        "step = window.dilation // within.dilation if window.taps > 1 else 1",
        "step = 1",
    ),
    "add: distances left out of the lattice": (
        "geometry.py",
        "distances += [-window.before - low for window in windows]",
        "distances += []",
    ),
    "add: a branch overwrites the others": (
        "laws.py",
        "kernel[_places(term, windows)] += regroup(term, groups).kernel",
        "kernel[_places(term, windows)] = regroup(term, groups).kernel",
    ),
    "add: bias of the first branch only": (
        "laws.py",
        "bias = np.sum([term.bias for term in terms], axis=0)",
        "bias = terms[0].bias",
    ),
    "add: as many groups as the finest branch": (
        "laws.py",
        "groups = reduce(gcd, (term.groups for term in terms))",
        "groups = max(term.groups for term in terms)",
    ),
    "add: floating windows all let through": (
        "geometry.py",
        "or len(distances) > 1:",
        "or False:",
    ),
    "add: floating taps at the start": (
        "geometry.py",
        "distance = within.reach // 2 - window.reach // 2",
        "distance = 0",
    ),
    "stack: sizes that never agree": (
        "geometry.py",
        "if joined and most - least < windows[0].stride and",
        "if joined and",
    ),
    "stack: the sizes at which it exists forgotten": (
        "geometry.py",
        "after = window.after + window.loose >= window.reach",
        "after = window.after >= window.reach",
    ),
    "stack: bias forgotten": (
        "laws.py",
        "else part.bias for part in parts]",
        "else 0 * part.bias for part in parts]",
    ),
    "stack: empty channels forgotten": (
        "laws.py",
        "            start += size\n",
        "            start += 0 if isinstance(part, int) else size\n",
    ),
    "select: groups kept where they may not be": ("laws.py", "if same_share and kept:", "if kept:"),
    "select: bias in the old order": (
        "laws.py",
        "AffineConv(picked, inner.bias[index],",
        "AffineConv(picked, inner.bias[: index.size],",
    ),
    "pass through: maxima of what is turned around": (
        "laws.py",
        "if rising and not np.all(scale.scale > 0.0):",
        "if False:",
    ),
    "pass through: a factor of zero picks nothing": (
        "laws.py",
        "if rising and not np.all(scale.scale > 0.0):",
        "if rising and not np.all(scale.scale >= 0.0):",
    ),
    "pass through: the last of several factors": (
        "laws.py",
        "if not np.array_equal(placed[there], numbers[here], equal_nan=True):",
        "if False:",
    ),
    "pass through: the two sides swapped": (
        "laws.py",
        "placed[there] = numbers[here]",
        "placed[here] = numbers[there]",
    ),
    "pass through: shifts averaged away": (
        "laws.py",
        "((scale.scale, 1.0), (scale.bias, 0.0)):",
        "((scale.scale, 1.0), (0.0 * scale.bias, 0.0)):",
    ),
    "regroup: blocks in the wrong place": (
        "laws.py",
        "place = (rows // per_out) % (conv.groups // groups)",
        "place = rows % (conv.groups // groups)",
    ),
    "refine_groups: one tap looked at": (
        "laws.py",
        "= np.any(conv.kernel != 0.0, axis=tuple(range(2, conv.weights.ndim)))",
        "= conv.kernel.reshape(*conv.kernel.shape[:2], -1)[:, :, 0] != 0.0",
    ),
    "refine_groups: a block ignored": (
        "laws.py",
        "if np.array_equal(low // columns, own) and np.array_equal(high // columns, own):",
        "if np.array_equal((low // columns)[:-1], own[:-1]) and np.array_equal((high // columns)[:-1], own[:-1]):",
    ),
    "refine_groups: only the first channel looked at": (
        "laws.py",
        " and np.array_equal(high // columns, own):",
        ":",
    ),
    "reach: counted from the start of the group": (
        "laws.py",
        "low = first + np.argmax(used, axis=1)",
        "low = np.argmax(used, axis=1)",
    ),
    "reach: a row of zeros reads everything": (
        "laws.py",
        "low, high = np.where(used.any(axis=1), (low, high), _nothing(conv.channels_out, conv.channels_in))",
        "pass",
    ),
    "reach of a composition: only from the first channel": (
        "laws.py",
        "np.max(np.where(used, high[middle], -1), axis=1, initial=-1)",
        "np.max(np.where(used, low[middle], -1), axis=1, initial=-1)",
    ),
    "reach of a composition: the group forgotten": (
        "laws.py",
        "middle = (np.arange(outer.channels_out) // per_out * per_in)[:, None]",
        "middle = np.zeros((outer.channels_out, 1), dtype=int)",
    ),
    "reach of a composition: channels that are not read": (
        "laws.py",
        "used = _used(outer)\n",
        "used = _used(outer)[:1]\n",
    ),
    "reach of a sum: that of its first term": (
        "laws.py",
        "return np.min(low, axis=0), np.max(high, axis=0)",
        "return low[0], high[0]",
    ),
    "reach of a selection: not in its order": (
        "laws.py",
        "return low[index], high[index]",
        "return low[np.sort(index)], high[np.sort(index)]",
    ),
    "batch norm: epsilon outside the root": (
        "affine.py",
        "1.0 / np.sqrt(spread + epsilon)",
        "1.0 / (np.sqrt(spread) + epsilon)",
    ),
    "batch norm: gamma forgotten in the shift": (
        "affine.py",
        "shift = -center * scale",
        "shift = -center / np.sqrt(np.asarray(variance) + epsilon)",
    ),
    "average pool: divided by one axis": ("affine.py", "1.0 / prod(taps)", "1.0 / taps[0]"),
    "same: the odd one in front": (
        "geometry.py",
        "return Window(taps, stride, dilation, total // 2, total - total // 2)",
        "return Window(taps, stride, dilation, total - total // 2, total // 2)",
    ),
    "same: dilation forgotten": (
        "geometry.py",
        "(-(-size // stride) - 1) * stride + reach + 1 - size",
        "(-(-size // stride) - 1) * stride + taps - size",
    ),
    "same: taken for fixed with stride 2": (
        "geometry.py",
        "if reach // 2 == max(reach + 1 - stride, 0) // 2:",
        "if stride <= 2:",
    ),
}

# The same for what stands in the graph: a step behind a concatenation that is carried out on each branch of it.
GRAPH_BUGS = {
    "distribute: the kernel of the first channels": (
        "forms.py",
        "AffineConv(conv.kernel[start:stop],",
        "AffineConv(conv.kernel[: stop - start],",
    ),
    "distribute: the bias of the first channels": (
        "forms.py",
        "conv.bias[start:stop]",
        "conv.bias[: stop - start]",
    ),
    "distribute: padding forgotten": (
        "forms.py",
        "conv.windows, stop - start)",
        "tuple(replace(window, before=0, after=0) for window in conv.windows), stop - start)",
    ),
    "distribute: every branch taken for the first one": ("forms.py", "            start = stop\n", ""),
    "distribute: the border of the first channels": (
        "forms.py",
        "value=value[start:stop]",
        "value=value[: stop - start]",
    ),
    "distribute: more channels out than in let through": (
        "forms.py",
        "case Affine(conv) if conv.is_channelwise:",
        "case Affine(conv):",
    ),
    "distribute: channels cut from each branch": (
        "forms.py",
        "case Slice(cuts) if cuts[axis] == (0, 0, 1):",
        "case Slice(cuts):",
    ),
}


def halves(kernel: np.ndarray) -> np.ndarray:
    """A kernel of two blocks as that of a map with two groups."""
    rows, columns = kernel.shape[0] // 2, kernel.shape[1] // 2
    return np.concatenate([kernel[:rows, :columns], kernel[rows:, columns:]])


def quick_grid(algebra: Any) -> None:
    """Raises AssertionError (or falls over) where ``algebra`` is wrong."""
    axis = list(windows((1, 2), ((0, 0), (1, 0), (0, 1), (2, 1), (-1, 1))))
    unit = algebra.Window()

    def made(channels_in: int, channels_out: int, taken: tuple[Any, ...], *rest: Any) -> Any:
        own = tuple(checks.like(algebra, window) for window in taken)
        return conv(channels_in, channels_out, own, *rest, algebra=algebra)

    for index, outer in enumerate(axis):
        for inner in (*axis[index % 3 :: 7], Window(3, 1, 1, 2, 2), Window()):
            for bias in (False, True):
                folds = checks.compose_along_an_axis(algebra, outer, inner, bias, (4, 7))
                if not bias and inner in (Window(), Window(3, 1, 1, 2, 2)):
                    assert folds
            checks.add_along_an_axis(algebra, outer, inner, (4, 7))
    checks.reaches(algebra)
    for spread in (2, 3):
        turned = [algebra.geometry.transposed(taps, spread, d, (1, 0)) for taps in (2, 3, 4) for d in (1, 2)]
        for index, outer in enumerate(turned):
            for inner in (*turned[index % 2 :: 2], *axis[index::9], Window()):
                for bias in (False, True):
                    checks.compose_along_an_axis(algebra, outer, inner, bias, (4, 7))
                    checks.compose_along_an_axis(algebra, inner, outer, bias, (4, 7))
                checks.add_along_an_axis(algebra, outer, inner, (4, 7))
        assert checks.compose_along_an_axis(algebra, turned[0], Window(), False)
        for groups in (1, 2):
            kernel = np.arange(1.0, 25.0).reshape(4, 6 // groups, -1)[:, :, : 4 // 2 * groups]
            checks.transposed(algebra, kernel, spread, (1, 0), groups)
    for window in axis[::3]:
        for kind in ("zero", "bias", "other"):
            checks.pad(algebra, window, (1, 1), kind, (3, 6, 7))
    for outer_groups, inner_groups in ((1, 1), (2, 1), (1, 2), (2, 4), (4, 2), (4, 4)):
        a = made(4, 4, (Window(2, 2, 1),), inner_groups, True, 1)
        for b in (made(4, 8, (Window(2),), outer_groups), made(4, 4, (Window(2),), outer_groups)):
            assert checks.compose(algebra, b, a, [(7,)])
        b = made(4, 4, (Window(1, 2, 1, 0, -1),), outer_groups, True, 2)
        assert checks.add(algebra, [a, b, a], [(7,)])
        assert checks.stack(algebra, [a, 3, b], 4, [(7,)])
        for channels in ([0, 1], [0, 3], [3, 2, 1, 0], [1, 0, 3, 2], [0, 2]):
            checks.select(algebra, a, channels, (7,))
        checks.regroup(algebra, a, 1, (7,))
    for factors, shifts in (([2.0, 3.0], [5.0, 7.0]), ([2.0, 2.0], [5.0, 7.0]), ([2.0, 0.0], [5.0, 5.0])):
        for rising in (False, True):
            checks.pass_through(algebra, factors, shifts, [0, 1], [0, 1], rising=rising)
            checks.pass_through(algebra, factors, shifts, [0, 0, 1, 1], [2, 0, 3, 1], rising=rising)
            checks.pass_through(algebra, factors, shifts, [0, 1, 1], [0, 0, 1], rising=rising)
    assert checks.pass_through(algebra, [2.0, 3.0], [5.0, 7.0], [0, 0, 1, 1], [2, 0, 3, 1])
    assert checks.pass_through(algebra, [3.0, 3.0], [7.0, 7.0], [0, 1], [0, 0])
    assert not checks.pass_through(algebra, [-2.0, 3.0], [5.0, 7.0], [0, 1], [1, 0], rising=True)
    beside = [made(2, 2, (Window(1, 2, 1, -start, 0),), 1, False, start) for start in (0, 1)]
    assert checks.stack(algebra, beside, 2, [(6,)])
    assert checks.compose(algebra, made(4, 2, (Window(3, 1, 1, 1, 1),)), algebra.stack(beside, 2), [(6,)])
    never = [made(2, 2, (Window(3, 2, 1, width, width),), 1, False, width) for width in (0, 1)]
    assert not checks.stack(algebra, never, 2, [])
    floating = [algebra.same(taps, stride, 1, None) for stride in (2, 3) for taps in (3, 5, 2, 4, 6, 1)]
    for one in floating:
        for other in floating:
            checks.add_along_an_axis(algebra, one, other, (6, 7, 8))
    assert not checks.compose(algebra, made(2, 2, tuple(floating[:1])), made(2, 2, (unit,)), [(6,)])
    for taps, stride, dilation, size in ((3, 2, 1, 6), (2, 1, 1, 5), (3, 2, 2, 7), (5, 3, 1, 7)):
        window = algebra.same(taps, stride, dilation, size)
        assert (window.before, window.after) == tensorflow_same(size, taps, stride, dilation)
        unknown = algebra.same(taps, stride, dilation, None)
        starts = {tensorflow_same(n, taps, stride, dilation)[0] for n in range(1, 13)}
        assert unknown.floating == (len(starts) > 1)
    diagonal = algebra.regroup(made(4, 4, (Window(2),), 4), 1).kernel
    for row, column, groups in ((3, 2, 2), (0, 3, 1), (0, 1, 2), (0, 0, 4), (2, None, 4)):
        kernel = diagonal.copy()
        if column is None:
            kernel[row] = 0.0
        else:
            kernel[row, column, 1] = 1.0
        wide = algebra.convolution(kernel, None, (algebra.Window(2),))
        same = [wide, algebra.convolution(halves(kernel), None, wide.windows, 2)] if groups > 1 else [wide]
        for written in same:
            fine = algebra.laws.refine_groups(written)
            assert fine.groups == groups
            checks.same_map(fine, x(4, 5), run(wide, x(4, 5)))
    pair = (algebra.Window(2), algebra.Window(4))
    checks.same_map(algebra.average_pool(2, pair), x(2, 5, 6), average_pool(x(2, 5, 6), pair))
    norm = algebra.batch_norm([1.0, 2.0], [3.0, 8.0], 1.0, [4.0, 6.0], [5.0, 7.0], 1)
    checks.same_map(norm, x(2, 3), batch_norm(x(2, 3), [1.0, 2.0], [3.0, 8.0], 1.0, [4.0, 6.0], [5.0, 7.0]))


def distributed(graph: Any) -> None:
    """Raises AssertionError (or falls over) where ``graph`` distributes wrongly."""
    ops = graph.graph
    plain = [conv(2, 3, (Window(3, 1, 1, 1, 1), Window(2)), seed=1), conv(2, 2, (Window(), Window(2)), seed=2)]
    pointwise = [conv(3, 2, (Window(), Window()), 1, False, seed) for seed in (3, 4)]
    uneven = [conv(1, 1, (Window(), Window()), seed=5), conv(2, 3, (Window(), Window()), seed=6)]

    def channelwise(channels: int, *taken: Window) -> Any:
        return conv(channels, channels, taken, channels, seed=7)

    for branches, step in (
        (plain, channelwise(5, Window(2, 2), Window(3))),
        (plain, channelwise(5, Window(), Window())),
        (pointwise, channelwise(4, Window(3, 1, 1, 1, 2), Window(2, 1, 2, 2, 0))),
        (uneven, channelwise(4, Window(2), Window())),
    ):
        assert checks.distribute(graph, ops.Affine(step, 1), branches, partial(run, step))
    assert checks.distribute(graph, ops.Gain(2.0, 1.0), plain, lambda given: 2.0 * given + 1.0)
    cuts = ((0, 0, 1), (0, 0, 1), (1, 0, 2), (0, 1, 1))
    assert checks.distribute(graph, ops.Slice(cuts), plain, lambda given: given[:, 1::2, :-1])
    border = tuple(float(number) for branch in uneven for number in branch.bias)
    around = ops.Pad(((0, 0), (0, 0), (1, 0), (2, 1)), border, 1)
    assert checks.distribute(graph, around, uneven, lambda given: padded(given, ((1, 0), (2, 1)), border))
    assert checks.distribute(graph, ops.Relayout(1, 1), plain, lambda given: given)

    for groups, outside in ((1, 5), (5, 10)):
        step = conv(5, outside, (Window(), Window()), groups, seed=8)
        assert not checks.distribute(graph, ops.Affine(step, 1), plain, partial(run, step))
    fewer = ops.Slice(((0, 0, 1), (1, 1, 1), (0, 0, 1), (0, 0, 1)))
    assert not checks.distribute(graph, fewer, plain, lambda given: given[1:-1])
    more = ops.Pad(((0, 0), (1, 0), (0, 0), (0, 0)), 0.0, 1)
    assert not checks.distribute(
        graph, more, plain, lambda given: np.concatenate([np.zeros_like(given[:1]), given])
    )


NUMBERS = count()


@contextmanager
def planted(folder: Path, package: ModuleType, file: str, old: str, new: str) -> Iterator[Any]:
    """A copy of ``package`` with one place changed, imported under a name of its own."""
    name = f"planted_{next(NUMBERS)}"
    copy = folder / name
    shutil.copytree(Path(str(package.__file__)).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for path in copy.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        if path.name == file:
            assert source.count(old) == 1, f"{file} does not say exactly once: {old}"
            source = source.replace(old, new)
        path.write_text(source.replace(package.__name__, name), encoding="utf-8")
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
        for loaded in [module for module in sys.modules if module.split(".")[0] == name]:
            del sys.modules[loaded]


def falls(check: Callable[[], None]) -> bool:
    """Whether the check notices something; falling over is noticing, too."""
    try:
        with np.errstate(all="ignore"):
            check()
    except (AssertionError, ValueError, IndexError, ZeroDivisionError):
        return True
    return False


def test_the_algebra_as_it_is_passes() -> None:
    quick_grid(real)


def test_an_undamaged_copy_passes(tmp_path: Path) -> None:
    with planted(tmp_path, real, "laws.py", "ZERO_AFTER_BIAS = ", "ZERO_AFTER_BIAS = ") as copy:
        assert copy is not real
        quick_grid(copy)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(bug: str, tmp_path: Path) -> None:
    with planted(tmp_path, real, *BUGS[bug]) as damaged:
        assert falls(lambda: quick_grid(damaged))


def test_what_distributes_as_it_is_passes(tmp_path: Path) -> None:
    distributed(real_graph)
    with planted(tmp_path, real_graph, "forms.py", "MOST_LEAVES = ", "MOST_LEAVES = ") as copy:
        assert copy is not real_graph
        distributed(copy)


@pytest.mark.parametrize("bug", GRAPH_BUGS)
def test_a_bug_planted_into_the_graph_is_noticed(bug: str, tmp_path: Path) -> None:
    with planted(tmp_path, real_graph, *GRAPH_BUGS[bug]) as damaged:
        assert falls(lambda: distributed(damaged))
