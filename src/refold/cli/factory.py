"""Models that only code can make: ``package.module:factory`` on the command line."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from refold.errors import InputError
from refold.shown import printable

_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_factory(text: str) -> bool:
    """Whether ``text`` names a factory, and not a file."""
    return _FACTORY.fullmatch(text) is not None and not Path(text).exists()


def make(text: str) -> Any:
    """What the factory (or the model of that name) gives. Its code runs: the user named it.

    Modules are found as Python finds them, and in the current folder. Raises InputError.
    """
    name, _, path = text.partition(":")
    shown = printable(text)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = import_module(name)
    except (Exception, SystemExit) as error:  # whatever a user's module may raise
        raise InputError(f"{shown}: the module '{name}' cannot be imported: {_first_line(error)}") from error
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            raise InputError(f"{shown}: there is no '{attribute}' in it")
        found = getattr(found, attribute)
    # Models can be called too; what can be called and is none is a function or a class that makes one.
    if not (isinstance(found, type) or _is_function(found)):
        return found
    try:
        return found()
    except (Exception, SystemExit) as error:  # whatever a user's code may raise
        raise InputError(f"{shown}: calling it without arguments failed: {_first_line(error)}") from error


def _is_function(found: Any) -> bool:
    return callable(found) and hasattr(found, "__name__")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)
