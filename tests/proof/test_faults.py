"""Wrong folds are refuted, and the certificate says where. Right ones stand beside them, or a checker that
refutes everything would pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from proof.models import Built, check, fused, normal, stack
from proof.numpy_frontend import Model, batch_norm, conv, step
from refold.proof import Certificate, Verdict

Array = Any


def built() -> Built:
    return stack(np.random.default_rng(7), blocks=3, channels=4, size=7)


def weights(model: Model, name: str) -> dict[str, Array]:
    return {key: value.copy() for key, value in next(s for s in model.steps if s.name == name).weights.items()}


def refuted(certificate: Certificate) -> list[str]:
    places = [*certificate.structure, *certificate.regions]
    return [result.where for result in places if result.verdict is Verdict.REFUTED]


def scaled_entry(w: Array, factor: float) -> Array:
    w[1, 2, 0, 1] *= np.float32(factor)
    return w


def swapped(array: Array) -> Array:
    array[[0, 1]] = array[[1, 0]]
    return array


def not_a_number(w: Array) -> Array:
    w[0, 0, 0, 0] = np.nan
    return w


KERNELS: dict[str, Callable[[Array], Array]] = {
    "one weight off by 1e-5": lambda w: scaled_entry(w, 1 + 1e-5),
    "one weight off by 1e-6": lambda w: scaled_entry(w, 1 + 1e-6),
    "one weight gone": lambda w: scaled_entry(w, 0.0),
    "inputs and outputs transposed": lambda w: w.swapaxes(0, 1).copy(),
    "taps transposed": lambda w: w.swapaxes(2, 3).copy(),
    "flipped": lambda w: w[:, :, ::-1, ::-1].copy(),
    "channels swapped": swapped,
    "not a number": not_a_number,
    "all too large by a permille": lambda w: w * np.float32(1.001),
}


def test_the_right_fold_is_proved() -> None:
    model = built()
    certificate = check(model.before, model.after)
    assert certificate.verdict is Verdict.PROVED, certificate
    assert certificate.ok
    assert {region.where for region in certificate.regions} >= set(model.blocks)
    assert max(region.ratio or 0 for region in certificate.regions) <= 1.0


@pytest.mark.parametrize("fault", KERNELS)
@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_wrong_kernel_is_refuted_at_its_block(fault: str, block: int) -> None:
    model = built()
    name = f"block{block}/folded"
    wrong = model.after.edited(name, w=KERNELS[fault](weights(model.after, name)["w"]))
    certificate = check(model.before, wrong)
    assert certificate.verdict is Verdict.REFUTED
    assert not certificate.ok
    assert refuted(certificate) == [f"block{block}/add"], certificate
    assert f"block{block}/add" in str(certificate).splitlines()[0]


@pytest.mark.parametrize(
    "edit",
    [
        lambda b: 2 * b,
        lambda b: 0 * b,
        lambda b: swapped(b),
        lambda b: b * np.float32(1 + 1e-6),
        lambda b: b * np.inf,
    ],
    ids=["doubled", "dropped", "swapped", "off by 1e-6", "infinite"],
)
def test_a_wrong_bias_is_refuted_at_its_block(edit: Callable[[Array], Array]) -> None:
    model = built()
    wrong = model.after.edited("block1/folded", b=edit(weights(model.after, "block1/folded")["b"]))
    assert refuted(check(model.before, wrong)) == ["block1/add"]


@pytest.mark.parametrize(
    "change",
    [
        {"pad": ((2, 0), (1, 1))},
        {"pad": ((1, 1), (0, 2))},
        {"dilation": 2, "pad": ((2, 2), (2, 2))},
    ],
    ids=["padding moved on one axis", "padding moved on the other", "dilated"],
)
def test_wrong_geometry_is_refuted_at_its_block(change: dict[str, Any]) -> None:
    model = built()
    assert refuted(check(model.before, model.after.edited("block1/folded", **change))) == ["block1/add"]


@pytest.mark.parametrize("change", [{"stride": 2}, {"pad": ((2, 1), (1, 1))}], ids=["stride", "padding"])
def test_geometry_of_another_size_is_refuted(change: dict[str, Any]) -> None:
    model = built()
    found = refuted(check(model.before, model.after.edited("block1/folded", **change)))
    assert found
    assert found[0] == "block1/add"


def test_wrong_groups_are_refuted() -> None:
    model = stack(np.random.default_rng(3), channels=4, groups=2)
    assert check(model.before, model.after).verdict is Verdict.PROVED
    w = weights(model.after, "block1/folded")["w"]
    regrouped = np.zeros((4, 4, 3, 3), "float32")
    for out in range(4):  # channel o reads the inputs of the other group
        start = 2 - 2 * (out // 2)
        regrouped[out, start : start + 2] = w[out]
    wrong = model.after.edited("block1/folded", w=regrouped, groups=1)
    assert refuted(check(model.before, wrong)) == ["block1/add"]


@pytest.mark.parametrize("fault", ["epsilon", "gamma", "mean"])
def test_a_wrong_batch_norm_is_refuted(fault: str) -> None:
    rng = np.random.default_rng(0)
    w = normal(rng, 4, 3, 3, 3)
    bn = batch_norm("bn", "conv", rng, 4)
    used = {
        "epsilon": replace(bn, settings={"eps": 1e-3}),
        "gamma": replace(bn, weights={**bn.weights, "gamma": np.ones(4, "float32")}),
        "mean": replace(bn, weights={**bn.weights, "mean": np.zeros(4, "float32")}),
    }[fault]

    def model(*steps: Any) -> Model:
        return Model({"x": (None, 3, 8, 8)}, (*steps, step("relu", "relu", steps[-1].name)), ("relu",))

    before = model(conv("conv", "x", w), bn)
    for norm, verdict in ((bn, Verdict.PROVED), (used, Verdict.REFUTED)):
        kernel, bias = (array.astype("float32") for array in fused(w, np.zeros(4), norm))
        certificate = check(before, model(conv("conv", "x", kernel, bias)))
        assert certificate.verdict is verdict
        assert refuted(certificate) == ([] if verdict is Verdict.PROVED else ["bn"])


def test_bias_before_zero_padding_is_refuted_although_the_interior_is_equal() -> None:
    """A 1x1 convolution with a bias, then a 3x3 one that pads zeros: merging them is wrong at the border
    only."""
    rng = np.random.default_rng(1)
    one, bias, three = normal(rng, 4, 4, 1, 1), normal(rng, 4), normal(rng, 4, 4, 3, 3)
    pad = ((1, 1), (1, 1))
    kernel = np.einsum("omhw,mc->ochw", three.astype("float64"), one[:, :, 0, 0].astype("float64"))
    total = np.einsum("omhw,m->o", three.astype("float64"), bias.astype("float64"))
    merged = conv("merged", "x", kernel.astype("float32"), total.astype("float32"), pad=pad)
    for size in (16, None):
        inputs = {"x": (None, 4, size, size)}
        before = Model(inputs, (conv("a", "x", one, bias), conv("b", "a", three, pad=pad)), ("b",))
        assert refuted(check(before, Model(inputs, (merged,), ("merged",)))) == ["b"]
        without = Model(inputs, (conv("a", "x", one), conv("b", "a", three, pad=pad)), ("b",))
        right = conv("merged", "x", kernel.astype("float32"), pad=pad)
        assert check(without, Model(inputs, (right,), ("merged",))).verdict is Verdict.PROVED


def test_an_edited_operator_that_was_not_folded_is_refuted() -> None:
    """It reads what comes from a relu, so its slope has no effect; but it is not the original's."""
    model = built()
    slope = weights(model.after, "act")["slope"]
    slope[0] *= np.float32(1 + 1e-6)
    certificate = check(model.before, model.after.edited("act", slope=slope))
    assert certificate.verdict is Verdict.REFUTED
    assert refuted(certificate) == ["act"]


@pytest.mark.parametrize("factor", [1 + 1e-6, 1.01, -100.0])
def test_an_edited_operator_with_an_effect_is_refuted(factor: float) -> None:
    rng = np.random.default_rng(0)
    slope = normal(rng, 4)
    inputs = {"x": (None, 4, 5, 5)}
    steps = (step("act", "prelu", "x", slope=slope), conv("c", "act", normal(rng, 2, 4, 3, 3)))
    model = Model(inputs, (*steps, step("r", "relu", "c")), ("r",))
    assert check(model, model).verdict is Verdict.PROVED
    certificate = check(model, model.edited("act", slope=slope * np.float32(factor)))
    assert refuted(certificate) == ["act"], certificate


def test_an_edited_head_is_refuted() -> None:
    model = built()
    w = weights(model.after, "head")["w"]
    w[0, 0] *= np.float32(1 + 1e-5)
    assert refuted(check(model.before, model.after.edited("head", w=w))) == ["head"]


def test_a_removed_activation_is_refuted() -> None:
    model = built()
    certificate = check(model.before, model.after.edited("block1/out", kind="identity"))
    assert certificate.verdict is Verdict.REFUTED
    assert any(where.startswith(("block1", "block2")) for where in refuted(certificate)), certificate


def test_swapped_outputs_are_refuted() -> None:
    model = built()
    two = replace(model.before, outputs=("block0/relu", "block1/relu"))
    other = replace(model.after, outputs=("block0/out", "block1/out"))
    assert check(two, other).verdict is Verdict.PROVED
    certificate = check(two, replace(other, outputs=other.outputs[::-1]))
    assert certificate.verdict is Verdict.REFUTED


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda m: replace(m, outputs=("head", "pooled")), "outputs"),
        (lambda m: replace(m, inputs={"x": (None, 4, 9, 9)}), "shape"),
        (lambda m: replace(m, dtype="float16"), "type"),
    ],
)
def test_another_interface_is_refuted_in_words(other: Callable[[Model], Model], words: str) -> None:
    model = built()
    certificate = check(model.before, other(model.after))
    assert certificate.verdict is Verdict.REFUTED
    assert words in certificate.sentence


def test_every_block_wrong_names_every_block() -> None:
    model = built()
    wrong = model.after
    for block in range(3):
        name = f"block{block}/folded"
        wrong = wrong.edited(name, w=weights(wrong, name)["w"] * np.float32(1.5))
    assert refuted(check(model.before, wrong)) == [f"block{block}/add" for block in range(3)]
