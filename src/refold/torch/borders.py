"""Padding that is written by hand, as recorded steps of torch: see :mod:`refold.graph.borders`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from refold.algebra.affine import Array
from refold.graph import borders
from refold.graph.graph import Pad
from refold.recording.symbols import Constant, Symbol
from refold.torch.perform import in_double, perform
from refold.torch.trace import Step


def bordered(recordings: Sequence[Sequence[Step]], pad: Pad, doubles: dict[int, Any]) -> Pad | None:
    """The padding that ``pad`` and the steps after it, which write over its zeros, amount to together.

    ``recordings`` holds the steps, the padding first, in both recordings. None if they do something else.
    """

    def constant(entry: Constant) -> Any:
        return in_double(entry, doubles).cpu()

    def run(which: int, array: Array) -> Array:
        tensor = torch.from_numpy(array)
        for step in recordings[which]:
            (tensor,) = perform(step, partial(_always, tensor), constant=constant, double=True)
        made: Array = tensor.numpy()
        return made

    return borders.bordered(pad, [steps[0].reads[0].shape for steps in recordings], run)


def _always(tensor: Any, _: Symbol) -> Any:
    return tensor
