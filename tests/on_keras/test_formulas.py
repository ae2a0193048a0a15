"""The formulas of the layers on JAX: one compiled step each, which differentiates as its operations do."""

import keras
import numpy as np
import pytest
from keras import layers
from kinds import BACKEND, close, image

from refold.keras import SpectralNormalization, WeightNormalization

pytestmark = pytest.mark.skipif(BACKEND != "jax", reason="the other backends take the operations as they are")

SMALL_MODELS = True  # see conftest.py
X = image(2, 6, 6, 3)
FORMS = {
    "unit": lambda: WeightNormalization(layers.Conv2D(4, 3)),
    "layer": lambda: WeightNormalization(layers.Conv2D(4, 3), "layer"),
    "outputs": lambda: WeightNormalization(layers.Dense(80)),
    "spectral": lambda: SpectralNormalization(layers.Conv2D(4, 3), gain=True),
}


def function(make):
    """What a new layer computes in training, of its variables and an input, and their values."""
    keras.utils.set_random_seed(0)
    layer = make()
    layer.build(X.shape)
    trained, others = (
        [v.value for v in some] for some in (layer.trainable_variables, layer.non_trainable_variables)
    )
    return lambda trained, x: layer.stateless_call(trained, others, x, training=True)[0], (trained, X)


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_nothing_of_a_formula_runs_by_itself(make):
    import jax

    call, arguments = function(make)
    alone = {str(step.primitive) for step in jax.make_jaxpr(call)(*arguments).eqns}
    assert not alone & {"abs", "mul", "div", "sqrt", "reduce_max", "reduce_sum", "select_n"}


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_derivatives_are_those_of_the_operations(make):
    import jax

    call, arguments = function(make)

    def slope(*given):
        return jax.grad(lambda *given: (call(*given) ** 3).sum(), argnums=(0, 1))(*given)

    def derivatives():
        backward = slope(*arguments)
        return jax.tree.leaves([backward, jax.jvp(call, arguments, backward), jax.jvp(slope, arguments, backward)])

    found = derivatives()
    with jax.disable_jit():
        wanted = derivatives()
    for one, other in zip(found, wanted, strict=True):
        close(one, other, 1e-4 * max(1, np.max(np.abs(other))))
