"""The demo on Paddle, with two epochs: the same story and the same report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import refold
from refold.cli import main
from refold.paddle import files


def test_the_demo_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    assert main(["demo", "--framework", "paddle", "--epochs", "2", "--out", str(folder)]) == 0
    assert "PROVED" in capsys.readouterr().out.upper()
    certificate = json.loads((folder / "certificate.json").read_text())
    assert certificate["verdict"] == "proved"
    assert (folder / "report.html").stat().st_size > 10_000
    rich, plain = (files.load(folder / f"{name}.json") for name in ("rich", "plain"))
    assert refold.prove(rich, plain).ok
    assert not refold.inspect(plain).changes_something
