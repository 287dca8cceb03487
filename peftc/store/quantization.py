"""What ``config.json`` says of factors, in the place where transformers looks for quantization.

A hub's loader fetches ``config.json`` and weights, and no manifest. `peftc.runtimes` reads this back.
"""

from collections.abc import Mapping
from typing import Any

from peftc.errors import SourceError
from peftc.store import documents
from peftc.store.manifest import FIELDS, OPTIONAL, misfit_of_edits

KEY, METHOD = "quantization_config", "peftc"
ARCHITECTURE = "import_peftc_timm"  # in the registry of timm after that; before, its error says the word
LOCKED = "transformers_weights"  # transformers takes it for the name of a file, and stops before it reads any weight
BUILT = "this folder holds low-rank factors: import peftc.transformers first, or load it with peftc.load"
UNBUILT = "this folder holds what transformers does not build: load it with peftc.load"
SHAPE = {
    "quant_method": str,
    "modules": FIELDS["modules"],
    "skipped?": OPTIONAL["skipped"],
    "tied?": FIELDS["tied"],
}


def entry(
    modules: Mapping[str, Mapping[str, Any]], skipped: Mapping[str, list[int]], tied: Mapping[str, str]
) -> dict[str, Any]:
    """Return what to say of edits, in the words of a manifest.

    Of ties only those of factors are told: a network knows its others, and `shares` says which down factors are one.
    """
    shared = {f"{name}.down.weight" for name, edit in modules.items() if edit.get("shares", name) != name}
    own = {a: b for a, b in tied.items() if a not in shared and any(n.rsplit(".", 2)[0] in modules for n in (a, b))}
    more = {name: dict(value) for name, value in (("skipped", skipped), ("tied", own)) if value}
    return {"quant_method": METHOD, "modules": {name: dict(edit) for name, edit in modules.items()}, **more}


def misfit(told: Mapping[str, Any]) -> str | None:
    """Return what is not as `entry` says it; None where all is."""
    return documents.misfit(dict(told), SHAPE) or misfit_of_edits(told["modules"], told.get("skipped", {}))


def refuse_unknown(told: Mapping[str, Any]) -> None:
    """Refuse what `entry` did not say, and what a later version may say (SourceError)."""
    if why := misfit(told):
        raise SourceError(f"`{KEY}` of config.json is not as peftc writes it", why=why)
    if unknown := sorted(told.keys() - {name.removesuffix("?") for name in SHAPE}):
        what = f"`{KEY}` of config.json says `{unknown[0]}`, which this peftc does not know"
        raise SourceError(what, hint="load it with the version of peftc that wrote it: `pip install -U peftc`")


def is_ours(config: Mapping[str, Any]) -> bool:
    """Return whether a config says of factors what `entry` returned."""
    told = config.get(KEY)
    return isinstance(told, Mapping) and told.get("quant_method") == METHOD
