"""A plan -> the new graph.

In: a plan, and the operators to insert. Out: a copy of the graph with the merges done; same inputs, same outputs.

    add -> layer_norm      ->      add -> find groups -> reduce -> layer_norm

The only room that makes nodes of a merged graph. Nothing is decided here: `rewrite` follows the plan, `attention` notes
what a merge asks of its site, `merging` reads it and groups the tokens, `resample` brings values from one resolution to
another, `mass` weighs sums, `views` lays tensors along axes, `resize` writes sizes and offsets of calls anew.
"""

from tldr_compile.passes.emit.rewrite import rewrite

__all__ = [
    "rewrite",
]
