"""The table of methods: kind -> names, each of a function in a module of its name.

A method is a function in a file of its own plus its name here; others add theirs under the entry point group
``peftc.<kind>``. Keyword-only parameters without a default are statistics it needs, those with one are its settings.
"""

import ast
import importlib
import importlib.util
import inspect
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peftc.errors import MethodError, UsageError, nearest, one_of

_NAMES = {
    "decompose": "svd whitened kfac asvd fwsvd",
    "decompose_conv": "channel spatial",
    "loss": "features perturbation logits embeddings",
    "importance": "tsne_silhouette silhouette block_influence angular cka magnitude taylor drop",
    "adapter": "lora rslora dora flora snell snella adapter convpass sara head bitfit full",
    "format": "hf hf_code timm safetensors onnx torch_export executorch peft",
}
METHODS = {kind: tuple(names.split()) for kind, names in _NAMES.items()}
DASHED = ("importance", "format")  # kinds whose names are typed with dashes, too
USUAL = {"learning_rate": 1e-3, "weight_decay": 1e-4}  # of finetuning: SNELL's and SNELLA's, papers notes A.1.7


def home(kind: str, name: str) -> str:
    """Return the module of a built-in method."""
    return f"peftc.formats.{name}" if kind == "format" else f"peftc.methods.{kind}.{name}"


def outsiders(kind: str) -> dict[str, Any]:
    """Return the entry points of other packages for a kind, by name."""
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=f"peftc.{kind}")}


def find(kind: str, name: str, option: str) -> Callable[..., Any]:
    """Return the function of a method, built in or an entry point (UsageError: there is none of that name)."""
    if name in METHODS[kind]:
        return getattr(importlib.import_module(home(kind, name)), name)
    others = outsiders(kind)
    known = [*METHODS[kind], *others]
    if kind in DASHED and name not in known:
        one_of(option, name.replace("_", "-"), [each.replace("_", "-") for each in known])
    one_of(option, name, known)
    try:
        return others[name].load()
    except (ImportError, AttributeError) as error:
        raise MethodError(f"cannot import the method `{name}` of `{others[name].value}`", why=str(error)) from error


def needs_of(method: Callable[..., Any]) -> list[str]:
    """Return the statistics that a method asks for by naming them."""
    parameters = inspect.signature(method).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]


def settings_of(method: Callable[..., Any]) -> dict[str, Any]:
    """Return name -> default of a method's settings."""
    parameters = inspect.signature(method).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}


def trait(method: Callable[..., Any], name: str, default: Any) -> Any:
    """Return what the module of a method says of it under a name in capitals, or of a function beside it."""
    return getattr(importlib.import_module(method.__module__), name, default)


def recipe_of(method: Callable[..., Any]) -> dict[str, float]:
    """Return how a method trains unless told otherwise: ``RECIPE`` of its module, over what suits most."""
    return USUAL | trait(method, "RECIPE", {})


def described(kind: str, name: str) -> dict[str, Any]:
    """Return what a built-in method is, read from its file without importing it.

    ``source`` is the first line of its module, ``paper`` the first that it names; ``settings`` have their defaults;
    ``recipe`` is of a finetuning.
    """
    spec = importlib.util.find_spec(home(kind, name))
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    pairs = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    values = {node.arg: default.value for node, default in pairs if isinstance(default, ast.Constant)}
    assigned = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    recipe = ast.literal_eval(assigned["RECIPE"]) if "RECIPE" in assigned else {}
    text = ast.get_docstring(tree) or ""
    about = {"source": text.partition("\n")[0], "paper": _paper(" ".join(text.split()))}
    return {**about, "settings": values, "recipe": USUAL | recipe if kind == "adapter" else {}}


def _paper(text: str) -> str:
    """Return the first paper that a text names: by its number in arXiv, or by authors and year where it has none."""
    titled = re.search(r'([A-Z]\w+(?:(?:, | and )[A-Z]\w+| et al\.)*), "[^"]+"[^"]*?([12]\d{3})(?!\d)(,? arXiv)?', text)
    arxiv = re.search(r"arXiv[: ](\d{4}\.\d+)", text)
    if titled and not titled[3] and (arxiv is None or titled.start() < arxiv.start()):
        return f"{titled[1]} {titled[2]}"
    return f"arXiv {arxiv[1]}" if arxiv else ""


WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}


def literal(value: Any) -> str:
    """Write a value as it is typed behind `--set`."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def with_settings(method: Callable[..., Any], name: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings to call ``method`` with, each of its default's type (UsageError: it cannot be)."""
    known = settings_of(method)
    chosen = {}
    for key, value in asked.items():
        if key not in known:
            listed = ", ".join(f"`{k}` ({literal(v)})" for k, v in known.items()) or "none"
            near = nearest(key, known)
            hint = f"did you mean `{near}`?" if near else None
            raise UsageError(f"`{name}` has no setting `{key}`", why=f"its settings are: {listed}", hint=hint)
        kind, what = type(known[key]), f"setting `{key}` of `{name}` is `{literal(value)}`"
        if not isinstance(value, kind) and not (kind is float and type(value) is int):
            raise UsageError(what, why=f"it takes {WORDS[kind]}, as {literal(known[key])}")
        if kind is float and not math.isfinite(value):
            raise UsageError(what, why=f"it takes a number, as {literal(known[key])}")
        chosen[key] = kind(value)
    return chosen
