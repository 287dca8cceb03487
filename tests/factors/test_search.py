"""Plans that are tried as a whole: the one that is taken loses least, and what is measured is what it says."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from peftc.calibration import collection
from peftc.calibration.prepared import Request, prepare
from peftc.factors import search, sensitivity
from peftc.factors.factoring import Factoring
from peftc.factors.search import SHARES, Search, corrected
from peftc.factors.spectra import factorizer
from peftc.factors.trial import Trial
from peftc.models.load import load
from peftc.models.targets import find_targets
from peftc.plans.plan import Aim, Budget
from tests.networks import WORDS

HALF = Aim(Budget("ratio", Fraction(1, 2)), "convex")


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    lines = [" ".join(WORDS[(start * 5 + 7 * at) % len(WORDS)] for at in range(12)) for start in range(120)]
    path.write_text("\n".join(lines))
    return str(path)


def tried(model: Path, data: str, folder: Path, samples: int = 8) -> Trial:
    loaded = load(model)
    targets, reasons = find_targets(loaded, conv_method="spatial")
    work = Factoring(loaded, targets, factorizer("kfac", "spatial", None, with_data=True), torch.device("cpu"), reasons)
    folder.mkdir(exist_ok=True)
    length = None if data.endswith(".npz") else 16
    prepared = prepare(loaded, Request(data, samples=24, max_length=length), "cpu", apart=True)
    work.use(collection.collect(prepared, targets, work.factorize.needs, folder))
    return Trial(work, prepared, samples, folder)


@pytest.fixture(params=["tiny_vit", "tiny_llama"])
def trial(request: pytest.FixtureRequest, images: str, text: str, tmp_path: Path) -> Trial:
    data = images if request.param == "tiny_vit" else text
    return tried(request.getfixturevalue(request.param), data, tmp_path / "work")


def test_no_plan_of_a_share_loses_less_than_the_one_taken(trial: Trial) -> None:
    found = search.best(trial, HALF)
    assert found.lost is not None and found.samples == trial.samples
    each = sensitivity.alone(trial)
    last = Search(trial, HALF, trial.on(trial.samples, trial.folder / f"whole-{trial.samples}"))
    for share in SHARES:
        assert found.lost.value <= last.least([corrected(each, share)]).lost * (1 + 1e-6)
    assert float(trial.lost(found.ranks, last.samples).mean()) == pytest.approx(found.lost.value, rel=1e-5)


def test_a_plan_keeps_to_its_budget(trial: Trial) -> None:
    ranks, targets = search.best(trial, HALF).ranks, trial.work.targets
    spent = sum(target.cost(ranks[name], "entries") for name, target in targets.items())
    assert spent <= sum(target.entries for target in targets.values()) // 2


def test_the_same_samples_give_the_same_plan(trial: Trial, tmp_path: Path) -> None:
    one = search.best(trial, HALF)
    assert search.best(trial, HALF).ranks == one.ranks


def test_a_slope_is_what_leaving_a_layer_dense_wins(trial: Trial) -> None:
    few = trial.on(4, trial.folder / "few")
    losses = corrected(sensitivity.alone(trial), 1.0)
    plan = Search(trial, HALF, few).least([losses])
    groups = [[name for name in plan.ranks if name.startswith(f"{layer}.")] for layer in trial.layers]
    slopes = trial.slopes(plan.ranks, few, groups)
    for group, slope in zip(groups, slopes, strict=True):
        without: dict[str, Any] = {name: None if name in group else rank for name, rank in plan.ranks.items()}
        won = plan.lost - float(trial.lost(without, few).mean())
        assert slope == pytest.approx(won, rel=1e-3, abs=1e-6)


def test_a_kind_is_the_name_in_a_layer_and_has_one_weight_in_all_of_them(trial: Trial) -> None:
    tries = Search(trial, HALF, trial.on(4, trial.folder / "few"))
    kinds = tries.kinds()
    for name, kind in kinds.items():
        assert name in {f"{layer}{kind}" for layer in trial.layers} or name == kind
    assert len(set(kinds.values())) < len(kinds)
    start = tries.least([corrected(sensitivity.alone(trial), 1.0)])
    for losses in tries.of_slopes(start, start, kinds):
        weights: dict[str, set[float]] = {}
        for name, each in losses.items():
            weights.setdefault(kinds[name], set()).add(round(float(each[0] / start.losses[name][0]), 4))
        assert all(len(mine) == 1 for mine in weights.values())
        assert len(set.union(*weights.values())) > 1


def test_early_layers_weigh_more_and_the_last_as_before(trial: Trial) -> None:
    few = trial.on(4, trial.folder / "few")
    tries = Search(trial, HALF, few)
    start = tries.least([corrected(sensitivity.alone(trial), 1.0)])
    first, last = trial.layers[0], trial.layers[-1]
    for losses in tries.of_depth(start):
        for name, each in losses.items():
            weight = float(each[0] / start.losses[name][0])
            if name.startswith(f"{last}."):
                assert weight == pytest.approx(1.0)
            elif name.startswith(f"{first}."):
                assert weight > 1.0


def test_a_plan_that_few_samples_flatter_is_not_taken(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    each = sensitivity.alone(trial)
    monkeypatch.setattr(search, "clearly_less", lambda one, other: False)
    found = search.best(trial, HALF)
    last = Search(trial, HALF, trial.on(trial.samples, trial.folder / f"whole-{trial.samples}"))
    assert found.ranks == last.least([corrected(each, share) for share in SHARES]).ranks


def test_nothing_of_the_network_is_changed(trial: Trial) -> None:
    before = {name: each.clone() for name, each in trial.prepared.model.module.state_dict().items()}
    search.best(trial, HALF)
    after = trial.prepared.model.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
