"""What checks of equality find, and what they cost: refold's certificate and its peers.

Run with ``make bench-certificate``. Three parts, each of which can be run alone (``certificates.py catalogue``):

- ``catalogue``: every checker, at its own defaults, on the right and wrong folds of ``benchmarks/catalogue``. The
  peers for ONNX get both models as torch exports them. ``certify`` of onnxsim, which may take minutes for a
  network, gets seconds for each; and the range of the inputs, without which an input so large that roundings of
  the weights show counts as a difference (its command line calls that unproven).
- ``time``: a proof beside one forward pass of the trained form, over depth and width.
- ``certify``: onnxsim's ``certify`` on one convolution with a batch norm and a ReLU, over its width.

Writes ``benchmarks/results/certificates.json``.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")  # numpy reads it once: one thread

import numpy as np
import onnx
import onnxsim.certify
import onnxsim.model_checking
import onnxslim.utils
import torch
from catalogue import Case, faults, published, random_right, right
from catalogue.nets import RepBlock, conv_of, folded_stack, image, normed, stack, trained
from measure import RESULTS, environment, in_turn, spread, write
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.comparator import Comparator, CompareFunc
from polygraphy.logger import G_LOGGER

import refold
from refold.frontend import frontend_of
from refold.graph.formula import Formulas
from refold.proof.prove import prove

RANDOM_RIGHT = 40
REPEATS = 3  # of a proof
CERTIFY_SECONDS = 1
CERTIFY_ALONE_SECONDS = 100
CERTIFY_RANGE = 5.0
# Blocks, channels, and the side of the image.
NETWORKS = ((4, 8, 32), (50, 8, 32), (4, 64, 32), (50, 64, 32), (4, 256, 28))
WIDE = ((4, 512, 28), (2, 1024, 28), (2, 2048, 28))
DEEP = ((200, 8, 32), (200, 64, 32))

FORK = multiprocessing.get_context("fork")

Pair = tuple[onnx.ModelProto, onnx.ModelProto]


# ---- checkers: True for "equal", False for "different", None for "cannot tell" ------------------------


def by_refold(case: Case, _: Pair | None) -> bool | None:
    verdict = refold.prove(case.before, case.after, case.example).verdict
    return {"proved": True, "refuted": False}.get(str(verdict))


def by_torch(case: Case, _: Pair | None) -> bool | None:
    with torch.no_grad():
        try:
            torch.testing.assert_close(case.after(case.example), case.before(case.example))
        except AssertionError:
            return False
    return True


def by_onnxslim(_: Case, pair: Pair | None) -> bool | None:
    if pair is None:
        return None
    inputs, expected, _model = onnxslim.utils.check_onnx(pair[0])
    found, _model = onnxslim.utils.onnxruntime_inference(pair[1], inputs)
    return bool(onnxslim.utils.check_result(expected, found))


def by_onnxsim(_: Case, pair: Pair | None) -> bool | None:
    return None if pair is None else bool(onnxsim.model_checking.compare(pair[1], pair[0], verbose=False))


def by_polygraphy(_: Case, pair: Pair | None) -> bool | None:
    if pair is None:
        return None
    runners = [OnnxrtRunner(SessionFromOnnx(model.SerializeToString())) for model in pair]
    return bool(Comparator.compare_accuracy(Comparator.run(runners), compare_func=CompareFunc.simple()))


def by_certify(_: Case, pair: Pair | None) -> bool | None:
    if pair is None:
        return None
    return certified(pair, CERTIFY_SECONDS)


def certified(pair: Pair, seconds: int) -> bool | None:
    """What onnxsim's ``certify`` says; in a process of its own, for not all that it does heeds its time limit."""
    queue = FORK.SimpleQueue()

    def certify() -> None:
        report = onnxsim.certify.certify(
            *pair,
            input_ranges={"x": (-CERTIFY_RANGE, CERTIFY_RANGE)},
            total_timeout_ms=1000 * seconds,
            timeout_ms=1000 * seconds,
        )
        queue.put(True if report.ok else False if any(w.counterexample for w in report.windows) else None)

    process = FORK.Process(target=certify)
    process.start()
    process.join(2 * seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
    return None if queue.empty() else queue.get()


CHECKERS: Mapping[str, Callable[[Case, Pair | None], bool | None]] = {
    "refold.prove": by_refold,
    "torch.testing.assert_close": by_torch,
    "onnxslim --model-check": by_onnxslim,
    "onnxsim check": by_onnxsim,
    "polygraphy": by_polygraphy,
    "onnxsim certify": by_certify,
}


def exported(case: Case) -> Pair | None:
    """Both models as ONNX; None where torch cannot export one of them."""
    pair = []
    for model in (case.before, case.after):
        buffer = io.BytesIO()
        try:
            torch.onnx.export(
                model, (case.example,), buffer, dynamo=False, do_constant_folding=False, input_names=["x"],
                output_names=["y"], training=torch.onnx.TrainingMode.PRESERVE,
            )  # fmt: skip
        except Exception as error:  # whatever torch's exporter raises
            print(f"{case.name}: {error}")
            return None
        pair.append(onnx.load_from_string(buffer.getvalue()))
    return pair[0], pair[1]


def catalogue() -> dict[str, Any]:
    """How often each checker is right, on each kind of case."""
    kinds: Mapping[str, Sequence[Case]] = {
        "right folds": right(),
        "random right folds": [random_right(seed) for seed in range(RANDOM_RIGHT)],
        "right folds with one fault": faults(),
        "wrong folds of published code": published(),
    }
    found: dict[str, Any] = {}
    for kind, cases in kinds.items():
        rows: dict[str, Any] = {name: {"mistaken": [], "open": []} for name in CHECKERS}
        for case in cases:
            pair = exported(case)
            for name, checker in CHECKERS.items():
                try:
                    answer = checker(case, pair)
                except Exception as error:  # whatever a peer raises: it gives no answer
                    print(f"{case.name}: {name}: {error}")
                    answer = None
                if answer is None:
                    rows[name]["open"].append(case.name)
                elif answer is not case.equal:
                    rows[name]["mistaken"].append(case.name)
        found[kind] = {"cases": len(cases), "checkers": rows}
        print(
            kind, len(cases), {name: (len(r["mistaken"]), len(r["open"])) for name, r in rows.items()}, flush=True
        )
    return found


# ---- time ----------------------------------------------------------------------------------------------


def timed(networks: Sequence[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """A proof beside one forward pass of the trained form."""
    rows = []
    for depth, width, side in networks:
        model = trained(stack([RepBlock(3, width), *(RepBlock(width, width) for _ in range(depth - 1))]), seed=0)
        folded, x = folded_stack(model), torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            forward = in_turn({"forward": partial(model, x)}, repeats=5, warmup=2)["forward"]
        reading, proof, whole = [], [], []
        frontend = frontend_of(model)
        for seed in range(REPEATS):
            start = time.perf_counter()
            before, after = frontend.lift(model, x), frontend.lift(folded, x)
            reading.append(time.perf_counter() - start)
            for times, end_to_end in ((proof, False), (whole, True)):
                start = time.perf_counter()
                certificate = prove(frontend, before, after, seed=seed, witness=Formulas(), end_to_end=end_to_end)
                times.append(time.perf_counter() - start)
        with torch.no_grad():
            forward += in_turn({"forward": partial(model, x)}, repeats=5, warmup=1)["forward"]
        methods: dict[str, int] = {}
        for region in certificate.regions:
            methods[region.method] = methods.get(region.method, 0) + 1
        row = {
            "blocks": depth,
            "channels": width,
            "side": side,
            "forward": spread(forward),
            "reading": spread(reading),
            "proof": spread(proof),
            "with measurement": spread(whole),
            "verdict": str(certificate.verdict),
            "worst": max(region.ratio or 0.0 for region in certificate.regions),
            "methods": methods,
        }
        print(row, flush=True)
        rows.append(row)
    return rows


def certify() -> list[dict[str, Any]]:
    """onnxsim's proof of the smallest fold there is."""
    rows = []
    for width in (2, 8):
        conv, norm = torch.nn.Conv2d(3, width, 3, padding=1, bias=False), torch.nn.BatchNorm2d(width)
        model = trained(torch.nn.Sequential(conv, norm, torch.nn.ReLU()), seed=0)
        plain = torch.nn.Sequential(conv_of(normed(conv.weight, norm), padding=1), torch.nn.ReLU()).eval()
        case = Case(f"{width} channels", model, plain, image(3, 8), equal=True)
        pair = exported(case)
        assert pair is not None
        start = time.perf_counter()
        answer = certified(pair, CERTIFY_ALONE_SECONDS)
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        certificate = refold.prove(model, plain, case.example, end_to_end=False)
        rows.append(
            {
                "channels": width,
                "certify": seconds,
                "certified": answer,
                "refold": time.perf_counter() - start,
                "verdict": str(certificate.verdict),
            }
        )
        print(rows[-1], flush=True)
    return rows


PARTS: Mapping[str, Callable[[], Any]] = {
    "catalogue": catalogue,
    "time": lambda: timed(NETWORKS),
    "time of wide layers": lambda: timed(WIDE),
    "time of deep networks": lambda: timed(DEEP),
    "certify": certify,
}


def main() -> int:
    warnings.simplefilter("ignore")
    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    logging.disable(logging.WARNING)
    np.random.seed(0)  # the peers draw their inputs from numpy
    torch.set_num_threads(1)
    chosen = sys.argv[1:] or list(PARTS)
    path = RESULTS / "certificates.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in chosen:
        quiet = io.StringIO()
        with contextlib.redirect_stderr(quiet):
            result[name] = PARTS[name]()
    known = environment("torch", "onnx", "onnxruntime", "onnxsim", "onnxslim", "polygraphy", "z3-solver", "numpy")
    result = {
        **known,
        "threads": 1,
        "certify seconds": CERTIFY_SECONDS,
        "certify alone seconds": CERTIFY_ALONE_SECONDS,
        "certify range": CERTIFY_RANGE,
        **{n: result[n] for n in PARTS if n in result},
    }
    write("certificates", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
