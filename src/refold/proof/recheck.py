"""A stored certificate, checked again: are these the models it speaks of, and does a new proof say the same?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

from refold.proof.certificate import Certificate, Digests, Verdict

SCHEMA = "refold.recheck/1"

# By so much another machine's rounding does not change what part of its bound a weight takes, which is computed in
# float64; and not by so many times an error of whole models as they ship.
_APART = 0.05
_TIMES = 16


@final
@dataclass(frozen=True, slots=True)
class Recheck:
    """What came out of checking a certificate again.

    ``changes`` are sentences on what is not as it was certified: other models, other verdicts. ``remarks`` are
    differences that change nothing: other versions of the software, inputs that were not given again.
    ``certificate`` is the new proof.
    """

    changes: tuple[str, ...]
    remarks: tuple[str, ...]
    certificate: Certificate

    @property
    def agrees(self) -> bool:
        """Whether the new proof says what the stored one says, of the same models."""
        return not self.changes

    @property
    def ok(self) -> bool:
        """Whether the certificate holds, and the two models may be taken for the same function."""
        return self.agrees and self.certificate.ok

    def to_json(self) -> dict[str, Any]:
        """The outcome as plain data, with the new certificate."""
        return {
            "schema": SCHEMA,
            "ok": self.ok,
            "agrees": self.agrees,
            "changes": list(self.changes),
            "remarks": list(self.remarks),
            "certificate": self.certificate.to_json(),
        }

    def __str__(self) -> str:
        head = "the certificate holds" if self.agrees else "the certificate does not hold for these models"
        lines = [f"{head}: {self.certificate.verdict}, {self.certificate.sentence}"]
        lines += [f"  changed: {line}" for line in self.changes]
        lines += [f"  remark: {line}" for line in self.remarks]
        return "\n".join(lines)


def compare(stored: Certificate, again: Certificate) -> Recheck:
    """What a new certificate, made with the seed of a stored one, says that the stored one does not.

    Models are compared by their digests, results by their verdicts. Numbers may differ from one machine to the
    next, and each of them was held to its bound anew: those that are quite other ones are remarked upon.
    """
    changes = [*_models(stored, again), *_verdicts(stored, again)]
    return Recheck(tuple(changes), tuple(_remarks(stored, again)), again)


def _models(stored: Certificate, again: Certificate) -> Iterator[str]:
    pairs: Sequence[tuple[str, Digests, Digests]] = (
        ("original", stored.before, again.before),
        ("other model", stored.after, again.after),
    )
    for name, old, new in pairs:
        for part, digest in asdict(new).items():
            known = getattr(old, part)
            if known != digest:
                yield f"the {part} of the {name}: {known[:16]} was certified, this has {digest[:16]}"


def _verdicts(stored: Certificate, again: Certificate) -> Iterator[str]:
    if stored.verdict is not again.verdict:
        yield f"the verdict: it was {stored.verdict}, now it is {again.verdict} ({again.sentence})"
    for what in ("structure", "regions", "local", "end_to_end"):
        old, new = (_by_place(certificate, what) for certificate in (stored, again))
        for place in dict.fromkeys([*old, *new]):
            if place[0] == "given":
                continue
            one, two = old.get(place), new.get(place)
            if one is not two:
                where = " of ".join(reversed([part for part in place if part]))
                yield f"{what.replace('_', ' ')}, {where}: {_said(one, 'it was')}, {_said(two, 'now it is')}"


def _by_place(certificate: Certificate, what: str) -> dict[tuple[str, str], Verdict]:
    if what == "end_to_end":
        return {(entry.inputs, entry.output): entry.verdict for entry in certificate.end_to_end}
    return {("", entry.where): entry.verdict for entry in getattr(certificate, what)}


def _said(verdict: Verdict | None, words: str) -> str:
    return f"{words} {'not there' if verdict is None else verdict}"


def _remarks(stored: Certificate, again: Certificate) -> Iterator[str]:
    others = [
        f"{name} {stored.versions.get(name, 'not known')} (now {again.versions.get(name, 'not used')})"
        for name in dict.fromkeys([*stored.versions, *again.versions])
        if stored.versions.get(name) != again.versions.get(name)
    ]
    if others:
        yield f"it was made with other versions: {', '.join(others)}"
    given = [{entry.inputs for entry in certificate.end_to_end} & {"given"} for certificate in (stored, again)]
    yield from _other_numbers(stored, again)
    if given[0] and not given[1]:
        yield "it was measured on inputs that were given; they were not given again"


def _other_numbers(stored: Certificate, again: Certificate) -> Iterator[str]:
    for what in ("regions", "local"):
        known = {entry.where: entry.ratio for entry in getattr(stored, what)}
        for entry in getattr(again, what):
            one, two = known.get(entry.where), entry.ratio
            if one is not None and two is not None and abs(one - two) > _APART:
                yield f"{what}, {entry.where}: it was {one:.3g} of what is allowed, now it is {two:.3g}"
    errors = {(entry.inputs, entry.output): entry.max_error for entry in stored.end_to_end}
    for entry in again.end_to_end:
        one, two = errors.get((entry.inputs, entry.output), entry.max_error), entry.max_error
        if entry.inputs != "given" and max(one, two) > _TIMES * min(one, two):
            where = f"{entry.output} of {entry.inputs}"
            yield f"end to end, {where}: the largest error was {one:.2g}, now it is {two:.2g}"
