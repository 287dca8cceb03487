"""Where a model comes from: the one positional argument MODEL, read without touching a weight."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from peftc.errors import SourceError, UsageError, did_you_mean, refuse_not_utf8
from peftc.store import documents

MANIFEST = "peftc.json"
EXPORT = "export.json"  # what an export has in its place
GGUF = ".gguf"
FILES = (".safetensors", ".pth", ".pt", ".th", ".bin", GGUF)  # how names end that are of files, and of no hub
ADAPTER = "adapter_config.json"  # of Hugging Face peft
FORMS = (
    "an artifact folder, a transformers, timm or peft folder, "
    "`timm/NAME`, `timm:NAME`, `ORG/NAME[@REVISION]`, `hf:ORG/NAME`, "
    "`file.gguf`, `file.safetensors` with `--arch timm:NAME`, or `python:package.module:factory`"
)

# the small files that travel with a model: tokenizer, processor, generation settings, sentence-transformers, licence
COMPANIONS = (
    "tokenizer*.json special_tokens_map.json added_tokens.json vocab*.json vocab*.txt merges*.txt dict*.txt *.model "
    "*.spm *.tiktoken bpe.codes *preprocessor_config.json processor_config.json generation_config.json chat_template* "
    "*.jinja modules.json sentence_*config.json config_sentence_transformers.json LICENSE* NOTICE*"
).split()
PARTS = "modules.json"  # of sentence-transformers: it names the folders of what follows the network, as pooling
OF_PART = ("config.json", "model.safetensors", "pytorch_model.bin")  # what lies in one
CODE = "*.py"  # of a checkpoint that brings its own; it travels only where that code is trusted


@dataclass(frozen=True)
class Source:
    """A model as the user names it.

    Attributes:
        spec: the path or name, as typed.
        arch: the architecture of bare weights, as ``timm:NAME``.
        arch_set: constructor arguments of a timm architecture or a Python factory.
        weights: a weight file for ``timm:NAME`` or ``python:...``.
        revision: branch, tag or commit on the hub.
        preprocess: overrides of mean, std, input_size, crop_pct, crop_mode, interpolation.
        allow_code: run the user's own Python code named by ``python:...``.
        trust_remote_code: run code that comes with a transformers checkpoint.
        offline: never ask the network.
        base: the model beneath a delta, where it is not where it was.
        from_file: the spec was read from a file, and not typed: code that it names runs with ``allow_code`` alone.
        verify: compare the files of an artifact with what its manifest promises before anything is computed from them.
    """

    spec: str
    arch: str | None = None
    arch_set: Mapping[str, Any] = field(default_factory=dict)
    weights: Path | None = None
    revision: str | None = None
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    allow_code: bool = False
    trust_remote_code: bool = False
    offline: bool = False
    base: str | None = None
    from_file: bool = False
    verify: bool = True

    def names(self, spec: str, **how: Any) -> "Source":
        """Return the source of what a file of this one names: trusted as far as this one is, and not typed."""
        trust = {name: getattr(self, name) for name in ("allow_code", "trust_remote_code", "offline")}
        return Source(spec, **{**trust, "from_file": True, **how})


@dataclass(frozen=True)
class Located:
    """What a source turned out to be.

    Attributes:
        kind: ``artifact``, ``peft``, ``timm``, ``transformers`` (``name`` is a hub id where ``folder`` is None),
            ``gguf`` (``file`` is not unpacked yet), ``timm-arch`` (``name`` is in timm's registry) or ``python``
            (``name`` is ``module:factory``).
        name: hub id, architecture or factory; empty for a folder of yours.
        folder: the local folder, also that of a hub model that was fetched, or None.
        revision: for the hub.
        weights: a weight file that the user named, or None.
        file: the GGUF file that holds the model, or that the folder was unpacked from, or None.
    """

    kind: str
    name: str = ""
    folder: Path | None = None
    revision: str | None = None
    weights: Path | None = None
    file: Path | None = None


def locate(source: Source) -> Located:
    """Decide what ``source.spec`` is, from its form and from what lies on disk.

    Raises:
        SourceError: there is no such path, or it is a folder or file that is no model.
        UsageError: the spec contradicts the other options.
    """
    spec = source.spec
    for name in (spec, source.weights):
        refuse_not_utf8("the name of the model", name)
    weights = source.weights
    if weights is not None and not weights.is_file():
        raise SourceError(f"there is no weight file at `{weights}`", hint=did_you_mean(weights, "check `--weights`"))
    if spec.startswith("python:"):
        factory = spec.removeprefix("python:")
        if factory.count(":") != 1 or not all(factory.split(":")):
            raise UsageError(f"`{spec}` names no factory", hint="write it as `python:package.module:factory`")
        return Located("python", factory, weights=weights)
    if spec.startswith("timm:"):
        return Located("timm-arch", spec.removeprefix("timm:"), weights=weights)
    if spec.startswith("hf:"):
        return _hub(spec.removeprefix("hf:"), source.revision)
    path = Path(spec).expanduser()
    if path.is_dir():
        return in_folder(path, source)
    if path.is_file():
        return _file(path, source)
    if spec.startswith((".", "/", "~")) or spec.count("/") != 1 or spec.endswith((*FILES, "/")) or "\\" in spec:
        raise SourceError(
            f"there is no model at `{spec}`",
            why="the path does not exist",
            hint=did_you_mean(spec, f"MODEL is {FORMS}"),
        )
    return _hub(spec, source.revision)


def _hub(name: str, revision: str | None) -> Located:
    name, _, at = name.partition("@")
    kind = "timm" if name.startswith("timm/") else "transformers"
    return Located(kind, name, revision=at or revision)


def in_folder(path: Path, source: Source) -> Located:
    """Decide what a folder holds, from the files in it.

    Where a config or companion is a link to somewhere else, what that points to would be read, copied into artifacts
    and pushed to hubs. Links of weights are followed, as clusters need it, and those of a snapshot in the cache of the
    hub point to files of that cache.

    Raises:
        SourceError: it holds no model, a file that cannot be recorded, or a link that leaves it.
    """
    for each in sorted(path.iterdir()):
        refuse_not_utf8(f"in `{path}` the name", each.name, SourceError)
        small = each.name in (MANIFEST, ADAPTER, "config.json") or any(map(each.match, (*COMPANIONS, CODE)))
        if small and each.is_symlink():
            _refuse_leaving(path, each)
    part_files(path)
    if (path / MANIFEST).is_file():
        return Located("artifact", folder=path)
    if (path / ADAPTER).is_file():
        return Located("peft", folder=path)
    config = path / "config.json"
    if not config.is_file():
        _refuse_export(path)
        why = f"it holds neither `{MANIFEST}` (an artifact) nor `config.json` (a transformers or timm model)"
        raise SourceError(f"`{path}` is a folder, but no model", why=why, hint=_bare(path) or f"MODEL is {FORMS}")
    if "architecture" in read_json(config):
        return Located("timm", folder=path, weights=source.weights)
    return Located("transformers", folder=path, weights=source.weights)


def _bare(folder: Path) -> str | None:
    """Return how to name the weights of a folder that holds one file of them and no config; None where it does not."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        return None
    import timm  # seconds, which only a folder without a config costs

    called = folder.resolve().name
    name = called if timm.is_model(called.partition(".")[0]) else "NAME"
    return f"name its weights and their architecture: `{files[0]} --arch timm:{name}`"


def _refuse_export(path: Path) -> None:
    """Refuse an export that other programs run, and name the model that it was made from where that is known."""
    try:
        about = documents.read_json(path / EXPORT)["about"]
        word, made = str(about["format"]), about["made_from"]
        named = str(made["base"]["source"]["spec"])
        if made["steps"]:
            places = documents.read_json(path / "result.json")["places"]
            named = str(places[made["steps"][-1]["id"]]["spec"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        if not (path / EXPORT).is_file():
            return
        word, named = "other programs", "MODEL"
    again = f"`peftc export {named} --data DATA --max-drop 0.02` measures what an export of it reaches"
    raise SourceError(
        f"`{path}` is an export for {word}, and no model that peftc computes with",
        why=f"it was made from `{named}`" if named != "MODEL" else None,
        hint=f"name `{named}` in its place; {again}",
    )


def part_files(folder: Path) -> dict[str, Path]:
    """Return name -> file of what lies in the folders that ``modules.json`` names beside the network's own.

    Raises:
        SourceError: it names something outside the folder.
    """
    listed, found = folder / PARTS, {}
    try:
        parts = documents.read_json(listed) if listed.is_file() else []
    except (OSError, ValueError):
        return {}
    if documents.misfit(parts, [{"path?": str}]):  # it is somebody else's file of that name
        return {}
    for part in {each.get("path", "") for each in parts} - {"", "."}:
        if PurePosixPath(part).name != part or part == ".." or any(each in part for each in "\\\0:"):
            raise SourceError(f"`{listed}` names `{part}`, which is no folder beside it")
        for path in (folder / part / name for name in OF_PART):
            if path.is_file():
                _refuse_leaving(folder, path)
                found[f"{part}/{path.name}"] = path
    return dict(sorted(found.items()))


def _refuse_leaving(folder: Path, path: Path) -> None:
    """Refuse a file of a folder that is somewhere else (SourceError)."""
    whole = folder.resolve()
    own = [whole, whole.parent.parent / "blobs"] if whole.parent.name == "snapshots" else [whole]
    if not any(map(path.resolve().is_relative_to, own)):
        why = f"it points to `{path.resolve()}`"
        hint = "put a copy of the file in its place, if it belongs to the model"
        raise SourceError(f"`{path}` is a link that leaves its folder", why=why, hint=hint)


def _file(path: Path, source: Source) -> Located:
    if path.suffix.lower() == GGUF:
        asked = [name for name in ("arch", "arch_set", "weights") if getattr(source, name)]
        if asked:
            what = f"`--{asked[0].replace('_', '-')}` says how to build a model, and `{path}` says that itself"
            raise UsageError(what, hint="leave the option out")
        return Located("gguf", file=path)
    if source.arch is None:
        hint = f"name it: `{path} --arch timm:NAME`, or `python:package.module:factory --weights {path}`"
        raise UsageError(f"`{path}` holds bare weights of an unknown architecture", hint=hint)
    if not source.arch.startswith("timm:"):
        raise UsageError(f"`--arch {source.arch}` is not understood", hint="write it as `--arch timm:NAME`")
    return Located("timm-arch", source.arch.removeprefix("timm:"), weights=path)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; a `SourceError` where it is unreadable or holds something else."""
    return dict(documents.read_shaped(path, dict, SourceError))
