"""Right folds are proved, whatever they look like and whoever made them."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proof.models import check, fused, normal, repvgg, scale_of, stack
from proof.numpy_frontend import Model, Step, batch_norm, conv, step
from refold.proof import Verdict, claims, region

Array = Any


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_stacks_are_proved_and_a_random_weight_off_is_refuted(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    groups = data.draw(st.sampled_from([1, 2]))
    model = stack(
        rng,
        blocks=data.draw(st.integers(1, 3)),
        channels=groups * data.draw(st.integers(1, 3)),
        size=data.draw(st.sampled_from([None, 1, 2, 3, 6, 9])),
        groups=groups,
        stride=data.draw(st.integers(1, 3)),
    )
    certificate = check(model.before, model.after, seed=seed)
    assert certificate.verdict is Verdict.PROVED, certificate
    wrong = data.draw(st.sampled_from([s for s in model.after.steps if s.kind == "conv"]))
    w = wrong.weights["w"].copy()
    place = np.unravel_index(rng.integers(w.size), w.shape)
    w[place] = w[place] * np.float32(1 + 1e-5) + np.float32(1e-12)
    certificate = check(model.before, model.after.edited(wrong.name, w=w), seed=seed)
    sizes = model.before.inputs["x"][2]
    if sizes is None or sizes >= 6:
        assert certificate.verdict is Verdict.REFUTED
        assert [r.where for r in certificate.regions if r.verdict is Verdict.REFUTED] == [
            wrong.name.replace("folded", "add")
        ]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_sums_of_convolutions_of_any_geometry_are_proved(data: st.DataObject) -> None:
    """Kernels of odd sizes, dilations and paddings, merged by adding taps at their places."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    axes = data.draw(st.integers(1, 2))
    cin, cout = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    stride = data.draw(st.integers(1, 3))
    size = data.draw(st.sampled_from([None, 9, 11]))
    low = high = 3  # the merged kernel has 7 taps, padded by 3
    merged = np.zeros((cout, cin) + (low + high + 1,) * axes)
    steps: list[Step] = []
    for index in range(data.draw(st.integers(1, 3))):
        dilation = data.draw(st.integers(1, 2))
        taps = data.draw(st.integers(1, 3))
        reach = dilation * (taps - 1)
        before = data.draw(st.integers(max(0, reach - 3), min(3, reach)))
        w = normal(rng, cout, cin, *(taps,) * axes)
        pad = ((before, reach - before),) * axes
        steps.append(conv(f"c{index}", "x", w, stride=stride, dilation=dilation, pad=pad))
        spots = (slice(low - before, low - before + reach + 1, dilation),) * axes
        merged[(slice(None), slice(None), *spots)] += w
    names = tuple(s.name for s in steps)
    steps.append(step("sum", "add", *names, settings={"factors": (1.0,) * len(names)}))
    steps.append(batch_norm("bn", "sum", rng, cout))
    kernel, total = (array.astype("float32") for array in fused(merged, np.zeros(cout), steps[-1]))
    inputs = {"x": (None, cin) + (size,) * axes}
    before_model = Model(inputs, (*steps, step("relu", "relu", "bn")), ("relu",))
    folded = conv("folded", "x", kernel, total, stride=stride, pad=((low, high),) * axes)
    after = Model(inputs, (folded, step("relu", "relu", "folded")), ("relu",))
    certificate = check(before_model, after)
    assert certificate.verdict is Verdict.PROVED, certificate
    shifted = after.edited("folded", pad=((low - 1, high + 1),) * axes)
    assert check(before_model, shifted).verdict is Verdict.REFUTED


def test_a_model_is_the_same_as_itself() -> None:
    model = stack(np.random.default_rng(0)).before
    certificate = check(model, model)
    assert certificate.verdict is Verdict.PROVED
    assert all(r.ratio == 0 for r in certificate.regions)


def test_twenty_residual_blocks_are_proved_quickly_and_region_by_region() -> None:
    """A stream that only sums touch: without cuts the last region would span the whole network."""
    rng = np.random.default_rng(0)
    channels = 4
    before: list[Step] = [conv("stem", "x", normal(rng, channels, 3, 3, 3), normal(rng, channels))]
    after = list(before)
    stream = "stem"
    for index in range(20):
        name = f"block{index}"
        steps, folded = repvgg(name, f"{name}/relu", rng, channels, channels)
        relu = step(f"{name}/relu", "relu", stream)
        end = [step(f"{name}/out", "add", stream, f"{name}/add", settings={"factors": (1.0, 1.0)})]
        before += [relu, *steps, *end]
        after += [relu, replace(folded, name=f"{name}/add"), *end]
        stream = f"{name}/out"
    inputs = {"x": (None, 3, None, None)}
    one, two = (Model(inputs, tuple(steps), (stream,)) for steps in (before, after))
    start = time.perf_counter()
    certificate = check(one, two)
    assert certificate.verdict is Verdict.PROVED, certificate
    assert time.perf_counter() - start < 10
    assert max(r.impulses for r in certificate.regions) < 200
    w = next(s for s in two.steps if s.name == "block7/add").weights["w"].copy()
    w[0, 0, 0, 0] *= np.float32(1.0001)
    wrong = check(one, two.edited("block7/add", w=w))
    assert [r.where for r in wrong.regions if r.verdict is Verdict.REFUTED] == ["block7/add"], wrong


def test_linear_bottlenecks_that_stay_two_operators_are_proved_one_by_one() -> None:
    rng = np.random.default_rng(0)
    narrow, wide = normal(rng, 2, 8, 1, 1), normal(rng, 8, 2, 3, 3)
    first, second = batch_norm("b1", "narrow", rng, 2), batch_norm("b2", "wide", rng, 8)
    inputs = {"x": (None, 8, 6, 6)}
    before = Model(
        inputs,
        (conv("narrow", "x", narrow), first, conv("wide", "b1", wide), second, step("r", "relu", "b2")),
        ("r",),
    )
    one = [array.astype("float32") for array in fused(narrow, np.zeros(2), first)]
    two = [array.astype("float32") for array in fused(wide, np.zeros(8), second)]
    after = Model(inputs, (conv("n", "x", *one), conv("w", "n", *two), step("r", "relu", "w")), ("r",))
    certificate = check(before, after)
    assert certificate.verdict is Verdict.PROVED, certificate
    assert [r.where for r in certificate.regions] == ["b1", "b2"]


def test_several_inputs_outputs_and_shared_nodes() -> None:
    rng = np.random.default_rng(0)
    w = normal(rng, 3, 3, 1, 1)
    bn = batch_norm("bn", "sum", rng, 3)
    inputs = {"x": (None, 3, 5, 5), "y": (None, 3, 5, 5)}
    common = [step("rx", "relu", "x"), step("ry", "relu", "y")]
    before = Model(
        inputs,
        (
            *common,
            conv("cx", "rx", w),
            conv("cy", "ry", w),
            step("sum", "add", "cx", "cy", settings={"factors": (1.0, -1.0)}),
            bn,
            step("both", "concat", "cx", "bn"),
            step("r", "relu", "bn"),
        ),
        ("both", "r", "cx"),
    )
    kernel, bias = fused(w, np.zeros(3), bn)
    after = Model(
        inputs,
        (
            *common,
            conv("cx", "rx", w),
            conv("fx", "rx", kernel.astype("float32"), bias.astype("float32")),
            conv("fy", "ry", -kernel.astype("float32")),
            step("s", "add", "fx", "fy", settings={"factors": (1.0, 1.0)}),
            step("both", "concat", "cx", "s"),
            step("r", "relu", "s"),
        ),
        ("both", "r", "cx"),
    )
    assert check(before, after).verdict is Verdict.PROVED
    swapped = replace(after, steps=tuple(replace(s, inputs=("rx",)) if s.name == "fy" else s for s in after.steps))
    assert check(before, swapped).verdict is Verdict.REFUTED


def test_a_value_that_is_zero_everywhere_disturbs_nothing() -> None:
    """A branch whose gain is 0, as at the start of training."""
    model = stack(np.random.default_rng(0))
    zero = {"gamma": np.zeros(4, "float32"), "beta": np.zeros(4, "float32")}
    before = model.before
    for name in ("block0/b3", "block0/b1", "block0/bi"):
        before = before.edited(name, **zero)
    w = next(s for s in model.after.steps if s.name == "block0/folded").weights
    after = model.after.edited("block0/folded", w=0 * w["w"], b=0 * w["b"])
    assert check(before, after).verdict is Verdict.PROVED


def test_offsets_that_cancel_inside_of_a_batch_norm_are_no_fault() -> None:
    """Where ``beta`` is ``gamma * mean / std`` but for its rounding, hardly anything is left, and one rounding of
    that is less than float64 can tell of a difference of numbers as large as beta."""
    rng = np.random.default_rng(5)
    kernel, norm = normal(rng, 4, 4, 3), batch_norm("n", "c", rng, 4)
    scale, _ = scale_of(norm)
    means = rng.normal(size=(2**14, 4)).astype("float32")
    left = np.abs((means * scale).astype("float32") - means * scale)
    mean = means[np.argmin(left, axis=0), np.arange(4)]  # the least that is left of many
    norm = replace(norm, weights={**norm.weights, "mean": mean, "beta": (mean * scale).astype("float32")})
    merged, bias = fused(kernel, np.zeros(4), norm)
    before = Model({"x": (None, 4, 6)}, (conv("c", "x", kernel), norm), ("n",))
    after = Model({"x": (None, 4, 6)}, (conv("f", "x", merged.astype("f"), bias.astype("f")),), ("f",))
    # The same, computed in another order.
    other = np.float64(1) / np.sqrt(norm.weights["var"].astype("float64") + 1e-5)
    shift = norm.weights["beta"] - mean * other * norm.weights["gamma"]
    assert 0 < np.abs(shift).max() < 1e-11
    for offset in (bias, shift):
        certificate = check(before, after.edited("f", b=offset.astype("f")))
        assert certificate.ok, certificate
    assert not check(before, after.edited("f", b=bias.astype("f") + np.float32(1e-9))).ok


def test_wide_regions_are_proved_inside_by_impulses_and_at_the_border_by_probes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for constant in ("_EXAMPLES", "_QUICK_OPERATIONS", "_FEW_OPERATIONS"):
        monkeypatch.setattr(region, constant, 0.0)
    model = stack(np.random.default_rng(0), blocks=1, channels=24, size=10)
    certificate = check(model.before, model.after)
    assert certificate.verdict is Verdict.PROVED, certificate
    found = next(r for r in certificate.regions if r.where == "block0/add")
    assert "inside" in found.method
    assert "probability" in found.sentence
    w = model.after.steps[0].weights["w"].copy()
    w[17, 5, 2, 0] *= np.float32(1 + 1e-5)
    wrong = check(model.before, model.after.edited("block0/folded", w=w))
    assert [r.where for r in wrong.regions if r.verdict is Verdict.REFUTED] == ["block0/add"]
    moved = check(model.before, model.after.edited("block0/folded", pad=((2, 0), (1, 1))))
    assert moved.verdict is Verdict.REFUTED


def test_what_is_kept_of_a_region_is_not_its_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A view of one row would keep the answers to all of them, region by region: gigabytes in a large model."""
    kept: list[region.Evidence] = []

    def examine(*arguments: Any) -> Any:
        result, evidence = region.examine(*arguments)
        kept.append(evidence)
        return result, evidence

    monkeypatch.setattr(claims, "examine", examine)
    model = stack(np.random.default_rng(0), blocks=2)
    assert check(model.before, model.after).ok
    biases = [evidence.bias for evidence in kept if evidence.bias is not None]
    assert len(biases) >= 2
    for array in (*biases, *(array for evidence in kept for array in evidence.sums)):
        whole = array if array.base is None else array.base
        assert whole.nbytes == array.nbytes


def test_what_has_no_counterpart_is_measured() -> None:
    """relu(relu(x)) is relu(x): true, but no affine region shows it."""
    w, b = normal(np.random.default_rng(0), 3, 4), np.zeros(3, "float32")
    inputs = {"x": (None, 4)}
    head = step("head", "dense", "r", w=w, b=b)
    before = Model(inputs, (step("r0", "relu", "x"), step("r", "relu", "r0"), head), ("head",))
    after = Model(inputs, (step("r", "relu", "x"), head), ("head",))
    certificate = check(before, after)
    assert certificate.verdict is Verdict.MEASURED, certificate
    assert certificate.ok
    assert "could not be proved" in certificate.sentence


def test_no_float64_reference_is_said() -> None:
    rng = np.random.default_rng(0)
    bn = batch_norm("bn", "c", rng, 4)
    w = normal(rng, 4, 4, 3, 3)
    kernel, bias = (array.astype("float32") for array in fused(w, np.zeros(4), bn))
    inputs = {"x": (None, 4, 6, 6)}
    before = Model(inputs, (conv("c", "x", w), bn, step("s", "single", "bn")), ("s",))
    after = Model(inputs, (conv("c", "x", kernel, bias), step("s", "single", "c")), ("s",))
    certificate = check(before, after)
    assert any("no float64 reference" in note for note in certificate.notes)
    assert certificate.verdict is Verdict.PROVED, certificate
    assert not check(before, after.edited("c", b=2 * bias)).ok


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_each_storage_type_has_its_own_rounding(dtype: str) -> None:
    model = stack(np.random.default_rng(0), blocks=2)
    after = model.after
    for s in model.after.steps:
        if s.kind == "conv":
            after = after.edited(s.name, **{key: value.astype(dtype) for key, value in s.weights.items()})
    certificate = check(model.before, after)
    assert certificate.verdict is Verdict.PROVED, certificate


def test_without_a_float64_reference_regions_still_end_at_equal_operators() -> None:
    """Else the rounding of a bias would have to be seen in what is left where it cancels two operators later."""
    rng = np.random.default_rng(4)
    first, second = normal(rng, 4, 4, 3), normal(rng, 4, 8, 1)
    offset = (1000 * rng.normal(size=4)).astype("float32")
    norm = batch_norm("n", "c", rng, 4)
    scale, _ = scale_of(norm)
    reached = second[:, :4, 0].astype("float64") @ offset
    beta = (norm.weights["mean"] * scale - reached * scale).astype("float32")
    norm = replace(norm, weights={**norm.weights, "beta": beta})
    merged, bias = fused(second, np.zeros(4), norm)
    shared = (
        step("r", "relu", "x"),
        conv("k", "r", first, offset, pad=((1, 1),)),
        step("j", "concat", "k", "r"),
    )
    end = step("t", "single", "n"), step("t", "single", "f")
    before = Model({"x": (None, 4, 6)}, (*shared, conv("c", "j", second), norm, end[0]), ("t",))
    after = Model(
        {"x": (None, 4, 6)}, (*shared, conv("f", "j", merged.astype("f"), bias.astype("f")), end[1]), ("t",)
    )
    certificate = check(before, after)
    assert [r.verdict for r in certificate.regions] == [Verdict.PROVED] * len(certificate.regions), certificate
    assert certificate.ok


def test_inputs_that_are_given_are_measured_too() -> None:
    model = stack(np.random.default_rng(0))
    x = np.random.default_rng(1).uniform(size=(5, 4, 7, 7)).astype("float32")
    certificate = check(model.before, model.after, inputs=[x])
    found = [end for end in certificate.end_to_end if end.inputs == "given"]
    assert len(found) == 1
    assert found[0].top1 == 1.0
    assert found[0].original_rms_error
    assert found[0].ratio < 4


def test_counterparts_that_depend_on_each_other_are_no_unknowns() -> None:
    """Seen from a, r and x the two outputs are different maps; with a = r + x they are one function."""
    inputs = {"x": (None, 2, 5)}
    relu = step("r", "relu", "x")

    def add(name: str, *read: str) -> Step:
        return step(name, "add", *read, settings={"factors": (1.0,) * len(read)})

    before = Model(inputs, (relu, add("a", "r", "x"), add("b", "r", "x"), add("c", "a", "b")), ("c",))
    after = Model(inputs, (relu, add("a", "r", "x"), add("c", "a", "r", "x")), ("c",))
    assert check(before, after).verdict is Verdict.PROVED
    wrong = Model(inputs, (relu, add("a", "r", "x"), add("c", "a", "r")), ("c",))
    assert check(before, wrong).verdict is Verdict.REFUTED
