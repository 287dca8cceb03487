"""Small networks that several tests share, and how they are written as sources."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from peftc.report import Report
from peftc.store.source import Source

HERE = "python:tests.networks"
WORDS = (
    "the a cat dog bird sat ran sang on in under mat house tree red blue small big and then it was very . , !".split()
)

# sizes that are built in milliseconds

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
INPUT: dict[str, Any] = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}
BERT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
LLAMA: dict[str, Any] = {
    **BERT,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
GPT2: dict[str, Any] = {
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
VISION: dict[str, Any] = {**BERT, "image_size": 32, "patch_size": 8}


# networks of one's own


class Perceptron(nn.Module):
    """Linears, three unless ``depth`` says so; the last is the head."""

    def __init__(self, width: int = 64, depth: int = 2, reads: int = 48, gives: int = 12) -> None:
        super().__init__()
        self.first = nn.Linear(reads, width)
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth - 1)))
        self.last = nn.Linear(width, gives)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layers(self.first(x)))


class Shared(nn.Module):
    """One linear in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(48, 48)
        self.b = self.a
        self.last = nn.Linear(48, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.b(self.a(x).relu()))


class Tied(nn.Module):
    """Two linears with one weight and a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(48, 48)
        self.b = nn.Linear(48, 48)
        self.b.weight = self.a.weight
        self.last = nn.Linear(48, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.b(self.a(x).relu()))


class RawTied(nn.Module):
    """A weight that is also a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(48, 48)
        self.again = self.a.weight
        self.b = nn.Linear(48, 48)
        self.last = nn.Linear(48, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.b(self.a(x) @ self.again))


class Attention(nn.Module):
    """torch's own attention modules, which read their weights without calling the modules that hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(48, 32)
        self.encoder = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.last = nn.Linear(32, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(self.first(x)[:, None])
        return self.last(self.attention(x, x, x)[0])


class Convolutions(nn.Module):
    """Grouped, depthwise, dilated and circular convolutions on small images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=4)
        self.grouped = nn.Conv2d(16, 32, 3, groups=4, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, groups=32)
        self.odd = nn.Conv2d(32, 64, (3, 5), padding="same", dilation=2, padding_mode="circular")
        self.strided = nn.Conv2d(64, 64, 3, stride=(1, 2), padding=(0, 1))
        self.norm = nn.BatchNorm2d(64)
        self.last = nn.Linear(64, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.strided(self.odd(self.depthwise(self.grouped(self.stem(x)))))
        return self.last(self.norm(x).mean((2, 3)))


class Deep(nn.Module):
    """Three hundred linears."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(16, 16) for _ in range(300)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


# one of each family: the library, the name there, how it is built, and options of decompose

VOCABULARY = {"vocab_size": 40}
SMALL_VIT = {**VIT, "depth": 2}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
CLIP = {
    "text_config": {**BERT, **VOCABULARY, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2},
    "vision_config": VISION,
    "projection_dim": 32,
}
NETWORKS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "bert": ("hf", "BertModel", {**BERT, **VOCABULARY}, {}),
    "bert-mlm-decoder": ("hf", "BertForMaskedLM", {**BERT, **VOCABULARY}, {"include": ["cls"]}),
    "llama": ("hf", "LlamaForCausalLM", {**LLAMA, **VOCABULARY}, {}),
    "llama-head": ("hf", "LlamaForCausalLM", {**LLAMA, **VOCABULARY}, {"include": ["lm_head"]}),
    "gpt2": ("hf", "GPT2LMHeadModel", {**GPT2, **VOCABULARY}, {}),
    "gpt2-embedding": ("hf", "GPT2LMHeadModel", {**GPT2, **VOCABULARY}, {"include": ["wte"]}),
    "t5": ("hf", "T5ForConditionalGeneration", {**T5, **VOCABULARY}, {}),
    "clip": ("hf", "CLIPModel", CLIP, {}),
    "hf-vit": ("hf", "ViTForImageClassification", {**VISION, "num_labels": 10}, {}),
    "vit": ("timm", "vit_tiny_patch16_224", SMALL_VIT, {}),
    "cait": ("timm", "cait_xxs24_224", SMALL_VIT, {}),
    "beit": ("timm", "beit_base_patch16_224", SMALL_VIT, {}),
    "swin": ("timm", "swin_tiny_patch4_window7_224", SWIN, {}),
    "swin-v2": ("timm", "swinv2_tiny_window8_256", SWIN, {}),
    "convnext": ("timm", "convnext_atto", {"depths": [1, 1, 1, 1], "dims": [16, 16, 32, 32]}, {}),
    "resnet-channel": ("timm", "resnet26", RESNET, {"conv_method": "channel"}),
    "resnet-spatial": ("timm", "resnet26", RESNET, {"conv_method": "spatial"}),
    "same-padding": (
        "timm",
        "tf_mobilenetv3_small_minimal_100",
        {},
        {"conv_method": "spatial", "include": ["conv_stem"]},
    ),
    "convolutions-channel": ("python", "Convolutions", {}, {"conv_method": "channel"}),
    "convolutions-spatial": ("python", "Convolutions", {}, {"conv_method": "spatial"}),
    "attention": ("python", "Attention", {}, {}),
    "shared": ("python", "Shared", {}, {}),
    "tied": ("python", "Tied", {}, {}),
    "raw-tie": ("python", "RawTied", {}, {}),
}


# how they are written


def save_network(folder: Path, library: str, name: str, arguments: dict[str, Any]) -> Source:
    """Write a network with seeded weights and return it as a source."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    if library == "hf":
        import transformers

        cls = getattr(transformers, name)
        cls(cls.config_class(**arguments)).save_pretrained(folder)
        return Source(str(folder))
    if library == "python":
        torch.save({"state_dict": globals()[name](**arguments).state_dict()}, folder / "weights.pth")
        return Source(f"{HERE}:{name}", weights=folder / "weights.pth", arch_set=arguments, allow_code=True)
    save_timm(folder, name, {**arguments, "num_classes": 10}, {"input_size": [3, 32, 32]})
    return Source(str(folder))


def perceptron(folder: Path, change: Callable[[dict[str, Tensor]], Any] | None = None, **arguments: Any) -> Source:
    """Write a perceptron, its tensors changed by ``change``."""
    torch.manual_seed(0)
    state = Perceptron(**arguments).state_dict()
    save_file({**state, **(change(state) if change else {})}, folder / "p.safetensors")
    return Source(f"{HERE}:Perceptron", weights=folder / "p.safetensors", arch_set=arguments, allow_code=True)


def read(folder: Path) -> Source:
    """Return an artifact of a network of one's own as a source."""
    return Source(str(folder), allow_code=True)


def ranks(report: Report) -> dict[str, Any]:
    """Return module -> rank, of what a report of decompose says."""
    return {row["name"]: row["rank"] for row in report.data["modules"]}


def save_timm(folder: Path, architecture: str, arguments: dict[str, Any], preprocess: dict[str, Any]) -> Path:
    """Write a timm folder with seeded weights; batch norms get statistics that are not those of a fresh one."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(architecture, **arguments)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architecture": architecture, "num_classes": arguments["num_classes"], "model_args": arguments}
    pretrained = {"num_classes": arguments["num_classes"], **preprocess}
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": pretrained}))
    return folder


def save_transformers(folder: Path, name: str, **config: Any) -> Path:
    """Write a transformers folder with seeded weights and a tokenizer of thirty words."""
    import transformers

    tokenizer = _tokenizer(bert=name.startswith("Bert"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    network = getattr(transformers, name)
    network(network.config_class(vocab_size=len(tokenizer), **config)).save_pretrained(folder)
    return folder


def save_dual(folder: Path, name: str, **changes: Any) -> Path:
    """Write a transformers folder of a dual encoder with seeded weights, its tokenizer and its image processor.

    The weights are not small, as a fresh BLIP's are, for which all images are the same.
    """
    import transformers

    tokenizer = _tokenizer(bert=True)
    tokenizer.save_pretrained(folder)
    body = {**BERT, "initializer_range": 0.2}
    text = {**body, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "encoder_hidden_size": 32}
    text |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    vision = {**body, "image_size": 32, "patch_size": 8}
    width = "image_text_hidden_size" if name.startswith("Blip") else "projection_dim"
    network = getattr(transformers, name)
    torch.manual_seed(0)
    made = network(network.config_class(text_config=text, vision_config=vision, **{width: 16}, **changes))
    made.save_pretrained(folder)
    size = {"size": {"height": 32, "width": 32}}
    if name.startswith("CLIP"):
        size = {"size": {"shortest_edge": 32}, "crop_size": size["size"]}
    processor = getattr(transformers, name.split("Model")[0].split("For")[0] + "ImageProcessor")
    processor(**size).save_pretrained(folder)
    return folder


def _tokenizer(*, bert: bool) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pad, unknown, start, end, mask = special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if not bert:
        pad, unknown, start, end, mask = special = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    single, pair = (
        (f"{start} $A {end}", f"{start} $A {end} $B:1 {end}:1") if bert else (f"{start} $A", f"{start} $A $B")
    )
    ends = [(start, vocabulary[start]), (end, vocabulary[end])]
    core.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ends)
    names = (
        {"cls_token": start, "sep_token": end, "mask_token": mask} if bert else {"bos_token": start, "eos_token": end}
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, unk_token=unknown, model_max_length=64, **names
    )
