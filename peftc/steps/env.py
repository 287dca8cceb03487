"""What peftc runs on, to paste into a report of a bug: versions, devices, threads, caches; nothing that is secret."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from peftc import processes
from peftc.data import stored
from peftc.measure import costs
from peftc.report import Report, size
from peftc.store import cache
from peftc.version import __version__

# of all variables these alone are shown: they change what is computed or where, and hold no secret
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "MKL_NUM_THREADS",
    "NO_COLOR",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TERM",
)
INNER = ("dev",)  # extras that are for work on peftc itself


def env() -> Report:
    """Return what peftc runs on; home folders are written `~`, and no variable is shown that may hold a secret."""
    needed, extras = _requirements()
    data: dict[str, Any] = {
        "peftc": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {name: _version(name) for name in needed},
        "extras": {extra: {name: _version(name) for name in names} for extra, names in extras.items()},
        "cpu": {"name": costs.processor(), "cores": processes.cores(), "memory_bytes": _memory()},
        "devices": _devices(),
        "threads": {"torch": torch.get_num_threads(), "between_operations": torch.get_num_interop_threads()},
        "caches": _caches(),
        "variables": {name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
    }
    return Report("env", data, lines=_lines(data))


def _requirements() -> tuple[list[str], dict[str, list[str]]]:
    """Return the packages that peftc needs here, and those of each extra, as its own metadata has them."""
    try:
        found = metadata.requires("peftc") or []
    except metadata.PackageNotFoundError:  # run from its sources
        found = ["torch", "transformers", "timm"]
    needed: list[str] = []
    extras: dict[str, list[str]] = {}
    for text in found:
        name = re.match(r"[\w.-]+", text)
        extra = re.search(r"extra == ['\"](\w+)['\"]", text)
        if name and extra is None and (_version(name[0]) or ";" not in text):
            needed.append(name[0])
        elif name and extra and extra[1] not in INNER:
            extras.setdefault(extra[1], []).append(name[0])
    return needed, extras


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def _devices() -> list[dict[str, Any]]:
    """Return the devices beside the CPU."""
    found: list[dict[str, Any]] = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(number)
        place = {"device": f"cuda:{number}", "name": about.name, "memory_bytes": about.total_memory}
        found.append({**place, "capability": f"{about.major}.{about.minor}", "cuda": torch.version.cuda})
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple GPU"})
    return found


def _caches() -> dict[str, str]:
    from huggingface_hub import constants

    folders = {"peftc": cache.home(), "hub": Path(constants.HF_HUB_CACHE), "datasets": stored.home().parent}
    return {name: _without_home(folder) for name, folder in folders.items()}


def _without_home(folder: Path) -> str:
    try:
        return f"~/{folder.expanduser().relative_to(Path.home())}"
    except (ValueError, RuntimeError):
        return str(folder)


def _lines(data: dict[str, Any]) -> list[str]:
    cpu = data["cpu"]
    memory = f", {size(cpu['memory_bytes'])}" if cpu["memory_bytes"] else ""
    rows = {
        "peftc": data["peftc"],
        "python": data["python"],
        "system": data["system"],
        **{name: version or "not installed" for name, version in data["versions"].items()},
        **{f"extra {name}": _extra(packages) for name, packages in data["extras"].items()},
        "cpu": f"{cpu['name']}, {cpu['cores']} cores for this process{memory}",
    }
    for one in data["devices"]:
        is_cuda = "cuda" in one
        more = f", {size(one['memory_bytes'])}, capability {one['capability']}, CUDA {one['cuda']}" if is_cuda else ""
        rows[one["device"]] = one["name"] + more
    if not data["devices"]:
        rows["gpu"] = "none that torch can use"
    threads = data["threads"]
    rows["threads"] = f"{threads['torch']}, and {threads['between_operations']} between operations"
    rows |= {f"cache of {name}": folder for name, folder in data["caches"].items()}
    rows |= data["variables"]
    widest = max(map(len, rows))
    return [f"{name:<{widest}}  {text}" for name, text in rows.items()]


def _extra(packages: dict[str, str | None]) -> str:
    there = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    lacking = ", ".join(name for name, version in packages.items() if not version)
    return "; ".join(filter(None, (there, lacking and f"not installed: {lacking}")))
