"""Training in two processes on gloo: the gradients of one step are those of one process with all clips.

    torchrun --nproc-per-node 2 -m benchmarks.roads.distributed     prints a line of JSON: road -> largest difference
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import tldr_compile
from benchmarks.roads.subjects import SCHEDULE, Encoder, clips, compiles


def gradients(run: Callable[[Tensor], Tensor], model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    run(batch).square().mean().backward()
    own = {name.removeprefix("module."): each.grad for name, each in model.named_parameters()}
    return {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in own.items()}


def compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    torch.compiler.reset()
    run: Callable[[Tensor], Tensor] = torch.compile(model, backend="tldr", options={"schedule": SCHEDULE})
    return run


def merged(batch: Tensor) -> tldr_compile.MergedModule:
    return tldr_compile.apply(Encoder(), (batch,), schedule=SCHEDULE)


def roads(batch: Tensor) -> dict[str, dict[str, Tensor]]:
    found = {}
    wrapped = DistributedDataParallel(merged(batch))
    found["DDP(merged)"] = gradients(wrapped, wrapped, batch)
    model = Encoder()
    found["DDP(torch.compile(model))"] = gradients(DistributedDataParallel(compiled(model)), model, batch)
    torch._dynamo.config.optimize_ddp = False  # which cuts the graph, so that a schedule could not be bound
    model = Encoder()
    found["torch.compile(DDP(model))"] = gradients(compiled(DistributedDataParallel(model)), model, batch)
    module = merged(batch)
    fully_shard(module)
    found["fully_shard(merged)"] = gradients(module, module, batch)
    model = Encoder()
    fully_shard(model)
    found["torch.compile(fully_shard(model))"] = gradients(compiled(model), model, batch)
    return found


def farthest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted)


def main() -> None:
    compiles()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, everything = dist.get_rank(), clips(4)
    module = merged(everything)
    wanted = gradients(module, module, everything)
    found = roads(everything[2 * rank : 2 * rank + 2])
    if rank == 0:
        print(json.dumps({road: farthest(own, wanted) for road, own in found.items()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
