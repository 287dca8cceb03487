"""Pairs of an image and a text: how they are read, what a dual encoder makes of them, and how that is scored."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from peftc.calibration import statistics
from peftc.data import Dataset, open_data
from peftc.errors import DataError
from peftc.measure.costs import work
from peftc.models import dual, load
from peftc.models.inputs import forward, outputs, probe
from peftc.models.model import Model
from peftc.models.targets import find_targets
from peftc.options import Reading
from peftc.tasks import retrieval
from peftc.tasks.table import TASKS, fitting, guess
from peftc.tasks.task import Batch
from tests.networks import save_dual

RETRIEVAL = "image-text-retrieval"
TASK = TASKS[RETRIEVAL]


def table(path: Path, text: str, *images: str) -> str:
    path.parent.mkdir(exist_ok=True, parents=True)
    for number, name in enumerate(images):
        (path.parent / name).parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (12, 10), (number, 0, 0)).save(path.parent / name)
    path.write_text(text)
    return str(path)


# data


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "file_name,caption\nx/1.png,a cat\n2.png,a dog\n"),
        ("a.tsv", "image\ttext\nx/1.png\ta cat\n2.png\ta dog\n"),
        ("a.jsonl", '{"path": "x/1.png", "sentence": "a cat"}\n{"path": "2.png", "sentence": "a dog"}\n'),
    ],
)
def test_a_table_of_paths_and_captions_gives_pairs(tmp_path: Path, name: str, text: str) -> None:
    data = open_data(table(tmp_path / name, text, "x/1.png", "2.png"), task=RETRIEVAL)
    assert (data.kind, len(data), data.labels) == ("image-text", 2, None)
    (image, caption), label = data[1]
    assert (image.size, image.getpixel((0, 0)), caption, label) == ((12, 10), (1, 0, 0), "a dog", None)


def test_a_parquet_file_with_images_inside_gives_pairs(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table(tmp_path / "x.csv", "", "1.png", "2.png")
    cells = [{"bytes": (tmp_path / name).read_bytes(), "path": None} for name in ("1.png", "2.png", "1.png")]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    made = datasets.Dataset.from_dict({"image": cells, "caption": ["a", "b", "c"]}, features=features)
    made.to_parquet(str(tmp_path / "test.parquet"))
    data = open_data(tmp_path / "test.parquet", task=RETRIEVAL)
    assert data[1][0][0].getpixel((0, 0)) == (1, 0, 0)
    assert data.pairs is not None
    assert (data.pairs.captions, data.pairs.images) == (["a", "b", "c"], [0, 1, 0])


def test_columns_that_are_named_make_pairs_without_a_task(tmp_path: Path) -> None:
    file = table(tmp_path / "a.csv", "where,what,caption\n1.png,a cat,no\n1.png,a dog,no\n", "1.png")
    data = open_data(f"{file}?image=where&text=what")
    assert (data.kind, data[0][0][1], data[1][0][1]) == ("image-text", "a cat", "a dog")
    assert data.pairs is not None
    assert data.pairs.images == [0, 0]


@pytest.mark.parametrize("name", ["metadata.csv", "captions.csv"])
def test_a_folder_with_a_table_beside_its_images_gives_pairs(tmp_path: Path, name: str) -> None:
    table(tmp_path / name, "file_name,caption\ncat/1.png,a cat\ncat/2.png,a dog\n", "cat/1.png", "cat/2.png")
    assert open_data(tmp_path, task=RETRIEVAL).kind == "image-text"
    assert open_data(tmp_path, task="image-classification").classes == ["cat"]


def test_a_folder_of_tables_named_by_split_gives_pairs(captioned: Path) -> None:
    data = open_data(captioned, task=RETRIEVAL)
    assert (data.kind, data.split, len(data)) == ("image-text", "test", 12)
    assert len(open_data(f"{captioned}@train", task=RETRIEVAL)) == 24


def test_paths_start_from_the_table_for_images_with_labels_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = table(tmp_path / "set" / "a.csv", "image,label\n1.png,x\n2.png,y\n", "1.png", "2.png")
    monkeypatch.chdir(tmp_path)
    assert open_data(file)[1][0].getpixel((0, 0)) == (1, 0, 0)


def test_the_digest_tells_captions_and_images_apart(tmp_path: Path) -> None:
    text = "file_name,caption\n1.png,a cat\n2.png,a dog\n"
    one = open_data(table(tmp_path / "a.csv", text, "1.png", "2.png"), task=RETRIEVAL).digest
    assert open_data(table(tmp_path / "b.csv", text), task=RETRIEVAL).digest == one
    assert open_data(table(tmp_path / "c.csv", text.replace("dog", "cow")), task=RETRIEVAL).digest != one
    table(tmp_path / "d.csv", text, "2.png", "1.png")
    assert open_data(tmp_path / "a.csv", task=RETRIEVAL).digest != one


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,caption\n1.png,a\nno.png,b\n,c\n", r"2 of 3 images .* missing[\s\S]*row 1 names `no.png`"),
        ("file_name,caption\n1.png,a\n1.png, \n", r"row 1 .* no caption in column `caption`[\s\S]*' '"),
        ("file_name,mood\n1.png,a\n", r"no column .* for captions[\s\S]*`file_name`, `mood`[\s\S]*\?text=NAME"),
        ("mood,caption\n1.png,a\n", r"no column .* for images[\s\S]*`mood`, `caption`[\s\S]*\?image=NAME"),
    ],
)  # fmt: skip
def test_what_a_table_lacks_is_refused_by_row_and_column(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(table(tmp_path / "a.csv", text, "1.png"), task=RETRIEVAL)


def test_a_row_without_an_image_inside_is_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    made = datasets.Dataset.from_dict({"image": [None], "caption": ["a"]}, features=features)
    made.to_parquet(str(tmp_path / "test.parquet"))
    with pytest.raises(DataError, match="row 0 .* has no image in column `image`"):
        open_data(tmp_path / "test.parquet", task=RETRIEVAL)


def test_images_without_captions_are_no_pairs(tmp_path: Path) -> None:
    table(tmp_path / "none.txt", "", "cat/1.png")
    data = open_data(tmp_path, task=RETRIEVAL)
    with pytest.raises(DataError, match="it reads pairs of an image and a text, and the data holds images"):
        fitting(TASK, data)


# what models read


def encoded(model: Model, data: Path | str | Dataset, **settings: Any) -> Any:
    opened = data if isinstance(data, Dataset) else open_data(data, task=RETRIEVAL)
    return TASK.encode(model, opened, Reading(**settings))


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel", "BlipForImageTextRetrieval"])
def test_a_pair_is_read_as_transformers_own_processor_reads_it(tmp_path: Path, captioned: Path, name: str) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer

    model = load.load(save_dual(tmp_path, name))
    data = open_data(captioned, task=RETRIEVAL)
    inputs = encoded(model, data).batch([3, 1]).inputs
    images, captions = zip(*(data[index][0] for index in (3, 1)), strict=True)
    theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(list(images), return_tensors="pt")
    assert torch.allclose(inputs["pixel_values"], theirs["pixel_values"], atol=0.02)
    ids = AutoTokenizer.from_pretrained(tmp_path)(list(captions), padding=True, return_tensors="pt")["input_ids"]
    assert torch.equal(inputs["input_ids"][:, : ids.shape[1]], ids)
    assert (inputs["input_ids"].shape[1] == 16) == (name == "SiglipModel")  # which was trained on full length


def test_a_processor_that_was_saved_whole_is_found(tmp_path: Path, tiny_clip: Path) -> None:
    shutil.copytree(tiny_clip, tmp_path, dirs_exist_ok=True)
    alone = load.load(tmp_path).preprocess
    inside = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": inside}))
    assert load.load(tmp_path).preprocess == alone
    assert alone["input_size"] == [3, 32, 32]


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel", "BlipForImageTextRetrieval"])
def test_the_vectors_of_a_pair_do_not_depend_on_its_batch(tmp_path: Path, captioned: Path, name: str) -> None:
    model = load.load(save_dual(tmp_path, name))
    assert guess(model) is TASK
    samples = encoded(model, captioned)
    together = outputs(model, samples.batch(range(12)).inputs)
    alone = torch.cat([outputs(model, samples.batch([index]).inputs) for index in range(12)])
    assert torch.allclose(together, alone, atol=1e-4)
    assert torch.allclose(together[:, :2].norm(dim=2), torch.ones(12, 2), atol=1e-4)
    assert (together[0, :2] - together[1, :2]).abs().amax(1).min() > 1e-3  # neither tower says the same of everything


def test_every_sample_has_another_text_that_is_not_its_own() -> None:
    assert retrieval.next_other([0, 0, 1, 2, 0]) == [2, 2, 3, 4, 2]
    assert retrieval.next_other([0, 1]) == [1, 0]
    groups = np.random.default_rng(0).integers(0, 3, 50).tolist()
    assert all(groups[at] != groups[other] for at, other in enumerate(retrieval.next_other(groups)))


def broken(tiny: Path, folder: Path, change: Callable[[Path], Any]) -> Model:
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    change(folder)
    return load.load(folder)


def other_end(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 1
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda folder: [path.unlink() for path in folder.glob("token*")], {}, r"has no tokenizer[\s\S]*copy"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), {}, r"how images become inputs[\s\S]*--prep"),
        (other_end, {}, r"tokenizer of .* not the one[\s\S]*at token 1, and captions do not end with it"),
        (lambda folder: None, {"image_size": 64}, r"reads images of 32 x 32 only[\s\S]*asks for 64"),
        (lambda folder: None, {"max_length": 17}, r"at most 16 tokens"),
    ],
    ids=["tokenizer", "processor", "end", "size", "length"],
)
def test_what_a_model_lacks_is_refused(
    tmp_path: Path, tiny_clip: Path, captioned: Path, change: Any, settings: dict[str, int], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        encoded(broken(tiny_clip, tmp_path, change), captioned, **settings)


def test_captions_that_are_all_the_same_cannot_be_ranked(tmp_path: Path, tiny_clip: Path) -> None:
    file = table(tmp_path / "a.csv", "file_name,caption\n1.png,a cat\n2.png,a cat\n", "1.png", "2.png")
    with pytest.raises(DataError, match="too few captions"):
        encoded(load.load(tiny_clip), file)


def test_a_model_of_texts_alone_is_refused(tiny_bert: Path, captioned: Path) -> None:
    with pytest.raises(DataError, match=r"does not compare images with texts[\s\S]*reads text inputs"):
        encoded(load.load(tiny_bert), captioned)


# what comes out


def eligible(model: Model) -> Any:
    return find_targets(model, conv_method="spatial")


def test_the_outputs_of_clip_are_its_two_vectors(tiny_clip: Path) -> None:
    model = load.load(tiny_clip)
    inputs = probe(model, batch=3)
    assert isinstance(inputs, dict)
    with torch.no_grad():
        theirs = model.module(**inputs)
    ours = outputs(model, inputs)
    assert ours.shape == (3, 2, 16)
    assert torch.equal(ours, torch.stack([theirs.image_embeds, theirs.text_embeds], 1))


def test_the_outputs_of_blip_are_its_vectors_and_matching_scores(tiny_blip: Path) -> None:
    model = load.load(tiny_blip)
    inputs = probe(model, batch=3)
    assert isinstance(inputs, dict)
    ours = outputs(model, inputs)
    with torch.no_grad():
        cosines = model.module(**inputs, use_itm_head=False).itm_score
        scores = model.module(**inputs, use_itm_head=True).itm_score
    assert ours.shape == (3, 3, 16)
    assert torch.allclose(ours[:, 0] @ ours[:, 1].T, cosines, atol=1e-5)
    assert torch.allclose(ours[:, 2, :2], scores, atol=1e-5)
    assert not ours[:, 2, 2:].any()


@pytest.mark.parametrize("kind", ["tiny_clip", "tiny_blip"])
def test_every_weight_shows_in_the_outputs_on_a_random_input(kind: str, request: pytest.FixtureRequest) -> None:
    model = load.load(request.getfixturevalue(kind))
    model.module.requires_grad_(True)
    inputs = probe(model, batch=2)
    weights = torch.randn(forward(model, inputs).shape, generator=torch.Generator().manual_seed(0))
    (forward(model, inputs) * weights).sum().backward()
    unseen = {name for name, p in model.module.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert {name.rpartition(".")[2] for name in unseen} <= {"bias", "logit_scale"}  # a key's bias falls out of softmax
    counted = work(model)
    for name in eligible(model)[0]:
        assert counted.positions[name], name
        assert counted.by_module.get(name), name


def test_blip_counts_its_fusion_layers_and_its_text_tower(tiny_blip: Path) -> None:
    model = load.load(tiny_blip)
    inputs = probe(model)
    assert isinstance(inputs, dict)
    words = inputs["input_ids"].shape[1]
    positions = work(model, inputs).positions
    layer = "text_encoder.encoder.layer.0"
    assert positions[f"{layer}.attention.self.query"] == 2 * words
    assert positions[f"{layer}.crossattention.self.query"] == words
    assert positions[f"{layer}.crossattention.self.key"] == positions["vision_model.encoder.layers.0.mlp.fc1"] == 17


def test_only_towers_and_fusion_layers_are_eligible(tiny_clip: Path, tiny_blip: Path) -> None:
    for folder, dense, parts in (
        (tiny_clip, {"visual_projection", "text_projection"}, {"vision_model", "text_model"}),
        (tiny_blip, {"vision_proj", "text_proj", "itm_head"}, {"vision_model", "text_encoder"}),
    ):
        found, reasons = eligible(load.load(folder))
        assert {name.split(".")[0] for name in found} == parts
        assert dense <= reasons.keys()
        assert all("embedding" in name for name in reasons.keys() - dense)
    fused = [name for name in found if ".crossattention." in name]
    assert len(fused) == 2 * 4


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("tiny_clip", "vision_model.encoder.layers.0.mlp.fc1"),
        ("tiny_blip", "vision_model.encoder.layers.0.mlp.fc1"),
        ("tiny_blip", "text_encoder.encoder.layer.0.crossattention.self.key"),
    ],
)
def test_padding_of_words_hides_no_image_patches(kind: str, name: str, request: pytest.FixtureRequest) -> None:
    """Where a text has as many words as an image has patches, its mask is not taken for one of the patches."""
    model = load.load(request.getfixturevalue(kind))
    collector = statistics.Collector(
        model, {name: statistics.Site(eligible(model)[0][name], name, "input")}, ["second_moment"]
    )  # fmt: skip
    collector.see({"attention_mask": (torch.arange(14) < torch.tensor([[14], [5]])).long()})
    with collector.watching() as sums, torch.no_grad():
        model.module.get_submodule(name)(torch.randn(2, 14, 32))
    assert sums.running[f"{name}.input"].count == 2 * 14


# scores


def columns(image: Any, text: Any, caption: list[int], picture: list[int]) -> dict[str, np.ndarray]:
    found = {"image": image, "text": text}
    return {
        **{name: np.array(rows, dtype=np.float32) for name, rows in found.items()},
        "caption": np.array(caption), "picture": np.array(picture),
    }  # fmt: skip


def scores(found: dict[str, np.ndarray]) -> dict[str, list[bool]]:
    ranked = retrieval.ranks(found)
    return {metric.name: metric.of(ranked).tolist() for metric in TASK.metrics if metric.column is None}


def test_recall_is_what_a_hand_counts() -> None:
    """Three pairs; cosines of texts (rows) with images: 1 0 0 / 0.6 0.8 0 / 0 0.8 0.6."""
    images = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    found = scores(columns(images, [[1, 0, 0], [0.6, 0.8, 0], [0, 0.8, 0.6]], [0, 1, 2], [0, 1, 2]))
    assert found["text_to_image_r1"] == [True, True, False]
    assert found["image_to_text_r1"] == [True, False, True]  # texts 1 and 2 tie for image 1, which counts against it
    assert found["text_to_image_r5"] == found["image_to_text_r5"] == [True] * 3


def test_equal_captions_are_right_for_each_others_images() -> None:
    """Text 0 finds the image of row 1, which has the same caption; apart it would miss."""
    images, texts = [[0, 1], [1, 0], [0.6, -0.8]], [[1, 0], [1, 0], [0, -1]]
    assert scores(columns(images, texts, [0, 0, 1], [0, 1, 2]))["text_to_image_r1"] == [True, True]
    assert scores(columns(images, texts, [0, 2, 1], [0, 1, 2]))["text_to_image_r1"] == [False, True, True]


def test_an_image_with_many_captions_stands_in_the_gallery_once() -> None:
    """Seven rows of one image do not fill the first five places before the right one."""
    images = [[1.0, 0.0]] * 7 + [[0.6, 0.8]]
    texts = [[1.0, 0.1 * at] for at in range(7)] + [[0.99, 0.4]]
    found = scores(columns(images, texts, list(range(8)), [0] * 7 + [7]))
    assert len(found["text_to_image_r1"]) == 8
    assert found["text_to_image_r5"] == [True] * 8
    assert found["image_to_text_r1"] == [True, False]


def test_a_network_that_says_the_same_of_everything_finds_nothing() -> None:
    same = np.ones((4, 2)) / 2**0.5
    found = scores(columns(same, same, [0, 1, 2, 3], [0, 1, 2, 3]))
    assert not any(found["text_to_image_r1"] + found["image_to_text_r1"])


def test_ranks_agree_with_sorting_whatever_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    image, text = draw.normal(size=(2, 40, 8))
    given = columns(image, text, draw.integers(0, 25, 40).tolist(), draw.integers(0, 30, 40).tolist())
    whole = retrieval.ranks(given)
    monkeypatch.setattr(retrieval, "BLOCK", 7)
    assert all((retrieval.ranks(given)[name] == whole[name]).all() for name in whole)
    _, first = np.unique(given["picture"], return_index=True)
    for row in range(40):
        asked = given["text"][np.flatnonzero(given["caption"] == given["caption"][row])[0]]
        order = given["picture"][first][np.argsort(-(given["image"][first] @ asked))]
        right = set(given["picture"][given["caption"] == given["caption"][row]].tolist())
        assert whole["image_rank"][row] == 1 + next(at for at, one in enumerate(order.tolist()) if one in right)


def test_matching_counts_pairs_that_outdo_another_text(tiny_blip: Path, captioned: Path) -> None:
    model = load.load(tiny_blip)
    batch = encoded(model, captioned).batch([0, 1, 2, 3])
    assert isinstance(batch.inputs, dict)
    assert batch.others is not None
    assert TASK.run is not None
    found = TASK.observe(TASK.run(model, batch), batch)["matching"]
    with torch.no_grad():
        own, other = (
            model.module(**{**batch.inputs, **texts}, use_itm_head=True).itm_score.diff(dim=1)[:, 0]
            for texts in ({}, batch.others)
        )
    assert found.tolist() == (own > other).tolist()


# losses


def losses_of(module: torch.nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    found = dual.towers(module, inputs)
    assert found is not None
    return retrieval.losses(module, found, inputs)


def inputs_of(model: Model, batch: int = 4) -> dict[str, Tensor]:
    inputs = probe(model, batch=batch)
    assert isinstance(inputs, dict)
    return inputs


def test_the_loss_of_clip_is_that_of_transformers(tiny_clip: Path) -> None:
    model = load.load(tiny_clip)
    inputs = inputs_of(model)
    losses = losses_of(model.module, inputs)
    assert losses.keys() == {"contrastive"}
    assert torch.allclose(losses["contrastive"], model.module(**inputs, return_loss=True).loss)


def test_the_loss_of_siglip_is_that_of_transformers(tmp_path: Path) -> None:
    model = load.load(save_dual(tmp_path, "SiglipModel"))
    inputs = inputs_of(model)
    theirs = model.module(**inputs, return_loss=True).loss
    assert torch.allclose(losses_of(model.module, inputs)["contrastive"], theirs)


def test_the_losses_of_blip_are_cross_entropies_over_its_two_heads(tiny_blip: Path) -> None:
    model = load.load(tiny_blip)
    inputs = inputs_of(model)
    network = model.module
    losses = losses_of(network, inputs)
    cosines = network(**inputs, use_itm_head=False).itm_score / 0.07
    own = torch.arange(4)
    assert torch.allclose(
        losses["contrastive"], (F.cross_entropy(cosines, own) + F.cross_entropy(cosines.T, own)) / 2, atol=1e-5
    )
    before = {**inputs, "input_ids": inputs["input_ids"].roll(1, 0)}
    every = torch.cat([network(**each, use_itm_head=True).itm_score for each in (inputs, before)])
    assert torch.allclose(losses["matching"], F.cross_entropy(every, (torch.arange(8) < 4).long()), atol=1e-5)


def test_equal_texts_of_a_batch_are_never_taken_for_a_wrong_pair(tiny_blip: Path) -> None:
    model = load.load(tiny_blip)
    inputs = inputs_of(model, batch=3)
    inputs["input_ids"][1] = inputs["input_ids"][0]
    seen = losses_of(model.module, inputs)["matching"]
    own = model.module(**inputs).itm_score
    before = model.module(**{**inputs, "input_ids": inputs["input_ids"].roll(1, 0)}).itm_score
    expected = F.cross_entropy(torch.cat([own, before[[0, 2]]]), torch.tensor([1, 1, 1, 0, 0]))
    assert torch.allclose(seen, expected, atol=1e-5)
    image, text = torch.eye(2), torch.eye(2)[[0, 0]]
    same = torch.ones(2, 2, dtype=torch.bool)
    assert retrieval.contrastive(model.module, image, text, same) < 10
    assert retrieval.contrastive(model.module, image, text, torch.eye(2, dtype=torch.bool)) > 3


@pytest.mark.parametrize("kind", ["tiny_clip", "tiny_blip"])
def test_a_few_steps_on_the_losses_teach_the_pairs(kind: str, request: pytest.FixtureRequest, captioned: Path) -> None:
    model = load.load(request.getfixturevalue(kind))
    batch = encoded(model, captioned).batch(range(8))
    assert isinstance(batch.inputs, dict)
    network = copy.deepcopy(model.module).requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    seen = []
    for _ in range(30):
        losses = losses_of(network, batch.inputs)
        optimizer.zero_grad()
        sum(losses.values(), torch.zeros(())).backward()
        optimizer.step()
        seen.append({name: float(value.detach()) for name, value in losses.items()})
    assert all(seen[-1][name] < 0.75 * seen[0][name] for name in seen[0]), (seen[0], seen[-1])


def test_a_network_without_two_vectors_is_refused(tiny_bert: Path) -> None:
    model = load.load(tiny_bert)
    with pytest.raises(DataError, match="gives no vector per image and per text"):
        TASK.run(model, Batch(inputs_of(model), torch.zeros(4, 2)))
