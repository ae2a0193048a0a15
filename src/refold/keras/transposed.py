"""What Keras means by the paddings of its transposed convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from keras.src.backend.common.backend_utils import compute_conv_transpose_padding_args_for_jax

from refold.algebra.geometry import Window


def transposed_windows(
    taps: Sequence[int], strides: Sequence[int], dilations: Sequence[int], padding: str, extra: Sequence[int] | None
) -> tuple[Window, ...]:
    """The windows of a transposed convolution. All backends go by the paddings that Keras computes for JAX."""
    widths = compute_conv_transpose_padding_args_for_jax(
        (None, *(None for _ in taps), None), (*taps, None, None), tuple(strides), padding, extra, tuple(dilations)
    )
    return tuple(
        Window(t, 1, d if t > 1 else 1, before, after, spread=s)
        for t, s, d, (before, after) in zip(taps, strides, dilations, widths, strict=True)
    )


def transposed_padding(windows: Sequence[Window]) -> tuple[str, tuple[int, ...] | None] | None:
    """The padding and the output padding by which Keras has these windows, if it has them."""
    if any(window.stride > 1 for window in windows):
        return None
    taps, dilations, strides = (
        [getattr(window, name) for window in windows] for name in ("taps", "dilation", "spread")
    )
    if max(dilations) > 1 and max(strides) > 1:
        return None
    for padding in ("valid", "same"):
        for extra in (None, *product(*map(range, strides))):
            if transposed_windows(taps, strides, dilations, padding, extra) == tuple(windows):
                return padding, extra
    return None
