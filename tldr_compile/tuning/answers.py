"""What a model says of its clips, and how far another answer is from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from tldr_compile.errors import OptionError


class Far(NamedTuple):
    """How far answers are from the dense model's, each float32 `[B]`."""

    distance: Tensor
    """What tuning makes small: 0 for the same answer."""
    same: Tensor
    """For people: 1 for the same answer, 0 for another, or the cosine."""


def _logits(dense: Tensor, merged: Tensor) -> Far:
    """KL divergence of the merged model's classes from the dense one's, in nats; and whether the first is the same."""
    said, other = dense.float().log_softmax(-1), merged.float().log_softmax(-1)
    divergence = (said.exp() * (said - other)).sum(-1)
    return Far(divergence, (said.argmax(-1) == other.argmax(-1)).float())


def _embedding(dense: Tensor, merged: Tensor) -> Far:
    cosine = F.cosine_similarity(dense.float().flatten(1), merged.float().flatten(1), dim=-1)
    return Far(1 - cosine, cosine)


def _tokens(dense: Tensor, merged: Tensor) -> Far:
    """Of every token by itself, mean over the tokens of a clip."""
    cosine = F.cosine_similarity(dense.float(), merged.float(), dim=-1).flatten(1).mean(-1)
    return Far(1 - cosine, cosine)


OBJECTIVES: Final[Mapping[str, Callable[[Tensor, Tensor], Far]]] = {
    "logits": _logits,
    "embedding": _embedding,
    "tokens": _tokens,
}
"""Functions of the dense and the merged answer: logits `[B, K]`, embeddings `[B, ...]`, features `[B, N, C]`."""

SAME: Final[Mapping[str, str]] = {
    "logits": "same answer as dense, %",
    "embedding": "cosine to dense, %",
    "tokens": "cosine of tokens to dense, %",
}


def answer(output: Any) -> Tensor:
    """The tensor that is judged: what the output calls its logits, or its first tensor of floats.

    Raises OptionError where there is none.
    """
    if (logits := _logits_of(output)) is not None:
        return logits
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() >= 2:
            return leaf
    raise OptionError(f"the model returns {type(output).__name__} without a tensor of floats [B, ...] to judge")


def _logits_of(output: Any) -> Tensor | None:
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else None


def objective_of(output: Any) -> str:
    """What the answer is taken for: logits where they have that name, or are a plain tensor `[B, K]`."""
    told = answer(output)
    if told.dim() > 2:
        return "tokens"
    return "logits" if isinstance(output, Tensor) or _logits_of(output) is not None else "embedding"


def check_answer(objective: str, told: Tensor, call: int = 1) -> None:
    """Raises OptionError for an objective that is none or that this answer cannot have, and for what is no number."""
    if objective not in OBJECTIVES:
        raise OptionError(f"objective={objective!r}: objective is 'auto', {', '.join(map(repr, OBJECTIVES))}")
    if objective == "logits" and (told.dim() != 2 or told.shape[1] < 2):
        raise OptionError(f"objective='logits' needs an answer [B, K], K >= 2, and the model's is {list(told.shape)}")
    if objective == "tokens" and told.dim() != 3:
        raise OptionError(f"objective='tokens' needs an answer [B, N, C], and the model's is {list(told.shape)}")
    if not bool(torch.isfinite(told).all()):
        raise OptionError(f"the dense model's own answer to call {call} holds what is no number: leave its clips out")
