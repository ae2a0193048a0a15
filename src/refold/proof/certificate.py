"""The certificate as data: verdicts, results, JSON, and the table that people read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from importlib.resources import files
from typing import Any, final

from refold.shown import notebook_table, notebook_view, printable

SCHEMA = "refold.certificate/1"


class Verdict(StrEnum):
    """What the evidence amounts to, for one place or for the whole."""

    PROVED = "proved"
    MEASURED = "measured"
    REFUTED = "refuted"
    SKIPPED = "skipped"


# From good to bad: the verdict on several things is the worst one of them.
_ORDER = (Verdict.PROVED, Verdict.SKIPPED, Verdict.MEASURED, Verdict.REFUTED)

ASSUMPTIONS = (
    "Arithmetic is IEEE 754 with rounding to nearest.",
    "The reference is made of the framework's own operators in float64; they compute what their names say.",
    "An operator that was not folded computes the same function in both models if its settings and "
    "parameters are the same.",
    "An operator through which factors and shifts per channel pass lets them pass at every size and for all "
    "numbers; those that were used were tried out on random ones.",
    "The sizes of borders are those that the neutral graph says; each region is also run on real activations "
    "at its real size.",
    "The proof is about the functions with real numbers and the stored weights. How the runtime rounds "
    "(TF32, Winograd, fused kernels) shows in the end-to-end errors only.",
)


TONES = {Verdict.PROVED: "good", Verdict.MEASURED: "warn", Verdict.REFUTED: "bad", Verdict.SKIPPED: "warn"}


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of several verdicts; of none, proved."""
    return max(verdicts, key=_ORDER.index, default=Verdict.PROVED)


@final
@dataclass(frozen=True, slots=True)
class StructureResult:
    """Something about the interface or an operator that is no region: ``where`` in the original."""

    where: str
    verdict: Verdict
    sentence: str


@final
@dataclass(frozen=True, slots=True)
class RegionResult:
    """Whether a tensor of the original and its counterpart are the same affine function of the nearest
    tensors that were matched before.

    ``ratio`` is the worst ``|dW| / (u |W| + float64 terms)`` over all weights and biases: at most 1 if
    every weight is the exact one, rounded once. None where nothing was compared.
    """

    where: str
    counterpart: str
    verdict: Verdict
    ratio: float | None
    impulses: int
    method: str
    sizes: tuple[str, ...]
    sentence: str


@final
@dataclass(frozen=True, slots=True)
class LocalResult:
    """A region on real activations at its real size, in float64: the largest error, and its worst ratio to
    a bound that holds for every input (``u (sum|W| max|x| + |b|)``, so usually far above the error)."""

    where: str
    verdict: Verdict
    error: float
    ratio: float


@final
@dataclass(frozen=True, slots=True)
class EndToEndResult:
    """One output on one set of inputs, both models as they ship, against the original in float64.

    ``ratio`` is the RMS error of the second model by that of the original (or by a few roundings of the
    output, if the original's own is less). Without a reference, ``max_error`` and ``rms_error`` are
    the differences between the two models. ``top1`` is the share of rows with the same largest entry, where
    the output looks like classes.
    """

    inputs: str
    output: str
    verdict: Verdict
    max_error: float
    rms_error: float
    original_max_error: float | None
    original_rms_error: float | None
    ratio: float
    finite_alike: bool
    top1: float | None
    sentence: str


@final
@dataclass(frozen=True, slots=True)
class Digests:
    """SHA-256 of a model's parameters and of its structure, in hexadecimal."""

    parameters: str
    structure: str


@final
@dataclass(frozen=True, slots=True)
class Certificate:
    """The evidence that two models are one function. ``verdict`` sums it up; ``ok`` is False when
    anything is off. ``str`` of it is a table, ``to_json`` is plain data."""

    verdict: Verdict
    sentence: str
    structure: tuple[StructureResult, ...]
    regions: tuple[RegionResult, ...]
    local: tuple[LocalResult, ...]
    end_to_end: tuple[EndToEndResult, ...]
    before: Digests
    after: Digests
    seed: int
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = field(default=ASSUMPTIONS)

    @property
    def ok(self) -> bool:
        """Whether the two models may be taken for the same function."""
        return self.verdict in (Verdict.PROVED, Verdict.MEASURED)

    def to_json(self) -> dict[str, Any]:
        """The certificate as plain data. Numbers that JSON does not have are strings."""
        return {"schema": SCHEMA, "ok": self.ok, **_plain(asdict(self))}

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> Certificate:
        """The certificate that :meth:`to_json` wrote. Raises ValueError for anything else."""
        found: Any = json.loads(data) if isinstance(data, str) else data
        if not isinstance(found, Mapping) or found.get("schema") != SCHEMA:
            raise ValueError(f"not a certificate of the schema {SCHEMA}")
        try:
            certificate = cls(
                verdict=Verdict(found["verdict"]),
                sentence=found["sentence"],
                structure=tuple(StructureResult(**_numbers(entry)) for entry in found["structure"]),
                regions=tuple(
                    RegionResult(**{**_numbers(entry), "sizes": tuple(entry["sizes"])})
                    for entry in found["regions"]
                ),
                local=tuple(LocalResult(**_numbers(entry)) for entry in found["local"]),
                end_to_end=tuple(EndToEndResult(**_numbers(entry)) for entry in found["end_to_end"]),
                before=Digests(**found["before"]),
                after=Digests(**found["after"]),
                seed=found["seed"],
                versions=dict(found["versions"]),
                notes=tuple(found["notes"]),
                assumptions=tuple(found["assumptions"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a whole certificate: {error}") from error
        if found.get("ok") != certificate.ok or not _follows(certificate):
            raise ValueError("the certificate contradicts itself")
        if type(certificate.seed) is not int or certificate.seed < 0:
            raise ValueError("the seed of a certificate is a number that is not negative")
        return certificate

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def _repr_html_(self) -> str:
        """For notebooks."""
        regions = [
            (r.where, r.verdict, _number(r.ratio), f"{r.impulses:,}", r.method) for r in _worst_first(self.regions)
        ]
        off = [(s.where, s.verdict, s.sentence) for s in self.structure if s.verdict is not Verdict.PROVED]
        off += [(r.where, r.verdict, r.sentence) for r in self.regions if r.verdict is not Verdict.PROVED]
        ends = [
            (r.inputs, r.output, _number(r.original_max_error), _number(r.max_error), r.verdict)
            for r in self.end_to_end
        ]
        head = ("region", "verdict", "worst/allowed", "impulses", "method")
        errors = ("inputs", "output", "original's error", "error", "verdict")
        return notebook_view(
            TONES[self.verdict],
            self.verdict.upper(),
            f"{self.sentence[:1].upper()}{self.sentence[1:]}.",
            [
                notebook_table("What is off, or could not be shown", ("where", "verdict", "why"), off),
                notebook_table(f"{len(self.regions)} regions", head, regions, numbers=(2, 3)),
                notebook_table("End to end, against the original in float64", errors, ends, numbers=(2, 3)),
            ],
        )


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of what :meth:`Certificate.to_json` gives."""
    text = files("refold.proof").joinpath("certificate.schema.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def _follows(certificate: Certificate) -> bool:
    """Whether the verdict is what the results amount to."""
    places = (certificate.structure, certificate.regions, certificate.local)
    inner = worst(worst(entry.verdict for entry in entries) for entries in places)
    everything = worst([inner, *(entry.verdict for entry in certificate.end_to_end)])
    refuted = Verdict.REFUTED in (inner, everything)
    if refuted or certificate.verdict is Verdict.REFUTED:
        return refuted and certificate.verdict is Verdict.REFUTED
    if certificate.verdict is Verdict.MEASURED and not certificate.end_to_end:
        return False
    return (certificate.verdict is Verdict.PROVED) == (inner is Verdict.PROVED)


_NOT_IN_JSON = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}
_FLOATS = ("ratio", "error", "max_error", "rms_error", "original_max_error", "original_rms_error", "top1")


def _plain(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    if isinstance(data, float) and (data != data or data in (float("inf"), float("-inf"))):
        return str(data)
    return data


def _numbers(entry: Mapping[str, Any]) -> dict[str, Any]:
    found = {
        key: _NOT_IN_JSON.get(value, value) if key in _FLOATS and isinstance(value, str) else value
        for key, value in entry.items()
    }
    return {**found, "verdict": Verdict(entry["verdict"])}


# ---- the table -----------------------------------------------------------------------------------

_MOST_ROWS = 40


def _lines(certificate: Certificate) -> Iterable[str]:
    yield f"{certificate.verdict.upper()}: {printable(certificate.sentence, 400)}"
    for result in certificate.structure:
        yield f"  structure  {result.verdict:<9} {printable(result.where)}: {printable(result.sentence)}"
    if certificate.regions:
        yield ""
        rows = [
            (r.where, r.counterpart, r.verdict, _number(r.ratio), f"{r.impulses:,}", r.method)
            for r in _worst_first(certificate.regions)
        ]
        head = ("region", "counterpart", "verdict", "worst/allowed", "impulses", "method")
        yield from _table(head, rows)
        for region in certificate.regions:
            if region.verdict is not Verdict.PROVED:
                yield f"  {region.verdict} at {printable(region.where)}: {printable(region.sentence)}"
    if certificate.local:
        worst_local = max(certificate.local, key=lambda r: r.ratio if r.ratio == r.ratio else float("inf"))
        yield ""
        yield (
            f"  on real activations: {len(certificate.local)} regions, largest error/bound "
            f"{_number(worst_local.ratio)} at {printable(worst_local.where)}"
        )
    if certificate.end_to_end:
        yield ""
        ends = [
            (
                r.inputs,
                r.output,
                r.verdict,
                _number(r.max_error),
                _number(r.original_max_error),
                _number(r.ratio),
                "yes" if r.finite_alike else "NO",
                "" if r.top1 is None else f"{r.top1:.1%}",
            )
            for r in certificate.end_to_end
        ]
        titles = ("inputs", "output", "verdict", "max error", "original's", "rms ratio", "finite alike", "top-1")
        yield from _table(titles, ends)
        for end in certificate.end_to_end:
            if end.sentence:
                yield f"  {end.inputs}, {printable(end.output)}: {printable(end.sentence)}"
    yield ""
    yield from (f"  note: {printable(note)}" for note in certificate.notes)
    for name, digests in (("before", certificate.before), ("after", certificate.after)):
        yield f"  {name + ':':<7} parameters {digests.parameters[:16]}, structure {digests.structure[:16]}"
    versions = ", ".join(f"{name} {version}" for name, version in certificate.versions.items())
    yield f"  seed {certificate.seed}; {versions}"
    yield from (f"  assumed: {line}" for line in certificate.assumptions)


def _worst_first(regions: Sequence[RegionResult]) -> Sequence[RegionResult]:
    if len(regions) <= _MOST_ROWS:
        return regions
    return sorted(regions, key=lambda r: (-_ORDER.index(r.verdict), -(r.ratio or 0.0)))[:_MOST_ROWS]


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterable[str]:
    cells = [head, *(tuple(printable(cell, 80) for cell in row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    for row in cells:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
