from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
# The tests run side by side, and their tensors are small.
torch.set_num_threads(1)
