"""Wide regions are compared weight by weight through formulas, of which nothing is believed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from proof.models import Built, check, normal, stack
from proof.numpy_frontend import Model, conv, step
from proof.test_faults import KERNELS, refuted, weights
from refold.algebra.affine import AffineConv
from refold.graph.formula import Formulas
from refold.graph.graph import Formula, Graph, Node
from refold.proof import Certificate, Verdict, formulas, region

Array = Any
Lie = Callable[[AffineConv], AffineConv]


@pytest.fixture(autouse=True)
def every_region_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region, "_EXAMPLES", 0.0)
    monkeypatch.setattr(region, "_QUICK_OPERATIONS", 0.0)


def built(**options: Any) -> Built:
    return stack(np.random.default_rng(3), **{"blocks": 2, "channels": 4, "size": 7, **options})


def proved_by_formula(certificate: Certificate, *where: str) -> bool:
    found = {r.where: r for r in certificate.regions}
    return all(found[name].verdict is Verdict.PROVED and found[name].method == region.FORMULA for name in where)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": None},
        {"size": None, "stride": 2},
        {"size": 8, "stride": 2},
        {"groups": 2},
        {"groups": 4, "size": None},
        {"channels": 16, "size": 9},
    ],
    ids=str,
)
def test_right_folds_are_proved(options: dict[str, Any]) -> None:
    model = built(**options)
    certificate = check(model.before, model.after, witness=Formulas())
    assert certificate.verdict is Verdict.PROVED, certificate
    assert proved_by_formula(certificate, *model.blocks), certificate
    assert {local.where for local in certificate.local} >= set(model.blocks)
    sentence = next(r.sentence for r in certificate.regions if r.where == "block0/add")
    assert "probability of at most 2^-40" in sentence
    assert 0.1 < max(r.ratio or 0.0 for r in certificate.regions) <= 1.0


@pytest.mark.parametrize("fault", KERNELS)
def test_wrong_kernels_are_refuted_at_their_block(fault: str) -> None:
    model = built()
    wrong = model.after.edited("block1/folded", w=KERNELS[fault](weights(model.after, "block1/folded")["w"]))
    certificate = check(model.before, wrong, witness=Formulas())
    assert refuted(certificate) == ["block1/add"], certificate
    assert proved_by_formula(certificate, "block0/add")


@pytest.mark.parametrize("change", [{"pad": ((2, 0), (1, 1))}, {"dilation": 2, "pad": ((2, 2), (2, 2))}], ids=str)
def test_wrong_geometry_is_refuted(change: dict[str, Any]) -> None:
    model = built()
    wrong = model.after.edited("block0/folded", **change)
    assert refuted(check(model.before, wrong, witness=Formulas())) == ["block0/add"]


def test_a_wrong_bias_is_refuted() -> None:
    model = built()
    bias = weights(model.after, "block0/folded")["b"]
    bias[2] *= np.float32(1 + 1e-6)
    wrong = model.after.edited("block0/folded", b=bias)
    assert refuted(check(model.before, wrong, witness=Formulas())) == ["block0/add"]


def test_bias_before_zero_padding_has_no_formula_and_is_refuted() -> None:
    rng = np.random.default_rng(1)
    one, bias, three = normal(rng, 4, 4, 1, 1), normal(rng, 4), normal(rng, 4, 4, 3, 3)
    pad = ((1, 1), (1, 1))
    kernel = np.einsum("omhw,mc->ochw", three.astype("float64"), one[:, :, 0, 0].astype("float64"))
    total = np.einsum("omhw,m->o", three.astype("float64"), bias.astype("float64"))
    merged = conv("merged", "x", kernel.astype("float32"), total.astype("float32"), pad=pad)
    inputs = {"x": (None, 4, 16, 16)}
    before = Model(inputs, (conv("a", "x", one, bias), conv("b", "a", three, pad=pad)), ("b",))
    assert refuted(check(before, Model(inputs, (merged,), ("merged",)), witness=Formulas())) == ["b"]


def test_regions_of_several_leaves_and_of_leaves_that_are_not_read() -> None:
    rng = np.random.default_rng(2)
    w, v = normal(rng, 3, 3, 3, 3), normal(rng, 3, 3, 1, 1)
    inputs = {"x": (None, 3, 9, 9), "y": (None, 3, 9, 9)}
    sources = (step("rx", "relu", "x"), step("ry", "relu", "y"))
    pad = ((1, 1), (1, 1))
    twice = {"factors": (1.0, -1.0, 2.0)}
    before = Model(
        inputs,
        (
            *sources,
            conv("a", "rx", w, pad=pad),
            conv("b", "ry", v),
            conv("c", "rx", v),
            step("sum", "add", "a", "b", "c", settings=twice),
        ),
        ("sum",),
    )
    kernel = w.astype("float64")
    kernel[:, :, 1:2, 1:2] += 2 * v.astype("float64")
    after = Model(
        inputs,
        (
            *sources,
            conv("fx", "rx", kernel.astype("float32"), pad=pad),
            conv("fy", "ry", -v),
            step("s", "add", "fx", "fy", settings={"factors": (1.0, 1.0)}),
        ),
        ("s",),
    )
    certificate = check(before, after, witness=Formulas())
    assert proved_by_formula(certificate, "sum"), certificate
    exchanged = replace(
        after, steps=tuple(replace(s, inputs=("rx",)) if s.name == "fy" else s for s in after.steps)
    )
    assert check(before, exchanged, witness=Formulas()).verdict is Verdict.REFUTED


# ---- witnesses that lie --------------------------------------------------------------------------------


def lying(lie: Callable[[Graph, Formula], Formula]) -> Callable[..., Formula | None]:
    honest = Formulas()

    def witness(graph: Graph, value: str, leaves: Sequence[str], nodes: Sequence[Node]) -> Formula | None:
        formula = honest(graph, value, leaves, nodes)
        return None if formula is None else lie(graph, formula)

    return witness


def changed(formula: Formula, edit: Lie) -> Formula:
    terms = {name: edit(conv) for name, conv in formula.form.terms.items()}
    return replace(formula, form=replace(formula.form, terms=terms))


def off_by(relative: float) -> Lie:
    def edit(conv: AffineConv) -> AffineConv:
        kernel = conv.kernel.copy()
        kernel.flat[kernel.size // 2] += relative * np.abs(kernel).max()
        return AffineConv(kernel, conv.bias, conv.windows, conv.groups)

    return edit


def shifted(conv: AffineConv) -> AffineConv:
    windows = tuple(replace(w, before=w.before + 1, after=w.after - 1) for w in conv.windows)
    return AffineConv(conv.weights, conv.bias, windows, conv.groups)


def reordered(conv: AffineConv) -> AffineConv:
    return AffineConv(conv.kernel[::-1].copy(), conv.bias, conv.windows, conv.groups)


@pytest.mark.parametrize("lie", [off_by(1e-8), shifted, reordered], ids=["a weight", "the padding", "the channels"])
def test_a_lie_about_both_models_proves_nothing(lie: Lie) -> None:
    """The two formulas agree with each other, and with no operator."""
    model = built()
    certificate = check(model.before, model.after, witness=lying(lambda _, formula: changed(formula, lie)))
    assert certificate.verdict is Verdict.PROVED, certificate
    assert not any(r.method == region.FORMULA for r in certificate.regions)


def test_an_accomplice_of_a_wrong_fold_is_found_out() -> None:
    """It says of the wrong fold what it says of the original."""
    model = built(blocks=1)
    w = weights(model.after, "block0/folded")["w"]
    w[1, 2, 0, 1] *= np.float32(1 + 1e-5)
    wrong = model.after.edited("block0/folded", w=w)
    honest, said = Formulas(), {}

    def accomplice(graph: Graph, value: str, leaves: Sequence[str], nodes: Sequence[Node]) -> Formula | None:
        formula = honest(graph, value, leaves, nodes)
        said.setdefault(len(said), formula)
        if formula is None or len(nodes) > 1 or not said[0]:
            return formula
        terms = dict(zip(formula.form.terms, said[0].form.terms.values(), strict=True))
        return replace(formula, form=replace(formula.form, terms=terms))

    assert refuted(check(model.before, wrong, witness=accomplice)) == ["block0/add"]


def test_what_the_resolution_promises_is_kept() -> None:
    """Formulas that are off by it are never confirmed, under whatever seed."""
    model = built(blocks=1, channels=2, size=5)
    certificate = check(model.before, model.after, witness=Formulas())
    sentence = next(r.sentence for r in certificate.regions if r.where == "block0/add")
    resolution = float(sentence.split("up to ")[1].split()[0])
    assert resolution < 1e-10
    lie = off_by(40 * resolution)  # of the largest weight, where the promise is about the largest response
    for seed in range(40):
        found = check(model.before, model.after, seed=seed, witness=lying(lambda _, formula: changed(formula, lie)))
        assert not any(r.method == region.FORMULA for r in found.regions)


def test_fewer_probes_promise_less() -> None:
    assert formulas._resolution(1.0) == pytest.approx(2 * 0.7978845608 * 2 ** (41 / 16))
