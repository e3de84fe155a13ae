"""The graphs that merging emits, as text: a step that only moves code must leave them as they are.

    python -m tests.emitted keep FILE [--models 500]
    python -m tests.emitted compare FILE

`keep` writes the graphs of the zoo and of generated models; `compare` makes them anew and shows the first differences.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random

import torch
from torch import fx

import tldr_compile
from tests import zoo
from tests.generated.check import Traced, fitted
from tests.generated.strategy import drawn_options, drawn_recipe
from tldr_compile.errors import TldrError

SHOWN = 5  # differences
Texts = Mapping[str, str]


def text(graph: fx.Graph) -> str:
    """A line for each node: its name, what it calls on what, and what it is."""
    lines = []
    for node in graph.nodes:
        value = node.meta.get("val")
        shape = f": {value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else ""
        target = node.target if isinstance(node.target, (str, torch._ops.OpOverload)) else node.target.__name__
        lines.append(f"{node.name} = {node.op} {target}{node.args}{node.kwargs or ''}{shape}")
    return "\n".join(lines)


def emitted(merge: Callable[[], tldr_compile.MergedModule]) -> str:
    """The graph; of what is refused the kind of the refusal, since its words may become clearer."""
    try:
        return text(merge().graph_module.graph)
    except TldrError as refusal:
        return type(refusal).__name__


def texts(models: int) -> Iterator[tuple[str, str]]:
    for case in zoo.CASES:
        model, inputs = case.build(), case.inputs()
        yield str(case), emitted(lambda m=model, x=inputs, s=case.schedule: tldr_compile.apply(m, x, schedule=s))  # type: ignore[misc]
    for number in range(models):
        random = Random(number)
        recipe, options = drawn_recipe(random), drawn_options(random)
        try:
            traced = Traced.of(recipe)
        except RuntimeError:  # some recipes are no models
            continue
        config = tldr_compile.TokenMerging(**options)
        yield f"generated {number}", emitted(lambda t=traced, c=config: fitted(t.program, t.analysis, c))  # type: ignore[misc]


def differences(before: Texts, after: Texts) -> Iterator[str]:
    for name in dict.fromkeys((*before, *after)):
        one, other = before.get(name, ""), after.get(name, "")
        if one != other:
            yield "\n".join((name, *difflib.unified_diff(one.splitlines(), other.splitlines(), lineterm="", n=1)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("keep", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--models", type=int, default=500, help="generated ones that are kept")
    chosen = parser.parse_args()
    if chosen.action == "keep":
        kept = dict(texts(chosen.models))
        chosen.file.write_text(json.dumps({"models": chosen.models, "texts": kept}))
        print(f"{len(kept)} graphs in {chosen.file}")
        return 0
    kept = json.loads(chosen.file.read_text())
    found = list(differences(kept["texts"], dict(texts(kept["models"]))))
    print(*found[:SHOWN], f"{len(kept['texts'])} graphs, {len(found)} differ", sep="\n\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
