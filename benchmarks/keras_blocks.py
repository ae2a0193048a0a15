"""What folding gains in Keras: latency of networks of train-time blocks against their folded form.

Run with ``make bench``. Train form and folded form run in turn (A B A B ...) in one process, compiled as in
``predict``; the ratio is the median of the pairs. The peer is Keras itself: the train form as people ship it
by accident. Writes ``benchmarks/results/keras_blocks.json`` and prints the table.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np

import refold
from refold.keras import ACBlock, DiverseBranchBlock, MobileOneBlock, RepVGGBlock

WIDTHS = ((32, 2), (64, 2), (64, 1), (128, 2), (128, 1), (128, 1), (128, 1))
BLOCKS = {
    "RepVGG": RepVGGBlock,
    "ACNet": ACBlock,
    "DBB": DiverseBranchBlock,
    "MobileOne": MobileOneBlock,
}


def network(block: Any, size: int) -> keras.Model:
    """Seven blocks, a pooling and a classifier."""
    x = inputs = keras.Input((size, size, 3))
    for filters, strides in WIDTHS:
        x = block(filters, strides=strides)(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(10)(x))


def main() -> int:
    size, repeats = 64, 40
    rows = []
    for name, block in BLOCKS.items():
        keras.utils.set_random_seed(0)
        model = network(block, size)
        plain = refold.fold(model)
        example = np.random.default_rng(0).normal(size=(1, size, size, 3)).astype("float32")
        timing = refold.bench(model, plain, example, repeats=repeats)
        rows.append({"network": name, **timing.to_json()})
        print(f"{name}\n{timing}\n", flush=True)
    result = {
        "backend": keras.config.backend(),
        "keras": keras.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "input": [1, size, size, 3],
        "rows": rows,
    }
    path = Path(__file__).parent / "results" / "keras_blocks.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
