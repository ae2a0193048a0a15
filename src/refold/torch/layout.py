"""How the weights of convolutions lie in memory."""

from __future__ import annotations

import torch

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def layout_of(tensor: torch.Tensor) -> torch.memory_format | None:
    """The memory format of a tensor whose channels come last; None for others."""
    known = _CHANNELS_LAST.get(tensor.ndim)
    if known is None or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=known):
        return None
    return known


def laid_out(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor, in the memory format of another one, if that is known and for as many axes."""
    layout = layout_of(like)
    return tensor if layout is None or tensor.ndim != like.ndim else tensor.contiguous(memory_format=layout)
