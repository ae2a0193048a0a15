"""The models of PP-OCR in the wheel rapidocr-onnxruntime, installed for its files alone, and what they read."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

DETECTOR, RECOGNIZER, CLASSIFIER = (
    "ch_PP-OCRv4_det_infer.onnx",
    "ch_PP-OCRv4_rec_infer.onnx",
    "ch_ppocr_mobile_v2.0_cls_infer.onnx",
)
MODELS = (DETECTOR, RECOGNIZER, CLASSIFIER)
SIZES = {DETECTOR: (160, 320), RECOGNIZER: (48, 320), CLASSIFIER: (48, 192)}


def path_of(name: str) -> Path:
    spec = find_spec("rapidocr_onnxruntime")
    assert spec is not None, "rapidocr-onnxruntime is not installed: make sets it up for tests and benchmarks"
    assert spec.origin is not None
    return Path(spec.origin).parent / "models" / name


def lines_of_text(height: int, width: int) -> Any:
    """Something like print: on noise all that a detector says is that there is nothing."""
    rng = np.random.default_rng(0)
    page = np.ones((height, width), dtype="float32")
    for top in range(8, height - 15, 24):
        for left in range(8, width - 12, 12):
            for _ in range(3):
                y, x = top + rng.integers(0, 8), left + rng.integers(0, 6)
                page[y : y + rng.integers(1, 12), x : x + rng.integers(1, 4)] = 0.0
    return np.broadcast_to(2 * page - 1, (1, 3, height, width)).copy()
