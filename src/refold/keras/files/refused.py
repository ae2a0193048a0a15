"""What the readers of a file say when it cannot be used, and how an exception's text becomes a sentence."""

from __future__ import annotations

import re

import keras

from refold.shown import printable

# Of what an exception says, this much is passed on.
SENTENCE = 250


class RefusedError(Exception):
    """A file cannot be used: half a sentence, to follow the file's name."""


def sentence(error: Exception) -> str:
    """What an exception says, in one line, without the configurations that Keras quotes."""
    text = str(error)
    layer = re.search(r"Example error message for object (.*?):\n\n(.*)", text, re.DOTALL)
    if layer:
        text = f"{layer[1]}: {layer[2]}"
    # Behind all of a configuration, which may be megabytes.
    text = text.rpartition("Exception encountered:")[2].lstrip()[:2000]
    text = re.split(r"Full (?:object )?config:|config=\{|The following nodes failed", text)[0]
    line = text.partition("\n")[0].strip().rstrip(".,:")
    if len(line) > SENTENCE:
        line = line[:SENTENCE] + "..."
    return printable(line or type(error).__name__, 2 * SENTENCE)


def not_loaded(error: Exception, written_by: str) -> str:
    """Half a sentence on a model that Keras could not make; ``written_by`` is a version of Keras, or empty."""
    version = re.fullmatch(r"(\d+)\.(\d+)[\w.+-]{0,20}", written_by)
    newer = ""
    if version:
        here = tuple(map(int, keras.__version__.split(".")[:2]))
        if (int(version[1]), int(version[2])) > here:
            newer = f"; it was written by Keras {written_by}, this is Keras {keras.__version__}"
    return f"Keras cannot load it ({sentence(error)}){newer}"
