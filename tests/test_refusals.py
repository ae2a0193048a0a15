"""Every sentence with which something is refused has an entry in docs/refusals.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "refold"
PAGE = " ".join((ROOT / "docs" / "refusals.md").read_text(encoding="utf-8").split())

# Unfolding is told on its own page, with its refusals.
ELSEWHERE = ("unfold.py", "verbs.py")


def pieces(node: ast.expr, constants: dict[str, ast.expr]) -> list[str]:
    """The constant texts in a sentence, between what is filled in."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values):
            return [text for value in values for text in pieces(value, constants)]
        case ast.Name(name) if name in constants:
            return pieces(constants[name], {})
        case ast.IfExp(body=one, orelse=two):
            return [*pieces(one, constants), *pieces(two, constants)]
        case _:
            return []


def sentences() -> Iterator[tuple[str, str]]:
    """Where something is refused, and the longest constant piece of the sentence."""
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {
            target.id: statement.value
            for statement in tree.body
            if isinstance(statement, ast.Assign)
            for target in statement.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                found = pieces(node.args[0], constants) if node.func.id in ("Refusal", "Opaque") else []
                if found:
                    yield f"{path.relative_to(SOURCE)}:{node.lineno}", max(found, key=len)


def is_told(piece: str) -> bool:
    """Whether the page has the first words of a piece (what stands in brackets may be left out)."""
    words = re.split(r"[(']", piece)[0].split()
    return " ".join(words[:6]) in PAGE


SENTENCES = sorted(
    {piece: where for where, piece in sentences() if where.split(":")[0].split("/")[-1] not in ELSEWHERE}.items()
)


@pytest.mark.parametrize(("piece", "where"), SENTENCES, ids=[where for _, where in SENTENCES])
def test_every_refusal_is_told(piece: str, where: str) -> None:
    assert is_told(piece), f"{where}: docs/refusals.md says nothing of: {piece}"


def test_that_check_can_fail() -> None:
    assert not is_told("its color does not please")
    assert len(SENTENCES) > 80
