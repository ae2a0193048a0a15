"""Bugs planted into the laws, one at a time; the grid must notice each."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import conv, windows, x

from oracle import run
from refold.algebra import AffineConv, Window, affine, geometry, laws

SOURCE = Path(laws.__file__).parent

# (file, what stands there, what a tired person might write)
BUGS = {
    "compose: guard of padding after a bias dropped": (
        "laws",
        "if pads and not np.array_equal(inner.bias, np.broadcast_to(value, inner.bias.shape)):",
        "if False:",
    ),
    "pad: guard of what lies outside dropped": (
        "laws",
        "if (before > 0 and not zero_before) or (after > 0 and not zero_after):",
        "if False:",
    ),
    "compose: inner stride forgotten for the taps": (
        "laws",
        "start = v * outer.dilation * inner.stride // window.dilation",
        "start = v * outer.dilation // window.dilation",
    ),
    "compose: outer dilation forgotten": (
        "laws",
        "start = v * outer.dilation * inner.stride // window.dilation",
        "start = v * inner.stride // window.dilation",
    ),
    "compose: inner stride forgotten for the padding": (
        "geometry",
        "before=inner.before + inner.stride * outer.before",
        "before=inner.before + outer.before",
    ),
    "compose: padding swapped": (
        "geometry",
        "after=inner.after + inner.stride * outer.after",
        "after=inner.after + inner.stride * outer.before",
    ),
    "compose: stride of the outer only": (
        "geometry",
        "stride=inner.stride * outer.stride",
        "stride=outer.stride",
    ),
    "compose: inner bias not carried": (
        "laws",
        "return AffineConv(kernel, outer.bias + carried,",
        "return AffineConv(kernel, outer.bias,",
    ),
    "compose: groups of the inner only": (
        "laws",
        "groups = gcd(outer.groups, inner.groups)",
        "groups = inner.groups",
    ),
    "add: different strides let through": (
        "geometry",
        "if any(window.stride != first.stride for window in windows):",
        "if False:",
    ),
    "add: different sizes let through": (
        "geometry",
        "return None\n    # At one",
        "return max(slacks)\n    # At one",
    ),
    "add: taps at the wrong offset": (
        "geometry",
        "start = (within.before - window.before) // within.dilation",
        "start = (within.after - window.after) // within.dilation",
    ),
    "add: dilation forgotten": (
        "geometry",
        "step = window.dilation // within.dilation if window.taps > 1 else 1",
        "step = 1",
    ),
    "add: bias of the first branch only": (
        "laws",
        "bias = np.sum([term.bias for term in terms], axis=0)",
        "bias = terms[0].bias",
    ),
    "regroup: blocks in the wrong place": (
        "laws",
        "place = (rows // per_out) % (conv.groups // groups)",
        "place = rows % (conv.groups // groups)",
    ),
    "select: groups kept where they may not be": ("laws", "if same_share and kept:", "if kept:"),
    "pad: stride forgotten": ("geometry", "window.before + window.stride * before", "window.before + before"),
    "zero outside: one position too many": (
        "geometry",
        "before = window.reach < window.stride + window.before",
        "before = window.reach <= window.stride + window.before",
    ),
}


def damaged(file: str, old: str, new: str) -> types.ModuleType:
    """The laws with one line changed."""
    sources = {name: (SOURCE / f"{name}.py").read_text(encoding="utf-8") for name in ("geometry", "laws")}
    assert sources[file].count(old) == 1, f"{file}.py no longer says: {old}"
    sources[file] = sources[file].replace(old, new)
    modules = {}
    for name, source in sources.items():
        module = types.ModuleType(f"damaged_{name}")
        sys.modules[module.__name__] = module
        source = source.replace("from refold.algebra import geometry", "import damaged_geometry as geometry")
        source = source.replace(
            "from refold.algebra.geometry import Window", "from refold.algebra.geometry import Window"
        )
        if name == "geometry":
            # The maps of the tests are made of the real windows.
            source = source.replace("@final\n@dataclass(frozen=True, slots=True)\nclass Window:", "class _Unused:")
            source = source.replace("UNIT = Window()", "from refold.algebra.geometry import UNIT, Window")
        exec(compile(source, f"damaged {name}", "exec"), module.__dict__)
        modules[name] = module
    return modules["laws"]


def disagreements(module: Any) -> Iterator[str]:
    """Places where the laws of ``module`` are not what the literal loops say."""
    grid = [w for w in windows() if w.dilation == 1 or w.taps > 1][::2]
    for index, (b, a) in enumerate(zip(grid, grid[7:] + grid[:7], strict=True)):
        for bias in (False, True):
            for groups in (1, 2):
                inner, outer = conv(4, 4, (a,), groups, bias, seed=index), conv(4, 4, (b,), 3 - groups, seed=7)
                yield from compare(
                    module.compose(outer, inner), inner, lambda d, i=inner, o=outer: run(o, run(i, d))
                )
                yield from compare(module.pad(inner, [(1, 1)], 0.0), inner, lambda d, i=inner: padded(run(i, d)))
                yield from compare(
                    module.pad(inner, [(1, 1)], inner.bias), inner, lambda d, i=inner: padded(run(i, d), i.bias)
                )
                picked = [1, 0, 2, 3] if index % 2 else [0, 2, 3]
                yield from compare(module.select(inner, picked), inner, lambda d, i=inner, p=picked: run(i, d)[p])
    for a in grid[::2]:
        for b in grid[1::3]:
            one, other = conv(4, 4, (a,), 2, seed=1), conv(4, 4, (b,), 4, seed=2)
            yield from compare(
                module.add([one, other]), one, lambda d, i=one, o=other: together(run(i, d), run(o, d))
            )


def padded(y: np.ndarray, value: Any = 0.0) -> np.ndarray:
    edge = np.broadcast_to(np.reshape(value, (-1, 1)), (y.shape[0], 1))
    return np.concatenate([edge, y, edge], axis=1)


def together(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return one + other if one.shape == other.shape else np.full((1, 1), np.nan)


def compare(result: Any, source: AffineConv, expected: Callable[[np.ndarray], np.ndarray]) -> Iterator[str]:
    if not isinstance(result, AffineConv):
        return
    for size in (4, 5, 7):
        data = x(source.channels_in, size)
        if run(source, data).shape[1] < 2:
            continue
        wanted = expected(data)
        given = run(result, data)
        if wanted.size and not (wanted.shape == given.shape and np.array_equal(wanted, given)):
            yield f"{result.windows}"


def caught(module: Any) -> bool:
    try:
        return next(disagreements(module), None) is not None
    except (ValueError, IndexError, AttributeError):
        return True  # a crash is noticed as well


def test_the_laws_as_they_are_have_none() -> None:
    assert next(disagreements(laws), None) is None


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug: str) -> None:
    assert caught(damaged(*BUGS[bug]))


def test_wrong_epsilon_is_caught() -> None:
    """A batch norm is its definition: nothing but the right epsilon gives it."""
    right = affine.batch_norm([0.0], [3.0], 1.0, axes=1)
    wrong = affine.batch_norm([0.0], [3.0], 0.999, axes=1)
    data = np.array([[2.0]])
    assert run(right, data)[0, 0] == 1.0
    assert run(wrong, data)[0, 0] != 1.0


assert geometry.Window is Window
