"""Equality on the small sizes is equality on all that they stand for: no less, and no more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proof.models import check, normal
from proof.numpy_frontend import FRONTEND, Model, conv, step
from refold.errors import InputError
from refold.proof import Certificate, Verdict, region

Array = Any


def naively_merged(first: Any, second: Any, extra: int) -> Any:
    """The one convolution that two equal in the interior, borders not thought of; ``extra`` pads more."""
    a, b = first.settings, second.settings
    wa, wb = first.weights["w"].astype("float64"), second.weights["w"].astype("float64")
    (pa, qa), (pb, qb) = a["pad"][0], b["pad"][0]
    if a["stride"] > 1 and b["spread"] > 1:
        return None
    step_out, step_in = a["stride"] * b["dilation"], a["dilation"] * b["spread"]
    taps = step_out * (wb.shape[2] - 1) + step_in * (wa.shape[2] - 1) + 1
    kernel = np.zeros((wb.shape[0], wa.shape[1], taps))
    for v in range(wb.shape[2]):
        for u in range(wa.shape[2]):
            kernel[:, :, step_out * v + step_in * u] += wb[:, :, v] @ wa[:, :, u]
    bias = second.weights["b"].astype("float64")
    if "b" in first.weights:
        bias = bias + wb.sum(axis=2) @ first.weights["b"].astype("float64")
    pad = ((b["spread"] * pa + a["stride"] * pb + extra, b["spread"] * qa + a["stride"] * qb - extra),)
    if min(pad[0]) < 0:
        return None
    steps = {"stride": a["stride"] * b["stride"], "spread": a["spread"] * b["spread"]}
    return conv("m", "x", kernel.astype("float32"), bias.astype("float32"), pad=pad, **steps)


def outputs(model: Model, x: Array) -> Array | None:
    try:
        return FRONTEND.evaluate(FRONTEND.lift(model), {"x": x}, model.outputs)[model.outputs[0]]
    except InputError:
        return None


def agree(before: Model, after: Model, size: int) -> bool:
    x = np.random.default_rng(size).normal(size=(2, 2, size))
    one, two = outputs(before, x), outputs(after, x)
    if one is None or two is None:
        return one is None and two is None
    return one.shape == two.shape and bool(np.allclose(one, two, rtol=1e-4, atol=1e-5))


pads = st.tuples(st.integers(0, 2), st.integers(0, 2))


@settings(max_examples=400, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    taps=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    spreads=st.tuples(st.sampled_from([1, 1, 2, 3]), st.sampled_from([1, 1, 2, 3])),
    dilations=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    pad=st.tuples(pads, pads),
    biased=st.booleans(),
    crop=pads,
    extra=st.sampled_from([0, 0, 0, 1, -1]),
)
@example(0, (1, 3), (1, 1), (1, 1), (1, 1), ((0, 0), (1, 1)), True, (0, 0), 0)
@example(0, (1, 3), (1, 1), (1, 1), (1, 1), ((0, 0), (1, 1)), False, (0, 0), 0)
def test_two_convolutions_merged_without_care_are_proved_exactly_if_they_are_equal(
    seed: int, taps: Any, strides: Any, spreads: Any, dilations: Any, pad: Any, biased: bool, crop: Any, extra: int
) -> None:
    rng = np.random.default_rng(seed)
    one, two = (
        {"stride": strides[i], "dilation": dilations[i], "spread": spreads[i], "pad": pad[i : i + 1]}
        for i in (0, 1)
    )
    first = conv("a", "x", normal(rng, 2, 2, taps[0]), normal(rng, 2) if biased else None, **one)
    second = conv("b", "a", normal(rng, 2, 2, taps[1]), normal(rng, 2), **two)
    merged = naively_merged(first, second, extra)
    if merged is None:
        return
    ends = {"cuts": ((*crop, 1),)}
    inputs = {"x": (None, 2, None)}
    before = Model(inputs, (first, second, step("y", "crop", "b", settings=ends)), ("y",))
    after = Model(inputs, (merged, step("y", "crop", "m", settings=ends)), ("y",))
    certificate = check(before, after)
    largest = range(24, 40)
    equal = all(agree(before, after, size) for size in largest)
    assert (certificate.verdict is Verdict.PROVED) == equal, certificate
    assert certificate.ok == equal
    if equal:
        assert_claim_holds(certificate, before, after)


def assert_claim_holds(certificate: Certificate, before: Model, after: Model) -> None:
    """What the sentence says: these sizes, and larger ones with the same remainders."""
    for found in certificate.regions[:1]:  # the one that reads the model's input
        for size in (int(text.split("x")[1]) for text in found.sizes):
            assert all(agree(before, after, size + 4 * more) for more in range(4))


@settings(max_examples=50, deadline=None)
@given(size=st.integers(3, 14), stride=st.integers(1, 3), data=st.data())
def test_fixed_sizes_are_proved_for_that_size(size: int, stride: int, data: st.DataObject) -> None:
    """Rows of the kernel that only ever read padding do not count at a fixed size."""
    rng = np.random.default_rng(0)
    w = normal(rng, 2, 2, 5)
    inputs = {"x": (None, 2, size)}
    pad = ((2, 2),)
    before = Model(inputs, (conv("c", "x", w, stride=stride, pad=pad),), ("c",))
    tap = data.draw(st.integers(0, 4))
    changed = w.copy()
    changed[0, 0, tap] += 1
    after = before.edited("c", w=changed)
    read = any(0 <= stride * i - 2 + tap < size for i in range((size - 1) // stride + 1))
    assert (check(before, after).verdict is Verdict.PROVED) == (not read)


def test_impulses_far_apart_see_each_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed grid for wide regions, with strides and dilation, in one to three dimensions."""
    for constant in ("_EXAMPLES", "_QUICK_OPERATIONS", "_FEW_OPERATIONS"):
        monkeypatch.setattr(region, constant, 0.0)
    for axes, stride, dilation, spread in (
        (1, 1, 1, 1),
        (1, 3, 2, 1),
        (2, 2, 1, 1),
        (3, 1, 1, 1),
        (1, 1, 1, 3),
        (2, 1, 2, 2),
    ):
        rng = np.random.default_rng(axes)
        channels = 6
        w, b = normal(rng, channels, channels, *(3,) * axes), normal(rng, channels)
        pad = ((dilation, dilation),) * axes
        inputs = {"x": (None, channels) + (9,) * axes}
        half = conv("c", "x", w, b, stride=stride, dilation=dilation, spread=spread, pad=pad)
        before = Model(inputs, (half, step("i", "identity", "c")), ("i",))
        after = Model(inputs, (half,), ("c",))
        certificate = check(before, after)
        assert certificate.verdict is Verdict.PROVED, certificate
        assert all("inside" in found.method for found in certificate.regions)
        for place in ((0, 0) + (0,) * axes, (-1, -1) + (-1,) * axes, (3, 5) + (1,) * axes):
            wrong = w.copy()
            wrong[place] *= np.float32(1 + 1e-5)
            certificate = check(before, after.edited("c", w=wrong))
            assert certificate.verdict is Verdict.REFUTED, (axes, place)
