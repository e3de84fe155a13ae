"""The rule table of the axis types, one rule per operator; families are one line each."""

from tldr_compile.passes.axes.rules import indexing, pointwise, products, spatial, sums, views  # noqa: F401  (registers the rules)
from tldr_compile.passes.axes.rules.table import TABLE, Call, Kind, Operand, Rule, Typed, Use, rule, unknown

__all__ = ["TABLE", "Call", "Kind", "Operand", "Rule", "Typed", "Use", "rule", "unknown"]
