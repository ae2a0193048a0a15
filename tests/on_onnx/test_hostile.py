"""Files that are made to do harm: bombs, names, links, and what becomes of a file when writing it fails."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import Builder, assert_same_function, operators
from models import repvgg
from onnx import TensorProto, helper, numpy_helper

import refold
from refold.cli import main
from refold.proof import Verdict
from test_files import external, refused, saved

# ---- what is no model, and what lies beside one ----------------------------------------------------


def test_sockets_and_devices(tmp_path: Path, capsys: Any) -> None:
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(tmp_path / "door.onnx"))
        assert "a socket" in refused(tmp_path / "door.onnx", capsys)
    (tmp_path / "zero.onnx").symlink_to("/dev/zero")
    assert "a device" in refused(tmp_path / "zero.onnx", capsys)


def test_a_link_of_a_folder_leads_nowhere(tmp_path: Path, capsys: Any) -> None:
    def through_the_link(tensor: Any) -> None:
        (entry,) = [entry for entry in tensor.external_data if entry.key == "location"]
        entry.value = "link/weights.bin"

    path = external(repvgg(), tmp_path / "model", through_the_link)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "weights.bin").write_bytes(b"the secret" * 1000)
    (path.parent / "link").symlink_to("../elsewhere")
    assert "secret" not in refused(path, capsys)


def test_what_is_said_of_weights_besides_is_not_obeyed(tmp_path: Path) -> None:
    def more(tensor: Any) -> None:
        tensor.external_data.add(key="__class__", value="os.system")
        tensor.external_data.add(key="checksum", value="0" * 40)

    model = repvgg()
    path, plain = external(model, tmp_path / "model", more), tmp_path / "plain.onnx"
    assert main(["fold", str(path), "-o", str(plain)]) == 0
    assert_same_function(model, onnx.load(plain))


def test_attributes_that_are_no_text_make_no_noise(tmp_path: Path) -> None:
    model = repvgg()
    (node, *_) = [node for node in model.graph.node if node.op_type == "Conv"]
    node.attribute.append(helper.make_attribute("auto_pad", b"\xff\xfe"))
    path = saved(model, tmp_path / "noise.onnx")
    environment = {**os.environ, "PYTHONPATH": str(Path(refold.__file__).parents[1])}
    command = [sys.executable, "-m", "refold", "inspect", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert done.stderr.count("\n") == (1 if done.returncode == 2 else 0), done.stderr


# ---- bombs -----------------------------------------------------------------------------------------


def bomb(kind: str) -> onnx.ModelProto:
    """A branch without inputs that makes very much out of very little, beside something to fold."""
    b = Builder()
    y = b.op("Relu", b.bn(b.conv(b.input("N", 3, 8, 8), 3, 4), 4))
    many = b.ints(2**17, 2**18)
    match kind:
        case "Expand":
            made = b.op("Expand", b.constant(np.ones((1, 1))), many)
        case "Tile":
            made = b.op("Tile", b.constant(np.ones((1, 1))), many)
        case "ConstantOfShape":
            made = b.op("ConstantOfShape", many)
        case "Range":
            made = b.op(
                "Range", b.constant(np.float32(0)), b.constant(np.float32(2**34)), b.constant(np.float32(1))
            )
        case "Pad":
            made = b.op("Pad", b.constant(np.ones((1, 1))), b.ints(0, 0, 2**17, 2**18))
        case "Resize":
            made = b.op("Resize", b.constant(np.ones((1, 1, 1, 1))), "", "", b.ints(1, 1, 2**17, 2**18))
        case "powers":
            made = b.constant(np.ones((2, 2)))
            for _ in range(40):
                made = b.op("Concat", made, made, axis=0)
        case _:
            raise ValueError(kind)
    return b.model(y, b.op("ReduceMax", made, keepdims=0))


@pytest.mark.parametrize("kind", ["ConstantOfShape", "Expand", "Tile", "Range", "Pad", "Resize", "powers"])
def test_little_that_makes_much_costs_no_memory(kind: str, tmp_path: Path, capsys: Any) -> None:
    """Refused, or read without being computed."""
    path = saved(bomb(kind), tmp_path / "bomb.onnx")
    tracemalloc.start()
    try:
        status = main(["inspect", str(path)])
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    _, err = capsys.readouterr()
    assert status in (0, 2)
    assert "fault of refold" not in err
    assert most < 2**27


def test_doubled_until_a_constant_is_as_large_as_may_be(tmp_path: Path) -> None:
    """What the process takes altogether stays below the 500 MB of a file that makes much of little."""
    b = Builder()
    y = b.op("Relu", b.bn(b.conv(b.input("N", 3, 8, 8), 3, 4), 4))
    made = b.constant(np.ones((2, 2)))
    for _ in range(23):
        made = b.op("Concat", made, made, axis=0)
    path = saved(b.model(y, b.op("ReduceMax", made, keepdims=0)), tmp_path / "bomb.onnx")
    environment = {**os.environ, "PYTHONPATH": str(Path(refold.__file__).parents[1])}
    command = [sys.executable, "-c", MEASURED, "inspect", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=environment)
    assert int(done.stdout.split()[-1]) < 500e6


# Runs a command, and prints the most bytes of memory that the process had.
MEASURED = """
import sys
from refold.cli import main
assert main(sys.argv[1:]) == 0
with open("/proc/self/status") as status:
    (most,) = [line.split()[1] for line in status if line.startswith("VmHWM")]
print(int(most) * 1024)
"""


# ---- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a" * 2**20, "nul\0nul", "../../evil", "<script>\x1b[2J\u202e"])
def test_names_are_only_names(name: str, tmp_path: Path, capsys: Any) -> None:
    model = repvgg()
    for node in model.graph.node:
        node.name = f"{name}{node.name}"
    for tensor in model.graph.initializer:
        for node in model.graph.node:
            node.input[:] = [f"{name}{i}" if i == tensor.name else i for i in node.input]
        tensor.name = f"{name}{tensor.name}"
    path, plain, page = (saved(model, tmp_path / "named.onnx"), tmp_path / "plain.onnx", tmp_path / "page.html")
    assert main(["fold", str(path), "-o", str(plain), "--html", str(page)]) == 0
    out, err = capsys.readouterr()
    assert not {"\x1b", "\0", "\u202e"} & set(out + err)
    assert len(out) < 2**17
    assert "<script>\x1b" not in page.read_text(encoding="utf-8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["named.onnx", "page.html", "plain.onnx"]


# ---- operators of others ----------------------------------------------------------------------------


def test_where_an_operator_is_nobodys_the_output_is_not_called_equal(tmp_path: Path, capsys: Any) -> None:
    b = Builder()
    hidden = b.op("Relu", b.bn(b.conv(b.input("N", 3, 8, 8), 3, 4), 4))
    secret = b.op("Secret", hidden, domain="com.example", power=3)
    model = b.model(secret, domains=["com.example"])
    model.graph.output[0].type.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, ["N", 4, 8, 8]))
    path, plain = saved(model, tmp_path / "model.onnx"), tmp_path / "plain.onnx"
    assert main(["fold", str(path), "-o", str(plain)]) == 0
    folded = onnx.load(plain)
    assert operators(folded) == {"Conv": 1, "Relu": 1, "Secret": 1}
    certificate = refold.prove(model, folded)
    assert certificate.ok
    assert not certificate.end_to_end
    assert any("nothing that is installed runs the model" in note for note in certificate.notes)
    assert refold.check(certificate, model, folded).ok
    # Another setting of it, and nothing can be said any more; another weight in what is known, and it is refuted.
    edited = onnx.ModelProto.FromString(folded.SerializeToString())
    edited.graph.node[-1].attribute[0].i = 4
    certificate = refold.prove(model, edited)
    assert (str(certificate.verdict), certificate.ok) == ("skipped", False)
    edited = onnx.ModelProto.FromString(folded.SerializeToString())
    edited.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(
            1.01 * numpy_helper.to_array(edited.graph.initializer[0]), edited.graph.initializer[0].name
        )
    )
    assert str(refold.prove(model, edited).verdict) == "refuted"


# ---- numbers that are none ---------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_stay_where_they_are(poison: float) -> None:
    b = Builder()
    x = b.input("N", 3, 8, 8)
    weight = b.rng.normal(size=(4, 3, 1, 1))
    weight[1, 2] = poison
    spoilt = b.op("Relu", b.bn(b.op("Conv", x, b.constant(weight)), 4))
    model = b.model(b.op("Relu", b.bn(b.conv(spoilt, 4, 4), 4)))
    plain = refold.fold(model)
    assert operators(plain) == {"Conv": 2, "BatchNormalization": 1, "Relu": 2}
    assert "finite" in str(refold.inspect(model))


def test_a_variance_of_zero_without_epsilon_has_no_gain() -> None:
    b = Builder()
    x = b.input("N", 3, 8, 8)
    inputs = [b.constant(np.ones(4)) for _ in range(3)] + [b.constant(np.zeros(4))]
    model = b.model(b.op("BatchNormalization", b.conv(x, 3, 4), *inputs, epsilon=0.0))
    assert operators(refold.fold(model)) == {"Conv": 1, "BatchNormalization": 1}


# ---- writing -----------------------------------------------------------------------------------------

# Folds its first argument into its second, in a process that is told when to end, or how much it may write.
WRITE = """
import os, resource, signal, sys
from refold.cli import main
source, target, how = sys.argv[1:]
if how == "killed":
    os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
elif how == "killed early":
    os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
else:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(how), int(how)))
sys.exit(main(["fold", source, "-o", target, "--force"]))
"""


def write(source: Path, target: Path, how: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(refold.__file__).parents[1])}
    command = [sys.executable, "-c", WRITE, str(source), str(target), how]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)


def inside(model: onnx.ModelProto, folder: Path) -> Path:
    folder.mkdir()
    return saved(model, folder / "model.onnx")


LAYOUTS = pytest.mark.parametrize("lay", [inside, external], ids=["inside", "beside"])
Layout = Callable[[onnx.ModelProto, Path], Path]


@LAYOUTS
@pytest.mark.parametrize("how", ["killed", "killed early"])
def test_killed_while_writing(lay: Layout, how: str, tmp_path: Path) -> None:
    """In place: what is read is what would be replaced."""
    model = repvgg()
    path = lay(model, tmp_path / "model")
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    assert write(path, path, how).returncode == -signal.SIGKILL
    assert {name: (path.parent / name).read_bytes() for name in before} == before
    assert main(["inspect", str(path)]) == 0


@LAYOUTS
def test_a_disk_that_is_full(lay: Layout, tmp_path: Path) -> None:
    path = lay(repvgg(), tmp_path / "model")
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    done = write(path, path, "300")
    assert (done.returncode, done.stdout) == (2, done.stdout)
    assert done.stderr.splitlines()[-1].startswith("refold: ")
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


@LAYOUTS
def test_in_place_with_force_only(lay: Layout, tmp_path: Path, capsys: Any) -> None:
    model = repvgg()
    path = lay(model, tmp_path / "model")
    os.chmod(path, 0o640)
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    links = [path.parent / "soft.onnx", path.parent / "hard.onnx"]
    links[0].symlink_to(path.name)
    os.link(path, links[1])
    for target in (path, *links):
        assert main(["fold", str(path), "-o", str(target)]) == 2
    for link in links:
        link.unlink()
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before
    assert main(["fold", str(path), "-o", str(path), "--force"]) == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    folded = onnx.load(path)
    assert operators(folded) == {"Conv": 1, "Relu": 1}
    assert_same_function(model, folded)


def test_what_is_read_is_never_changed(tmp_path: Path) -> None:
    path = external(repvgg(), tmp_path / "model")
    for p in path.parent.iterdir():
        p.chmod(0o440)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in path.parent.iterdir()}
    plain = tmp_path / "plain.onnx"
    for arguments in (
        ["inspect", path],
        ["fold", path, "-o", plain],
        ["prove", path, plain],
        ["bench", path, plain],
    ):
        assert main([str(argument) for argument in arguments]) == 0
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in path.parent.iterdir()} == before


def test_a_number_in_a_weight_is_enough_to_be_told(tmp_path: Path) -> None:
    """Of a file beside which somebody changes the weights after it was folded."""
    path, plain = external(repvgg(), tmp_path / "model"), tmp_path / "plain.onnx"
    assert main(["fold", str(path), "-o", str(plain)]) == 0
    data = bytearray((path.parent / "weights.bin").read_bytes())
    data[2] ^= 0x40
    (path.parent / "weights.bin").write_bytes(bytes(data))
    assert main(["prove", str(path), str(plain)]) == 1
    assert numpy_helper.to_array(onnx.load(plain).graph.initializer[0]).dtype == np.float32


def test_a_model_that_takes_text_is_proved_and_not_run() -> None:
    text = helper.make_tensor_value_info("text", TensorProto.STRING, ["N"])
    images = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 5, 5])
    outputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in (("y", 1), ("same", 8))]
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"]), helper.make_node("Identity", ["text"], ["same"])]
    weights = [numpy_helper.from_array(np.ones((2, 3, 1, 1), dtype=np.float32), "w")]
    graph = helper.make_graph(nodes, "graph", [images, text], outputs, weights)
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))
    certificate = refold.prove(model, model)
    assert certificate.verdict is Verdict.PROVED
    assert any("'text' has no type, or is text" in note for note in certificate.notes), certificate.notes
