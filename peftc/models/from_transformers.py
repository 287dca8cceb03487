"""Networks of transformers: from a folder with its ``config.json``, also where tensor names need converting."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from peftc.errors import SourceError, WeightError, reason_of
from peftc.models.skeleton import Base, on_meta
from peftc.nn import surgery
from peftc.source import Source, read_json

UNBUILDABLE = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, AssertionError)


def from_folder(source: Source, folder: Path) -> Base:
    """Return the network of a transformers folder, of the class that its config names.

    Raises:
        SourceError: there is no such class, or it cannot be built.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    config = read_json(folder / "config.json")
    config.pop("transformers_weights", None)  # the writer's lock against loading factors as a dense model
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SourceError(f"`architectures` in `{folder / 'config.json'}` is not a list of class names")
    cls: Any = getattr(transformers, names[0], None) if names else transformers.AutoModel
    remote = cls is None
    if remote and not source.trust_remote_code:
        raise SourceError(
            f"transformers has no class `{names[0]}`, which `{folder}` asks for",
            why="the checkpoint brings code of its own, or needs another version of transformers",
            hint="add `--trust-remote-code` if you trust that code, or upgrade transformers",
        )
    try:
        made = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
        if hasattr(made, "transformers_weights"):
            del made.transformers_weights
        if remote or cls is transformers.AutoModel:
            auto = transformers.AutoModel
            module: Any = on_meta(lambda: auto.from_config(made, trust_remote_code=source.trust_remote_code))
        else:
            module = on_meta(lambda: cls(made))
    except (*UNBUILDABLE, StrictDataclassError) as error:
        raise SourceError(f"transformers cannot build the model of `{folder}`", why=reason_of(error)) from error
    module.tie_weights()
    record = {"library": "transformers", "architecture": type(module).__name__}
    preprocess = processor(folder)
    return Base(
        module,
        "transformers",
        folder.resolve().name,
        record,
        config,
        folder,
        preprocess=preprocess,
        labels=id2label(config),
    )


def processor(folder: Path) -> dict[str, Any]:
    """Return how images become inputs, from ``preprocessor_config.json`` or the record of a whole processor.

    Empty where there is neither.
    """
    path, whole = folder / "preprocessor_config.json", folder / "processor_config.json"
    if path.is_file():
        value = read_json(path)
        value = value.get("imageprocessor", value)
    else:
        value = (read_json(whole) if whole.is_file() else {}).get("image_processor", {})
    if not value:
        return {}
    from PIL.Image import Resampling

    size = value.get("crop_size") if value.get("do_center_crop") else value.get("size")
    size = value.get("size", 224) if size is None else size
    if isinstance(size, dict):
        side = size.get("shortest_edge", 224)
        size = (size.get("height", side), size.get("width", side))
    height, width = (size, size) if isinstance(size, int) else size
    resize = value.get("size", {})
    edge = resize.get("shortest_edge", resize.get("height")) if isinstance(resize, dict) else resize
    crop = height / edge if value.get("do_center_crop") and edge else 1.0
    is_squashed = not value.get("do_center_crop") and isinstance(resize, dict) and "height" in resize
    return {
        "input_size": [3, height, width],
        "mean": list(value.get("image_mean") or [0.5] * 3),
        "std": list(value.get("image_std") or [0.5] * 3),
        "crop_pct": crop,
        "interpolation": Resampling(value.get("resample", 3)).name.lower(),
        **({"crop_mode": "squash"} if is_squashed else {}),
    }


def id2label(config: dict[str, Any]) -> list[str] | None:
    """Return the class names of a config in output order, or None where it only numbers them."""
    table = config.get("id2label")
    if not isinstance(table, dict) or not table:
        return None
    names = [str(table[key]) for key in sorted(table, key=int)]
    return None if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


def fill(base: Base) -> dict[str, str]:
    """Map the weights of ``base`` into its network; return stored name -> name in the file.

    A checkpoint may lack or carry the base model's prefix; where names still differ, transformers' own loader converts
    them, at the price of a copy in memory.
    """
    tensors = base.weights
    assert tensors is not None
    renamed = _without_prefix(base.module, tensors.names())
    wanted = surgery.stored_names(base.module)
    if all(any(name in renamed for name in names) for names in wanted.values()):
        found = surgery.fill(
            base.module,
            renamed,
            lambda name: tensors.read(renamed[name]),
            where=tensors.where,
            ignore=_ignored(base.module),
        )
        return {first: renamed[name] for first, name in found.items()}
    return _by_transformers(base)


def _without_prefix(module: Any, names: list[str]) -> dict[str, str]:
    prefix = f"{module.base_model_prefix}." if getattr(module, "base_model_prefix", "") else ""
    wanted = set(module.state_dict())
    renamed = {}
    for name in names:
        choices = (name, prefix + name, name.removeprefix(prefix))
        renamed[next((choice for choice in choices if choice in wanted), name)] = name
    return renamed


def _ignored(module: Any) -> Any:
    patterns = [*(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or [])]
    return lambda name: any(re.search(pattern, name) for pattern in patterns)


def _by_transformers(base: Base) -> dict[str, str]:
    """Load with ``from_pretrained``, strictly; the tensors then live in memory."""
    from transformers.utils import logging

    assert base.weights is not None and base.folder is not None
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        made: Any = type(base.module)
        module, info = made.from_pretrained(base.folder, dtype="auto", output_loading_info=True)
    finally:
        if shown:
            logging.enable_progress_bar()
    missing, left, mismatched = (
        sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    if missing or left or mismatched:
        raise WeightError(
            f"the tensors of `{base.weights.where}` do not match `{type(module).__name__}`",
            why=f"{len(missing)} missing, {len(left)} left over, {len(mismatched)} of another shape: "
            + ", ".join([*missing, *left, *mismatched][:4]),
            hint="no gap is filled with random numbers: name the trained class in `architectures` of config.json",
        )
    base.module = module
    base.notes.append("tensor names were converted by transformers: the weights are held in memory, not mapped")
    return {}
