"""Running recorded Paddle models: in float64 for proofs, and as they ship.

The float64 reference is made of the recorded steps: the original layers, copied with 64-bit weights, and
Paddle's own functions. Nothing of the engine's arithmetic is in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import paddle

from refold.errors import InputError
from refold.frontend import AnyArray
from refold.paddle.lift import Record, computed
from refold.paddle.patches import SET_ITEM
from refold.paddle.perform import in_double, perform, recomputed, twin
from refold.paddle.sentences import first_line
from refold.paddle.trace import Step, dtype_name
from refold.recording.symbols import leaves


def evaluate(
    record: Record, cache: dict[int, Any], feeds: Mapping[str, AnyArray], wanted: Sequence[str]
) -> dict[str, AnyArray]:
    """The values ``wanted`` in float64 from ``feeds``; ``cache`` keeps the layers in float64."""
    known = {name: tensor_of(array, double=True) for name, array in feeds.items()}
    batch = next((len(array) for array in feeds.values() if np.ndim(array)), 1)
    size = record.size_among(known, batch)
    stored = partial(_double, cache)
    written = partial(recomputed, origins=record.trace.origins)
    for step in record.steps_to(wanted, known):
        try:
            outputs = perform(
                step,
                lambda symbol: known[symbol.name],
                constant=written if step.function == SET_ITEM else stored,
                size=size,
                layer=_in_double(cache, step),
            )
        except InputError:
            raise
        except Exception as error:  # whatever Paddle raises on sizes or types that it does not take
            raise InputError(f"'{step.name}' does not run in float64 at this size: {first_line(error)}") from error
        for symbol, output in zip(step.gives, outputs, strict=True):
            if "float" in dtype_name(output) and dtype_name(output) != "float64":
                if any("float" in read.dtype for read in step.reads) and not _is_cast(step):
                    raise InputError(f"'{step.name}' gives {dtype_name(output)} where it is asked for float64")
                output = known[step.reads[0].name] if _is_cast(step) else output.astype("float64")
            known[symbol.name] = output
    return {name: np.asarray(known[name].numpy()) for name in wanted}


def tensor_of(array: AnyArray, *, double: bool = False) -> Any:
    """A tensor with these numbers; real ones in float64 if ``double``."""
    data = np.asarray(array)
    return paddle.to_tensor(data.astype(np.float64) if double and data.dtype.kind == "f" else data)


def _is_cast(step: Step) -> bool:
    """A change of precision, which nobody needs in float64."""
    return len(step.inside) == 1 and step.inside[0].name in ("cast", "astype") and "float" in step.reads[0].dtype


def _double(cache: dict[int, Any], tensor: Any) -> Any:
    if "float" not in dtype_name(tensor):
        return tensor
    if id(tensor) not in cache:
        cache[id(tensor)] = in_double(tensor)
    return cache[id(tensor)]


def _in_double(cache: dict[int, Any], step: Step) -> Any:
    """The layer of a step with 64-bit weights."""
    layer = step.layer
    if layer is None:
        return None
    if id(step) not in cache:
        try:
            made = twin(layer, computed(step))
            made.to(dtype="float64")
        except Exception as error:  # whatever a user's attributes may raise
            raise InputError(f"'{step.name}' cannot be copied to float64: {first_line(error)}") from error
        cache[id(step)] = made
    return cache[id(step)]


def run(model: Any, inputs: Any) -> list[AnyArray]:
    """The outputs of ``model`` on the arguments ``inputs``, as it ships."""
    with paddle.no_grad():
        outputs = model(*inputs)
    tensors = [leaf for leaf in leaves(outputs) if isinstance(leaf, paddle.Tensor)]
    return [to_numpy(tensor) for tensor in tensors]


def to_numpy(tensor: Any) -> AnyArray:
    """The numbers of a tensor; numpy has no bfloat16, so those come as float32."""
    return np.asarray((tensor.astype("float32") if dtype_name(tensor) == "bfloat16" else tensor).numpy())
