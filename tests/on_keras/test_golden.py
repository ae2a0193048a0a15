"""keras.ops, and the layers, against the golden vectors of tests/weights, on the backend of KERAS_BACKEND."""

import keras
import numpy as np
import pytest
from keras import ops

from weights import golden

BACKEND = keras.backend.backend()


# In the place of the folder's fixture, whose clearing of Keras' session takes longer than these tests.
@pytest.fixture(autouse=True)
def fixed_seed():
    keras.utils.set_random_seed(0)


def value_and_gradients(function, arrays, names):
    """``sum(target * w)``'s gradients at float32 arrays, by the backend's own differentiation."""
    tensors = {name: ops.convert_to_tensor(array, "float32") for name, array in arrays.items()}
    if BACKEND == "jax":
        import jax

        def loss(chosen):
            weight, total = function({**tensors, **chosen})
            return total, weight

        (_, weight), found = jax.value_and_grad(loss, has_aux=True)({name: tensors[name] for name in names})
        return weight, found
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch([tensors[name] for name in names])
            weight, total = function(tensors)
        return weight, dict(zip(names, tape.gradient(total, [tensors[name] for name in names]), strict=True))
    for name in names:
        tensors[name].requires_grad_()
    weight, total = function(tensors)
    total.backward()
    return weight.detach(), {name: tensors[name].grad for name in names}


@pytest.mark.parametrize("case", golden.CASES, ids=str)
def test_the_methods(case):
    def function(tensors):
        weight = golden.compose(case, ops, tensors)
        return weight, ops.sum(weight * ops.convert_to_tensor(case.target, "float32"))

    weight, found = value_and_gradients(function, case.arrays, list(case.gradients))
    numbers = {name: np.asarray(ops.convert_to_numpy(gradient)) for name, gradient in found.items()}
    golden.check(case, ops.convert_to_numpy(weight), numbers)
