"""Data-dependent initialization of weight-normalized layers, from one batch."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn

from refold.paddle.attach import computed
from refold.paddle.normalization import NormalizedWeight
from refold.paddle.units import TRANSPOSED, rows_of

_CONVOLUTIONS = (nn.Conv1D, nn.Conv2D, nn.Conv3D, *TRANSPOSED)


def initialize_from_data(model: Any, *inputs: Any, group: Any = None) -> list[str]:
    """Give every weight-normalized layer of ``model`` pre-activations of mean 0 and variance 1 on a batch.

    Source: Salimans and Kingma, "Weight Normalization", arXiv 1602.07868, section 3. For each output unit, with
    the mean and the deviation of its outputs over the batch and all positions: ``g <- g / deviation`` and
    ``b <- (b - mean) / deviation``. Layers are taken in the order in which they are called, each on what the
    layers before it give by then; one that is called more than once is taken at its first call. A layer without
    a bias gets the variance only. A unit that gives one number on the whole batch keeps its gain.

    This changes what the model computes, and doing it twice is as doing it once.

    Args:
        model: a layer, called as it is (in eval mode, most likely).
        inputs: a batch, as the model takes it; or this process's piece of it.
        group: the processes (``paddle.distributed.get_group()``) that each have a piece of the batch and call this
            together; the mean and the deviation are those of the whole batch, so all get the same numbers. By
            default those of a ``paddle.DataParallel`` model, and otherwise this process alone.

    Returns:
        The names of the layers that were initialized, in their order.

    Raises:
        ValueError: a weight-normalized layer has no gain, or is of a kind whose output does not have one axis
            for its units (recurrent layers, embeddings); nothing is changed then.
    """
    if group is None and isinstance(model, paddle.DataParallel):
        group = model.group or paddle.distributed.get_group()
    wrapped = {
        id(layer): (path, hook) for path, layer, hook in computed(model) if isinstance(hook, NormalizedWeight)
    }
    for _, layer, hook in computed(model):
        if isinstance(hook, NormalizedWeight):
            _check(layer, hook)
    done: list[str] = []

    def initialize(layer: Any, given: Any, output: Any) -> Any:
        path, hook = wrapped[id(layer)]
        if path in done:
            return None
        done.append(path)
        _initialize(layer, hook, output, group)
        hook.renew(layer)
        return layer.forward(*given)

    handles = [
        layer.register_forward_post_hook(initialize) for _, layer, _ in computed(model) if id(layer) in wrapped
    ]
    try:
        with paddle.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return done


def _check(layer: Any, hook: NormalizedWeight) -> None:
    called = f"the layer {type(layer).__name__}"
    if not hook.gain:
        raise ValueError(f"{called} is normalized without a gain, which data could set")
    known = isinstance(layer, (nn.Linear, *_CONVOLUTIONS))
    if not known or hook.rows != rows_of(layer, hook.name, tuple(hook.part(layer, "v").shape), None):
        raise ValueError(
            f"data-dependent initialization does not know which output of {called} belongs to which gain"
        )


def _initialize(layer: Any, hook: NormalizedWeight, output: Any, group: Any) -> None:
    first = isinstance(layer, _CONVOLUTIONS) and layer._data_format.startswith("NC")
    rows = output.astype("float64").moveaxis(1 if first else -1, 0).flatten(1)
    count = _summed(paddle.full([1], rows.shape[1], "float64"), group)
    mean = _summed(rows.sum(1), group) / count
    deviation = (_summed((rows - mean.unsqueeze(1)).square().sum(1), group) / count).sqrt()
    # What is left of a constant by rounding is no deviation.
    size = (_summed(rows.square().sum(1), group) / count).sqrt()
    varies = deviation > 1e-6 * size
    factor = 1.0 / paddle.where(varies, deviation, paddle.ones_like(deviation))
    for part in (hook.part(layer, "g"), hook.part(layer, "offset")):
        if part is not None:
            part.set_value((part.astype("float64") * factor).astype(part.dtype))
    if layer.bias is not None:
        layer.bias.set_value(((layer.bias.astype("float64") - mean) * factor).astype(layer.bias.dtype))


def _summed(tensor: Any, group: Any) -> Any:
    """The sum over the processes of a group, if there is one."""
    if group is not None:
        paddle.distributed.all_reduce(tensor, group=group)
    return tensor
