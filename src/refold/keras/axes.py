"""Which axis of a stored Keras kernel is what. Declared here once, as data, and converted at the border."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt

from refold.algebra.affine import Array


@final
@dataclass(frozen=True, slots=True)
class KernelAxes:
    """The axes of a stored weight, in ``order``; of a kernel, its taps, then ``channels_in`` and
    ``channels_out``."""

    order: str

    def to_core(self, kernel: npt.ArrayLike) -> Array:
        """The kernel as ``(out, in/groups, *taps)``, float64."""
        stored = np.asarray(kernel, dtype=np.float64)
        if self.order == "taps in out":
            return np.moveaxis(stored, (-1, -2), (0, 1))
        if self.order == "channels":
            return stored
        # Depthwise: channel c and multiple m make the output channel c * multiplier + m.
        taps = stored.shape[:-2]
        return np.moveaxis(stored.reshape(*taps, -1), -1, 0)[:, None]

    def from_core(self, kernel: Array, groups: int) -> npt.NDArray[Any]:
        """The inverse of :meth:`to_core`; ``groups`` is the number of input channels of a depthwise one."""
        if self.order == "taps in out":
            return np.moveaxis(kernel, (0, 1), (-1, -2))
        if self.order == "channels":
            return kernel
        merged = np.moveaxis(kernel[:, 0], 0, -1)
        return merged.reshape(*merged.shape[:-1], groups, -1)


# keras.layers.Dense is a convolution without taps.
CONV = KernelAxes("taps in out")
DEPTHWISE = KernelAxes("taps channels multiplier")
# One number per channel, or one alone.
PLAIN = KernelAxes("channels")
