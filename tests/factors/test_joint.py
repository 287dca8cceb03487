"""Joint factors are those of the stack, are stored and multiplied once, and reload as they were."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftc.errors import ArtifactError, PlanError, UsageError
from peftc.factors import joint as joining
from peftc.measure import costs
from peftc.methods.decompose.kfac import kfac
from peftc.methods.decompose.whitened import whitened
from peftc.methods.weighted import Moment
from peftc.models import load as models
from peftc.models.targets import find_targets
from peftc.nn.surgery import parameters
from peftc.steps.analyze import analyze
from peftc.steps.decompose import decompose
from peftc.steps.show import show
from peftc.steps.truncate import truncate
from peftc.store import manifest
from peftc.store.commands import command_lines
from peftc.store.source import Source
from tests.conftest import promised, rewritten
from tests.forked import forked
from tests.networks import NETWORKS, ranks, read, save_network

HERE = "python:tests.factors.test_joint"
Q, K, V = "query", "key", "value"


class Block(nn.Module):
    """q, k, v of one input; a twin that runs twice; a changed input; tied and unlike ones."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(32, 32)
        self.key = nn.Linear(32, 16, bias=False)
        self.value = nn.Linear(32, 16)
        self.twice = nn.Linear(32, 32)
        self.late = nn.Linear(32, 32)
        self.gate = nn.Linear(32, 48)
        self.up = nn.Linear(32, 48)
        self.last = nn.Linear(48, 12)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.query(x) + torch.cat([self.key(x), self.value(x)], -1) + self.twice(x) + self.twice(x)
        x = x.clone()
        mixed = mixed + self.gate(x)[..., :32] * self.up(x)[..., :32]
        x.add_(1)
        return self.last(self.up_again(mixed + self.late(x)))

    def up_again(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x, (0, 16))


def block(folder: Path, rank: int | None = None) -> Source:
    """Write a `Block`; with a rank, one whose query, key and value are of that rank as a stack."""
    torch.manual_seed(0)
    network = Block()
    if rank:
        stack = (torch.randn(64, rank) @ torch.randn(rank, 32) / 32).split([32, 16, 16])
        for name, weight in zip((Q, K, V), stack, strict=True):
            network.get_submodule(name).weight = nn.Parameter(weight.clone())
    torch.save({"state_dict": network.state_dict()}, folder / "block.pth")
    return Source(f"{HERE}:Block", weights=folder / "block.pth", allow_code=True)


def named(name: str, folder: Path) -> Source:
    library, architecture, arguments, _ = NETWORKS[name]
    return save_network(folder / f"{name}-base", library, architecture, arguments)


def groups(source: Source, *, weights: bool = True) -> list[list[str]]:

    model = models.load(source, weights=weights)
    return joining.of_one_input(model, find_targets(model, conv_method="spatial")[0])


def stack(source: Source, names: list[str]) -> Tensor:
    network = models.load(source).module
    return torch.cat([network.get_submodule(name).weight for name in names]).detach()  # type: ignore[misc]


@pytest.mark.parametrize("weights", [True, False], ids=["loaded", "meta"])
def test_groups_are_found_by_the_input_that_they_read(tmp_path: Path, weights: bool) -> None:
    assert groups(block(tmp_path), weights=weights) == [[Q, K, V], ["gate", "up"]]
    layer = "model.layers.{}"
    llama = [
        names
        for at in range(2)
        for names in (
            [f"{layer.format(at)}.self_attn.{each}_proj" for each in "qkv"],
            [f"{layer.format(at)}.mlp.{each}_proj" for each in ("gate", "up")],
        )
    ]
    assert groups(named("llama", tmp_path), weights=weights) == llama
    assert groups(named("vit", tmp_path), weights=weights) == []


def test_the_factors_are_the_truncated_svd_of_the_stack(tmp_path: Path) -> None:
    source = block(tmp_path)
    report = decompose(source, output_dir=tmp_path / "out", rank=7, joint=True, skip=["late", "twice"])
    written = models.load(read(tmp_path / "out")).module
    members: list[Any] = [written.get_submodule(name) for name in (Q, K, V)]
    assert members[0].down is members[1].down is members[2].down
    dense = stack(source, [Q, K, V])
    left, values, right = torch.linalg.svd(dense.double())
    best = (left[:, :7] * values[:7]) @ right[:7]
    product = torch.cat([member.weight for member in members])
    torch.testing.assert_close(product.double(), best, rtol=1e-4, atol=1e-5)
    row = next(row for row in report.data["modules"] if row["name"] == Q)
    assert row["members"] == [Q, K, V]
    assert row["shape"] == [64, 32]
    assert row["error"] == pytest.approx(float((dense - best).norm() / dense.norm()), rel=1e-3)
    assert any("share their down factor" in note for note in report.notes)


def test_a_stack_of_that_rank_is_reproduced(tmp_path: Path) -> None:
    source = block(tmp_path, rank=6)
    decompose(source, output_dir=tmp_path / "out", rank=6, joint=True, include=["query", "key", "value"], skip=[
        "gate", "up", "late", "twice", "last",
    ])  # fmt: skip
    x = torch.randn(3, 32)
    dense, written = models.load(source).module, models.load(read(tmp_path / "out")).module
    torch.testing.assert_close(written(x), dense(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_what_was_planned_is_what_is_stored_and_multiplied(name: str, tmp_path: Path) -> None:
    source = named(name, tmp_path)
    report = decompose(source, output_dir=tmp_path / "out", ratio=0.5, joint=True)
    record = manifest.read(tmp_path / "out")
    written = models.load(read(tmp_path / "out"))
    assert parameters(written.module) == record.parameters == report.data["size"]["after"]["parameters"]
    dry = decompose(source, ratio=0.5, joint=True, dry_run=True)
    assert costs.work(written).macs == dry.data["size"]["after"]["macs"], "the shared product is counted once"
    shared = [entry for entry in record.modules.values() if "shares" in entry]
    assert shared and all(record.modules[entry["shares"]]["shares"] == entry["shares"] for entry in shared)
    aliases = [alias for alias in record.tied if alias.endswith("down.weight")]
    assert len(aliases) == len(shared) - len({entry["shares"] for entry in shared}), "the others are not stored"


def test_a_fresh_process_loads_the_same(tmp_path: Path) -> None:
    decompose(block(tmp_path), output_dir=tmp_path / "out", ratio=0.5, joint=True)
    torch.manual_seed(3)
    x = torch.randn(2, 32)
    torch.save(x, tmp_path / "x.pth")
    code = (
        "import torch, peftc; m = peftc.load('out', allow_code=True); x = torch.load('x.pth');"
        "torch.save((m(x).detach(), m.query.down is m.value.down), 'y.pth')"
    )
    forked(code=code, cwd=tmp_path).check_returncode()
    y, one = torch.load(tmp_path / "y.pth")
    assert one
    assert torch.equal(y, models.load(read(tmp_path / "out")).module(x).detach())


def test_the_same_request_gives_the_same_bytes_and_joint_is_another_request(tmp_path: Path) -> None:
    source = block(tmp_path)
    for folder in ("one", "two"):
        decompose(source, output_dir=tmp_path / folder, ratio=0.5, joint=True)
    decompose(source, output_dir=tmp_path / "apart", ratio=0.5)
    assert promised(tmp_path / "one") == promised(tmp_path / "two")
    assert manifest.read(tmp_path / "one").id != manifest.read(tmp_path / "apart").id
    assert "shares" not in (tmp_path / "apart" / "peftc.json").read_text()
    assert "--joint" in command_lines(manifest.read(tmp_path / "one"))[0]
    assert show(tmp_path / "one").data["manifest"]["modules"]["up"]["shares"] == "gate"


def test_a_plan_names_the_members_and_leads_to_the_same_network(tmp_path: Path) -> None:
    source = block(tmp_path)
    analyze(source, ratio=0.5, joint=True, plan=tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["joint"] == [[Q, K, V], ["gate", "up"]]
    assert plan["ranks"][Q] == plan["ranks"][K] == plan["ranks"][V]
    planned = decompose(source, output_dir=tmp_path / "planned", plan=tmp_path / "plan.json")
    direct = decompose(source, output_dir=tmp_path / "direct", ratio=0.5, joint=True)
    assert ranks(planned) == ranks(direct)
    weights = [promised(tmp_path / name) for name in ("planned", "direct")]
    one, other = (models.load(read(tmp_path / name)).module.state_dict() for name in ("planned", "direct"))
    assert weights and one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)

    plan["ranks"][K] += 1
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(PlanError, match="different ranks to modules that share a down factor"):
        decompose(source, output_dir=tmp_path / "no", plan=tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("joint", "message"),
    [
        ("query", '`joint` is `"query"`, not a list'),
        ([["query"]], "not a list of groups"),
        ([["query", "key"], ["key", "value"]], "stands twice"),
        ([["query", "last"]], "among the eligible modules"),
    ],
)
def test_a_plan_whose_groups_make_no_sense_is_refused(tmp_path: Path, joint: Any, message: str) -> None:
    plan = {"schema_version": 1, "ranks": {"query": 4, "key": 4, "value": 4}, "joint": joint}
    plan["ranks"]["last"] = 4  # type: ignore[index]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(PlanError) as caught:
        decompose(block(tmp_path), output_dir=tmp_path / "out", plan=tmp_path / "plan.json")
    assert message in f"{caught.value.what} {caught.value.why}"


@pytest.mark.parametrize(
    ("options", "other"),
    [({"keep_all_ranks": True}, "--keep-all-ranks"), ({"speedup": 1.5}, "--speedup"), ({"plan": "p.json"}, "--plan")],
)
def test_what_cannot_go_with_it_is_refused(tmp_path: Path, options: dict[str, Any], other: str) -> None:
    with pytest.raises(UsageError, match=f"`--joint` and `{other}` cannot be combined"):
        decompose(block(tmp_path), output_dir=tmp_path / "out", joint=True, **options)


def test_ordered_factors_are_not_cut_by_a_joint_plan(tmp_path: Path) -> None:
    source = block(tmp_path)
    analyze(source, ratio=0.5, joint=True, plan=tmp_path / "plan.json")
    decompose(source, output_dir=tmp_path / "all", keep_all_ranks=True)
    with pytest.raises(PlanError, match="ordered factors are kept apart"):
        truncate(read(tmp_path / "all"), output_dir=tmp_path / "cut", plan=tmp_path / "plan.json")


@pytest.mark.parametrize("shares", [3, "late", "nothing"])
def test_a_manifest_that_shares_with_the_wrong_module_is_refused(tmp_path: Path, shares: Any) -> None:
    decompose(block(tmp_path), output_dir=tmp_path / "out", ratio=0.5, joint=True)
    shutil.copytree(tmp_path / "out", tmp_path / "bad")
    rewritten(tmp_path / "bad" / "peftc.json", lambda record: record["modules"]["up"].update(shares=shares))
    with pytest.raises(ArtifactError, match="is not a manifest that peftc wrote") as caught:
        models.load(read(tmp_path / "bad"))
    assert "`up` shares the down factor of" in str(caught.value.why) or "`modules.up.shares`" in str(caught.value.why)


def test_a_planned_group_without_common_statistics_is_refused(tmp_path: Path) -> None:
    source = named("llama", tmp_path)
    calibration: dict[str, Any] = {"data": "generated:8", "task": "causal-lm", "max_length": 16, "device": "cpu"}
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]  # one width, not one input
    plan = {"schema_version": 1, "ranks": dict.fromkeys(names, 4), "joint": [names]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(PlanError, match="share a down factor") as refusal:
        decompose(source, output_dir=tmp_path / "out", plan=tmp_path / "plan.json", method="whitened", **calibration)
    assert all(name in refusal.value.what for name in names)
    assert "they read different tensors" in str(refusal.value.why)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["whitened", "kfac", "asvd", "fwsvd"])
def test_calibrated_methods_take_the_statistics_of_the_stack(tmp_path: Path, method: str) -> None:
    source = named("llama", tmp_path)
    calibration: dict[str, Any] = {"data": "generated:8", "task": "causal-lm", "max_length": 16, "device": "cpu"}
    report = decompose(source, output_dir=tmp_path / "out", ratio=0.5, joint=True, method=method, **calibration)
    members = [f"model.layers.0.self_attn.{each}_proj" for each in "qkv"]
    rows = {row["name"]: row for row in report.data["modules"]}
    assert rows[members[0]]["members"] == members
    again = decompose(source, output_dir=tmp_path / "two", ratio=0.5, joint=True, method=method, **calibration)
    assert ranks(again) == ranks(report)
    assert promised(tmp_path / "out") == promised(tmp_path / "two")


def random_moment(size: int) -> Tensor:
    x = torch.randn(3 * size, size, dtype=torch.float64) * torch.linspace(0.1, 2, size)
    return x.T @ x / len(x)


def test_joint_whitened_and_kfac_factors_beat_every_perturbed_competitor() -> None:
    torch.manual_seed(0)
    weight, second = torch.randn(40, 16, dtype=torch.float64), random_moment(16)
    grams = (random_moment(24), 50 * random_moment(16))
    damped = [gram + 0.3 * gram.diagonal().mean() * torch.eye(len(gram)) for gram in grams]
    for metric, spectrum in (
        (torch.eye(40, dtype=torch.float64), whitened(weight, second_moment=Moment(second))),
        (torch.block_diag(*damped), kfac(weight, second_moment=Moment(second), output_gradient_gram=grams)),
    ):
        cut = spectrum.truncate(5).factors

        def loss(up: Tensor, down: Tensor, metric: Tensor = metric) -> float:
            lost = weight - up.double() @ down.double()
            return float(torch.trace(metric @ lost @ second @ lost.T))

        best = loss(cut.up, cut.down)
        assert best == pytest.approx(float(spectrum.losses()[5]), rel=1e-6)
        for size in (1e-3, 1e-2, 0.1):
            for _ in range(20):
                up = cut.up + size * torch.randn(cut.up.shape).to(cut.up)
                down = cut.down + size * torch.randn(cut.down.shape).to(cut.down)
                assert loss(up, down) > best


def test_a_stack_has_one_input_side_blocks_of_gradients_and_a_summed_fisher() -> None:
    from peftc.calibration.statistics import Found
    from peftc.plans.plan import Target

    class Known:
        def of(self, name: str, _device: torch.device) -> Found:
            size = {"a": 3, "b": 2}[name]
            others = {"output_gradient_gram": torch.eye(size) * size, "weight_fisher": torch.full((4,), float(size))}
            return Found("input", torch.ones(4), torch.eye(4), None, others, 9)

    target = Target("a", "linear", (5, 4), members=("a", "b"), outs=(3, 2))
    found = joining.statistics_of(Known(), target, torch.device("cpu"))  # type: ignore[arg-type]
    assert [len(gram) for gram in found.others["output_gradient_gram"]] == [3, 2]
    assert found.others["weight_fisher"].tolist() == [5.0] * 4
    assert found.covariance is not None and torch.equal(found.covariance, torch.eye(4))


def test_biases_are_corrected_member_by_member(tmp_path: Path) -> None:
    source = named("bert", tmp_path)
    network = models.load(source).module
    names = [f"encoder.layer.0.attention.self.{each}" for each in (Q, K, V)]
    from peftc.factors.factoring import Factoring
    from peftc.factors.spectra import Factorizer
    from peftc.plans.allocate import Use
    from peftc.plans.plan import Target

    mean = torch.linspace(-1, 1, 32, dtype=torch.float64)

    class Known:
        def of(self, _name: str, _device: torch.device) -> Any:
            from peftc.calibration.statistics import Found

            return Found("input", mean, torch.eye(32), None, {}, 99)

    target = Target(names[0], "linear", (96, 32), uses=(Use("linear", 1),), members=tuple(names), outs=(32, 32, 32))
    by = Factorizer("whitened", whitened, {}, ("second_moment",), Known())  # type: ignore[arg-type]
    work = Factoring(models.load(source), {names[0]: target}, by, torch.device("cpu"))
    weight = joining.stacked(work.model, target, torch.device("cpu"))
    factors = whitened(weight, second_moment=Moment(torch.eye(32, dtype=torch.float64))).truncate(9).factors
    parts = work._by_member(target, factors, {"up.weight": factors.up, "down.weight": factors.down}, by)
    for at, name in enumerate(names):
        dense: Any = network.get_submodule(name)
        now = parts[f"{at}.up.weight"].double() @ (parts["down.weight"].double() @ mean) + parts[f"{at}.up.bias"]
        torch.testing.assert_close(now, dense.weight.double() @ mean + dense.bias, rtol=1e-4, atol=1e-5)


class Turned(nn.Module):
    """Two of transformers' Conv1D over one input, and a head."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.stem = nn.Linear(32, 32)
        self.first = Conv1D(24, 32)
        self.second = Conv1D(40, 32)
        self.last = nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.last(self.first(x) * self.second(x)[..., :24])


def turned(folder: Path, dtype: torch.dtype) -> Source:
    torch.manual_seed(0)
    network = Turned()
    state = {name: torch.randn(tensor.shape).to(dtype) for name, tensor in network.state_dict().items()}
    torch.save({"state_dict": state}, folder / "turned.pth")
    return Source(f"{HERE}:Turned", weights=folder / "turned.pth", allow_code=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_transposed_weights_of_any_dtype_are_stacked_by_their_outputs(tmp_path: Path, dtype: torch.dtype) -> None:
    source = turned(tmp_path, dtype)
    report = decompose(source, output_dir=tmp_path / "out", rank=8, joint=True, skip=["stem"])
    dense, written = models.load(source).module, models.load(read(tmp_path / "out")).module
    stacked = torch.cat([dense.get_submodule(name).weight.T for name in ("first", "second")]).detach().double()  # type: ignore[operator, union-attr]
    product = torch.cat([written.get_submodule(name).weight for name in ("first", "second")]).detach().double()  # type: ignore[misc]
    error = float((stacked - product).norm() / stacked.norm())
    values = torch.linalg.svdvals(stacked)
    assert error == pytest.approx(float((values[8:].square().sum() / values.square().sum()).sqrt()), rel=2e-2)
    assert report.data["modules"][0]["error"] == pytest.approx(error, rel=2e-2)
    assert written.get_submodule("first").down.weight.dtype == dtype  # type: ignore[union-attr]


def test_a_stopped_run_goes_on_and_ends_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftc.factors import factoring
    from peftc.models import write

    source = block(tmp_path)
    options: dict[str, Any] = {"ratio": 0.5, "joint": True, "allocation": "energy"}
    decompose(source, output_dir=tmp_path / "straight", **options)
    with monkeypatch.context() as patched:
        patched.setattr(write, "write_artifact", lambda *_args, **_options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decompose(source, output_dir=tmp_path / "stopped", **options)
    with monkeypatch.context() as patched:  # factors that are there are not computed again
        patched.setattr(factoring.Factoring, "factor_one", lambda *_args: 1 / 0)
        decompose(source, output_dir=tmp_path / "stopped", **options)
    assert promised(tmp_path / "straight") == promised(tmp_path / "stopped")
