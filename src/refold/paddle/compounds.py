"""What Paddle writes into a program as several operators although one of its functions computes it.

A bias is an operator of its own there; a convolution or pooling over one axis is one over two with an axis of
size 1 put in before and taken out behind; and so are paddings of three and four axes. Called as the function again,
each is one step of the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

from refold.paddle.pir import attributes_of, type_of

Operator = Mapping[str, Any]

_CONVOLUTIONS = ("conv2d", "depthwise_conv2d", "conv3d")
_TRANSPOSED = ("conv2d_transpose", "depthwise_conv2d_transpose", "conv3d_transpose")

# The layouts of tensors with one spatial axis less, and what Paddle calls those of three where it says them as two.
_LESS = {"NCHW": "NCL", "NHWC": "NLC", "NCDHW": "NCHW", "NDHWC": "NHWC"}
_OF_THREE = {"NCHW": "NCDHW", "NHWC": "NDHWC"}


@final
@dataclass(frozen=True)
class Compound:
    """A call of ``paddle.nn.functional``: its tensors are the values ``operands``, the rest are ``settings``;
    ``inside`` are the places of the operators that it stands for, beside the last one."""

    function: str
    operands: tuple[int, ...]
    settings: dict[str, Any]
    inside: tuple[int, ...]


def compounds(ops: Sequence[Operator]) -> dict[int, Compound]:
    """The functions in a program, by the places of their last operators."""
    reading = _Reading(ops)
    for place, op in enumerate(ops):
        match op["#"]:
            case "1.add":
                made = reading.with_bias(op)
            case "1.squeeze":
                made = reading.with_one_axis_less(op)
            case _:
                continue
        if made is not None:
            reading.found[place] = made
    inside = {place for compound in reading.found.values() for place in compound.inside}
    return {place: compound for place, compound in reading.found.items() if place not in inside}


@final
@dataclass
class _Reading:
    """A program while its compounds are looked for: who makes each value, and how often it is read."""

    ops: Sequence[Operator]
    makers: dict[int, int] = field(default_factory=dict)
    uses: Counter[int] = field(default_factory=Counter)
    found: dict[int, Compound] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for place, op in enumerate(self.ops):
            results = op["O"] if isinstance(op["O"], list) else [op["O"]]
            self.makers.update({int(result["%"]): place for result in results})
            self.uses.update(int(entry["%"]) for entry in op.get("I", ()))

    def maker(self, value: int, *kinds: str) -> Operator | None:
        """What makes a value, if it is an operator of these kinds."""
        op = self.ops[self.makers[value]] if value in self.makers else {}
        return op if op.get("#", "").removeprefix("1.") in kinds else None

    def only(self, value: int, *kinds: str) -> Operator | None:
        """As :meth:`maker`, if the value is read but once."""
        return self.maker(value, *kinds) if self.uses[value] == 1 else None

    def is_parameter(self, value: int, rank: int) -> bool:
        op = self.maker(value, "p")
        return op is not None and len(type_of(op["O"])[0]) == rank

    def integers(self, value: int) -> list[int] | None:
        """The numbers of a constant of the program."""
        op = self.maker(value, "full_int_array")
        return None if op is None else [int(number) for number in attributes_of(op)["value"]]

    # ---- biases ----------------------------------------------------------------------------------

    def with_bias(self, op: Operator) -> Compound | None:
        """A convolution or matrix product whose result is only read by the sum with a parameter per channel."""
        result, added = _operands(op)
        kernel = self.only(result, *_CONVOLUTIONS, *_TRANSPOSED, "matmul")
        if kernel is None:
            return None
        if kernel["#"] == "1.matmul":
            tensor, weight = _operands(kernel)
            settings = attributes_of(kernel)
            turned = settings["transpose_x"] or settings["transpose_y"]
            if turned or not self.is_parameter(weight, 2) or not self.is_parameter(added, 1):
                return None
            return Compound("linear", (tensor, weight, added), {}, (self.makers[result],))
        call = self.convolution(kernel)
        shape = type_of(kernel["O"][0])[0]
        axis = 1 if attributes_of(kernel)["data_format"].startswith("NC") else len(shape) - 1
        inside = [self.makers[result]]
        shaped = self.only(added, "reshape")
        if shaped is not None:
            wanted = tuple(shape[axis] if number == axis else 1 for number in range(len(shape)))
            if type_of(shaped["O"][0])[0] != wanted:
                return None
            inside.append(self.makers[added])
            added = _operands(shaped)[0]
        elif axis != len(shape) - 1:
            return None
        if call is None or not self.is_parameter(added, 1):
            return None
        return replace(call, operands=(*call.operands, added), inside=(*call.inside, *inside))

    def convolution(self, kernel: Operator) -> Compound | None:
        """A convolution without a bias, as it is called."""
        name = kernel["#"].removeprefix("1.").removeprefix("depthwise_")
        found = attributes_of(kernel)
        layout = found["data_format"]
        settings = {
            "stride": found["strides"],
            "padding": _padding_of(found),
            "dilation": found["dilations"],
            "groups": found["groups"],
            "data_format": _OF_THREE.get(layout, layout) if name.startswith("conv3d") else layout,
        }
        if name.endswith("transpose"):
            size = self.integers(_operands(kernel)[2]) if len(kernel["I"]) == 3 else found["output_size"]
            if size is None:
                return None
            # Paddle takes one of the two.
            settings |= {"output_size": size} if size else {"output_padding": found["output_padding"] or 0}
        return Compound(name, tuple(_operands(kernel)[:2]), settings, ())

    # ---- axes of size 1 --------------------------------------------------------------------------

    def with_one_axis_less(self, op: Operator) -> Compound | None:
        """A function on fewer axes: some of size 1 are put in, and taken out again behind it."""
        result, removed = _operands(op)[0], self.integers(_operands(op)[1])
        if removed is None or self.uses[result] != 1 or result not in self.makers:
            return None
        place = self.makers[result]
        call = self.found.get(place)
        if call is None and self.maker(result, *_CONVOLUTIONS, *_TRANSPOSED) is not None:
            call = self.convolution(self.ops[place])
        if call is not None:
            return self.convolution_on_one_axis(call, op, removed, place)
        middle = self.maker(result, "pool2d", "pad3d")
        if middle is None:
            return None
        tensor, around = self.widened(_operands(middle)[0], removed)
        numbers = self.integers(_operands(middle)[1])
        if tensor is None or numbers is None:
            return None
        found = attributes_of(middle)
        made = _pooling if middle["#"] == "1.pool2d" else _padding
        said = made(found, numbers, [axis % len(type_of(middle["O"][0])[0]) for axis in removed])
        return None if said is None else Compound(said[0], (tensor,), said[1], (*around, place))

    def widened(self, value: int, axes: list[int]) -> tuple[int | None, tuple[int, ...]]:
        """The tensor that became ``value`` by putting in ``axes``, and the places of what did it."""
        op = self.only(value, "unsqueeze")
        if op is None or not value:
            return None, ()
        rank = len(type_of(op["O"][0])[0])
        given = self.integers(_operands(op)[1])
        if given is None or {axis % rank for axis in given} != {axis % rank for axis in axes}:
            return None, ()
        return _operands(op)[0], (self.makers[value],)

    def convolution_on_one_axis(
        self, call: Compound, op: Operator, removed: list[int], place: int
    ) -> Compound | None:
        if not call.function.startswith("conv2d") or len(removed) != 1:
            return None
        settings, layout = call.settings, call.settings["data_format"]
        gone = removed[0] % 4 - (2 if layout == "NCHW" else 1)
        tensor, around = self.widened(call.operands[0], removed)
        weight, more = self.widened(call.operands[1], [2 + gone])
        if gone not in (0, 1) or tensor is None or weight is None:
            return None
        if self.only(weight, "assign") is not None:
            more = (*more, self.makers[weight])
            weight = _operands(self.ops[self.makers[weight]])[0]
        smaller = {name: _without(name, value, gone) for name, value in settings.items() if name != "data_format"}
        if not self.is_parameter(weight, 3) or any(value is None for value in smaller.values()):
            return None
        function = call.function.replace("2d", "1d")
        operands = (tensor, weight, *call.operands[2:])
        inside = (*call.inside, *around, *more, place)
        return Compound(function, operands, smaller | {"data_format": _LESS[layout]}, inside)


def _operands(op: Operator) -> list[int]:
    return [int(entry["%"]) for entry in op["I"]]


def _padding_of(found: dict[str, Any]) -> Any:
    """The numbers or the word by which a window is padded."""
    return found["paddings"] if found["padding_algorithm"] == "EXPLICIT" else found["padding_algorithm"]


def _without(name: str, value: Any, gone: int) -> Any:
    """A setting of a function over two axes for the axis that stays; None if it does something on the one that is
    ``gone``, which has size 1."""
    if not isinstance(value, list):
        return value  # a word, or the groups
    if name == "padding" and len(value) == 4:
        pairs = value[:2], value[2:]
        return pairs[1 - gone] if pairs[gone] == [0, 0] else None
    neutral = 0 if name in ("padding", "output_padding") else 1
    return [value[1 - gone]] if len(value) == 2 and value[gone] == neutral else None


def _pooling(found: dict[str, Any], taps: list[int], gone: list[int]) -> tuple[str, dict[str, Any]] | None:
    """An average over one axis that is written as one over two."""
    if found["pooling_type"] != "avg" or found["global_pooling"] or found["data_format"] != "NCHW" or gone != [2]:
        return None
    if found["adaptive"]:
        return ("adaptive_avg_pool1d", {"output_size": taps[1]}) if taps[:1] == [1] else None
    given = {"kernel_size": taps, "stride": found["strides"], "padding": _padding_of(found)}
    settings = {name: _without(name, value, 0) for name, value in given.items()}
    if any(value is None for value in settings.values()):
        return None
    return "avg_pool1d", settings | {"exclusive": found["exclusive"], "ceil_mode": found["ceil_mode"]}


def _padding(found: dict[str, Any], widths: list[int], gone: list[int]) -> tuple[str, dict[str, Any]] | None:
    """A padding of one or two axes that is written as one of three."""
    layout = found["data_format"]
    axes = [4, 3, 2] if layout == "NCDHW" else [3, 2, 1]  # the last axis comes first
    pairs = dict(zip(axes, (widths[:2], widths[2:4], widths[4:6]), strict=True))
    if len(widths) != 6 or any(pairs.get(axis) != [0, 0] for axis in gone):
        return None
    for _ in gone:
        layout = _LESS[layout]
    left = [width for axis in axes if axis not in gone for width in pairs[axis]]
    return "pad", {"pad": left, "mode": found["mode"], "value": found["pad_value"], "data_format": layout}
