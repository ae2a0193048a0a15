"""Keras models in files: read as if an enemy had made them, written whole or not at all.

Keras' own safe mode is no boundary: it has been walked around again and again, and it says nothing about
what a file may cost. So an archive is screened before Keras sees any of it, in this order: the file, the
archive, the configuration's text, the classes it names, the weights, and the size of the model it describes
(its variables are counted without being made). Keras then reads a clean copy in memory that holds what was
screened and nothing else, so that no difference between two readers of a format can matter.

What is not held off: a fault in the HDF5 library itself, and computing time. A model from someone you have
reason to fear belongs in a process with limits.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import keras
from keras.src.saving import saving_lib
from keras.src.saving.serialization_lib import SafeModeScope

from refold.errors import InputError
from refold.files import open_regular, write_atomically
from refold.keras.files.archive import clean_copy, read_archive
from refold.keras.files.configuration import FAMILIES, screen_config
from refold.keras.files.refused import RefusedError, not_loaded, sentence
from refold.keras.files.size import screen_size
from refold.keras.files.weights import screen_weights
from refold.shown import printable

MAX_SIZE = 4 * 2**30


def load(path: str | Path, *, imports: Sequence[str] = (), trust: bool = False, max_size: int = MAX_SIZE) -> Any:
    """The model in a ``.keras`` file, which is taken for hostile.

    Only the architecture and the weights are read, not the optimizer's state or the loss. Nothing is written
    anywhere but, if the model has assets such as vocabularies, for a moment in the system's temporary folder.

    Args:
        path: the file.
        imports: names of modules to import first, with the code of custom layers. Classes in them need not
            be registered. Without this, only layers of Keras, of refold, and what this process has registered
            with ``keras.saving.register_keras_serializable`` can be in the file.
        trust: believe the file: its own code runs (``Lambda`` and the like), and it may ask for as much
            memory as it wants. The archive and its weights are still screened.
        max_size: in bytes, of the file.

    Raises:
        InputError: the file cannot be read, looks like an attack, or holds a model that Keras cannot make.
            The message names the file and what in it is wrong.
    """
    shown = printable(path)
    import_module("refold.keras")  # its layers register themselves
    customs = _imported(imports)
    try:
        with open_regular(path, max_size) as file:
            archive = read_archive(file)
        uses_customs = False
        if not trust:
            uses_customs = screen_config(archive.config, customs)
        stored = screen_weights(archive.weights)
        copy = clean_copy(archive)
        if not trust:
            screen_size(archive, customs, stored, uses_customs)
        return _load(copy, archive.written_by, customs, trust)
    except RefusedError as refusal:
        raise InputError(f"{shown}: {refusal}") from refusal


def save(model: Any, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a model to a ``.keras`` file, whole or not at all (see :func:`refold.files.write_atomically`).

    Raises:
        InputError: ``path`` does not end in ``.keras``, exists and ``overwrite`` is not set, or cannot be
            written; or Keras cannot save the model.
    """
    target = Path(path)
    if target.suffix != ".keras":
        raise InputError(
            f"{printable(path)}: a Keras model is saved to a name that ends in .keras; choose such a name"
        )

    def write(temporary: Path) -> None:
        try:
            keras.saving.save_model(model, str(temporary), overwrite=True)
        except OSError:
            raise
        except Exception as error:  # whatever a layer's get_config may raise
            reason = sentence(error)
            raise InputError(f"{printable(path)}: Keras cannot save this model ({reason})") from error

    write_atomically(target, write, overwrite=overwrite)


def _imported(names: Sequence[str]) -> dict[str, Any]:
    """The Keras classes that the modules define, by name."""
    customs: dict[str, Any] = {}
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise InputError(
                f"--import {printable(name)}: this is not the name of a Python module, like package.layers"
            )
        try:
            module = import_module(name)
        except ModuleNotFoundError as error:
            missing = printable(error.name)
            raise InputError(
                f"--import {name}: there is no module '{missing}' here; install it, or put its folder on PYTHONPATH"
            ) from error
        except Exception as error:  # whatever a user's module may raise
            raise InputError(
                f"--import {name}: the module cannot be imported ({type(error).__name__}: {sentence(error)})"
            ) from error
        package = name.split(".")[0]
        for value in vars(module).values():
            # What the module itself has imported from elsewhere is not the user's own code.
            if (
                isinstance(value, type)
                and issubclass(value, FAMILIES)
                and value.__module__.split(".")[0] == package
            ):
                customs[value.__name__] = value
    return customs


def _load(copy: io.BytesIO, written_by: str, customs: Mapping[str, Any], trust: bool) -> Any:
    try:
        # Whatever this process has switched on for itself is not for this file.
        with SafeModeScope(not trust):
            return saving_lib.load_model(copy, custom_objects=dict(customs), compile=False, safe_mode=not trust)
    except Exception as error:  # whatever Keras raises on a damaged file
        raise RefusedError(not_loaded(error, written_by)) from error
