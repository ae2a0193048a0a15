"""What it means that a law is right. Each check takes the algebra that it looks at, raises AssertionError
where it is wrong, and says whether the law folded; the planted bugs run through the same checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from cases import conv, weights, x

from oracle import assert_same, joined, matrix, output_size, padded, picked, run, total

SIZES = range(1, 10)
KNOWN = (1, 4, 7)


def same_map(result: Any, data: np.ndarray, expected: np.ndarray) -> None:
    """``result`` says and gives what is expected of ``data``."""
    assert result.kernel.shape[2:] == tuple(window.taps for window in result.windows)
    assert_same(run(result, data), expected)


def compose_along_an_axis(algebra: Any, outer: Any, inner: Any, bias: bool, sizes: Iterable[int] = SIZES) -> bool:
    """One channel, one axis: ``outer`` after ``inner``, on every impulse of every size, known and unknown."""
    first, second, offset = weights(inner.taps, 1), weights(outer.taps, 2), 5.0 if bias else 0.0
    a = algebra.convolution([[first]], [offset], (like(algebra, inner),))
    b = algebra.convolution([[second]], [3.0], (like(algebra, outer),))
    whole = algebra.compose(b, a)
    for size in sizes:
        middle = output_size(inner, size)
        if middle < 0 or middle + min(outer.before, 0) + min(outer.after, 0) < 0:
            continue  # no framework runs this
        answers = [whole, algebra.compose(b, a, (size,))] if size in KNOWN else [whole]
        last = matrix(outer, second, middle)
        expected = last @ matrix(inner, first, size)
        for answer in answers:
            if isinstance(answer, algebra.AffineConv):
                (window,) = answer.windows
                assert_same(matrix(window, answer.kernel[0, 0].tolist(), size), expected)
                assert_same(np.full(len(last), answer.bias[0]), last.sum(axis=1) * offset + 3.0)
    return isinstance(whole, algebra.AffineConv)


def a_composition_is_a_convolution(outer: Any, inner: Any, bias: bool, sizes: Iterable[int]) -> bool:
    """The truth about :func:`compose_along_an_axis`, by trying: the only convolution that it could be is the one
    that the interior shows; whether that is right at the borders of every size."""
    first, second, offset = weights(inner.taps, 1), weights(outer.taps, 2), 5.0 if bias else 0.0
    kernel: dict[int, float] = {}
    for v, later in enumerate(second):
        for u, earlier in enumerate(first):
            place = inner.stride * (outer.dilation * v - outer.before)
            place += outer.spread * (inner.dilation * u - inner.before)
            kernel[place] = kernel.get(place, 0.0) + later * earlier
    spread = inner.spread * outer.spread
    if outer.spread > 1 and inner.stride > 1:
        return False
    for size in sizes:
        middle = output_size(inner, size)
        if middle < 0 or middle + min(outer.before, 0) + min(outer.after, 0) < 0:
            continue
        last = matrix(outer, second, middle)
        truth = last @ matrix(inner, first, size)
        guess = np.zeros_like(truth)
        for i in range(len(guess)):
            for place, weight in kernel.items():
                source, between = divmod(inner.stride * outer.stride * i + place, spread)
                if between == 0 and 0 <= source < size:
                    guess[i, source] = weight
        constant = last.sum(axis=1) * offset
        if not np.array_equal(truth, guess) or np.any(constant != sum(second) * offset):
            return False
    return True


def reads_all_that_it_pads(window: Any) -> bool:
    """At some size it reads the padded element next to the data, on each side that it pads."""
    seen: set[str] = set()
    for size in range(1, 12):
        for i in range(output_size(window, size)):
            for t in range(window.taps):
                place = window.stride * i - window.before + window.dilation * t
                seen |= (
                    {"before"} if place == -window.spread else {"after"} if place == size * window.spread else set()
                )
    before, after = window.before < window.spread, window.after < window.spread
    return (before or "before" in seen) and (after or "after" in seen)


def compose(algebra: Any, b: Any, a: Any, spaces: Iterable[tuple[int, ...]]) -> bool:
    """``b`` after ``a``, with channels, groups and any number of axes."""
    whole = algebra.compose(b, a)
    for space in spaces:
        data = x(a.channels_in, *space)
        expected = run(b, run(a, data))
        for answer in (whole, algebra.compose(b, a, space)):
            if isinstance(answer, algebra.AffineConv):
                same_map(answer, data, expected)
    return isinstance(whole, algebra.AffineConv)


def add_along_an_axis(algebra: Any, one: Any, other: Any, sizes: Iterable[int] = SIZES) -> bool:
    """One channel, one axis: the sum of two maps. At a known size it must fold wherever strides and sizes agree."""
    first, second = weights(one.taps, 1), weights(other.taps, 2)
    a = algebra.convolution([[first]], [2.0], (like(algebra, one),))
    b = algebra.convolution([[second]], [3.0], (like(algebra, other),))
    whole = algebra.add([a, b])
    for size in sizes:
        if min(output_size(one, size), output_size(other, size)) < 0:
            continue
        left, right = matrix(one, first, size), matrix(other, second, size)
        here = algebra.add([a, b], (size,))
        fits = (one.stride, one.spread) == (other.stride, other.spread) and left.shape == right.shape
        assert one.floating or other.floating or isinstance(here, algebra.AffineConv) == fits
        for answer in (whole, here):
            if isinstance(answer, algebra.AffineConv):
                (window,) = answer.windows
                assert_same(matrix(window, answer.kernel[0, 0].tolist(), size), total([left, right]))
                assert_same(answer.bias, np.array([5.0]))
    return isinstance(whole, algebra.AffineConv)


def add(algebra: Any, terms: Sequence[Any], spaces: Iterable[tuple[int, ...]]) -> bool:
    """The sum of any number of maps."""
    whole = algebra.add(terms)
    for space in spaces:
        data = x(terms[0].channels_in, *space)
        for answer in (whole, algebra.add(terms, space)):
            if isinstance(answer, algebra.AffineConv):
                same_map(answer, data, total([run(term, data) for term in terms]))
    return isinstance(whole, algebra.AffineConv)


def stack(algebra: Any, parts: Sequence[Any], channels: int, spaces: Iterable[tuple[int, ...]]) -> bool:
    """The concatenation of maps, and of channels that are 0."""
    whole = algebra.stack(parts, channels)
    for space in spaces:
        data = x(channels, *space)
        given = [part if isinstance(part, int) else run(part, data) for part in parts]
        shape = next(part.shape[1:] for part in given if not isinstance(part, int))
        rows = [np.zeros((part, *shape)) if isinstance(part, int) else part for part in given]
        for answer in (whole, algebra.stack(parts, channels, space)):
            if isinstance(answer, algebra.AffineConv):
                same_map(answer, data, joined(rows))
    return isinstance(whole, algebra.AffineConv)


def reaches(algebra: Any) -> None:
    """What combinations are said to read, without their kernels, is what their kernels read."""
    holes = np.ones((6, 3, 1))
    holes[1, 0] = holes[2, 2] = holes[3] = holes[5, :2] = 0.0
    unit = (algebra.Window(),)
    outer = algebra.convolution(holes, None, unit, 2)  # reads 6 channels
    block = algebra.convolution(holes[:, :2], None, unit, 3)  # 6 channels from 6
    whole = algebra.compose(outer, block)
    other = algebra.convolution(np.eye(6)[::-1][:, :, None], None, unit)
    for made in (
        whole,
        algebra.add([whole, other]),
        algebra.select(algebra.regroup(whole, 1), [4, 0, 3]),
        algebra.stack([whole, 2, outer], 6),
        algebra.compose(other, whole),
        algebra.compose(algebra.compose(other, outer), block),
    ):
        low, high = made.weights.reach()
        used = np.any(algebra.regroup(made, 1).kernel != 0.0, axis=2)
        assert [list(np.flatnonzero(row)[[0, -1]]) if row.any() else [] for row in used] == [
            [first, last] if last >= first else [] for first, last in zip(low, high, strict=True)
        ]


def select(algebra: Any, a: Any, channels: Sequence[int], space: tuple[int, ...]) -> None:
    """Always folds."""
    data = x(a.channels_in, *space)
    same_map(algebra.select(a, channels), data, picked(run(a, data), channels))


def pad(
    algebra: Any, inner: Any, widths: tuple[int, int], kind: str, sizes: Iterable[int] = (1, 2, 3, 6, 9, 14)
) -> bool:
    """Padding the outputs of one map along one axis. Folds exactly where the literal result is the response of
    the one map that it could be."""
    a = conv(1, 2, (like(algebra, inner),), bias=kind != "zero", seed=2, algebra=algebra)
    value: Any = {"zero": 0.0, "bias": a.bias, "other": a.bias + 1.0}[kind]
    moved = [inner.before + inner.stride * widths[0], inner.after + inner.stride * widths[1]]
    where = algebra.Window(inner.taps, inner.stride, inner.dilation, *moved, spread=inner.spread)
    guess = conv(1, 2, (where,), seed=2, algebra=algebra)
    guess = guess.with_bias(a.bias)
    whole = algebra.pad(a, [widths], value)
    exact = True
    for size in sizes:
        if output_size(inner, size) < 0 or output_size(inner, size) + min(0, *widths) < 0:
            continue
        data = x(1, size)
        expected = padded(run(a, data), [widths], value)
        right = np.array_equal(run(guess, data), expected)
        exact = exact and right
        here = algebra.pad(a, [widths], value, (size,))
        # A dilated kernel may step over a tensor shorter than itself; the law does not look for such luck.
        if size > inner.dilation * inner.taps and expected.size > output_size(inner, size):
            assert isinstance(here, algebra.AffineConv) or not right
        for answer in (whole, here):
            if isinstance(answer, algebra.AffineConv):
                same_map(answer, data, expected)
    assert isinstance(whole, algebra.AffineConv) == exact, (inner, widths, kind)
    return exact


def regroup(algebra: Any, a: Any, groups: int, space: tuple[int, ...]) -> None:
    """The same function with fewer groups, and back."""
    data = x(a.channels_in, *space)
    wide = algebra.regroup(a, groups)
    assert wide.groups == groups
    same_map(wide, data, run(a, data))
    again = algebra.laws.refine_groups(wide)
    assert again.groups == a.groups
    assert_same(again.kernel, a.kernel)


def transposed(
    algebra: Any, kernel: np.ndarray, stride: int, crop: tuple[int, int], groups: int, dilation: int = 1
) -> Any:
    """A transposed convolution along one axis by its definition: every input adds its own copy of the kernel
    ``(in, out/groups, taps)`` to the output, ``stride`` positions after the one before it."""
    channels, per_group, taps = kernel.shape
    window = algebra.geometry.transposed(taps, stride, dilation, crop)
    made = algebra.transposed_convolution(kernel, None, (window,), groups)
    for size in (1, 2, 5):
        data = x(channels, size)
        wide = np.zeros((per_group * groups, stride * (size - 1) + dilation * (taps - 1) + 1))
        for c in range(channels):
            first = c // (channels // groups) * per_group
            for i in range(size):
                for t in range(taps):
                    wide[first : first + per_group, stride * i + dilation * t] += data[c, i] * kernel[c, :, t]
        if wide.shape[1] > sum(crop):
            same_map(made, data, padded(wide, [(-crop[0], -crop[1])]))
    return made


def everywhere(function: Callable[[np.ndarray], np.ndarray], conv: Any, spaces: Iterable[tuple[int, ...]]) -> None:
    """``conv`` is ``function`` at all these sizes."""
    for space in spaces:
        data = x(conv.channels_in, *space)
        same_map(conv, data, function(data))


def like(algebra: Any, window: Any) -> Any:
    """The same window as a value of this algebra."""
    return algebra.Window(**{field.name: getattr(window, field.name) for field in fields(window)})


def distribute(graph: Any, op: Any, branches: Sequence[Any], expected: Callable[[np.ndarray], np.ndarray]) -> bool:
    """``op`` of ``graph``'s, behind a concatenation of ``branches`` that each read a tensor of their own: where it
    is carried out on each branch, that is ``expected`` of what stands in the concatenation."""
    data = {f"x{index}": x(branch.channels_in, 6, 5, seed=index) for index, branch in enumerate(branches)}
    given = joined([run(branch, tensor) for branch, tensor in zip(branches, data.values(), strict=True)])
    said = expected(given)
    nodes = [
        graph.Node(f"branch{index}", graph.graph.Affine(branch, 1), (f"x{index}",), (f"y{index}",))
        for index, branch in enumerate(branches)
    ]
    nodes.append(
        graph.Node("both", graph.graph.Concat(1), tuple(f"y{index}" for index in range(len(branches))), ("both",))
    )
    nodes.append(graph.Node("last", op, ("both",), ("last",)))
    sizes = {name: tensor.shape for name, tensor in data.items()} | {"both": given.shape, "last": said.shape}
    sizes |= {f"y{index}": run(branch, data[f"x{index}"]).shape for index, branch in enumerate(branches)}
    values = {name: graph.Value(name, (None, *shape), "float32", (1, *shape)) for name, shape in sizes.items()}
    builder = graph.forms.form_builder(graph.Graph(values, tuple(nodes), tuple(data), ("last",)))
    forms = [builder.combine(node, [builder.leaf(node.inputs[0])]) for node in nodes[:-2]]
    (behind,) = (parts for parts in builder.parts(nodes[-2], [(form,) for form in forms]) if len(parts) > 1)
    answers = [parts for parts in builder.parts(nodes[-1], [behind]) if len(parts) > 1]
    for parts in answers:
        assert [list(part.terms) for part in parts] == [[name] for name in data]
        terms = [(part.terms[name].with_bias(part.bias), name) for part in parts for name in part.terms]
        assert_same(joined([run(term, data[name]) for term, name in terms]), said)
    return bool(answers)


def pass_through(
    algebra: Any,
    factors: Sequence[float],
    shifts: Sequence[float],
    here: Sequence[int],
    there: Sequence[int],
    *,
    rising: bool = False,
) -> bool:
    """A map per channel before an operator whose channel ``there[k]`` is made of ``here[k]``, and what the law
    makes of it behind; and the other way round. The operator's weights are eighths that sum to one, or it takes
    maxima."""
    channels = max(there) + 1
    moved = algebra.pass_through(algebra.scale_shift(factors, shifts, 1), (here, there), channels, 2, rising=rising)
    rows = [[k for k, row in enumerate(there) if row == channel] for channel in range(channels)]
    numbers = x(len(factors), 4)

    def operated(data: np.ndarray) -> np.ndarray:
        found = []
        for pairs in rows:
            read = np.concatenate([data[here[k]] for k in pairs])
            shares = np.array([1.0] * (len(read) - 1) + [9.0 - len(read)]) / 8.0
            found.append([max(read.tolist()) if rising else float(np.sum(shares * read))])
        return np.array(found)

    before = np.array([[a * v + b for v in row] for row, a, b in zip(numbers, factors, shifts, strict=True)])
    if not isinstance(moved, algebra.AffineConv):
        assert moved.reason
        alike = all(len({(factors[here[k]], shifts[here[k]]) for k in pairs}) == 1 for pairs in rows)
        assert not alike or (rising and min(factors) <= 0.0)
        return False
    assert not rising or min(factors) > 0.0  # where a number is infinite, 0 times it is none
    assert len(moved.windows) == 2
    behind = moved.scale[:, None] * operated(numbers) + moved.bias[:, None]
    assert_same(behind, operated(before))
    return True
