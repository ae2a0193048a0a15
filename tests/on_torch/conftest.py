from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
# The tests run side by side, and their tensors are small.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def compiles_anew() -> Iterator[None]:
    """torch counts what it compiled in a process, by lines of its own code, and refuses beyond some number."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
