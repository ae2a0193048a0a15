"""How much faster the folded model is: paired, interleaved latency. No timing decides a verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import numpy as np

from refold.algebra.cost import Cost, Saving, savings
from refold.shown import notebook_table, notebook_view

SCHEMA = "refold.timing/1"


@final
@dataclass(frozen=True)
class Latency:
    """Seconds for one call: the median and the quartiles of the repeats."""

    median: float
    low: float
    high: float


@final
@dataclass(frozen=True)
class Timing:
    """Two models timed in turn (A B A B ...) on the same input, and their costs by the plan's model.

    ``ratio`` is the median over the pairs of the first model's time divided by the second's, ``ratio_low``
    and ``ratio_high`` its quartiles: above 1, the second is faster.
    """

    before: Latency
    after: Latency
    ratio: float
    ratio_low: float
    ratio_high: float
    repeats: int
    batch: int
    cost_before: Cost
    cost_after: Cost
    parameters_before: int
    parameters_after: int

    def to_json(self) -> dict[str, Any]:
        """The timing as plain data."""
        return {"schema": SCHEMA, **asdict(self)}

    @property
    def savings(self) -> tuple[Saving, ...]:
        """What the second model saves."""
        return savings(self.cost_before, self.cost_after, (self.parameters_before, self.parameters_after))

    @property
    def headline(self) -> str:
        """How much faster, with the spread, in one line."""
        return (
            f"{self.ratio:.2f} times as fast after folding (quartiles {self.ratio_low:.2f} to "
            f"{self.ratio_high:.2f} over {self.repeats} pairs, batch {self.batch})"
        )

    @property
    def _rows(self) -> list[tuple[str, str, str]]:
        rows = [("latency (ms)", f"{1e3 * self.before.median:.3f}", f"{1e3 * self.after.median:.3f}")]
        return rows + [(saving.name, f"{saving.before:,}", f"{saving.after:,}") for saving in self.savings]

    def __str__(self) -> str:
        rows = [("", "before", "after"), *self._rows]
        return "\n".join([self.headline, *(f"  {name:<14} {old:>16} {new:>16}" for name, old, new in rows)])

    def _repr_html_(self) -> str:
        """For notebooks."""
        table = notebook_table("Medians and costs", ("", "before", "after"), self._rows, numbers=(1, 2))
        return notebook_view("plain", "timing", f"{self.headline}.", [table])


def time_in_turn(
    calls: Sequence[Callable[[], Any]],
    *,
    repeats: int = 30,
    warmup: int = 3,
    progress: Callable[[int], Any] | None = None,
) -> tuple[list[float], ...]:
    """Seconds of each of some calls, called in turn ``repeats`` times after ``warmup`` uncounted rounds.
    Interleaving lets a machine that slows down slow them all."""
    seconds: tuple[list[float], ...] = tuple([] for _ in calls)
    for index in range(warmup + repeats):
        for call, taken in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            if index >= warmup:
                taken.append(elapsed)
        if progress is not None:
            progress(index + 1)
    return seconds


def summarize(
    first: Sequence[float],
    second: Sequence[float],
    *,
    batch: int,
    costs: tuple[Cost, Cost],
    parameters: tuple[int, int],
) -> Timing:
    """The timing of two series of seconds of equal length."""
    ratios = np.asarray(first) / np.asarray(second)
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return Timing(
        before=_latency(first),
        after=_latency(second),
        ratio=float(middle),
        ratio_low=float(low),
        ratio_high=float(high),
        repeats=len(ratios),
        batch=batch,
        cost_before=costs[0],
        cost_after=costs[1],
        parameters_before=parameters[0],
        parameters_after=parameters[1],
    )


def _latency(seconds: Sequence[float]) -> Latency:
    low, middle, high = np.percentile(seconds, [25, 50, 75])
    return Latency(float(middle), float(low), float(high))
