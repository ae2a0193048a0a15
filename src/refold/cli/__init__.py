"""The command line: parse, call the verbs, print."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from refold.cli.parser import parse
from refold.errors import InputError
from refold.shown import printable

# Where the user chose none: the first of these that is installed.
BACKENDS = ("jax", "torch", "tensorflow")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns the exit status: 0; 1 if the models are not the same function (or, with
    ``--fail-if-foldable``, if something would fold); 2 for bad usage or input; 130 if interrupted.
    """
    options = parse(arguments)
    choose_backend()
    try:
        from refold.cli import commands

        status: int = getattr(commands, options.command)(options)
        return status
    except InputError as error:
        return complain(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has seen enough; what Python flushes at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # nobody shall see a traceback who did not ask for it
        if options.debug:
            raise
        first = (str(error).strip() or "no message").splitlines()[0]
        return complain(
            f"this is a fault of refold ({type(error).__name__}: {first}); --debug shows where it happened"
        )


def complain(sentence: str) -> int:
    """Print one sentence to standard error; returns the exit status for bad input."""
    print(f"refold: {printable(sentence, 2000)}", file=sys.stderr)
    return 2


def choose_backend() -> None:
    """Let Keras find a backend that is installed, where the user did not choose one."""
    if os.environ.get("KERAS_BACKEND") or os.path.exists(os.path.expanduser("~/.keras/keras.json")):
        return
    for backend in BACKENDS:
        if find_spec(backend) is not None:
            os.environ["KERAS_BACKEND"] = backend
            return
