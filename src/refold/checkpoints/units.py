"""Which axes of a stored weight number its output units: what a checkpoint says of it, and what its user says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import final

from refold.errors import InputError
from refold.shown import printable
from refold.weights import Rows

_SYNTAX = re.compile(r"(?P<axes>none|auto|-?\d+(,-?\d+)*)(/(?P<groups>[1-9]\d*))?")


@final
@dataclass(frozen=True, slots=True)
class Units:
    """The axes that number the output units, in words.

    ``axes`` of the stored weight; none of them means that the whole weight is one unit. ``groups`` is for
    transposed convolutions, which store ``(in, out/groups, *taps)``: there a unit is one of axis 1 of one group.
    ``usual`` means those that the kind of layer has, where that is known.
    """

    axes: tuple[int, ...]
    groups: int = 1
    usual: bool = False

    def rows(self, shape: tuple[int, ...], shown: str) -> Rows:
        """A weight of this shape as a matrix with one row per unit. ``shown`` names the weight in errors.

        Raises:
            InputError: the weight has no such axes, or does not fall into so many groups.
        """
        if not self.axes:
            return Rows((1, *shape), (0,))
        if self.groups > 1:
            if self.axes != (1,) or len(shape) < 2 or shape[0] % self.groups:
                raise InputError(
                    f"{shown}: groups are for weights stored as (in, out/groups, ...), whose units are on axis 1, "
                    f"and {list(shape)} on {list(self.axes)} is none of {self.groups} groups"
                )
            return Rows((self.groups, shape[0] // self.groups, *shape[1:]), (0, 2))
        try:
            return Rows(shape, self.axes)
        except ValueError as error:
            raise InputError(f"{shown}: {error}") from error


@final
@dataclass(frozen=True, slots=True)
class Choice:
    """What the user says of the weights whose names match a pattern."""

    pattern: str
    units: Units


def parse_choice(text: str) -> Choice:
    """``PATTERN=AXIS``: ``*.weight=0``, ``dense.kernel=-1``, ``up.weight=1/4`` (4 groups), ``*=none`` (one unit),
    ``*=auto`` (those of the kind of layer).

    Raises:
        ValueError: the text is not of this form.
    """
    pattern, _, axes = text.rpartition("=")
    found = _SYNTAX.fullmatch(axes)
    if not pattern or found is None:
        raise ValueError(
            f"'{printable(text)}' does not say an axis: write a pattern of names and the axis of the output "
            "units, such as '*.weight=0', 'up.weight=1/4' for 4 groups, or '*=none'"
        )
    groups = int(found["groups"] or 1)
    if found["axes"] in ("none", "auto"):
        return Choice(pattern, Units((), groups, usual=found["axes"] == "auto"))
    return Choice(pattern, Units(tuple(int(axis) for axis in found["axes"].split(",")), groups))


def chosen(choices: Sequence[Choice], name: str) -> Units | None:
    """What the last of the patterns that match says of a weight."""
    return next((choice.units for choice in reversed(choices) if fnmatchcase(name, choice.pattern)), None)


def units_kept(weight: tuple[int, ...], gain: tuple[int, ...]) -> Units | None:
    """The units of which a gain says the axes by its own: 1 where the weight is summed. None if it does not fit."""
    if not gain:
        return Units(())
    if len(gain) != len(weight) or any(size not in (1, full) for size, full in zip(gain, weight, strict=True)):
        return None
    return Units(tuple(axis for axis, size in enumerate(gain) if size != 1))


def units_counted(weight: tuple[int, ...], count: int, *, grouped: bool = False) -> list[Units]:
    """Every reading of a weight that has so many units: one is certain, none does not fit.

    With ``grouped`` also as a grouped transposed convolution, ``(in, out/groups, *taps)``.
    """
    if count == 1:
        return [Units(())]
    found = [Units((axis,)) for axis, size in enumerate(weight) if size == count]
    if grouped and len(weight) > 2 and weight[1] and count % weight[1] == 0:
        groups = count // weight[1]
        if groups > 1 and weight[0] % groups == 0:
            found.append(Units((1,), groups))
    return found
