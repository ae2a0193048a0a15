"""What folding gains in Keras: latency of networks of train-time blocks against their folded form.

Run with ``make bench-keras``. Train form and folded form run in turn (A B A B ...) in one process, compiled as in
``predict``; the ratio is the median of the pairs. The peer is Keras itself: the train form as people ship it
by accident. Writes ``benchmarks/results/keras_blocks.json``.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import measure
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


def rows(size: int = 64, repeats: int = 40) -> list[dict[str, Any]]:
    found = []
    for name, block in BLOCKS.items():
        keras.utils.set_random_seed(0)
        model = network(block, size)
        plain = refold.fold(model)
        example = np.random.default_rng(0).normal(size=(1, size, size, 3)).astype("float32")
        timing = refold.bench(model, plain, example, repeats=repeats)
        found.append({"network": name, "input": list(example.shape), **timing.to_json()})
        print(f"{name}\n{timing}\n", flush=True)
    return found


def main() -> int:
    measured = measure.on_one_and_all_processors(__file__, rows)
    backend = keras.config.backend()
    environment = measure.environment("keras", backend, "numpy")
    measure.write("keras_blocks", {**environment, "backend": backend, "processors": measured})
    return 0


if __name__ == "__main__":
    sys.exit(main())
