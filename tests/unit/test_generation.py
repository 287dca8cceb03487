"""How fast a model writes: tokens, parts and bytes are those of the text that was written."""

from pathlib import Path

import pytest
import torch

from peftc.errors import UsageError
from peftc.measure import costs, generation
from peftc.measure.costs import Call, Seconds
from peftc.measure.generation import Asked
from peftc.models.load import load
from peftc.models.place import runnable
from peftc.steps.bench import bench

ASKED = Asked(prompt=6, new=9, rounds=5)


def test_all_tokens_are_written_and_the_cache_holds_each_but_the_last(tiny_llama: Path) -> None:
    model = runnable(load(tiny_llama), device="cpu")
    outcome = generation.written(model, 3, ASKED, ASKED.new)()
    assert outcome.sequences.shape == (3, ASKED.prompt + ASKED.new)
    config = model.module.config
    heads, each = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    tokens = 3 * (ASKED.prompt + ASKED.new - 1)
    assert generation.cache_bytes(outcome) == 2 * config.num_hidden_layers * heads * each * tokens * 4


def test_what_was_written_is_what_the_network_finds_most_likely(tiny_llama: Path) -> None:
    model = runnable(load(tiny_llama), device="cpu")
    text = generation.written(model, 1, ASKED, 8)().sequences
    with torch.no_grad():
        logits = model.module(text[:, :-1]).logits.clone()
    logits[..., model.module.generation_config.eos_token_id] = -torch.inf
    assert torch.equal(logits.argmax(-1)[:, ASKED.prompt - 1 :], text[:, ASKED.prompt :])


def test_decoding_is_what_the_tokens_after_the_first_take(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = {"model, first": 0.2, "model, all": 1.0, "against, first": 0.3, "against, all": 1.9}
    made_up |= {f"control, {part}": made_up[f"against, {part}"] for part in ("first", "all")}

    def latency(calls: dict[str, Call], *, rounds: int, **_: object) -> Seconds:
        return {label: [made_up[label]] * rounds for label in calls}

    monkeypatch.setattr(costs, "latency", latency)
    model = runnable(load(tiny_llama), device="cpu")
    found = generation.measure({"model": model, "against": model}, ASKED, batch_size=4)["cases"]["saturating"]
    assert found["prefill"]["model"]["tokens_per_second"] == pytest.approx(4 * 6 / 0.2)
    assert found["decoding"]["model"]["tokens_per_second"] == pytest.approx(4 * 8 / 0.8)
    assert found["prefill"]["speedup"]["value"] == pytest.approx(1.5)
    assert found["decoding"]["speedup"]["value"] == pytest.approx(2.0)


def test_bench_prints_a_second_table(tiny_llama: Path) -> None:
    report = bench(tiny_llama, against=tiny_llama, generate=8, rounds=5, batch_size=2, max_length=5, device="cpu")
    assert report.tables[1].title.endswith("8 tokens after a prompt of 5")
    assert [row[0] for row in report.tables[1].rows][-1] == "cache, batch 2"
    assert report.data["generation"]["model"]["cache_bytes"] == report.data["generation"]["against"]["cache_bytes"]


@pytest.mark.parametrize(("new", "why"), [(7, "too few"), (8, "language models")])
def test_what_writes_no_text_or_too_little_is_refused(tiny_vit: Path, new: int, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        bench(tiny_vit, generate=new, rounds=5, device="cpu")


def test_compiled_layers_are_not_timed_so(tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match="--compile"):
        bench(tiny_llama, generate=8, compile=True, device="cpu")
