"""The neutral graph, affine forms over it, and the plan."""

from refold.graph.graph import Graph as Graph
from refold.graph.graph import Node as Node
from refold.graph.graph import Value as Value
from refold.graph.plan import Kept as Kept
from refold.graph.plan import Plan as Plan
from refold.graph.planner import make_plan as make_plan
from refold.graph.region import Part as Part
from refold.graph.region import Region as Region
