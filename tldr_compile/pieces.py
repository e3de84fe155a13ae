"""The pieces that Dynamo breaks a model into, and what ran in one call of the model.

A backend sees one graph at a time: whether it is the model, or a piece of it, and whether any other piece holds
attention, shows only while the model runs. What is known is therefore kept per call of the compiled model: a `Call`
lies among the clean-ups of the frame in which `torch.compile`'s wrapper runs that call, and ends with it. Models,
threads and compilations share nothing, and it does not matter which code was compiled now, earlier, or for another
model with the same code.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import fx
from torch._dynamo import convert_frame, eval_frame
from torch._guards import CompileContext, TracingContext
from torch.nn.modules import module

from tldr_compile.config import TokenMerging
from tldr_compile.errors import GraphBreakError, NothingToMerge
from tldr_compile.passes.plan import Solved

# The compiled models (the contexts that `torch.compile` makes, one per model) that have merged tokens once, or have
# said that they do not: a call of theirs that merges nothing, such as one that skips the encoder, is no news.
_SETTLED: WeakSet[Any] = WeakSet()
# What the budget of a compiled model became, for each code of it that Dynamo compiles, by Dynamo's number.
_SOLVED: WeakKeyDictionary[Any, dict[int | None, Solved]] = WeakKeyDictionary()

# Of many places one wants to see a few.
_SHOWN = 3
_NEXT = "\n  "

# What Dynamo speaks of, and which of its options it advises, where a number or a size comes out of a tensor.
_READS = ("data-dependent", "capture_scalar_outputs", "capture_dynamic_output_shape_ops")

_TOWER = (
    "What is in a tensor decides how this model goes on. The vision tower of a language model of transformers is "
    "merged ahead of time, by itself; `inputs` is what the language model calls it with, by name:\n"
    "    model.model.visual = tldr_compile.apply(model.model.visual, kwargs=inputs, schedule=0.2)"
)


@dataclass(frozen=True)
class Break:
    """Why a graph is not known to be the whole of what was compiled."""

    reason: str
    place: str
    ends: bool
    """Whether the graph itself ends in a break, after which the model goes on."""
    reads_tensors: bool = False
    """Whether what is in a tensor decides how the model goes on."""

    @property
    def why(self) -> str:
        return self.told([self.place])

    def told(self, places: Sequence[str]) -> str:
        """The reason with the lines that it was met at, or the first few of them."""
        shown = [*places[:_SHOWN], *([f"and {len(places) - _SHOWN} more"] if len(places) > _SHOWN else [])]
        if self.ends:
            return f"Dynamo broke it, because {self.reason}{''.join(f'{_NEXT}{each}' for each in shown if each)}"
        return f"Dynamo did not capture {', '.join(shown)} as one graph, and {self.reason}"


@dataclass(frozen=True, eq=False)
class Piece:
    """A graph that is not known to be the whole model, and what became of it."""

    config: TokenMerging
    broken: Break
    bound: bool
    """Whether a sequence or a budget is bound to this graph, so that no other graph can have it."""
    nothing: str | None
    """Why nothing is merged in it."""

    @property
    def same(self) -> tuple[str | None, str]:
        """What pieces have in common of which the same is to be said."""
        return self.nothing, self.broken.reason

    def watched(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """`compiled`, which tells the present call of the model that it runs."""

        def run(*args: Any) -> Any:
            # DDP runs its pieces while they are compiled, with fake tensors: that is no call of the model.
            call = present_call() if TracingContext.try_get() is None else None
            if call is not None:
                call.run(self)
            return compiled(*args)

        return run


class Call:
    """One call of a compiled model: the pieces that ran in it. `torch.compile` calls it when the call has ended."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._ran: list[Piece] = []
        self._told: set[tuple[str | None, str]] = set()
        self._merging = 0
        self._compiled: tuple[Piece, TracingContext | None] | None = None

    @property
    def merges(self) -> bool:
        return self._merging > 0

    def run(self, piece: Piece) -> None:
        """Raises `GraphBreakError` where a sequence or a budget is bound already, to another graph or to this one."""
        if piece.bound:
            self.refuse_second(piece.config, piece.broken)
        self._merging += piece.nothing is None
        if piece not in self._ran:
            self._ran.append(piece)

    def compiles(self, piece: Piece) -> None:
        self._compiled = (piece, TracingContext.try_get())

    def warn_of(self, piece: Piece) -> None:
        """Say at once that a graph merges nothing and that the model was broken after it: nobody may call the rest."""
        if piece.same in self._told:
            return
        self._told.add(piece.same)
        warnings.warn(
            f"tldr: a piece of the model merges nothing: {piece.nothing} ({piece.broken.why})\n"
            "What follows the break is looked at by itself; fullgraph=True names every break",
            stacklevel=2,
        )

    def refuse_second(self, config: TokenMerging, broken: Break) -> None:
        """Raises `GraphBreakError` where a sequence or a budget is bound already in this call."""
        first = next((piece for piece in self._ran if piece.bound), None) or self._just_compiled()
        if first is not None:
            refuse_piece(config, first.broken if first.broken.ends else broken)

    def _just_compiled(self) -> Piece | None:
        """What was bound in the same run of Dynamo: DDP takes one graph of Dynamo's apart, before any of it runs."""
        piece, tracing = self._compiled or (None, None)
        present = TracingContext.try_get()
        return piece if piece and piece.bound and present is not None and tracing is present else None

    def __call__(self) -> None:
        if _failing(sys._getframe(1)) or not self._ran:
            return
        if self._model not in _SETTLED:
            if not self.merges:
                self._say_nothing()
            _SETTLED.add(self._model)
            if self._merging > 1:
                self._say_several()

    def _say_nothing(self) -> None:
        text = f"no graph of this model merges tokens:{''.join(self._reasons())}"
        if any(piece.broken.reads_tensors for piece in self._ran):
            text = f"{text}\n{_TOWER}"
        if self._ran[0].config.on_nothing == "raise":
            raise NothingToMerge(
                f'{text}\nfullgraph=True names every break; with on_nothing="warn" the model runs as it is'
            )
        warnings.warn(f"tldr: {text}\nThe model runs as it is", stacklevel=3)

    def _reasons(self) -> Iterator[str]:
        """Why nothing is merged: each reason once, with the lines of the model that it was met at."""
        alike: dict[tuple[str | None, str], list[Piece]] = {}
        for piece in sorted(self._ran, key=lambda piece: not piece.broken.ends):  # what follows a break comes after it
            alike.setdefault(piece.same, []).append(piece)
        for pieces in alike.values():
            places = list(dict.fromkeys(piece.broken.place for piece in pieces))
            yield f"\n- {pieces[0].nothing} ({pieces[0].broken.told(places)})"

    def _say_several(self) -> None:
        """One fraction holds for every graph, and still the answer depends on where the model was broken."""
        broken = [piece.broken for piece in self._ran if piece.nothing is None]
        why = next((each for each in broken if each.ends), broken[0]).why
        warnings.warn(
            f"tldr: tokens are merged in {self._merging} graphs of one call of this model, and each begins with all "
            f"tokens and equal masses: what is saved, and the result, depend on where the model is broken: {why}",
            stacklevel=3,
        )


def present_call() -> Call | None:
    """The call of a compiled model that this thread is in; None outside of `torch.compile`."""
    frame = _wrapper()
    cleanups = frame.f_locals.get("cleanups") if frame is not None else None
    if frame is None or cleanups is None:
        return None
    call = next((each for each in cleanups if isinstance(each, Call)), None)
    if call is None:
        call = Call(frame.f_locals["self"])
        cleanups.append(call)
    return call


def settle() -> None:
    """The model that is being compiled merges tokens in one graph."""
    frame = _wrapper()
    if frame is not None:
        _SETTLED.add(frame.f_locals["self"])


def solved() -> Solved | None:
    """What the budget became when the code that is being compiled was compiled before, for other sizes."""
    frame = _wrapper()
    return _SOLVED.get(frame.f_locals["self"], {}).get(_code()) if frame is not None else None


def keep(found: Solved) -> None:
    """Remember it for when the same code is compiled again."""
    frame = _wrapper()
    if frame is not None:
        _SOLVED.setdefault(frame.f_locals["self"], {})[_code()] = found


def _code() -> int | None:
    """Dynamo's number of the code that it compiles now: the same each time that it compiles it."""
    compiling = CompileContext.current_compile_id()
    return compiling.frame_id if compiling is not None else None


def why_piece(gm: fx.GraphModule) -> Break | None:
    """Why `gm`, which Dynamo hands to the backend now, may be a piece of the model; None for the whole of it."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is not None and reason.graph_break:
        places = [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in reason.user_stack[-1:]]
        reads = any(word in reason.reason for word in _READS)
        return Break(_gist(reason.reason), "".join(places), ends=True, reads_tensors=reads)
    caller = next(_callers(), None)
    if caller is None:
        return None
    code = caller.f_code
    name = code.co_qualname if hasattr(code, "co_qualname") else code.co_name
    place = f"{name} ({code.co_filename}:{caller.f_lineno})"
    return Break("TORCH_LOGS=graph_breaks says why", place, ends=False)


def refuse_piece(config: TokenMerging, broken: Break) -> None:
    """Raises `GraphBreakError`: a sequence, a budget or a depth has no meaning for a piece of the attention."""
    given = "the default schedule" if config.is_default_schedule else "the schedule"
    meaning = f"{given} {config.asked} has one entry per attention site of one graph"
    if config.budget is not None:
        meaning = f"budget={config.budget:g} is a part of what one graph costs"
    elif isinstance(config.entries, float):
        meaning = f"made_for says {dict(config.made_for)['sites']} attention sites, of one graph"
    raise GraphBreakError(
        f"{meaning}, and here the attention is spread over several: this graph is only a piece of the model: "
        f"{broken.why}\n"
        "Compile the model as one graph (fullgraph=True names every break); or compile only the part that holds the "
        "attention, inside of what wraps it, as in DDP(torch.compile(model)); where DDPOptimizer is the reason, set "
        "torch._dynamo.config.optimize_ddp = False; where fully_shard holds layers one by one, shard the whole model "
        "alone, or merge ahead of time and shard that (fully_shard(tldr_compile.apply(...))); or give one fraction for "
        'all sites, such as options={"schedule": 0.1}'
    )


def _gist(reason: str) -> str:
    """What Dynamo says of a break, without its hints: the first line, and the explanation."""
    first, *rest = (line.strip() for line in reason.strip().splitlines())
    explained = [line.removeprefix("Explanation: ") for line in rest if line.startswith("Explanation: ")]
    return ": ".join((first, *explained))


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_wrapper(frame: FrameType) -> bool:
    return frame.f_code.co_name == "compile_wrapper" and frame.f_code.co_filename == eval_frame.__file__


def _wrapper() -> FrameType | None:
    """The frame in which `torch.compile` runs the model that is being compiled, or running."""
    return next(filter(_is_wrapper, _frames()), None)


def _callers() -> Iterator[FrameType]:
    """What runs in Python between the compiled callable and the function that is being compiled, innermost first.

    Dynamo compiles the outermost function that it can. Where one above it runs in Python, it was broken or skipped,
    and what it calls comes to the backend graph by graph, each with a complete function's `return_value`.
    """
    frames = list(_frames())
    ours = next((index for index, frame in enumerate(frames) if _is_wrapper(frame)), None)
    if ours is None:
        return
    dynamo = [index for index, frame in enumerate(frames[:ours]) if frame.f_code.co_filename == convert_frame.__file__]
    for frame in frames[max(dynamo, default=ours) + 1 : ours]:
        if frame.f_code.co_filename != module.__file__:  # calling a module leads to its `forward`, and no further
            yield frame


def _failing(frame: FrameType) -> bool:
    """Whether an exception is leaving `frame`; one that its caller is handling meanwhile is another matter."""
    error = sys.exc_info()[1]
    trace = error.__traceback__ if error is not None else None
    while trace is not None:
        if trace.tb_frame is frame:
            return True
        trace = trace.tb_next
    return False
