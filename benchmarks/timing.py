"""Where the numbers came from, and where they are kept. The measures are those of the command line."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tldr_compile.cli.measure import Spread, alternate, peak_bytes, ratio, seconds

__all__ = ["RESULTS", "Spread", "alternate", "machine", "peak_bytes", "ratio", "seconds", "write"]

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler reports every start and stop on stderr
RESULTS = Path(__file__).parent / "results"


def machine(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge or repeat a measurement."""
    cuda = device.type == "cuda"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "transformers": version("transformers"),
    }


def write(name: str, record: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Keep a record as `name.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
