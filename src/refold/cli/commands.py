"""The commands: each loads what it needs, calls a verb, prints, and returns the exit status."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from refold import checkpoints, verbs
from refold.cli import factory
from refold.errors import InputError
from refold.files import open_regular, write_atomically
from refold.frontend import SUFFIXES, WEIGHTS, Frontend, frontend_for, frontend_of
from refold.proof import Certificate, Verdict, compare
from refold.report import markdown, page, terminal
from refold.report.summary import Page

SAME, DIFFERENT = 0, 1
_MOST_CERTIFICATE = 2**28


def inspect(options: argparse.Namespace) -> int:
    """``refold inspect MODEL``"""
    _check_reports(options)
    _, model = _load(options.model, options)
    with _busy("looking for what folds"):
        plan = verbs.inspect(model, _example(options))
    _show(plan.to_json(), terminal.plan(plan), options)
    _write_reports(Page(title=options.model.name, plan=plan), options)
    if options.fail_if_foldable and plan.changes_something:
        print(f"refold: {options.model.name}: {plan.headline}", file=sys.stderr)
        return DIFFERENT
    return SAME


def fold(options: argparse.Namespace) -> int:
    """``refold fold MODEL -o PLAIN``"""
    _check_free(options.output, options, options.model)
    _check_free(options.save_certificate, options)
    _check_reports(options)
    frontend, model = _load(options.model, options)
    example = _example(options)
    if frontend_for(options.output) is not frontend:
        raise InputError(f"{options.output}: the result is a model of {frontend.name}; give it the ending of one")
    with _busy("folding"):
        plan = verbs.inspect(model, example)
        plain = verbs.fold(model, example)
    with _busy("proving that nothing changed"):
        certificate = verbs.prove(model, plain, example)
    data = {"plan": plan.to_json(), "certificate": certificate.to_json()}
    _show(data, [*terminal.plan(plan), *terminal.certificate(certificate)], options)
    if not certificate.ok:
        known = certificate.verdict is Verdict.REFUTED
        found = "is not the same function" if known else "could not be shown to be the same function"
        print(f"refold: the result {found}, so nothing was written", file=sys.stderr)
        return DIFFERENT
    frontend.save(plain, options.output, overwrite=options.force, example=example)
    _write_certificate(certificate, options)
    _write_reports(Page(title=options.model.name, plan=plan, certificate=certificate), options)
    print(f"written to {options.output}", file=sys.stderr)
    return SAME


def prove(options: argparse.Namespace) -> int:
    """``refold prove MODEL PLAIN``"""
    _check_free(options.save_certificate, options)
    _check_reports(options)
    stored = None if options.certificate is None else _read_certificate(options.certificate)
    _, model = _load(options.model, options)
    _, plain = _load(options.plain, options, second=True)
    with _busy("proving"):
        certificate = verbs.prove(model, plain, _example(options), seed=stored.seed if stored else options.seed)
    tables = terminal.certificate(certificate)
    if stored is None:
        status = SAME if certificate.ok else DIFFERENT
        _show(certificate.to_json(), tables, options)
    else:
        recheck = compare(stored, certificate)
        status = SAME if recheck.ok else DIFFERENT
        _show(recheck.to_json(), [*terminal.recheck(recheck), *tables], options)
    _write_certificate(certificate, options)
    title = f"{options.model.name} and {options.plain.name}"
    _write_reports(Page(title=title, certificate=certificate), options)
    return status


def unfold(options: argparse.Namespace) -> int:
    """``refold unfold MODEL -o RICH``"""
    _check_free(options.output, options, options.model)
    if options.output.suffix != ".keras":
        raise InputError(
            f"{options.output}: only a .keras file can be trained on from a file; models of other frameworks are "
            f"unfolded in the code that trains them: refold.unfold(model, '{options.block}', data)"
        )
    data = None if options.data is None else _read_array(options.data)
    frontend, model = _load(options.model, options)
    if frontend is not frontend_for(options.output):
        raise InputError(f"{options.model} is a model of {frontend.name}; a .keras file holds one of Keras")
    with _busy("unfolding"):
        rich = verbs.rich_of(model, options.block, data, only=options.only or ("*",), seed=options.seed)
    _show(rich.to_json(), terminal.unfolding(rich), options)
    frontend.save(rich.model, options.output, overwrite=options.force)
    print(f"written to {options.output}", file=sys.stderr)
    return SAME


def bench(options: argparse.Namespace) -> int:
    """``refold bench MODEL PLAIN``"""
    _check_reports(options)
    _, model = _load(options.model, options)
    _, plain = _load(options.plain, options, second=True)
    with terminal.progress() as bar:
        task = bar.add_task("timing", total=options.repeats + 3)
        timing = verbs.bench(
            model,
            plain,
            _example(options),
            repeats=options.repeats,
            progress=lambda done: bar.update(task, completed=done),
        )
    _show(timing.to_json(), terminal.timing(timing), options)
    _write_reports(Page(title=f"{options.model.name} and {options.plain.name}", timing=timing), options)
    return SAME


def convert(options: argparse.Namespace) -> int:
    """``refold convert SOURCE -o TARGET``"""
    with terminal.progress() as bar:
        task = bar.add_task("converting", total=None)
        conversion = checkpoints.convert(
            options.source,
            options.output,
            options.to,
            axes=options.axes,
            skip=options.skip,
            method=options.method,
            epsilon=options.epsilon,
            architecture=options.architecture,
            overwrite=options.force,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    _show(conversion.to_json(), terminal.conversion(conversion), options)
    print(f"written to {options.output}", file=sys.stderr)
    return SAME


def demo(options: argparse.Namespace) -> int:
    """``refold demo``"""
    from refold import demo as story

    return story.run(options.out, options.epochs, options.framework)


# ---- shared ----------------------------------------------------------------------------------------


def _busy(what: str) -> Any:
    return Console(stderr=True).status(what)


def _load(path: Path, options: argparse.Namespace, *, second: bool = False) -> tuple[Frontend, Any]:
    """The model of that name; ``second`` says that ``--weights`` are not for it."""
    if factory.is_factory(str(path)):
        with _busy(f"making {path}"):
            model = factory.make(str(path))
            try:
                frontend = frontend_of(model)
            except InputError as error:
                raise InputError(f"{path} gives no model: {error}") from error
            return frontend, frontend.restore(model, None if second else options.weights)
    if options.weights is not None and not second:
        raise InputError(f"--weights is for a model that is named as package.module:factory; {path} is a file")
    if path.suffix in WEIGHTS:
        raise InputError(
            f"{path}: a file of weights is no model; name the function that makes the model, and give the file "
            f"with --weights: package.module:function --weights {path}"
        )
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"{path}: this is neither a model file ({', '.join(SUFFIXES)}) nor the name of a function that makes a "
            "model (package.module:function)"
        )
    frontend = frontend_for(path)
    with _busy(f"reading {path.name}"):
        return frontend, frontend.load(path, imports=options.imports, trust=options.trust)


def _example(options: argparse.Namespace) -> Any:
    """What ``--shape`` says of the inputs."""
    return tuple(options.shapes) if len(options.shapes) > 1 else next(iter(options.shapes), None)


def _show(data: dict[str, Any], tables: list[Any], options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(data, indent=1))
    else:
        terminal.show(tables)


def _check_free(path: Path | None, options: argparse.Namespace, source: Path | None = None) -> None:
    """Refuse early what writing would refuse late, after minutes of work."""
    if path is None:
        return
    if path.exists() and not options.force:
        same = source is not None and source.exists() and path.samefile(source)
        what = "is the model itself" if same else "exists"
        raise InputError(f"{path} {what}; choose another name" + ("" if same else ", or replace it with --force"))
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.absolute().parent}")


def _read_certificate(path: Path) -> Certificate:
    with open_regular(path, _MOST_CERTIFICATE) as file:
        data = file.read()
    try:
        return Certificate.from_json(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deeply, or no certificate
        raise InputError(f"{path}: this is no certificate that can be checked: {error}") from error


def _read_array(path: Path) -> Any:
    with open_regular(path) as file:
        try:
            array = np.load(file, allow_pickle=False)
        except (ValueError, EOFError, OSError, MemoryError) as error:
            raise InputError(f"{path}: this is no array of numbers (.npy): {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        raise InputError(f"{path}: this is no array of numbers (.npy)")
    return array.astype("float32") if array.dtype.kind == "f" else array


def _write_certificate(certificate: Certificate, options: argparse.Namespace) -> None:
    if options.save_certificate is not None:
        _write_text(options.save_certificate, json.dumps(certificate.to_json(), indent=1), options.force)


def _check_reports(options: argparse.Namespace) -> None:
    for path in (options.html, options.markdown):
        _check_free(path, options)


def _write_reports(content: Page, options: argparse.Namespace) -> None:
    for path, render in ((options.html, page.render), (options.markdown, markdown.render)):
        if path is not None:
            _write_text(path, render(content), options.force)


def _write_text(path: Path, text: str, overwrite: bool) -> None:
    def write(target: Path) -> None:
        target.write_text(text + "\n", encoding="utf-8")

    write_atomically(path, write, overwrite=overwrite)
