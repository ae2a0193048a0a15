"""If, Loop and Scan by their definitions in ONNX's operator list, on whatever runs a body."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import onnx_ir as ir

from refold.errors import InputError
from refold.onnx.reference import AnyArray, describe
from refold.onnx.subgraphs import Body
from refold.shown import printable

# Runs of bodies in one computation, all counted, and bytes of what they stack: a file may claim any number.
MOST_RUNS = 2**12
MOST_STACKED = 2**30


class TooMuchError(InputError):
    """A file asks for more runs of a body, or for more of what they give, than anybody computes."""


@final
@dataclass(eq=False)
class Runner:
    """``body`` gives the outputs of a body from its inputs, ``empty`` an array without entries for an output that
    no run gave. Raises TooMuchError where the runs or what they give become too many."""

    body: Callable[[Body, Sequence[Any]], list[Any]]
    empty: Callable[[ir.Value], AnyArray]
    endless: dict[int, str]  # what was said of nodes that ran too often, by identity: nobody waits for it twice
    runs: int = 0
    stacked: int = 0

    def perform(self, bodies: Sequence[Body], inputs: Sequence[Any]) -> list[Any]:
        """The outputs of the node that runs ``bodies``."""
        owner = id(bodies[0].owner)
        if owner in self.endless:
            raise TooMuchError(self.endless[owner])
        try:
            return self._performed(bodies, inputs)
        except TooMuchError as error:
            self.endless[owner] = str(error)
            raise
        except InputError:
            raise
        except Exception as error:  # axes that are not there, numbers that are none: no runtime runs it
            name = printable(describe(bodies[0].owner))
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"'{name}' does not run in float64: {reason[:200]}") from error

    def _performed(self, bodies: Sequence[Body], inputs: Sequence[Any]) -> list[Any]:
        match bodies[0].owner.op_type:
            case "If":
                return self._run(bodies[0] if _truth(inputs[0]) else bodies[1], ())
            case "Loop":
                return self._loop(bodies[0], inputs[0], inputs[1], list(inputs[2:]))
            case _:
                return self._scan(bodies[0], list(inputs))

    def _run(self, body: Body, inputs: Sequence[Any]) -> list[Any]:
        self.runs += 1
        if self.runs > MOST_RUNS:
            name = printable(describe(body.owner))
            raise TooMuchError(f"'{name}' runs its body more than {MOST_RUNS:,} times; that is not computed")
        return self.body(body, inputs)

    def _loop(self, body: Body, most: Any, condition: Any, states: list[Any]) -> list[Any]:
        limit = None if most is None else int(np.ravel(most)[0])
        going = condition is None or _truth(condition)
        shapes = [_rank_of(value) for value in body.graph.inputs[:2]]
        stacks: list[list[Any]] = [[] for _ in body.graph.outputs[1 + len(states) :]]
        run = 0
        while going and (limit is None or run < limit):
            first = np.full(shapes[0], run, dtype=np.int64), np.full(shapes[1], True)
            given = self._run(body, (*first, *states))
            going, states = _truth(given[0]), given[1 : 1 + len(states)]
            self._stack(body, states, stacks, given[1 + len(states) :])
            run += 1
        ends = body.graph.outputs[1 + len(states) :]
        return [*states, *(self._stacked(e, stack, 0, False) for e, stack in zip(ends, stacks, strict=True))]

    def _scan(self, body: Body, inputs: list[Any]) -> list[Any]:
        attributes = body.owner.attributes
        count = body.scanned
        states, scanned = inputs[: len(inputs) - count], inputs[len(inputs) - count :]
        ends = body.graph.outputs[len(states) :]
        axes = attributes.get_ints("scan_input_axes") or [0] * count
        turned = attributes.get_ints("scan_input_directions") or [0] * count
        axes_out = attributes.get_ints("scan_output_axes") or [0] * len(ends)
        turned_out = attributes.get_ints("scan_output_directions") or [0] * len(ends)
        rows = [
            np.moveaxis(array, axis, 0)[:: -1 if backwards else 1]
            for array, axis, backwards in zip(scanned, axes, turned, strict=True)
        ]
        if len({len(row) for row in rows}) != 1:
            raise InputError(f"'{printable(describe(body.owner))}' scans tensors of different lengths")
        stacks: list[list[Any]] = [[] for _ in ends]
        for slices in zip(*rows, strict=True):
            given = self._run(body, (*states, *slices))
            states = given[: len(states)]
            self._stack(body, states, stacks, given[len(states) :])
        outputs = zip(ends, stacks, axes_out, turned_out, strict=True)
        return [*states, *(self._stacked(e, stack, axis, bool(back)) for e, stack, axis, back in outputs)]

    def _stack(self, body: Body, states: Sequence[Any], stacks: Sequence[list[Any]], given: Sequence[Any]) -> None:
        for stack, array in zip(stacks, given, strict=True):
            stack.append(array)
            self.stacked += array.nbytes if isinstance(array, np.ndarray) else 0
        carried = sum(array.nbytes for array in states if isinstance(array, np.ndarray))
        if self.stacked + carried > MOST_STACKED:
            name = printable(describe(body.owner))
            raise TooMuchError(f"'{name}' gives more than {MOST_STACKED >> 30} GiB; that is not computed")

    def _stacked(self, end: ir.Value, stack: list[Any], axis: int, backwards: bool) -> AnyArray:
        if not stack:
            row = self.empty(end)
            return np.zeros(np.expand_dims(row, axis).shape, row.dtype).take([], axis=axis)
        if len({np.shape(array) for array in stack}) != 1:
            raise InputError(f"the runs of a body give '{printable(end.name)}' in different shapes")
        return np.stack(stack[::-1] if backwards else stack, axis=axis)


def _truth(array: Any) -> bool:
    return bool(np.ravel(array)[0])


def _rank_of(value: ir.Value) -> tuple[int, ...]:
    """The shape in which a body reads the number of the run: one entry, on as many axes as it says."""
    return (1,) * (0 if value.shape is None else len(value.shape))
