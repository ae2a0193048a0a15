"""The certificate: the evidence that two models are one function.

It shares no code with the folder. All that it believes is the wiring of the two graphs; every number
comes from the framework's own operators.
"""

from refold.proof.certificate import Certificate as Certificate
from refold.proof.certificate import EndToEndResult as EndToEndResult
from refold.proof.certificate import LocalResult as LocalResult
from refold.proof.certificate import RegionResult as RegionResult
from refold.proof.certificate import StructureResult as StructureResult
from refold.proof.certificate import Verdict as Verdict
from refold.proof.certificate import schema as schema
from refold.proof.prove import prove as prove
from refold.proof.recheck import Recheck as Recheck
from refold.proof.recheck import compare as compare
