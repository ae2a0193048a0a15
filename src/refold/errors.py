"""The one error that is for people."""

from __future__ import annotations


class InputError(Exception):
    """Something that was handed in cannot be used. The message is one sentence: what is wrong, where,
    and what to do about it."""
