"""What is not done at a node, and why: a value, until somebody raises it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from tldr_compile.passes.sources import line_of, where


@dataclass(frozen=True)
class Refusal:
    """Why something is not done at `node`."""

    node: fx.Node
    reason: str

    @property
    def operator(self) -> str:
        """What the node calls: "aten.softmax.int"."""
        return str(self.node.target) if self.node.op == "call_function" else self.node.op

    @property
    def line(self) -> str | None:
        """The line of the user's source that the node comes from."""
        return line_of(self.node)

    @property
    def reason_at(self) -> str:
        """The reason with the line."""
        return f"{self.reason} ({self.line})" if self.line else self.reason

    def __str__(self) -> str:
        called = f"{self.operator} " if self.node.op == "call_function" else ""
        return f"{called}{where(self.node)}: {self.reason}"
