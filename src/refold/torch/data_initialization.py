"""Data-dependent initialization of weight-normalized modules, from one batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from refold.torch.normalization import NormalizedWeight
from refold.torch.units import TRANSPOSED, rows_of
from refold.torch.wrappers import is_in_pieces

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


def initialize_from_data(model: nn.Module, *inputs: Any, group: Any = None) -> list[str]:
    """Give every weight-normalized module of ``model`` pre-activations of mean 0 and variance 1 on a batch.

    Source: Salimans and Kingma, "Weight Normalization", arXiv 1602.07868, section 3. For each output unit, with
    the mean and the deviation of its outputs over the batch and all positions: ``g <- g / deviation`` and
    ``b <- (b - mean) / deviation``. Modules are taken in the order in which they are called, each on what the
    modules before it give by then; one that is called more than once is taken at its first call. A module without
    a bias gets the variance only. A unit that gives one number on the whole batch keeps its gain.

    This changes what the model computes, and doing it twice is as doing it once.

    Args:
        model: a module, called as it is (in eval mode, most likely).
        inputs: a batch, as the model takes it; or this process's piece of it.
        group: the processes (``torch.distributed.group.WORLD``) that each have a piece of the batch and call this
            together; the mean and the deviation are those of the whole batch, so all get the same numbers. By
            default those of a ``DistributedDataParallel`` model, and otherwise this process alone.

    Returns:
        The names of the modules that were initialized, in their order.

    Raises:
        ValueError: a weight-normalized module has no gain, has its weights in pieces, or is of a kind whose output
            does not have one axis for its units; nothing is changed then.
    """
    if group is None and isinstance(model, nn.parallel.DistributedDataParallel):
        group = model.process_group
    wrapped = {module: name for name, module in model.named_modules() if _normalized(module) is not None}
    for module in wrapped:
        _check(module)
    done: list[str] = []

    def hook(module: Any, given: Any, output: Any) -> Any:
        if wrapped[module] in done:
            return None
        done.append(wrapped[module])
        _initialize(module, output, group)
        return module.forward(*given)

    handles = [module.register_forward_hook(hook) for module in wrapped]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return done


def _normalized(module: nn.Module) -> NormalizedWeight | None:
    if not parametrize.is_parametrized(module, "weight"):
        return None
    found: Any = getattr(module.parametrizations, "weight")[0]  # noqa: B009  a name that torch types as a module
    return found if isinstance(found, NormalizedWeight) else None


def _check(module: nn.Module) -> None:
    own = _normalized(module)
    assert own is not None
    shown = f"the module {type(module).__name__}"
    parts: Any = module.parametrizations
    if not own.gain:
        raise ValueError(f"{shown} is normalized without a gain, which data could set")
    if any(map(is_in_pieces, parts["weight"].parameters())):
        raise ValueError(f"{shown} has its weights in pieces: initialize it before they are distributed")
    known = isinstance(module, (nn.Linear, *_CONVOLUTIONS))
    if not known or own.rows != rows_of(module, "weight", tuple(parts["weight"].original0.shape), None):
        raise ValueError(
            f"data-dependent initialization does not know which output of {shown} belongs to which gain"
        )


def _initialize(module: Any, output: torch.Tensor, group: Any) -> None:
    axis = 1 if isinstance(module, _CONVOLUTIONS) else -1
    rows = output.detach().double().movedim(axis, 0).flatten(1)
    count = _summed(rows.new_full((), rows.shape[1]), group)
    mean = _summed(rows.sum(1), group) / count
    deviation = (_summed((rows - mean[:, None]).square().sum(1), group) / count).sqrt()
    # What is left of a constant by rounding is no deviation.
    size = (_summed(rows.square().sum(1), group) / count).sqrt()
    varies = deviation > 1e-6 * size
    factor = 1.0 / torch.where(varies, deviation, torch.ones_like(deviation))
    parts = module.parametrizations.weight
    names = ["original1"] + (["original2"] if parts[0].offset else [])
    for name in names:
        part = getattr(parts, name)
        part.copy_(part.double() * factor)
    if module.bias is not None:
        module.bias.copy_((module.bias.double() - mean) * factor)


def _summed(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum over the processes of a group, if there is one."""
    if group is not None:
        torch.distributed.all_reduce(tensor, group=group)
    return tensor
