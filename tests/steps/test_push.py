"""--push-to-hub and loading by id, against a hub of our own: what was pushed is what strangers load."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import peftc
from peftc.errors import ArtifactError, OutputError, PeftcError, SourceError, UsageError
from peftc.report import ranged
from peftc.steps.push import push_to_hub
from peftc.store.source import Source
from tests.hub_server import READER, Hub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")  # of huggingface_hub's own requests
QUICK: dict[str, Any] = {"rounds": 5, "batch_size": 2}
ALONE = """
import sys
sys.modules["peftc"] = None
import torch, timm, transformers
from safetensors.torch import load_file, save_file
place, *named = sys.argv[1:]
found = {}
with torch.inference_mode():
    for kind, name in (each.split("=") for each in named):
        inputs = load_file(f"{place}/{'images' if kind == 'timm' else 'words'}")
        if kind == "timm":
            value = timm.create_model("hf-hub:" + name, pretrained=True).eval()(inputs["x"])
        else:
            more = {"trust_remote_code": True} if kind == "AutoModel" else {}
            value = getattr(transformers, kind).from_pretrained(name, **more).eval()(**inputs).logits
        found[name] = value.contiguous()
save_file(found, f"{place}/back")
"""


@pytest.fixture(scope="module")
def small(tiny_bert_classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A factored classifier with its tokenizer."""
    folder = tmp_path_factory.mktemp("push") / "small"
    peftc.decompose(tiny_bert_classifier, ratio=0.5, output_dir=folder)
    return folder


def words() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 20, (3, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return peftc.load(model)(**words()).logits


def card_of(hub: Hub, repo: str) -> ModelCard:
    return ModelCard(hub.repos[repo].commits[-1][1]["README.md"].decode())


# there and back


def test_what_was_pushed_loads_by_its_id(hub: Hub, small: Path) -> None:
    report = push_to_hub(small, "me/small")
    pushed = hub.repos["me/small"]
    assert len(pushed.commits) == 2, "one commit when it was made, and one with everything"
    assert set(pushed.commits[-1][1]) == {path.name for path in small.iterdir()} | {"README.md", ".gitattributes"}
    assert report.data["pushed"] == {"repo": "me/small", "url": f"{hub.url}/me/small", "commit": pushed.commits[-1][0]}
    assert len(hub.verified) == 1
    torch.testing.assert_close(logits("me/small"), logits(small), rtol=0, atol=0)
    torch.testing.assert_close(logits("hf:me/small@main"), logits(small), rtol=0, atol=0)


def test_it_loads_again_without_a_network(hub: Hub, small: Path) -> None:
    push_to_hub(small, "me/small")
    expected = logits("me/small")
    asked = len(hub.asked)
    with torch.inference_mode():
        again = peftc.load(Source("me/small", offline=True))(**words()).logits
    assert len(hub.asked) == asked
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


def test_a_revision_is_what_it_was(hub: Hub, small: Path, tiny_bert_classifier: Path, tmp_path: Path) -> None:
    first = push_to_hub(small, "me/small").data["pushed"]["commit"]
    peftc.decompose(tiny_bert_classifier, ratio=0.3, output_dir=tmp_path / "smaller")
    push_to_hub(tmp_path / "smaller", "me/small")
    assert not torch.equal(logits("me/small"), logits(small))
    for source in (f"me/small@{first}", Source("me/small", revision=first)):
        torch.testing.assert_close(logits(source), logits(small), rtol=0, atol=0)


def test_every_step_takes_an_id_and_leaves_the_cache_alone(hub: Hub, small: Path, tmp_path: Path) -> None:
    push_to_hub(small, "me/small")
    report = peftc.prune_layers("me/small", drop="1", output_dir=tmp_path / "shorter")
    assert report.artifact == tmp_path / "shorter"
    before = {path: path.read_bytes() for path in Path(os.environ["HF_HOME"]).rglob("result.json")}
    assert before
    peftc.bench("me/small", batch_size=1, rounds=5)
    assert {path: path.read_bytes() for path in before} == before


def test_show_fetches_no_weights(hub: Hub, small: Path, peftc: Callable[..., Any]) -> None:
    expected = peftc("show", small).stderr
    push_to_hub(small, "me/small")
    shown = peftc("show", "me/small")
    assert shown.exit_code == 0, shown.stderr
    assert shown.stderr.split("id", 1)[1] == expected.split("id", 1)[1]
    home = Path(os.environ["HF_HOME"])
    assert not list(home.rglob("*.safetensors")), "a header is all that was asked for"
    lines = peftc("show", "me/small", "--commands").stdout
    assert lines == peftc("show", small, "--commands").stdout


@pytest.mark.usefixtures("quick_exports")
def test_strangers_load_what_was_exported(hub: Hub, small: Path, small_vit: Path, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    exports = {"hf": (small, True), "hf-code": (small, False), "timm": (small_vit, True)}
    for word, (model, dense) in exports.items():
        peftc.export(model, format=word, dense=dense, output_dir=tmp_path / word, **QUICK)
        push_to_hub(tmp_path / word, f"me/{word}")
    save_file(words(), tmp_path / "words")
    save_file({"x": x}, tmp_path / "images")
    line = [sys.executable, "-W", "ignore", "-c", ALONE, str(tmp_path), "timm=me/timm"]
    done = subprocess.run(
        [*line, "BertForSequenceClassification=me/hf", "AutoModel=me/hf-code"], capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "back")
    with torch.inference_mode():
        images = peftc.load(small_vit)(x)
        again = peftc.load("me/timm")(x)  # a timm folder, though its owner is not timm
    for tensor, expected in [
        (found["me/hf"], logits(small)), (found["me/hf-code"], logits(small)), (logits("me/hf"), logits(small)),
        (found["me/timm"], images), (again, images),
    ]:  # fmt: skip
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-5)
    assert [card_of(hub, f"me/{word}").data.library_name for word in exports] == [
        "transformers",
        "transformers",
        "timm",
    ]
    assert "custom_code" in card_of(hub, "me/hf-code").data.tags
    assert "trust_remote_code=True" in card_of(hub, "me/hf-code").text
    assert "multiplied out" in card_of(hub, "me/hf").text


@pytest.mark.parametrize("of", ["a plain model", "an artifact"])
def test_a_delta_names_its_base_by_id(
    hub: Hub, small: Path, tiny_bert_classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    if of == "an artifact":
        push_to_hub(small, "me/base")
    else:
        hub.add("me/base", {path.name: path.read_bytes() for path in tiny_bert_classifier.iterdir() if path.is_file()})
    peftc.prune_layers("me/base", drop="1", delta=True, output_dir=tmp_path / "delta")
    report = push_to_hub(tmp_path / "delta", "me/delta")
    assert report.warnings == []
    monkeypatch.chdir(tmp_path)
    expected = logits(tmp_path / "delta")
    torch.testing.assert_close(logits("me/delta"), expected, rtol=0, atol=0)
    stored = hub.repos["me/delta"].commits[-1][1]
    assert sum(len(content) for name, content in stored.items() if name.endswith(".safetensors")) < 10_000


def test_a_delta_on_a_base_of_yours_is_pushed_with_a_warning(
    hub: Hub, tiny_bert_classifier: Path, tmp_path: Path
) -> None:
    peftc.prune_layers(tiny_bert_classifier, drop="1", delta=True, output_dir=tmp_path / "delta")
    report = push_to_hub(tmp_path / "delta", "me/delta")
    assert "which is not on the hub" in report.warnings[0]
    with_base = Source("me/delta", base=str(tiny_bert_classifier))
    torch.testing.assert_close(logits(with_base), logits(tmp_path / "delta"), rtol=0, atol=0)


# from the command line


def test_a_step_pushes_what_it_wrote(
    hub: Hub, tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peftc: Callable[..., Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["decompose", tiny_vit, "--ratio", "0.5", "-o", "small", "--push-to-hub", "me/vit", "--private", "--json"]
    done = peftc(*line)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["pushed"]["repo"] == "me/vit"
    assert hub.repos["me/vit"].private
    commits = list(hub.repos["me/vit"].commits)
    again = peftc(*line)
    assert "already done" in again.stderr and again.exit_code == 0
    assert hub.repos["me/vit"].commits == commits, "nothing changed, so there is nothing to commit"


def test_what_fails_its_gate_is_not_pushed(
    hub: Hub, tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peftc: Callable[..., Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["decompose", tiny_vit, "--ratio", "0.5", "-o", "small", "--push-to-hub", "me/vit"]
    done = peftc(*line, "--max-params", "10")
    assert done.exit_code == 3
    assert "not pushed to `me/vit`: a gate was not met" in done.stderr
    assert hub.repos == {} and (tmp_path / "small").is_dir()
    assert peftc(*line).exit_code == 0 and "me/vit" in hub.repos


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--push-to-hub", "me/vit", "--dry-run"], "a dry run writes nothing to push"),
        (["--push-to-hub", "me/vit", "--offline"], "asks the network"),
        (["--private"], "`--private` is of a repository"),
        (["--push-to-hub", "vit"], "`vit` names no owner"),
        (["--push-to-hub", "me/v it"], "is no name of a repository"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_the_work(
    hub: Hub, tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peftc: Callable[..., Any],
    words: list[str], told: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    done = peftc("decompose", tiny_vit, "--ratio", "0.5", "-o", "small", *words)
    assert done.exit_code == 2 and told in done.stderr
    assert not (tmp_path / "small").exists() and hub.repos == {}


# refusals of the hub


def refused(call: Callable[[], Any]) -> PeftcError:
    with pytest.raises(PeftcError) as caught:
        call()
    error = caught.value
    assert error.what and "\n" not in error.what and error.why and error.hint
    return error


def test_without_a_token_nothing_is_asked(hub: Hub, small: Path) -> None:
    del os.environ["HF_TOKEN"]
    error = refused(lambda: push_to_hub(small, "me/small"))
    assert isinstance(error, OutputError) and "no token" in str(error) and "hf auth login" in str(error.hint)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("token", "told"), [("hf_wrong", "does not accept your token"), (READER, "does not allow it")]
)  # fmt: skip
@pytest.mark.parametrize("is_there", [False, True])
def test_a_token_that_may_not_write_is_refused(hub: Hub, small: Path, token: str, told: str, is_there: bool) -> None:
    if is_there:
        hub.add("me/small", {})
    os.environ["HF_TOKEN"] = token
    error = refused(lambda: push_to_hub(small, "me/small"))
    assert isinstance(error, OutputError) and told in str(error.why) and "hf auth login" in str(error.hint)
    assert all(files == {} for repo in hub.repos.values() for _, files in repo.commits)


@pytest.mark.parametrize("at", ["create", "preupload", "batch", "PUT", "verify", "/commit/"])
def test_a_server_that_ends_half_way_has_nothing_half(
    hub: Hub, small: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between its retries
    before = hub.add("me/small", {"README.md": b"old"})
    hub.lost = at
    error = refused(lambda: push_to_hub(small, "me/small"))
    assert isinstance(error, OutputError) and "lost half way" in str(error.why)
    assert [files for _, files in before.commits] == [{"README.md": b"old"}]
    hub.lost, hub.is_lost = None, False
    push_to_hub(small, "me/small")
    torch.testing.assert_close(logits("me/small"), logits(small), rtol=0, atol=0)


def test_files_of_an_earlier_push_go_in_the_same_commit(
    hub: Hub, small: Path, tiny_bert_classifier: Path, tmp_path: Path
) -> None:
    peftc.decompose(tiny_bert_classifier, ratio=0.5, max_shard_size="20kB", output_dir=tmp_path / "shards")
    push_to_hub(tmp_path / "shards", "me/small")
    assert "model.safetensors.index.json" in hub.repos["me/small"].commits[-1][1]
    number = len(hub.repos["me/small"].commits)
    push_to_hub(small, "me/small")
    assert len(hub.repos["me/small"].commits) == number + 1
    files = hub.repos["me/small"].commits[-1][1]
    assert [name for name in files if "safetensors" in name] == ["model.safetensors"]


def test_a_model_that_peftc_did_not_push_is_left_alone(hub: Hub, small: Path) -> None:
    hub.add("me/other", {"pytorch_model.bin": b"weights", "README.md": b"mine"})
    error = refused(lambda: push_to_hub(small, "me/other"))
    assert "holds another model" in error.what and "pytorch_model.bin" in str(error.why)
    assert len(hub.repos["me/other"].commits) == 1


def test_a_folder_of_something_else_is_not_pushed(hub: Hub, tiny_vit: Path, small: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="neither an artifact nor an export"):
        push_to_hub(tiny_vit, "me/vit")
    assert hub.repos == {}


def test_what_cannot_be_fetched_says_why(hub: Hub, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push_to_hub(small, "me/small")
    hub.add("me/private", {"config.json": b"{}"}, private=True)
    hub.add("me/gated", {"config.json": b"{}"}, gated=True)
    hub.add("me/text", {"notes.txt": b"no model"})
    os.environ["HF_TOKEN"] = READER

    def why(spec: str) -> str:
        error = refused(lambda: peftc.load(spec))
        assert isinstance(error, SourceError)
        return str(error)

    assert "no such model, or it is private" in why("me/smal") and "check the name" in why("me/smal")
    assert "no such model, or it is private" in why("me/private")
    assert "access to it has to be granted" in why("me/gated")
    assert "`me/small` has no revision `v9`" in why("me/small@v9")
    os.environ["HF_TOKEN"] = "hf_wrong"
    assert "does not accept your token" in why("me/small")
    os.environ["HF_TOKEN"] = READER
    hub.is_lost = True
    assert "cannot be reached" in why("me/never")
    with pytest.raises(SourceError, match="holds no model"):
        hub.is_lost = False
        peftc.load("me/text")
    with pytest.raises(UsageError, match="`me/small` is an artifact"):
        peftc.load(Source("me/small", arch_set={"depth": 1}))


# the card


def test_the_card_of_a_chain_tells_every_step_and_what_was_measured(
    hub: Hub, tiny_vit: Path, tmp_path: Path, peftc: Callable[..., Any]
) -> None:
    small, shorter, tuned = (tmp_path / name for name in ("small", "shorter", "tuned"))
    data = ["--data", "sklearn:digits", "--num-samples", "40"]
    assert peftc("decompose", tiny_vit, "--ratio", "0.6", "-o", small).exit_code == 0
    score = ["--score", "block-influence", "--keep", "1"]
    assert peftc("prune-layers", small, *data, *score, "-o", shorter).exit_code == 0
    assert peftc("finetune", shorter, *data, "--steps", "2", "--held-out", "0", "-o", tuned).exit_code == 0
    evaluated = peftc("evaluate", tuned, *data, "--against", "base", "--json")
    push_to_hub(tuned, "me/tuned")
    card = card_of(hub, "me/tuned")
    data = card.data.to_dict()
    assert data["library_name"] == "peftc" and data["pipeline_tag"] == "image-classification"
    assert {"peftc", "low-rank", "layer-pruning", "fine-tuned"} <= set(data["tags"])
    assert "license" not in data and "base_model" not in data, "nobody said which"
    measured = json.loads(evaluated.stdout)["metrics"]
    assert len(card.data.eval_results) == len(measured), "the newest of each data set"
    listed = {result.metric_name: result for result in card.data.eval_results}
    assert {name: each.metric_value for name, each in listed.items()} == {
        name: figure["value"] for name, figure in measured.items()
    }
    assert listed["top1"].metric_type == "accuracy" and listed["top1"].dataset_type == "sklearn:digits"
    text = card.text
    done = text.split("## What was done\n\n")[1].split("\n\n")[0].splitlines()
    assert [line.split("`")[1] for line in done] == ["decompose", "prune-layers", "finetune"]
    assert peftc("show", tuned, "--commands").stdout.strip() in text
    assert ranged(**measured["top1"]) in text and "| dense |" in text
    assert "peftc does not know the licence" in text
    assert str(tmp_path) not in text.split("## Rebuild")[0]


def test_what_was_not_measured_is_not_in_the_card(hub: Hub, small: Path) -> None:
    push_to_hub(small, "me/small")
    card = card_of(hub, "me/small")
    assert "Quality and speed were not measured." in card.text
    assert card.data.eval_results is None and card.data.metrics is None
    assert card.data.pipeline_tag == "text-classification"
    assert 'peftc.load("me/small")' in card.text


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: apache-2.0", {"license": "apache-2.0"}),
        (
            "license: other\nlicense_name: own\nlicense_link: LICENSE",
            {"license": "other", "license_name": "own", "license_link": "LICENSE"},
        ),
        ("tags: [x]", {}),
        ("license_name: own", {}),
    ],
)
def test_the_licence_is_that_of_the_base_on_the_hub(
    hub: Hub, tiny_bert_classifier: Path, tmp_path: Path, front: str, expected: dict[str, str]
) -> None:
    files = {path.name: path.read_bytes() for path in tiny_bert_classifier.iterdir() if path.is_file()}
    hub.add("me/base", {**files, "README.md": f"---\n{front}\n---\n# base\n".encode()})
    peftc.decompose("me/base", ratio=0.5, output_dir=tmp_path / "small")
    push_to_hub(tmp_path / "small", "me/small")
    data = card_of(hub, "me/small").data.to_dict()
    assert data["base_model"] == "me/base"
    assert {key: value for key, value in data.items() if key.startswith("license")} == expected
    told = expected.get("license_name") or expected.get("license")
    assert (f"The licence of `me/base` is `{told}`" if told else "does not know") in card_of(hub, "me/small").text


def test_the_licence_may_stand_beside_a_local_base_or_in_its_config(hub: Hub, tiny_vit: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in tiny_vit.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    peftc.decompose(base, ratio=0.5, output_dir=tmp_path / "small")
    push_to_hub(tmp_path / "small", "me/small")
    assert card_of(hub, "me/small").data.license == "mit"
    config = json.loads((base / "config.json").read_text())
    config["pretrained_cfg"]["license"] = "cc-by-4.0"
    (base / "config.json").write_text(json.dumps(config))
    (base / "README.md").unlink()
    peftc.decompose(base, ratio=0.5, output_dir=tmp_path / "other")
    push_to_hub(tmp_path / "other", "me/other")
    assert card_of(hub, "me/other").data.license == "cc-by-4.0"


@pytest.mark.parametrize(
    ("format", "library", "line"),
    [
        ("safetensors", "peftc", "safetensors.torch.load_file"),
        ("torch-export", None, "torch.export.load"),
    ],
)
def test_the_card_of_an_export_says_how_it_is_loaded(
    hub: Hub, small: Path, tmp_path: Path, format: str, library: str | None, line: str, peftc: Callable[..., Any]
) -> None:
    words = ["--format", format, "--rounds", "5", "--batch-size", "2", "-o", tmp_path / "out"]
    assert peftc("export", small, *words, "--push-to-hub", "me/out").exit_code == 0
    card = card_of(hub, "me/out")
    assert card.data.library_name == library and line in card.text
    assert "largest deviation" in card.text
    assert f"peftc export 01-decompose --format {format}" in card.text
    code = card.text.split("```python\n")[1].split("```")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "card", "exec"), {})


def test_a_card_of_your_own_is_pushed_as_it_is(hub: Hub, small: Path, tmp_path: Path) -> None:
    peftc.prune_layers(small, drop="1", output_dir=tmp_path / "own")
    (tmp_path / "own" / "README.md").write_text("---\nlicense: mit\n---\n# mine\n")
    push_to_hub(tmp_path / "own", "me/own")
    assert hub.repos["me/own"].commits[-1][1]["README.md"] == b"---\nlicense: mit\n---\n# mine\n"
    (tmp_path / "own" / "README.md").write_text("no front matter")
    error = refused(lambda: push_to_hub(tmp_path / "own", "me/own"))
    assert "front matter" in str(error.hint)
