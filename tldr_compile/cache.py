"""When compiled code that lies on disk may serve again: what AOTAutograd's cache is told of the functions of `ops`."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import sys
from collections.abc import Iterator
from importlib import resources

import torch
from torch import Tensor, fx
from torch.nn import Parameter

from tldr_compile import ops

_OPS = ops.__name__
_SHIPPED = frozenset(provider for each in ops.PROVIDERS.values() for provider in each.order)


def marks(graph: fx.GraphModule) -> dict[str, str]:
    """The functions of `ops` that `graph` calls, by name, each with a digest of all that decides what they compute.

    AOTAutograd's cache knows the functions in a graph by their names alone. It takes none but torch's, and those of
    `torch._inductor.config.unsafe_marked_cacheable_functions`, whose digests become a part of the key. Empty where
    nothing of `ops` is called, and where no digest can tell all, since a function from outside takes part or a constant
    cannot be read: then that cache is passed by, and AOTAutograd runs anew.
    """
    ours = {node.target for node in _calls(graph) if str(getattr(node.target, "__module__", "")).startswith(_OPS)}
    known = all(map(_is_ours, (*ours, *_called_by_name(graph)))) and _SHIPPED.issuperset(_providers())
    constants = list(_constants(graph))
    if not ours or not known or not all(map(_is_readable, constants)):
        return {}
    order = [(name, [provider.name for provider in each.order]) for name, each in ops.PROVIDERS.items()]
    state = _sources(), order, _attention_backends(), list(map(_content, constants))
    return dict.fromkeys(sorted(map(_name, ours)), hashlib.sha256(repr(state).encode()).hexdigest())


def _calls(graph: fx.GraphModule) -> Iterator[fx.Node]:
    for module in graph.modules():
        if isinstance(module, fx.GraphModule):
            yield from (node for node in module.graph.nodes if node.op == "call_function")


def _called_by_name(graph: fx.GraphModule) -> Iterator[object]:
    """The functions that `ops.group` is told by name, and that may be anybody's."""
    for node in _calls(graph):
        if node.target is ops.group:
            yield ops.REDUCTIONS[str(node.kwargs["reduction"])].choose


def _is_ours(function: object) -> bool:
    """Whether `function` is what a module of `ops` has under its name, so that the sources tell what it computes."""
    module, _, name = _name(function).rpartition(".")
    return module.startswith(_OPS) and getattr(sys.modules.get(module), name, None) is function


def _name(function: object) -> str:
    """As AOTAutograd's cache calls it."""
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__name__', '')}"


def _providers() -> list[ops.Provider[..., object]]:
    """Of every operator in turn, in the order in which they are asked; a compiler sees into some of them."""
    return [provider for each in ops.PROVIDERS.values() for provider in each.order]


def _attention_backends() -> tuple[bool, ...]:
    """What may attend on GPUs: `ops.attend` reads it, and which operator stands in the graph depends on it."""
    flags = torch.backends.cuda
    return flags.flash_sdp_enabled(), flags.mem_efficient_sdp_enabled(), flags.math_sdp_enabled()


@functools.cache
def _sources() -> str:
    files = sorted((each for each in resources.files(ops).iterdir() if each.is_file()), key=lambda each: each.name)
    return hashlib.sha256(repr([(each.name, each.read_bytes()) for each in files]).encode()).hexdigest()


def _constants(graph: fx.GraphModule) -> Iterator[Tensor]:
    """The tensors that lie in a graph as plain attributes, whose values become a part of its code.

    Of all tensors AOTAutograd's cache sees no more than dtype and shape; parameters and buffers are inputs.
    """
    for module in graph.modules():
        yield from (value for _, value in sorted(vars(module).items()) if isinstance(value, Tensor))


def _is_readable(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, Parameter) and not (tensor.is_meta or tensor.is_conj() or tensor.is_neg())
    return plain and tensor.layout == torch.strided


def _content(tensor: Tensor) -> tuple[str, str]:
    values = tensor.detach().cpu().contiguous()
    return str(values.dtype), hashlib.sha256(ctypes.string_at(values.data_ptr(), values.nbytes)).hexdigest()
