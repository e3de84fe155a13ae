"""All decisions: what happens at every node, as plain data.

In: typed graph, sites, schedule or budget. Out: `Plan`: the merges, and for every call at which resolutions it is done,
which operands are converted before it, which sums are weighed, and where full length is needed (`barriers`) and why.

    block 1 (1568 tokens) -> merge -> block 2 (600) -> block 3 (600) -> a barrier: restored to 1568

Nothing here makes a node, and nobody else decides anything.
"""

from tldr_compile.passes.plan.budget import meeting
from tldr_compile.passes.plan.plan import (
    OF_ATTENTION,
    Barrier,
    Conversion,
    How,
    Leaving,
    Merge,
    Plan,
    Restored,
    Scaling,
    Solved,
    Step,
    Weighing,
    Weight,
)
from tldr_compile.passes.plan.planner import make_plan
from tldr_compile.passes.plan.resolution import Resolution, at, of_run, tokens_at
from tldr_compile.passes.plan.rows import rows_of, stay_long
from tldr_compile.passes.plan.schedule import Entry, check_sites

__all__ = [
    "OF_ATTENTION",
    "Barrier",
    "Conversion",
    "Entry",
    "How",
    "Leaving",
    "Merge",
    "Plan",
    "Resolution",
    "Restored",
    "Scaling",
    "Solved",
    "Step",
    "Weighing",
    "Weight",
    "at",
    "check_sites",
    "make_plan",
    "meeting",
    "of_run",
    "rows_of",
    "stay_long",
    "tokens_at",
]
