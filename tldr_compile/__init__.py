"""Merge the tokens of video transformers that do not matter, as a compiler pass."""

from tldr_compile.config import TokenMerging

__all__ = ["TokenMerging"]
