"""The commands on real files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from zoo import functional, repvgg

from refold.cli import main


@pytest.fixture
def rich(tmp_path: Path) -> Path:
    path = tmp_path / "rich.keras"
    functional((6, 6, 4), lambda x: layers.Dense(2)(layers.Flatten()(layers.ReLU()(repvgg(x, 4))))).save(path)
    return path


def test_inspect_fold_prove_and_bench(rich: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, page, notes = tmp_path / "plain.keras", tmp_path / "report.html", tmp_path / "report.md"
    assert main(["inspect", str(rich)]) == 0
    assert "3x3 convolution" in capsys.readouterr().out
    assert main(["inspect", str(rich), "--fail-if-foldable", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["schema"] == "refold.plan/1"

    assert main(["fold", str(rich), "-o", str(plain), "--html", str(page), "--markdown", str(notes)]) == 0
    assert "PROVED" in capsys.readouterr().out
    assert "Proved: the same function" in page.read_text()
    assert notes.read_text().startswith("### Proved: the same function")
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 4)).astype("float32")
    both = [keras.models.load_model(path).predict(x, verbose=0) for path in (rich, plain)]
    np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-5)

    certificate = tmp_path / "certificate.json"
    assert main(["prove", str(rich), str(plain), "--save-certificate", str(certificate), "--seed", "3"]) == 0
    assert json.loads(certificate.read_text())["verdict"] == "proved"
    capsys.readouterr()
    assert main(["prove", str(rich), str(plain), "--certificate", str(certificate)]) == 0
    assert capsys.readouterr().out.startswith("The certificate holds: proved")
    assert main(["prove", str(plain), str(plain), "--certificate", str(certificate), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert any(line.startswith("the structure of the original") for line in found["changes"])
    assert found["certificate"]["seed"] == 3
    assert main(["bench", str(rich), str(plain), "--repeats", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["repeats"] == 2
    speed = tmp_path / "speed.html"
    assert main(["bench", str(rich), str(plain), "--repeats", "2", "--html", str(speed)]) == 0
    assert "times as fast" in speed.read_text()
    capsys.readouterr()
    assert main(["bench", str(rich), str(plain), "--repeats", "2", "--html", str(speed)]) == 2  # it exists
    assert main(["inspect", str(plain), "--fail-if-foldable"]) == 0


def test_prove_says_one_for_another_function(
    rich: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = keras.models.load_model(rich)
    weights = model.get_weights()
    weights[0].flat[0] += 0.01
    model.set_weights(weights)
    model.save(tmp_path / "other.keras")
    assert main(["prove", str(rich), str(tmp_path / "other.keras")]) == 1
    assert "REFUTED" in capsys.readouterr().out


def test_a_fold_that_cannot_be_proved_is_not_written(
    rich: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import refold.verbs

    right = refold.verbs.fold

    def wrong(model: Any, example: Any = None) -> Any:
        plain = right(model, example)
        plain.set_weights([weight * 1.01 for weight in plain.get_weights()])
        return plain

    monkeypatch.setattr(refold.verbs, "fold", wrong)
    target = tmp_path / "plain.keras"
    assert main(["fold", str(rich), "-o", str(target)]) == 1
    assert not target.exists()
    assert "nothing was written" in capsys.readouterr().err


def test_custom_layers_are_loaded_from_where_the_user_says(tmp_path: Path) -> None:
    (tmp_path / "my_layers.py").write_text(
        "import keras\n"
        "@keras.saving.register_keras_serializable(package='mine')\n"
        "class Twice(keras.layers.Layer):\n"
        "    def call(self, x):\n"
        "        return keras.ops.relu(2.0 * x)\n"
        "if __name__ == '__main__':\n"
        "    x = keras.Input((4,))\n"
        "    import my_layers\n"
        "    keras.Model(x, my_layers.Twice()(keras.layers.Dense(3)(x))).save('custom.keras')\n"
    )
    subprocess.run([sys.executable, "my_layers.py"], check=True, cwd=tmp_path, capture_output=True)
    command = [sys.executable, "-m", "refold", "fold", "custom.keras", "-o", "plain.keras"]
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--import" in refused.stderr
    assert not (tmp_path / "plain.keras").exists()
    done = subprocess.run([*command, "--import", "my_layers"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plain.keras").exists()
