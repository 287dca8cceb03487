"""One decomposition of every rank, cut to any budget: the ranks and the factors that a direct decompose finds."""

import hashlib
import json
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftc.errors import ArtifactError, OutputError, PeftcError, PlanError, UsageError
from peftc.factors import ordered
from peftc.models import load as models
from peftc.models import write
from peftc.models.inputs import outputs, probe
from peftc.plans import allocate
from peftc.report import Report
from peftc.steps.analyze import analyze
from peftc.steps.bench import bench
from peftc.steps.decompose import decompose
from peftc.steps.evaluate import evaluate
from peftc.steps.show import show
from peftc.steps.truncate import truncate
from peftc.store import manifest
from peftc.store.source import Source
from tests.conftest import promised, rewritten
from tests.forked import forked
from tests.networks import NETWORKS, Convolutions, ranks, read, save_network

NAMES = [
    "vit",
    "bert",
    "llama-head",
    "gpt2-embedding",
    "resnet-spatial",
    "resnet-channel",
    "tied",
    "shared",
    "attention",
]
EVERY_BUDGET = ("vit", "bert", "llama-head", "resnet-spatial", "resnet-channel")
BUDGETS: list[dict[str, Any]] = [
    *({"ratio": "0.4", "allocation": allocation} for allocation in allocate.ALLOCATIONS),
    {"rank": 5}, {"energy": "0.7"}, {"target_params": True}, {"target_macs": True},
    {"target_params": True, "allocation": "uniform"},
]  # fmt: skip


class Thin(nn.Module):
    """A linear of one input, which no rank makes smaller, among others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(1, 48)
        self.middle = nn.Linear(48, 48)
        self.last = nn.Linear(48, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Source, Path, Report]]:
    """Decompose a network to all ranks once: its source, the artifact, the report."""
    folder, known = tmp_path_factory.mktemp("kept"), {}

    def make(name: str) -> tuple[Source, Path, Report]:
        if name not in known:
            library, architecture, arguments, options = NETWORKS[name]
            source = save_network(folder / f"{name}-base", library, architecture, arguments)
            report = decompose(source, output_dir=folder / name, keep_all_ranks=True, **options)
            known[name] = source, folder / name, report
        return known[name]

    return make


@pytest.fixture(scope="module")
def all_ranks(kept) -> Path:
    return kept("vit")[1]


def budget_for(artifact: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Turn a target for the whole model into what half of the eligible weights lead to."""
    half = truncate(read(artifact), ratio=0.5, dry_run=True).data["size"]["after"]
    sizes = {"target_params": half["parameters"], "target_macs": half["macs"]}
    return {key: sizes.get(key, value) for key, value in asked.items()}


def close(ours: Path, theirs: Path, tolerance: float = 1e-6) -> None:
    """Compare every stored tensor: the dense ones bit by bit, factors relative to their norm."""
    a, b = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert a.keys() == b.keys()
    modules = manifest.read(ours).modules
    for name, tensor in a.items():
        assert tensor.shape == b[name].shape and tensor.dtype == b[name].dtype
        if not any(name in (f"{module}.up.weight", f"{module}.down.weight") for module in modules):
            assert torch.equal(tensor, b[name]), name
            continue
        gap = torch.linalg.vector_norm(tensor.double() - b[name].double())
        assert gap <= tolerance * torch.linalg.vector_norm(b[name].double()), name


# -- the same answer as a direct decompose ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_slice_has_the_ranks_and_factors_of_a_direct_decompose(kept, tmp_path: Path, name: str) -> None:
    source, artifact, _ = kept(name)
    for number, asked in enumerate(BUDGETS if name in EVERY_BUDGET else BUDGETS[2:3]):
        budget = budget_for(artifact, asked)
        how: dict[str, Any] = {"dry_run": number > 0 and name != "vit"}  # factors depend on their ranks alone
        direct = decompose(source, output_dir=tmp_path / f"{number}-direct", **budget, **how, **NETWORKS[name][3])
        cut = truncate(read(artifact), output_dir=tmp_path / f"{number}-cut", **budget, **how)
        assert ranks(cut) == ranks(direct), budget
        assert any(ranks(cut).values()), budget
        if not how["dry_run"]:
            close(tmp_path / f"{number}-cut", tmp_path / f"{number}-direct")
            for ours, theirs in zip(cut.data["modules"], direct.data["modules"], strict=True):
                assert ours["error"] == pytest.approx(theirs["error"], rel=1e-3, abs=1e-6)
            assert cut.data["size"]["after"] == direct.data["size"]["after"]
        assert cut.data["size"]["after"]["parameters"] == direct.data["size"]["after"]["parameters"]
        assert cut.data["ratio"] == direct.data["ratio"] and cut.data["dense"] == direct.data["dense"]


@pytest.mark.parametrize("name", NAMES)
def test_an_artifact_with_all_ranks_is_its_base_bit_by_bit(kept, name: str) -> None:
    source, artifact, report = kept(name)
    before, after = models.load(source), models.load(read(artifact))
    theirs = after.module.state_dict()
    for key, tensor in before.module.state_dict().items():
        assert torch.equal(tensor, theirs[key]), key
    batch = probe(before)
    ours, base = outputs(after, batch), outputs(before, batch)
    torch.testing.assert_close(ours, base, rtol=1e-5, atol=1e-6)  # where weights lie may round, in torch 2.8
    record = manifest.read(artifact)
    assert record.modules == {} and record.ordered.keys() == ranks(report).keys()
    assert report.data["size"]["after"]["parameters"] == report.data["size"]["before"]["parameters"]
    stored = sum(path.stat().st_size for path in artifact.glob("*.safetensors"))
    assert report.data["size"]["after"]["bytes"] == stored


def test_a_plan_is_cut_too(kept, tmp_path: Path) -> None:
    source, artifact, _ = kept("vit")
    analyze(source, ratio=0.3, plan=tmp_path / "plan.json", allocation="convex")
    truncate(artifact, plan=tmp_path / "plan.json", output_dir=tmp_path / "cut")
    decompose(source, plan=tmp_path / "plan.json", output_dir=tmp_path / "direct")
    close(tmp_path / "cut", tmp_path / "direct")


def test_half_precision_is_cut_to_within_its_own_rounding(kept, tmp_path: Path) -> None:
    source = kept("vit")[0]
    folder = shutil.copytree(source.spec, tmp_path / "half")
    state = {key: tensor.bfloat16() for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors")
    decompose(folder, keep_all_ranks=True, output_dir=tmp_path / "all")
    direct = decompose(folder, ratio=0.5, output_dir=tmp_path / "direct")
    cut = truncate(tmp_path / "all", ratio=0.5, output_dir=tmp_path / "cut")
    assert ranks(cut) == ranks(direct)
    close(tmp_path / "cut", tmp_path / "direct", tolerance=1e-4)  # a float32 rounding may turn over a bfloat16 one
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("cut", "direct"))
    assert all(tensor.dtype == torch.bfloat16 for tensor in a.values())
    differ = sum(int((a[name] != b[name]).sum()) for name in a)
    assert differ <= 1e-3 * sum(tensor.numel() for tensor in a.values())


def test_a_slice_of_a_slice_is_the_slice(all_ranks: Path) -> None:
    loaded = models.load(all_ranks)
    record = ordered.refuse_unordered(loaded)
    known = ordered.stored(loaded, record, ordered.ordered_targets(loaded, record)[0])
    for one in known.values():
        large, small = one.kept(7)[0], one.kept(3)[0]
        assert torch.equal(large["up.weight"][:, :3], small["up.weight"])
        assert torch.equal(large["down.weight"][:3], small["down.weight"])
        assert small["up.weight"].untyped_storage().data_ptr() == one.tensors["up.weight"].untyped_storage().data_ptr()
        losses = one.losses
        assert losses.dtype == torch.float64 and bool((losses.diff() <= 0).all()) and losses[-1] == 0


def test_tied_weights_are_cut_once_and_stay_tied(kept, tmp_path: Path) -> None:
    report = truncate(kept("llama-head")[1], ratio=0.4, output_dir=tmp_path / "out")
    module = models.load(tmp_path / "out").module
    assert module.lm_head.up.weight is module.model.embed_tokens.up.weight  # type: ignore[union-attr]
    assert any("stay tied" in note for note in report.notes)
    assert (
        sum("lm_head" in name or "embed_tokens" in name for name in load_file(tmp_path / "out/model.safetensors")) == 2
    )


def test_a_module_that_no_rank_makes_smaller_stays_dense_and_counts(tmp_path: Path) -> None:
    torch.save(Thin().state_dict(), tmp_path / "weights.pth")
    source = Source("python:tests.steps.test_truncate:Thin", weights=tmp_path / "weights.pth", allow_code=True)
    decompose(source, keep_all_ranks=True, output_dir=tmp_path / "all")
    assert manifest.read(tmp_path / "all").ordered["first"] == {"form": "linear", "rank": 0}
    for number, asked in enumerate(({"ratio": 0.5}, {"energy": 0.5}, {"ratio": 0.5, "allocation": "uniform"})):
        direct = decompose(source, output_dir=tmp_path / f"direct-{number}", **asked)  # type: ignore[arg-type]
        cut = truncate(read(tmp_path / "all"), output_dir=tmp_path / f"cut-{number}", **asked)  # type: ignore[arg-type]
        assert ranks(cut) == ranks(direct) and ranks(cut)["first"] is None
        close(tmp_path / f"cut-{number}", tmp_path / f"direct-{number}")


def test_shards_hold_the_same_factors(kept, all_ranks: Path, tmp_path: Path) -> None:
    decompose(kept("vit")[0], keep_all_ranks=True, max_shard_size=20_000, output_dir=tmp_path / "all")
    assert len(list((tmp_path / "all").glob("factors-*.safetensors"))) > 2
    truncate(tmp_path / "all", ratio=0.5, output_dir=tmp_path / "cut")
    truncate(all_ranks, ratio=0.5, output_dir=tmp_path / "whole")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_what_was_factored_before_stays_when_the_rest_is_kept_and_cut(kept, tmp_path: Path) -> None:
    decompose(kept("vit")[0], rank=4, skip=["mlp"], output_dir=tmp_path / "one")
    decompose(tmp_path / "one", keep_all_ranks=True, output_dir=tmp_path / "all")
    truncate(tmp_path / "all", rank=6, output_dir=tmp_path / "two")
    record = manifest.read(tmp_path / "two")
    assert {edit["rank"] for edit in record.modules.values()} == {4, 6} and record.ordered == {}
    assert [step["request"]["command"] for step in record.steps] == ["decompose", "decompose", "truncate"]


# -- calibrated factors -----------------------------------------------------------------------------------------------


CALIBRATED: dict[str, dict[str, Any]] = {
    "vit": {"data": "sklearn:digits", "calibration_samples": 48},
    "vit-bfloat16": {"data": "sklearn:digits", "calibration_samples": 48},
    "conv-spatial": {"include": ["odd", "strided"]},
    "conv-channel": {"include": ["odd", "strided"], "conv_method": "channel"},
}


def calibrated(name: str, vit: Path, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return a network with biases and what to calibrate it with."""
    options = CALIBRATED[name]
    if name == "vit":
        return vit, options
    if name == "vit-bfloat16":
        half = shutil.copytree(vit, folder / "half")
        state = {key: tensor.bfloat16() for key, tensor in load_file(half / "model.safetensors").items()}
        save_file(state, half / "model.safetensors")
        return half, options
    torch.manual_seed(0)
    torch.save(Convolutions().state_dict(), folder / "weights.pth")
    save_file({"x_train": torch.randn(32, 3, 64, 64) + 1}, folder / "images.safetensors")
    source = Source("python:tests.networks:Convolutions", weights=folder / "weights.pth", allow_code=True)
    return source, {**options, "data": str(folder / "images.safetensors")}


@pytest.mark.parametrize("method", ["kfac", "whitened"])
@pytest.mark.parametrize("name", CALIBRATED)
def test_a_slice_of_calibrated_factors_has_the_corrected_bias(
    tiny_vit: Path, tmp_path: Path, name: str, method: str
) -> None:
    source, options = calibrated(name, tiny_vit, tmp_path)
    decompose(source, output_dir=tmp_path / "all", keep_all_ranks=True, method=method, **options)
    dense = models.load(source).module.state_dict()
    for number, budget in enumerate(({"ratio": 0.5}, {"rank": 3}, {"energy": 0.9})):
        direct = decompose(
            source, output_dir=tmp_path / f"direct-{number}", method=method, sensitivity=0, **budget, **options
        )  # type: ignore[arg-type]
        cut = truncate(read(tmp_path / "all"), output_dir=tmp_path / f"cut-{number}", **budget)  # type: ignore[arg-type]
        assert ranks(cut) == ranks(direct) and any(ranks(cut).values())
        ours, theirs = (load_file(tmp_path / f"{kind}-{number}" / "model.safetensors") for kind in ("cut", "direct"))
        assert ours.keys() == theirs.keys()
        tolerance = 5e-2 if name == "vit-bfloat16" else 1e-5  # a slice makes up for the rounding of its factors too
        for key, tensor in ours.items():
            gap = float((tensor.double() - theirs[key].double()).norm() / theirs[key].double().norm().clamp_min(1e-30))
            assert gap <= tolerance, (key, gap)
        corrected = [key for key in ours if key.endswith(".up.bias")]
        assert len(corrected) == sum(map(bool, ranks(cut).values()))
        assert all(not torch.equal(ours[key], dense[key.replace(".up.bias", ".bias")]) for key in corrected)
        for a, b in zip(cut.data["modules"], direct.data["modules"], strict=True):
            assert (a["loss"] or 0) == pytest.approx(b["loss"] or 0, rel=1e-3, abs=1e-6)


def test_without_bias_correction_a_slice_keeps_the_bias(tiny_vit: Path, tmp_path: Path) -> None:
    options = {**CALIBRATED["vit"], "bias_correction": False}
    report = decompose(tiny_vit, output_dir=tmp_path / "all", keep_all_ranks=True, **options)
    assert any("calibration:" in note for note in report.notes)
    truncate(tmp_path / "all", ratio=0.5, output_dir=tmp_path / "cut")
    decompose(tiny_vit, ratio=0.5, sensitivity=0, output_dir=tmp_path / "direct", **options)
    ours, dense = load_file(tmp_path / "cut" / "model.safetensors"), load_file(tiny_vit / "model.safetensors")
    biases = [key for key in ours if key.endswith(".up.bias")]
    assert biases and all(torch.equal(ours[key], dense[key.replace(".up.bias", ".bias")]) for key in biases)
    close(tmp_path / "cut", tmp_path / "direct", tolerance=1e-5)


def test_half_of_a_correction_is_refused(tiny_vit: Path, tmp_path: Path) -> None:
    decompose(tiny_vit, output_dir=tmp_path / "all", keep_all_ranks=True, **CALIBRATED["vit"])
    path = tmp_path / "all" / "factors.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    factors = load_file(path)
    del factors["blocks.0.attn.qkv.down_mean"]
    save_file(factors, path, metadata=metadata)
    content = path.read_bytes()
    promise = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    rewritten(tmp_path / "all" / "peftc.json", lambda record: record["files"].update({path.name: promise}))
    with pytest.raises(ArtifactError, match=r"`blocks\.0\.attn\.qkv\.down_mean` among the factors .* is absent"):
        truncate(tmp_path / "all", ratio=0.5, output_dir=tmp_path / "cut")


# -- no solving, no data ----------------------------------------------------------------------------------------------


def test_nothing_is_solved(all_ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was solved")

    for name in ("svd", "svdvals", "eigh", "eigvalsh", "qr"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    truncate(all_ranks, ratio=0.5, output_dir=tmp_path / "out")


def test_the_same_request_gives_the_same_bytes_and_is_done_the_second_time(all_ranks: Path, tmp_path: Path) -> None:
    first = truncate(all_ranks, ratio=0.5, output_dir=tmp_path / "one")
    truncate(all_ranks, ratio="1/2", output_dir=tmp_path / "two")
    assert promised(tmp_path / "one") == promised(tmp_path / "two")
    again = truncate(all_ranks, ratio=0.5, output_dir=tmp_path / "one")
    assert any("already done" in note for note in again.notes) and again.data == first.data
    with pytest.raises(ArtifactError, match="another request"):
        truncate(all_ranks, ratio=0.6, output_dir=tmp_path / "one")
    truncate(all_ranks, ratio=0.6, output_dir=tmp_path / "one", overwrite=True)
    assert manifest.read(tmp_path / "one").steps[-1]["request"]["budget"] == {"ratio": "3/5"}


def test_keeping_all_ranks_gives_the_same_bytes_too(kept, all_ranks: Path, tmp_path: Path) -> None:
    decompose(kept("vit")[0], keep_all_ranks=True, output_dir=tmp_path / "again")
    assert promised(tmp_path / "again") == promised(all_ranks)


def test_a_dry_run_writes_nothing_and_says_the_same(kept, all_ranks: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    dry, wet = truncate(all_ranks, ratio=0.5, dry_run=True), truncate(all_ranks, ratio=0.5, output_dir="out")
    assert dry.data["modules"] == wet.data["modules"] and dry.artifact is None
    plan = decompose(kept("vit")[0], keep_all_ranks=True, dry_run=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    expected = kept("vit")[2].data
    assert [row["stored_rank"] for row in plan.data["modules"]] == [row["stored_rank"] for row in expected["modules"]]
    assert plan.data["size"]["after"]["bytes"] == pytest.approx(expected["size"]["after"]["bytes"], rel=0.2)


def test_gates_of_a_cut(all_ranks: Path, tmp_path: Path) -> None:
    report = truncate(all_ranks, ratio=0.5, output_dir=tmp_path / "out", max_params=1, max_bytes=10**9)
    assert [(gate.option, gate.passed) for gate in report.gates] == [("--max-params", False), ("--max-bytes", True)]
    assert (tmp_path / "out" / "peftc.json").is_file()


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra", [{"ratio": 0.5}, {"rank": 3}, {"energy": 0.9}, {"target_macs": 10}, {"plan": "p.json"}]
)
def test_a_budget_beside_all_ranks_is_refused(tiny_vit: Path, tmp_path: Path, extra: dict[str, Any]) -> None:
    option = f"--{next(iter(extra)).replace('_', '-')}"
    with pytest.raises(UsageError, match="takes no budget") as refusal:
        decompose(tiny_vit, keep_all_ranks=True, output_dir=tmp_path / "out", **extra)
    assert f"`{option}` is given" in str(refusal.value) and "peftc truncate" in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_an_artifact_with_all_ranks_is_not_decomposed_again(all_ranks: Path, tmp_path: Path) -> None:
    for options in ({"ratio": 0.5}, {"keep_all_ranks": True}):
        with pytest.raises(ArtifactError, match="already holds the factors") as refusal:
            decompose(all_ranks, output_dir=tmp_path / "out", **options)  # type: ignore[arg-type]
        assert f"peftc truncate {all_ranks}" in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_only_an_artifact_with_all_ranks_can_be_cut(tiny_vit: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is a model, not an artifact") as refusal:
        truncate(tiny_vit, ratio=0.5, output_dir=tmp_path / "out")
    assert "--keep-all-ranks" in str(refusal.value)
    decompose(tiny_vit, ratio=0.5, output_dir=tmp_path / "small")
    with pytest.raises(ArtifactError, match="holds no factors of every rank"):
        truncate(tmp_path / "small", ratio=0.3, output_dir=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_cut_takes_exactly_one_budget(all_ranks: Path) -> None:
    with pytest.raises(UsageError, match="exactly one budget"):
        truncate(all_ranks)
    with pytest.raises(UsageError, match="contradict"):
        truncate(all_ranks, ratio=0.5, rank=3)
    with pytest.raises(PlanError, match="the smallest rank in each"):
        truncate(all_ranks, ratio=0.0001)


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    rewritten(folder / "peftc.json", change)


def refactor(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the factors of an artifact, and the manifest's promise of them."""
    file = folder / "factors.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"peftc": manifest.read(folder).id})
    entry = {"bytes": file.stat().st_size, "sha256": manifest.file_digest(file)}
    changed(folder, lambda value: value["files"].update({file.name: entry}))


NAME = "blocks.0.attn.qkv"
DAMAGES: list[tuple[str, Callable[[Path], Any]]] = [
    ("lacks the file `factors.safetensors`", lambda folder: (folder / "factors.safetensors").unlink()),
    ("was changed after it was written", lambda folder: flip(folder / "factors.safetensors")),
    (f"`{NAME}.losses` .* is absent", lambda folder: refactor(folder, lambda state: state.pop(f"{NAME}.losses"))),
    ("`more` .* is of shape", lambda folder: refactor(folder, lambda state: state.update(more=torch.ones(1)))),
    (f"`{NAME}.up.weight` .* is of shape", lambda folder: refactor(folder, shorten)),
    ("holds factors of `nothing`", lambda folder: changed(folder, rename)),
    ("up to rank 5", lambda folder: changed(folder, lambda value: value["ordered"][NAME].update(rank=5))),
    ("as `channel`", lambda folder: changed(folder, lambda value: value["ordered"][NAME].update(form="channel"))),
    ("holds no factors", lambda folder: changed(folder, lambda value: value["files"].pop("factors.safetensors"))),
]  # fmt: skip


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def shorten(state: dict[str, torch.Tensor]) -> None:
    state[f"{NAME}.up.weight"] = state[f"{NAME}.up.weight"][:, :3].contiguous()


def rename(value: dict[str, Any]) -> None:
    value["ordered"]["nothing"] = value["ordered"].pop(NAME)


@pytest.mark.parametrize(("message", "damage"), DAMAGES, ids=[message for message, _ in DAMAGES])
def test_a_damaged_artifact_is_refused(all_ranks: Path, tmp_path: Path, message: str, damage: Any) -> None:
    folder = shutil.copytree(all_ranks, tmp_path / "all")
    damage(folder)
    with pytest.raises(PeftcError, match=message):
        truncate(folder, ratio=0.5, output_dir=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["all"]


def test_written_factors_that_do_not_read_back_are_refused(tiny_vit: Path, tmp_path: Path, monkeypatch) -> None:
    original = write.verify

    def turned(folder: Path, model: Any) -> list[str]:
        flip(folder / "factors.safetensors")
        return original(folder, model)

    monkeypatch.setattr(write, "verify", turned)
    with pytest.raises(ArtifactError, match="is not what was written"):
        decompose(tiny_vit, keep_all_ranks=True, output_dir=tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["/proc/out", "/dev/null/out"])
def test_a_place_that_cannot_be_written_is_one_clear_error(all_ranks: Path, folder: str) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        truncate(all_ranks, ratio=0.5, output_dir=folder)


def test_a_full_disk_is_refused_before_the_work(all_ranks: Path, tiny_vit: Path, tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    for run in (lambda out: truncate(all_ranks, ratio=0.5, output_dir=out),
                lambda out: decompose(tiny_vit, keep_all_ranks=True, output_dir=out)):  # fmt: skip
        with pytest.raises(OutputError, match="1,000 bytes free"):
            run(tmp_path / "out")
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from peftc.models import write
from peftc.steps.truncate import truncate
def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)
write.verify = killed
truncate(sys.argv[1], ratio=0.5, output_dir=sys.argv[2])
"""


def test_a_cut_that_is_killed_leaves_no_folder_and_ends_in_the_same_bytes(all_ranks: Path, tmp_path: Path) -> None:
    assert forked(all_ranks, tmp_path / "out", code=KILLED).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    truncate(all_ranks, ratio=0.5, output_dir=tmp_path / "out")
    truncate(all_ranks, ratio=0.5, output_dir=tmp_path / "other")
    assert promised(tmp_path / "out") == promised(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_keeping_all_ranks_resumes_in_the_same_bytes(kept, all_ranks: Path, tmp_path: Path, monkeypatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(write, "write_artifact", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decompose(kept("vit")[0], keep_all_ranks=True, output_dir=tmp_path / "out")
    assert (tmp_path / "out.partial" / "work").is_dir()
    decompose(kept("vit")[0], keep_all_ranks=True, output_dir=tmp_path / "out")
    assert promised(tmp_path / "out") == promised(all_ranks)


# -- the other commands -----------------------------------------------------------------------------------------------


def test_the_other_commands_see_the_base_and_say_what_lies_beside_it(kept, all_ranks: Path) -> None:
    told = bench(all_ranks, rounds=5, batch_size=1)
    assert told.data["model"]["bytes_on_disk"] == (all_ranks / "model.safetensors").stat().st_size
    assert any("for `peftc truncate`" in note for note in told.notes)
    assert analyze(all_ranks, ratio=0.5).data["plan"] == analyze(kept("vit")[0], ratio=0.5).data["plan"]
    shown = show(all_ranks)
    assert [table.title for table in shown.tables] == [str(all_ranks), "ordered factors, up to rank"]
    assert any(fact[0] == "factors" for fact in shown.tables[0].rows)


def test_quality_is_that_of_the_base(tiny_vit: Path, tmp_path: Path) -> None:
    decompose(tiny_vit, keep_all_ranks=True, output_dir=tmp_path / "all")
    report = evaluate(tmp_path / "all", data="sklearn:digits", against="base", num_samples=64)
    assert report.data["against"]["agreement"]["value"] == 1.0


def test_the_printed_commands_rebuild_the_cut(peftc, tiny_vit: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    decompose(tiny_vit, keep_all_ranks=True, skip=["mlp"], output_dir="all")
    truncate("all", ratio=0.5, allocation="global", output_dir="cut", max_shard_size="1MB")
    lines = peftc("show", "cut", "--commands").stdout.splitlines()
    assert len(lines) == 2 and "--keep-all-ranks" in lines[0] and lines[1].startswith("peftc truncate 01-decompose")
    for line in lines:
        done = peftc(*shlex.split(line)[1:])
        assert done.exit_code == 0, done.stderr
    assert promised(tmp_path / "02-truncate") == promised(tmp_path / "cut")


def test_a_project_keeps_all_ranks_once_and_cuts_them_again_and_again(peftc, tiny_vit, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("peftc.toml").write_text(
        f'model = "{tiny_vit}"\nratio = 0.5\n[decompose]\nkeep-all-ranks = true\n[truncate]\nallocation = "uniform"\n'
    )
    assert peftc("decompose").stdout == "runs/01-decompose\n"
    assert peftc("truncate").stdout == "runs/02-truncate\n"
    assert manifest.read(Path("runs/02-truncate")).steps[-1]["request"]["budget"] == {"ratio": "1/2"}
    again = peftc("truncate", "--rank", 4)
    assert again.stdout.startswith("runs/02-truncate-"), again.stderr
    assert len(manifest.read(Path(again.stdout.strip())).steps) == 2  # cut from all ranks, not from the cut before
    direct = peftc("decompose", "--ratio", 0.5)  # a budget that is typed wins over the file's wish to keep all
    assert direct.exit_code == 0 and manifest.read(Path(direct.stdout.strip())).modules


def test_a_pipe_keeps_all_ranks_and_cuts_them(peftc, tiny_vit: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = peftc("decompose", tiny_vit, "--keep-all-ranks", "-o", "all")
    cut = peftc("truncate", "-", "--energy", 0.8, "-o", "small", input=first.stdout)
    assert (cut.exit_code, cut.stdout) == (0, "small\n"), cut.stderr
    wrong = peftc("truncate", tmp_path / "small", "--ratio", 0.5)
    assert (wrong.exit_code, wrong.stdout) == (1, "") and "--keep-all-ranks" in wrong.stderr
    both = peftc("decompose", tiny_vit, "--keep-all-ranks", "--ratio", 0.5)
    assert both.exit_code == 2 and "`--ratio` is given" in both.stderr


def test_a_manifest_with_ordered_factors_fits_the_schema(all_ranks: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((Path(manifest.__file__).parents[1] / "manifest.schema.json").read_text(encoding="utf-8"))
    value = json.loads((all_ranks / "peftc.json").read_text(encoding="utf-8"))
    assert value["ordered"]
    jsonschema.validate(value, schema, cls=jsonschema.Draft202012Validator)
