"""What makes a plainer ONNX file of an ONNX file, each in a process of its own that says what it took.

``python benchmarks/onnx_tools.py TOOL SOURCE TARGET`` writes TARGET and prints JSON: the seconds from file to file,
and by how many MiB the process grew.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Not a tool that makes a file: it reads both.
PROOF = "refold prove"

Tool = Callable[[Path, Path], None]


def refold(source: Path, target: Path) -> None:
    """``refold fold``, without its proof."""
    from refold.onnx import files
    from refold.verbs import fold

    files.save(fold(files.load(source)), target, overwrite=True)


def onnxsim(source: Path, target: Path) -> None:
    import onnxsim

    onnxsim.simplify(str(source), output_path=str(target))


def onnxslim(source: Path, target: Path) -> None:
    import onnxslim

    onnxslim.slim(str(source), str(target), save_as_external_data=is_large(source))


def onnxruntime(source: Path, target: Path, level: str = "ALL") -> None:
    """What ONNX Runtime's own optimizer makes of a model, saved: for this processor, at the highest level."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 4
    if is_large(source):
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{target.name}.data"
        )
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def basic(source: Path, target: Path) -> None:
    """The same, with standard operators only."""
    onnxruntime(source, target, "BASIC")


def extended(source: Path, target: Path) -> None:
    """The same, with operators of ONNX Runtime's own."""
    onnxruntime(source, target, "EXTENDED")


def refold_prove(source: Path, target: Path) -> None:
    """``refold prove`` on two files; here the second is read as well."""
    from refold.onnx import files
    from refold.verbs import prove

    certificate = prove(files.load(source), files.load(target))
    if not certificate.ok:
        raise SystemExit(f"not proved: {certificate.sentence}")


TOOLS: Mapping[str, Tool] = {
    "refold": refold,
    "onnxsim": onnxsim,
    "onnxslim": onnxslim,
    "ONNX Runtime": onnxruntime,
    "ONNX Runtime, basic": basic,
    "ONNX Runtime, extended": extended,
    PROOF: refold_prove,
}


def is_large(source: Path) -> bool:
    """Whether a model has its weights beside it."""
    return source.with_suffix(".data").exists()


def made(tool: str, source: Path, target: Path) -> dict[str, Any]:
    """Have ``tool`` make ``target``: ``seconds`` and ``mebibytes``; or ``failed``, in its own words."""
    command = [sys.executable, __file__, tool, str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode or not target.exists():
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        return {"failed": lines[-1][:200] if lines else f"exit status {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _peak() -> float:
    """MiB at most so far: a process' own (what getrusage says starts with that of its parent)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def main() -> int:
    tool, source, target = TOOLS[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3])
    tiny = source.with_name("tiny.onnx")
    if tiny.exists():  # whatever is imported is imported then
        tool(tiny, target.with_name("tiny.onnx"))
    before, start = _peak(), time.perf_counter()
    tool(source, target)
    print(json.dumps({"seconds": time.perf_counter() - start, "mebibytes": _peak() - before}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
