"""The plan: what folds, by which laws, what it saves, and why the rest stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, final

from refold.algebra.cost import Cost, Saving, savings
from refold.graph.anatomy import Anatomy, anatomy
from refold.graph.graph import Affine, Graph
from refold.graph.region import Region, is_convolution
from refold.shown import notebook_table, notebook_view, printable


@final
@dataclass(frozen=True, slots=True)
class Kept:
    """Something that was not folded: where, and why, in one sentence."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"kept apart: {printable(self.reason, 400)} ({printable(self.where)})"


@final
@dataclass(frozen=True, eq=False)
class Plan:
    """What :func:`refold.fold` will do with a model.

    ``regions`` are the tensors that are computed anew, ``removed`` the original nodes that vanish, ``computed`` the
    values that linear nodes and regions still give, ``evaluated`` the layers whose weights were functions of other
    parameters and become plain weights. ``notes`` are sentences about how the model was read.
    """

    graph: Graph
    regions: tuple[Region, ...]
    kept: tuple[Kept, ...]
    before: Cost
    after: Cost
    removed: frozenset[str]
    computed: frozenset[str]
    evaluated: tuple[str, ...] = ()
    parameters_after: int = 0
    notes: tuple[str, ...] = ()
    chosen: Mapping[str, Region] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "chosen", {region.value: region for region in self.regions})

    @property
    def parameters_before(self) -> int:
        """Stored numbers of the model as it is."""
        return self.graph.parameters

    @cached_property
    def changes_something(self) -> bool:
        """Whether folding would change the model at all."""
        return bool(self.regions or self.evaluated)

    @cached_property
    def convolutions(self) -> tuple[int, int]:
        """How many convolutions and dense layers there are before and after; factors per channel and means
        over windows are none."""
        replaced = self.removed | {self.graph.producer[region.value].name for region in self.regions}
        found = [
            node.name for node in self.graph.nodes if isinstance(node.op, Affine) and is_convolution(node.op.conv)
        ]
        made = sum(is_convolution(term) for region in self.regions for _, term in region.terms)
        return len(found), sum(name not in replaced for name in found) + made

    @cached_property
    def savings(self) -> tuple[Saving, ...]:
        """What folding saves; dense layers count as convolutions."""
        first, *rest = savings(self.before, self.after, (self.parameters_before, self.parameters_after))
        return (first, Saving("convolutions", *self.convolutions), *rest)

    @cached_property
    def headline(self) -> str:
        """What folding would save, in one line."""
        if not self.changes_something:
            return "nothing in this model folds"
        saved = self.convolutions[0] - self.convolutions[1]
        parts = [f"{-saved:+,} {'convolution' if abs(saved) == 1 else 'convolutions'}"] if saved else []
        if self.before.multiply_adds:
            share = 100 * (self.after.multiply_adds / self.before.multiply_adds - 1)
            parts.append(f"{share:+.0f} % multiply-adds")
        found = [_count(len(self.regions), "foldable region")] if self.regions else []
        found += [_count(len(self.evaluated), "computed weight")] if self.evaluated else []
        return f"this model still holds {' and '.join(found)}{': ' if parts else ''}{', '.join(parts)}"

    @cached_property
    def anatomy(self) -> tuple[Anatomy, ...]:
        """What happens inside each region: its steps and laws, its branches, and the norms of their kernels. As
        much work as planning had with the kernels that it chose, so only done when asked for."""
        return tuple(anatomy(self.graph, self.regions))

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data, without the weights."""
        return {
            "schema": "refold.plan/1",
            "before": {**asdict(self.before), "parameters": self.parameters_before},
            "after": {**asdict(self.after), "parameters": self.parameters_after},
            "regions": [
                {
                    "output": region.value,
                    "reads": sorted(region.leaves),
                    "replaces": list(region.nodes),
                    "becomes": region.operator,
                    "laws": list(region.laws),
                    "before": asdict(region.before),
                    "after": asdict(region.after),
                    "steps": [asdict(step) for step in inside.steps],
                    "kernels": [asdict(kernel) for kernel in inside.kernels],
                    "branches": [asdict(branch) for branch in inside.branches],
                }
                for region, inside in zip(self.regions, self.anatomy, strict=True)
            ],
            "evaluated": list(self.evaluated),
            "kept": [asdict(kept) for kept in self.kept],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        if not self.changes_something:
            head = "Nothing to fold: no region would be exact and cheaper as fewer operators."
        else:
            head = (
                f"{_count(len(self.regions), 'region')} to fold, "
                f"{_count(len(self.evaluated), 'weight parameterization')} to evaluate."
            )
        rows = [("", "before", "after")]
        rows += [(gain.name, f"{gain.before:,}", f"{gain.after:,}") for gain in self.savings]
        lines = [head, *(f"  {name:<14} {old:>16} {new:>16}" for name, old, new in rows)]
        for region in self.regions:
            lines.append(f"  {printable(region.value)}: {_count(len(region.nodes), 'step')} -> {region.operator}")
            lines.append(f"      by {', '.join(region.laws) or 'identity'}")
        lines += [f"  {printable(name)}: its weights become plain weights" for name in self.evaluated]
        lines += [f"  {kept}" for kept in self.kept]
        lines += [f"  note: {printable(note, 400)}" for note in self.notes]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """For notebooks."""
        folded = [(r.value, str(len(r.nodes)), r.operator, ", ".join(r.laws) or "identity") for r in self.regions]
        folded += [(name, "", "the same layer with plain weights", "evaluation") for name in self.evaluated]
        gains = [(gain.name, f"{gain.before:,}", f"{gain.after:,}") for gain in self.savings]
        return notebook_view(
            "plain",
            "plan",
            f"{self.headline[:1].upper()}{self.headline[1:]}.",
            [
                notebook_table("What folding saves", ("", "before", "after"), gains, numbers=(1, 2)),
                notebook_table("Folds", ("tensor", "steps", "becomes", "by"), folded, numbers=(1,)),
                notebook_table("Kept apart", ("where", "because"), [(k.where, k.reason) for k in self.kept]),
            ],
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
