"""The rule table of the axis types, one rule per operator; families are one line each."""

from tldr_compile.passes.rules import indexing, pointwise, products, reductions, spatial, views  # noqa: F401  (registers the rules)
from tldr_compile.passes.rules.resize import RESIZE, Held, resize
from tldr_compile.passes.rules.table import TABLE, Call, Kind, Operand, Rule, Typed, Use, rule, unknown

__all__ = ["RESIZE", "TABLE", "Call", "Held", "Kind", "Operand", "Rule", "Typed", "Use", "resize", "rule", "unknown"]
