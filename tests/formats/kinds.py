"""A factored network of transformers of each kind that a loader has to tell apart."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import peftc
from tests.networks import BERT, CLIP, LLAMA, VISION, save_transformers


def texts() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 20, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def images() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def save(folder: Path, name: str, **config: Any) -> Path:
    """Write a transformers folder without a tokenizer, its weights not small."""
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, name)
    made(made.config_class(**{"initializer_range": 0.2, **config})).save_pretrained(folder)
    return folder


def factored(kind: str, place: Path) -> str:
    """Write a network of a kind as ``base``, factored as ``small``, and ``inputs``; return the class that loads it."""
    (place / "base").mkdir()
    base, how, inputs, auto = networks(kind, place / "base")
    save_file(inputs, place / "inputs")
    peftc.decompose(base, output_dir=place / "small", **how)
    return auto


def networks(kind: str, folder: Path) -> tuple[Path, dict[str, Any], dict[str, torch.Tensor], str]:
    """Return a model, how to factor it, what it reads, and the class that finds it."""
    wide = {"initializer_range": 0.2}
    if kind == "encoder":
        return save_transformers(folder, "BertModel", **BERT, **wide), {"ratio": 0.5}, texts(), "AutoModel"
    if kind == "shared factors":
        made = save_transformers(folder, "BertForSequenceClassification", **BERT, **wide, num_labels=3)
        return made, {"ratio": 0.5, "joint": True}, texts(), "AutoModelForSequenceClassification"
    if kind == "masked words, tied":
        made = save_transformers(folder, "BertForMaskedLM", **BERT, **wide)
        return made, {"ratio": 0.7, "include": ["*embeddings*", "*decoder*"]}, texts(), "AutoModelForMaskedLM"
    if kind == "causal, tied":
        made = save_transformers(folder, "LlamaForCausalLM", **LLAMA, **wide)
        return made, {"ratio": 0.7, "include": ["*embed*", "*lm_head*"]}, texts(), "AutoModelForCausalLM"
    if kind == "transposed":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 40}
        ends = {"bos_token_id": 2, "eos_token_id": 3}
        return save(folder, "GPT2LMHeadModel", **sizes, **ends), {"ratio": 0.5}, texts(), "AutoModelForCausalLM"
    if kind == "vision":
        made = save(folder, "ViTForImageClassification", **VISION, num_labels=10)
        return made, {"ratio": 0.5}, images(), "AutoModelForImageClassification"
    if kind == "images and texts":
        made = save(folder, "CLIPModel", **CLIP)
        return made, {"ratio": 0.5}, {**texts(), **images()}, "AutoModel"
    stages = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
    made = save(folder, "ResNetForImageClassification", **stages, num_labels=10)
    return made, {"ratio": 0.5, "conv_method": "channel"}, images(), "AutoModelForImageClassification"


KINDS = ["encoder", "shared factors", "masked words, tied", "causal, tied", "transposed", "vision", "convolutions"]
KINDS += ["images and texts"]
