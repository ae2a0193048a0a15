"""``refold demo``: train a rich network on real digits, fold it, prove it, time it, report.

The images are scikit-learn's: 1,797 handwritten digits of 8 x 8 pixels (Alpaydin and Kaynak 1998).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from refold import verbs
from refold.errors import InputError
from refold.files import write_atomically
from refold.report import terminal
from refold.report.page import Page, Training, render

FILES = ("rich.keras", "plain.keras", "plan.json", "certificate.json", "timing.json", "report.html")


def run(folder: Path, epochs: int) -> int:
    """The whole story; writes :data:`FILES` into ``folder``, replacing those of an earlier run. Returns the
    exit status. Raises InputError if what it needs is not installed or the folder cannot be used."""
    try:
        import keras
        import sklearn.datasets  # noqa: F401  only to find out early
    except ImportError as error:
        raise InputError(
            f"the demo needs {error.name}; install what it uses with: pip install 'refold[demo]'"
        ) from error
    from refold.keras import files

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}: this folder cannot be made ({error.strerror}); choose another with --out"
        ) from error

    console = Console(stderr=True)
    keras.utils.set_random_seed(0)
    train, test = _digits()
    model = _network()
    console.print(
        f"Training {model.count_params():,} parameters on {len(train[0])} digits "
        f"(Keras on {keras.config.backend()})."
    )
    history = _train(model, train, test, epochs)

    with console.status("folding"):
        plan = verbs.inspect(model)
        plain = verbs.fold(model)
    with console.status("proving that nothing changed"):
        certificate = verbs.prove(model, plain, test[0][:64])
    with console.status("timing both, in turn"):
        timing = verbs.bench(model, plain, test[0][:1], repeats=60)
    accuracies = [_accuracy(either, test) for either in (model, plain)]

    files.save(model, folder / "rich.keras", overwrite=True)
    files.save(plain, folder / "plain.keras", overwrite=True)
    training = Training(
        loss=tuple(history["loss"]),
        accuracy=tuple(history["val_accuracy"]),
        accuracy_before=accuracies[0],
        accuracy_after=accuracies[1],
        scales={layer.name: float(np.asarray(layer.alpha)) for layer in model.layers if hasattr(layer, "alpha")},
    )
    page = Page("The refold demo: handwritten digits", plan, certificate, timing, training)
    _write(folder / "report.html", render(page))
    for name, part in (("plan", plan), ("certificate", certificate), ("timing", timing)):
        _write(folder / f"{name}.json", json.dumps(part.to_json(), indent=1))

    terminal.show([*terminal.certificate(certificate)[:1], _summary(plan, timing, certificate, accuracies)])
    print(f"Both models, the certificate and the report are in {folder}/")
    print(f"Open {(folder / 'report.html').absolute().as_uri()}")
    return 0 if certificate.ok else 1


def _digits() -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Images scaled to [0, 1] and their digits, 1,437 to train on and 360 to test with."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 8, 8, 1) / 16.0).astype("float32")
    a, b, c, d = train_test_split(pixels, labels, test_size=360, random_state=0, stratify=labels)
    return (a, c), (b, d)


def _network() -> Any:
    """RepVGG blocks with learnable branch scales, and a weight-normalized head with LayerNormalization."""
    import keras

    from refold.keras import RepVGGBlock, WeightNormalization

    x = inputs = keras.Input((8, 8, 1), name="image")
    for index, (filters, strides) in enumerate([(16, 1), (16, 1), (32, 2), (32, 1), (32, 1)]):
        x = RepVGGBlock(filters, strides=strides, alpha=True, momentum=0.9, name=f"block{index + 1}")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    x = WeightNormalization(keras.layers.Dense(64, activation="relu", name="hidden"), name="normalized")(x)
    x = keras.layers.LayerNormalization(name="layer_norm")(x)
    return keras.Model(inputs, keras.layers.Dense(10, name="digit")(x), name="digits")


def _train(model: Any, train: tuple[Any, Any], test: tuple[Any, Any], epochs: int) -> dict[str, list[float]]:
    import keras

    from refold.cli.commands import progress

    steps = epochs * -(-len(train[0]) // 64)
    model.compile(
        optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(3e-3, steps)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    console = Console(stderr=True)
    with progress() as bar:
        task = bar.add_task("training", total=epochs)

        def report(epoch: int, logs: dict[str, float]) -> None:
            text = f"accuracy {logs['val_accuracy']:.1%}"
            bar.update(task, completed=epoch + 1, description=f"training, {text}")
            if not console.is_terminal:
                print(f"epoch {epoch + 1}/{epochs}: loss {logs['loss']:.4f}, {text}", flush=True)

        callback = keras.callbacks.LambdaCallback(on_epoch_end=report)
        history = model.fit(
            *train, batch_size=64, epochs=epochs, validation_data=test, verbose=0, callbacks=[callback]
        )
    return dict(history.history)


def _accuracy(model: Any, test: tuple[Any, Any]) -> float:
    scores = model.predict(test[0], verbose=0)
    return float(np.mean(scores.argmax(axis=1) == test[1]))


def _summary(plan: Any, timing: Any, certificate: Any, accuracies: list[float]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("", "trained", "shipped"):
        table.add_column(head, justify="left" if not head else "right")
    for name, old, new in terminal.gain_rows(plan):
        table.add_row(name, f"{old:,}", f"{new:,}")
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
