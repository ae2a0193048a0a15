"""Running recorded torch models: in float64 for proofs, and as they ship.

The float64 reference is made of the recorded steps: torch's own functions on 64-bit weights. Nothing of the
engine's arithmetic is in it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from refold.errors import InputError
from refold.frontend import AnyArray
from refold.recording.symbols import Symbol, leaves, mapped, symbols
from refold.torch.examples import to_numpy
from refold.torch.perform import doubled, in_double, perform
from refold.torch.record import Record
from refold.torch.trace import Step, first_line


def evaluate(record: Record, feeds: Mapping[str, AnyArray], wanted: Sequence[str]) -> dict[str, AnyArray]:
    """The values ``wanted`` in float64 from ``feeds``."""
    device = record.trace.tensors[0].device
    own = {name: array for name, array in feeds.items() if name in record.symbols}
    known = {name: tensor_of(record.symbols[name], array).to(device) for name, array in own.items()}
    batch = next((len(array) for array in feeds.values() if np.ndim(array)), 1)
    size = record.size_among(known, batch)
    for step in record.steps_to(wanted, known):
        try:
            outputs = perform(
                step,
                lambda symbol: known[symbol.name],
                constant=lambda constant: in_double(constant, record.doubles),
                size=size,
                module=in_double_module(record, step),
                double=True,
            )
        except InputError:
            raise
        except Exception as error:  # whatever torch raises on sizes or types that it does not take
            raise InputError(f"'{step.name}' does not run in float64 at this size: {first_line(error)}") from error
        if len(outputs) != len(step.gives):  # a split of more, or fewer, than were there
            raise InputError(f"'{step.name}' gives {len(outputs)} tensors at this size and not {len(step.gives)}")
        for symbol, output in zip(step.gives, outputs, strict=True):
            wide = doubled(output)
            if wide.dtype != output.dtype and any("float" in read.dtype for read in step.reads):
                raise InputError(f"'{step.name}' gives {output.dtype} where it is asked for {wide.dtype}")
            known[symbol.name] = wide
    return {name: to_numpy(known[name]) for name in wanted}


def tensor_of(symbol: Symbol, array: AnyArray) -> Any:
    """The tensor that a symbol stands for, in float64, from its numbers as :func:`to_numpy` gives them."""
    data = np.asarray(array)
    if data.dtype.kind == "f":
        data = data.astype(np.float64)
    tensor = torch.from_numpy(np.ascontiguousarray(data))
    return torch.view_as_complex(tensor) if symbol.dtype.startswith("complex") else tensor


def in_double_module(record: Record, step: Step) -> Any:
    """The module of a step that was taken whole, with 64-bit weights."""
    if step.module is None:
        return None
    if id(step) not in record.doubles:
        try:
            record.doubles[id(step)] = copy.deepcopy(step.module)._apply(doubled)
        except Exception as error:  # whatever a user's attributes may raise
            raise InputError(f"'{step.name}' cannot be copied to float64: {first_line(error)}") from error
    return record.doubles[id(step)]


def run(record: Record, model: Any, inputs: Sequence[AnyArray]) -> list[AnyArray]:
    """The outputs of ``model`` on arrays in the order of the recorded inputs, as it ships."""
    by_name = {}
    for symbol, tensor, array in zip(symbols(record.trace.inputs), record.trace.tensors, inputs, strict=True):
        given = torch.from_numpy(np.ascontiguousarray(array))
        by_name[symbol.name] = given.to(tensor.device, tensor.dtype)
    args = mapped(lambda leaf: by_name[leaf.name] if isinstance(leaf, Symbol) else leaf, record.trace.inputs)
    with torch.no_grad():
        outputs = model(*args)
    return [to_numpy(leaf) for leaf in leaves(outputs) if isinstance(leaf, torch.Tensor)]
