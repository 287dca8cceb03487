"""What other programs do not know of a network: refused with the options of `peftc export` that do write it."""

from torch import nn

from peftc.errors import ExportError, UsageError
from peftc.models.model import Model
from peftc.nn.adapted import adapted_modules

PLAIN = {"timm": "timm", "transformers": "hf"}  # library -> the format of its own folders


def foreign(network: nn.Module) -> list[str]:
    """Return the modules whose class is one of peftc's, by name; without those of which they are made."""
    ours = [name for name, module in network.named_modules() if type(module).__module__.startswith("peftc.")]
    return [name for name in ours if not any(name.startswith(f"{one}.") for one in ours)]


def bound(model: Model, *, skips: bool = False) -> dict[str, str]:
    """Return the modules that no weight can stand for, and why: updates that cannot be merged, and dropped layers.

    Args:
        skips: whoever loads the model leaves dropped layers out.
    """
    record = model.manifest
    if record is None:
        kinds = {name: type(model.module.get_submodule(name)).__name__ for name in foreign(model.module)}
        return {name: f"no manifest says what the {kind} at `{name}` stands for" for name, kind in kinds.items()}
    whys = {
        name: f"`{name}` was dropped in its place, for no config leaves it out" for name in record.skipped if not skips
    }
    for name, module in adapted_modules(model.module).items():
        if not module.mergeable:
            whys[name] = f"what `{record.adapters[name]['method']}` adds to `{name}` cannot be merged into a weight"
    return whys


def is_one_graph(model: Model) -> bool:
    """Return whether a single graph can hold all that a model does, as none holds two networks that are used apart."""
    config = getattr(model.module, "config", None)
    return model.kind != "image-text" and not getattr(config, "is_encoder_decoder", False)


def instead(model: Model, *, graph: bool = True) -> str:
    """Return a hint: the options that write a model as it is; ``graph`` says whether formats of graphs may be named."""
    graph = graph and is_one_graph(model)
    plain = PLAIN.get(model.library) if _is_of_its_library(model) and not bound(model) else None
    if plain is None:
        return f"use `--format {'onnx' if graph else 'safetensors'}`"
    if model.manifest is None or not model.manifest.modules:
        return f"use `--format {plain}`"
    words = ((plain, True), ("hf-code", plain == "hf"), ("onnx", graph))
    keep = [f"`--format {word}`" for word, there in words if there]
    listed = " or ".join(", ".join(part) for part in (keep[:-1], keep[-1:]) if part)
    return f"multiply the factors out with `--format {plain} --dense`, or keep them with {listed}"


def refuse_bound(model: Model, what: str, hint: str, *, skips: bool = False) -> None:
    """Refuse a model that nothing but peftc can build: it has updates that cannot be merged, or dropped layers."""
    names = bound(model, skips=skips)
    if names:
        more = f", and so for {len(names) - 1} more" if len(names) > 1 else ""
        raise ExportError(what, why=f"{next(iter(names.values()))}{more}", hint=hint)


def refuse_other_library(model: Model, library: str, word: str, *, skips: bool = False) -> None:
    """Refuse a model that is not of a library, or that the library cannot build.

    Args:
        word: that of the format.
        skips: as for `bound`.
    """
    what = f"`{model.name}` cannot be exported as `{word}`"
    if model.library != library:
        why = f"its network is one of {model.library}" if model.library in PLAIN else "its network is your own code"
        raise ExportError(what, why=why, hint=instead(model))
    if not _is_of_its_library(model):
        why = f"{library} itself has no class `{model.architecture}`: it came with the checkpoint"
        raise ExportError(what, why=why, hint=instead(model))
    refuse_bound(model, what, instead(model), skips=skips)


ELSEWHERE = {  # words that are no format, and what to do
    "gguf": (
        "it has no place for factors, and llama.cpp ships the script that writes it",
        "multiply them out, `peftc export MODEL --format hf --dense -o dense`, and give it the folder: "
        "`python convert_hf_to_gguf.py dense`",
    ),
    "torchao": (
        "it quantises a network in memory",
        "`torchao.quantization.quantize_(peftc.load(MODEL), Int8WeightOnlyConfig())`, as on the page on loading",
    ),
}


def refuse_elsewhere(word: str) -> None:
    """Refuse the word of something that peftc does not write, but leads to (UsageError)."""
    if word in ELSEWHERE:
        why, hint = ELSEWHERE[word]
        raise UsageError(f"`--format {word}` is not written by peftc", why=why, hint=hint)


def _is_of_its_library(model: Model) -> bool:
    """Return whether the library has the network's class, and not a checkpoint that brought it."""
    if model.library != "transformers":
        return model.library in PLAIN
    import transformers

    return all(hasattr(transformers, name) for name in (model.architecture, type(model.module.config).__name__))
