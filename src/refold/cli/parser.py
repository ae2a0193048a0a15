"""What can be typed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from refold import __version__
from refold.blocks import BLOCKS
from refold.checkpoints import FORMS
from refold.weights import METHODS


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command line. Bad usage ends the process with status 2 and one sentence."""
    parser = argparse.ArgumentParser(
        prog="refold",
        description="Fold a trained network into the plain one that computes the same, and prove it.",
        epilog="MODEL is a file, or package.module:factory for a model that code makes. "
        "Exit status: 0, 1 (not the same function), 2 (bad usage or input; nothing is written).",
    )
    parser.add_argument("--version", action="version", version=f"refold {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    inspect = commands.add_parser("inspect", help="what would fold, what not and why, and what it saves")
    inspect.add_argument("model", type=Path, metavar="MODEL")
    inspect.add_argument("--fail-if-foldable", action="store_true", help="exit with 1 if anything would fold")
    inspect.add_argument("--force", action="store_true", help="replace reports that exist")
    _add_output(inspect)
    _add_reading(inspect)

    fold = commands.add_parser("fold", help="write the plain model, once it is proved to be the same")
    fold.add_argument("model", type=Path, metavar="MODEL")
    fold.add_argument("-o", "--output", type=Path, required=True, metavar="PLAIN")
    _add_certificate(fold)
    fold.add_argument("--force", action="store_true", help="replace files that exist")
    _add_output(fold)
    _add_reading(fold)

    prove = commands.add_parser("prove", help="are two models the same function?")
    prove.add_argument("model", type=Path, metavar="MODEL")
    prove.add_argument("plain", type=Path, metavar="PLAIN")
    prove.add_argument("--certificate", type=Path, metavar="FILE", help="check this certificate again")
    prove.add_argument("--seed", type=int, default=0, help="of the random inputs (default 0)")
    _add_certificate(prove)
    prove.add_argument("--force", action="store_true", help="replace files that exist")
    _add_output(prove)
    _add_reading(prove)

    unfold = commands.add_parser(
        "unfold",
        help="the way back: write the model with train-time blocks in the places of its convolutions",
        description="Write a Keras model that trains on in a rich form and computes the same as MODEL. Models of "
        "other frameworks are unfolded in the code that trains them: refold.unfold(model, 'repvgg', data).",
    )
    unfold.add_argument("model", type=Path, metavar="MODEL")
    unfold.add_argument("-o", "--output", type=Path, required=True, metavar="RICH", help="a .keras file")
    unfold.add_argument("--block", choices=[block.__name__ for block in BLOCKS], default="repvgg")
    unfold.add_argument(
        "--only", action="append", default=[], metavar="PATTERN", help="the convolutions of these paths: stage1/*"
    )
    unfold.add_argument(
        "--data", type=Path, metavar="FILE", help="some real inputs (.npy), for the statistics of the batch norms"
    )
    unfold.add_argument("--seed", type=int, default=0, help="of the branches that are drawn (default 0)")
    unfold.add_argument("--force", action="store_true", help="replace files that exist")
    unfold.add_argument("--json", action="store_true", help="print JSON instead of tables")
    _add_reading(unfold)

    convert = commands.add_parser(
        "convert",
        help="rewrite a checkpoint's weight-normalized weights: plain, or in another library's names",
        description="Rewrite the reparameterized weights of a checkpoint, without a model and without a framework. "
        "SOURCE is a .safetensors file, an index of several or their folder, a .pdparams, a .h5 of Keras 2, a .pt.",
    )
    convert.add_argument("source", type=Path, metavar="SOURCE")
    convert.add_argument("-o", "--output", type=Path, required=True, metavar="TARGET", help="a file, or a folder")
    convert.add_argument("--to", choices=FORMS, default="plain", help="default: plain")
    convert.add_argument(
        "--axis",
        dest="axes",
        action="append",
        default=[],
        metavar="PATTERN=AXIS",
        help="which axis of the weights of these names numbers the output units: 0, -1, none (one norm for the "
        "whole weight), 1/G (a transposed convolution of torch with G groups), or auto (of a .keras file: those of "
        "the kind of layer); of plain weights, these are converted",
    )
    convert.add_argument("--skip", action="append", default=[], metavar="PATTERN", help="leave these as they are")
    convert.add_argument(
        "--method", choices=list(METHODS), help="of weights in refold's form, which does not say it"
    )
    convert.add_argument("--epsilon", type=float, metavar="NUMBER", help="of the method (default: its own)")
    convert.add_argument(
        "--architecture", type=Path, metavar="FILE", help="the .keras file of the model that a .weights.h5 is of"
    )
    convert.add_argument("--force", action="store_true", help="replace files that exist")
    convert.add_argument("--json", action="store_true", help="print JSON instead of tables")
    _add_debug(convert)

    bench = commands.add_parser("bench", help="how much faster is the second model?")
    bench.add_argument("model", type=Path, metavar="MODEL")
    bench.add_argument("plain", type=Path, metavar="PLAIN")
    bench.add_argument("--repeats", type=_positive, default=30, help="pairs of runs (default 30)")
    bench.add_argument("--force", action="store_true", help="replace files that exist")
    _add_output(bench)
    _add_reading(bench)

    demo = commands.add_parser("demo", help="train on real digits, fold, prove, time, report")
    demo.add_argument("--out", type=Path, default=Path("refold-demo"), metavar="FOLDER")
    demo.add_argument("--framework", choices=["keras", "paddle", "torch"], default="keras", help="default: keras")
    demo.add_argument("--epochs", type=_positive, default=15, help="passes over the images (default 15)")
    _add_debug(demo)
    return parser.parse_args(arguments)


def _add_certificate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--save-certificate", type=Path, metavar="FILE", help="write the certificate as JSON")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report page")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the report for a pull request")


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="a Python module with your custom layers; its code runs",
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="weights for a model that is named as package.module:factory"
    )
    parser.add_argument(
        "--shape",
        dest="shapes",
        action="append",
        default=[],
        type=_shape,
        metavar="N,C,...",
        help="shape of an input, with a letter for a size that may change; once per input",
    )
    parser.add_argument("--trust", action="store_true", help="run code that the model files bring with them")
    _add_debug(parser)


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show where an error happened")


def _shape(text: str) -> tuple[int | None, ...]:
    sizes = text.split(",")
    if not all(size.isdecimal() or size.isalpha() for size in sizes) or any(size == "0" for size in sizes):
        raise argparse.ArgumentTypeError(f"'{text}' is no shape: give sizes, such as N,3,224,224")
    return (None, *(int(size) if size.isdecimal() else None for size in sizes[1:]))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number
