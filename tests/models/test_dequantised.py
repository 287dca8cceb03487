"""Folders of quantised weights are MODELs: each weight is dequantised when it is read, and a note says so."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import peftc
from peftc.errors import SourceError, WeightError
from peftc.models.load import load
from tests.environments import python_with, run
from tests.networks import GPT2, LLAMA, save_transformers

Made = tuple[dict[str, Tensor], Tensor]  # what a file holds of a module, by the ends of names, and its weight (out, in)
GROUP = 16  # inputs that have a scale of their own


def random(*shape: int, high: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def scales(*shape: int) -> Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape))) + 0.5) / 16


def packed(entries: Tensor, bits: int, order: list[int] | None = None) -> Tensor:
    """Return rows of whole numbers with several in each int32, the first in the lowest bits."""
    each = 32 // bits
    found = entries.long().reshape(len(entries), -1, each)[..., order or list(range(each))]
    shifted = (found << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(shifted >= 2**31, shifted - 2**32, shifted).to(torch.int32).contiguous()


def fp8(out: int, in_: int) -> Made:
    """Blocks of 24 x 16, of which those of the last rows are not whole."""
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(out)).to(torch.float8_e4m3fn)
    scale = scales(-(-out // 24), -(-in_ // 16))
    rows, columns = [row // 24 for row in range(out)], [column // 16 for column in range(in_)]
    return {"weight": weight, "weight_scale_inv": scale}, weight.float() * scale[rows][:, columns]


def rows_fp8(out: int, in_: int) -> Made:
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(out)).to(torch.float8_e4m3fn)
    scale = scales(out, 1)
    return {"weight": weight, "weight_scale": scale, "input_scale": torch.ones(1)}, weight.float() * scale


def bitsandbytes8(out: int, in_: int) -> Made:
    weight, scale = (random(out, in_, high=255) - 127).to(torch.int8), scales(out) * 127
    more = {"SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return {"weight": weight, **more}, weight.float() * scale[:, None] / 127


def bitsandbytes4(out: int, in_: int, *, nested: bool = True) -> Made:
    places, code = random(out * in_), torch.linspace(-1, 1, 16) ** 3
    blocks = -(-out * in_ // 64)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [out, in_]}
    inner: dict[str, Tensor] = {"absmax": scales(blocks)}
    absmax = inner["absmax"]
    if nested:
        inner = {
            "absmax": random(blocks, high=256).to(torch.uint8),
            "nested_quant_map": torch.linspace(-1, 1, 256),
            "nested_absmax": scales(-(-blocks // 4)),
        }
        state |= {"nested_blocksize": 4, "nested_offset": 0.25, "nested_dtype": "float32"}
        every = torch.stack([inner["nested_absmax"][at // 4] for at in range(blocks)])
        absmax = inner["nested_quant_map"][inner["absmax"].long()] * every + 0.25
    told = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    inner |= {"quant_map": code, "quant_state.bitsandbytes__nf4": told}
    both = places.reshape(-1, 2)
    found = {"weight": (both[:, 0] * 16 + both[:, 1]).to(torch.uint8)[:, None]}
    weight = torch.stack([code[place] * absmax[at // 64] for at, place in enumerate(places.tolist())])
    return found | {f"weight.{name}": tensor for name, tensor in inner.items()}, weight.reshape(out, in_)


def gptq(out: int, in_: int, *, first: bool = True, bits: int = 4) -> Made:
    """Groups that follow no order, and zeros that the first version writes one too small."""
    entries, zeros = random(in_, out, high=2**bits), random(in_ // GROUP, out, high=2**bits - 1, seed=1) + 1
    scale = scales(in_ // GROUP, out).half()
    group = torch.arange(in_)[torch.randperm(in_, generator=torch.Generator().manual_seed(0))] % (in_ // GROUP)
    parts = {
        "qweight": packed(entries.T, bits).T.contiguous(),
        "qzeros": packed(zeros - int(first), bits),
        "scales": scale,
        "g_idx": group.to(torch.int32),
    }
    return parts, ((entries - zeros[group]) * scale.float()[group]).T


def awq(out: int, in_: int) -> Made:
    entries, zeros, scale = random(in_, out), random(in_ // GROUP, out, seed=1), scales(in_ // GROUP, out).half()
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    group = torch.arange(in_) // GROUP
    parts = {"qweight": packed(entries, 4, order), "qzeros": packed(zeros, 4, order), "scales": scale}
    return parts, ((entries - zeros[group]) * scale.float()[group]).T


def compressed8(out: int, in_: int) -> Made:
    weight, scale = (random(out, in_, high=255) - 127).to(torch.int8), scales(out, 1)
    zero = (random(out, 1) - 8).to(torch.int8)
    parts = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    return parts, (weight.float() - zero.float()) * scale


def compressed4(out: int, in_: int) -> Made:
    entries, scale = random(out, in_), scales(out, in_ // GROUP)
    parts = {"weight_packed": packed(entries, 4), "weight_scale": scale, "weight_shape": torch.tensor([out, in_])}
    return parts, (entries - 8) * scale.repeat_interleave(GROUP, 1)


def groups(bits: int, symmetric: bool = True) -> dict[str, Any]:
    return {
        "config_groups": {"group_0": {"weights": {"num_bits": bits, "symmetric": symmetric}, "targets": ["Linear"]}}
    }


KINDS: dict[str, tuple[Callable[[int, int], Made], dict[str, Any]]] = {
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [24, 16], "activation_scheme": "dynamic"}),
    "fp8 by rows": (rows_fp8, {"quant_method": "fbgemm_fp8"}),
    "bitsandbytes 8": (bitsandbytes8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "bitsandbytes 4": (bitsandbytes4, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bitsandbytes 4, plain scales": (lambda out, in_: bitsandbytes4(out, in_, nested=False), {"load_in_4bit": True}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP}),
    "gptq, second version": (
        lambda out, in_: gptq(out, in_, first=False, bits=8),
        {"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq_v2"},
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "version": "gemm", "group_size": GROUP}),
    "compressed, int8": (compressed8, {"quant_method": "compressed-tensors", "format": "int-quantized", **groups(8)}),
    "compressed, fp8": (rows_fp8, {"quant_method": "compressed-tensors", "format": "float-quantized", **groups(8)}),
    "compressed, int4": (compressed4, {"quant_method": "compressed-tensors", "format": "pack-quantized", **groups(4)}),
}


def quantised(base: Path, folder: Path, kind: str) -> dict[str, Tensor]:
    """Write a folder whose linears are quantised, the head apart, and return all weights as they are meant."""
    folder.mkdir()
    make, told = KINDS[kind]
    for path in base.iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    state = load_file(base / "model.safetensors")
    stored, meant = {}, dict(state)
    for name, tensor in state.items():
        if not name.endswith("proj.weight"):
            stored[name] = tensor
            continue
        parts, meant[name] = make(*tensor.shape)
        stem = name.removesuffix(".weight")
        stored |= {f"{stem}.{end}": part for end, part in parts.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": told}))
    return meant


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    return save_transformers(folder, "LlamaForCausalLM", **LLAMA, initializer_range=0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_that_the_file_means(kind: str, base: Path, tmp_path: Path) -> None:
    meant = quantised(base, tmp_path / "q", kind)
    model = load(tmp_path / "q")
    state = model.module.state_dict()
    for name, tensor in meant.items():
        torch.testing.assert_close(state[name], tensor.to(state[name].dtype), rtol=1e-6, atol=1e-7, msg=name)
    method = KINDS[kind][1].get("quant_method", "bitsandbytes")
    assert f"is quantised by `{method}`: 14 of its modules were dequantised to float32" in " ".join(model.notes)
    assert "quantization_config" not in model.config


@pytest.mark.parametrize("kind", ["fp8", "bitsandbytes 4"])
def test_what_is_made_of_it_is_stored_plain(kind: str, base: Path, tmp_path: Path) -> None:
    quantised(base, tmp_path / "q", kind)
    report = peftc.decompose(tmp_path / "q", ratio=1.0, rank=None, output_dir=tmp_path / "small")
    assert any("were dequantised to float32" in note for note in report.notes)
    whole, small = peftc.load(tmp_path / "q"), peftc.load(tmp_path / "small")
    ids = torch.tensor([[2, 5, 6, 7]])
    with torch.inference_mode():
        torch.testing.assert_close(small(ids).logits, whole(ids).logits, rtol=1e-3, atol=1e-3)
    assert "bitsandbytes" not in (tmp_path / "small/config.json").read_text()
    peftc.prune_layers(tmp_path / "small", drop="0", output_dir=tmp_path / "shorter", device="cpu")
    peftc.export(tmp_path / "q", format="hf", output_dir=tmp_path / "plain", rounds=5, batch_size=1)
    with torch.inference_mode():
        assert torch.equal(peftc.load(tmp_path / "plain")(ids).logits, whole(ids).logits)


def test_it_is_kept_in_the_dtype_of_the_config(base: Path, tmp_path: Path) -> None:
    meant = quantised(base, tmp_path / "q", "fp8")
    path = tmp_path / "q/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "bfloat16"}))
    found = load(tmp_path / "q").module.state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(found, meant["model.layers.0.mlp.up_proj.weight"].bfloat16())


def test_modules_that_hold_a_weight_the_other_way_round_get_it_so(tmp_path: Path) -> None:
    """A square one would be taken for its transpose without a word."""
    sizes = {**GPT2, "n_layer": 1}
    base = tmp_path / "base"
    base.mkdir()
    save_transformers(base, "GPT2LMHeadModel", **sizes, initializer_range=0.2)
    state, (parts, weight) = load_file(base / "model.safetensors"), bitsandbytes8(32, 32)
    name = next(each for each in state if each.endswith("attn.c_proj.weight"))
    del state[name]
    stem = name.removesuffix(".weight")
    save_file(
        state | {f"{stem}.{end}": part for end, part in parts.items()}, base / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_8bit": True}}))
    found = peftc.load(base).transformer.h[0].attn.c_proj.weight
    torch.testing.assert_close(found.detach(), weight.T.contiguous())


def test_fp8_is_read_as_transformers_reads_it(base: Path, tmp_path: Path) -> None:
    import transformers

    quantised(base, tmp_path / "q", "fp8")
    state = load_file(tmp_path / "q/model.safetensors")
    for name in [each for each in state if each.endswith("_scale_inv")]:  # that library takes whole blocks alone
        state[name] = scales(*(side // 16 for side in state[name.removesuffix("_scale_inv")].shape))
    save_file(state, tmp_path / "q/model.safetensors", {"format": "pt"})
    path = tmp_path / "q/config.json"
    config = json.loads(path.read_text())
    told = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    path.write_text(json.dumps({**config, "quantization_config": told}))
    how = transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 16))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q", quantization_config=how, dtype="float32")
    ids = torch.tensor([[2, 5, 6, 7]])
    with torch.inference_mode():
        torch.testing.assert_close(peftc.load(tmp_path / "q")(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)


WRITE = """
import sys, torch, transformers
from safetensors.torch import save_file
base, folder, bits = sys.argv[1:]
how = transformers.BitsAndBytesConfig(**{
    "8": {"load_in_8bit": True},
    "4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "4, fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}[bits])
network = transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=how, dtype=torch.float32)
network.save_pretrained(folder)
state = network.dequantize(dtype=torch.float32).state_dict()
save_file({name: each.float().clone() for name, each in state.items()}, folder + "/meant.st")
"""


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["8", "4", "4, fp4"])
def test_what_bitsandbytes_wrote_is_read_as_it_reads_it(bits: str, tmp_path: Path) -> None:
    """Rows are whole blocks of 64: what it computes for others on a CPU is not what it means on a GPU."""
    (tmp_path / "base").mkdir()
    sizes = {**LLAMA, "hidden_size": 64, "intermediate_size": 128}
    save_transformers(tmp_path / "base", "LlamaForCausalLM", **sizes, initializer_range=0.2)
    run(python_with("bitsandbytes"), "-c", WRITE, tmp_path / "base", tmp_path / "q", bits)
    meant = load_file(tmp_path / "q/meant.st")
    (tmp_path / "q/meant.st").unlink()
    model = load(tmp_path / "q")
    assert "14 of its modules were dequantised" in " ".join(model.notes)
    for name, tensor in model.module.state_dict().items():
        torch.testing.assert_close(tensor, meant[name], rtol=1e-6, atol=1e-6, msg=name)


# what is refused


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"quant_method": "mxfp4"}, "quantised by `mxfp4`, and peftc dequantises fp8"),
        ({"quant_method": "torchao"}, "quantised by `torchao`"),
        ({"quant_method": 3}, "`quant_method` is"),
        ([], "`quantization_config`: "),
        ({"quant_method": "gptq"}, "`bits`"),
        ({"quant_method": "gptq", "bits": 3}, "in 3 bits, and peftc reads 2, 4 and 8"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "in 4 bits by `gemv`"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", **groups(4)}, "as `nvfp4-pack"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized", **groups(4, symmetric=False)},
            "about another middle than zero",
        ),
    ],
)
def test_what_is_stored_otherwise_is_refused_with_what_to_do(told: Any, says: str, base: Path, tmp_path: Path) -> None:
    quantised(base, tmp_path / "q", "fp8")
    path = tmp_path / "q/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": told}))
    with pytest.raises(SourceError) as refusal:
        load(tmp_path / "q")
    assert says in str(refusal.value) and "`save_pretrained(PLAIN)`" in str(refusal.value)


def changed(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, {"format": "pt"})


PART = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("fp8", lambda state: state.update({f"{PART}.weight_scale_inv": torch.ones(5, 5)})),
        ("fp8", lambda state: state.update({f"{PART}.weight": torch.ones(3, 64, 32)})),
        ("gptq", lambda state: state.update({f"{PART}.g_idx": torch.full((32,), 9, dtype=torch.int32)})),
        ("gptq", lambda state: state.pop(f"{PART}.scales")),
        ("awq", lambda state: state.update({f"{PART}.qzeros": torch.ones(1, 1)})),
        ("compressed, int4", lambda state: state.update({f"{PART}.weight_shape": torch.tensor([8, 8])})),
        ("bitsandbytes 4", lambda state: state.pop(f"{PART}.weight.quant_map")),
        *(
            (
                "bitsandbytes 4",
                lambda state, value=value: state.update(
                    {f"{PART}.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(value), dtype=torch.uint8)}
                ),
            )
            for value in (
                b"{",
                b"[]",
                b'{"shape": [64, 32], "blocksize": 0}',
                b'{"shape": [64, 32, 1000000000], "blocksize": 64}',
                b'{"shape": [-1], "blocksize": 1000000000000, "nested_blocksize": 1, "nested_offset": 0}',
            )
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_the_name_of_the_module(
    kind: str, change: Any, base: Path, tmp_path: Path
) -> None:
    quantised(base, tmp_path / "q", kind)
    changed(tmp_path / "q", change)
    with pytest.raises(WeightError, match=PART):
        load(tmp_path / "q")


def test_a_scale_without_its_weight_is_refused(base: Path, tmp_path: Path) -> None:
    quantised(base, tmp_path / "q", "fp8")
    changed(tmp_path / "q", lambda state: state.pop(f"{PART}.weight"))
    with pytest.raises(WeightError, match=PART):
        load(tmp_path / "q")


def test_tensors_that_are_called_otherwise_are_named(base: Path, tmp_path: Path) -> None:
    quantised(base, tmp_path / "q", "fp8")
    changed(tmp_path / "q", lambda state: state.update({"elsewhere": state.pop("model.norm.weight")}))
    with pytest.raises(WeightError, match=r"lacks `model\.norm\.weight`") as refusal:
        load(tmp_path / "q")
    assert "`save_pretrained(PLAIN)`" in str(refusal.value.hint)


def test_a_config_that_speaks_of_what_the_files_do_not_hold_is_harmless(base: Path, tmp_path: Path) -> None:
    quantised(base, tmp_path / "q", "fp8")
    save_file(load_file(base / "model.safetensors"), tmp_path / "q/model.safetensors", {"format": "pt"})
    model = load(tmp_path / "q")
    assert not any("dequantised" in note for note in model.notes)
