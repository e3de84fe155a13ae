"""Published schedules by name.

`vid-tldr-umt-b` and `vid-tldr-umt-l` are what the paper is best known by, retrieval on MSR-VTT; other tasks have their
name behind it: `vid-tldr-umt-b-msvd`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple


class Preset(NamedTuple):
    """Tokens to remove at each attention site, for models with so many sites, and where that was published."""

    schedule: tuple[int, ...]
    sites: int
    source: str


# Choi et al., vid-TLDR, arXiv:2403.13347: what its authors evaluate Unmasked Teacher with, of ViT-B/16 and of ViT-L/16.
_VID_TLDR: Final[Mapping[str, tuple[str, tuple[int, ...], tuple[int, ...]]]] = {
    "": ("MSR-VTT retrieval", (600, 200, 100), (550, 400)),
    "-msvd": ("MSVD retrieval", (450, 250, 200), (600, 200, 100, 100)),
    "-activitynet": ("ActivityNet retrieval", (500,), (600, 300)),
    "-didemo": ("DiDeMo retrieval", (250, 150, 150, 150), (800, 100)),
    "-lsmdc": ("LSMDC retrieval", (400, 150, 150), (250, 250, 200, 200)),
    "-ssv2-label": ("SSv2-label retrieval", (200, 200, 200, 100), (450, 250, 100)),
    "-ssv2-template": ("SSv2-template retrieval", (400, 300), (350, 300, 100, 50)),
    "-qa": ("question answering on MSR-VTT and MSVD", (600, 200), (400, 400, 100)),
}
_SOURCE: Final = "arXiv:2403.13347, evaluation settings in the README of github.com/mlvlab/vid-TLDR"

PRESETS: Final[Mapping[str, Preset]] = {
    f"vid-tldr-umt-{size}{suffix}": Preset(schedule, sites, f"{_SOURCE}: {task}")
    for suffix, (task, base, large) in _VID_TLDR.items()
    for size, schedule, sites in (("b", base, 12), ("l", large, 24))
}
