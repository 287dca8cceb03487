"""How fast a language model writes: it reads a prompt at once, and then writes token after token from its cache.

Both are timed by transformers' own `generate`, as the model's users call it: once for a single token, which is the time
to the first token, and once for more; what the others took is the difference, within each round.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from peftc.errors import UsageError
from peftc.measure import costs
from peftc.measure.costs import Call, Seconds
from peftc.models.inputs import still, vocabulary
from peftc.models.model import Model
from peftc.models.place import place_of
from peftc.report import Table, duration, rate, size, speedup_text

FEWEST = 8  # tokens: what fewer take is lost in the noise of reading the prompt
PARTS = ("prefill", "decoding")


@dataclass(frozen=True)
class Asked:
    """What is to be written: tokens of the prompt, new tokens, rounds, and the seed of the random prompt."""

    prompt: int
    new: int
    rounds: int
    seed: int = 0


def check(new: int, *, compiled: bool) -> None:
    """Refuse too few tokens to time, and compiled layers (UsageError)."""
    if new < FEWEST:
        raise UsageError(f"`--generate {new}` is too few tokens to time", hint=f"take at least {FEWEST}")
    if compiled:
        why = "text grows with each token, and layers are compiled for one shape"
        raise UsageError("`--generate` and `--compile` do not go together", why=why, hint="time them in two runs")


def refuse(model: Model) -> None:
    """Refuse what writes no text (UsageError)."""
    if not getattr(model.module, "can_generate", bool)() or model.kind != "text":
        why = f"a {type(model.module).__name__} writes no text"
        raise UsageError(f"`--generate` is for language models, and `{model.name}` is none", why=why)


def measure(models: Mapping[str, Model], asked: Asked, batch_size: int | None = None) -> dict[str, Any]:
    """Return how fast models write, at batch 1 and at a batch that saturates: JSON-ready.

    Args:
        models: ``model``, and ``against`` where there is a baseline, ready to run.
        asked: what is written.
        batch_size: the larger batch, which is otherwise found on the baseline.
    """
    other = models.get("against", models["model"])
    place = place_of(other.module)
    candidates = {**models, "control": other}
    largest = batch_size or costs.saturating_batch(lambda batch: written(other, batch, asked, FEWEST), place)
    found: dict[str, Any] = {"prompt": asked.prompt, "new": asked.new, "cases": {}}
    for batch in dict.fromkeys((1, largest)):
        times = _times(candidates, batch, asked)
        found["cases"]["batch_1" if batch == 1 else "saturating"] = {"batch": batch, **_case(times, batch, asked)}
    for label, model in models.items():
        call = written(model, largest, asked, asked.new)
        found[label] = {"cache_bytes": cache_bytes(call()), "working_bytes": costs.working_memory(call, place)}
    return found


def table(found: Mapping[str, Any], title: str) -> Table:
    """Lay out what `measure` returned: before, after and change, or the figures alone without a baseline."""
    labels = [label for label in ("against", "model") if label in found]
    rows: list[list[str]] = []
    for case in found["cases"].values():
        batch = case["batch"]
        for name, part, key in (
            (f"time to first token, batch {batch}", "prefill", "median_seconds"),
            (f"prompt tokens, batch {batch}", "prefill", "tokens_per_second"),
            (f"new tokens, batch {batch}", "decoding", "tokens_per_second"),
        ):
            form = duration if key == "median_seconds" else rate
            change = case[part].get("speedup")
            cells = [form(case[part][label][key]) for label in labels]
            rows.append([name, *cells, *([speedup_text(change)] if change else [])])
    caches = [size(found[label]["cache_bytes"]) for label in labels]
    rows.append([f"cache, batch {batch}", *caches, *([""] if len(labels) > 1 else [])])
    heads = ("figure", "before", "after", "change") if len(labels) > 1 else ("figure", "value")
    return Table(f"{title}: {found['new']} tokens after a prompt of {found['prompt']}", heads, rows)


def written(model: Model, batch: int, asked: Asked, new: int) -> Callable[[], Any]:
    """Return a call that writes so many tokens after the same random prompt, and returns what `generate` does."""
    from transformers import GenerationConfig

    generator = torch.Generator().manual_seed(asked.seed)
    ids = torch.randint(0, vocabulary(model), (batch, asked.prompt), generator=generator).to(place_of(model.module))
    how = GenerationConfig(
        max_new_tokens=new,
        min_new_tokens=new,  # no end before
        do_sample=False,
        use_cache=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )

    def call() -> Any:
        with still(model):
            return model.module.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)

    return call


def _times(candidates: Mapping[str, Model], batch: int, asked: Asked) -> dict[str, Seconds]:
    """Return seconds by part and candidate, all timed in one interleaved run."""
    calls: dict[str, Call] = {}
    for label, model in candidates.items():
        calls[f"{label}, first"] = written(model, batch, asked, 1)
        calls[f"{label}, all"] = written(model, batch, asked, asked.new)
    place = place_of(candidates["control"].module)
    seconds = costs.latency(calls, rounds=asked.rounds, device=place, title=f"writing in batches of {batch}")
    first = {label: seconds[f"{label}, first"] for label in candidates}
    rest = {
        label: [max(whole - one, 1e-9) for whole, one in zip(seconds[f"{label}, all"], first[label], strict=True)]
        for label in candidates
    }
    return {"prefill": first, "decoding": rest}


def _case(times: Mapping[str, Seconds], batch: int, asked: Asked) -> dict[str, Any]:
    tokens = {"prefill": batch * asked.prompt, "decoding": batch * (asked.new - 1)}
    found: dict[str, Any] = {}
    for part in PARTS:
        run = times[part]
        found[part] = {"noise": costs.noise_of(run)}
        for label in run.keys() - {"control"}:
            median = costs.quantile(run[label], 0.5)
            found[part][label] = {"median_seconds": median, "tokens_per_second": tokens[part] / median}
        if "against" in run:
            found[part]["speedup"] = asdict(costs.speedup(run["against"], run["control"], run["model"]))
    return found


def cache_bytes(outcome: Any) -> int:
    """Return the bytes of the cache that `generate` filled: keys, values and whatever else a family keeps."""
    word = "cache" if "cache" in outcome else "past_key_values"  # the older name
    return sum({part.data_ptr(): part.nbytes for part in _tensors(outcome[word], set())}.values())


def _tensors(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, Mapping):
        for each in thing.values():
            yield from _tensors(each, seen)
    elif isinstance(thing, list | tuple):
        for each in thing:
            yield from _tensors(each, seen)
    elif hasattr(thing, "__dict__"):
        yield from _tensors(vars(thing), seen)
