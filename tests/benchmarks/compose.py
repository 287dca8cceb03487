"""Write images with captions that name what stands where: grids, 2 x 2, of labelled images, for retrieval.

    python tests/benchmarks/compose.py [FOLDER] [--set cifar10] [--train 5000] [--validation 500] [--test 1000]
    python tests/benchmarks/compose.py FOLDER --model clip --model blip    # and untrained networks that fit, beside it

Every caption is another one, over all splits, so that each image has one right text and a network must tell places
apart. Tiles of the test split are those of the set's own test split; every tenth training tile is for validation alone.
The same seed writes the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

DATA = Path(os.environ.get("REAL_DATA", Path(__file__).parents[3] / "shared" / "data"))
SETS = ("cifar10", "mnist")
DIGITS = "zero one two three four five six seven eight nine".split()
PLACES = ("top left", "top right", "bottom left", "bottom right")
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
Tiles = dict[str, dict[str, list[Image.Image]]]  # split -> name of the class -> images of one size


def tiles(name: str) -> Tiles:
    """Return the labelled images of a set, a tenth of its training images kept for validation."""
    found = mnist() if name == "mnist" else cifar10()
    train = found["train"]
    found["train"] = {label: [image for at, image in enumerate(each) if at % 10] for label, each in train.items()}
    found["validation"] = {label: each[::10] for label, each in train.items()}
    return found


def cifar10() -> Tiles:
    found: Tiles = {"train": {}, "test": {}}
    with zipfile.ZipFile(DATA / "sets/cifar10_jpg/cifar10_jpg_5k2k.zip") as whole:
        for path in sorted(name for name in whole.namelist() if name.endswith(".jpg")):
            split, label, _ = path.split("/")[-3:]
            image = Image.open(io.BytesIO(whole.read(path))).convert("RGB")
            found[split].setdefault(label, []).append(image)
    return found


def mnist() -> Tiles:
    found: Tiles = {"train": {}, "test": {}}
    with np.load(DATA / "sets/mnist/mnist_10k2k.npz", allow_pickle=False) as arrays:
        for split, by_label in found.items():
            for pixels, label in zip(arrays[f"x_{split}"], arrays[f"y_{split}"], strict=True):
                by_label.setdefault(DIGITS[label], []).append(Image.fromarray(pixels).convert("RGB"))
    return found


def caption(labels: list[str]) -> str:
    """Return `cat top left, ship top right, frog bottom left, cat bottom right`."""
    return ", ".join(f"{label} {place}" for label, place in zip(labels, PLACES, strict=True))


def compose(folder: Path, source: Tiles, sizes: dict[str, int], *, seed: int = 0) -> Path:
    """Write the images and one table for each split, and return the folder.

    Args:
        folder: to make.
        source: tiles; all splits know the same classes.
        sizes: images per split, together no more than there are arrangements.
        seed: of what stands where, and which tile shows it.
    """
    draw = np.random.default_rng(seed)
    labels = sorted(source["test"])
    arrangements = iter(draw.permutation(len(labels) ** 4)[: sum(sizes.values())].tolist())
    for split, size in sizes.items():
        (folder / "images" / split).mkdir(parents=True, exist_ok=True)
        rows = []
        for number in range(size):
            arrangement = next(arrangements)
            chosen = [labels[arrangement // len(labels) ** place % len(labels)] for place in range(4)]
            shown = [source[split][label][int(draw.integers(len(source[split][label])))] for label in chosen]
            rows.append((f"images/{split}/{number:05d}.png", caption(chosen)))
            grid(shown).save(folder / rows[-1][0])
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("file_name", "caption"), *rows])
    return folder


def grid(shown: list[Image.Image]) -> Image.Image:
    wide, high = shown[0].size
    whole = Image.new("RGB", (2 * wide, 2 * high))
    for place, image in enumerate(shown):
        whole.paste(image, (place % 2 * wide, place // 2 * high))
    return whole


def network(folder: Path, kind: str, *, side: int, labels: list[str], seed: int = 0, **sizes: int) -> Path:
    """Write an untrained network of transformers with a tokenizer of the captions' words, and return its folder.

    Args:
        folder: to make.
        kind: ``clip`` or ``blip``.
        side: of the images in pixels.
        labels: names of the classes.
        seed: of the weights.
        sizes: of both towers, over `hidden_size` 128, `num_hidden_layers` 4, `num_attention_heads` 4,
            `intermediate_size` 512 and `patch_size` 8.
    """
    import torch
    import transformers

    words = sorted({word for label in labels for word in caption([label] * 4).replace(",", " ").split()})
    known = tokenizer([*SPECIAL.values(), ",", *words])
    known.save_pretrained(folder)
    body = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512, **sizes}
    patch = body.pop("patch_size", 8)
    body["initializer_range"] = 0.02  # BLIP's own default makes a fresh image tower see the same in everything
    ends = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    text: dict[str, Any] = {**body, **ends, "vocab_size": len(known), "max_position_embeddings": 32}
    text |= {"encoder_hidden_size": body["hidden_size"], "hidden_act": "gelu"}
    vision = {**body, "image_size": side, "patch_size": patch, "hidden_act": "gelu"}
    torch.manual_seed(seed)
    size = {"height": side, "width": side}
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=128)
        transformers.CLIPModel(config).save_pretrained(folder)
        transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size=size).save_pretrained(folder)
    else:
        config = transformers.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=128)
        transformers.BlipForImageTextRetrieval(config).save_pretrained(folder)
        transformers.BlipImageProcessor(size=size).save_pretrained(folder)
    return folder


def tokenizer(words: list[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, words.index(name)) for name in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=32, **SPECIAL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path(tempfile.gettempdir()) / "composed")
    parser.add_argument("--set", choices=SETS, default="cifar10")
    parser.add_argument("--model", choices=("clip", "blip"), action="append", default=[])
    parser.add_argument("--seed", type=int, default=0)
    for split, size in (("train", 5000), ("validation", 500), ("test", 1000)):
        parser.add_argument(f"--{split}", type=int, default=size)
    given = parser.parse_args()
    source = tiles(given.set)
    sizes = {split: getattr(given, split) for split in ("train", "validation", "test")}
    compose(given.folder, source, sizes, seed=given.seed)
    side, labels = 2 * next(iter(source["test"].values()))[0].width, sorted(source["test"])
    for kind in given.model:
        print(network(given.folder / kind, kind, side=side, labels=labels, seed=given.seed))
    print(given.folder)
