"""The heart: affine convolutions and the laws by which they combine. numpy only."""

from refold.algebra.affine import (
    AffineConv as AffineConv,
)
from refold.algebra.affine import (
    average_pool as average_pool,
)
from refold.algebra.affine import (
    batch_norm as batch_norm,
)
from refold.algebra.affine import (
    convolution as convolution,
)
from refold.algebra.affine import (
    dense as dense,
)
from refold.algebra.affine import (
    identity as identity,
)
from refold.algebra.affine import (
    scale_shift as scale_shift,
)
from refold.algebra.affine import (
    transposed_convolution as transposed_convolution,
)
from refold.algebra.affine import (
    turned_around as turned_around,
)
from refold.algebra.geometry import Window as Window
from refold.algebra.geometry import same as same
from refold.algebra.laws import (
    add as add,
)
from refold.algebra.laws import (
    compose as compose,
)
from refold.algebra.laws import (
    pad as pad,
)
from refold.algebra.laws import (
    pass_through as pass_through,
)
from refold.algebra.laws import (
    regroup as regroup,
)
from refold.algebra.laws import (
    select as select,
)
from refold.algebra.laws import (
    stack as stack,
)
from refold.algebra.refusal import Refusal as Refusal
