"""A fixed piece of what ``make fuzz`` goes on with for as long as one likes."""

from __future__ import annotations

from pathlib import Path

import fuzz
import pytest

SEED = 0
CASES = 80
PARTS = 8


@pytest.fixture(scope="module")
def files() -> dict[str, tuple[bytes, float]]:
    return fuzz.corpus()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(PARTS))
def test_damaged_files_are_folded_right_or_refused(
    part: int, files: dict[str, tuple[bytes, float]], tmp_path: Path
) -> None:
    for number in range(part, CASES, PARTS):
        name, data = fuzz.case(files, SEED, number)
        found = fuzz.examine(data, *files[name], tmp_path, lambda stage: None)
        assert not found, f"case {number} of {name}: {found}"


def test_a_wrong_fold_and_a_wrong_error_are_found(
    files: dict[str, tuple[bytes, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fuzzer itself: it would say so."""
    clean, u = files["repvgg"]
    other = files["three_dimensions"][0]
    assert not fuzz.examine(clean, clean, u, tmp_path, lambda stage: None)

    def wrong(arguments: list[str]) -> int:
        if arguments[0] == "fold":
            Path(arguments[3]).write_bytes(other)
        return 0

    monkeypatch.setattr("refold.cli.main", wrong)
    (found,) = fuzz.examine(clean, clean, u, tmp_path, lambda stage: None)
    assert "differs" in found.what

    def broken(arguments: list[str]) -> int:
        raise KeyError(arguments[0])

    monkeypatch.setattr("refold.cli.main", broken)
    assert {finding.stage for finding in fuzz.examine(clean, clean, u, tmp_path, lambda stage: None)} == {
        "inspect",
        "fold",
        "prove",
    }
