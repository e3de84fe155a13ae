"""What tokens and groups weigh, run: the tokens of a run weigh 1 on average."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, fx

from tests.passes.grouped import RUN, B, C, T, emitted, grouping, resolution
from tldr_compile.passes.axes import UNIT, Axes, Kind, Use, axis
from tldr_compile.passes.axes.algebra import concat
from tldr_compile.passes.emit.mass import Weigher, carries_mass
from tldr_compile.passes.emit.resample import Converter, Laid
from tldr_compile.passes.plan import Weighing, Weight

HELD = resolution(0)
ONE = grouping()
MASS = SimpleNamespace(pooling="mass", proportional=True)
PLAIN = SimpleNamespace(pooling="plain", proportional=False)


def weights(weight: Weight, axes: Axes, policy: SimpleNamespace = MASS, kind: Kind = Kind.SUM) -> Tensor:
    """Of a sum over the second dimension of a value along `axes`."""
    use = Use(kind, 0, (1,))

    def emit(converter: Converter, node: fx.Node) -> fx.Node:
        (found,) = Weigher(converter, policy).weights([Weighing(use, weight)], [Laid(node, axes)]).values()
        return found

    return emitted(emit, torch.zeros([int(each.size) for each in axes]), {HELD: ONE})


def shares(mass: Tensor) -> Tensor:
    return 12 * mass / mass.sum(1, keepdim=True)


@pytest.mark.parametrize(("policy", "mass"), [(MASS, ONE.mass), (PLAIN, torch.ones(2, 8))], ids=["mass", "plain"])
def test_groups_share_the_run_by_their_mass(policy: SimpleNamespace, mass: Tensor) -> None:
    found = weights(Weight(HELD, held=True), (axis(B), HELD.axis, axis(C)), policy)
    torch.testing.assert_close(found, shares(mass)[:, :, None])


def test_tokens_share_what_their_group_weighs() -> None:
    found = weights(Weight(HELD), (axis(B), RUN, axis(C)))
    expected = (shares(ONE.mass) / ONE.size).gather(1, ONE.assign)
    torch.testing.assert_close(found, expected[:, :, None])
    torch.testing.assert_close(found.mean(1), torch.ones(2, 1))


def test_what_is_left_of_a_run_weighs_the_mean_of_what_was_summed() -> None:
    tokens = weights(Weight(HELD), (axis(B), RUN))
    left = weights(Weight(HELD, gone=frozenset(axis(RUN.factors[1]).atoms)), (axis(B), axis(T)))
    torch.testing.assert_close(left, tokens.unflatten(1, (3, 4)).mean(2))


def test_a_token_beside_the_run_weighs_one() -> None:
    found = weights(Weight(HELD, held=True), (axis(B), concat([UNIT, HELD.axis])))
    torch.testing.assert_close(found, torch.cat([torch.ones(2, 1), shares(ONE.mass)], 1))


def test_sums_pool_and_attention_is_proportional() -> None:
    only_pooling = SimpleNamespace(pooling="mass", proportional=False)
    assert carries_mass(Kind.MEAN, only_pooling)
    assert carries_mass(Kind.SUM, only_pooling)
    assert not carries_mass(Kind.KEYS, only_pooling)
    assert not carries_mass(Kind.SOFTMAX, only_pooling)


def test_a_mean_over_groups_that_count_alike_needs_no_weight() -> None:
    with pytest.raises(ValueError, match="not enough values"):
        weights(Weight(HELD, held=True), (axis(B), HELD.axis), PLAIN, Kind.MEAN)
