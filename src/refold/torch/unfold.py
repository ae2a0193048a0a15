"""A module with train-time blocks in the places of its convolutions."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from refold.algebra import AffineConv, Refusal, Window
from refold.algebra import convolution as affine
from refold.algebra.affine import Array
from refold.blocks import BatchNorm
from refold.blocks.unfold import Choose, Moments, Unfolded, Watch
from refold.errors import InputError
from refold.frontend import Rich
from refold.recording.symbols import mapped
from refold.torch import examples
from refold.torch.blocks import CONVOLUTIONS, ExpressionBlock
from refold.torch.express import rounded
from refold.torch.layout import laid_out
from refold.torch.trace import first_line

nn = torch.nn

# As torch sets up batch norms, with the engine's meaning of momentum.
NORM = BatchNorm(epsilon=1e-5, momentum=0.9)


def unfold(model: Any, choose: Choose, example: Any) -> Rich:
    """A copy of ``model`` whose convolutions are blocks where ``choose`` says how; see
    :meth:`refold.frontend.Frontend.unfold`."""
    rich = copy.deepcopy(model)
    made: dict[str, tuple[Any, Unfolded]] = {}
    kept: list[tuple[str, str]] = []
    blocks: dict[int, Any] = {}
    owners = _owners(rich)
    for path, module in list(rich.named_modules(remove_duplicate=False)):
        if not isinstance(module, tuple(CONVOLUTIONS.values())):
            continue
        if id(module) not in blocks:
            reason = _unfit(module, owners)
            unfolded = Refusal(reason) if reason else _chosen(path, module, choose)
            if isinstance(unfolded, Refusal):
                kept.append((path, unfolded.reason))
                continue
            blocks[id(module)] = _block(unfolded, module)
            made[path] = (blocks[id(module)], unfolded)
        rich = _with(rich, path, blocks[id(module)])
    if made and examples.arrays_of(example) is not None:
        _observe(rich, made, example)
    return Rich(rich, tuple(made), tuple(kept))


def _chosen(path: str, module: Any, choose: Choose) -> Unfolded | Refusal:
    return choose(path, _convolution(module), NORM, partial(_stored, module.weight))


def _convolution(module: Any) -> AffineConv:
    taps = module.kernel_size
    dilations = tuple(d if t > 1 else 1 for t, d in zip(taps, module.dilation, strict=True))
    reaches = [d * (t - 1) for t, d in zip(taps, module.dilation, strict=True)]
    match module.padding:
        case "valid":
            widths = [(0, 0)] * len(taps)
        case "same":  # torch pads the odd one behind
            widths = [(reach // 2, reach - reach // 2) for reach in reaches]
        case padding:
            widths = [(width, width) for width in padding]
    windows = tuple(
        Window(t, s, d, before, after)
        for t, s, d, (before, after) in zip(taps, module.stride, dilations, widths, strict=True)
    )
    bias = None if module.bias is None else examples.to_numpy(module.bias.detach().double())
    return affine(examples.to_numpy(module.weight.detach().double()), bias, windows, module.groups)


def _unfit(module: Any, owners: dict[int, int]) -> str:
    """Why a convolution is not one that a block can stand in for; empty if it is one."""
    if type(module) not in CONVOLUTIONS.values():
        return f"it is a {type(module).__name__}, which may compute something else"
    if module.padding_mode != "zeros":
        return f"it pads with other numbers than zeros ({module.padding_mode})"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has hooks, which would be lost"
    if any(owners[id(parameter)] > 1 for parameter in module.parameters()):
        return "its weight is that of another module as well"
    return ""


def _owners(model: Any) -> dict[int, int]:
    """How many modules hold a parameter, by its identity."""
    counts: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return counts


def _block(unfolded: Unfolded, module: Any) -> Any:
    block = ExpressionBlock(unfolded.expression, module.in_channels, axes=len(module.kernel_size))
    block.to(module.weight.device, module.weight.dtype)
    block.set_numbers(unfolded.numbers)
    for parameter in block.parameters():
        parameter.data = laid_out(parameter.data, module.weight)
    block.requires_grad_(module.weight.requires_grad)
    return block.train(module.training)


def _with(model: Any, path: str, module: Any) -> Any:
    """``model`` with ``module`` at ``path``."""
    if not path:
        return module
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    return model


# ---- statistics of real data -------------------------------------------------------------------------


def _observe(model: Any, made: Mapping[str, tuple[Any, Unfolded]], example: Any) -> None:
    """Let the batch norms of the blocks start at the statistics of ``example``."""
    specs = examples.specs_of(model, example)
    arguments = mapped(lambda spec: _tensor(spec) if isinstance(spec, examples.Spec) else spec, specs)
    watch = Watch(made)
    hooks = [
        block.part(path).register_forward_pre_hook(partial(_note, moments))
        for block, path, moments in watch.norms()
    ]
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad():
            model(*arguments)
    except Exception as error:  # whatever the model raises on an example that is not one
        raise InputError(f"the model does not run on the example: {first_line(error)}") from error
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    watch.settle(lambda block: partial(_stored, next(block.parameters())))


def _note(moments: Moments, module: Any, inputs: tuple[Any, ...]) -> None:
    moments.add(examples.to_numpy(inputs[0].detach().double()).swapaxes(0, 1))


def _tensor(spec: examples.Spec) -> Any:
    assert spec.sample is not None
    return spec.sample.to(spec.device, getattr(torch, spec.dtype))


def _stored(like: Any, array: Array) -> Array:
    """What is left of numbers in the type of ``like``."""
    return examples.to_numpy(rounded(array, like).double())
