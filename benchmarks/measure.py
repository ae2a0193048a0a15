"""What all benchmarks share: calls timed in turn, their spread, the machine, and where results go.

A benchmark is one script ``benchmarks/NAME.py`` that writes ``benchmarks/results/NAME.json``; what the documents
say about it is ``benchmarks/sections/NAME.py``, which reads nothing but that file.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from refold.bench import time_in_turn

RESULTS = Path(__file__).parent / "results"

Spread = dict[str, float]


def in_turn(calls: Mapping[str, Callable[[], Any]], *, repeats: int, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of each call, all called in turn (A B C A B C ...) after uncounted rounds."""
    seconds = time_in_turn(list(calls.values()), repeats=repeats, warmup=warmup)
    return dict(zip(calls, seconds, strict=True))


def spread(values: Sequence[float]) -> Spread:
    """The median and the quartiles."""
    low, median, high = (float(value) for value in np.percentile(values, [25, 50, 75]))
    return {"low": low, "median": median, "high": high}


def times_as_fast(first: Sequence[float], second: Sequence[float]) -> Spread:
    """How many times as fast the second is as the first: the spread over the pairs."""
    return spread([one / two for one, two in zip(first, second, strict=True)])


def environment(*packages: str) -> dict[str, Any]:
    """The machine, Python and the versions of the packages that were measured."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in packages},
    }


def read(name: str) -> dict[str, Any]:
    """The results of the benchmark ``name`` as they were written last; empty where there are none."""
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def write(name: str, result: Mapping[str, Any]) -> None:
    """Write the results of the benchmark ``name``."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


def on_one_and_all_processors(script: str, measure: Callable[[], Any]) -> dict[str, Any]:
    """What ``measure`` gives in a process of its own with one processor (``"one"``), and with all (``"all"``).

    ``script`` is the calling file, which is run again for that; frameworks size their pools of threads when they
    are loaded, by the processors that a process may use. Where a system cannot limit them (only Linux can here),
    both are measured with all.
    """
    if sys.argv[1:2] == ["--measure"]:
        Path(sys.argv[2]).write_text(json.dumps(measure()), encoding="utf-8")
        sys.exit(0)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for label in ("one", "all"):
            print(f"== {label} processor{'s' if label == 'all' else ''}", flush=True)
            path = Path(folder) / label
            subprocess.run(
                [sys.executable, script, "--measure", str(path)],
                check=True,
                preexec_fn=keep_one_processor if label == "one" else None,
                env={**os.environ, **({"OMP_NUM_THREADS": "1"} if label == "one" else {})},
            )
            found[label] = json.loads(path.read_text(encoding="utf-8"))
    return found


def keep_one_processor() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
