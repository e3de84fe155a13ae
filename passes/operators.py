"""The operators that a merged graph calls, as emission calls them: whoever hands some in has to have these.

`tldr_compile.ops` has them; a module is checked against this as any other value is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

Grouping: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""What `group` returns, as a named tuple: kept, source, target, kept_weight, source_weight, mass, size, assign."""


class Operators(Protocol):
    """`tldr_compile.ops` says what each does, and of which shapes."""

    # --- attention ---

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None,
        mask: Tensor | None,
        log_mass: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        enable_gqa: bool,
    ) -> Tensor: ...
    def attend_and_sharpness(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None,
        mask: Tensor | None,
        log_mass: Tensor | None,
        enable_gqa: bool,
    ) -> tuple[Tensor, Tensor]: ...
    def sharpness(
        self, q: Tensor, k: Tensor, *, scale: float | None, mask: Tensor | None, enable_gqa: bool
    ) -> Tensor: ...
    def sharpness_of(self, probabilities: Tensor) -> Tensor: ...
    def received(
        self, q: Tensor, k: Tensor, *, scale: float | None, mask: Tensor | None, enable_gqa: bool
    ) -> Tensor: ...
    def received_of(self, probabilities: Tensor) -> Tensor: ...

    # --- merging ---

    def unit(self, metric: Tensor) -> Tensor: ...
    def shift(self, after: Tensor, before: Tensor) -> Tensor: ...
    def group(
        self,
        metric: Tensor,
        saliency: Tensor | None,
        mass: Tensor,
        size: Tensor,
        r: int,
        *,
        reduction: str,
        seed: int,
        depth: float,
        margin: float | None,
        place: Tensor | None,
    ) -> Grouping: ...
    def down(
        self,
        x: Tensor,
        kept: Tensor,
        source: Tensor,
        target: Tensor,
        kept_weight: Tensor,
        source_weight: Tensor,
        *,
        dim: int,
    ) -> Tensor: ...
    def pick(self, x: Tensor, index: Tensor, *, dim: int) -> Tensor: ...
    def up(self, x: Tensor, assign: Tensor, *, dim: int) -> Tensor: ...

    # --- sums over merged tokens ---

    def mean(
        self, x: Tensor, weight: Tensor, *, dims: Sequence[int], keepdim: bool, dtype: torch.dtype | None
    ) -> Tensor: ...
    def sum(
        self, x: Tensor, weight: Tensor, *, dims: Sequence[int], keepdim: bool, dtype: torch.dtype | None
    ) -> Tensor: ...
    def softmax(self, x: Tensor, weight: Tensor, *, dim: int, dtype: torch.dtype | None, safe: bool) -> Tensor: ...
    def multiply(self, x: Tensor, weight: Tensor) -> Tensor: ...
