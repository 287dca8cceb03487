"""Bench says what a model costs, and claims no speed that it did not measure beside its noise."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftc.errors import ArtifactError, SourceError, UsageError
from peftc.measure import costs
from peftc.measure.costs import Call, Seconds
from peftc.nn import lowrank, surgery
from peftc.steps.bench import bench
from tests.networks import Perceptron


def two_linears(reads: int = 32) -> nn.Module:
    return Perceptron(depth=1, reads=reads, gives=4)


def smaller() -> nn.Module:
    module = two_linears()
    surgery.replace(module, module.first, lowrank.build(module.first, "linear", 4))
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Make every block take a made-up time by its label, and 4 the saturating batch."""
    seconds = {"model": 0.010, "against": 0.020, "control": 0.020}

    def latency(calls: dict[str, Call], *, rounds: int, **_: Any) -> Seconds:
        wobble = [1 + 0.001 * (index % 5) for index in range(rounds)]
        return {label: [seconds[label] * each for each in wobble] for label in calls}

    monkeypatch.setattr(costs, "latency", latency)
    monkeypatch.setattr(costs, "saturating_batch", lambda forward, device: 4)
    return seconds


def test_a_model_alone_is_measured_beside_itself() -> None:
    report = bench(two_linears(), rounds=5, device="cpu")
    figures = report.data["model"]
    assert figures["parameters"] == 32 * 64 + 64 + 64 * 4 + 4
    assert figures["macs"] == 32 * 64 + 64 * 4
    assert figures["bytes_in_memory"] == 4 * figures["parameters"]
    assert figures["batch_1"]["median_seconds"] <= figures["batch_1"]["p90_seconds"]
    assert report.data["speedup"] is None and "against" not in report.data
    for band in report.data["noise"].values():
        assert band["low"] < 1 < band["high"]
    assert json.loads(json.dumps(report.to_json()))["environment"]["threads"] == torch.get_num_threads()


def test_files_are_weighed_on_disk(tiny_vit: Path, clock: dict[str, float]) -> None:
    figures = bench(tiny_vit, rounds=5, batch_size=2, device="cpu").data["model"]
    assert figures["bytes_on_disk"] == (tiny_vit / "model.safetensors").stat().st_size
    assert figures["saturating"]["batch"] == 2


def test_a_quicker_model_is_said_to_be_quicker(clock: dict[str, float]) -> None:
    report = bench(smaller(), against=two_linears(), min_speedup=1.5, device="cpu")
    assert report.data["speedup"]["saturating"]["verdict"] == "2.00x faster"
    assert report.data["model"]["saturating"]["samples_per_second"] == pytest.approx(4 / 0.01, rel=0.01)
    assert report.passed and not report.warnings


def test_a_slower_model_is_said_to_be_slower_aloud(clock: dict[str, float]) -> None:
    clock["model"] = 0.040
    report = bench(smaller(), against=two_linears(), min_speedup=1.0, device="cpu")
    assert any("2.00x slower" in warning for warning in report.warnings)
    assert not report.passed


def test_a_speed_up_inside_the_noise_counts_as_none(clock: dict[str, float]) -> None:
    clock["model"], clock["control"] = 0.018, 0.016
    report = bench(smaller(), against=two_linears(), min_speedup=1.05, device="cpu")
    assert report.data["speedup"]["saturating"]["value"] > 1.05
    assert [gate.value for gate in report.gates] == [1.0] and not report.passed
    assert any(str(cell).startswith("no measurable change [") for row in report.tables[0].rows for cell in row)


def test_a_busy_machine_is_named(clock: dict[str, float]) -> None:
    clock["control"] = 0.030
    assert any("too busy" in warning for warning in bench(two_linears(), against=two_linears(), device="cpu").warnings)


def test_sizes_are_gates(clock: dict[str, float]) -> None:
    report = bench(two_linears(), max_params=100, max_bytes=1e6, device="cpu")
    assert [(gate.option, gate.passed) for gate in report.gates] == [("--max-params", False), ("--max-bytes", True)]


def test_both_sides_of_the_table_are_filled(clock: dict[str, float]) -> None:
    table = bench(smaller(), against=two_linears(), device="cpu").tables[0]
    assert list(table.columns) == ["figure", "before", "after", "change"]
    assert all(len(row) == 4 for row in table.rows)
    assert len({row[0] for row in table.rows}) == len(table.rows)


def test_two_models_that_read_different_inputs_are_refused() -> None:
    with pytest.raises(SourceError, match="different shapes"):
        bench(two_linears(32), against=two_linears(16), device="cpu")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rounds": 4}, "--rounds 4"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"min_speedup": 1.1}, "nothing to compare"),
    ],
)
def test_values_that_no_run_could_accept_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        bench(two_linears(), device="cpu", **options)


def test_the_base_of_what_is_no_artifact_is_refused() -> None:
    with pytest.raises(ArtifactError, match="no artifact"):
        bench(two_linears(), against="base", device="cpu")
