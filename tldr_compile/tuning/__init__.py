"""From a model, clips and a budget to the configuration that keeps the model's answers.

clips -> judge (what a configuration costs, and how far its answers are from the dense model's)
judge, ways -> search -> Tuned: the configuration, and what it and the built-in ways do on clips that chose nothing
"""

from tldr_compile.tuning.tuner import Tuned, tune

__all__ = ["Tuned", "tune"]
