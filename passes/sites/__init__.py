r"""Where tokens can merge, and why not elsewhere.

In: a typed graph and its attentions. Out: the sites, which are the self-attentions over tokens of the clip, each with
the residual stream behind it; or why nothing can merge there.

    x ---------------------> add -> ...      the stream: the merge is inserted after `add`
     \-> norm -> attention --^

Nothing here knows the schedule, or what a merge costs.
"""

from tldr_compile.passes.sites.find import (
    AnySite,
    RefusedSite,
    Site,
    no_sites,
    protected,
    sites,
    why_nothing,
)
from tldr_compile.passes.sites.flow import maximal_runs
from tldr_compile.passes.sites.groupings import TIME, Grouping

__all__ = [
    "TIME",
    "AnySite",
    "Grouping",
    "RefusedSite",
    "Site",
    "maximal_runs",
    "no_sites",
    "protected",
    "sites",
    "why_nothing",
]
