"""Linear layers, matrix products, attention."""

from __future__ import annotations

from tests.laws.samples.sample import (
    GROUPED,
    MIXES,
    TOKENS,
    B,
    C,
    across,
    aten,
    barred,
    carried,
    framewise,
    heads,
    parts,
    rows,
    vector,
)
from tests.tracing import number

PRODUCTS = [
    *carried(
        "linear",
        lambda h: aten.linear.default(h, number(5, C), number(5)),
        lambda h: aten.linear.default(rows(h), number(5, C)),
    ),
    *barred("linear", MIXES, lambda h: aten.linear.default(across(h), number(TOKENS, TOKENS))),
    *carried(
        "matmul",
        lambda h: aten.matmul.default(h, number(C, 5)),
        lambda h: aten.matmul.default(h, number(C)),
        lambda h: aten.matmul.default(across(h), h),
        lambda h: aten.matmul.default(h, across(h)),
    ),
    *barred("matmul", MIXES, lambda h: aten.matmul.default(number(5, TOKENS), h)),
    framewise(
        "matmul",
        lambda h: aten.matmul.default(aten.permute.default(h, [0, 2, 3, 1]), aten.permute.default(h, [0, 2, 1, 3])),
        GROUPED,
    ),
    *carried("bmm", lambda h: aten.bmm.default(across(h), h), lambda h: aten.bmm.default(h, number(B, C, 5))),
    *barred("bmm", MIXES, lambda h: aten.bmm.default(number(B, 5, TOKENS), h)),
    *carried("mm", lambda h: aten.mm.default(rows(h), number(C, 5))),
    *barred("mm", "it mixes entries along", lambda h: aten.mm.default(number(5, B * TOKENS), rows(h))),
    *carried("mv", lambda h: aten.mv.default(rows(h), number(C))),
    *barred("mv", "it mixes entries along", lambda h: aten.mv.default(aten.t.default(rows(h)), number(B * TOKENS))),
    *carried("dot", lambda h: aten.dot.default(vector(h), vector(h))),
    *carried("addmm", lambda h: aten.addmm.default(number(5), rows(h), number(C, 5), beta=2, alpha=3)),
    *barred("addmm", "it mixes entries along", lambda h: aten.addmm.default(number(C), number(5, B * TOKENS), rows(h))),
    *carried(
        "baddbmm",
        lambda h: aten.baddbmm.default(number(B, C, C), across(h), h),
        lambda h: aten.baddbmm.default(number(1, TOKENS, 5), h, number(B, C, 5)),
    ),
    *barred("baddbmm", MIXES, lambda h: aten.baddbmm.default(number(C), number(B, 5, TOKENS), h)),
    *carried(
        "einsum",
        lambda h: aten.einsum.default("bnc,cd->bnd", [h, number(C, 5)]),
        lambda h: aten.einsum.default("b n c, b m c -> b n m", [h, h]),
        lambda h: aten.einsum.default("bnc,bnd->bcd", [h, h]),
        lambda h: aten.einsum.default("bnc->bc", [h]),
        lambda h: aten.einsum.default("bnc->cnb", [h]),
        lambda h: aten.einsum.default("bnc,cd->bd", [h, number(C, 5)]),
        lambda h: aten.einsum.default("bnc,bd->bcd", [h, aten.select.int(h, 1, 0)]),
    ),
    *barred("einsum", MIXES, lambda h: aten.einsum.default("bnc,nd->bcd", [h, number(TOKENS, 5)])),
    *barred("einsum", "it has no typing rule", lambda h: aten.einsum.default("...nc,cd->...nd", [h, number(C, 5)])),
    *carried(
        "scaled_dot_product_attention",
        lambda h: aten.scaled_dot_product_attention.default(heads(h), heads(h), heads(h)),
        lambda h: aten.scaled_dot_product_attention.default(h, h, h, number(TOKENS, TOKENS), scale=0.5),
        lambda h: aten.scaled_dot_product_attention.default(heads(h), heads(h), heads(h), number(TOKENS, TOKENS) > -1),
        lambda h: aten.scaled_dot_product_attention.default(parts(h)[0], h, h, number(B, 1, TOKENS)),
        lambda h: aten.scaled_dot_product_attention.default(number(B, 5, C), h, h),
        lambda h: aten.scaled_dot_product_attention.default(h, number(B, 5, C), number(B, 5, C)),
        lambda h: aten.scaled_dot_product_attention.default(
            heads(h), aten.slice.Tensor(heads(h), 1, 0, 2), aten.slice.Tensor(heads(h), 1, 2, 4), enable_gqa=True
        ),
    ),
    *barred(
        "scaled_dot_product_attention",
        MIXES,
        lambda h: aten.scaled_dot_product_attention.default(h, h, h, is_causal=True),
    ),
    framewise("scaled_dot_product_attention", lambda h: aten.scaled_dot_product_attention.default(h, h, h)),
    framewise(
        "scaled_dot_product_attention",
        lambda h: aten.scaled_dot_product_attention.default(*[aten.transpose.int(h, 1, 2)] * 3),
        GROUPED,
    ),
]
