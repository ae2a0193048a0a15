"""The array functions that weight normalizations are written on.

``keras.ops`` has all of them as it is; :data:`NUMPY` gives them to numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, final

import numpy as np
import numpy.typing as npt

Array = Any


class Namespace(Protocol):
    """What a namespace of array functions must have, with the meaning that numpy gives the names."""

    def abs(self, x: Array, /) -> Array: ...
    def cast(self, x: Array, dtype: str, /) -> Array: ...
    def clip(self, x: Array, low: float, high: float, /) -> Array: ...
    def floor(self, x: Array, /) -> Array: ...
    def log2(self, x: Array, /) -> Array: ...
    def max(self, x: Array, /, *, axis: int, keepdims: bool) -> Array: ...
    def mean(self, x: Array, /, *, axis: int, keepdims: bool) -> Array: ...
    def ones_like(self, x: Array, /) -> Array: ...
    def power(self, x: Array, y: Array, /) -> Array: ...
    def reshape(self, x: Array, shape: tuple[int, ...], /) -> Array: ...
    def sqrt(self, x: Array, /) -> Array: ...
    def stop_gradient(self, x: Array, /) -> Array: ...
    def sum(self, x: Array, /, *, axis: int, keepdims: bool) -> Array: ...
    def transpose(self, x: Array, axes: Sequence[int], /) -> Array: ...
    def where(self, condition: Array, x: Array, y: Array, /) -> Array: ...
    def zeros_like(self, x: Array, /) -> Array: ...


class MatrixNamespace(Namespace, Protocol):
    """A namespace with the functions of matrices that methods of the whole matrix need too.

    ``solve(a, b)`` is ``inv(a) @ b`` for matrices; ``diag`` makes a diagonal matrix of a vector.
    """

    def concatenate(self, xs: Sequence[Array], /, *, axis: int) -> Array: ...
    def diag(self, x: Array, /) -> Array: ...
    def matmul(self, x: Array, y: Array, /) -> Array: ...
    def solve(self, a: Array, b: Array, /) -> Array: ...


@final
class _Numpy:
    """numpy, with the three functions that it lacks."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def cast(self, x: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
        """``x`` in another dtype."""
        return np.asarray(x).astype(dtype)

    def stop_gradient(self, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """``x`` itself: numpy has no gradients."""
        return x

    def solve(self, a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """``inv(a) @ b``."""
        return np.linalg.solve(a, b)


NUMPY: Any = _Numpy()


def dtype_name(x: Array) -> str:
    """The name of an array's dtype, such as ``"float32"``, whichever framework it comes from."""
    dtype = x.dtype
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.").lower()  # Paddle's are in capitals


def working_dtype(name: str) -> str:
    """The dtype that norms of weights of this dtype are computed in: float32 or wider.

    Raises:
        ValueError: the dtype is not a floating-point type.
    """
    if "float" not in name:
        raise ValueError(f"weights of type {name} cannot be normalized: they are not floating-point numbers")
    return "float64" if name == "float64" else "float32"


def widen(xp: Namespace, x: Array) -> Array:
    """``x`` in its :func:`working_dtype`."""
    name = dtype_name(x)
    wide = working_dtype(name)
    return x if name == wide else xp.cast(x, wide)
