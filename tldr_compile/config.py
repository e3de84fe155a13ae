"""The options, as one frozen value that is checked before anything runs."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, Final, Literal

from tldr_compile import config_file
from tldr_compile.errors import OptionError, ScheduleError
from tldr_compile.ops import METRICS, REDUCTIONS, SIGNALS, Measure
from tldr_compile.presets import PRESETS

DEFAULT_SCHEDULE: Final = (0.25, 0.12, 0.06)

_CHOICES: Final[Mapping[str, Collection[str]]] = {
    "saliency": SIGNALS,
    "metric": METRICS,
    "reduction": REDUCTIONS,
    "outputs": ("restore", "merged"),
    "pooling": ("mass", "plain"),
    "on_nothing": ("raise", "warn"),
    "grouping": ("auto", "each", "shared", "blocks"),
}
_HOW_MANY: Final = ("schedule", "budget")
_SOURCES: Final = ("config", "preset")
_SWITCHES: Final = ("proportional", "return_places", "verify")


@dataclass(frozen=True)
class TokenMerging:
    """What to merge, where, and how.

    schedule: how many tokens go away at each attention site. A sequence is bound to the sites of the captured graph in
        execution order, missing entries are 0: an int is a number of tokens, a float in (0, 1) a fraction of
        the tokens there. One float holds for every site that can merge. `None` is `DEFAULT_SCHEDULE`, bound to
        the first sites that can merge.
    budget: instead of a schedule, the part of the dense graph's operations in products that the merged graph may cost,
        merging included, in (0, 1). One fraction at every site that can merge is solved for it at the traced sizes; in
        `torch.compile` those of the first call, and the fraction then holds for all recompiles of the same code.
    saliency: how much a token weighs when it is merged: by its attention (vid-TLDR); by how far attention
        moved it, or the MLP of the layer before (Representation Shift), which costs no attention map; all the same
        (ToMe); or by another signal of `ops.SIGNALS`, also one that was registered with `tldr_compile.ops.signal`.
    metric: what matching compares: the residual stream; the mean of the keys over the heads (ToMe); or a metric that
        was registered with `tldr_compile.ops.metric`.
    reduction: how tokens are chosen: merge, one of the baselines that drop tokens instead, or one that was registered
        with `tldr_compile.ops.reduction`.
    margin: above which cosine two tokens count as alike for the energy (PiToMe). None is the paper's, which falls from
        0.9 at the first site towards 0 at the last.
    outputs: whether outputs over tokens get their original length back. Those that stay short are all as long as the
        shortest of them, their tokens in the order of their places.
    return_places: whether a merged module returns, beside the model's outputs, which tokens are left (`Kept`).
    pooling: whether means over tokens are weighted by mass.
    proportional: whether later attention adds the logarithm of the mass of its keys.
    protect: the tokens that are never merged: those that no pixel made, or at least so many that lead.
    clip: the names of the inputs that carry the video, where that cannot be told.
    grouping: what one grouping holds for. Each value of a site's batch (each frame) by itself; all frames alike, where
        all outputs depend on all of them anyway; or blocks of tokens that a later operator joins. "auto" takes the
        finest, and a coarser one where that removes an operator that would need the full length, and costs less.
    on_nothing: what happens when there is no site to merge at.
    verify: check the rewritten graph against its definition on the example inputs.
    portable: whether a merged module's graph is made of torch's own operators alone, for programs that run where this
        package is not (`torch.export.save`, AOTInductor, ONNX). "native": but for attention, which is then computed
        on CPUs by operators in C++, without gradients; `tldr_compile.write_library` writes the library that such
        programs need.
    inductor: options for Inductor; kept as a tuple of pairs.
    made_for: what is known of the model that the options were chosen for, as JSON takes it; kept as a tuple of pairs.
        A graph with another number of attention sites than its "sites" is refused; the rest is for people.

    Raises `ScheduleError` for a schedule and `OptionError` for any other option with a value that it does not take.
    """

    schedule: float | Sequence[float] | None = None
    budget: float | None = None
    saliency: str = "attention"
    metric: str = "tokens"
    reduction: str = "merge"
    margin: float | None = None
    outputs: Literal["restore", "merged"] = "restore"
    return_places: bool = False
    pooling: Literal["mass", "plain"] = "mass"
    proportional: bool = True
    protect: Literal["auto"] | int = "auto"
    clip: str | Sequence[str] = "auto"
    grouping: Literal["auto", "each", "shared", "blocks"] = "auto"
    on_nothing: Literal["raise", "warn"] = "raise"
    verify: bool = False
    portable: bool | Literal["native"] = False
    # Inductor's values need not be hashable; equality still sees them.
    inductor: Mapping[str, Any] | tuple[tuple[str, Any], ...] = field(default=(), hash=False)
    made_for: Mapping[str, Any] | tuple[tuple[str, Any], ...] = field(default=(), hash=False)

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        for name in _SWITCHES:
            _check_switch(name, getattr(self, name))
        if self.portable != "native" and not isinstance(self.portable, bool):
            raise OptionError(f"portable={self.portable!r}: portable is True, False or 'native'")
        normal = {
            "schedule": _schedule(self.schedule),
            "budget": _budget(self.budget),
            "protect": _protect(self.protect),
            "clip": _clip(self.clip),
            "margin": _margin(self.margin),
            "inductor": _inductor(self.inductor),
            "made_for": _made_for(self.made_for),
        }
        for name, value in normal.items():
            object.__setattr__(self, name, value)
        if self.margin is not None and not REDUCTIONS[self.reduction].margin:
            readers = " or ".join(f"reduction={name!r}" for name, each in REDUCTIONS.items() if each.margin)
            raise OptionError(f"margin={self.margin!r}: reduction={self.reduction!r} reads no margin: use {readers}")
        if self.budget is not None and self.schedule is not None:
            raise OptionError(
                f"budget={self.budget!r} is given together with a schedule, and each says how many tokens go: give one"
            )
        if self.return_places and self.outputs != "merged":
            raise OptionError("return_places=True tells which tokens are left: it needs outputs='merged'")
        if REDUCTIONS[self.reduction].ranks and not SIGNALS[self.saliency].reads:
            raise OptionError(
                f"reduction={self.reduction!r} drops the least salient tokens, and with saliency={self.saliency!r} all "
                "are equal: use saliency='attention', or reduction='random' or 'slice'"
            )

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> TokenMerging:
        """The configuration that `torch.compile(..., options=options)` asks for.

        Beside the fields there are "config", a file that `save` wrote, and "preset", the name of a published schedule.
        What is given beside a file wins over what it says.

        Raises `OptionError`, and `ScheduleError` for a schedule.
        """
        given = dict(options)
        path, preset = (given.pop(name, None) for name in _SOURCES)
        _check_names(given, [*(entry.name for entry in fields(cls)), *_SOURCES])
        if preset is not None:
            given = {**_of_preset(preset, given), **given}
        base = cls() if path is None else _of_file(path)
        if any(given.get(name) is not None for name in _HOW_MANY):
            base = replace(base, schedule=None, budget=None)
        return replace(base, **given)

    @classmethod
    def preset(cls, name: str, **options: Any) -> TokenMerging:
        """A published schedule by its name; see `tldr_compile.presets`. Raises `OptionError`, as `from_options`.

        It is bound to models with as many attention sites as it was published for.
        """
        return cls.from_options({**options, "preset": name})

    @classmethod
    def load(cls, path: str | os.PathLike[str], **options: Any) -> TokenMerging:
        """What `save` wrote; `options` win over it.

        Raises `OptionError` for what is no such file, or was written by a version that knows more than this one; it and
        `ScheduleError` for values, as ever.
        """
        return cls.from_options({**options, "config": path})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all options, and what they were `made_for`, as JSON for people and for `load`.

        Raises `OptionError` where a value of `inductor` has no place in JSON, and `OSError`.
        """
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["inductor"] = dict(self.inductor)
        config_file.write(path, values, dict(values.pop("made_for")))

    @property
    def is_default_schedule(self) -> bool:
        """Whether the user gave no schedule: the default is bound to the first sites that can merge."""
        return self.schedule is None and self.budget is None

    @property
    def entries(self) -> float | tuple[int | float, ...]:
        """The schedule in effect: one fraction for every site that can merge, or one entry per site.

        Empty where there is a budget: what it becomes depends on the graph.
        """
        if self.schedule is None:
            return () if self.budget is not None else DEFAULT_SCHEDULE
        return self.schedule if isinstance(self.schedule, float) else tuple(self.schedule)

    @property
    def is_of_one_graph(self) -> bool:
        """Whether what is asked is told in terms of one graph: an entry for each of its sites, a part of its cost."""
        return self.budget is not None or isinstance(self.entries, tuple)

    @property
    def asked(self) -> str:
        """The schedule or the budget, in words."""
        if self.budget is not None:
            return f"for a budget of {self.budget:g}"
        return str(list(self.entries) if isinstance(self.entries, tuple) else self.entries)

    @property
    def signal(self) -> Measure:
        """How saliency is told; as uniform, where the reduction makes no use of it."""
        return SIGNALS[self.saliency if REDUCTIONS[self.reduction].salient else "uniform"]

    @property
    def comparison(self) -> Measure:
        """What matching compares."""
        return METRICS[self.metric]

    @property
    def pairs(self) -> Callable[[int, int], int] | None:
        """How many pairs of tokens a merge compares, of how many there are and go; None: as many as matching."""
        return REDUCTIONS[self.reduction].pairs

    @property
    def asks(self) -> frozenset[str]:
        """What a merge asks of its site, of `ops.READINGS`. How far a token moved is told by the stream before, too."""
        reads = {*self.signal.reads, *self.comparison.reads}
        return frozenset(reads | {"before"} if "shift" in reads else reads)

    @property
    def is_zero(self) -> bool:
        """Whether the schedule asks for nothing at all."""
        if self.budget is not None:
            return False
        entries = self.entries
        return not any(entries) if isinstance(entries, tuple) else not entries


def _check_names(given: Iterable[str], names: Sequence[str]) -> None:
    for name in given:
        if name not in names:
            raise OptionError(_unknown_option(name, names))


def _check_choice(name: str, value: object, choices: Collection[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        allowed = ", ".join(map(repr, choices))
        raise OptionError(f"{name}={value!r}: {name} is one of {allowed}{_nearest(value, choices)}")


def _check_switch(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise OptionError(f"{name}={value!r}: {name} is True or False")


def _schedule(value: object) -> float | tuple[int | float, ...] | None:
    if value is None:
        return None
    number = _number(value)
    if isinstance(number, float):
        return _fraction(number, f"schedule={value!r}")
    if isinstance(number, int):
        raise ScheduleError(
            f"schedule={value!r}: one number of tokens belongs to one site; write [{value!r}] for the first site, "
            "or one fraction, such as 0.1, for all of them"
        )
    if isinstance(value, (str, bytes, Mapping, Set)) or not isinstance(value, Iterable):
        raise ScheduleError(
            f"schedule={value!r} is {_a(value)}; a schedule is a sequence with one entry per site (an int: tokens to "
            "remove; a float in (0, 1): that fraction of them), or one float for all sites"
        )
    return tuple(_entry(entry, f"schedule[{index}]={entry!r}") for index, entry in enumerate(value))


def _entry(value: object, name: str) -> int | float:
    number = _number(value)
    if number is None:
        raise ScheduleError(
            f"{name} is {_a(value)}; an entry is an int (tokens to remove) or a float in (0, 1) (that fraction of them)"
        )
    if isinstance(number, float):
        return _fraction(number, name)
    if number < 0:
        raise ScheduleError(f"{name}: a number of tokens to remove cannot be negative")
    return number


def _number(value: object) -> int | float | None:
    """A Python number of a Python or NumPy number; True is none."""
    if isinstance(value, bool):
        return None
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else None


def _fraction(value: float, name: str) -> float:
    if math.isnan(value):
        raise ScheduleError(f"{name}: a fraction of the tokens cannot be NaN")
    if value < 0:
        raise ScheduleError(f"{name}: a fraction of the tokens cannot be negative")
    if value >= 1:
        whole = f"; for a number of tokens write the int {int(value)}" if value.is_integer() else ""
        raise ScheduleError(f"{name}: a fraction of the tokens is below 1{whole}")
    return value


def _budget(value: object) -> float | None:
    number = _number(value)
    if value is None or (isinstance(number, float) and 0 < number < 1):
        return number
    raise OptionError(f"budget={value!r}: budget is the part of the dense operations that is left, between 0 and 1")


def _protect(value: object) -> str | int:
    if value == "auto":
        return "auto"
    number = _number(value)
    if isinstance(number, int) and number >= 0:
        return number
    raise OptionError(f"protect={value!r}: protect is 'auto' or the number of leading tokens that are never merged")


def _clip(value: object) -> str | tuple[str, ...]:
    if value == "auto":
        return "auto"
    names = (value,) if isinstance(value, str) else value
    if isinstance(names, Sequence) and names and all(isinstance(name, str) and name for name in names):
        return tuple(names)
    raise OptionError(f"clip={value!r}: clip is 'auto' or the names of the inputs that carry the video")


def _margin(value: object) -> float | None:
    number = _number(value)
    if value is None or (number is not None and -1 < number <= 1):
        return None if number is None else float(number)
    raise OptionError(f"margin={value!r}: margin is None or a cosine, a number above -1 and at most 1")


def _inductor(value: object) -> tuple[tuple[str, Any], ...]:
    if value == ():
        return ()
    if isinstance(value, tuple):  # what `dataclasses.replace` hands back
        value = dict(value)
    if not isinstance(value, Mapping):
        raise OptionError(f"inductor={value!r}: inductor is a mapping of Inductor's options")
    known = _inductor_options()
    for name in value:
        if _inductor_name(name) not in known:
            raise OptionError(f"inductor={{{name!r}: ...}}: Inductor has no option {name!r}{_nearest(name, known)}")
    return tuple((_inductor_name(name), entry) for name, entry in value.items())


def _made_for(value: object) -> tuple[tuple[str, Any], ...]:
    pairs = dict(value) if isinstance(value, tuple) else value  # what `dataclasses.replace` hands back
    if not isinstance(pairs, Mapping) or not all(isinstance(name, str) for name in pairs):
        raise OptionError(f"made_for={value!r}: made_for is a mapping of names to what JSON takes")
    sites = pairs.get("sites", 1)
    if not isinstance(_number(sites), int) or sites < 1:
        raise OptionError(f"made_for={{'sites': {sites!r}}}: sites is the number of attention sites of a model")
    try:
        return tuple(json.loads(json.dumps({**pairs}, allow_nan=False)).items())
    except (TypeError, ValueError) as error:
        raise OptionError(f"made_for={value!r}: made_for is a mapping of names to what JSON takes: {error}") from error


def _of_preset(name: object, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a preset stands for."""
    _check_choice("preset", name, PRESETS)
    for other in _HOW_MANY:
        if given.get(other) is not None:
            raise OptionError(f"preset={name!r} is a schedule, and {other}= is given beside it: give one of them")
    found = PRESETS[str(name)]
    return {"schedule": found.schedule, "made_for": {"sites": found.sites, "preset": name, "source": found.source}}


def _of_file(path: str | os.PathLike[str]) -> TokenMerging:
    """Raises `OptionError` and `ScheduleError`, with the file and the version that wrote it."""
    read = config_file.read(path)
    try:
        _check_names(read.options, [entry.name for entry in fields(TokenMerging) if entry.name != "made_for"])
        return TokenMerging(**read.options, made_for=read.made_for)
    except (OptionError, ScheduleError) as error:
        raise type(error)(f"{os.fspath(path)}, written by tldr-compile {read.version}: {error}") from error


def _inductor_name(name: object) -> str:
    return str(name).replace("-", "_")  # torch.compile takes both spellings


def _inductor_options() -> list[str]:
    from torch._inductor import list_options  # noqa: PLC0415 - importing Inductor takes seconds

    return list_options()


def _unknown_option(name: object, names: Sequence[str]) -> str:
    allowed = f"the options of tldr are {', '.join(names)}"
    if _inductor_name(name) in _inductor_options():
        return f"unknown option {name!r}: it is one of Inductor's, write inductor={{{name!r}: ...}}; {allowed}"
    return f"unknown option {name!r}: {allowed}{_nearest(name, names)}"


def _nearest(value: object, choices: Collection[str]) -> str:
    found = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.4)
    return f"; did you mean {found[0]!r}?" if found else ""


def _a(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
