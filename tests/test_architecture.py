"""Who may know whom. The rules are docs/design.md's, section 7; these tests hold them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "refold"
FRAMEWORKS = ("keras", "torch", "paddle", "onnx", "onnx_ir", "tensorflow", "jax")

# What each room may import besides the standard library: modules of refold, and numpy.
ALLOWED = {
    "algebra": ("numpy", "refold.algebra"),
    "graph": ("numpy", "refold.algebra", "refold.graph", "refold.shown"),
    "recording": ("refold.recording", "refold.errors"),
    "weights": ("numpy", "refold.weights"),
    # h5py only where a file needs it; files of torch are read by its front end, which is imported by name.
    "checkpoints": (
        "numpy",
        "h5py",
        "refold.checkpoints",
        "refold.weights",
        "refold.errors",
        "refold.files",
        "refold.shown",
    ),
    "blocks": ("numpy", "refold.algebra", "refold.blocks"),
    # Values, their geometry, and how a convolution is run: no law.
    "proof": (
        "numpy",
        "refold.algebra.affine",
        "refold.algebra.evaluate",
        "refold.algebra.geometry",
        "refold.algebra.refusal",
        "refold.graph.graph",
        "refold.graph.layout",
        "refold.frontend",
        "refold.errors",
        "refold.proof",
        "refold.shown",
        "refold",
    ),
}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, whole names; ``from a import b`` counts as ``a``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def outsiders(path: Path, allowed: tuple[str, ...]) -> set[str]:
    """What a file imports that is neither allowed nor of the standard library."""
    return {
        module
        for module in imports(path)
        if module.split(".")[0] not in sys.stdlib_module_names
        and not any(module == name or (name != "refold" and module.startswith(f"{name}.")) for name in allowed)
    }


def files(room: str) -> list[Path]:
    found = sorted((SOURCE / room).rglob("*.py"))
    assert found, f"no files in {room}"
    return found


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_rooms_import_only_what_they_may(room: str) -> None:
    strangers = {path.name: outsiders(path, ALLOWED[room]) for path in files(room)}
    assert not {name: found for name, found in strangers.items() if found}


def test_front_ends_do_not_know_each_other() -> None:
    front_ends = [path.name for path in SOURCE.iterdir() if path.name in FRAMEWORKS]
    assert "keras" in front_ends
    for own in front_ends:
        for path in files(own):
            others = [f"refold.{name}" for name in front_ends if name != own]
            assert not [m for m in imports(path) for other in others if m.startswith(other)], path


def test_only_front_ends_and_the_demo_import_frameworks() -> None:
    for path in SOURCE.rglob("*.py"):
        room = path.relative_to(SOURCE).parts[0]
        if room in FRAMEWORKS or room in ("demo.py", "demo"):
            continue
        assert not {module.split(".")[0] for module in imports(path)} & set(FRAMEWORKS), path


def frameworks_imported_by(code: str) -> set[str]:
    report = f"{code}\nimport sys; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", report], check=True, capture_output=True, text=True)
    return set(done.stdout.split()) & set(FRAMEWORKS)


def test_importing_refold_imports_no_framework() -> None:
    assert not frameworks_imported_by(
        "import refold, refold.algebra, refold.graph, refold.blocks, refold.weights, refold.checkpoints"
    )


def test_that_check_can_fail() -> None:
    # `onnx` stands for a framework without needing one.
    assert frameworks_imported_by("import sys, types; sys.modules['onnx'] = types.ModuleType('onnx')") == {"onnx"}


def test_modules_stay_small() -> None:
    long = {
        str(path.relative_to(SOURCE)): lines
        for path in SOURCE.rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 700
    }
    assert not long, "more than one subject in a module?"
