"""Attention with its sharpness, by every provider of the device, and attention with masses, beside SDPA.

    python -m benchmarks.kernels --device cuda --dtype bfloat16 [--tokens 1568 968] [--batch 1 8]

One line per number of tokens, batch and provider: milliseconds (least, middle, most), how many times SDPA's that is,
bytes held beside the inputs, and the distance from the specification.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import timing
from tldr_compile import ops
from tldr_compile.ops import reference
from tldr_compile.records.tables import spread

LINE = "{tokens:>6} {batch:>5} {name:<28} {latency:>26} {over:>8} {peak:>8} {off}"


def calls(q: Tensor, k: Tensor, v: Tensor, log_mass: Tensor) -> dict[str, Callable[[], Any]]:
    """SDPA as models call it and with masses, what takes its place where masses are, and every provider that serves."""
    scale = q.shape[-1] ** -0.5
    bias = log_mass.to(q.dtype)
    rows: dict[str, Callable[[], Any]] = {
        "SDPA": partial(F.scaled_dot_product_attention, q, k, v),
        "SDPA, masses": partial(F.scaled_dot_product_attention, q, k, v, bias),
        "ours, masses, no saliency": partial(ops.attend, q, k, v, scale=scale, log_mass=log_mass),
    }
    for provider in ops.PROVIDERS["attend_and_sharpness"].order:
        if provider.serves(q, k, v, scale, None, log_mass) is None:
            rows[provider.name] = partial(provider.forward, q, k, v, scale, None, None)
            rows[f"{provider.name}, masses"] = partial(provider.forward, q, k, v, scale, None, log_mass)
    return rows


def measure(q: Tensor, k: Tensor, v: Tensor, log_mass: Tensor, rounds: int) -> list[dict[str, Any]]:
    rows = calls(q, k, v, log_mass)
    exact = reference.attention_with_sharpness(q, k, v, scale=q.shape[-1] ** -0.5)[1]
    taken = timing.in_turn(rows, q.device, rounds, f"{q.shape[-2]} tokens")
    return [
        {
            "name": name,
            "latency": timing.Spread.of(taken[name]),
            "over_sdpa": timing.ratio(taken[name], taken["SDPA"]),
            "peak_bytes": timing.peak_bytes(call, q.device),
            "sharpness_off": off(call(), exact),
        }
        for name, call in rows.items()
    ]


def off(result: Tensor | tuple[Tensor, Tensor], exact: Tensor) -> float | None:
    """How far the sharpness is from the specification's, where there is one."""
    return None if isinstance(result, Tensor) else (result[1] - exact).abs().max().item()


def show(row: dict[str, Any], tokens: int, batch: int) -> str:
    latency = spread(row["latency"], 3, 1000)
    far = "" if row["sharpness_off"] is None else f"{row['sharpness_off']:.1e}"
    over, peak = f"{row['over_sdpa'].median:.2f}", f"{row['peak_bytes'] / 1e6:.1f}"
    return LINE.format(tokens=tokens, batch=batch, name=row["name"], latency=latency, over=over, peak=peak, off=far)


def main() -> None:
    parser = timing.parser(__doc__, rounds=20)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1568, 968, 768])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--channels", type=int, default=64)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    print(LINE.format(tokens="tokens", batch="batch", name="", latency="ms", over="x SDPA", peak="MB", off="off"))
    for tokens, batch in product(chosen.tokens, chosen.batch):
        joint = torch.randn(batch, tokens, 3, chosen.heads, chosen.channels, device=chosen.device)
        q, k, v = joint.to(getattr(torch, chosen.dtype)).permute(2, 0, 3, 1, 4)
        log_mass = torch.rand(batch, 1, 1, tokens, device=chosen.device)
        for row in measure(q, k, v, log_mass, chosen.rounds):
            rows.append({"tokens": tokens, "batch": batch, **row})
            print(show(row, tokens, batch), flush=True)
    record = {**vars(chosen), "machine": timing.machine(torch.device(chosen.device)), "rows": rows}
    print(timing.write(f"kernels-{chosen.device}-{chosen.dtype}", record))


if __name__ == "__main__":
    main()
