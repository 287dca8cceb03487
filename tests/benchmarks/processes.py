"""Several processes: a step beside bare `DistributedDataParallel`, and memory and loss curve of weights in pieces.

    python tests/benchmarks/processes.py step [--rounds 40]          # 3 minutes, two processes, 1.5 GB
    python tests/benchmarks/processes.py memory --out FOLDER         # 15 minutes, up to four processes, 10 GB
    python tests/benchmarks/processes.py curve --out FOLDER          # 10 minutes, up to four processes, 3 GB

Processes meet over gloo, one thread each. `memory` and `curve` write a line for each case to `FOLDER/cases.jsonl` as
soon as it is known, and go on behind the last one when they are run again.

`step` takes turns within each step of `peftc.training.loop.fit`: its own step, then one of a bare loop, then one of a
second bare loop (A/A), each on a network of its own, on the same batches. `memory` counts, after the second step, the
bytes of weights, gradients and the optimizer's state that a process holds, teacher included, and polls RssAnon until
the training starts: mapped file pages do not count.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16}  # 301 M
SMALL = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}  # 20 M
WORDS = {"large": 16_000, "small": 4_000}
WAYS = {
    "full": ["finetune", "--method", "full", "--learning-rate", "1e-5"],
    "lora": ["finetune", "--method", "lora", "--delta", "--learning-rate", "1e-4"],
    "distill": ["distill", "--teacher", "TEACHER", "--loss", "features=1,logits=1,task=1", "--learning-rate", "1e-5"],
}


def llama(folder: Path, kind: str, seed: int = 0) -> Path:
    """Write a Llama from a config with random weights, and its tokenizer of few words; once."""
    if not (folder / "model.safetensors").is_file():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from tests.networks import LLAMA, save_transformers

        folder.mkdir(parents=True, exist_ok=True)
        save_transformers(folder, "LlamaForCausalLM", **LLAMA)
        (folder / "model.safetensors").unlink()
        shape = LARGE if kind == "large" else SMALL
        config = LlamaConfig(vocab_size=WORDS[kind], tie_word_embeddings=False, num_key_value_heads=None, **shape)
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="50GB")
    return folder


def launch(number: int, words: Sequence[Any], *, told: bool = True) -> list[Any]:
    """Run this script as so many processes, and return the JSON that each ends with."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    line = [sys.executable, __file__, "worker", *map(str, words)]
    running = []
    for rank in range(number):
        own = {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{number}"} if number > 1 else {}
        running.append(subprocess.Popen(line, env=shared | own, stdout=subprocess.PIPE, text=True))
    ended = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"a process of {' '.join(map(str, words))} failed")
    return [json.loads(out.splitlines()[-1]) for out in ended] if told else []


def anonymous() -> int:
    """Return the bytes of anonymous memory of this process."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


class Peak:
    """The most anonymous memory since it was made, polled by a thread."""

    def __init__(self) -> None:
        self.first = self.most = anonymous()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._poll, daemon=True)
        self.thread.start()

    def _poll(self) -> None:
        while not self.ended.wait(0.002):
            self.most = max(self.most, anonymous())

    def added(self) -> int:
        """Return the bytes at most above the first, and end."""
        self.ended.set()
        self.thread.join()
        return max(self.most, anonymous()) - self.first


def in_memory(words: list[str]) -> dict[str, Any]:
    """Train by a command line and return what this process held, in bytes."""
    import timm  # noqa: F401
    import torch
    import transformers  # noqa: F401
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from peftc.models.sharding import local_bytes
    from peftc.steps import distill, finetune  # noqa: F401
    from peftc.training import imitation, loop

    found: dict[str, Any] = {}
    guides: list[Any] = []
    fit, init = loop.fit, imitation.Imitation.check
    peak = Peak()

    def checked(self: Any) -> None:
        guides.append(self.teacher)
        init(self)

    def started(module: Any, *rest: Any, **named: Any) -> Any:
        found["start"] = peak.added()
        guide = guides[-1].module if guides and guides[-1] is not None else None

        def count(optimizer: Any, *_: Any) -> None:
            found["weights"] = sum(map(local_bytes, [*module.parameters(), *(guide.parameters() if guide else ())]))
            found["gradients"] = sum(local_bytes(each.grad) for each in module.parameters() if each.grad is not None)
            state = [each for own in optimizer.state.values() for each in own.values()]
            found["state"] = sum(local_bytes(each) for each in state if isinstance(each, torch.Tensor))

        register_optimizer_step_post_hook(count)
        return fit(module, *rest, **named)

    imitation.Imitation.check, loop.fit = checked, started  # type: ignore[method-assign, assignment]
    run(words)
    return found


def run(words: list[str]) -> None:
    """Run a command line of peftc in this process."""
    from typer.testing import CliRunner

    from peftc.cli.app import app

    done = CliRunner().invoke(app, words)
    if done.exit_code:
        raise SystemExit(done.stderr or str(done.exception))


@contextmanager
def cases(out: Path) -> Iterator[tuple[list[dict[str, Any]], Any]]:
    """Yield the cases that are known, and what adds one."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "cases.jsonl"
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    def add(case: dict[str, Any]) -> None:
        known.append(case)
        with file.open("a") as more:
            more.write(json.dumps(case) + "\n")

    yield known, add


def asked(out: Path, kind: str, way: str, steps: int, target: Path) -> list[str]:
    """Return the command line of a case."""
    from tests.conftest import TEXTS

    story = out / "story.txt"
    story.write_text(" ".join(TEXTS) * 40)
    model, teacher = llama(out / kind, kind), llama(out / f"{kind}-teacher", kind, 1) if way == "distill" else out
    words = [str(teacher) if word == "TEACHER" else word for word in WAYS[way]]
    common = ["--data", story, "--steps", steps, "--batch-size", 4, "--max-length", 32, "--held-out", 0]
    return [
        words[0],
        str(model),
        *words[1:],
        *map(str, common),
        "--device",
        "cpu",
        "-q",
        "--overwrite",
        "-o",
        str(target),
    ]


def memory(out: Path, kind: str, ways: Sequence[str], numbers: Sequence[int]) -> None:
    """Print, for each way and number of processes, what a process holds beside one alone."""
    from safetensors import safe_open

    print("| | processes | weights, gradients, state: MB | of one's | asked | start, MB | asked |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    with cases(out) as (known, add), tempfile.TemporaryDirectory(dir=out) as folder:
        for way in ways:
            for number in [1, *numbers]:
                found = [each for each in known if (each["way"], each["kind"], each["number"]) == (way, kind, number)]
                if not found:
                    words = asked(out, kind, way, 2, Path(folder) / f"{way}{number}")
                    held = launch(number, ["memory", *words, *(["--shard"] if number > 1 else [])])
                    found = [{"way": way, "kind": kind, "number": number, "held": held}]
                    add(found[0])
                each = [sum(one[name] for name in ("weights", "gradients", "state")) for one in found[-1]["held"]]
                if number == 1:
                    alone = each[0]
                    continue
                sizes: dict[str, int] = {}
                with safe_open(out / kind / "model.safetensors", "pt") as file:
                    for name in file.keys():  # noqa: SIM118
                        sizes[name] = 4 * functools.reduce(int.__mul__, file.get_slice(name).get_shape())
                layer = sum(size for name, size in sizes.items() if ".layers.0." in name)
                whole = sum(sizes.values()) * (2 if way == "distill" else 1)
                start, limit = max(one["start"] for one in found[-1]["held"]), whole / number + layer + 500e6
                print(
                    f"| {way} | {number} | {max(each) / 1e6:,.0f} | {max(each) / alone:.3f} | {1 / number + 0.05:.3f} |"
                    f" {start / 1e6:,.0f} | {limit / 1e6:,.0f} |",
                    flush=True,
                )


def curve(out: Path, ways: Sequence[str], numbers: Sequence[int], steps: int) -> None:
    """Print how far the losses of cut weights are from those of one process, relative, at most."""
    from peftc.training import journal

    print("| | processes | first and last loss | largest difference, relative | asked |\n|---|--:|--:|--:|--:|")
    for way in ways:
        logs: dict[int, list[float]] = {}
        for number in [1, *numbers]:
            target = out / f"{way}{number}-{steps}"
            if not target.is_dir():
                words = asked(out, "small", way, steps, target)
                launch(number, ["curve", *words, *(["--shard"] if number > 1 else [])], told=False)
            lines = [json.loads(line) for line in (target / journal.LOG).read_text().splitlines()]
            logs[number] = [line["loss"] for line in lines if "loss" in line]
        for number in numbers:
            gap = max(abs(one / other - 1) for one, other in zip(logs[1], logs[number], strict=True))
            print(f"| {way} | {number} | {logs[1][0]:.4f}, {logs[1][-1]:.4f} | {gap:.1e} | 1e-4 |", flush=True)


def step(rounds: int) -> None:
    """Print the time of a step beside that of a bare loop, and the bytes of gradients beside those of parameters."""
    found = launch(2, ["step", rounds])
    print("| process | peftc / bare, median (quartiles) | bare / bare | gradients and buckets / parameters |")
    print("|--:|--:|--:|--:|")
    for rank, one in enumerate(found):
        texts = []
        for ratios in (one["ours"], one["bare"]):
            low, middle, high = statistics.quantiles(ratios, n=4)
            texts.append(f"{middle:.3f} ({low:.3f} to {high:.3f})")
        print(f"| {rank} | {texts[0]} | {texts[1]} | {one['bytes']:.4f} |")


def in_turns(rounds: int) -> dict[str, Any]:
    """Take steps of peftc's loop and of two bare ones in turns; return ratios of times and of bytes."""
    import torch
    from torch import Tensor, distributed, nn
    from torch.nn.parallel import DistributedDataParallel
    from transformers import LlamaConfig, LlamaForCausalLM

    from peftc import processes
    from peftc.options import Recipe
    from peftc.training import loop

    recipe = Recipe(steps=rounds + 5, batch_size=8, learning_rate=1e-4)
    ids = torch.randint(0, 4000, (64, 64), generator=torch.Generator().manual_seed(0))

    def network() -> nn.Module:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=4000, **SMALL)).eval()

    def batch(rows: Sequence[int], _seeds: Sequence[int]) -> Tensor:
        drawn.append(list(rows))
        return ids[list(rows)]

    def loss(module: nn.Module, given: Tensor) -> Tensor:
        found: Tensor = module(input_ids=given, labels=given).loss
        return found

    def bare() -> Any:
        module = network()
        spread = DistributedDataParallel(module, gradient_as_bucket_view=True)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)

        def once(rows: Sequence[int]) -> float:
            start = time.monotonic()
            found = loss(spread, ids[list(rows)])
            found.backward()
            total = found.detach().clone()
            distributed.all_reduce(total)
            total.item()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return time.monotonic() - start

        return once

    processes.wait()
    drawn: list[list[int]] = []
    module, others = network(), [bare(), bare()]
    times: list[tuple[float, float, float]] = []
    last, share = [0.0], [0.0]

    def after(step: int, _steps: int) -> None:
        own = time.monotonic() - last[0]
        storages = {each.grad.untyped_storage().data_ptr(): each.grad.untyped_storage().nbytes()
                    for each in module.parameters() if each.grad is not None}  # fmt: skip
        share[0] = sum(storages.values()) / sum(each.nbytes for each in module.parameters())
        order = others if step % 2 else others[::-1]
        spent = [once(drawn[-1]) for once in order]
        times.append((own, *(spent if step % 2 else spent[::-1])))
        processes.wait()
        last[0] = time.monotonic()

    loop.fit(module, len(ids), batch, loss, recipe, device="cpu", workers=0, after_step=after)
    ours = [own / statistics.mean(both) for own, *both in times[5:]]
    return {"ours": ours, "bare": [one / other for _, one, other in times[5:]], "bytes": share[0]}


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "memory", "curve"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kind", choices=["large", "small"], default="large")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--numbers", nargs="+", type=int, default=[2, 4])
    given = parser.parse_args()
    if given.what == "step":
        step(given.rounds)
    elif given.out is None:
        parser.error("say where to keep models and results: --out FOLDER")
    elif given.what == "memory":
        memory(given.out.resolve(), given.kind, given.ways, given.numbers)
    else:
        curve(given.out.resolve(), given.ways, given.numbers, given.steps)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        _, _, task, *words = sys.argv
        told: Any = {}
        if task == "step":
            told = in_turns(int(words[0]))
        elif task == "memory":
            told = in_memory(words)
        else:
            run(words)
        print(json.dumps(told))
        from peftc import processes

        processes.leave()
    else:
        main()
