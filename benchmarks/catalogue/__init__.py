"""Right and wrong folds, as pairs of PyTorch models: what a check of equality has to tell apart.

The right ones are folded by hand here, with the formulas of the papers in float64 and each weight rounded once. The
wrong ones are such folds with one fault, changes that random inputs hardly show (both in ``faults``), and folds
that published code makes (``published``). Nothing of refold is in it.
"""

from catalogue.faults import faults as faults
from catalogue.nets import Case as Case
from catalogue.published import published as published
from catalogue.right import random_right as random_right
from catalogue.right import right as right
