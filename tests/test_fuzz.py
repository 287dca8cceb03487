"""Whatever stands in a file, peftc refuses it in words or does what the file says.

One thing is changed in one file, a thousand times, always the same changes. Never a traceback, a hang, two gigabytes of
memory or a byte outside the folder; and what is not refused

* of folders with a manifest gives the same outputs as before,
* of other people's files gives what transformers, timm or peft makes of the same changed file,
* of plans and project files is what stands in them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import peftc
from peftc.cli.app import app
from peftc.data.tokens import tokenise
from peftc.errors import ChainError, UsageError
from peftc.models.load import load
from peftc.project import config
from peftc.steps.compare import compare
from peftc.steps.report import report
from peftc.steps.show import show
from tests.conftest import TEXTS
from tests.fuzzing import AS_OTHERS, AS_WRITTEN, REFUSED, Subject, equal, fuzz, hook
from tests.networks import BERT, INPUT, LLAMA, VIT, save_timm, save_transformers

CASES = int(os.environ.get("FUZZ_CASES", "1000"))
SLOW_CASES = 20_000
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[2, 7, 9, 12, 3], [2, 8, 6, 5, 3]])


def outputs(network: Any, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = network(inputs)
    return next(value for name in ("logits", "last_hidden_state") if (value := getattr(found, name, None)) is not None)


def vit_outputs(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return peftc.load(folder)(IMAGES)


def text_outputs(folder: Path) -> list[torch.Tensor]:
    """Run tokens through the network and texts through the tokenizer and the network."""
    model = load(folder)
    batch = tokenise(model, TEXTS, 32).pad(range(len(TEXTS)))
    with torch.no_grad():
        return [outputs(model.module, IDS), outputs(lambda _: model.module(**batch), IDS)]


def of_transformers(folder: Path) -> list[torch.Tensor]:
    """Do the same with transformers alone."""
    import transformers

    config = json.loads((folder / "config.json").read_text())
    cls = getattr(transformers, (config.get("architectures") or ["AutoModel"])[0])
    network = cls.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token  # as its error says, and as peftc does
    keys = ("input_ids", "attention_mask", "token_type_ids")
    made = tokenizer(TEXTS, truncation=True, max_length=32, padding=True, return_tensors="pt")
    batch = {key: made[key] for key in keys if key in made}
    with torch.no_grad():
        return [outputs(network, IDS), outputs(lambda _: network(**batch), IDS)]


def of_timm(folder: Path) -> torch.Tensor:
    import timm

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"pretrained_cfg": {}, **config}))  # without one timm refuses
    with torch.no_grad():
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(IMAGES)


def adapted(folder: Path) -> torch.Tensor:
    return outputs(peftc.load(folder), IDS)


def of_peft(folder: Path) -> torch.Tensor:
    import peft
    from transformers import AutoModelForCausalLM

    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return outputs(peft.PeftModel.from_pretrained(network, folder).eval(), IDS)


def told(folder: Path) -> list[Any]:
    """Read what the commands that only read print of an artifact."""
    first, second = show(folder), show(folder, commands=True)
    compare([folder], commands=True)
    report([folder], output=folder.parent / "page.html")
    return [first.data["tensors"], second.lines]


def on_purpose(folder: Path) -> str:
    """Take the digest out of a document, as who changes it on purpose does; what then comes of it is theirs to say."""
    for name in ("peftc.json", "export.json"):
        path = folder / name
        if path.exists() and isinstance(value := parsed_or_none(path), dict):
            value.pop("digest", None)
            path.write_text(json.dumps(value))
    if (folder / "export.json").exists():
        return str(told_of_export(folder))
    return str([told(folder), vit_outputs(folder)])


def parsed_or_none(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError):
        return None


def told_of_export(folder: Path) -> list[Any]:
    found = compare([folder], commands=True).data["models"]
    return [found[-1]["id"], found[-1]["commands"]]


def planned(folder: Path) -> dict[str, Any]:
    """Carry out a plan, and return the ranks that were given."""
    found = peftc.decompose(folder.parent.parent / "vit", plan=folder / "plan.json", output_dir=folder / "out")
    shutil.rmtree(folder / "out")
    return {row["name"]: row["rank"] for row in found.data["modules"] if row["rank"] is not None}


def as_planned(folder: Path) -> dict[str, Any]:
    value = json.loads((folder / "plan.json").read_text())
    return {name: rank for name, rank in value["ranks"].items() if rank is not None}


def command(folder: Path, *words: str) -> str:
    """Run a command line in a folder; return what it prints, and raise what it refuses."""
    from typer.testing import CliRunner

    before = Path.cwd()
    os.chdir(folder)
    try:
        done = CliRunner().invoke(app, list(words))
    finally:
        os.chdir(before)
    if done.exit_code in (1, 2):
        assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr, done.stderr
        raise UsageError(done.stderr)
    assert done.exit_code in (0, 3), done.stderr
    return done.stdout


def parsed(folder: Path) -> dict[str, str]:
    """Look at what `peftc run` would run, and return the options that `decompose` takes from the file."""
    from peftc.cli import defaults

    command(folder, "run", "--dry-run", "--json")
    group: Any = __import__("typer").main.get_command(app)
    project = config.load("decompose", defaults.known(group), folder / "peftc.toml")
    with group.make_context("peftc", ["decompose", "--help"], resilient_parsing=True) as parent:
        one = group.commands["decompose"].make_context("decompose", [], parent=parent, obj=project)
    return {name: text_of(one.params[name]) for name in project.defaults if name in ("ratio", "rank", "seed", "skip")}


def text_of(value: Any) -> str:
    return str([value] if isinstance(value, str) else list(value) if isinstance(value, tuple | list) else value)


def as_in_toml(folder: Path) -> dict[str, str]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    content = tomllib.loads((folder / "peftc.toml").read_text())
    table = {**content, **content.get("decompose", {})}
    found = {name: value for name, value in table.items() if name in ("ratio", "rank", "seed", "skip")}
    if isinstance(found.get("skip"), str):
        found["skip"] = shlex.split(found["skip"])
    if "skip" in found:
        found["skip"] = [str(each) for each in found["skip"]]
    return {name: text_of(str(value) if name == "ratio" else value) for name, value in found.items()}


def chain_of(folder: Path) -> list[str]:
    """Read a chain, and run what looks for its last artifact."""
    links = config.read_chain(folder / "runs").links
    command(folder, "compare") if links else None
    return [str(link.folder) for link in links]


def as_in_chain(folder: Path) -> list[str]:
    names = [str(folder / "runs" / entry["folder"]) for entry in json.loads((folder / "runs/chain.json").read_text())]
    there = [(Path(name) / "peftc.json").is_file() for name in names]
    return names[: there.index(False)] if False in there else names


def looked_over(folder: Path) -> str:
    """Say what a second run would do: nothing."""
    if (folder / "runs/ledger.json").exists():
        return str([step["state"] for step in json.loads(command(folder, "run", "--dry-run", "--json"))["steps"]])
    raise ChainError("gone")


def gone_on(folder: Path) -> str:
    """Go on with an unfinished decomposition, and return the digest of what comes of it."""
    partial = folder.parent / "out.partial"
    folder.rename(partial)
    peftc.decompose(folder.parent.parent / "vit", ratio=0.6, output_dir=folder.parent / "out", device="cpu")
    return hashlib.sha256((folder.parent / "out" / "model.safetensors").read_bytes()).hexdigest()


def make_folders(site: Path) -> None:
    """Write each kind of folder once."""
    import peft
    import transformers

    for name in ("vit", "bert", "llama", "whole", "planned", "project"):
        (site / name).mkdir()
    save_timm(site / "vit", "vit_tiny_patch16_224", {**VIT, "depth": 2, "num_classes": 10}, INPUT)
    save_transformers(site / "bert", "BertForSequenceClassification", **BERT)
    save_transformers(site / "whole", "LlamaForCausalLM", **LLAMA)
    llama = transformers.AutoModelForCausalLM.from_pretrained(site / "whole")
    llama.save_pretrained(site / "llama", max_shard_size="30kB")
    for path in (site / "whole").glob("tokenizer*"):
        shutil.copy(path, site / "llama")
    common = {"device": "cpu", "seed": 0}
    peftc.decompose(site / "vit", output_dir=site / "small", ratio=0.6, max_shard_size="30kB", **common)
    peftc.decompose(site / "bert", output_dir=site / "small-bert", ratio=0.6, **common)
    peftc.decompose(site / "vit", output_dir=site / "ranks", keep_all_ranks=True, **common)
    data = {"data": "sklearn:digits", "device": "cpu"}
    peftc.finetune(site / "small", output_dir=site / "delta", delta=True, steps=1, num_samples=40, held_out=0, **data)
    peftc.evaluate(site / "delta", **data)
    peftc.calibrate(site / "vit", output_dir=site / "statistics", calibration_samples=4, **data)
    peftc.export(site / "small", output_dir=site / "export", format="safetensors", rounds=5)
    peftc.analyze(site / "vit", ratio=0.6, plan=site / "planned" / "plan.json")
    (site / "project" / "peftc.toml").write_text(TOML.format(site=site))
    command(site / "project", "run", "-q")
    (site / "unfinished").mkdir()
    (site / "unfinished" / "work").mkdir()
    peftc.decompose(site / "vit", ratio=0.6, output_dir=site / "plain", device="cpu")
    identity = json.loads((site / "plain/peftc.json").read_text())["id"]
    (site / "unfinished" / "job.json").write_text(json.dumps({"id": identity}))
    tuned = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(site / "whole"),
        peft.LoraConfig(
            r=4, target_modules=["q_proj", "down_proj"], rank_pattern={"layers.0.self_attn.q_proj": 2},
            alpha_pattern={r".*\.q_proj": 16}, task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(site / "adapter")


def subjects_of(site: Path) -> dict[str, Subject]:
    """Return what is changed, and what it must still be or become."""

    def truncated(folder: Path) -> torch.Tensor:
        peftc.truncate(folder, ratio=0.5, output_dir=folder.parent / "cut")
        found = vit_outputs(folder.parent / "cut")
        shutil.rmtree(folder.parent / "cut")
        return found

    def calibrated(folder: Path) -> torch.Tensor:
        options = {"statistics": folder, "method": "whitened", "allocation": "uniform", "device": "cpu"}
        peftc.decompose(site / "vit", ratio=0.5, output_dir=folder.parent / "cut", **options)
        found = vit_outputs(folder.parent / "cut")
        shutil.rmtree(folder.parent / "cut")
        return found

    weights = "*.safetensors"
    return {
        "artifact": Subject(
            site / "small", ("peftc.json", "config.json", "*.index.json", weights), vit_outputs, share=3
        ),
        "artifact, as told": Subject(site / "delta", ("result.json", "peftc.json", "log.jsonl"), told, share=2),
        "delta": Subject(site / "delta", ("peftc.json", weights), vit_outputs),
        "artifact of text": Subject(site / "small-bert", ("tokenizer*.json", "config.json"), text_outputs, share=2),
        "artifact, on purpose": Subject(site / "delta", ("peftc.json",), on_purpose, on_purpose, 2, AS_WRITTEN),
        "export, on purpose": Subject(site / "export", ("export.json",), on_purpose, on_purpose, 0.5, AS_WRITTEN),
        "all ranks": Subject(site / "ranks", ("peftc.json", "factors.safetensors"), truncated, share=0.5),
        "statistics": Subject(site / "statistics", ("peftc.json", "statistics.*"), calibrated, share=0.5),
        "export": Subject(site / "export", ("export.json", "result.json", weights), told_of_export, share=0.5),
        "folder of transformers": Subject(
            site / "bert", ("config.json", "tokenizer*.json", weights), text_outputs, of_transformers, 4, AS_OTHERS
        ),
        "shards of transformers": Subject(
            site / "llama", ("config.json", "*.index.json", weights), text_outputs, of_transformers, 2, AS_OTHERS
        ),
        "folder of timm": Subject(site / "vit", ("config.json", weights), vit_outputs, of_timm, 2, AS_OTHERS),
        "adapter": Subject(
            site / "adapter", ("adapter_config.json", weights), adapted, of_peft, 3, AS_OTHERS
        ),
        "plan": Subject(site / "planned", ("plan.json",), planned, as_planned, 1, AS_WRITTEN),
        "project file": Subject(site / "project", ("peftc.toml",), parsed, as_in_toml, 2, AS_WRITTEN),
        "chain": Subject(site / "project", ("runs/chain.json",), chain_of, as_in_chain, 0.5, AS_WRITTEN),
        "ledger": Subject(site / "project", ("runs/ledger.json",), looked_over, share=0.5),
        "unfinished work": Subject(site / "unfinished", ("job.json",), gone_on, share=0.3),
    }  # fmt: skip


TOML = """
model = "{site}/vit"
seed = 0
chain = ["decompose", "decompose.again"]

[decompose]
ratio = 0.6
device = "cpu"
skip = ["head", "*.fc1"]


[decompose.again]
ratio = 0.4
"""


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Subject]]:
    site = tmp_path_factory.mktemp("site")
    make_folders(site)
    found = subjects_of(site)
    for subject in found.values():
        folder = site / "work" / subject.folder.name
        shutil.copytree(subject.folder, folder)
        right = subject.run(folder)
        if subject.oracle is None:
            subject.expected = right
        else:
            assert equal(right, subject.oracle(folder), exactly=False), subject.folder
        shutil.rmtree(site / "work")
    sys.addaudithook(hook)
    return site / "work", found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cases", [CASES, pytest.param(SLOW_CASES, marks=pytest.mark.slow)])
def test_what_is_read_is_refused_or_taken_as_it_stands(
    subjects: tuple[Path, dict[str, Subject]], tmp_path: Path, cases: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    work, known = subjects
    work.mkdir()
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts, wrong = fuzz(work, known, cases)
    for (name, result), number in sorted(counts.items()):
        print(f"{number:6} {result:25} {name}")
    assert not wrong, f"{len(wrong)} of {sum(counts.values())} cases:\n" + "\n".join(wrong)
    accepted = sum(number for (_, result), number in counts.items() if result != REFUSED)
    assert accepted > 0.05 * cases, "nearly everything is refused: the changes show nothing"
