"""What of a factored folder vLLM holds, and where: as far as that can be told without it."""

from typing import Any

import pytest

from peftc.errors import SourceError
from peftc.runtimes import shards
from peftc.runtimes.shards import Shard
from peftc.store import quantization

Q, K, V = "a.q_proj", "a.k_proj", "a.v_proj"


def edit(rank: Any, form: str = "linear", **more: str) -> dict[str, Any]:
    return {"form": form, "rank": rank, **more}


def test_each_shard_has_its_rank_and_one_that_is_not_named_is_dense() -> None:
    found = shards.shards([Q, K, V], {Q: edit(5), V: edit(3), "b.q_proj": edit(9)})
    assert found == [Shard(Q, 5, 0), Shard(K, None, 1), Shard(V, 3, 2)]


def test_shards_lie_one_after_the_other() -> None:
    laid = shards.spans([Shard(Q, 5, 0), Shard(K, None, 1), Shard(V, 3, 2)], [64, 32, 32])
    assert laid == {
        "down": [(0, 5), (5, 0), (5, 3)],
        "up": [(0, 64 * 5), (320, 0), (320, 32 * 3)],
        "weight": [(0, 0), (0, 32), (32, 0)],
        "bias": [(0, 64), (64, 32), (96, 32)],
    }


def test_those_that_share_a_down_factor_lie_in_one_place() -> None:
    modules = {K: edit(4, shares=K), V: edit(4, shares=K)}
    found = shards.shards([Q, K, V], modules)
    assert [shard.first for shard in found] == [0, 1, 1]
    assert shards.spans(found, [8, 8, 8])["down"] == [(0, 0), (0, 4), (0, 4)]
    assert shards.held(found, bias=True) == {
        ("weight", 0), ("down", 1), ("up", 1), ("up", 2), ("bias", 0), ("bias", 1), ("bias", 2),
    }  # fmt: skip


def test_what_is_shared_with_a_module_elsewhere_is_refused() -> None:
    with pytest.raises(SourceError, match="`a.o_proj` shares the down factor of `a.q_proj`, which vLLM computes apart"):
        shards.shards(["a.o_proj"], {Q: edit(4, shares=Q), "a.o_proj": edit(4, shares=Q)})


@pytest.mark.parametrize(
    ("modules", "skipped", "says"),
    [
        ({"conv": edit(4, "channel")}, {}, "the factors of `conv`"),
        ({"conv": edit(4, "spatial")}, {}, "their form is `spatial`"),
        ({"conv": edit([4, 4], "tucker2")}, {}, "their form is `tucker2`"),
        ({"h.0.mlp.c_fc": edit(4, "transposed")}, {}, "export FOLDER --format hf --dense"),
        ({"layers.0.mlp.experts.3.up_proj": edit(4)}, {}, "of the expert `layers.0.mlp.experts.3.up_proj`"),
        ({}, {"layers.1": [2]}, "`layers.1` of this folder was dropped in its place"),
    ],
)
def test_what_vllm_does_not_hold_is_refused(modules: Any, skipped: Any, says: str) -> None:
    with pytest.raises(SourceError, match=says):
        shards.refuse_unheld(quantization.entry(modules, skipped, {}))


def test_what_it_holds_is_not() -> None:
    modules = {"model.embed_tokens": edit(4, "embedding"), "lm_head": edit(4), "mlp.shared_experts.up_proj": edit(2)}
    told = quantization.entry(modules, {}, {"lm_head.up.weight": "model.embed_tokens.up.weight"})
    quantization.refuse_unknown(told)
    shards.refuse_unheld(told)
