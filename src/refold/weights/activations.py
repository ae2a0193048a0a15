"""What an activation does to the size of a signal, and the gain that undoes it."""

from __future__ import annotations

import math
from types import MappingProxyType

# 1 / sqrt(Var[f(x)]) for x from the standard normal distribution: Brock et al., "Characterizing signal
# propagation to close the performance gap in unnormalized ResNets", arXiv 2101.08692. Integrals,
# computed to all digits; the constants that are in circulation (relu 1.7139588594436646) are averages over
# samples, good to three digits. As the frameworks define them: elu with alpha 1, gelu by erf.
# leaky_relu is not here: its default slope is not the same in all of them.
ACTIVATION_GAINS = MappingProxyType(
    {
        "linear": 1.0,
        "relu": math.sqrt(2.0 / (1.0 - 1.0 / math.pi)),
        "elu": 1.27084341785019,
        "gelu": 1.70092624336333,
        "relu6": 1.7128585549724,
        "selu": 0.999999999999997,
        "sigmoid": 4.80131337203995,
        "silu": 1.78718722210044,
        "softplus": 1.91912598010765,
        "softsign": 2.33753336310853,
        "tanh": 1.59253741972283,
    }
)


def activation_gain(name: str) -> float:
    """The gain of the activation of this name: 1 for ``"linear"``, sqrt(2 / (1 - 1/pi)) for ``"relu"``.

    Raises:
        ValueError: the gain of this activation is not known.
    """
    if name not in ACTIVATION_GAINS:
        raise ValueError(
            f"there is no gain for the activation {name!r}: choose one of {', '.join(ACTIVATION_GAINS)}"
        )
    return ACTIVATION_GAINS[name]
