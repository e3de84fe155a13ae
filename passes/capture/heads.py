"""Where probabilities `[..., queries, keys]` may go between the softmax and the values without their tokens meeting.

    softmax [b, h, n, m] -> permute [b, n, m, h] -> linear over h -> permute [b, g, n, m] -> product with the values

A probability is a density over keys: whatever maps heads to heads, pair of tokens by pair, leaves each of them one of
its own pair, and the sum over keys, weighed as every sum over tokens is, still stands behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any, TypeAlias

import torch
from torch import fx

from tldr_compile.passes.fx_utils import named, operands, tensors

aten = torch.ops.aten

PRODUCT = frozenset({aten.matmul.default, aten.bmm.default})
DROPOUT = aten.native_dropout.default
CUT = aten.slice.Tensor

# The dimensions of the queries and of the keys.
Pair: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Read:
    """`user` reads `node`, whose queries and keys lie along `pair`."""

    user: fx.Node
    node: fx.Node
    pair: Pair

    @property
    def rank(self) -> int:
        return tensors(self.node)[0].ndim

    @property
    def given(self) -> dict[str, Any]:
        return named(self.user)

    @property
    def first(self) -> bool:
        return next(operands(self.user), None) is self.node

    @property
    def other(self) -> fx.Node | None:
        """The second operand of two."""
        others = [each for each in operands(self.user) if each is not self.node]
        return others[0] if len(others) == 1 else None

    @property
    def kept(self) -> Pair:
        """The pair in a result that may have more dimensions in front."""
        more = self.user.meta["val"].ndim - self.rank
        return self.pair[0] + more, self.pair[1] + more

    @property
    def is_product(self) -> bool:
        """Whether the keys are summed over in a product of matrices: `p v`, or `v' p'`."""
        last = (self.rank - 2, self.rank - 1)
        return self.user.target in PRODUCT and self.pair == (last if self.first else last[::-1])


Onward: TypeAlias = Callable[[Read], "Pair | None"]
_TABLE: dict[Any, Onward] = {}


def _through(*targets: Any) -> Callable[[Onward], Onward]:
    def register(function: Onward) -> Onward:
        _TABLE.update(dict.fromkeys(targets, function))
        return function

    return register


def onward(user: fx.Node, node: fx.Node, pair: Pair) -> Pair | None:
    """Where queries and keys lie in what `user` makes of probabilities; None if it does anything to the two."""
    return _TABLE[user.target](Read(user, node, pair)) if user.target in _TABLE else None


@_through(aten.clone.default, aten._to_copy.default, aten.alias.default, CUT, DROPOUT)
def _same(read: Read) -> Pair | None:
    return read.pair


@_through(getitem)
def _first(read: Read) -> Pair | None:
    """Of several results; the others are masks and statistics."""
    return read.pair if read.user.args[1] == 0 else None


@_through(aten.transpose.int, aten.permute.default)
def _moved(read: Read) -> Pair | None:
    rank, given = read.rank, read.given
    order = list(range(rank))
    if "dims" in given:
        order = [each % rank for each in given["dims"]]
    else:
        one, two = given["dim0"] % rank, given["dim1"] % rank
        order[one], order[two] = two, one
    return order.index(read.pair[0]), order.index(read.pair[1])


@_through(aten.reshape.default)
def _reshaped(read: Read) -> Pair | None:
    """Of batch and heads only, such as to the shape that is returned and back."""
    now = read.user.meta["val"].shape
    last = read.pair == (read.rank - 2, read.rank - 1)
    return (len(now) - 2, len(now) - 1) if last and now[-2:] == read.node.meta["val"].shape[-2:] else None


@_through(aten.linear.default)
def _linear(read: Read) -> Pair | None:
    return read.pair if read.first and read.rank - 1 not in read.pair else None


@_through(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default)
def _convolved(read: Read) -> Pair | None:
    """A kernel of one entry that is moved by one: a linear map over the channels."""
    given = read.given
    weight = given["weight"].meta["val"]
    channels = read.rank - weight.ndim + 1
    steady = all(_every(given.get(name, value), value) for name, value in (("stride", 1), ("padding", 0)))
    pointwise = steady and _every(weight.shape[2:], 1) and not given.get("transposed", False)
    return read.pair if read.first and pointwise and channels not in read.pair else None


@_through(aten._native_batch_norm_legit_no_training.default)
def _scaled(read: Read) -> Pair | None:
    """By numbers of each channel that were learned."""
    return read.pair if read.first and 1 not in read.pair else None


@_through(aten.layer_norm.default)
def _normalized(read: Read) -> Pair | None:
    """Over dimensions that are not the tokens'."""
    return read.pair if read.first and max(read.pair) < read.rank - len(read.given["normalized_shape"]) else None


@_through(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.add.Tensor, aten.sub.Tensor)
def _pointwise(read: Read) -> Pair | None:
    """With a number, or with one for each head."""
    if read.user.target is aten.div.Tensor and not read.first:
        return None
    count = len(list(operands(read.user)))
    return read.kept if count == 1 or _same_for_all(read, read.other) else None


@_through(*PRODUCT)
def _mixed(read: Read) -> Pair | None:
    """A product over a dimension that is not the tokens'."""
    summed = read.rank - (1 if read.first else 2)
    other = read.other
    ends = other is not None and other.meta["val"].ndim >= 2
    return read.kept if ends and summed not in read.pair and _same_for_all(read, other, matrix=True) else None


@_through(aten.einsum.default)
def _summed(read: Read) -> Pair | None:
    """Letters of the tokens that stay, and that nothing else has."""
    letters, _, result = str(read.given["equation"]).replace(" ", "").partition("->")
    tensors = list(operands(read.user))
    names = letters.split(",")
    if "." in letters or not result or tensors.count(read.node) != 1:
        return None
    query, key = (names[tensors.index(read.node)][each] for each in read.pair)
    if any(letters.count(each) != 1 or each not in result for each in (query, key)):
        return None
    return result.index(query), result.index(key)


def _same_for_all(read: Read, other: fx.Node | None, *, matrix: bool = False) -> bool:
    """Whether an operand has one entry for all queries and keys, along the dimensions that it is broadcast on."""
    if other is None:
        return False
    shape, behind = other.meta["val"].shape, [each - read.rank for each in read.pair]
    return all(shape[each] == 1 for each in behind if -each <= len(shape) and not (matrix and each >= -2))


def _every(given: Any, value: Any) -> bool:
    return all(each == value for each in (given if isinstance(given, Sequence) else [given]))
