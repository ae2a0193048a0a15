"""JAX: the forms of flax (linen and nnx) and of equinox, beside those of Keras on JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox
import jax
from flax import linen, nnx

from normalized.form import Form, Layer

Function = Callable[[Any, Any], Any]  # of what is differentiated and the input


def forms(layer: Layer, *, compiled: bool) -> list[Form]:
    key = jax.random.key(0)
    shape = layer.shape(channels_last=True)
    x, cotangent = (jax.random.normal(k, shape) for k in jax.random.split(key))
    channels_first = (x, cotangent) if layer.dense else tuple(a.transpose(0, 3, 1, 2) for a in (x, cotangent))
    c = layer.channels

    def of_linen() -> Any:
        return linen.Dense(c) if layer.dense else linen.Conv(c, (3, 3))

    def of_nnx() -> Any:
        rngs = nnx.Rngs(0)
        return nnx.Linear(c, c, rngs=rngs) if layer.dense else nnx.Conv(c, c, (3, 3), rngs=rngs)

    def of_equinox() -> Any:
        return equinox.nn.Linear(c, c, key=key) if layer.dense else equinox.nn.Conv2d(c, c, 3, padding=1, key=key)

    def with_state() -> tuple[Any, Any]:
        return equinox.nn.make_with_state(equinox.nn.SpectralNorm)(of_equinox(), "weight", key=key)

    def form(name: str, method: str, plain: str, function: Function, trained: Any) -> Form:
        given = channels_first if plain == "equinox" else (x, cotangent)
        return Form(name, method, plain, _step(function, trained, *given, compiled))

    in_linen, in_nnx, in_equinox = "flax linen", "flax nnx", "equinox"
    return [
        form(in_linen, "plain", in_linen, *_linen(of_linen(), x)),
        form("flax linen WeightNorm", "unit", in_linen, *_linen(linen.WeightNorm(of_linen()), x)),
        form("flax linen SpectralNorm", "spectral", in_linen, *_linen_spectral(linen.SpectralNorm(of_linen()), x)),
        form(in_nnx, "plain", in_nnx, *_nnx(of_nnx())),
        form("flax nnx WeightNorm", "unit", in_nnx, *_nnx(nnx.WeightNorm(of_nnx(), rngs=nnx.Rngs(0)))),
        form(in_equinox, "plain", in_equinox, *_equinox(of_equinox())),
        form("equinox WeightNorm", "unit", in_equinox, *_equinox(equinox.nn.WeightNorm(of_equinox()))),
        form("equinox SpectralNorm", "spectral", in_equinox, *_equinox_spectral(*with_state())),
    ]


def _step(function: Function, trained: Any, x: Any, cotangent: Any, compiled: bool) -> Callable[[], Any]:
    def product(trained: Any, x: Any) -> Any:
        y, others = function(trained, x)
        return (y * cotangent).sum(), others

    step = jax.value_and_grad(product, argnums=(0, 1), has_aux=True)
    step = jax.jit(step) if compiled else step
    return lambda: jax.block_until_ready(step(trained, x))


def _linen(module: Any, x: Any) -> tuple[Function, Any]:
    return (lambda trained, x: (module.apply(trained, x), None)), module.init(jax.random.key(0), x)


def _linen_spectral(module: Any, x: Any) -> tuple[Function, Any]:
    variables = module.init(jax.random.key(0), x, update_stats=False)
    state = variables["batch_stats"]

    def function(trained: Any, x: Any) -> Any:
        return module.apply(
            {"params": trained, "batch_stats": state}, x, update_stats=True, mutable=["batch_stats"]
        )

    return function, variables["params"]


def _nnx(module: Any) -> tuple[Function, Any]:
    graph, trained, others = nnx.split(module, _is_trained, ...)

    def function(trained: Any, x: Any) -> Any:
        return nnx.merge(graph, trained, others)(x), None

    return function, trained


def _is_trained(path: Any, value: Any) -> bool:
    # The scales of WeightNorm are no Param, and get their gradient here all the same.
    return isinstance(value, nnx.Param) or "scale" in str(path).lower()


def _equinox(module: Any) -> tuple[Function, Any]:
    trained, others = equinox.partition(module, equinox.is_inexact_array)
    return (lambda trained, x: (jax.vmap(equinox.combine(trained, others))(x), None)), trained


def _equinox_spectral(module: Any, state: Any) -> tuple[Function, Any]:
    trained, others = equinox.partition(module, equinox.is_inexact_array)

    def function(trained: Any, x: Any) -> Any:
        called = equinox.combine(trained, others)
        # The state is that of the layer, not of an example.
        return jax.vmap(called, in_axes=(0, None), out_axes=(0, None))(x, state)

    return function, trained
