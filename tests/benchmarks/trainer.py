"""A step of `peftc finetune --method lora` beside Hugging Face's `Trainer` with peft: same model, data, batch, modules.

    python tests/benchmarks/trainer.py MODEL [--steps 20] [--rounds 3] [--batch 16] [--length 64] [--threads 2]

MODEL is a folder of a transformers encoder; it gets a head for two classes, and learns generated texts that are all
longer than ``--length``, so that every batch has the same shape. They take turns, a training each, in one process;
ours runs twice a round, which is the control. Seconds of a step are those between the ends of two, data included,
without the first two. It takes about (rounds x 3) trainings of (steps) steps.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

import peftc
from peftc.training.journal import Journal

WORDS = "the a cat dog house tree runs sleeps under over red blue old new".split()
WARM = 2  # steps that are not counted


def texts(number: int, length: int) -> list[tuple[str, int]]:
    """Return texts of more tokens than asked for, and a class of each."""
    random = np.random.default_rng(0)
    return [(" ".join(random.choice(WORDS, length)), at % 2) for at in range(number)]


class Ends(TrainerCallback):
    """When each step of the `Trainer` ended."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Take the time."""
        self.at.append(time.perf_counter())


def theirs(asked: argparse.Namespace, rows: list[tuple[str, int]], names: list[str], folder: Path) -> list[float]:
    """Return seconds of each step of the `Trainer` with peft."""
    import peft

    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(asked.model, num_labels=2)
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=names, modules_to_save=["classifier"])
    model = peft.get_peft_model(model, config)
    made = tokenizer([text for text, _ in rows], truncation=True, max_length=asked.length)
    data = [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, mask, (_, label) in zip(made["input_ids"], made["attention_mask"], rows, strict=True)
    ]
    ends = Ends()
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=asked.steps, per_device_train_batch_size=asked.batch, learning_rate=1e-3,
        use_cpu=True, report_to=[], save_strategy="no", logging_strategy="steps", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[ends]).train()
    return list(np.diff(ends.at)[WARM - 1 :])


def ours(asked: argparse.Namespace, data: Path, folder: Path, **more: Any) -> tuple[list[float], list[str]]:
    """Return seconds of each step of `peftc.finetune`, and the modules that have an update."""
    ends: list[float] = []
    real = Journal.write

    def write(self: Journal, line: Any) -> None:
        real(self, line)
        if "loss" in line:
            ends.append(time.perf_counter())

    Journal.write = write  # type: ignore[method-assign]
    try:
        report = peftc.finetune(
            asked.model, data=str(data), output_dir=folder, method="lora", steps=asked.steps, batch_size=asked.batch,
            max_length=asked.length, learning_rate=1e-3, held_out=0.0, delta=True, device="cpu", overwrite=True, **more,
        )  # fmt: skip
    finally:
        Journal.write = real  # type: ignore[method-assign]
    return list(np.diff(ends)[WARM - 1 :]), list(report.data["learning"]["updates"])


def main() -> None:
    """Let them take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print(f"{3 * asked.rounds} trainings of {asked.steps} steps of {asked.batch} x {asked.length} tokens", flush=True)
    rows = texts(asked.batch * asked.steps, asked.length)
    found: dict[str, list[float]] = {"peftc": [], "Trainer + peft": [], "peftc again": []}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "train.csv"
        with data.open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
        for turn in range(asked.rounds):
            seconds, names = ours(asked, data, Path(folder) / f"one-{turn}")
            found["peftc"] += seconds
            found["Trainer + peft"] += theirs(asked, rows, names, Path(folder) / f"two-{turn}")
            found["peftc again"] += ours(asked, data, Path(folder) / f"three-{turn}")[0]
    base = statistics.median(found["peftc"])
    for name, seconds in found.items():
        middle = statistics.median(seconds)
        low, high = np.quantile(seconds, [0.25, 0.75])
        print(f"{name:16} {middle:.3f} s a step [{low:.3f}, {high:.3f}], {middle / base:.3f} of peftc")


if __name__ == "__main__":
    main()
