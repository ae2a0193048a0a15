"""Checkpoints of reparameterized weights: from one library's names and gains to another's, and to plain weights.

On arrays by name, and on files that are streamed. Needs numpy, and no framework.
"""

from __future__ import annotations

from refold.checkpoints.convert import Conversion, convert
from refold.checkpoints.naming import Form
from refold.checkpoints.state import convert_state

# The names of the forms, as ``to`` and the command line take them.
FORMS = tuple(form.value for form in Form)

__all__ = ["FORMS", "Conversion", "convert", "convert_state"]
