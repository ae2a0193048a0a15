"""Expressions as plain data that JSON can hold, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, assert_never

from refold.algebra import Window
from refold.blocks.expression import AveragePool, BatchNorm, Chain, Conv, Expression, Identity, Scale, Sum


def to_config(expression: Expression) -> dict[str, Any]:
    """``expression`` as dicts, lists, strings and numbers; :func:`from_config` is the inverse."""
    match expression:
        case Conv():
            windows = [asdict(window) for window in expression.windows]
            counts = {"filters": expression.filters, "groups": expression.groups, "bias": expression.bias}
            return {"kind": "conv", **counts, "windows": windows}
        case AveragePool():
            return {"kind": "average_pool", "windows": [asdict(window) for window in expression.windows]}
        case BatchNorm():
            return {"kind": "batch_norm", **asdict(expression)}
        case Scale():
            return {"kind": "scale", **asdict(expression)}
        case Identity():
            return {"kind": "identity"}
        case Chain():
            return {"kind": "chain", "parts": [to_config(part) for part in expression.parts]}
        case Sum():
            return {"kind": "sum", "terms": [to_config(term) for term in expression.terms]}
        case _:
            assert_never(expression)


def from_config(config: Mapping[str, Any]) -> Expression:
    """The expression that :func:`to_config` wrote. Raises ValueError for data that it did not write."""
    given = dict(config)
    kind = given.pop("kind", None)
    try:
        if "windows" in given:
            given["windows"] = tuple(Window(**window) for window in given["windows"])
        match kind:
            case "conv":
                return Conv(**given)
            case "average_pool":
                return AveragePool(**given)
            case "batch_norm":
                return BatchNorm(**given)
            case "scale":
                return Scale(**given)
            case "identity":
                return Identity(**given)
            case "chain":
                return Chain(*(from_config(part) for part in given["parts"]))
            case "sum":
                return Sum(*(from_config(term) for term in given["terms"]))
            case _:
                raise ValueError(f"there is no part of an expression of kind {kind!r}")
    except (TypeError, KeyError) as error:
        raise ValueError(f"this is not the {kind} of an expression: {error}") from error
