"""What a user calls the inputs of a captured graph, and which of those are no inputs but parts of a module."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch._guards import ChainedSource, Source
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from tldr_compile.passes.errors import CaptureError

Path: TypeAlias = tuple[str | int, ...]


def is_of_module(source: Source) -> bool:
    """Whether a value was reached through an `nn.Module`: it is a parameter, a buffer or another attribute."""
    return any(
        part.guard_source.is_unspecialized_nn_module()
        or part.guard_source.is_specialized_nn_module()
        or part.guard_source.is_fsdp_module()
        for part in _chain(source)
    )


def _chain(source: Source) -> Iterator[Source]:
    """A source and what it was reached through, the root last."""
    yield source
    if isinstance(source, ChainedSource):
        yield from _chain(source.base)


def source_path(source: Source | None, default: str) -> Path:
    """`L['batch']['video'][0]` -> `("batch", "video", 0)`."""
    if source is None:
        return (default,)
    path: list[str | int] = []
    for part in _chain(source):
        for attribute in ("index", "member", "local_name", "global_name"):
            key = getattr(part, attribute, None)
            if isinstance(key, (str, int)):
                path.append(key)
                break
    return tuple(reversed(path)) or (default,)


def export_paths(program: ExportedProgram) -> dict[str, Path]:
    """The user's path to every user input of an exported program, by placeholder name."""
    entry = program.module_call_graph[0].signature
    in_spec = program.call_spec.in_spec
    if entry is None or in_spec is None:
        raise CaptureError("the exported program does not know its own call signature")
    leaves = torch.utils._pytree.tree_unflatten(list(range(in_spec.num_leaves)), in_spec)
    keyed, _ = torch.utils._pytree.tree_flatten_with_path(leaves)
    argument_names = entry.forward_arg_names or ()
    positional = len(leaves[0])
    paths: dict[str, Path] = {}
    users = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    for name, (keys, _leaf) in zip(users, keyed, strict=True):
        which, first, *rest = (_key(key) for key in keys)
        if which == 0 and isinstance(first, int) and first < min(positional, len(argument_names)):
            first = argument_names[first]
        paths[name] = (first, *rest)
    return paths


def _key(key: Any) -> str | int:
    for attribute in ("idx", "key", "name"):
        value = getattr(key, attribute, None)
        if isinstance(value, (str, int)):
            return value
    return str(key)


def shortest_names(paths: Mapping[str, Path]) -> dict[str, str]:
    """`("batch", "video", 0)` -> `"video[0]"`: from the last word on; the whole path where that is not unique."""
    short = {name: _spell(_from_last_word(path)) for name, path in paths.items()}
    count = collections.Counter(short.values())
    return {name: short[name] if count[short[name]] == 1 else _spell(path) for name, path in paths.items()}


def _from_last_word(path: Path) -> Path:
    last = max((index for index, key in enumerate(path) if isinstance(key, str)), default=0)
    return path[last:]


def _spell(path: Path) -> str:
    return str(path[0]) + "".join(f"[{key!r}]" for key in path[1:])
