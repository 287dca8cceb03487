"""Factors are plain linears: what quantises a network in memory quantises them, as the page on loading says."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftc
from tests.environments import python_with, run
from tests.formats.kinds import texts
from tests.networks import BERT, save_transformers

PAGE = Path(peftc.__file__).with_name("docs") / "loading.md"
RUN = """
import json, sys
place, bits, way = sys.argv[1:]
import torch
from safetensors.torch import load_file, save_file
from torch import nn
lines = open(f"{place}/lines").read()
if bits == "4":
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup
    four = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    lines = lines.replace("Int8WeightOnlyConfig()", "four")
if way == "transformers":
    import peftc.transformers, transformers
    lines = lines.replace("peftc.load(", "transformers.AutoModel.from_pretrained(")
exec(lines)
kinds = {name: type(each.weight).__name__ for name, each in network.named_modules() if isinstance(each, nn.Linear)}
with torch.inference_mode():
    save_file({"y": network(**load_file(f"{place}/inputs"))[0].contiguous()}, f"{place}/found")
print(json.dumps(kinds))
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Factors at ranks that are multiples of 32, so that groups of 32 inputs divide them."""
    folder = tmp_path_factory.mktemp("bert")
    sizes = {**BERT, "hidden_size": 128, "intermediate_size": 256}
    save_transformers(folder, "BertModel", **sizes, initializer_range=0.2)
    peftc.decompose(folder, ratio=0.8, rank_multiple=32, output_dir=folder / "small")
    return folder / "small"


def quantised(small: Path, place: Path, bits: int, way: str) -> tuple[dict[str, str], float]:
    """Return the kind of each linear's weight, and the cosine between what the network gives before and after."""
    save_file(texts(), place / "inputs")
    (lines,) = re.findall(r"^## torchao\n\n```py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    (place / "lines").write_text(lines)
    done = run(python_with("torchao"), "-c", RUN, place, bits, way, cwd=small.parent)
    with torch.inference_mode():
        wanted = peftc.load(small)(**texts())[0]
    found = load_file(place / "found")["y"]
    return json.loads(done.stdout.splitlines()[-1]), float(torch.cosine_similarity(found, wanted, dim=-1).min())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["peftc", "transformers"])
def test_factors_in_8_bits_compute_nearly_the_same(way: str, small: Path, tmp_path: Path) -> None:
    kinds, cosine = quantised(small, tmp_path, 8, way)
    factors = [name for name in kinds if name.endswith((".up", ".down"))]
    assert factors and {kinds[name] for name in factors} == {"Int8Tensor"} == set(kinds.values())
    assert cosine > 0.99


@pytest.mark.slow
def test_factors_in_4_bits_by_groups_that_divide_their_ranks(small: Path, tmp_path: Path) -> None:
    kinds, cosine = quantised(small, tmp_path, 4, "peftc")
    assert any(name.endswith(".up") for name in kinds) and set(kinds.values()) == {"IntxUnpackedToInt8Tensor"}
    assert cosine > 0.7  # of weights drawn at random
