"""A plan and a certificate to print, without a framework; names are hostile on purpose."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from refold.algebra import AffineConv, batch_norm, same
from refold.algebra.cost import Cost
from refold.bench import Timing, summarize
from refold.graph import Graph, Node, Plan, Value, make_plan
from refold.graph.graph import Affine, Opaque, Sum
from refold.proof.certificate import (
    Certificate,
    Digests,
    EndToEndResult,
    LocalResult,
    RegionResult,
    StructureResult,
    Verdict,
)

HOSTILE = "<script>alert(1)</script>\x1b[31m[bold]"


def plan(blocks: int = 2, name: str = "block") -> Plan:
    """Blocks of two convolutions with batch norms, summed, and a relu."""
    values: dict[str, Value] = {}
    nodes: list[Node] = []

    def value(label: str) -> str:
        values[label] = Value(label, (None, 8, 8, 4), "float32", (1, 8, 8, 4))
        return label

    def node(label: str, op: object, *inputs: str) -> str:
        cost = Cost(2304, 4096, 1)
        nodes.append(Node(label, op, inputs, (value(label),), cost, {label: 4}))  # type: ignore[arg-type]
        return label

    x = value(f"{name}/input")
    for index in range(blocks):
        terms = []
        for taps in (3, 1):
            windows = (same(taps, 1, 1, None),) * 2
            kernel = np.full((4, 4, taps, taps), 0.5)
            label = node(f"{name}{index}/conv{taps}", Affine(AffineConv(kernel, np.zeros(4), windows), 3), x)
            norm = batch_norm(np.ones(4), np.ones(4), 1e-3, axes=2)
            terms.append(node(f"{name}{index}/bn{taps}", Affine(norm, 3), label))
        total = node(f"{name}{index}/sum", Sum((1.0, 1.0)), *terms)
        x = node(f"{name}{index}/relu", Opaque("" if index else "a reason <b>"), total)
    return make_plan(Graph(values, tuple(nodes), (f"{name}/input",), (x,), 500), notes=(f"a note on {name}",))


def certificate(name: str = "block") -> Certificate:
    """One proved and one refuted region."""
    digests = Digests("00ff", "ff00")
    return Certificate(
        verdict=Verdict.REFUTED,
        sentence=f"not the same function: {name}1/sum",
        structure=(StructureResult(name, Verdict.PROVED, f"{name} is the same"),),
        regions=(
            RegionResult(f"{name}0/sum", "a", Verdict.PROVED, 0.9, 100, "all unit impulses", ("5x5",), ""),
            RegionResult(
                f"{name}1/sum", "b", Verdict.REFUTED, 99.0, 100, "all unit impulses", (), "a weight is off"
            ),
        ),
        local=(),
        end_to_end=(EndToEndResult("normal", name, Verdict.MEASURED, 1e-3, 1e-4, 1e-7, 1e-8, 9.0, True, None, ""),),
        before=digests,
        after=digests,
        seed=0,
        versions={},
    )


def proved(blocks: int = 2, name: str = "block") -> Certificate:
    """The certificate of :func:`plan`'s fold."""
    regions = tuple(
        RegionResult(
            f"{name}{i}/sum",
            f"{name}{i}/conv",
            Verdict.PROVED,
            0.9,
            144,
            "all unit impulses",
            ("4x3x3",),
            "the same",
        )
        for i in range(blocks)
    )
    ends = tuple(
        EndToEndResult(kind, name, Verdict.MEASURED, 2e-7, 1e-7, 3e-7, 1e-7, 0.8, True, 1.0, "")
        for kind in ("given", "normal", "zeros", "large")
    )
    return replace(
        certificate(name),
        verdict=Verdict.PROVED,
        sentence=f"the same function: {blocks} regions proved, everything else is unchanged",
        regions=regions,
        local=tuple(LocalResult(region.where, Verdict.PROVED, 1e-7, 0.05) for region in regions),
        end_to_end=ends,
    )


def timing() -> Timing:
    """Twice as fast."""
    return summarize([2.0, 2.2], [1.0, 1.1], batch=1, costs=(Cost(10, 10, 2), Cost(5, 5, 1)), parameters=(9, 4))
