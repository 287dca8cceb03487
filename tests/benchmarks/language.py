"""Low rank of language models beside its strongest peers (`peers.py`): same text, same modules, same budget.

    python tests/benchmarks/language.py MODEL --out FOLDER [--ratios 0.8,0.6,0.9] [--methods kfac,...] [--draws 0]

MODEL is a folder of a causal language model; with ``--calibrate`` and ``--test`` it reads texts, else it draws them
from the model. Each finished cell is a line of JSON in FOLDER/cells.jsonl, and a run that was stopped goes on from
there. It says its cost first. ``--table`` prints what there is: perplexity, divergence from the dense model and paired
differences with 95 % intervals over the windows of the test text.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import peftc
from peftc.calibration.prepared import Request, prepare
from peftc.measure.intervals import bootstrap
from peftc.models.load import load

PEERS = {  # factors -> allocations
    "kfac": ("uniform", "lems"),
    "svd-llm": ("uniform",),
    "swift": ("dynamic",),
    "zs": ("zero-sum",),
    "lems": ("uniform", "lems"),
}
EVERY = 8  # of the tokens of a test window, so many-th are compared with the dense model's


def clock() -> float:
    """Return the seconds of CPU that this process has taken by all its threads: other work beside it does not count."""
    return time.process_time()


def peak() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Bench:
    """One model, one draw of calibration windows, one set of test windows."""

    def __init__(self, asked: argparse.Namespace, draw: int) -> None:
        self.asked, self.draw = asked, draw
        self.out = Path(asked.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.cells = self.out / "cells.jsonl"
        self.subject = peers.Subject(AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval())
        self.calibration, self.search = self._windows()
        self.test = self._test()

    def _windows(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the windows that are calibrated on, and others that plans are tried on: those that peftc takes."""
        asked = self.asked
        request = Request(self.data, samples=asked.samples, max_length=asked.length, seed=self.draw)
        found = prepare(load(asked.model), request, "cpu", apart=True)
        both = [
            [each.batch([at]).inputs["input_ids"] for at in range(each.size)] for each in (found.encoded, found.tried)
        ]
        if asked.calibrate:
            tried = both[1]
            return both[0], [tried[at * len(tried) // asked.search] for at in range(asked.search)]
        drawn = both[0] + both[1]  # of drawn texts there are so many in all
        return drawn[: len(drawn) - asked.search], drawn[len(drawn) - asked.search :]

    @property
    def data(self) -> str:
        """The calibration set as peftc takes it."""
        return self.asked.calibrate or f"generated:{self.asked.samples}"

    def _test(self) -> list[Tensor]:
        asked = self.asked
        data = asked.test or f"generated:{asked.windows}"
        length, number = asked.length, asked.windows
        request = Request(data, samples=1 << 30, max_length=length, seed=self.draw + 1000 if not asked.test else 0)
        found = prepare(load(asked.model), request, "cpu").encoded
        return [found.batch([at * found.size // number]).inputs["input_ids"] for at in range(number)]

    # -- cells --------------------------------------------------------------------------------------------------------

    def known(self) -> list[dict[str, Any]]:
        """Return the finished cells."""
        return [json.loads(line) for line in self.cells.read_text().splitlines()] if self.cells.is_file() else []

    def has(self, method: str, ratio: float | None) -> bool:
        """Return whether a cell is there."""
        key = (method, ratio, self.draw)
        return any((each["method"], each["ratio"], each["draw"]) == key for each in self.known())

    def add(self, method: str, ratio: float | None, subject: peers.Subject, **more: Any) -> None:
        """Measure a model on the test windows, and keep what came."""
        start = clock()
        nll, divergences = [], []
        with torch.no_grad():
            for ids, dense in zip(self.test, self.dense, strict=True):
                hidden = subject.hidden(ids)
                nll.append(subject.nll(hidden, ids))
                divergences.append(subject.kl(dense, hidden, slice(0, None, EVERY)))
        cell = {"method": method, "ratio": ratio, "draw": self.draw, **more, "nll": nll, "kl": divergences}
        cell |= {"tokens": self.test[0].shape[1] - 1, "evaluation_seconds": clock() - start}
        with self.cells.open("a", encoding="utf-8") as file:
            file.write(json.dumps(cell) + "\n")
        perplexity = float(np.exp(sum(nll) / len(nll) / cell["tokens"]))
        print(
            f"{method} {ratio} draw {self.draw}: perplexity {perplexity:.3f}, kl {np.mean(divergences):.4f}", flush=True
        )

    @property
    def dense(self) -> list[Tensor]:
        """What the dense model's head reads of every test window."""
        path = self.out / ("dense.pt" if self.asked.test else f"dense-{self.draw}.pt")
        if not path.is_file():
            with torch.no_grad():
                torch.save([self.subject.hidden(ids) for ids in self.test], path)
        found: list[Tensor] = torch.load(path)
        return found

    def sums(self) -> tuple[dict[str, peers.Sums], Tensor, float]:
        """Return what the peers calibrate on, and the seconds that it took."""
        path = self.out / f"sums-{self.draw}.pt"
        if not path.is_file():
            start = clock()
            found = peers.collect(self.subject, self.calibration)
            torch.save((*found, clock() - start), path)
            print(f"collected in {clock() - start:.0f} s", flush=True)
        return torch.load(path, weights_only=False)  # type: ignore[no-any-return]

    def run_peers(self, method: str, ratios: Sequence[float]) -> None:
        """Measure one kind of factors at its allocations."""
        wanted = [
            (f"{method} {allocation}", allocation, ratio)
            for ratio in ratios
            for allocation in PEERS[method]
            if not self.has(f"{method} {allocation}", ratio)
        ]
        if not wanted:
            return
        sums, influence, _ = self.sums()
        start = clock()
        triples, factors = {}, {}
        for name, module in self.subject.linears.items():
            found = peers.triple(method, module.weight.data, sums[name], len(self.calibration))
            factors[name] = peers.Factors(method, found)
            if method == "zs":
                triples[name] = found
        solved = clock() - start
        print(f"{method}: factors in {solved:.0f} s", flush=True)
        search = None
        for name, allocation, ratio in wanted:
            start = clock()
            more: dict[str, Any] = {}
            if allocation == "lems":
                search = search or self._search(method, factors)
                ranks, more["trials"] = search.best(ratio)
            elif allocation == "dynamic":
                ranks = peers.swift_dynamic(self.subject, factors, influence, ratio)
            elif allocation == "zero-sum":
                ranks = peers.zero_sum(self.subject, triples, sums, ratio, 0.3 if ratio < 0.65 else 0.0)
            else:
                ranks = peers.uniform(self.subject, ratio)
            more |= {"kept": peers.kept(self.subject, ranks), "solve_seconds": solved, "ranks": ranks}
            more |= {"plan_seconds": clock() - start, "peak_bytes": peak()}
            with peers.cut(self.subject, factors, ranks):
                self.add(name, ratio, self.subject, **more)

    def _search(self, method: str, factors: dict[str, peers.Factors]) -> peers.Search:
        path = self.out / f"alone-{method}-{self.draw}.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        step = 8 if min(min(module.weight.shape) for module in self.subject.linears.values()) > 128 else 2
        search = peers.Search(
            self.subject,
            factors,
            self.search,
            every=self.asked.search_every,
            first=self.asked.search_first,
            step=step,
            known=known,
        )
        start = clock()
        search.measure(lambda _: path.write_text(json.dumps(search.alone)) and None)
        print(f"{method}: {len(search.alone)} linears alone in {clock() - start:.0f} s", flush=True)
        return search

    def run_peftc(self, ratios: Sequence[float], label: str, options: dict[str, Any]) -> None:
        """Measure `peftc decompose` at its defaults, or with options."""
        for ratio in ratios:
            if self.has(label, ratio):
                continue
            folder = self.out / f"{label.replace(' ', '-')}-{ratio}-{self.draw}"
            start = clock()
            asked = self.asked
            made = peftc.decompose(
                asked.model,
                output_dir=folder,
                ratio=str(ratio),
                data=self.data,
                calibration_samples=asked.samples,
                max_length=asked.length,
                num_samples=asked.measure,
                seed=self.draw,
                overwrite=True,
                **options,
            )
            seconds = clock() - start
            more = {"kept": made.data["ratio"]["eligible"], "seconds": seconds, "predicted": made.data["predicted"]}
            more["peak_bytes"] = peak()
            self.add(label, ratio, peers.Subject(peftc.load(folder)), **more)


def table(asked: argparse.Namespace) -> Iterator[str]:
    """Yield rows: one per method and ratio, with paired differences to the first method that is named."""
    cells = [json.loads(line) for line in (Path(asked.out) / "cells.jsonl").read_text().splitlines()]
    dense = {each["draw"]: each for each in cells if each["ratio"] is None}
    yield "| ratio | method | kept | perplexity | divergence | nll against peftc | gap closed | seconds |"
    yield "|--:|---|--:|--:|--:|--:|--:|--:|"
    for ratio in sorted({each["ratio"] for each in cells if each["ratio"]}, reverse=True):
        at = [each for each in cells if each["ratio"] == ratio]
        ours = [each for each in at if each["method"] == "peftc"]
        uniform = [each for each in at if each["method"] == "kfac uniform"]
        for method in dict.fromkeys(each["method"] for each in at):
            mine = [each for each in at if each["method"] == method]
            yield f"| {ratio:g} | {method} | " + " | ".join(_figures(mine, ours, uniform, dense)) + " |"


def _figures(mine: list[Any], ours: list[Any], uniform: list[Any], dense: dict[int, Any]) -> list[str]:
    def perplexity(cells: list[Any]) -> list[float]:
        return [float(np.exp(np.sum(each["nll"]) / len(each["nll"]) / each["tokens"])) for each in cells]

    def spread(values: Sequence[float], digits: int = 4) -> str:
        said = f"{np.mean(values):.{digits}g}"
        return said if len(values) == 1 else f"{said} [{min(values):.{digits}g}, {max(values):.{digits}g}]"

    difference, closed = "", ""
    by_draw = {each["draw"]: each for each in ours}
    pairs = [(each, by_draw[each["draw"]]) for each in mine if each["draw"] in by_draw and each not in ours]
    if pairs:
        gaps = np.concatenate([(np.array(a["nll"]) - np.array(b["nll"])) / a["tokens"] for a, b in pairs])
        difference = str(bootstrap(lambda rows: float(gaps[rows].mean()), len(gaps), seed=0))
    even = {each["draw"]: perplexity([each])[0] for each in uniform}
    shares = [
        (even[each["draw"]] - perplexity([each])[0]) / (even[each["draw"]] - perplexity([dense[each["draw"]]])[0])
        for each in mine
        if each["draw"] in even and each["draw"] in dense
    ]
    if shares:
        closed = spread(shares, 2)
    seconds = [each.get("seconds", each.get("solve_seconds", 0) + each.get("plan_seconds", 0)) for each in mine]
    return [
        f"{np.mean([each['kept'] for each in mine]):.3f}",
        spread(perplexity(mine)),
        spread([float(np.mean(each["kl"])) for each in mine], 3),
        difference,
        closed,
        f"{np.mean(seconds):.0f}",
    ]


def main() -> None:
    """Run what is asked for and is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", required=True)
    parser.add_argument("--calibrate", help="text to calibrate on")
    parser.add_argument("--test", help="text to measure on")
    parser.add_argument("--samples", type=int, default=64, help="windows that are calibrated on")
    parser.add_argument("--search", type=int, default=8, help="windows that LEMS searches on")
    parser.add_argument("--search-every", type=int, default=1, help="of their second halves each so many-th token")
    parser.add_argument("--search-first", type=int, help="of those windows, on which it cuts single layers")
    parser.add_argument("--windows", type=int, default=48, help="windows that are measured on")
    parser.add_argument("--measure", type=int, default=8, help="windows that peftc itself measures on")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--ratios", default="0.8,0.6,0.9")
    parser.add_argument("--methods", default=",".join((*PEERS, "peftc")))
    parser.add_argument("--draws", default="0")
    parser.add_argument("--options", default="{}", help="of `peftc decompose`, as JSON")
    parser.add_argument("--label", default="peftc")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    if asked.table:
        print("\n".join(table(asked)))
        return
    torch.set_num_threads(asked.threads)
    ratios = [float(each) for each in asked.ratios.split(",")]
    methods = asked.methods.split(",")
    for draw in map(int, asked.draws.split(",")):
        bench = Bench(asked, draw)
        cells = sum(len(PEERS.get(each, ("",))) for each in methods) * len(ratios)
        print(f"draw {draw}: up to {cells} cells, {len(bench.test)} windows each", flush=True)
        if not bench.has("dense", None):
            bench.add("dense", None, bench.subject, kept=1.0)
        each = next(cell["evaluation_seconds"] for cell in bench.known() if cell["method"] == "dense")
        print(f"measuring a cell takes about {each:.0f} s, beside factors and plans", flush=True)
        for method in methods:
            if method == "peftc":
                bench.run_peftc(ratios, asked.label, json.loads(asked.options))
            else:
                bench.run_peers(method, ratios)


if __name__ == "__main__":
    main()
