"""What must hold for two models to be one function: claims that a value of the second model equals one of
the original.

The outputs are claimed first. A claim about what paired operators give follows from claims about what
they read; a claim about a linear value is an affine region over the nearest counterparts, which are
claims themselves. Each claim speaks of earlier values than the one that needs it, so there is a first.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import final

import numpy as np

from refold.errors import InputError
from refold.frontend import AnyArray, unit_roundoff
from refold.graph.graph import Node, Opaque
from refold.proof.certificate import LocalResult, RegionResult, StructureResult, Verdict
from refold.proof.cone import Cone, cone, ranks
from refold.proof.digest import Keys, same_parameters
from refold.proof.local import local
from refold.proof.pairing import Pairing
from refold.proof.region import examine
from refold.proof.trial import Evidence, Link, Models, respond

Claim = tuple[str, str]  # a value of the second model, and the value of the original that it equals

# By so many roundings of the largest value two ways in float64 may differ whose weights were rounded, where nothing
# better is known.
_ROUNDINGS = 32


@final
@dataclass(frozen=True, eq=False)
class Finding:
    """What became of a claim: of an affine region, or of operators."""

    claim: Claim
    verdict: Verdict
    sentence: str = ""
    region: RegionResult | None = None
    link: Link | None = None
    evidence: Evidence | None = None

    @property
    def is_off_by_roundings(self) -> bool:
        """Whether an affine region differs by some roundings of its weights, and by nothing else."""
        return self.verdict is Verdict.MEASURED and self.evidence is not None and self.evidence.roundings


@final
@dataclass(eq=False)
class Claims:
    """All claims about two models."""

    models: Models
    keys: tuple[Keys, Keys]
    pairing: Pairing
    rng: np.random.Generator
    findings: dict[Claim, Finding] = field(default_factory=dict)
    required: set[Claim] = field(default_factory=set)
    doubtful: set[Claim] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.before, self.after = self.models.before.graph, self.models.after.graph
        self.rank = ranks(self.before), ranks(self.after)

    # ---- the order of proof ----------------------------------------------------------------------

    def prove(self) -> None:
        """Prove what the equality of the outputs needs, the earliest first."""
        outputs = list(zip(self.after.outputs, self.before.outputs, strict=True))
        self.required = {*outputs, *self.pairing.reads}
        waiting: list[Claim] = list(outputs)
        while waiting:
            claim = waiting[-1]
            needs = [need for need in self._needs(claim) if need not in self.findings]
            if claim in self.findings or not needs:
                waiting.pop()
                if claim not in self.findings:
                    self._settle(claim)
            else:
                waiting += needs

    def _needs(self, claim: Claim) -> list[Claim]:
        """The claims that this one stands on."""
        mine, theirs = claim
        if self._is_input_pair(claim) or self._is_constant_pair(claim):
            return []
        if self._is_same_operator(claim):
            nodes = self.after.producer[mine], self.before.producer[theirs]
            return list(zip(nodes[0].inputs, nodes[1].inputs, strict=True))
        link = self._link(claim, self.doubtful) or self._black_link(claim)
        return [] if link is None else self._leaf_claims(link)

    def _leaf_claims(self, link: Link) -> list[Claim]:
        return [(mine, original) for mine, theirs in link.leaves for original in theirs]

    def _is_input_pair(self, claim: Claim) -> bool:
        return claim in set(zip(self.after.inputs, self.before.inputs, strict=True))

    def _is_constant_pair(self, claim: Claim) -> bool:
        """Two outputs that nothing computes."""
        return all(
            name not in graph.producer and name not in graph.inputs
            for name, graph in zip(claim, (self.after, self.before), strict=True)
        )

    def _is_same_operator(self, claim: Claim) -> bool:
        nodes = self.after.producer.get(claim[0]), self.before.producer.get(claim[1])
        if nodes[0] is None or nodes[1] is None:
            return False
        if not isinstance(nodes[0].op, Opaque) or not isinstance(nodes[1].op, Opaque):
            return False
        return (
            len(nodes[0].inputs) == len(nodes[1].inputs)
            and all(
                theirs in self.pairing.counterparts.get(mine, ())
                for mine, theirs in zip(nodes[0].inputs, nodes[1].inputs, strict=True)
            )
            and nodes[0].outputs.index(claim[0]) == nodes[1].outputs.index(claim[1])
            and self.keys[1].of(nodes[0].name) == self.keys[0].of(nodes[1].name)
        )

    # ---- from a claim to a region ----------------------------------------------------------------

    def _allowed(self, claim: Claim, mine: str, avoid: Container[Claim]) -> tuple[str, ...]:
        """The counterparts of ``mine`` on which a claim may stand: the pairs before it."""
        if self.rank[1][mine] > self.rank[1][claim[0]]:
            return ()
        return tuple(
            original
            for original in self.pairing.counterparts.get(mine, ())
            if self.rank[0][original] <= self.rank[0][claim[1]]
            and self._rank((mine, original)) < self._rank(claim)
            and (mine, original) not in avoid
        )

    def _rank(self, claim: Claim) -> int:
        return self.rank[1][claim[0]] + self.rank[0][claim[1]]

    def _link(self, claim: Claim, avoid: Container[Claim], *, far: bool = False) -> Link | None:
        """The two ways to the values of a claim from the nearest counterparts, or (``far``) from those that
        no linear operator gives; None if there are none, or something on the way is not linear."""

        def nearest(name: str) -> bool:
            return bool(self._allowed(claim, name, avoid))

        def atoms(name: str) -> bool:
            return not self.after.is_linear(name) and nearest(name)

        ways = ((atoms, True),) if far else ((nearest, False), (nearest, True), (atoms, True))
        for stops, at_once in ways:
            after = cone(self.after, self.rank[1], claim[0], stops, at_once=at_once)
            partners = self._partners(claim, after, avoid)
            if partners is None or not after.is_linear:
                continue
            before = cone(self.before, self.rank[0], claim[1], partners.__contains__)
            if before.is_linear and all(leaf in partners for leaf in before.leaves):
                return Link(self._joined(claim, after, before, partners, avoid), before, after)
        return None

    def _partners(self, claim: Claim, after: Cone, avoid: Container[Claim]) -> dict[str, str] | None:
        """The leaf of the second model that stands for each value of the original; None if one has no
        counterpart."""
        best: dict[str, tuple[int, str]] = {}
        for leaf in after.leaves:
            allowed = self._allowed(claim, leaf, avoid)
            if not allowed:
                return None
            for place, original in enumerate(allowed):
                if original not in best or place < best[original][0]:
                    best[original] = place, leaf
        return {original: leaf for original, (_, leaf) in best.items()}

    def _joined(
        self, claim: Claim, after: Cone, before: Cone, partners: Mapping[str, str], avoid: Container[Claim]
    ) -> tuple[tuple[str, tuple[str, ...]], ...]:
        used: dict[str, list[str]] = {leaf: [] for leaf in after.leaves}
        for leaf in before.leaves:
            used[partners[leaf]].append(leaf)
        # A leaf that the original does not read still needs a value, and must have no influence.
        return tuple((leaf, tuple(found) or self._allowed(claim, leaf, avoid)[:1]) for leaf, found in used.items())

    def _black_link(self, claim: Claim) -> Link | None:
        """The way of the second model only, through whatever operators."""

        def nearest(name: str) -> bool:
            return bool(self._allowed(claim, name, self.doubtful))

        after = cone(self.after, self.rank[1], claim[0], nearest, at_once=False, black=True)
        leaves = tuple((leaf, self._allowed(claim, leaf, self.doubtful)[:1]) for leaf in after.leaves)
        return Link(leaves, Cone(claim[1], (), ()), after) if all(found for _, found in leaves) else None

    # ---- settling --------------------------------------------------------------------------------

    def _settle(self, claim: Claim) -> None:
        if self._is_input_pair(claim) or self._is_same_operator(claim):
            node = self.before.producer.get(claim[1])
            unseen = "" if node is None else self.keys[0].of(node.name).unseen
            self.findings[claim] = Finding(claim, Verdict.MEASURED if unseen else Verdict.PROVED, unseen)
            return
        if self._is_constant_pair(claim):
            self.findings[claim] = self._constants(claim)
            return
        link = self._link(claim, self.doubtful)
        finding = self._measured(claim) if link is None else self._examined(claim, link)
        # What is off by roundings is a counterpart all the same: two such in a row are not one wrong region.
        is_doubtful = finding.verdict is not Verdict.PROVED and not finding.is_off_by_roundings
        if is_doubtful and self.doubtful:
            # Perhaps the fault lies before a leaf that did not pass: then this region is right from there.
            finding = self._examined_again(claim, finding, self._link(claim, ()))
        if finding.verdict is not Verdict.PROVED and not finding.is_off_by_roundings:
            # Counterparts that linear operators give may depend on each other: r + x and r and x are not
            # three unknowns. What differs as a map of all three may be equal where it starts.
            finding = self._examined_again(claim, finding, self._link(claim, self.doubtful, far=True))
        self.findings[claim] = finding
        if is_doubtful and claim not in self.required:
            self.doubtful.add(claim)

    def _constants(self, claim: Claim) -> Finding:
        frontend = self.models.frontend
        mine, theirs = claim
        one = frontend.evaluate(self.models.before, {}, [theirs])[theirs]
        two = frontend.evaluate(self.models.after, {}, [mine])[mine]
        if same_parameters([one], [two]):
            return Finding(claim, Verdict.PROVED)
        return Finding(claim, Verdict.REFUTED, "a constant that is an output is not the same")

    def _examined(self, claim: Claim, link: Link) -> Finding:
        result, evidence = examine(self.models, link, self.rng)
        return Finding(claim, result.verdict, result.sentence, result, link, evidence)

    def _examined_again(self, claim: Claim, finding: Finding, link: Link | None) -> Finding:
        """What is proved over ``link`` instead of ``finding``, if it is."""
        if link is None or (finding.link is not None and link.leaves == finding.link.leaves):
            return finding
        again = self._examined(claim, link)
        return again if again.verdict is Verdict.PROVED else finding

    def _measured(self, claim: Claim) -> Finding:
        """Where no affine region can be cut out, compare on real values."""
        mine, theirs = claim
        nodes = self.after.producer.get(mine), self.before.producer.get(theirs)
        why = "it is computed in another way, through operators that are not linear"
        edited = False
        if nodes[0] and nodes[1] and isinstance(nodes[0].op, Opaque) and isinstance(nodes[1].op, Opaque):
            edited = self.keys[1].of(nodes[0].name).is_edit_of(self.keys[0].of(nodes[1].name))
            if edited:
                why = "its parameters were changed"
            elif self.keys[1].of(nodes[0].name) != self.keys[0].of(nodes[1].name):
                why = "its counterpart is another operator"
        link = self._black_link(claim)
        values = self.pairing.values
        try:
            if link is None:
                raise InputError("there is nothing to start from")
            batches = [values[originals[0]] for _, originals in link.leaves]
            with np.errstate(all="ignore"):
                seen = respond(self.models, link, batches, 1)
            one, two = values[theirs], seen[mine]
        except (InputError, KeyError):
            return Finding(claim, Verdict.SKIPPED, f"{why}, and nothing could be compared there", link=link)
        if one.shape != two.shape:
            return Finding(claim, Verdict.REFUTED, f"{why}, and gives another shape", link=link)
        error = _relative(one, two)
        if not error <= self._tolerance:
            sentence = f"{why}, and its values differ by {error:.3g} of the largest"
            return Finding(claim, Verdict.REFUTED, sentence, link=link)
        # The same inputs and other parameters: some input shows it, such as a row of a table that no random
        # index met. (Where the inputs differ as well, one may make up for the other.)
        if edited and nodes[0] and nodes[1] and self._reads_the_same(nodes[0], nodes[1], seen):
            return Finding(claim, Verdict.REFUTED, f"{why}, and it reads what the original reads", link=link)
        return Finding(claim, Verdict.MEASURED, f"{why}; on random inputs its values agree", link=link)

    @property
    def _tolerance(self) -> float:
        """What may differ where the stored weights were rounded, as a part of the largest value."""
        return _ROUNDINGS * max(self.pairing.u, unit_roundoff("float32"))

    def _reads_the_same(self, node: Node, other: Node, seen: Mapping[str, AnyArray]) -> bool:
        return all(
            mine in seen
            and theirs in self.pairing.values
            and seen[mine].shape == self.pairing.values[theirs].shape
            and _relative(self.pairing.values[theirs], seen[mine]) <= self._tolerance
            for mine, theirs in zip(node.inputs, other.inputs, strict=True)
        )

    # ---- results ---------------------------------------------------------------------------------

    def _used(self) -> Iterator[Finding]:
        """The findings that the outputs stand on, in the order of the original."""
        seen: set[Claim] = set()
        waiting: list[Claim] = list(zip(self.after.outputs, self.before.outputs, strict=True))
        while waiting:
            claim = waiting.pop()
            if claim in seen:
                continue
            seen.add(claim)
            finding = self.findings.get(claim)
            if finding is None:
                self._settle(claim)
                finding = self.findings[claim]
            if finding.link is not None:
                waiting += self._leaf_claims(finding.link)
            elif self._is_same_operator(claim):
                waiting += self._needs(claim)
        for claim in sorted(seen, key=lambda c: (self.rank[0][c[1]], self.rank[1][c[0]])):
            yield self.findings[claim]

    def structure(self) -> list[StructureResult]:
        """What is said about operators that are no regions."""
        found = list(self._used())
        same = [
            f for f in found if f.region is None and f.verdict is Verdict.PROVED and self._is_same_operator(f.claim)
        ]
        results = [
            StructureResult(f.claim[1], f.verdict, f"{f.sentence} (counterpart '{f.claim[0]}')")
            for f in found
            if f.region is None and f.verdict is not Verdict.PROVED
        ]
        given = [self.after.producer[f.claim[0]] for f in same]
        operators = {node.name for node in given if not (isinstance(node.op, Opaque) and node.op.enters)}
        kept = f"{len(operators)} operator{'' if len(operators) == 1 else 's'} not folded"
        return [
            StructureResult("interface", Verdict.PROVED, "the same inputs and outputs"),
            StructureResult(
                "operators", Verdict.PROVED, f"{kept}, with the same settings and byte for byte the same parameters"
            ),
            *results,
        ]

    def regions(self) -> list[RegionResult]:
        """The affine regions."""
        return [f.region for f in self._used() if f.region is not None]

    def local(self) -> list[LocalResult]:
        """The affine regions on real activations."""
        results = []
        for finding in self._used():
            if finding.region is None or finding.region.verdict is not Verdict.PROVED:
                continue
            assert finding.link is not None
            assert finding.evidence is not None
            try:
                found = local(self.models, finding.link, finding.evidence, self.pairing)
            except InputError:
                continue
            if found is not None:
                verdict: Verdict = Verdict.PROVED if found[1] <= 1.0 else Verdict.REFUTED
                results.append(LocalResult(finding.claim[1], verdict, *found))
        return results


def _relative(one: AnyArray, two: AnyArray) -> float:
    one, two = one.astype(np.float64, copy=False), two.astype(np.float64, copy=False)  # truths do not subtract
    finite = np.isfinite(one)
    if not np.array_equal(finite, np.isfinite(two)):
        return float("inf")
    size = float(np.max(np.abs(one[finite]), initial=0.0))
    gap = float(np.max(np.abs(one[finite] - two[finite]), initial=0.0))
    return 0.0 if gap == 0.0 else gap / max(size, np.finfo(np.float64).tiny)
