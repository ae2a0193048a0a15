"""Modules that nobody thought of: what folds is the same function, as torch itself computes it in float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from zoo import randomize

import refold

# What one random step may do, the likelier ones more than once.
KINDS = (
    *("conv", "conv", "conv", "norm", "norm", "add", "add", "subtract", "scale", "shift", "negate", "relu"),
    *("pad", "crop", "average", "join", "halve", "shuffle", "pointwise_last", "in_place", "again", "flat_norm"),
    *("transposed", "transposed"),
)


class Grown(nn.Module):
    """A module that does the steps it was given, one after the other; ``tensors`` grows by one or more each."""

    def __init__(self, steps: list[tuple[str, tuple[Any, ...]]], parts: list[Any], outputs: list[int]) -> None:
        super().__init__()
        self.steps, self.outputs = steps, outputs
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Any) -> Any:
        tensors = [x]
        for kind, arguments in self.steps:
            tensors += getattr(self, kind)(tensors, *arguments)
        return [tensors[index] for index in self.outputs]

    def apply_part(self, tensors: Any, index: int, part: int) -> Any:
        return [self.parts[part](tensors[index])]

    def add(self, tensors: Any, one: int, two: int, factor: float) -> Any:
        return [tensors[one] + tensors[two] if factor == 1 else torch.add(tensors[one], tensors[two], alpha=factor)]

    def subtract(self, tensors: Any, one: int, two: int) -> Any:
        return [tensors[one] - tensors[two]]

    def scale(self, tensors: Any, index: int, part: int) -> Any:
        return [tensors[index] * self.parts[part].weight[: tensors[index].shape[1], None, None]]

    def shift(self, tensors: Any, index: int, number: float) -> Any:
        return [number - tensors[index] / 2]

    def negate(self, tensors: Any, index: int) -> Any:
        return [-tensors[index]]

    def relu(self, tensors: Any, index: int) -> Any:
        return [F.relu(tensors[index])]

    def pad(self, tensors: Any, index: int, widths: Any, value: float) -> Any:
        return [F.pad(tensors[index], widths, value=value)]

    def crop(self, tensors: Any, index: int, start: int, step: int) -> Any:
        return [tensors[index][:, :, start::step, start:]]

    def join(self, tensors: Any, one: int, two: int) -> Any:
        return [torch.cat([tensors[one], tensors[two]], 1)]

    def halve(self, tensors: Any, index: int) -> Any:
        return tensors[index].chunk(2, 1)

    def shuffle(self, tensors: Any, index: int) -> Any:
        b, c, h, w = tensors[index].shape
        return [tensors[index].view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)]

    def pointwise_last(self, tensors: Any, index: int, part: int) -> Any:
        return [self.parts[part](tensors[index].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)]

    def flat_norm(self, tensors: Any, index: int, part: int) -> Any:
        moved = tensors[index].permute(0, 2, 3, 1)
        return [self.parts[part](moved.flatten(0, 2)).reshape(moved.shape).permute(0, 3, 1, 2)]

    def in_place(self, tensors: Any, index: int, part: int) -> Any:
        y = self.parts[part](tensors[index])
        y *= 2
        y.add_(1)
        tapped = y * 3
        return [tapped, F.relu_(y)]


@st.composite
def grown(draw: Any) -> tuple[Any, tuple[int, ...]]:
    size = draw(st.sampled_from([7, 8]))
    shapes: list[tuple[int, int, int]] = [(4, size, size)]
    steps: list[tuple[str, tuple[Any, ...]]] = []
    parts: list[Any] = []

    def part(module: Any) -> int:
        parts.append(module)
        return len(parts) - 1

    for _ in range(draw(st.integers(3, 9))):
        kind = draw(st.sampled_from(KINDS))
        index = draw(st.integers(max(0, len(shapes) - 3), len(shapes) - 1))
        c, h, w = shapes[index]
        if kind in ("conv", "in_place"):
            k, s, d = draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([1, 1, 2])), draw(st.integers(1, 2))
            p = draw(st.integers(0, 2)) if kind == "conv" else 0
            groups = draw(st.sampled_from([g for g in (1, 1, 2, c) if c % g == 0]))
            out = groups * draw(st.integers(1, max(1, 6 // groups)))
            sizes = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n in (h, w)]
            if min(sizes) < 2:
                continue
            conv = nn.Conv2d(c, out, k, s, p, d, groups, draw(st.booleans()))
            if draw(st.integers(0, 5)) == 0:
                conv = nn.utils.parametrizations.weight_norm(conv)
            shape = (out, *sizes)
            steps.append(("apply_part" if kind == "conv" else kind, (index, part(conv))))
            shapes += [shape] if kind == "conv" else [shape, shape]
        elif kind == "transposed":
            k, s, d = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2]))
            p, extra = draw(st.integers(0, d * (k - 1))), draw(st.integers(0, max(s, d) - 1))
            groups = draw(st.sampled_from([g for g in (1, 1, 2, c) if c % g == 0]))
            out = groups * draw(st.integers(1, max(1, 6 // groups)))
            sizes = [s * (n - 1) - 2 * p + d * (k - 1) + 1 + extra for n in (h, w)]
            if min(sizes) < 2 or max(sizes) > 30:
                continue
            turned = nn.ConvTranspose2d(c, out, k, s, p, extra, groups, draw(st.booleans()), d)
            steps.append(("apply_part", (index, part(turned))))
            shapes.append((out, *sizes))
        elif kind == "norm":
            steps.append(("apply_part", (index, part(nn.BatchNorm2d(c, affine=draw(st.booleans()))))))
            shapes.append((c, h, w))
        elif kind == "again" and parts:
            which = draw(st.integers(0, len(parts) - 1))
            if isinstance(parts[which], nn.BatchNorm2d) and parts[which].num_features == c:
                steps.append(("apply_part", (index, which)))
                shapes.append((c, h, w))
        elif kind in ("add", "subtract", "join"):
            fitting = [i for i, (d, m, n) in enumerate(shapes) if (m, n) == (h, w) and (kind == "join" or d == c)]
            other = draw(st.sampled_from(fitting))
            factor = (draw(st.sampled_from([1, 1, 0.5])),) if kind == "add" else ()
            steps.append((kind, (index, other, *factor)))
            shapes.append((c + shapes[other][0] if kind == "join" else c, h, w))
        elif kind == "scale":
            steps.append((kind, (index, part(nn.BatchNorm2d(c)))))
            shapes.append((c, h, w))
        elif kind == "shift":
            steps.append((kind, (index, draw(st.sampled_from([0.0, 1.0, -0.5])))))
            shapes.append((c, h, w))
        elif kind in ("negate", "relu"):
            steps.append((kind, (index,)))
            shapes.append((c, h, w))
        elif kind == "pad":
            widths = tuple(draw(st.integers(-1, 2)) for _ in range(4))
            if h + widths[2] + widths[3] < 2 or w + widths[0] + widths[1] < 2:
                continue
            steps.append((kind, (index, widths, draw(st.sampled_from([0.0, 0.0, 1.5])))))
            shapes.append((c, h + widths[2] + widths[3], w + widths[0] + widths[1]))
        elif kind == "crop":
            start, step = draw(st.integers(0, 1)), draw(st.integers(1, 2))
            if min(h, w) < 5:
                continue
            steps.append((kind, (index, start, step)))
            shapes.append((c, (h - start - 1) // step + 1, w - start))
        elif kind == "average" and min(h, w) > 3:
            steps.append(
                ("apply_part", (index, part(nn.AvgPool2d(2, draw(st.integers(1, 2)), draw(st.integers(0, 1))))))
            )
            pool = parts[-1]
            shapes.append((c, *((n + 2 * pool.padding - 2) // pool.stride + 1 for n in (h, w))))
        elif kind in ("halve", "shuffle") and c % 2 == 0:
            steps.append((kind, (index,)))
            shapes += [(c // 2, h, w)] * 2 if kind == "halve" else [(c, h, w)]
        elif kind == "pointwise_last":
            steps.append((kind, (index, part(nn.Linear(c, draw(st.integers(1, 5)))))))
            shapes.append((parts[-1].out_features, h, w))
        elif kind == "flat_norm":
            steps.append((kind, (index, part(nn.BatchNorm1d(c)))))
            shapes.append((c, h, w))
    outputs = [len(shapes) - 1] + [i for i in range(1, len(shapes) - 1) if draw(st.integers(0, 5)) == 0]
    model = randomize(Grown(steps, parts, outputs), draw(st.integers(0, 99)))
    return model, (2, 4, size, size)


def runs_at(model: Any, size: int) -> bool:
    """Whether a module runs at a size: what was pooled and cropped may fit the rest at one size only."""
    try:
        model(torch.zeros(1, 4, size, size))
    except RuntimeError:
        return False
    return True


def grow_and_check(model: Any, shape: tuple[int, ...], open_sizes: bool) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    example = (None, 4, None, None) if open_sizes and runs_at(model, 64) and runs_at(model, 128) else x
    plain = refold.fold(model, example)
    wanted = copy.deepcopy(model).double()(x.double())
    original, folded = model(x), plain(x)
    for a, b, exact in zip(original, folded, wanted, strict=True):
        scale = exact.abs().max().item() or 1.0
        own, error = (((t.double() - exact).abs().max() / scale).item() for t in (a, b))
        assert error <= max(4 * own, 3e-6)
    assert len(plain.state_dict()) == 0 or not plain.training
    certificate = refold.prove(model, plain, example)
    assert certificate.ok, str(certificate)
    before = refold.inspect(model, example)
    assert before.after.operators <= before.before.operators


@settings(max_examples=60, deadline=None, derandomize=True, phases=[Phase.generate])
@given(grown(), st.booleans())
def test_random_modules_fold_to_the_same_function(drawn: tuple[Any, tuple[int, ...]], open_sizes: bool) -> None:
    grow_and_check(*drawn, open_sizes)
