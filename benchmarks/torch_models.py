"""Folding published PyTorch networks: refold against timm's hand-written folds and torch's own conv-bn fusion.

Run with ``make bench-torch``, which sets up an environment of its own (timm needs torchvision). Every network has
random weights and random batch norm statistics. Counted is what runs: the kernels that torch dispatches for one
image, without views. Timed are the forms in turn (A B A B ...), eagerly, compiled and in ONNX Runtime; a ratio is
the median over the pairs. Folding and copying are timed in turn, too, and what is written is the median.
Networks that are named on the command line are measured anew, others keep their rows; with ``--folding`` nothing
but the time that folding takes is.
Peers: ``timm.utils.reparameterize_model``, which calls the fold that each of its blocks brings along, and
``torch.fx.experimental.optimization.fuse``. Writes ``benchmarks/results/torch_models.json``.
"""

from __future__ import annotations

import copy
import io
import json
import statistics
import sys
import warnings
from collections import Counter
from typing import Any

import measure
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.utils._python_dispatch import TorchDispatchMode

import refold

NETWORKS = (
    "repvgg_a0",
    "repvgg_b1g4",
    "mobileone_s0",
    "mobileone_s1",
    "fastvit_t8",
    "repvit_m0_9",
    "repghostnet_100",
    "levit_128s",
    "tiny_vit_5m_224",
    "efficientvit_b0",
    "efficientformer_l1",
    "mobilenetv3_small_100",
    "resnet18",
)
NORMS = (nn.modules.batchnorm._BatchNorm,)


class Kernels(TorchDispatchMode):
    """Counts what torch runs, by name, without views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        is_view = bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
        if not is_view and "empty" not in func.__name__ and "detach" not in func.__name__:
            self.counts[func.__name__.partition(".")[0]] += 1
        return made


def randomize(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, NORMS):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                if module.affine:
                    module.weight.uniform_(0.5, 1.5, generator=generator)
                    module.bias.normal_(0, 0.1, generator=generator)
        for name, parameter in model.named_parameters():
            if "gamma" in name or "layer_scale" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def measured(model: Any, x: Any, exact: Any) -> dict[str, Any]:
    """What a form of a network runs, and how far its result is from the original's in float64."""
    with torch.no_grad():
        kernels = Kernels()
        with kernels:
            result = model(x)
    norms = sum(count for name, count in kernels.counts.items() if "batch_norm" in name)
    error = (result.double() - exact).abs().max() / exact.abs().max()
    return {
        "kernels": sum(kernels.counts.values()),
        "batch_norms": norms,
        "error": float(error),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def by_hand(model: Any) -> Any:
    """What timm makes of a network."""
    return reparameterize_model(copy.deepcopy(model)).eval()


def folding(model: Any, x: Any) -> dict[str, float]:
    """The seconds that copying a network takes, and that folding it does."""
    calls = {
        "copy": lambda: copy.deepcopy(model),
        "refold": lambda: refold.fold(model, x),
        "timm": lambda: by_hand(model),
    }
    return {name: statistics.median(took) for name, took in measure.in_turn(calls, repeats=5, warmup=1).items()}


def ratio(one: Any, two: Any, x: Any, repeats: int) -> measure.Spread:
    """How many times as fast ``two`` is as ``one``."""
    with torch.no_grad():
        seconds = measure.in_turn({"one": lambda: one(x), "two": lambda: two(x)}, repeats=repeats)
    return measure.times_as_fast(seconds["one"], seconds["two"])


def compiled_ratio(one: Any, two: Any, x: Any, repeats: int) -> measure.Spread:
    """The same under ``torch.compile`` with its own choice of backend."""
    first, second = (torch.compile(copy.deepcopy(model)) for model in (one, two))
    return ratio(first, second, x, repeats)


def onnx_ratio(one: Any, two: Any, x: Any, repeats: int) -> measure.Spread:
    """The same in ONNX Runtime with all its optimizations, on what torch's exporter makes of both."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    runs = []
    for model in (one, two):
        file = io.BytesIO()
        torch.onnx.export(copy.deepcopy(model), (x,), file, dynamo=False)
        session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
        runs.append(lambda session=session: session.run(None, {session.get_inputs()[0].name: x.numpy()}))
    seconds = measure.in_turn(dict(zip(("one", "two"), runs, strict=True)), repeats=repeats)
    return measure.times_as_fast(seconds["one"], seconds["two"])


def fused(model: Any) -> Any:
    try:
        return fuse(copy.deepcopy(model))
    except Exception:  # what fx cannot trace
        return None


def network(name: str) -> tuple[Any, Any]:
    """A network, and an image for it."""
    model = randomize(timm.create_model(name))
    return model, torch.randn(1, *model.default_cfg["input_size"], generator=torch.Generator().manual_seed(1))


def row(name: str, repeats: int) -> dict[str, Any]:
    model, x = network(name)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
    ours, theirs, by_fx = refold.fold(model, x), by_hand(model), fused(model)
    seconds = folding(model, x)
    found = {
        "network": name,
        "original": measured(model, x, exact),
        "refold": {**measured(ours, x, exact), "seconds": seconds["refold"]},
        "timm": {**measured(theirs, x, exact), "seconds": seconds["timm"]},
        "fx": None if by_fx is None else measured(by_fx, x, exact),
        "copy_seconds": seconds["copy"],
        "faster_than_original": ratio(model, ours, x, repeats),
        "faster_than_timm": ratio(theirs, ours, x, repeats),
        "faster_in_onnxruntime": onnx_ratio(model, ours, x, repeats),
        "faster_compiled": compiled_ratio(model, ours, x, repeats),
    }
    plan = refold.inspect(model, x)
    found["multiply_adds"] = [plan.before.multiply_adds, plan.after.multiply_adds]
    print(json.dumps(found), flush=True)
    return found


def with_folding(found: dict[str, Any]) -> dict[str, Any]:
    """A row with the times of folding measured anew."""
    seconds = folding(*network(found["network"]))
    print(found["network"], seconds, flush=True)
    forms = {form: {**found[form], "seconds": seconds[form]} for form in ("refold", "timm")}
    return {**found, **forms, "copy_seconds": seconds["copy"]}


def main() -> int:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    environment = {**measure.environment("torch", "timm", "onnxruntime"), "threads": torch.get_num_threads()}
    before = measure.read("torch_models")
    if sys.argv[1:2] == ["--folding"]:
        # On another machine, or with another torch, the rest of a row would not belong to it.
        same = all(before[key] == environment[key] for key in ("machine", "python", "threads"))
        known = {name: version.partition("+")[0] for name, version in before["versions"].items()}  # cu130
        if not same or not known.items() <= environment["versions"].items():
            raise SystemExit("the rows were measured elsewhere: measure them whole")
        names = sys.argv[2:] or NETWORKS
        rows = [with_folding(found) if found["network"] in names else found for found in before["rows"]]
        measure.write("torch_models", {**before, "rows": rows})
        return 0
    kept = before["rows"] if all(before.get(key) == value for key, value in environment.items()) else []
    rows = {found["network"]: found for found in kept}
    for name in sys.argv[1:] or NETWORKS:
        rows[name] = row(name, repeats=20)
        measure.write("torch_models", {**environment, "rows": [rows[n] for n in NETWORKS if n in rows]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
