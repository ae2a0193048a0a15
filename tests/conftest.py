"""Hypothesis draws the same examples in every run, unless HYPOTHESIS_PROFILE says otherwise."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("ci", derandomize=True, max_examples=60, deadline=None, database=None)
settings.register_profile("search", max_examples=2000, deadline=None)
settings.register_profile("wide", max_examples=300, deadline=None, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
