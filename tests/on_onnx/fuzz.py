"""Damaged ONNX files by the minute: every one is read, folded and proved, or refused in one sentence.

``python tests/on_onnx/fuzz.py --minutes 10 --seed 0``, or ``make fuzz``. A case is what a seed and a number make of
a file of the corpus. It runs in a process with limits of memory and time. What must not be:

- an error that is no sentence, or an end of the process, in ``inspect``, ``fold`` or ``prove``;
- more time or memory than a model of this size may take;
- a fold that computes something else than its original, wherever both run in ONNX's reference evaluator or in
  ONNX Runtime, or that the proof takes back; a certificate for two models that differ.

What was found is written to the folder ``--keep``: the file, and what happened. Exit status 1 if anything was.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from graphs import feeds_of, outputs_of, run
from models import ENTRIES
from mutations import damaged

MOST_SECONDS = 30.0  # of the processor, for one command; they take well below one
MOST_WALL = 120.0
MOST_BYTES = 2**31  # that a command may add to what the process has
ADDRESSES = 2**33  # of the process, so that nothing takes the machine's memory

# How far a fold's outputs may be from the original's, in roundings of the largest.
ROUNDINGS = 256


@dataclass(frozen=True)
class Finding:
    """What should not be."""

    what: str
    stage: str


def corpus() -> dict[str, tuple[bytes, float]]:
    """Files by name, with the unit roundoff of their weights."""
    return {entry.name: (entry.build().SerializeToString(), entry.u) for entry in ENTRIES}


def case(files: Mapping[str, tuple[bytes, float]], seed: int, number: int) -> tuple[str, bytes]:
    """The damaged file of that number, and the name of what it was."""
    rng = random.Random(f"{seed}:{number}")
    name = rng.choice(sorted(files))
    return name, damaged(files[name][0], rng)


# ---- one case ------------------------------------------------------------------------------------


def examine(data: bytes, clean: bytes, u: float, folder: Path, stage: Callable[[str], None]) -> list[Finding]:
    """What is wrong with what the commands make of a file. ``clean`` is the file before the damage; ``stage`` is
    told what is done next."""
    from refold.cli import main

    found: list[Finding] = []
    source, plain, whole = folder / "damaged.onnx", folder / "plain.onnx", folder / "clean.onnx"
    plain.unlink(missing_ok=True)
    source.write_bytes(data)
    whole.write_bytes(clean)

    def command(*arguments: Any) -> int:
        name = str(arguments[0])
        stage(name)
        start, memory = time.process_time(), _peak(reset=True)
        out, err = io.StringIO(), io.StringIO()
        try:
            with redirect_stdout(out), redirect_stderr(err):
                status = main([str(argument) for argument in arguments])
        except BaseException as error:  # whatever comes out of a command is a finding
            found.append(Finding(f"{type(error).__name__}: {error}"[:300], name))
            return 2
        taken = time.process_time() - start
        if taken > MOST_SECONDS:
            found.append(Finding(f"took {taken:.0f} s", name))
        grown = _peak() - memory
        if grown > MOST_BYTES:
            found.append(Finding(f"took {grown / 2**20:.0f} MiB", name))
        if "fault of refold" in err.getvalue():
            found.append(Finding(err.getvalue()[:300], name))
        if status == 2 and err.getvalue().count("\n") != 1:
            found.append(Finding(f"no sentence: {err.getvalue()[:300]}", name))
        return status

    command("inspect", source)
    status = command("fold", source, "-o", plain)
    if status == 1:
        found.append(Finding("the proof takes the fold back", "fold"))
    if plain.exists() is not (status == 0):
        found.append(Finding(f"exit status {status}, and a file is there: {plain.exists()}", "fold"))
    if status == 0:
        stage("running")
        gap = difference(source, plain, u)
        if gap is not None:
            found.append(Finding(f"the fold differs: {gap}", "fold"))
    if command("prove", whole, source) == 0:
        stage("running")
        gap = difference(whole, source, max(u, 1e-7))
        if gap is not None:
            found.append(Finding(f"proved, and differs: {gap}", "prove"))
    return found


def difference(one: Path, two: Path, u: float) -> str | None:
    """What differs between the outputs of two files on a random input; None if nothing does, or if the first
    does not run."""
    first, second = onnx.load(one), onnx.load(two)
    opsets = (*first.opset_import, *second.opset_import)
    old = any(opset.domain in ("", "ai.onnx") and opset.version < 15 for opset in opsets)
    for compute in (run,) if old else (outputs_of, run):
        try:
            feeds = feeds_of(first, 8)
            expected = compute(first, feeds)
        except Exception:  # a model that does not run says nothing
            continue
        try:
            found = compute(second, feeds)
        except Exception as error:  # whatever the reference evaluator raises
            return f"it does not run ({type(error).__name__}: {error})"[:300]
        return _gap(expected, found, u)
    return None


def _gap(expected: list[Any], found: list[Any], u: float) -> str | None:
    if len(expected) != len(found):
        return "other outputs"
    for place, (one, two) in enumerate(zip(expected, found, strict=True)):
        if one.shape != two.shape:
            return f"output {place} has the shape {two.shape} and not {one.shape}"
        if one.dtype.kind in "iub":
            if not np.array_equal(one, two):
                return f"output {place} has other numbers"
            continue
        one, two = one.astype("float64"), two.astype("float64")
        both = np.isfinite(one) & np.isfinite(two)
        if not both.all() and np.isfinite(one).all():
            return f"output {place} is not finite any more"
        scale = float(np.abs(one[both]).max(initial=0.0))
        error = float(np.abs(one[both] - two[both]).max(initial=0.0))
        if error > ROUNDINGS * u * scale + 1e-30:
            return f"output {place} is off by {error:.3g} of {scale:.3g}"
    return None


def _peak(*, reset: bool = False) -> int:
    """The most bytes of memory that this process had since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


# ---- a process for many cases --------------------------------------------------------------------


def _work(connection: Any, folder: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)  # runtimes print what they think of a model
    warnings.simplefilter("ignore")
    while True:
        data, clean, u = connection.recv()
        found = examine(data, clean, u, Path(folder), lambda stage: connection.send(("stage", stage)))
        connection.send(("found", found))


class Worker:
    """A process that examines cases, and is replaced where it does not come back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: Any = None

    def examine(self, data: bytes, clean: bytes, u: float) -> list[Finding]:
        if self.process is None or not self.process.is_alive():
            self._start()
        self.connection.send((data, clean, u))
        stage = "start"
        while True:
            if not self.connection.poll(MOST_WALL):
                self.stop()
                return [] if stage == "running" else [Finding(f"no end after {MOST_WALL:.0f} s", stage)]
            try:
                kind, told = self.connection.recv()
            except EOFError:
                self.process.join()
                status = self.process.exitcode
                self.stop()
                return [] if stage == "running" else [Finding(f"the process ended with {status}", stage)]
            if kind == "found":
                return list(told)
            stage = told

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, str(self.folder)), daemon=True)
        self.process.start()
        theirs.close()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


# ---- the command line ----------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=None, help="default: a new one each time, which is printed")
    parser.add_argument("--start", type=int, default=0, help="the number of the first case")
    parser.add_argument("--cases", type=int, default=None, help="stop after so many")
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"), help="where findings go")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed {seed}", flush=True)
    files = corpus()
    end, told = time.monotonic() + 60 * options.minutes, time.monotonic()
    number, findings = options.start, 0
    kinds: Counter[str] = Counter()
    folder = Path(tempfile.mkdtemp(prefix="refold-fuzz-"))
    worker = Worker(folder)
    try:
        while time.monotonic() < end and (options.cases is None or number < options.start + options.cases):
            name, data = case(files, seed, number)
            found = worker.examine(data, *files[name])
            for finding in found:
                findings += 1
                kinds[finding.what[:60]] += 1
                print(f"case {number} of {name}: {finding.stage}: {finding.what}", flush=True)
            if found:
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / f"{seed}-{number}.onnx").write_bytes(data)
                notes = {"seed": seed, "number": number, "corpus": name, "found": [vars(f) for f in found]}
                (options.keep / f"{seed}-{number}.json").write_text(json.dumps(notes, indent=1), encoding="utf-8")
            number += 1
            if time.monotonic() - told > 30:
                told = time.monotonic()
                print(f"... {number - options.start} cases, {findings} findings", flush=True)
    finally:
        worker.stop()
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{number - options.start} cases, {findings} findings", flush=True)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
