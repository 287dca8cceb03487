"""A training step of `lora` and its kin beside Hugging Face peft's on the same ViT-Ti: time and peak memory.

    python tests/benchmarks/adapters.py [--size 96] [--batch 16] [--rounds 15] [--methods lora dora] [--rank 8]

All linear layers of the blocks are adapted, weights are random, the optimizer is AdamW. Contestants take turns, step by
step, in one process on one thread, in CPU time; ours runs twice a round, which is the control. Peak memory is that of a
process of its own (the highest resident size over five steps, less that before the model is built); kept are the bytes
that the forward pass keeps for the backward one, weights apart. A step includes what a method does after it, as finding
thresholds anew.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

LINEAR = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def vit(size: int) -> nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=size, num_classes=10)


def ours(method: str, size: int, rank: int) -> nn.Module:
    from peftc.methods.registry import find
    from peftc.nn.adapted import Adapted

    network = vit(size)
    if method == "full":
        return network
    network.requires_grad_(False)
    settings = {} if method in ("sara", "bitfit", "head") else {"rank": rank}
    for name, module in list(network.named_modules()):
        if name.endswith(LINEAR) or (method == "bitfit" and name):
            update = find("adapter", method, "--method")(module, **settings)
            if isinstance(update, tuple):
                for parameter in update:
                    module.get_parameter(parameter).requires_grad_(True)
            elif update is not None:
                owner, _, last = name.rpartition(".")
                setattr(network.get_submodule(owner), last, Adapted(module, update))
    network.get_submodule("head").requires_grad_(True)
    return network


def theirs(method: str, size: int, rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=[name.rpartition(".")[2] for name in LINEAR],
        exclude_modules=["patch_embed.proj"], modules_to_save=["head"], use_dora=method == "dora",
        use_rslora=method == "rslora",
    )  # fmt: skip
    return get_peft_model(vit(size), config)


class Contestant:
    """A network, its optimizer and its batch."""

    def __init__(self, word: str, size: int, batch: int, rank: int) -> None:
        maker, method = word.split(":")
        self.network = {"ours": ours, "peft": theirs}[maker](method, size, rank).train()
        self.learned = [each for each in self.network.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learned, lr=1e-3)
        self.after, self.updates, self.steps = None, {}, 0
        if maker == "ours":
            from peftc.methods.registry import find, trait
            from peftc.nn.adapted import adapted_modules

            self.after = trait(find("adapter", method, "--method"), "after_step", None)
            self.updates = {name: each.update for name, each in adapted_modules(self.network).items()}
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(batch, 3, size, size, generator=generator)
        self.y = torch.randint(0, 10, (batch,), generator=generator)

    def step(self) -> float:
        start = time.process_time()
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.network(self.x), self.y).backward()
        self.optimizer.step()
        self.steps += 1
        if self.after is not None:
            self.after(self.updates, self.steps, 1000, 100.0)
        return time.process_time() - start

    def kept(self) -> int:
        """Return the bytes kept by a forward pass, parameters apart, each storage once."""
        weights = {each.untyped_storage().data_ptr() for each in self.network.parameters()}
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = nn.functional.cross_entropy(self.network(self.x), self.y)
        kept = sum(found.values())
        del loss
        return kept


def resident(key: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))


def memory(word: str, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    import timm  # noqa: F401  both need it, and peft too is loaded before the count begins

    if word.startswith("peft"):
        import peft  # noqa: F401
    torch.nn.Linear(64, 64)(torch.randn(8, 64)).sum().backward()
    before = resident("VmRSS")
    contestant = Contestant(word, arguments.size, arguments.batch, arguments.rank)
    for _ in range(5):
        contestant.step()
    peak = resident("VmHWM") - before
    state = sum(value.nbytes for each in contestant.optimizer.state.values() for value in each.values() if value.ndim)
    learned = sum(each.numel() for each in contestant.learned)
    print(json.dumps({"peak": peak, "kept": contestant.kept(), "state": state, "learned": learned}))


def measured(word: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of a contestant in a process of its own, the lower peak of two."""
    command = [sys.executable, __file__, "--one", word, "--size", str(arguments.size)]
    command += ["--batch", str(arguments.batch), "--rank", str(arguments.rank)]
    # no heap per thread and no free block kept: what is resident is what is in use
    settings = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    runs = [
        json.loads(subprocess.run(command, check=True, capture_output=True, env={**os.environ, **settings}).stdout)
        for _ in range(2)
    ]
    return min(runs, key=lambda run: run["peak"])


def times(words: list[str], arguments: argparse.Namespace) -> dict[str, list[float]]:
    contestants = {
        f"{turn} {word}": Contestant(word, arguments.size, arguments.batch, arguments.rank)
        for turn, word in enumerate([*words, words[0]])
    }
    for contestant in contestants.values():
        contestant.step(), contestant.step()
    found: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    for turn in range(arguments.rounds):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            found[name].append(contestants[name].step())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--methods", nargs="+", default=["lora", "dora"])
    parser.add_argument("--alone", nargs="*", default=[], help="methods of ours that peft has not")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return memory(arguments.one, arguments)
    torch.set_num_threads(1)
    words = [f"{who}:{method}" for method in arguments.methods for who in ("ours", "peft")]
    words += [f"ours:{method}" for method in arguments.alone]
    found = list(times(words, arguments).items())
    control = [one / other for one, other in zip(found[-1][1], found[0][1], strict=True)]
    print(f"A/A {statistics.median(control):.3f} ({min(control):.2f} to {max(control):.2f})", flush=True)
    rows = {word: (taken, measured(word, arguments)) for word, (_, taken) in zip(words, found[:-1], strict=True)}
    print("| contestant | learned | ms a step | peak MB | kept MB | state MB | time / peft | peak / peft |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for word, (taken, run) in rows.items():
        other = rows.get(word.replace("ours:", "peft:"), rows[words[1]])
        ratios = [one / two for one, two in zip(taken, other[0], strict=True)]
        print(
            f"| {word} | {run['learned']:,} | {1000 * statistics.median(taken):.0f} | {run['peak'] / 1e6:.0f} "
            f"| {run['kept'] / 1e6:.0f} | {run['state'] / 1e6:.2f} "
            f"| {statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"| {run['peak'] / other[1]['peak']:.3f} |"
        )
    return None


if __name__ == "__main__":
    main()
