"""The answer of a law where it is not exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class Refusal:
    """A law does not hold here; ``reason`` says why, in words a user can act on.

    Laws return refusals, they never raise them: whoever asked decides what to do, and the plan
    prints the sentence.
    """

    reason: str
