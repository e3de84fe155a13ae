"""The operators that a merged graph calls: plain ATen where Inductor can fuse it, one registered operator where not."""

from .attention import attend, attend_and_sharpness, sharpness
from .grouping import Grouping, down, group, pick, up
from .matching import match
from .reductions import REDUCTIONS, Split, Tokens, reduction
from .reference import saliency, sharpness_of, shift
from .signals import METRICS, READINGS, SIGNALS, Measure, metric, signal
from .sums import mean, multiply, softmax, sum  # noqa: A004

__all__ = [
    "METRICS",
    "READINGS",
    "REDUCTIONS",
    "SIGNALS",
    "Grouping",
    "Measure",
    "Split",
    "Tokens",
    "attend",
    "attend_and_sharpness",
    "down",
    "group",
    "match",
    "mean",
    "metric",
    "multiply",
    "pick",
    "reduction",
    "saliency",
    "sharpness",
    "sharpness_of",
    "shift",
    "signal",
    "softmax",
    "sum",
    "up",
]
