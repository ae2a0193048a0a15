"""What a model is refused for before it is followed, and what to say if it does not run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from refold.errors import InputError
from refold.recording.symbols import leaves
from refold.torch import wrappers
from refold.torch.trace import calls_of_modules, dtype_name, first_line, untouched

Tensor = torch.Tensor


def check(model: Any) -> None:
    """Refuse a model that is another function in inference, or whose weights cannot be read. Raises InputError."""
    name = wrappers.class_of(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(f"'{name}' is scripted, which hides what it computes: fold the module before scripting it")
    training = [path for path, module in model.named_modules() if module.training and _differs(module)]
    if training or model.training:
        where = f" (its module '{training[0]}' is)" if training and training[0] and not model.training else ""
        raise InputError(
            f"the model '{name}' is in training mode{where}, in which it is another function: "
            "call model.eval() first"
        )
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        reason = _why_not(tensor)
        if reason:
            raise InputError(f"'{path}' of the model '{name}' {reason}")


def _why_not(tensor: Any) -> str:
    """Why a parameter or buffer cannot be used; nothing if it can."""
    if torch.nn.parameter.is_lazy(tensor):
        return "is not initialized, and has no shape: call the model on an example first"
    if tensor.is_meta:
        return "is on the meta device, and so has no numbers: load the model's weights first"
    if tensor.layout != torch.strided:
        return f"is stored as {tensor.layout}: make it dense first, or fold before it is converted"
    trained = isinstance(tensor, torch.nn.Parameter) and (tensor.is_floating_point() or tensor.is_complex())
    if trained and not _is_finite(tensor.detach()):
        return "holds numbers that are not finite (NaN or infinity): load weights that are"
    return ""


def _is_finite(tensor: Any) -> bool:
    if wrappers.is_in_pieces(tensor):
        tensor = tensor.to_local()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    # One pass, and a second one only where the sum overflows.
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.double().isfinite().all())


def _differs(module: Any) -> bool:
    """Whether a module may compute something else in training: all but wrappers and the empty holders may."""
    if wrappers.unwrapped(module) is not module:
        return False
    return type(module).forward is not torch.nn.Module.forward or bool(list(module.children()))


def why_it_does_not_run(model: Any, args: Sequence[Any]) -> str:
    """A sentence's end on why a model fails on ``args``; nothing if it does not."""
    paths = {id(module): path for path, module in model.named_modules()}
    failed: list[Any] = []

    def hear(original: Callable[..., Any], module: Any, args: Any, kwargs: Any) -> Any:
        try:
            return original(module, *args, **kwargs)
        except Exception:  # whatever a user's forward may raise; it goes on
            if not failed:
                failed.append(module)
            raise

    try:
        with untouched(model), calls_of_modules(hear), torch.no_grad():
            torch.nn.Module.__call__(model, *args)  # not fx's own, which prints what went wrong
    except Exception as error:  # whatever a user's forward may raise
        path = paths.get(id(failed[0]), "") if failed else ""
        where = f"its '{path}' ({type(failed[0]).__name__}) says: " if path else ""
        return f"on an example of {_described(args)}: {where}{first_line(error)}"
    return ""


def _described(args: Sequence[Any]) -> str:
    """The types and shapes of the first few tensors among the arguments."""
    tensors = [leaf for leaf in leaves(list(args)) if isinstance(leaf, Tensor)]
    found = [f"{dtype_name(tensor)} {tuple(tensor.shape)}" for tensor in tensors]
    return ", ".join([*found[:3], *(["..."] if len(found) > 3 else [])])
