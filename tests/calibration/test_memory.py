"""Calibration within a given memory, and one decompose by several processes: the same numbers, and no silence."""

import gc
import json
import os
import socket
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peftc import processes
from peftc.calibration import collection, lanes, memory, statistics
from peftc.calibration.collection import Statistics
from peftc.calibration.prepared import Request, prepare
from peftc.errors import PeftcError, PlanError, UsageError
from peftc.factors import estimate, sensitivity, sequential, trial
from peftc.factors.factoring import Factoring
from peftc.factors.spectra import Factorizer, factorizer
from peftc.methods import spectrum
from peftc.methods.weighted import Moment
from peftc.models import inputs, load, write
from peftc.models.inputs import probe
from peftc.models.model import Model
from peftc.models.place import dtype_of, one_dtype, runnable
from peftc.models.targets import find_targets
from peftc.models.weights import save_part
from peftc.plans.plan import Target
from peftc.steps.calibrate import calibrate
from peftc.steps.decompose import decompose
from peftc.steps.show import show
from tests.conftest import promised
from tests.forked import Forked

TEXT = "the cat sat on the mat . a small dog ran under the big tree ! then the red bird sang , and it was very blue . "
NEEDS = ("second_moment", "output_gradient_gram")
KFAC = {"method": "kfac", "ratio": 0.5, "max_length": 16, "calibration_samples": 12}


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 12)
    return str(path)


class Nowhere:
    """A path that cannot be read, as `/proc` where there is none: then a process counts as ``memory.PROCESS``."""

    def __init__(self, _path: str) -> None: ...

    def read_text(self, **_: Any) -> str:
        raise FileNotFoundError


def hold(monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    """Make this process hold so many bytes."""
    monkeypatch.setattr(memory, "Path", Nowhere)
    monkeypatch.setattr(memory, "PROCESS", taken)


@pytest.fixture
def empty_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count what a calibration takes, not what Python does, a byte as a thousand: tiny models become large."""
    hold(monkeypatch, 0)
    monkeypatch.setattr(memory, "SPARE", memory.SPARE / 1000)


@pytest.fixture
def half_llama(tiny_llama: Path, tmp_path: Path) -> Path:
    from transformers import LlamaForCausalLM

    folder = tmp_path / "half"
    LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).save_pretrained(folder)
    for path in tiny_llama.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def collected(
    model: Path, text: str, folder: Path, needs: Any = NEEDS, max_memory: int | None = None, **asked: Any
) -> Statistics:
    loaded = memory.bounded(load.load(model), max_memory)
    targets, _ = find_targets(loaded, conv_method="spatial", include=(), skip=())
    request = Request(text, samples=12, max_length=16, **asked)
    folder.mkdir(exist_ok=True)
    return collection.collect(prepare(loaded, request, "cpu"), targets, needs, folder)


def tensors(known: Statistics) -> dict[str, dict[str, Any]]:
    found = {}
    for name in known.note["modules"]:
        one = known.of(name, torch.device("cpu"))
        found[name] = {**one.others, "mean": one.mean, "covariance": one.covariance, "output": one.output_mean}
    return found


def assert_same(one: Statistics, other: Statistics) -> None:
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    assert ours
    for name, values in ours.items():
        assert values.keys() == theirs[name].keys()
        for key, value in values.items():
            assert (value is None) == (theirs[name][key] is None), (name, key)
            assert value is None or torch.equal(value, theirs[name][key]), (name, key)


def groups_of(folder: Path) -> list[list[str]]:
    return list(json.loads((folder / memory.FILE).read_text())["groups"])


# memory


def least_memory(model: Path, text: str, folder: Path, **asked: Any) -> int:
    """Return what the refusal of a single byte asks for."""
    with pytest.raises(PlanError, match="is too little to calibrate `") as refusal:
        collected(model, text, folder, max_memory=1, **asked)
    assert "one sample takes" in str(refusal.value)
    words = str(refusal.value.hint).split("`")[1].split()
    assert words[0] == "--max-memory"
    limit = memory.bounded(load.load(model), words[1]).max_memory
    assert limit is not None
    return limit


@pytest.mark.usefixtures("empty_process")
def test_passes_collect_what_one_pass_collects(tiny_llama: Path, text: str, tmp_path: Path) -> None:
    least = least_memory(tiny_llama, text, tmp_path / "none", batch_size=1)
    several = collected(tiny_llama, text, tmp_path / "several", batch_size=1, max_memory=least)
    assert len(groups_of(tmp_path / "several")) > 1
    assert {path.name for path in (tmp_path / "several").glob("lane-*")} == set()
    once = collected(tiny_llama, text, tmp_path / "once", batch_size=1)
    assert [path.name for path in (tmp_path / "once").iterdir()] == [collection.FILE]
    assert_same(several, once)
    assert several.note["rows"] == once.note["rows"]


@pytest.mark.usefixtures("empty_process")
def test_an_interrupted_calibration_goes_on_with_the_passes_it_chose(
    tiny_llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    least = least_memory(tiny_llama, text, tmp_path / "none", batch_size=1)
    whole = collected(tiny_llama, text, tmp_path / "whole", batch_size=1, max_memory=least)
    save, kept = lanes.save, []

    def stop(path: Path, sums: Any) -> None:
        if len(kept) == 6:
            raise KeyboardInterrupt
        kept.append(path)
        save(path, sums)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lanes, "save", stop)
        collected(tiny_llama, text, tmp_path / "killed", batch_size=1, max_memory=least)
    hold(monkeypatch, 1 << 40)  # it would be refused if it were chosen again
    resumed = collected(tiny_llama, text, tmp_path / "killed", batch_size=1, max_memory=least)
    assert_same(resumed, whole)


@pytest.mark.usefixtures("empty_process")
def test_every_pass_sees_the_samples_of_the_first(tiny_llama: Path, text: str, tmp_path: Path) -> None:
    least = least_memory(tiny_llama, text, tmp_path / "none", batch_size=1)
    several = collected(tiny_llama, text, tmp_path / "several", batch_size=1, max_memory=least, tokens=64)
    assert several.note["samples"] == 4  # of 16 tokens, one in each lane
    assert {about["rows"] for about in several.note["modules"].values()} == {64}


@pytest.mark.usefixtures("empty_process")
def test_less_memory_means_smaller_batches_and_says_so(tiny_llama: Path, text: str, tmp_path: Path) -> None:
    least = least_memory(tiny_llama, text, tmp_path / "none")
    tight = collected(tiny_llama, text, tmp_path / "tight", max_memory=least)
    roomy = collected(tiny_llama, text, tmp_path / "roomy", max_memory=1 << 40)
    assert tight.note["request"]["batch_size"] < roomy.note["request"]["batch_size"] == 8
    assert len(groups_of(tmp_path / "roomy")) == 1
    assert tight.note["rows"] == roomy.note["rows"]


def test_enough_memory_changes_nothing_but_the_request(tiny_llama: Path, text: str, tmp_path: Path) -> None:
    for name, limit in (("free", None), ("bound", "4GB")):
        decompose(tiny_llama, output_dir=tmp_path / name, data=text, max_memory=limit, **KFAC)
    free, bound = (json.loads((tmp_path / name / "peftc.json").read_text()) for name in ("free", "bound"))
    assert bound["files"]["model.safetensors"]["sha256"] != ""
    request = bound["steps"][0]["request"]["statistics"]["request"]
    assert request.pop("max_memory") == 4_000_000_000
    assert request == free["steps"][0]["request"]["statistics"]["request"]
    ours, theirs = (load.load(tmp_path / name).module.state_dict() for name in ("free", "bound"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    (line,) = show(tmp_path / "bound", commands=True).lines
    assert "--max-memory 4000000000" in line
    assert "--max-memory" not in show(tmp_path / "free", commands=True).lines[0]


@pytest.mark.parametrize("value", ["lots", "0"])
def test_a_memory_that_is_no_size_is_refused(tiny_llama: Path, text: str, tmp_path: Path, value: str) -> None:
    with pytest.raises(UsageError, match=f"`--max-memory {value}` is"):
        decompose(tiny_llama, output_dir=tmp_path / "out", data=text, max_memory=value, **KFAC)


def test_too_little_memory_is_refused_with_what_is_needed(peftc, tiny_llama: Path, text: str, tmp_path: Path) -> None:
    words = ("decompose", tiny_llama, "--ratio", 0.5, "--data", text, "--max-length", 16, "-o", tmp_path / "out")
    result = peftc(*words, "--max-memory", "100MB")
    assert result.exit_code == 1
    assert "`--max-memory` 100 MB is too little" in result.stderr
    assert not (tmp_path / "out").exists()
    hint = next(line for line in result.stderr.splitlines() if "hint:" in line)
    assert peftc(*words, "--max-memory", hint.split("`")[1].split()[1]).exit_code == 0


def test_half_precision_runs_a_module_at_a_time(half_llama: Path, text: str) -> None:
    streamed = runnable(replace(load.load(half_llama), max_memory=1 << 30), device="cpu")
    whole = runnable(load.load(half_llama), device="cpu")
    batch = probe(whole)
    assert torch.equal(inputs.outputs(streamed, batch), inputs.outputs(whole, batch))
    assert {each.dtype for each in streamed.module.parameters()} == {torch.bfloat16}
    assert not streamed.module.__dict__["stream"].origin


def test_half_precision_calibrates_as_its_float32_copy_does(half_llama: Path, text: str, tmp_path: Path) -> None:
    assert_same(
        collected(half_llama, text, tmp_path / "streamed", max_memory=2 << 30),
        collected(half_llama, text, tmp_path / "whole"),
    )


def test_a_backward_pass_keeps_no_copy_of_a_weight(half_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftc.models import streaming

    model: Model = runnable(replace(load.load(half_llama), max_memory=1 << 30), device="cpu")
    ids = torch.arange(1, 9)[None]
    unpacked = []
    unpack = streaming.Stream.unpack
    monkeypatch.setattr(
        streaming.Stream, "unpack", lambda self, kept: unpacked.append(isinstance(kept, tuple)) or unpack(self, kept)
    )
    embedded = model.module.get_input_embeddings()(ids).requires_grad_(True)
    with streaming.recomputing(model.module):
        model.module(inputs_embeds=embedded).logits.square().sum().backward()
    whole = runnable(load.load(half_llama), device="cpu").module
    other = embedded.detach().requires_grad_(True)
    whole(inputs_embeds=other).logits.square().sum().backward()
    assert sum(unpacked) >= 14  # seven matrices in each of two layers
    assert torch.equal(embedded.grad, other.grad)


@pytest.mark.parametrize("needs", [NEEDS, ("second_moment", "weight_fisher")])
def test_a_streamed_calibration_leaves_nothing_in_memory(
    half_llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs: Any
) -> None:
    made: list[weakref.ref[statistics.Collector]] = []

    def collector(*given: Any, keep: bool = True) -> statistics.Collector:
        found = statistics.Collector(*given, keep=keep)
        made.extend([weakref.ref(found)] if keep else [])
        return found

    monkeypatch.setattr(collection, "Collector", collector)
    collected(half_llama, text, tmp_path / "streamed", needs, max_memory=2 << 30)
    gc.collect()
    assert len(made) == lanes.LANES
    assert [each() for each in made] == [None] * lanes.LANES


def test_a_model_of_two_dtypes_runs_a_module_at_a_time(half_llama: Path) -> None:
    model = replace(load.load(half_llama), max_memory=1 << 30)
    norm: Any = model.module.get_submodule("model.norm")
    norm.weight = torch.nn.Parameter(norm.weight.detach().float())
    bounded, whole = one_dtype(model), one_dtype(replace(model, max_memory=None))
    assert {each.dtype for each in bounded.module.parameters()} == {torch.bfloat16, torch.float32}
    assert {each.dtype for each in whole.module.parameters()} == {torch.float32}
    batch = probe(model)
    assert torch.equal(inputs.outputs(bounded, batch), inputs.outputs(whole, batch))


def test_half_precision_is_checked_a_module_at_a_time_where_memory_is_limited(
    half_llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[torch.dtype] = []
    outputs = inputs.outputs
    monkeypatch.setattr(
        write, "outputs", lambda model, batch: ran.append(dtype_of(model.module)) or outputs(model, batch)
    )
    report = decompose(half_llama, output_dir=tmp_path / "out", data=text, max_memory="4GB", sensitivity=0, **KFAC)
    assert set(ran) == {torch.float32}  # torch keeps what it prepares for products in half precision, of every shape
    stored = {each.dtype for each in load.load(report.artifact).module.parameters()}
    assert stored == {torch.bfloat16}
    assert dtype_of(one_dtype(load.load(half_llama)).module) == torch.bfloat16


def test_what_solving_leaves_in_the_heap_goes_back_after_every_module(
    tiny_llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back: list[bool] = []
    monkeypatch.setattr(memory, "return_freed", lambda model: model.max_memory and given_back.append(True))
    decompose(tiny_llama, output_dir=tmp_path / "free", data=text, sensitivity=0, **KFAC)
    assert not given_back
    report = decompose(tiny_llama, output_dir=tmp_path / "bound", data=text, max_memory="4GB", sensitivity=0, **KFAC)
    factored = sum(row["rank"] is not None for row in report.data["modules"])
    assert len(given_back) >= len(report.data["modules"]) + factored > 2  # solved, and then cut


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Moment]]:
    """Second moments that methods were given."""
    made: list[weakref.ref[Moment]] = []

    def moment(*given: Any) -> Moment:
        found = Moment(*given)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(statistics, "Moment", moment)
    return made


def test_statistics_are_read_once_and_let_go(
    tiny_llama: Path, text: str, tmp_path: Path, moments: list[weakref.ref[Moment]], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []
    run, cut_at = trial.outputs, spectrum.cut_at

    def running(*given: Any) -> Any:
        alive.append(sum(each() is not None for each in moments))
        return run(*given)

    def cutting(*given: Any) -> Any:
        alive.append(sum(each() is not None for each in moments))
        return cut_at(*given)

    bases: list[weakref.ref[Any]] = []
    solve, read = Factorizer.__call__, Factoring.spectrum

    def solving(*given: Any) -> Any:
        alive.append(sum(each() is not None for each in bases))
        return solve(*given)

    def reading(*given: Any) -> Any:
        found = read(*given)
        bases.append(weakref.ref(found))
        return found

    monkeypatch.setattr(trial, "outputs", running)
    monkeypatch.setattr(spectrum, "cut_at", cutting)
    monkeypatch.setattr(Factorizer, "__call__", solving)
    monkeypatch.setattr(Factoring, "spectrum", reading)
    report = decompose(tiny_llama, output_dir=tmp_path / "out", data=text, sensitivity=2, **KFAC)
    assert len(alive) > 2 * len(report.data["modules"])
    assert set(alive) == {0}
    assert len(moments) == len(report.data["modules"])


def test_a_kept_basis_that_fails_its_certificate_is_solved_again_from_the_statistics(
    tiny_llama: Path, text: str, tmp_path: Path, moments: list[weakref.ref[Moment]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_at, failed = spectrum.cut_at, []

    def doubtful(weight: Any, solution: Any, *given: Any) -> Any:
        found = cut_at(weight, solution, *given)
        if solution.rung != "eigh64" or failed:
            return found
        failed.append(solution.rung)
        return replace(found, excess=1.0)

    monkeypatch.setattr(spectrum, "cut_at", doubtful)
    report = decompose(tiny_llama, output_dir=tmp_path / "out", data=text, sensitivity=0, **KFAC)
    again = [row for row in report.data["modules"] if row["climbed"]]
    assert failed == ["eigh64"]
    assert [row["rung"] for row in again] == ["svd64"]
    assert "of the optimum" in again[0]["climbed"][0]
    assert len(moments) == len(report.data["modules"]) + 1


def test_a_module_that_cannot_be_solved_within_the_memory_is_refused_at_once(
    peftc, tiny_llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "COPIES", 60_000)  # the tiny modules become large
    hold(monkeypatch, memory.PROCESS)
    words = ("decompose", tiny_llama, "--ratio", 0.5, "--data", text, "--max-length", 16, "-o", tmp_path / "out")
    refused = peftc(*words, "--max-memory", "1GB")
    assert refused.exit_code == 1
    assert "`--max-memory` 1 GB is too little to factor `model.layers.0.mlp." in refused.stderr
    assert not (tmp_path / "out").exists()
    hint = next(line for line in refused.stderr.splitlines() if "hint:" in line)
    asked = hint.split("`")[1].split()[1]
    assert peftc(*words, "--max-memory", asked).exit_code == 0
    less = f"{int(asked.removesuffix('MB')) - 20}MB"
    assert "too little to factor" in peftc(*words, "--max-memory", less, "--overwrite").stderr


def test_larger_modules_take_more_to_solve() -> None:
    needs = ("second_moment", "output_gradient_gram")
    square, wide, tall = (Target("one", "linear", shape) for shape in ((64, 64), (64, 128), (128, 64)))
    group = Target("one", "linear", (16384, 64), members=("one", "two"), outs=(8192, 8192))
    large = Target("one", "linear", (16384, 64))
    sizes = [estimate.solving(target, needs) for target in (square, wide, tall, large, group)]
    assert sizes == sorted(sizes)
    assert estimate.solving(group, needs) > 8 * 16384**2 > estimate.solving(large, needs)
    assert estimate.solving(tall, ("second_moment",)) < estimate.solving(tall, needs)


@pytest.mark.usefixtures("empty_process")
def test_sensitivity_runs_as_many_samples_at_once_as_the_calibration(
    tiny_llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    least = least_memory(tiny_llama, text, tmp_path / "none")
    model = load.load(tiny_llama)
    prepared = prepare(memory.bounded(model, least), Request(text, samples=12, max_length=16), "cpu")
    work = Factoring(model, find_targets(model, conv_method="spatial")[0], factorizer("kfac", "spatial", None,
                     with_data=True), torch.device("cpu"))  # fmt: skip
    (tmp_path / "tight").mkdir()
    work.use(collection.collect(prepared, work.targets, NEEDS, tmp_path / "tight"))
    run, sizes = trial.outputs, set()

    def running(prepared: Any, batch: Any, *head: Any) -> Any:
        sizes.add(len(batch.inputs["input_ids"]))
        return run(prepared, batch, *head)

    monkeypatch.setattr(trial, "outputs", running)
    sensitivity.alone(trial.Trial(work, prepared, 4, tmp_path / "tight"))
    known = work.factorize.statistics
    assert known is not None
    assert sizes == {known.batch_size} and known.batch_size < 8
    assert len(list((tmp_path / "tight").glob("outputs-*.safetensors"))) == 4 // known.batch_size


def test_a_large_model_on_the_cpu_runs_fewer_samples_at_once(
    tiny_llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batch_size(name: str, **asked: Any) -> int:
        calibrate(tiny_llama, output_dir=tmp_path / name, data=text, max_length=16, calibration_samples=12, **asked)
        note = json.loads((tmp_path / name / "statistics.json").read_text(encoding="utf-8"))
        return int(note["request"]["batch_size"])

    assert batch_size("small") == 8
    monkeypatch.setattr(memory, "LARGE", 1)
    assert batch_size("room") == 8
    monkeypatch.setattr(memory, "PASS", 1)
    assert batch_size("little") == 1
    assert batch_size("forward", method="whitened") == 8  # nothing is kept for a backward pass
    one, other = (load_file(tmp_path / name / "statistics.safetensors") for name in ("small", "little"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-6)


def test_fitting_in_order_within_a_memory_maps_what_it_factored(
    half_llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {**KFAC, "sequential": True, "sensitivity": 0, "data": text}
    decompose(half_llama, output_dir=tmp_path / "free", **asked)
    save, kept = save_part, []
    monkeypatch.setattr(sequential, "save_part", lambda path, *given: kept.append(path.stem) or save(path, *given))
    report = decompose(half_llama, output_dir=tmp_path / "bound", max_memory="4GB", **asked)
    factored = [row["name"] for row in report.data["modules"] if row["rank"]]
    assert sum(name.endswith("-product") for name in kept) == len(factored) > 0
    ours, theirs = (load.load(tmp_path / name).module.state_dict() for name in ("free", "bound"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


# processes

FAILS = """
import os, sys
from peftc.errors import MethodError
from peftc.factors.factoring import Factoring
work = Factoring.factor_one
def factor(self, target, rank, part, factorize=None):
    if os.environ["RANK"] == "1":
        {how}
    return work(self, target, rank, part, factorize)
Factoring.factor_one = factor
from peftc.cli.app import main
sys.argv[0] = "peftc"
main()
"""


def alone(*words: Any) -> tuple[int, str, str]:
    """Run a command line in this process, on one thread as each of several; return exit code, stdout and stderr."""
    from threadpoolctl import threadpool_limits
    from typer.testing import CliRunner

    from peftc.cli.app import app

    with threadpool_limits(1):
        done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.stdout, done.stderr


def launch(*words: Any, code: str | None = None) -> list[tuple[int, str, str]]:
    """Run two processes as a launcher starts them; return exit code, stdout and stderr of each."""
    running = [Forked(*words, code=code, env=variables) for variables in environments()]
    return [(done.returncode, done.stdout, done.stderr) for done in (process.done() for process in running)]


def launch_freshly(*words: Any) -> list[tuple[int, str, str]]:
    """Do the same with an interpreter for each, from its start to its end."""
    line = [sys.executable, "-m", "peftc", *map(str, words)]
    running = [
        subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)
        for variables in environments()
    ]
    try:
        told = [process.communicate(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(running, told, strict=True)]


def environments() -> list[dict[str, str]]:
    """Return the variables that a launcher gives to each of two processes."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [{**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]


def test_two_processes_write_the_bytes_of_one(tiny_vit: Path, tmp_path: Path) -> None:
    words = ["decompose", tiny_vit, "--data", "sklearn:digits", "--calibration-samples", 40, "--ratio", 0.5, "-o"]
    one = alone(*words, tmp_path / "one")
    first, second = launch_freshly(*words, tmp_path / "two")
    assert (one[0], first[0], second[0]) == (0, 0, 0), first[2] + second[2]
    assert first[1].strip() == str(tmp_path / "two")
    assert "factored  8 of 8 modules" in first[2]
    assert second[1:] == ("", "")
    assert promised(tmp_path / "one") == promised(tmp_path / "two")
    again, other = launch(*words, tmp_path / "two")
    assert (again[0], other[0]) == (0, 0)
    assert "already done" in again[2]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ('raise MethodError("cannot do mine")', "process 1 of 2 failed: cannot do mine"),
        ("os._exit(9)", "another process of this launch stopped"),
    ],
)
def test_when_one_process_fails_all_do(tiny_vit: Path, tmp_path: Path, how: str, said: str) -> None:
    words = ["decompose", tiny_vit, "--rank", 4, "-o", tmp_path / "out"]
    first, second = launch(*words, code=FAILS.format(how=how))
    assert first[0] == 1, first[2]
    assert second[0] != 0
    assert f"error: {said}" in first[2]
    assert "Traceback" not in first[2] + second[2]
    assert not (tmp_path / "out").exists()


def test_what_the_first_process_refuses_ends_the_others(tiny_vit: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    first, second = launch("decompose", tiny_vit, "--rank", 4, "-o", tmp_path / "out")
    assert (first[0], second[0]) == (1, 1)
    assert "is in the way" in first[2]
    assert second[1:] == ("", "")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_process_alone_is_the_first_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (processes.rank(), processes.size(), processes.place()) == (0, 1, 0)
    assert processes.share([1, 2, 3]) == [1, 2, 3]
    assert processes.agreed(lambda: 7) == 7
    with pytest.raises(PeftcError, match="mine"), processes.together():
        raise PeftcError("mine")


def test_shares_are_all_of_the_work_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        shares += processes.share(list(range(8)))
    assert sorted(shares) == list(range(8))
