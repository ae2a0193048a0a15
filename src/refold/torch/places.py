"""Where what a new module holds goes: copies of what stays, under their own names, and what is new beside them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, final

import torch

from refold.errors import InputError
from refold.recording.places import free
from refold.recording.symbols import Constant
from refold.torch import express
from refold.torch.examples import to_numpy
from refold.torch.lift import is_computed
from refold.torch.perform import in_double, sources
from refold.torch.record import Record

Module = torch.nn.Module


@final
@dataclass(eq=False)
class Places:
    """What goes where below the new module: ``parts``, by path. ``memo`` holds what was copied, as for
    ``copy.deepcopy``."""

    record: Record
    model: Any
    memo: dict[int, Any]
    parts: dict[str, Any] = field(default_factory=dict)
    places: dict[int, str] = field(default_factory=dict)
    computed: dict[Any, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = [*self.model.named_parameters(remove_duplicate=False), *self.model.named_buffers()]
        self.paths: dict[int, str] = {}
        for path, tensor in named:
            self.paths.setdefault(id(tensor), path)

    def root(self) -> Any:
        """A module with everything in its place."""
        root = Module()
        # In the order in which they are used; modules first, since a parameter may be one of theirs.
        for place in sorted(self.parts, key=lambda place: not isinstance(self.parts[place], Module)):
            _put(root, place, self.parts[place])
        return root

    def module_at(self, module: Any, wanted: str) -> str:
        """Where the copy of a module is."""
        place = self.places.get(id(module))
        if place is None:
            place = self.places[id(module)] = self.put(wanted, self.copied(module))
        return place

    def put(self, wanted: str, part: Any) -> str:
        """Put something where it is wanted, or as near as there is room; where it is then."""
        place = free(wanted, self.parts)
        self.parts[place] = part
        return place

    def are_stored(self, constant: Constant) -> bool:
        """Whether a constant is computed from parameters and buffers of the model alone."""
        return all(id(tensor) in self.paths for tensor in sources(constant))

    def copied(self, module: Any) -> Any:
        """A copy of a module; what modules share, their copies share."""
        try:
            return copy.deepcopy(module, self.memo)
        except Exception as error:  # whatever a user's attributes may raise
            raise InputError(
                f"the module of class {type(module).__name__} cannot be copied ({str(error)[:120]}); "
                "give it a __deepcopy__, or keep what cannot be copied out of it"
            ) from error

    def tensor_at(self, constant: Constant, wanted: str) -> str:
        """Where the copy of a parameter, a buffer or any other constant is."""
        key = id(constant.tensor) if constant.origin is None else id(constant)
        if key in self.places:
            return self.places[key]
        tensor, same = constant.tensor, None
        path = self.paths.get(id(tensor)) if constant.origin is None else None
        if is_computed(constant):
            found = sources(constant)
            array = to_numpy(in_double(constant, self.record.doubles))
            # A weight that is used often (by a cell in a loop) is computed anew each time.
            same = (frozenset(map(id, found)), array.shape, array.tobytes())
            if same in self.computed:
                return self.places.setdefault(key, self.computed[same])
            made = express.parameter(array, tensor, any(source.requires_grad for source in found))
        else:
            made = copy.deepcopy(tensor if path else tensor.detach(), self.memo)
        place = path if path is not None and self._is_open(path, tensor) else free(path or wanted, self.parts)
        held = self._held(place)
        if held is None:
            self.parts[place] = made
        self.places[key] = place
        if same is not None:
            self.computed[same] = place
        return place

    def _is_open(self, path: str, tensor: Any) -> bool:
        """Whether a path is free, or a copied module has the copy of this very tensor there."""
        return free(path, self.parts) == path or self._held(path) is self.memo.get(id(tensor), self)

    def _held(self, path: str) -> Any:
        """What is at a path inside the parts there are."""
        for place, part in self.parts.items():
            if path.startswith(f"{place}.") and isinstance(part, Module):
                found: Any = part
                for segment in path[len(place) + 1 :].split("."):
                    found = getattr(found, segment, None)
                return found
        return None


def _put(root: Any, path: str, part: Any) -> None:
    """Put a module, parameter or buffer at a dotted path below ``root``, making empty modules on the way."""
    *around, last = path.split(".")
    holder = root
    for segment in around:
        if not hasattr(holder, segment):
            holder.add_module(segment, Module().eval())
        holder = getattr(holder, segment)
    if isinstance(part, Module):
        holder.add_module(last, part)
    elif isinstance(part, torch.nn.Parameter):
        holder.register_parameter(last, part)
    else:
        holder.register_buffer(last, part)
