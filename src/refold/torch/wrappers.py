"""What training puts around a module and into it: wrappers, and weights in pieces on several processes.

A model is looked at without them: wrappers are looked through, weights are gathered. That is done in a twin: the
same module objects anew, which share everything with the user's that is not replaced, so that the user's stay as
they are.
"""

from __future__ import annotations

import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, final

import torch

from refold.errors import InputError
from refold.recording.symbols import leaves
from refold.torch.record import are_close
from refold.torch.trace import first_line, untouched

Module = torch.nn.Module
Tensor = torch.Tensor

# The wrappers that torch has, each with the attribute in which the module is ...
_AROUND = {"DataParallel": "module", "DistributedDataParallel": "module", "AveragedModel": "module"}
# ... and those that pass for it, so that code around them need not know of them.
_TRANSPARENT = {"OptimizedModule": "_orig_mod", "CheckpointWrapper": "_checkpoint_wrapped_module"}

# What stands for them in the names of weights.
SEGMENTS = frozenset(_TRANSPARENT.values())

# What torch notes on modules whose weights it has cut into pieces.
_MARKS = frozenset(["_is_fsdp_managed_module", "_fsdp_use_orig_params", "_distribute_module_applied"])

# How long processes wait for each other before one says that another did not come.
PATIENCE = timedelta(minutes=1)

_GATHER = "gather them (get_model_state_dict with full_state_dict=True) and load them into"


def unwrapped(model: Any) -> Any:
    """The module inside of the wrappers that torch puts around one: ``torch.compile``, DataParallel, DDP,
    AveragedModel, activation checkpoints."""
    return _inside(model, _AROUND | _TRANSPARENT)


def as_one(model: Any) -> Any:
    """``model`` with whole weights and without wrappers inside of it; itself if it is like that.

    If its weights are in pieces on several processes, all of them must call this. Raises InputError.
    """
    for path, module in model.named_modules():
        if class_of(module).__name__ == "FullyShardedDataParallel":
            raise InputError(
                f"'{path or 'the model'}' is wrapped in FullyShardedDataParallel, which hides its weights: "
                f"{_GATHER} the model without it"
            )
    if not any(map(_is_changed, model.modules())):
        return model
    try:
        _meet(model)
        for module in filter(_is_fsdp, model.modules()):
            module.reshard()  # as state_dict() does: what is whole for now may have been rounded
        return _Twin().of(model)
    except InputError:
        raise
    except Exception as error:  # whatever the processes' communication raises
        raise InputError(
            f"the weights of '{class_of(model).__name__}' are in pieces on several processes and cannot be "
            f"gathered: {first_line(error)}"
        ) from error


def _meet(model: Any) -> None:
    """Wait for the processes that hold the other pieces. Raises InputError.

    Gathering would wait for as long as the group does, half an hour where nobody said otherwise. Of torch's
    backends, gloo alone can be asked to wait for less.
    """
    meshes = {id(t.device_mesh): t.device_mesh for t in model.parameters() if is_in_pieces(t)}
    groups = {id(group): group for mesh in meshes.values() for group in mesh.get_all_groups()}
    for group in groups.values():
        if torch.distributed.get_backend(group) != "gloo":
            continue
        try:
            torch.distributed.monitored_barrier(group, PATIENCE)
        except Exception as error:  # whatever the processes' communication raises
            raise InputError(
                f"the weights of '{class_of(model).__name__}' are in pieces on several processes, of which not "
                f"all came to gather them within {PATIENCE.total_seconds():g} seconds: let every one of them make "
                "this call"
            ) from error


def is_in_pieces(tensor: Any) -> bool:
    """Whether a tensor is one of torch's distributed ones."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def check_same(model: Any, whole: Any, args: Sequence[Any]) -> None:
    """Refuse a model with weights in pieces that gives something else than with whole ones. Raises InputError.

    FSDP makes weights whole before they are used, so that nobody sees it. Under tensor parallelism, code may count
    on having a piece.
    """
    if any(map(_is_fsdp, model.modules())):
        return
    name = type(model).__name__
    try:
        with torch.no_grad(), untouched(model), untouched(whole):
            pieces, wanted = model(*args), whole(*args)
    except Exception as error:  # whatever a user's forward may raise
        raise InputError(
            f"the model '{name}', whose weights are in pieces on several processes, does not run with whole "
            f"weights: {first_line(error)}"
        ) from error
    found = [tensor.full_tensor() if is_in_pieces(tensor) else tensor for tensor in leaves(pieces)]
    for one, two in zip(found, leaves(wanted), strict=True):
        if isinstance(one, Tensor) and not are_close(one, two):
            raise InputError(
                f"the model '{name}' gives something else with the pieces of its weights that this process has "
                f"than with whole weights: {_GATHER} the model before it was made parallel"
            )


def _inside(module: Any, attributes: dict[str, str]) -> Any:
    while (kind := class_of(module)).__module__.startswith("torch.") and kind.__name__ in attributes:
        module = getattr(module, attributes[kind.__name__])
    return module


def _is_fsdp(module: Any) -> bool:
    distributed = sys.modules.get("torch.distributed.fsdp")
    return distributed is not None and isinstance(module, getattr(distributed, "FSDPModule", ()))


def class_of(module: Any) -> Any:
    """The class of a module as its author wrote it: fully_shard puts one of its own in front."""
    return type(module).__mro__[2] if _is_fsdp(module) else type(module)


def _is_changed(module: Any) -> bool:
    own = (*module._parameters.values(), *module._buffers.values())
    around = class_of(module).__name__ in _TRANSPARENT and _inside(module, _TRANSPARENT) is not module
    return around or _is_fsdp(module) or any(map(is_in_pieces, own)) or any(map(_is_distributed, _hooks_of(module)))


def _hooks_of(module: Any) -> Iterator[Any]:
    for name, value in vars(module).items():
        if name.endswith("hooks") and isinstance(value, dict):
            yield from value.values()


def _is_distributed(hook: Any) -> bool:
    return str(getattr(hook, "__module__", None)).startswith("torch.distributed.")


@final
@dataclass
class _Twin:
    """Modules and tensors by the identities of what they stand for."""

    made: dict[int, Any] = field(default_factory=dict)

    def of(self, module: Any) -> Any:
        """The twin of a module."""
        module = _inside(module, _TRANSPARENT)
        if isinstance(module, torch.jit.ScriptModule):
            return module
        if id(module) not in self.made:
            twin = self.made[id(module)] = object.__new__(class_of(module))
            for name, value in list(vars(module).items()):
                if name.endswith("hooks") and isinstance(value, dict):
                    kept = [(key, hook) for key, hook in value.items() if not _is_distributed(hook)]
                    twin.__dict__[name] = OrderedDict(kept)
                elif name not in _MARKS:
                    twin.__dict__[name] = self.replaced(value)
        return self.made[id(module)]

    def replaced(self, value: Any) -> Any:
        """What a module's attribute is in the twin; containers that are not Python's own are shared."""
        if isinstance(value, Module):
            return self.of(value)
        if is_in_pieces(value):
            return self.gathered(value)
        if type(value) in (list, tuple):
            return type(value)(map(self.replaced, value))
        if type(value) in (dict, OrderedDict):
            return type(value)((key, self.replaced(entry)) for key, entry in value.items())
        if isinstance(value, types.MethodType) and isinstance(value.__self__, Module):
            return types.MethodType(value.__func__, self.of(value.__self__))
        return value

    def gathered(self, tensor: Any) -> Any:
        """A tensor that was in pieces; tied ones stay tied."""
        if id(tensor) not in self.made:
            whole = tensor.detach().full_tensor()
            trained = isinstance(tensor, torch.nn.Parameter)
            self.made[id(tensor)] = torch.nn.Parameter(whole, tensor.requires_grad) if trained else whole
        return self.made[id(tensor)]
