"""Torch models in files: exported programs, and weights.

An exported program (``.pt2``) is read with ``torch.export.load``, which unpickles what it cannot read otherwise
(torch 2.13, ``torch/_export/serde/serialize.py``). So one is only read if the user trusts it. Weights are read as
safetensors, or with ``weights_only=True``, which makes tensors and nothing else.
"""

from __future__ import annotations

import copy
import io
import logging
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from refold.errors import InputError
from refold.files import open_regular, write_together
from refold.recording.symbols import mapped
from refold.shown import printable
from refold.torch import examples, wrappers
from refold.torch.trace import dtype_name, first_line

# What data parallelism leaves in front of the names of all weights.
PREFIX = "module."


def load(path: Path, *, imports: Sequence[str] = (), trust: bool = False) -> Any:
    """The module in a ``.pt2`` file; its example is kept in ``module.meta``. Raises InputError."""
    shown = printable(path)
    if not trust:
        raise InputError(
            f"{shown}: torch may run code from an exported program while it reads it; add --trust if you know "
            "where the file comes from"
        )
    with open_regular(path) as file:
        content = io.BytesIO(file.read())
    if not zipfile.is_zipfile(content):
        raise InputError(f"{shown}: this is no exported program (.pt2)")
    content.seek(0)
    try:
        with _unheard("torch.export"):
            program = torch.export.load(content)
        module: Any = program.module(check_guards=False)
    except Exception as error:  # whatever torch raises on a damaged file
        raise InputError(f"{shown}: this is no exported program that this torch reads, or it is damaged") from error
    for inner in module.modules():
        inner.training = False
    given = program.example_inputs
    if given is not None and not given[1]:
        module.meta["refold.example"] = given[0]
    return module


@contextmanager
def _unheard(name: str) -> Iterator[None]:
    """Keep a logger from printing a traceback before it raises."""
    logger = logging.getLogger(name)
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def save(model: Any, path: Path, *, overwrite: bool = False, example: Any = None) -> None:
    """Write a module as an exported program, which runs without refold and without the original class, and its
    weights beside it as safetensors. Raises InputError; nothing is written then."""
    shown = printable(path)
    if path.suffix != ".pt2":
        raise InputError(f"{shown}: a torch model is written as an exported program; give a name that ends in .pt2")
    if example is None:
        example = getattr(model, "meta", {}).get("refold.example")
    specs = examples.specs_of(model, example)
    attempt: examples.Attempt = (0, examples.OPEN_SIZES[0])
    if not examples.runs(model, specs, attempt):  # it may have been folded for the sizes of its example alone
        attempt = examples.attempts(specs)[-1]
    inputs = examples.feeds(specs, 0, *attempt)
    dynamic = None if attempt[0] is None else mapped(_open_axes, specs)
    try:
        program = torch.export.export(copy.deepcopy(model), inputs, dynamic_shapes=dynamic)
    except Exception as error:  # whatever torch raises
        raise InputError(f"{shown}: torch cannot export the folded model: {first_line(error)}") from error
    weights = path.with_suffix(".safetensors")
    if weights.exists() and not overwrite:
        raise InputError(f"{printable(weights)} exists; choose another name, or replace it with --force")

    def write(target: Path) -> None:
        with target.open("wb") as file:
            torch.export.save(program, file)

    write_together({weights: lambda target: _write_weights(model, target), path: write}, overwrite=overwrite)


def _open_axes(spec: Any) -> Any:
    """The axes of an input that may have other sizes."""
    if not isinstance(spec, examples.Spec):
        return None
    return {axis: torch.export.Dim.AUTO for axis, size in enumerate(spec.shape) if size is None}


def _write_weights(model: Any, path: Path) -> None:
    from safetensors.torch import save_file

    state = {name: tensor.detach().contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(state, path)


def restore(model: Any, path: Path | None) -> Any:
    """A module that a factory made, in eval mode, with the weights in a file if there is one. Raises InputError."""
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"the factory gives a {type(model).__name__}, which is no torch module")
    if path is not None:
        inner = wrappers.unwrapped(model)
        state = _fitted(read_weights(path), inner)
        own = inner.state_dict()
        for name, tensor in state.items():
            if name in own and own[name].is_floating_point() and not tensor.is_floating_point():
                raise InputError(
                    f"{printable(path)}: '{printable(name)}' in it holds {dtype_name(tensor)} where the model has "
                    f"{dtype_name(own[name])}"
                )
        try:
            # A model that was made without numbers takes those of the file as they are.
            inner.load_state_dict(state, assign=any(tensor.is_meta for tensor in own.values()))
        except Exception as error:  # missing, unexpected and misshapen weights, in torch's words
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            what = printable("; ".join(lines[1:3] or lines), 400).rstrip(".")
            raise InputError(f"{printable(path)}: its weights do not fit the model: {what}") from error
    return model.eval()


def read_weights(path: Path) -> Mapping[str, Any]:
    """The tensors in a ``.safetensors`` file, or in a ``.pt`` or ``.pth`` file of nothing but tensors."""
    shown = printable(path)
    with open_regular(path) as file:
        content = file.read()
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load as read

            return dict(read(content))
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except ImportError as error:
        raise InputError(f"{shown}: reading it needs safetensors: pip install safetensors") from error
    except (pickle.UnpicklingError, LookupError, EOFError, TypeError, ValueError) as error:
        raise InputError(
            f"{shown}: it is damaged, or holds more than tensors, which torch would have to run code to read; save "
            "model.state_dict() alone"
        ) from error
    except Exception as error:  # whatever the readers raise on damaged or hostile files
        what = first_line(error).partition(". ")[0]
        raise InputError(f"{shown}: no weights can be read from it: {what}") from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    named = isinstance(state, Mapping) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise InputError(f"{shown}: it holds more than weights by name; save model.state_dict() alone")
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise InputError(f"{shown}: '{printable(name)}' in it is no plain tensor; save ordinary, dense weights")
    return dict(state)


def _fitted(state: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """The weights under the model's own names, which have what wrappers put into names, or have not, as those in
    the file."""
    own = {_plain_name(name): name for name in model.state_dict()}
    names = {_plain_name(name): name for name in state if name in own or name != "n_averaged"}
    if len(names) < len(state.keys() - {"n_averaged"}):
        return dict(state)  # two names are one: whoever loads this says what does not fit
    while not own.keys() <= names.keys() and names and all(name.startswith(PREFIX) for name in names):
        names = {name.removeprefix(PREFIX): given for name, given in names.items()}
    return {own.get(name, name): state[given] for name, given in names.items()}


def _plain_name(name: str) -> str:
    """The name of a weight without what ``torch.compile`` and activation checkpoints put into it."""
    return ".".join(segment for segment in name.split(".") if segment not in wrappers.SEGMENTS)
