"""The certificate is data that can be written, read, shown and compared."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest

from proof.models import check, stack
from proof.numpy_frontend import Model, step
from refold.proof import Certificate, Verdict, compare, schema


@pytest.fixture(scope="module")
def certificate() -> Certificate:
    model = stack(np.random.default_rng(0), blocks=2)
    return check(model.before, model.after, seed=5, versions={"numpy-steps": "1"})


def test_it_survives_json(certificate: Certificate) -> None:
    data = json.loads(json.dumps(certificate.to_json(), allow_nan=False))
    assert Certificate.from_json(data) == certificate
    assert Certificate.from_json(json.dumps(data)) == certificate
    assert data["ok"] is True


def test_a_refuted_one_survives_json_too() -> None:
    model = stack(np.random.default_rng(0), blocks=1)
    w = model.after.steps[0].weights["w"].copy()
    w[0, 0, 0, 0] = np.inf
    bad = check(model.before, model.after.edited("block0/folded", w=w))
    text = json.dumps(bad.to_json(), allow_nan=False)
    again = Certificate.from_json(text)
    assert again.verdict is Verdict.REFUTED
    assert json.dumps(again.to_json()) == text


def test_the_schema_is_the_promised_one(certificate: Certificate) -> None:
    data = certificate.to_json()
    assert data["schema"] == "refold.certificate/1"
    assert list(data) == [
        "schema",
        "ok",
        "verdict",
        "sentence",
        "structure",
        "regions",
        "local",
        "end_to_end",
        "before",
        "after",
        "seed",
        "versions",
        "notes",
        "assumptions",
    ]
    assert list(data["regions"][0]) == [
        "where",
        "counterpart",
        "verdict",
        "ratio",
        "impulses",
        "method",
        "sizes",
        "sentence",
    ]
    assert data["seed"] == 5
    assert {"refold", "python", "numpy", "numpy-steps"} <= set(data["versions"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.update(schema="refold.certificate/0"),
        lambda data: data.pop("regions"),
        lambda data: data.update(ok=False),
        lambda data: data.update(verdict="fine"),
        lambda data: data["regions"][0].update(extra=1),
        lambda data: data["regions"][0].update(verdict="refuted"),
        lambda data: data["structure"][0].update(verdict="measured"),
        lambda data: data.update(verdict="measured"),
        lambda data: data.update(seed="5"),
        lambda data: data.update(seed=-1),
    ],
)
def test_what_is_no_certificate_is_refused(certificate: Certificate, damage: object) -> None:
    data = certificate.to_json()
    damage(data)  # type: ignore[operator]
    with pytest.raises(ValueError, match="certificate"):
        Certificate.from_json(data)


def test_it_is_the_same_for_the_same_seed(certificate: Certificate) -> None:
    model = stack(np.random.default_rng(0), blocks=2)
    assert check(model.before, model.after, seed=5, versions={"numpy-steps": "1"}) == certificate


def test_digests_tell_models_apart() -> None:
    model = stack(np.random.default_rng(0), blocks=2)
    w = model.after.steps[0].weights["w"].copy()
    w[0, 0, 0, 0] += 1
    one = check(model.before, model.after)
    other = check(model.before, model.after.edited("block0/folded", w=w))
    assert one.before == other.before
    assert one.after.parameters != other.after.parameters
    assert one.after.structure == other.after.structure
    assert one.before.structure != one.after.structure
    renamed = replace(
        model.after,
        steps=tuple(
            replace(s, name=f"n/{s.name}", inputs=tuple(i if i == "x" else f"n/{i}" for i in s.inputs))
            for s in model.after.steps
        ),
        outputs=tuple(f"n/{name}" for name in model.after.outputs),
    )
    assert check(model.after, renamed).after == one.after


# ---- the published schema ------------------------------------------------------------------------


def validator() -> Any:
    jsonschema.Draft202012Validator.check_schema(schema())
    return jsonschema.Draft202012Validator(schema())


def test_every_kind_of_certificate_fits_the_schema(certificate: Certificate) -> None:
    model = stack(np.random.default_rng(0), blocks=1)
    w = model.after.steps[0].weights["w"]
    wrong = model.after.edited("block0/folded", w=w * np.inf)
    other = replace(model.after, inputs={"x": (None, 4, 9, 9)})
    for found in (certificate, check(model.before, wrong), check(model.before, other)):
        validator().validate(json.loads(json.dumps(found.to_json(), allow_nan=False)))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("regions"),
        lambda data: data.update(more=1),
        lambda data: data.update(verdict="fine"),
        lambda data: data["regions"][0].update(ratio="large"),
        lambda data: data["before"].update(parameters="00"),
        lambda data: data["end_to_end"][0].pop("ratio"),
        lambda data: data["end_to_end"][0].update(top1=2),
    ],
)
def test_the_schema_refuses_what_is_no_certificate(certificate: Certificate, damage: Any) -> None:
    data = certificate.to_json()
    damage(data)
    assert not validator().is_valid(data)


# ---- checking again ------------------------------------------------------------------------------


def test_a_certificate_of_the_same_models_holds(certificate: Certificate) -> None:
    model = stack(np.random.default_rng(0), blocks=2)
    again = compare(certificate, check(model.before, model.after, seed=certificate.seed))
    assert again.ok
    assert again.changes == ()
    assert "numpy-steps 1 (now not used)" in again.remarks[0]
    assert str(again).startswith("the certificate holds: proved, ")
    data = json.loads(json.dumps(again.to_json(), allow_nan=False))
    assert (data["schema"], data["ok"], data["agrees"]) == ("refold.recheck/1", True, True)


def test_a_certificate_of_other_models_does_not_hold(certificate: Certificate) -> None:
    """Although the others may be a model and its fold as well."""
    other = stack(np.random.default_rng(1), blocks=2)
    again = compare(certificate, check(other.before, other.after, seed=certificate.seed))
    assert again.certificate.ok
    assert not again.ok
    assert [line.partition(":")[0] for line in again.changes] == [
        "the parameters of the original",
        "the parameters of the other model",
    ]


def test_what_changed_in_a_model_is_said(certificate: Certificate) -> None:
    model = stack(np.random.default_rng(0), blocks=2)
    w = next(s for s in model.after.steps if s.name == "block1/folded").weights["w"].copy()
    w[0, 0, 0, 0] *= np.float32(1.001)
    again = compare(certificate, check(model.before, model.after.edited("block1/folded", w=w), seed=5))
    assert not again.agrees
    text = str(again)
    assert "does not hold" in text
    assert "the parameters of the other model" in text
    assert "it was proved, now it is refuted" in text
    assert "regions, block1/add: it was proved, now it is refuted" in text
    assert "block0/add" not in "".join(again.changes)


def test_numbers_that_nobody_finds_again_are_remarked_upon(certificate: Certificate) -> None:
    model = stack(np.random.default_rng(0), blocks=2)
    again = check(model.before, model.after, seed=certificate.seed, versions={"numpy-steps": "1"})
    assert compare(certificate, again).remarks == ()
    data = certificate.to_json()
    data["regions"][0]["ratio"] = 0.01
    data["end_to_end"][0]["max_error"] *= 1e-3
    edited = compare(Certificate.from_json(data), again)
    assert edited.ok
    assert [remark.partition(":")[0] for remark in edited.remarks] == [
        f"regions, {data['regions'][0]['where']}",
        f"end to end, {data['end_to_end'][0]['output']} of {data['end_to_end'][0]['inputs']}",
    ]


def test_a_refutation_that_is_confirmed_is_no_equality() -> None:
    model = stack(np.random.default_rng(0), blocks=1)
    wrong = model.after.edited("block0/folded", b=2 * model.after.steps[0].weights["b"])
    stored = check(model.before, wrong)
    again = compare(stored, check(model.before, wrong))
    assert again.agrees
    assert not again.ok


def test_inputs_that_were_given_are_asked_for(certificate: Certificate) -> None:
    model = stack(np.random.default_rng(0), blocks=2)
    x = np.ones((3, 4, 7, 7), "float32")
    stored = check(model.before, model.after, inputs=[x])
    again = compare(stored, check(model.before, model.after))
    assert again.ok
    assert "were not given again" in again.remarks[-1]


def test_the_table_says_the_verdict_first(certificate: Certificate) -> None:
    lines = str(certificate).splitlines()
    assert lines[0].startswith("PROVED: the same function: ")
    head = next(line for line in lines if "counterpart" in line)
    row = next(line for line in lines if line.strip().startswith("block0/add"))
    assert head.index("verdict") == row.index("proved")
    assert any("assumed:" in line for line in lines)


def test_names_cannot_steer_the_terminal() -> None:
    evil = "a\x1b[31m\nb"
    model = Model({"x": (None, 3)}, (step(evil, "identity", "x"), step("r", "relu", evil)), ("r",))
    text = str(check(model, model))
    assert "\x1b" not in text
    assert r"a\x1b[31m\x0ab" in text


def test_what_is_proved_need_not_be_measured() -> None:
    model = stack(np.random.default_rng(0), blocks=1)
    certificate = check(model.before, model.after, end_to_end=False)
    assert certificate.verdict is Verdict.PROVED
    assert not certificate.end_to_end
    assert "only a proof was asked for" in certificate.notes[0]


def test_what_is_not_proved_is_measured_whatever_was_asked_for() -> None:
    model = stack(np.random.default_rng(0), blocks=1)
    bias = next(s for s in model.after.steps if s.name == "block0/folded").weights["b"] + np.float32(1.0)
    certificate = check(model.before, model.after.edited("block0/folded", b=bias), end_to_end=False)
    assert certificate.verdict is Verdict.REFUTED
    assert certificate.end_to_end
