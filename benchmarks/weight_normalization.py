"""What normalizing the weights of one layer costs: its step, forward and backward, against the plain layer.

Run with ``make bench-weights``, or ``weight_normalization.py SECTION [ROUNDS]`` for one framework (a section),
which keeps what is known of the others. Each section is a process of its own on one processor. All forms of a
layer run in turn (A B C ... A B C ...) after uncounted rounds; a ratio is the median, over the rounds, of the
seconds of a form over those of the plain layer of the same library. Writes
``benchmarks/results/weight_normalization.json``.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

SECTIONS = {
    "torch": "normalized.on_torch",
    "keras-jax": "normalized.on_keras",
    "keras-tensorflow": "normalized.on_keras",
    "keras-torch": "normalized.on_keras",
    "paddle": "normalized.on_paddle",
}


def _measured(section: str, rounds: int) -> list[dict[str, Any]]:
    from measure import in_turn, spread, times_as_fast
    from normalized.form import LAYERS

    module = import_module(SECTIONS[section])
    rows = []
    for layer in LAYERS:
        row: dict[str, Any] = {"layer": layer.name}
        for mode in module.MODES:
            forms = module.forms(layer, compiled=mode == "compiled")
            seconds = in_turn({form.name: form.step for form in forms}, repeats=rounds, warmup=5)
            row[mode] = {
                form.name: {
                    "method": form.method,
                    "over": times_as_fast(seconds[form.name], seconds[form.plain]),
                    "seconds": spread(seconds[form.name])["median"],
                }
                for form in forms
            }
            print(layer.name, mode, flush=True)
            for name, found in row[mode].items():
                over = found["over"]
                shown = f"{over['median']:.3f} ({over['low']:.2f} to {over['high']:.2f})"
                print(f"  {name:40} {shown} {1000 * found['seconds']:8.3f} ms", flush=True)
        rows.append(row)
    return rows


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in SECTIONS:
        print(f"say which of {', '.join(SECTIONS)}, and perhaps how many rounds", file=sys.stderr)
        return 2
    section, rounds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 60
    # Frameworks size their pools of threads when they are loaded.
    os.environ["OMP_NUM_THREADS"] = "1"
    if section.startswith("keras-"):
        os.environ["KERAS_BACKEND"] = section.removeprefix("keras-")
    import measure

    measure.keep_one_processor()
    rows = _measured(section, rounds)
    packages = import_module(SECTIONS[section]).PACKAGES
    known = measure.read("weight_normalization").get("sections", {})
    found = {section: {**measure.environment(*packages), "rounds": rounds, "rows": rows}}
    sections = {name: {**known, **found}[name] for name in SECTIONS if name in known or name in found}
    measure.write("weight_normalization", {"sections": sections})
    return 0


if __name__ == "__main__":
    sys.exit(main())
