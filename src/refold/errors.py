"""The errors that are for people."""

from __future__ import annotations


class InputError(Exception):
    """Something that was handed in cannot be used. The message is one sentence: what is wrong, where,
    and what to do about it."""


class CannotRunError(InputError):
    """Nothing that is installed has all operators of a model; what can be told without running it can be told."""
