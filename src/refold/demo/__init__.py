"""``refold demo``: train a rich network on real digits, fold it, prove it, time it, report.

The images are scikit-learn's: 1,797 handwritten digits of 8 x 8 pixels (Alpaydin and Kaynak 1998). The story is
the same for every framework; what differs is one module per framework beside this one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console

from refold import verbs
from refold.errors import InputError
from refold.files import write_atomically
from refold.report import terminal
from refold.report.page import render
from refold.report.summary import Page, Training

# Images and their digits.
Digits = tuple[Any, Any]
# Told after each epoch: how many are done, the loss of training, the accuracy on the test images.
Report = Callable[[int, float, float], None]


class Framework(Protocol):
    """What the story needs of a framework; a module of this name fulfils it."""

    ENDING: str  # of a file with a model

    def words(self) -> str:
        """The framework in words."""
        ...

    def arranged(self, pixels: Any) -> Any:
        """Images ``(count, 8, 8)`` with the axes that the network takes."""
        ...

    def network(self) -> Any:
        """RepVGG blocks with learnable branch scales, and a weight-normalized head with a layer norm."""
        ...

    def size(self, model: Any) -> int:
        """The number of its parameters."""
        ...

    def train(self, model: Any, train: Digits, test: Digits, epochs: int, report: Report) -> None:
        """Train with Adam in batches of 64; the model is afterwards ready for inference."""
        ...

    def scores(self, model: Any, images: Any) -> Any:
        """The scores ``(count, 10)`` of the digits."""
        ...

    def scales(self, model: Any) -> dict[str, float]:
        """What became of the learnable branch scales, by block."""
        ...

    def save(self, model: Any, path: Path) -> None:
        """Write a model, in the place of an earlier one."""
        ...


FRAMEWORKS = {"keras": "refold.demo.on_keras", "paddle": "refold.demo.on_paddle", "torch": "refold.demo.on_torch"}


def run(folder: Path, epochs: int, framework: str = "keras") -> int:
    """The whole story; writes both models, ``plan.json``, ``certificate.json``, ``timing.json`` and
    ``report.html`` into ``folder``, replacing those of an earlier run. Returns the exit status. Raises InputError
    if what it needs is not installed or the folder cannot be used."""
    try:
        import sklearn.datasets  # noqa: F401  only to find out early

        told: Framework = import_module(FRAMEWORKS[framework])
    except ImportError as error:
        install = {"keras": "'refold[demo]'"}.get(framework, f"'refold[{framework}]' scikit-learn")
        raise InputError(
            f"the demo needs {error.name}; install what it uses with: pip install {install}"
        ) from error

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}: this folder cannot be made ({error.strerror}); choose another with --out"
        ) from error

    console = Console(stderr=True)
    train, test = _digits(told)
    model = told.network()
    console.print(f"Training {told.size(model):,} parameters on {len(train[0])} digits ({told.words()}).")
    losses: list[float] = []
    accuracy: list[float] = []
    with _progress(epochs, losses, accuracy) as report:
        told.train(model, train, test, epochs, report)

    example = test[0][:64]
    with console.status("folding"):
        plan = verbs.inspect(model, example)
        plain = verbs.fold(model, example)
    with console.status("proving that nothing changed"):
        certificate = verbs.prove(model, plain, example)
    with console.status("timing both, in turn"):
        timing = verbs.bench(model, plain, example[:1], repeats=60)
    accuracies = [_accuracy(told, either, test) for either in (model, plain)]

    told.save(model, folder / f"rich{told.ENDING}")
    told.save(plain, folder / f"plain{told.ENDING}")
    training = Training(
        loss=tuple(losses),
        accuracy=tuple(accuracy),
        accuracy_before=accuracies[0],
        accuracy_after=accuracies[1],
        scales=told.scales(model),
    )
    page = Page("The refold demo: handwritten digits", plan, certificate, timing, training)
    _write(folder / "report.html", render(page))
    for name, part in (("plan", plan), ("certificate", certificate), ("timing", timing)):
        _write(folder / f"{name}.json", json.dumps(part.to_json(), indent=1))

    terminal.show([*terminal.certificate(certificate)[:1], _summary(plan, timing, certificate, accuracies)])
    print(f"Both models, the certificate and the report are in {folder}/")
    print(f"Open {(folder / 'report.html').absolute().as_uri()}")
    return 0 if certificate.ok else 1


def _digits(framework: Framework) -> tuple[Digits, Digits]:
    """Images scaled to [0, 1] and their digits, 1,437 to train on and 360 to test with."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    pixels = framework.arranged((images.reshape(-1, 8, 8) / 16.0).astype("float32"))
    a, b, c, d = train_test_split(pixels, labels, test_size=360, random_state=0, stratify=labels)
    return (a, c), (b, d)


@contextmanager
def _progress(epochs: int, losses: list[float], accuracies: list[float]) -> Iterator[Report]:
    """Shows the epochs as they go by, and notes them down."""
    from refold.report.terminal import progress

    console = Console(stderr=True)
    with progress() as bar:
        task = bar.add_task("training", total=epochs)

        def report(done: int, loss: float, accuracy: float) -> None:
            losses.append(loss)
            accuracies.append(accuracy)
            text = f"accuracy {accuracy:.1%}"
            bar.update(task, completed=done, description=f"training, {text}")
            if not console.is_terminal:
                print(f"epoch {done}/{epochs}: loss {loss:.4f}, {text}", flush=True)

        yield report


def _accuracy(framework: Framework, model: Any, test: Digits) -> float:
    return float(np.mean(framework.scores(model, test[0]).argmax(axis=1) == test[1]))


def _summary(plan: Any, timing: Any, certificate: Any, accuracies: list[float]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("", "trained", "shipped"):
        table.add_column(head, justify="left" if not head else "right")
    for saving in plan.savings:
        table.add_row(saving.name, f"{saving.before:,}", f"{saving.after:,}")
    table.add_row("latency (ms)", f"{1e3 * timing.before.median:.3f}", f"{1e3 * timing.after.median:.3f}")
    table.add_row("test accuracy", *(f"{accuracy:.2%}" for accuracy in accuracies))
    for entry in certificate.end_to_end:
        if entry.inputs == "given" and entry.original_max_error is not None:
            errors = (f"{error:.1e}" for error in (entry.original_max_error, entry.max_error))
            table.add_row("largest error, float64 reference", *errors)
    return table


def _write(path: Path, text: str) -> None:
    def write(target: Path) -> None:
        target.write_text(text + "\n", encoding="utf-8")

    write_atomically(path, write, overwrite=True)
