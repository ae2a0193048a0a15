"""Which document's examples run where: every Python example of the README and of the documentation runs in a test.

The blocks of a document run in order, as one session. ``test_documents.py`` holds that no document is left out.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]

RUN_ON = {
    "keras": ("README.md", "docs/keras.md", "docs/weight-normalization.md"),
    "checkpoints": ("docs/checkpoints.md",),
    "onnx": ("docs/onnx.md",),
    "paddle": ("docs/paddle.md",),
    "torch": (
        "docs/torch.md",
        "docs/certificate.md",
        "docs/unfold.md",
        "docs/weight-normalization-tutorial.md",
        "docs/tour.md",
        "docs/extending.md",
    ),
}


def documents() -> list[str]:
    """All documents, by their path in the repository."""
    return [str(path.relative_to(ROOT)) for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])]


def examples(document: str) -> list[str]:
    """The Python blocks of a document."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def run_examples(document: str) -> dict[str, object]:
    """Run the examples of a document; gives the names that they leave behind."""
    session: dict[str, object] = {"__name__": "example"}
    for block in examples(document):
        exec(compile(block, document, "exec"), session)
    return session
