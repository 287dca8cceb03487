"""Several processes learn what one does, and go on where they were stopped."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import peftc
from peftc.models import unread
from peftc.store.source import MANIFEST
from peftc.training import journal
from tests.calibration.test_memory import alone, environments, launch
from tests.conftest import TEXTS
from tests.forked import Forked, forked
from tests.networks import LLAMA, save_transformers

# A small training: a normalisation of each batch, a module that no loss reaches, and a stop before some step.
FITS = """
import json, os, sys
import torch
from torch import nn
from peftc import processes
from peftc.options import Recipe
from peftc.training import loop

folder, kind, stop, parts = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
os.makedirs(folder, exist_ok=True)
loop.SAVE_EVERY = 0.0
X = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > X[:, 1]).long()
torch.manual_seed(0 if kind != "apart" else processes.rank())
network = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16) if kind == "norm" else nn.ReLU(), nn.Linear(16, 2))
network.register_module("spare", nn.Linear(4, 4) if kind == "spare" else None)
network.forward = lambda x: network[2](network[1](network[0](x)))
made = []

def batch(rows, *_):
    made.append(rows)
    return X[list(rows)], Y[list(rows)]

def stopped(step, steps):
    if step == stop:
        processes.wait()
        os._exit(0)

loss = lambda module, given: nn.functional.cross_entropy(module(given[0]), given[1])
recipe = Recipe(steps=8, batch_size=16, learning_rate=2e-2, accumulate=parts)
outcome = loop.fit(network, 96, batch, loss, recipe, device="cpu", folder=__import__("pathlib").Path(folder),
                   after_step=stopped)
state = {name: each.tolist() for name, each in network.state_dict().items()}
print(json.dumps([outcome.losses, state, outcome.resumed]))
processes.leave()
"""


def fitted(folder: Path, kind: str, stop: int = 0, parts: int = 1, *, several: bool = True) -> list[Any]:
    """Return losses, weights and the step of the resume, of each process."""
    words = (folder, kind, stop, parts)
    ended = launch(*words, code=FITS) if several else [(0, (one := forked(*words, code=FITS)).stdout, one.stderr)]
    assert all(code == 0 for code, _, _ in ended), ended
    told = [out.splitlines() for _, out, _ in ended]  # gloo of some versions has a line of its own
    return [json.loads(lines[-1]) if lines and lines[-1].startswith("[[") else None for lines in told]


@pytest.mark.parametrize(("kind", "parts"), [("plain", 2), ("spare", 1), ("apart", 1)])
def test_two_processes_take_the_steps_of_one(kind: str, parts: int, tmp_path: Path) -> None:
    """Whatever parts a step has, whether or not all of the network is used, and from the first one's weights."""
    (one,) = fitted(tmp_path / "one", kind, several=False)
    first, second = fitted(tmp_path / "two", kind, parts=parts)
    assert first == second
    assert first[0] == pytest.approx(one[0], rel=1e-5)
    for name, values in one[1].items():
        torch.testing.assert_close(torch.tensor(first[1][name]), torch.tensor(values), rtol=1e-4, atol=1e-6)


def test_running_statistics_are_of_the_first_process_so_that_a_resume_goes_on_as_before(tmp_path: Path) -> None:
    whole = fitted(tmp_path / "whole", "norm")
    assert fitted(tmp_path / "killed", "norm", stop=4) == [None, None]
    again = fitted(tmp_path / "killed", "norm")
    assert [each[2] for each in again] == [3, 3]  # the checkpoint is of the step before
    assert [each[0] for each in again] == [each[0] for each in whole]
    assert again[0][1] == whole[0][1]


# weights in pieces


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("story") / "story.txt"
    file.write_text(" ".join(TEXTS) * 8)
    return file


def log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / journal.LOG).read_text().splitlines()]


def learn(folder: Path, *words: Any, several: bool = True, code: str | None = None) -> list[dict[str, float]]:
    """Train by a command line, in one process or cut over two, and return its log."""
    words = (*words, "--device", "cpu", "-o", folder)
    ended = launch(*words, "--shard", code=code) if several else [alone(*words)]
    for done, out, told in ended:
        assert done == 0, out + told
    assert ended[0][1].strip() == str(folder) and all(each[1:] == ("", "") for each in ended[1:]), ended
    return log(folder)


def same_curve(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    assert [each.keys() for each in one] == [each.keys() for each in other]
    for name in ("loss", "score"):
        mine, theirs = ([each[name] for each in lines if name in each] for lines in (one, other))
        assert mine and theirs == pytest.approx(mine, rel=1e-4), name


def same_tensors(one: Path, other: Path) -> None:
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-5)


FEW = ("--max-length", 16, "--steps", 4, "--batch-size", 8, "--evaluations", 2, "--learning-rate", 0.01)


WAYS = [
    "full",
    "lora --delta",
    "dora",
    "lora --accumulate 2 --ema 0.5",
    "full --gradient-checkpointing",
    "lora --optimizer nadam --schedule wsd --early-stop 1",
    "full --optimizer sgd",
]


@pytest.mark.parametrize("how", WAYS)
def test_cut_weights_take_the_steps_of_whole_ones(how: str, tiny_llama: Path, story: Path, tmp_path: Path) -> None:
    words = ["finetune", tiny_llama, "--data", story, *FEW, "--method", *how.split()]
    same_curve(learn(tmp_path / "one", *words, several=False), learn(tmp_path / "two", *words))
    same_tensors(tmp_path / "one", tmp_path / "two")
    ids = [json.loads((tmp_path / name / MANIFEST).read_text())["id"] for name in ("one", "two")]
    assert ids[0] == ids[1]  # how it was computed is no question


def test_student_and_teacher_are_cut(tiny_llama: Path, story: Path, tmp_path: Path) -> None:
    peftc.decompose(tiny_llama, output_dir=tmp_path / "small", ratio=0.6, method="svd", device="cpu")
    words = ["distill", tmp_path / "small", "--data", story, *FEW, "--loss", "features=1,logits=1,task=1"]
    same_curve(learn(tmp_path / "one", *words, several=False), learn(tmp_path / "two", *words))
    same_tensors(tmp_path / "one", tmp_path / "two")


UNREAD = """
import sys
from peftc.models import unread
unread.LARGE = 8
from peftc.cli.app import main
sys.argv[0] = "peftc"
main()
"""


@pytest.mark.parametrize("tied", [True, False])
def test_a_large_vocabulary_is_compared_in_parts_in_pieces_too(
    tied: bool, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head does not run: what reads its weight finds it whole, and its gradient reaches the pieces."""
    model = save_transformers(tmp_path / "llama", "LlamaForCausalLM", **LLAMA | {"tie_word_embeddings": tied})
    peftc.decompose(model, output_dir=tmp_path / "small", ratio=0.6, method="svd", device="cpu")
    monkeypatch.setattr(unread, "LARGE", 8)
    words = ["distill", tmp_path / "small", "--data", story, *FEW, "--loss", "logits=1,task=1"]
    same_curve(learn(tmp_path / "one", *words, several=False), learn(tmp_path / "two", *words, code=UNREAD))
    same_tensors(tmp_path / "one", tmp_path / "two")


def test_losses_of_a_whole_batch_see_the_samples_of_every_process(tiny_bert: Path, tmp_path: Path) -> None:
    """Pairs of sentences go through the network one after the other, before one backward pass."""
    words = " ".join(TEXTS).replace(",", "").split()
    texts = [" ".join(words[at : at + 3 + at % 5]) for at in range(20)]
    rows = [f"{one},{other},{at * 3 % 7}" for at, (one, other) in enumerate(pairwise(texts))]
    (tmp_path / "pairs.csv").write_text("\n".join(["sentence1,sentence2,score", *rows]))
    peftc.decompose(tiny_bert, output_dir=tmp_path / "small", ratio=0.5, method="svd", device="cpu")
    asked = ["distill", tmp_path / "small", "--data", tmp_path / "pairs.csv", "--task", "sentence-similarity"]
    asked += ["--loss", "task=1,embeddings=1", "--steps", 4, "--batch-size", 6, "--learning-rate", 0.01]
    same_curve(learn(tmp_path / "one", *asked, several=False), learn(tmp_path / "two", *asked))


@pytest.mark.parametrize("how", ["full", "lora --delta"])
def test_half_precision_is_widened_layer_by_layer_and_stored_as_before(
    how: str, tiny_llama: Path, story: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "half")
    state = load_file(tiny_llama / "model.safetensors")
    half = {name: tensor.bfloat16() for name, tensor in state.items()}
    save_file(half, tmp_path / "half" / "model.safetensors", {"format": "pt"})
    words = ["finetune", tmp_path / "half", "--data", story, *FEW, "--method", *how.split()]
    same_curve(learn(tmp_path / "one", *words, several=False), learn(tmp_path / "two", *words))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert {name: each.dtype for name, each in one.items()} == {name: each.dtype for name, each in two.items()}
    assert all(torch.allclose(one[name].float(), two[name].float(), atol=0.01) for name in one)


@pytest.mark.parametrize("kind", ["tiny_vit", "tiny_resnet"])
def test_networks_of_images_and_their_new_heads_are_cut(kind: str, request: Any, tmp_path: Path) -> None:
    """A batch norm sees the samples of its own process, so that its curve is not that of one."""
    draw = np.random.default_rng(0)
    splits = {"x_train": draw.normal(size=(64, 3, 32, 32)).astype(np.float32), "y_train": np.arange(64) % 4}
    np.savez(tmp_path / "images.npz", **splits)
    words = ["finetune", request.getfixturevalue(kind), "--data", tmp_path / "images.npz", "--head", "new"]
    words += ["--method", "full", "--steps", 4, "--batch-size", 16, "--evaluations", 2]
    one, two = learn(tmp_path / "one", *words, several=False), learn(tmp_path / "two", *words)
    if kind == "tiny_vit":
        same_curve(one, two)
        same_tensors(tmp_path / "one", tmp_path / "two")
    assert two[-1]["step"] == 4 and np.isfinite([each["loss"] for each in two if "loss" in each]).all()


# The command line, with a checkpoint after each step and a process that ends before some step.
STOPS = """
import os, signal, sys
from peftc.training import loop
from peftc.training.imitation import Imitation
loop.SAVE_EVERY = 0.0
learn, step = Imitation.loss, iter(range(1000))
def stopping(self, module, given, *peers):
    if not peers and next(step) == {at} and os.environ["RANK"] in {ranks!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    return learn(self, module, given, *peers)
Imitation.loss = stopping
from peftc.cli.app import main
sys.argv[0] = "peftc"
main()
"""


def launch_on(number: int, *words: Any) -> list[tuple[int, str, str]]:
    """Run a command line on so many processes; return exit code, stdout and stderr of each."""
    shared = environments()[0] | {"WORLD_SIZE": str(number)}
    running = [Forked(*words, env=shared | {"RANK": f"{at}", "LOCAL_RANK": f"{at}"}) for at in range(number)]
    return [(done.returncode, done.stdout, done.stderr) for done in (process.done() for process in running)]


@pytest.mark.parametrize("number", [1, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_when_a_process_is_killed_all_end_and_any_number_goes_on(
    number: int, method: str, tiny_llama: Path, story: Path, tmp_path: Path
) -> None:
    words = ["finetune", tiny_llama, "--data", story, *FEW, "--method", method, "--device", "cpu", "-o"]
    whole = learn(tmp_path / "whole", *words[:-3], several=False)
    first, second = launch(*words, tmp_path / "cut", "--shard", code=STOPS.format(at=3, ranks="1"))
    assert (first[0], second[0]) == (1, -9), first[2]
    assert "error: another process of this launch stopped" in first[2] and "Traceback" not in first[2]
    assert "run the same command again to resume" in first[2]
    kept = [path.name for path in (tmp_path / "cut.partial" / "work").iterdir()]
    assert "checkpoint-2" in kept or "checkpoint-3" in kept
    ended = [alone(*words, tmp_path / "cut")] if number == 1 else launch_on(number, *words, tmp_path / "cut", "--shard")
    assert all(code == 0 for code, _, _ in ended), ended
    assert "resumed at step" in ended[0][2]
    same_curve(whole, log(tmp_path / "cut"))
    same_tensors(tmp_path / "whole", tmp_path / "cut")


def test_a_checkpoint_of_whole_weights_is_not_gone_on_with_in_pieces(
    tiny_llama: Path, story: Path, tmp_path: Path
) -> None:
    words = ["finetune", tiny_llama, "--data", story, *FEW, "--device", "cpu", "-o", tmp_path / "out"]
    assert launch(*words, code=STOPS.format(at=3, ranks="01"))[0][0] == -9
    first, _ = launch(*words, "--shard")
    assert first[0] == 2 and "is a checkpoint of whole weights" in first[2], first[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["finetune", "--method", "snella"], "`--method snella` does not go with `--shard`"),
        (["finetune", "--optimizer", "adafactor"], "`--shard` does not go with `--optimizer adafactor`"),
        (["finetune", "--mixed-precision", "fp16"], "`--shard` does not go with `--mixed-precision fp16`"),
        (["distill"], "`--shard` does not go with the term `perturbation`"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(
    words: list[str], said: str, tiny_llama: Path, story: Path, tmp_path: Path
) -> None:
    peftc.decompose(tiny_llama, output_dir=tmp_path / "small", ratio=0.6, method="svd", device="cpu")
    ended = launch(words[0], tmp_path / "small", *words[1:], "--data", story, *FEW, "--shard", "-o", tmp_path / "out")
    assert [code for code, _, _ in ended] == [2, 2]
    assert f"error: {said}" in ended[0][2], ended
    assert not list(tmp_path.glob("out*"))


def test_accelerate_asks_for_it_by_its_own_variables(
    tiny_llama: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["finetune", tiny_llama, "--data", story, *FEW, "--device", "cpu", "-o", tmp_path / "out"]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    code, _, told = alone(*words)
    assert code == 1 and "version 2 of FSDP alone" in told and "--fsdp_version 2" in told
    monkeypatch.setenv("FSDP_VERSION", "2")
    launched = launch(*words, code=STOPS.format(at=3, ranks="01"))
    assert launched[0][0] == -9 and (tmp_path / "out.partial" / "work" / "checkpoint-3").is_dir(), launched


def test_processes_that_do_not_see_one_folder_are_refused(tiny_llama: Path, story: Path, tmp_path: Path) -> None:
    apart = "import os; os.makedirs(os.environ['RANK'], exist_ok=True); os.chdir(os.environ['RANK'])"
    words = ["finetune", tiny_llama, "--data", story, *FEW, "--device", "cpu", "-o", "out"]
    code = f"import os\nos.chdir({str(tmp_path)!r})\n{apart}\n" + STOPS.format(at=99, ranks="")
    ended = launch(*words, code=code)
    assert [each[0] for each in ended] == [1, 1]
    assert "error: the processes of this launch do not see one folder" in ended[0][2], ended
    assert not list(tmp_path.glob("*/out*"))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
@pytest.mark.parametrize("how", ["", "--shard", "--shard --offload", "--shard --mixed-precision bf16"])
def test_two_gpus_learn_what_one_process_does(how: str, tiny_llama: Path, story: Path, tmp_path: Path) -> None:
    words = ["finetune", tiny_llama, "--data", story, *FEW, "--method", "full", "-o"]
    one = learn(tmp_path / "one", *words[:-1], several=False)
    ended = launch(*words, tmp_path / "two", "--device", "cuda", *how.split())
    assert all(code == 0 for code, _, _ in ended), ended
    losses = [[each["loss"] for each in lines if "loss" in each] for lines in (one, log(tmp_path / "two"))]
    assert losses[1] == pytest.approx(losses[0], rel=0.02 if "bf16" in how else 1e-3)
