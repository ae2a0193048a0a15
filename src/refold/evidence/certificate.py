"""The certificate: the evidence that two models are one function, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum, StrEnum
from typing import Any, final

SCHEMA = "refold.certificate/1"

ASSUMPTIONS = (
    "floating-point arithmetic is IEEE 754 with rounding to nearest",
    "the float64 reference is made of the framework's own operators",
    "operators that are not linear compute the same if their kind, settings and parameters are equal",
    "the linear operators of the framework treat all positions of a tensor alike, but for its borders",
)


class Verdict(StrEnum):
    """What the evidence amounts to, for one region or for the whole."""

    PROVED = "proved"
    MEASURED = "measured"
    REFUTED = "refuted"
    SKIPPED = "skipped"


@final
@dataclass(frozen=True, slots=True)
class RegionResult:
    """The proof that one tensor of both models is the same affine function of the tensors before it.

    ``worst`` is the largest deviation of a weight as a share of what rounding it once allows; ``method``
    says what was fed in, ``probes`` how many inputs that were, ``sizes`` at which spatial sizes. ``local``
    is the largest deviation on real activations, relative to the largest number there.
    """

    where: str
    counterpart: str
    verdict: Verdict
    reason: str = ""
    worst: float = 0.0
    method: str = ""
    probes: int = 0
    sizes: tuple[tuple[int, ...], ...] = ()
    local: float | None = None


@final
@dataclass(frozen=True, slots=True)
class EndToEnd:
    """Both whole models on one kind of input, against the original in float64.

    Errors are the largest (and the root mean square) over all outputs, divided by the largest output;
    None where there is no float64 reference, and ``reason`` says why. ``difference`` is that between the
    two models. ``finite`` says that both have their infinities and NaNs in the same places.
    """

    inputs: str
    original: float | None
    folded: float | None
    original_rms: float | None
    folded_rms: float | None
    difference: float
    finite: bool
    same_top: float | None = None
    reason: str = ""

    @property
    def ratio(self) -> float | None:
        """Error of the folded model over that of the original (both at least one rounding)."""
        if self.original_rms is None or self.folded_rms is None:
            return None
        floor = 1e-9
        return max(self.folded_rms, floor) / max(self.original_rms, floor)


@final
@dataclass(frozen=True)
class Certificate:
    """Are two models the same function? ``verdict`` says it, ``ok`` in one bit; the rest is the evidence.

    ``structure`` lists what is different about the two graphs where they had to be equal, ``unmatched``
    the operators without a counterpart. ``digests`` identify the two models.
    """

    verdict: Verdict
    ok: bool
    structure: tuple[str, ...]
    unmatched: tuple[str, ...]
    regions: tuple[RegionResult, ...]
    end_to_end: tuple[EndToEnd, ...]
    matched: int = 0
    digests: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """The certificate as plain data."""
        return {"schema": SCHEMA, "assumptions": list(ASSUMPTIONS), **_plain(asdict(self))}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Certificate:
        """The certificate of :meth:`to_json`. Raises ValueError if ``data`` is not one."""
        if data.get("schema") != SCHEMA:
            raise ValueError(f"this is not a certificate of the schema {SCHEMA}")
        try:
            return cls(
                verdict=Verdict(data["verdict"]),
                ok=bool(data["ok"]),
                structure=tuple(data["structure"]),
                unmatched=tuple(data["unmatched"]),
                regions=tuple(
                    RegionResult(
                        **{
                            **region,
                            "verdict": Verdict(region["verdict"]),
                            "sizes": tuple(tuple(size) for size in region["sizes"]),
                        }
                    )
                    for region in data["regions"]
                ),
                end_to_end=tuple(EndToEnd(**entry) for entry in data["end_to_end"]),
                matched=int(data["matched"]),
                digests=dict(data["digests"]),
                versions=dict(data["versions"]),
                seed=int(data["seed"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"this certificate is damaged: {error}") from error

    @property
    def worst(self) -> float:
        """The largest deviation of any weight, as a share of one rounding."""
        return max((region.worst for region in self.regions), default=0.0)

    def __str__(self) -> str:
        lines = [self.sentence]
        lines += [f"  different: {line}" for line in self.structure]
        lines += [f"  no counterpart: {line}" for line in self.unmatched]
        if self.regions:
            lines.append(f"  {'tensor':<36} {'verdict':<9} {'deviation':>10}  evidence")
        for region in self.regions:
            evidence = region.reason or f"{region.probes:,} {region.method}"
            lines.append(f"  {region.where:<36} {region.verdict.value:<9} {region.worst:>10.3f}  {evidence}")
        if self.end_to_end:
            lines.append(f"  {'inputs':<18} {'error before':>13} {'error after':>13} {'difference':>11}")
        for entry in self.end_to_end:
            before = "-" if entry.original is None else f"{entry.original:.2e}"
            after = "-" if entry.folded is None else f"{entry.folded:.2e}"
            note = "" if entry.finite else "  not finite in the same places"
            note += f"  {entry.reason}" if entry.reason else ""
            lines.append(f"  {entry.inputs:<18} {before:>13} {after:>13} {entry.difference:>11.2e}{note}")
        return "\n".join(lines)

    @property
    def sentence(self) -> str:
        """The verdict in one sentence."""
        regions = len(self.regions)
        match self.verdict:
            case Verdict.PROVED:
                return (
                    f"PROVED: the same function. {self.matched} operators are identical, and {regions} linear "
                    f"regions equal the original's with every weight rounded once "
                    f"(largest deviation {self.worst:.3f} of that)."
                )
            case Verdict.MEASURED if self.ok:
                return "MEASURED: the same to rounding on all inputs tried; not every part could be proved."
            case Verdict.REFUTED:
                wrong = [region.where for region in self.regions if region.verdict is Verdict.REFUTED]
                at = f", first at {wrong[0]}" if wrong else ""
                return f"REFUTED: not the same function{at}."
            case _:
                return "NOT SHOWN: the models differ by more than rounding, or nothing could be compared."


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
