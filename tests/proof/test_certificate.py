"""The certificate is data that can be written, read, shown and compared."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from proof.models import check, stack
from proof.numpy_frontend import Model, step
from refold.proof import Certificate, Verdict


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
