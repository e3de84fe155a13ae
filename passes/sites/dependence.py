"""Stub."""
from __future__ import annotations
from collections.abc import Sequence
from torch import fx
from tldr_compile.passes.axes import Atom, Role, TypedGraph
from tldr_compile.passes.capture import Attention
from tldr_compile.passes.refusal import Refusal
class Mixing:
    def __init__(self, typed: TypedGraph, attentions: Sequence[Attention]) -> None: ...
    def kept_apart(self, stream: fx.Node, atom: Atom) -> Refusal | None:
        return Refusal(stream, "samples") if atom.role is Role.SAMPLE else None
