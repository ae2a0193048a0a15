"""Paddle's functions under the names and with the arguments that :mod:`refold.weights` uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import paddle


@final
class _Paddle:
    """Paddle's functions under the names and with the arguments that :mod:`refold.weights` uses."""

    abs = staticmethod(paddle.abs)
    clip = staticmethod(paddle.clip)
    diag = staticmethod(paddle.diag)
    floor = staticmethod(paddle.floor)
    log2 = staticmethod(paddle.log2)
    matmul = staticmethod(paddle.matmul)
    ones_like = staticmethod(paddle.ones_like)
    power = staticmethod(paddle.pow)
    reshape = staticmethod(paddle.reshape)
    solve = staticmethod(paddle.linalg.solve)
    sqrt = staticmethod(paddle.sqrt)
    transpose = staticmethod(paddle.transpose)
    where = staticmethod(paddle.where)
    zeros_like = staticmethod(paddle.zeros_like)

    def cast(self, x: Any, dtype: str) -> Any:
        """``x`` in another type."""
        return paddle.cast(x, dtype)

    def concatenate(self, xs: Sequence[Any], *, axis: int) -> Any:
        """Tensors one behind the other."""
        return paddle.concat(list(xs), axis=axis)

    def stop_gradient(self, x: Any) -> Any:
        """``x`` as a constant."""
        return x.detach()

    def max(self, x: Any, *, axis: int, keepdims: bool) -> Any:
        """The largest entry along an axis."""
        return paddle.max(x, axis=axis, keepdim=keepdims)

    def mean(self, x: Any, *, axis: int, keepdims: bool) -> Any:
        """The mean along an axis."""
        return self.sum(x, axis=axis, keepdims=keepdims) / x.shape[axis]

    def sum(self, x: Any, *, axis: int, keepdims: bool) -> Any:
        """The sum along an axis."""
        if axis == 0 and keepdims and paddle.in_dynamic_mode() and x.ndim == 2 and x.place.is_cpu_place():
            # Paddle's own takes many times as long on a CPU.
            return paddle.matmul(paddle.ones([1, x.shape[0]], x.dtype), x)
        return paddle.sum(x, axis=axis, keepdim=keepdims)


PADDLE: Any = _Paddle()
