"""Every example of the pages on this framework runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from documents import RUN_ON, run_examples


@pytest.mark.parametrize("document", RUN_ON["onnx"])
def test_examples_run(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_examples(document)
