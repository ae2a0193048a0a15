"""Making a weight of a torch module a parametrized one, and what torch leaves open about such modules.

All on top of ``torch.nn.utils.parametrize``: it gives the module a class of its own, derived from the old one, and
takes that away when the parametrization is removed. What is added here sits on that class, and goes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast
from weakref import ref

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.weak import WeakIdKeyDictionary

from refold.torch.layout import laid_out, layout_of
from refold.torch.units import rows_of
from refold.torch.written import computed_weight, watched
from refold.weights import Rows

Tensor = torch.Tensor


class ParametrizedRows(nn.Module):
    """A parametrization of a weight that ``rows`` sees as a matrix with one row per output unit.

    A subclass says how the weight comes from what is stored, and the other way round. What is written into
    the weight (``nn.init.normal_(module.weight)``) is stored.
    """

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows

    def weight(self, *originals: Tensor) -> Tensor:
        """The weight, in the shape and type of the first original."""
        raise NotImplementedError

    def right_inverse(self, weight: Tensor) -> Any:
        """What to store for ``weight``."""
        raise NotImplementedError

    def linear(self, x: Tensor, bias: Tensor | None, *originals: Tensor) -> Tensor | None:
        """``functional.linear`` of ``x`` and the weight, if that can be had faster than by making the weight."""
        return None

    def forward(self, *originals: Tensor) -> Tensor:
        """The weight, which takes what is written into it."""
        weight = laid_out(self.weight(*originals), originals[0])
        return computed_weight(weight, partial(self._take, originals))

    def _take(self, originals: tuple[Tensor, ...], written: Tensor) -> None:
        with torch.no_grad():
            parts = self.right_inverse(written.detach().clone())
            for original, part in zip(originals, [parts] if isinstance(parts, Tensor) else parts, strict=True):
                original.copy_(part)


def attach(
    module: nn.Module,
    name: str,
    axis: int | Sequence[int] | None,
    make: Callable[[Rows, nn.Parameter], ParametrizedRows],
    *,
    in_pieces: bool = False,
) -> None:
    """Parametrize the weight ``name`` of ``module`` by what ``make`` gives for its rows.

    The first of what is stored is the parameter that the weight was. A weight that several modules share stays
    shared if each is parametrized in the same way. ``in_pieces``: whether it may be a distributed tensor.

    Raises:
        ValueError: there is no such weight, it is parametrized already, nothing tells its output units, it is
            distributed and may not be, or the module makes sparse gradients for it or writes into it.
    """
    called = f"the module {type(module).__name__}"
    if parametrize.is_parametrized(module, name):
        raise ValueError(f"the parameter '{name}' of {called} is parametrized already")
    weight = module._parameters.get(name)
    if weight is None:
        known = ", ".join(key for key, value in module._parameters.items() if value is not None) or "none"
        raise ValueError(f"{called} has no parameter '{name}' of its own (it has: {known})")
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"the parameter '{name}' of {called} has no shape yet: call the module once first")
    if not weight.is_floating_point():
        raise ValueError(f"the parameter '{name}' of {called} holds no real numbers")
    if type(weight.data) is not Tensor and not in_pieces:
        raise ValueError(
            f"the parameter '{name}' of {called} is a {type(weight.data).__name__}, and what is to be attached "
            "sees the whole matrix: attach it before the weight is distributed"
        )
    if getattr(module, "sparse", False):
        raise ValueError(f"{called} makes sparse gradients, which a weight that is computed cannot take")
    if getattr(module, "max_norm", None) is not None:
        raise ValueError(
            f"{called} writes into its weight at each call (max_norm), which a computed one cannot take"
        )
    parametrization = make(rows_of(module, name, tuple(weight.shape), axis), weight)
    tied, layout = _others(weight, parametrization, called), layout_of(weight)
    parametrize.register_parametrization(module, name, parametrization)
    parametrizations = cast(nn.ModuleDict, module.parametrizations)
    if tied is None:
        made: Any = parametrizations[name]
        first = "original" if made.is_tensor else "original0"
        setattr(made, first, weight)
        if layout is not None:  # what is stored for the weight is a new tensor
            weight.data = weight.data.contiguous(memory_format=layout)
        _MADE[weight] = ref(made)
    else:
        parametrizations[name] = tied
    parametrizations.train(module.training)  # what was added would be in training mode
    _extend(module, parametrize.type_before_parametrizations(module))


# The parametrization that a parameter belongs to, as long as both live: how a second module that has it is noticed.
_MADE: Any = WeakIdKeyDictionary()


def _others(weight: nn.Parameter, parametrization: ParametrizedRows, called: str) -> Any:
    """The parametrization that another module has for this very parameter, if it does."""
    known = _MADE[weight]() if weight in _MADE else None
    if known is None or all(weight is not parameter for parameter in known.parameters(recurse=False)):
        return None
    if repr(known[0]) != repr(parametrization):
        raise ValueError(f"the weight of {called} is shared with a module where it is parametrized in another way")
    return known


# ---- the class that torch makes for the module -------------------------------------------------------------


def _extend(module: Any, plain: Any) -> None:
    """Let the class that torch made be pickled, recurrent ones see computed weights, and linear ones do without."""
    made: Any = type(module)
    made.__reduce_ex__ = _reduced
    if issubclass(plain, nn.RNNBase):
        # What torch's kernels take, instead of a list of the parameters that were there once.
        made._flat_weights = property(_flat_weights, lambda self, value: None)
        made._update_flat_weights = lambda self: None
        made.forward = _recurrent(plain)
    elif plain.forward is nn.Linear.forward:
        made.forward = _linear(plain)


def _reduced(module: Any, protocol: Any) -> Any:
    plain: Any = parametrize.type_before_parametrizations(module)
    return _restored, (plain, list(module.parametrizations)), plain.__getstate__(module)


def _restored(plain: Any, names: list[str]) -> Any:
    module = plain.__new__(plain)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
    _extend(module, plain)
    return module


def _flat_weights(module: Any) -> list[Any]:
    known: list[Any] | None = vars(module).get("_computed_weights")
    return [getattr(module, name) for name in module._flat_weights_names] if known is None else known


def _recurrent(plain: Any) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer's own, on weights that are computed once."""
        vars(self)["_computed_weights"] = _flat_weights(self)
        try:
            return plain.forward(self, *args, **kwargs)
        finally:
            del vars(self)["_computed_weights"]

    return forward


# Whether torch exports: what is exported is computed once, where the weight is made of constants.
_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # since torch 2.7


def _linear(plain: Any) -> Callable[..., Any]:
    def forward(self: Any, input: Tensor) -> Any:
        """The layer's own, or, where nobody needs to see the weight, the same without making it."""
        if "weight" in self.parametrizations and _is_alone(input):
            found = self.parametrizations["weight"]
            if len(found) == 1 and isinstance(found[0], ParametrizedRows):
                made = found[0].linear(input, self.bias, *_originals(found))
                if made is not None:
                    return made
        return plain.forward(self, input)

    return forward


def _is_alone(input: Any) -> bool:
    if type(input) not in (Tensor, nn.Parameter) or parametrize._cache_enabled:
        return False
    return not _exporting() if torch.compiler.is_compiling() else not (watched() or torch._C._is_tracing())


def _originals(found: Any) -> list[Tensor]:
    return [found.original] if found.is_tensor else [getattr(found, f"original{i}") for i in range(found.ntensors)]
