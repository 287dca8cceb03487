"""Make trained models smaller and faster; every command line word is a function here.

Names are found on first use, so that ``import peftc`` imports neither torch nor anything else.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from peftc.version import __version__ as __version__

__all__ = [
    "PeftcError",
    "Report",
    "Source",
    "analyze",
    "bench",
    "calibrate",
    "compare",
    "decompose",
    "demo",
    "distill",
    "env",
    "evaluate",
    "extract_lora",
    "finetune",
    "export",
    "init",
    "load",
    "merge",
    "methods",
    "prune_layers",
    "push_to_hub",
    "report",
    "run",
    "show",
    "truncate",
    "with_adapter",
]

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from peftc.errors import PeftcError
    from peftc.models.load import with_adapter
    from peftc.models.model import Model
    from peftc.report import Report
    from peftc.steps.analyze import analyze
    from peftc.steps.bench import bench
    from peftc.steps.calibrate import calibrate
    from peftc.steps.compare import compare
    from peftc.steps.decompose import decompose
    from peftc.steps.demo import demo
    from peftc.steps.distill import distill
    from peftc.steps.env import env
    from peftc.steps.evaluate import evaluate
    from peftc.steps.export import export
    from peftc.steps.extract_lora import extract_lora
    from peftc.steps.finetune import finetune
    from peftc.steps.init import init
    from peftc.steps.merge import merge
    from peftc.steps.methods import methods
    from peftc.steps.prune_layers import prune_layers
    from peftc.steps.push import push_to_hub
    from peftc.steps.report import report
    from peftc.steps.show import show
    from peftc.steps.truncate import truncate
    from peftc.store.source import Source

_HOMES = {
    "PeftcError": "peftc.errors",
    "Report": "peftc.report",
    "Source": "peftc.store.source",
    "push_to_hub": "peftc.steps.push",
    "with_adapter": "peftc.models.load",
}


def load(
    model: str | Path | Source | nn.Module | Model, *, merge: bool = True, allow_code: bool = False, verify: bool = True
) -> nn.Module:
    """Return the network of a model or an artifact, an ``nn.Module`` in eval mode.

    Args:
        model: anything that the commands take as MODEL, or a ``Source``.
        merge: take the updates of a delta, or of Hugging Face peft's adapter, into the weights that they change; False
            keeps them apart.
        allow_code: import the Python code of yours that an artifact names as its base.
        verify: compare the files of an artifact with the bytes that its manifest promises, each once until it
            changes.
    """
    from peftc.models.load import load_module

    return load_module(model, merge=merge, allow_code=allow_code, verify=verify)


def run(recipe: str | Path = "peftc.toml", *, dry_run: bool = False) -> Report:
    """Run the chain of a project file, only what has changed.

    Args:
        recipe: the project file.
        dry_run: say of each step whether it would run, and why.

    Raises:
        PeftcError: the file holds no chain, or a step of it refused; a gate that is not met ends the chain and stands
            in the report.
    """
    from pathlib import Path

    from peftc.cli import app
    from peftc.cli.run import chain

    return chain(app.context(), Path(recipe), dry_run=dry_run, quiet=True)


def _named(name: str) -> Any:
    """Return what a public name stands for."""
    from importlib import import_module

    return getattr(import_module(_HOMES.get(name, f"peftc.steps.{name}")), name)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'peftc' has no attribute {name!r}")
    found = globals()[name] = _named(name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Command:
    """A command whose name is that of a module of the package as well: here it is the command."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, package: Any, kind: Any = None) -> Any:
        return _named(self.name)

    def __set__(self, package: Any, module: Any) -> None:
        """Leave it so where Python, having imported the module, sets it; `from peftc.report import ...` finds it."""


class _Package(ModuleType):
    methods, report = _Command("methods"), _Command("report")


sys.modules[__name__].__class__ = _Package
