"""Networks of transformers: from a folder with its ``config.json``, also where tensor names need converting."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftc.errors import SourceError, WeightError, named, reason_of
from peftc.models import dequantised
from peftc.models.model import Model
from peftc.models.place import DTYPES
from peftc.models.skeleton import UNBUILDABLE, on_meta, stored_in
from peftc.models.weights import Weights
from peftc.nn import surgery
from peftc.store import documents, quantization
from peftc.store.manifest import Manifest
from peftc.store.source import MANIFEST, Source, read_json


def from_folder(source: Source, folder: Path, record: Manifest | None = None) -> Model:
    """Return the network of a folder, of the class that its config names (SourceError: none can be built)."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    config = read_config(folder, ours=source.trust_remote_code)  # code that comes along knows its own weights
    names = config.get("architectures") or []
    cls: Any = getattr(transformers, names[0], None) if names else transformers.AutoModel
    if names and cls is not None and not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise SourceError(f"`{names[0]}`, which `{folder / 'config.json'}` asks for, is no model of transformers")
    remote = cls is None
    if remote and not source.trust_remote_code:
        why = "the checkpoint brings code of its own, or needs another version of transformers"
        hint = "add `--trust-remote-code` if you trust that code, or upgrade transformers"
        raise SourceError(f"transformers has no class `{names[0]}`, which `{folder}` asks for", why=why, hint=hint)
    try:
        made = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
        for name in (quantization.LOCKED, quantization.KEY):  # the network is a plain one
            if hasattr(made, name):
                delattr(made, name)
        if remote or cls is transformers.AutoModel:
            cls = partial(transformers.AutoModel.from_config, trust_remote_code=source.trust_remote_code)
        module: Any = on_meta(partial(cls, made), stored_in(folder, record), config)
        module.tie_weights()
    except (*UNBUILDABLE, StrictDataclassError) as error:
        raise SourceError(f"transformers cannot build the model of `{folder}`", why=reason_of(error)) from error
    return replace(
        described(module, config, source, folder.resolve().name), folder=folder, preprocess=processor(folder)
    )


def described(module: nn.Module, config: dict[str, Any], source: Source, name: str) -> Model:
    """Return a network of transformers as a model."""
    record = {"library": "transformers", "architecture": type(module).__name__}
    return Model(module, source, "transformers", config, record, name, labels=id2label(config))


TOKEN = (int, [int], None)
CONFIG: dict[str, Any] = {  # what peftc itself reads of a config.json, in shape
    "architectures?": ([str], None),
    "model_type?": str,
    "id2label?": ({str: (str, float)}, None),
    "num_labels?": (int, None),
    "max_position_embeddings?": (int, None),
    "n_positions?": (int, None),
    "vocab_size?": (int, None),
    "bos_token_id?": TOKEN,
    "eos_token_id?": TOKEN,
    "pad_token_id?": TOKEN,
    "tie_word_embeddings?": (bool, None),
    "torch_dtype?": (str, dict, None),
    "dtype?": (str, dict, None),
}
CONFIG |= {"text_config?": (CONFIG | {"id2label?": Any}, None), "vision_config?": (dict, None)}
STORED = ("float64", "float32", "float16", "bfloat16", "auto")
MOST_CLASSES = 1_000_000  # a config makes a name for each


def read_config(folder: Path, *, ours: bool = False) -> dict[str, Any]:
    """Return a folder's ``config.json`` without what peftc adds to it and what it says of quantised weights.

    Args:
        ours: peftc wrote the folder, or the code that it brings reads it.

    Raises:
        SourceError: what it asks for is unknown.
    """
    path = folder / "config.json"
    config = read_json(path)
    lock, is_factored = config.pop(quantization.LOCKED, None), quantization.is_ours(config)
    is_artifact, told = (folder / MANIFEST).is_file(), config.pop(quantization.KEY, None)
    hint = None
    given = config.get("dtype", config.get("torch_dtype"))
    if (why := documents.misfit(config, CONFIG)) is None:
        if is_factored and not is_artifact:
            why = "it holds factors and no `peftc.json`: transformers loads it after `import peftc.transformers`"
        elif lock is not None and not ours and not is_artifact:
            why = f"`transformers_weights` names another file of weights, {lock!r}"
        elif told is not None and not is_factored and (problem := _unread(told, is_artifact)):
            why, hint = f"`{quantization.KEY}`: {problem}", dequantised.OTHERWISE
        elif isinstance(given, str) and given not in STORED:
            why = f"`dtype` is {given!r}, which is not one of {', '.join(STORED)}"
        elif (config.get("num_labels") or 0) > MOST_CLASSES:
            why = f"`num_labels` is {config['num_labels']:,}; peftc reads up to {MOST_CLASSES:,} classes"
        elif not all(name.isdecimal() for name in config.get("id2label") or {}):
            why = "`id2label` is not a map from numbers to names"
    if why is not None:
        raise SourceError(f"`{path}` is not read", why=why, hint=hint)
    return config


def _unread(told: Any, is_artifact: bool) -> str | None:
    return "an artifact holds plain weights and factors" if is_artifact else dequantised.unread(told)


def plain(model: Model, tensors: Weights) -> Weights:
    """Return the weights of a folder as its network takes them, which are others where they are stored quantised."""
    assert model.folder is not None
    told = read_json(model.folder / "config.json").get(quantization.KEY)
    if told is None:
        return tensors
    stored = model.config.get("dtype") or model.config.get("torch_dtype")
    return dequantised.plain(tensors, told, model, DTYPES.get(str(stored), torch.float32))


SIDE = (int, None)
SIDES = (int, {"height?": SIDE, "width?": SIDE, "shortest_edge?": SIDE}, [int], None)
PROCESSOR = {  # what peftc reads of an image processor, in shape
    "do_center_crop?": (bool, None),
    "crop_size?": SIDES,
    "size?": SIDES,
    "image_mean?": ([float], None),
    "image_std?": ([float], None),
    "resample?": (int, None),
}
INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # of PIL
MOST_SIDE = 4096  # pixels of an image that a model reads


def processor(folder: Path) -> dict[str, Any]:
    """Return how images become inputs, by the record of a processor; else nothing (SourceError: not understood)."""
    path, whole = folder / "preprocessor_config.json", folder / "processor_config.json"
    if path.is_file():
        value = read_json(path)
        value = value.get("imageprocessor", value)
    else:
        path, value = whole, (read_json(whole) if whole.is_file() else {}).get("image_processor", {})
    if why := documents.misfit(value, PROCESSOR):
        raise SourceError(f"`{path}` is not read", why=why)
    if not value:
        return {}
    if value.get("resample", 3) not in (None, *INTERPOLATIONS):
        raise SourceError(f"`{path}` is not read", why=f"`resample` is {value['resample']}, which is no filter of PIL")
    size = value.get("crop_size") if value.get("do_center_crop") else value.get("size")
    size = value.get("size", 224) if size is None else size
    if isinstance(size, dict):
        side = size.get("shortest_edge") or 224
        size = (size.get("height") or side, size.get("width") or side)
    height, width, *_ = (size, size) if isinstance(size, int) else [*(size or ()), 0, 0]
    resize = value.get("size") or {}
    edge = resize.get("shortest_edge") or resize.get("height") if isinstance(resize, dict) else None
    edge = resize if isinstance(resize, int) else edge
    if not all(1 <= side <= MOST_SIDE for side in (height, width, edge or 1)):
        why = f"it makes images of {height} x {width} pixels; peftc reads up to {MOST_SIDE:,} a side"
        raise SourceError(f"`{path}` is not read", why=why)
    crop = height / edge if value.get("do_center_crop") and edge else 1.0
    is_squashed = not value.get("do_center_crop") and isinstance(resize, dict) and "height" in resize
    return {
        "input_size": [3, height, width],
        "mean": list(value.get("image_mean") or [0.5] * 3),
        "std": list(value.get("image_std") or [0.5] * 3),
        "crop_pct": crop,
        "interpolation": INTERPOLATIONS[3 if value.get("resample") is None else value["resample"]],
        **({"crop_mode": "squash"} if is_squashed else {}),
    }


def id2label(config: dict[str, Any]) -> list[str] | None:
    """Return the class names of a config in output order, or None where it only numbers them."""
    table = config.get("id2label")
    if not isinstance(table, dict) or not table:
        return None
    names = [str(table[key]) for key in sorted(table, key=int)]
    return None if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


def fill(model: Model, tensors: Weights) -> dict[str, str]:
    """Map weights into the network of a model; return stored name -> name in the file.

    A checkpoint may lack or carry the base model's prefix; where names still differ, transformers' own loader converts
    them, at the price of a copy in memory.
    """
    module: Any = model.module
    prefix = f"{module.base_model_prefix}." if getattr(module, "base_model_prefix", "") else ""
    wanted, renamed = set(module.state_dict()), {}
    for name in tensors.names():
        choices = (name, prefix + name, name.removeprefix(prefix))
        renamed[next((choice for choice in choices if choice in wanted), name)] = name
    lost = [names[0] for names in surgery.stored_names(module).values() if not any(name in renamed for name in names)]
    if lost:
        if tensors.made:
            why = f"it lacks {named(lost, 4)}; names are converted for plain weights alone"
            what = f"`{tensors.where}`, which is quantised, does not hold the tensors of `{type(module).__name__}`"
            raise WeightError(what, why=why, hint=dequantised.OTHERWISE)
        _by_transformers(model, tensors.where)
        return {}
    patterns = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or []

    def ignored(name: str) -> bool:
        return any(re.search(pattern, name) for pattern in patterns)

    found = surgery.fill(module, renamed, lambda name: tensors.read(renamed[name]), where=tensors.where, ignore=ignored)
    return {first: renamed[name] for first, name in found.items()}


def _by_transformers(model: Model, where: str) -> None:
    """Load with ``from_pretrained``, strictly; the tensors then live in memory."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        made: Any = type(model.module)
        module, info = made.from_pretrained(model.folder, dtype="auto", output_loading_info=True)
    finally:
        if shown:
            logging.enable_progress_bar()
    missing, left, mismatched = (
        sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    if missing or left or mismatched:
        raise WeightError(
            f"the tensors of `{where}` do not match `{type(module).__name__}`",
            why=f"{len(missing)} missing, {len(left)} left over, {len(mismatched)} of another shape: "
            + ", ".join([*missing, *left, *mismatched][:4]),
            hint="no gap is filled with random numbers: name the trained class in `architectures` of config.json",
        )
    model.module = module
    model.notes.append("tensor names were converted by transformers: the weights are held in memory, not mapped")
