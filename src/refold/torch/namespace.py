"""torch's functions under the names and with the arguments that :mod:`refold.weights` uses."""

from __future__ import annotations

from typing import Any, final

import torch


@final
class _Torch:
    """torch's functions under the names and with the arguments that :mod:`refold.weights` uses."""

    abs = staticmethod(torch.abs)
    clip = staticmethod(torch.clip)
    diag = staticmethod(torch.diag)
    floor = staticmethod(torch.floor)
    log2 = staticmethod(torch.log2)
    matmul = staticmethod(torch.matmul)
    ones_like = staticmethod(torch.ones_like)
    power = staticmethod(torch.pow)
    reshape = staticmethod(torch.reshape)
    solve = staticmethod(torch.linalg.solve)
    sqrt = staticmethod(torch.sqrt)
    transpose = staticmethod(torch.permute)
    where = staticmethod(torch.where)
    zeros_like = staticmethod(torch.zeros_like)

    def cast(self, x: Any, dtype: str) -> Any:
        """``x`` in another type."""
        return x.to(getattr(torch, dtype))

    def concatenate(self, xs: Any, *, axis: int) -> Any:
        """Arrays one after the other along an axis."""
        return torch.cat(xs, dim=axis)

    def stop_gradient(self, x: Any) -> Any:
        """``x`` as a constant."""
        return x.detach()

    def max(self, x: Any, *, axis: int, keepdims: bool) -> Any:
        """The largest entry along an axis."""
        return torch.amax(x, dim=axis, keepdim=keepdims)

    def mean(self, x: Any, *, axis: int, keepdims: bool) -> Any:
        """The mean along an axis."""
        return torch.mean(x, dim=axis, keepdim=keepdims)

    def sum(self, x: Any, *, axis: int, keepdims: bool) -> Any:
        """The sum along an axis."""
        return torch.sum(x, dim=axis, keepdim=keepdims)


TORCH: Any = _Torch()
