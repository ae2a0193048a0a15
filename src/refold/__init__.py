"""Train a network in a rich form, ship it in a plain one, and prove that both are the same function."""

from refold.checkpoints import convert as convert
from refold.checkpoints import convert_state as convert_state
from refold.errors import InputError as InputError
from refold.probe import probe as probe
from refold.verbs import bench as bench
from refold.verbs import check as check
from refold.verbs import fold as fold
from refold.verbs import inspect as inspect
from refold.verbs import prove as prove
from refold.verbs import unfold as unfold

__version__ = "0.1.0"
