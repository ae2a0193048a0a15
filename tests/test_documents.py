"""The documents: every example runs in some suite, and links lead somewhere."""

from __future__ import annotations

import ast
import re
from itertools import chain

import pytest

from documents import ROOT, RUN_ON, documents, examples


def test_every_document_with_examples_is_run_by_one_suite() -> None:
    assert sorted(chain.from_iterable(RUN_ON.values())) == [name for name in documents() if examples(name)]


def test_every_block_of_code_says_its_language() -> None:
    """Or it would be left out."""
    for document in documents():
        fences = re.findall(r"^```(\S*)", (ROOT / document).read_text(encoding="utf-8"), re.MULTILINE)
        opening = fences[::2]
        assert set(fences[1::2]) <= {""}, document
        known = {"python", "console", "text", "{toctree}", "{math}", "{literalinclude}", "{eval-rst}"}
        assert set(opening) <= known, (document, set(opening) - known)


@pytest.mark.parametrize("document", [name for name in documents() if examples(name)])
def test_examples_are_python(document: str) -> None:
    for block in examples(document):
        ast.parse(block)


def test_links_lead_somewhere() -> None:
    for document in documents():
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", (ROOT / document).read_text(encoding="utf-8")):
            if "://" not in target:
                assert (ROOT / document).parent.joinpath(target).exists(), f"{document}: {target}"


METHODS_OF_TRAINING = re.compile(r"(?i)(?!force_)\w*(normalization|magnitude|orthogonal|low_?rank)\w*")


@pytest.mark.parametrize("framework", ["keras", "torch", "paddle"])
def test_the_table_of_methods_says_what_each_framework_has(framework: str) -> None:
    text = (ROOT / "docs" / "weight-normalization.md").read_text(encoding="utf-8")
    head, *lines = text[text.index("| method | `refold.keras`") :].partition("\n\n")[0].splitlines()
    place = [cell.strip() for cell in head.split("|")].index(f"`refold.{framework}`")
    told = {name for line in lines for name in re.findall(r"`(\w+)", line.split("|")[place])}
    source = (ROOT / "src" / "refold" / framework / "__init__.py").read_text(encoding="utf-8")
    has = {alias.asname for node in ast.walk(ast.parse(source)) for alias in getattr(node, "names", ())}
    assert told <= has
    # Keras has weight normalization as a class and as a function.
    spelled = {name for name in has if METHODS_OF_TRAINING.fullmatch(name)} - told
    assert spelled <= ({"weight_normalization"} if framework == "keras" else set())
