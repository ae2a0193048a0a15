"""The command line, as far as it goes without a framework."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import refold
from refold.cli import main


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence that a refused command line gives, with status 2."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_missing_and_unknown_files_are_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    other = tmp_path / "model.bin"
    other.write_bytes(b"x")
    assert "model.bin: this is neither a model file (.keras," in refused(capsys, "inspect", str(other))
    assert "refold:" in refused(capsys, "inspect", str(tmp_path / "missing.keras"))


def test_existing_targets_are_refused_before_any_work(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, target = tmp_path / "model.keras", tmp_path / "plain.keras"
    model.write_bytes(b"x")
    target.write_bytes(b"keep me")
    assert "--force" in refused(capsys, "fold", str(model), "-o", str(target))
    assert "is the model itself" in refused(capsys, "fold", str(model), "-o", str(model))
    assert "there is no folder" in refused(capsys, "fold", str(model), "-o", str(tmp_path / "no" / "p.keras"))
    assert target.read_bytes() == b"keep me"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"schema": "refold.certificate/1"}', b"\xff\xfe", b"[" * 100_000],
    ids=["empty", "cut", "a list", "a head", "not UTF-8", "deep"],
)
def test_what_is_no_certificate_is_one_sentence(
    content: bytes, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    stored = tmp_path / "certificate.json"
    stored.write_bytes(content)
    assert "certificate.json: " in refused(capsys, "prove", "a.keras", "b.keras", "--certificate", str(stored))
    missing = str(tmp_path / "missing.json")
    assert "there is no such file" in refused(capsys, "prove", "a.keras", "b.keras", "--certificate", missing)


@pytest.mark.parametrize("arguments", [[], ["melt"], ["fold", "a.keras"], ["bench", "a", "b", "--repeats", "0"]])
def test_bad_usage_is_status_two(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"refold {refold.__version__}\n"


def test_help_imports_no_framework() -> None:
    code = (
        "import sys\n"
        "from refold.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'keras', 'torch', 'jax', 'tensorflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.endswith("[]\n")
    assert "inspect" in done.stdout


def test_python_m_refold_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "refold"], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 2
    assert done.stderr.startswith("usage: refold")
