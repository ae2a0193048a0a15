"""The one value type of the engine: the affine convolution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import final
from weakref import ref

import numpy as np
import numpy.typing as npt

from refold.algebra.geometry import UNIT, Window

Array = npt.NDArray[np.float64]
Channels = npt.NDArray[np.intp]
Reach = tuple[Channels, Channels]

# Numbers of an array that is kept once it is computed.
_MOST_KEPT = 2**16


@final
class Deferred:
    """An array that is computed when it is first read.

    Planning looks at many more combinations than it chooses, and mostly at their shapes. Of a kernel,
    ``reach`` may say before which channels it reads at most: for each output channel the first and the last one
    (last before first if none); and ``most`` what no number in it exceeds in magnitude (NaN if that is not known).
    A large array is kept only while somebody holds it, and computed anew for who comes later: models may
    have more weights than memory has room for.
    """

    __slots__ = ("_array", "_compute", "_most", "_reach", "_seen", "_told", "shape")

    def __init__(
        self,
        shape: tuple[int, ...],
        compute: Callable[[], Array],
        reach: Callable[[], Reach | None] | None = None,
        most: Callable[[], float] | None = None,
    ) -> None:
        self.shape = shape
        self._reach = reach
        self._told: Reach | None = None
        self._most = most
        self._compute: Callable[[], Array] | None = compute
        self._array: Array | None = None
        self._seen: Callable[[], Array | None] = lambda: None

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def array(self) -> Array:
        """The numbers."""
        array = self._seen() if self._array is None else self._array
        if array is None:
            assert self._compute is not None
            array = self._compute()
            if array.size > _MOST_KEPT:
                self._seen = ref(array)
            else:
                self._array, self._compute, self._reach = array, None, None  # lets go of what it was computed from
        return array

    def reach(self) -> Reach | None:
        """The first and the last channel that each output channel reads, if that was said."""
        if self._reach is not None:
            self._told, self._reach = self._reach(), None
        return self._told

    def most(self) -> float:
        """What no number exceeds in magnitude, from what it would be computed from where that says it."""
        return magnitude(self.array()) if self._most is None else self._most()


def magnitude(array: Array) -> float:
    """The largest magnitude in an array, NaN if a number is none: without an array of magnitudes."""
    return max(float(array.max()), -float(array.min())) if array.size else 0.0


@final
@dataclass(frozen=True, eq=False)
class AffineConv:
    """``y = K * x + b`` on ``(batch, channels, *space)``, the neural network's convolution
    (a correlation: nothing is flipped).

    The kernel, ``weights`` as given and ``kernel`` as an array, has the shape ``(out, in/groups, *taps)``,
    float64; output channel ``o`` belongs to group ``o // (out/groups)`` and reads the input channels of
    that group only. ``bias`` has the shape ``(out,)``. There is one window per spatial axis; with no
    spatial axis this is a dense layer. Raises ValueError if the pieces do not fit each other.
    """

    weights: Array | Deferred
    bias: Array
    windows: tuple[Window, ...] = ()
    groups: int = 1

    def __post_init__(self) -> None:
        taps = tuple(window.taps for window in self.windows)
        shape = self.weights.shape
        if shape[2:] != taps or len(shape) < 2:
            raise ValueError(f"a kernel of shape {shape} does not fit windows with {taps} taps")
        if self.bias.shape != shape[:1]:
            raise ValueError(f"a bias of shape {self.bias.shape} does not fit {shape[0]} channels")
        if self.groups < 1 or shape[0] % self.groups:
            raise ValueError(f"{shape[0]} output channels do not split into {self.groups} groups")

    @property
    def kernel(self) -> Array:
        """The kernel, ``(out, in/groups, *taps)``."""
        return self.weights.array() if isinstance(self.weights, Deferred) else self.weights

    @property
    def most(self) -> float:
        """What no weight exceeds in magnitude; NaN if that is not known."""
        return self.weights.most() if isinstance(self.weights, Deferred) else magnitude(self.weights)

    @property
    def channels_out(self) -> int:
        """Number of output channels."""
        return int(self.weights.shape[0])

    @property
    def channels_in(self) -> int:
        """Number of input channels."""
        return int(self.weights.shape[1]) * self.groups

    @property
    def size(self) -> int:
        """Number of weights, the bias not counted."""
        return prod(self.weights.shape)

    @cached_property
    def is_pointwise(self) -> bool:
        """Every output position reads its own input position only."""
        return all(window.is_unit for window in self.windows)

    @cached_property
    def is_channelwise(self) -> bool:
        """Every output channel reads its own input channel only."""
        return self.groups == self.channels_out == self.channels_in

    @cached_property
    def is_scale(self) -> bool:
        """A factor per channel (and a bias): what a batch norm is in inference."""
        return self.is_channelwise and self.is_pointwise

    @property
    def is_transposed(self) -> bool:
        """It reads zeros between its inputs: a transposed convolution with a stride."""
        return any(window.spread > 1 for window in self.windows)

    @cached_property
    def is_identity(self) -> bool:
        """The linear part leaves every tensor as it is (the bias is another matter)."""
        return self.is_scale and bool(np.all(self.kernel == 1.0))

    @cached_property
    def taps(self) -> int:
        """Number of positions that one output reads in each of its input channels."""
        return prod(window.taps for window in self.windows)

    @property
    def scale(self) -> Array:
        """The factors of a map that :attr:`is_scale`, shape ``(channels,)``."""
        return self.kernel.reshape(-1)

    @property
    def is_finite(self) -> bool:
        """No weight is infinite or NaN."""
        return bool(np.isfinite(self.kernel).all() and np.isfinite(self.bias).all())

    def output_space(self, space: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Spatial sizes of the output for those of the input (None: not known)."""
        return tuple(
            None if size is None else window.output_size(size)
            for size, window in zip(space, self.windows, strict=True)
        )

    def linear(self) -> AffineConv:
        """The same map without its bias."""
        return AffineConv(self.weights, np.zeros_like(self.bias), self.windows, self.groups)

    def with_bias(self, bias: Array) -> AffineConv:
        """The same linear part with another bias."""
        return AffineConv(self.weights, bias, self.windows, self.groups)

    def scaled(self, factor: float) -> AffineConv:
        """``factor`` times the linear part; the bias stays."""
        reach = self.weights.reach if isinstance(self.weights, Deferred) else None
        weights = Deferred(
            self.weights.shape, lambda: self.kernel * factor, reach, most=lambda: self.most * abs(factor)
        )
        return AffineConv(weights, self.bias, self.windows, self.groups)


def convolution(
    kernel: npt.ArrayLike,
    bias: npt.ArrayLike | None = None,
    windows: tuple[Window, ...] = (),
    groups: int = 1,
) -> AffineConv:
    """An affine convolution from any real arrays; they are taken to float64 (exact for narrower types)."""
    weights = np.asarray(kernel, dtype=np.float64)
    offset = np.zeros(weights.shape[0]) if bias is None else np.asarray(bias, dtype=np.float64)
    return AffineConv(weights, offset, windows, groups)


def transposed_convolution(
    kernel: npt.ArrayLike,
    bias: npt.ArrayLike | None = None,
    windows: tuple[Window, ...] = (),
    groups: int = 1,
) -> AffineConv:
    """A transposed convolution; ``kernel`` is ``(in, out/groups, *taps)``, as frameworks with channels first
    store it, and the windows are those of :func:`refold.algebra.geometry.transposed`."""
    return convolution(turned_around(kernel, groups), bias, windows, groups)


def turned_around(kernel: npt.ArrayLike, groups: int) -> Array:
    """The kernel of a transposed convolution, ``(in, out/groups, *taps)``, as that of a convolution that reads
    zeros between its inputs, ``(out, in/groups, *taps)``; and back."""
    weights = np.asarray(kernel, dtype=np.float64)
    per_group = weights.reshape(groups, -1, *weights.shape[1:]).swapaxes(1, 2)
    turned = np.flip(per_group, axis=tuple(range(3, per_group.ndim)))
    return turned.reshape(-1, *turned.shape[2:])


def dense(matrix: npt.ArrayLike, bias: npt.ArrayLike | None = None, axes: int = 0) -> AffineConv:
    """``y = M x + b`` at every position of ``axes`` spatial axes; ``matrix`` is ``(out, in)``."""
    weights = np.asarray(matrix, dtype=np.float64)
    return convolution(weights.reshape(weights.shape + (1,) * axes), bias, (UNIT,) * axes)


def scale_shift(scale: npt.ArrayLike, shift: npt.ArrayLike | None = None, axes: int = 0) -> AffineConv:
    """``y_c = scale_c * x_c + shift_c``; ``scale`` has the shape ``(channels,)``."""
    factors = np.asarray(scale, dtype=np.float64)
    return convolution(factors.reshape((-1, 1) + (1,) * axes), shift, (UNIT,) * axes, groups=factors.size)


def identity(channels: int, axes: int = 0) -> AffineConv:
    """``y = x``."""
    return scale_shift(np.ones(channels), axes=axes)


def batch_norm(
    mean: npt.ArrayLike,
    variance: npt.ArrayLike,
    epsilon: float,
    gamma: npt.ArrayLike | None = None,
    beta: npt.ArrayLike | None = None,
    axes: int = 0,
) -> AffineConv:
    """Batch normalization in inference: ``gamma (x - mean)/sqrt(variance + epsilon) + beta``
    (Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 2).

    Where ``variance + epsilon`` is not positive and finite the result is not finite, and no law will fold it.
    """
    center, spread = np.asarray(mean, dtype=np.float64), np.asarray(variance, dtype=np.float64)
    spread = np.where(np.isinf(spread), np.nan, spread)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = 1.0 / np.sqrt(spread + epsilon)
        scale = scale if gamma is None else np.asarray(gamma, dtype=np.float64) * scale
        shift = -center * scale
    return scale_shift(scale, shift if beta is None else np.asarray(beta, dtype=np.float64) + shift, axes)


def average_pool(channels: int, windows: tuple[Window, ...]) -> AffineConv:
    """The mean over each window, padded zeros counted (``count_include_pad``)."""
    taps = tuple(window.taps for window in windows)
    kernel = np.full((channels, 1, *taps), 1.0 / prod(taps))
    return AffineConv(kernel, np.zeros(channels), windows, channels)
