"""A finished folder > the card of its repository: what it is, what was done, what was measured, how to rebuild it.

Written from manifest and results alone, without torch. Nothing in it is guessed: what nobody recorded is left out, or
said to be unknown.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from peftc.errors import ArtifactError
from peftc.pages import records
from peftc.pages.records import Record, cut_text, modules_table
from peftc.report import Report, Table, count, size
from peftc.store import artifact, quantization
from peftc.store.commands import command_lines
from peftc.store.documents import escaped
from peftc.store.manifest import Manifest
from peftc.store.source import EXPORT, MANIFEST
from peftc.version import __version__

PIPELINES = {
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "text-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
}
METRICS = {"top1": "accuracy", "spearman": "spearmanr"}  # what the hub calls them
DONE = {
    "decompose": "low-rank factors in the place of weight matrices",
    "truncate": "ordered factors cut to a budget",
    "prune-layers": "whole layers dropped",
    "distill": "trained to imitate its teacher",
    "finetune": "tuned for a task",
    "merge": "updates taken into the weights",
    "extract-lora": "the difference of two models as updates of low rank",
    "export": "written for another program, and checked there against the model",
}
TAGS = {"prune-layers": "layer-pruning", "distill": "distillation", "finetune": "fine-tuned"}
TOLD = {  # what of a request is told, in this order
    "method": "method `{}`",
    "format": "format `{}`",
    "dense": "factors multiplied out",
    "score": "score `{}`",
    "keep": "{} kept",
    "data": "data `{}`",
    "steps": "{} steps",
}


def subject_of(folder: Path) -> Record:
    """Return what a finished folder is: an artifact or an export, and whole."""
    if not (folder / MANIFEST).is_file() and not (folder / EXPORT).is_file():
        hint = "name what a step of peftc wrote"
        raise ArtifactError(f"`{folder}` is neither an artifact nor an export of peftc", hint=hint)
    found = records.of(folder)
    if found.manifest.holds_statistics:
        why = "`peftc calibrate` wrote it, and what it holds is no model"
        raise ArtifactError(f"`{folder}` holds statistics", why=why)
    if not found.about:
        artifact.tensor_table(folder, found.manifest)
    return found


def text_of(subject: Record, repo: str, licence: Mapping[str, str], compared: Report | None) -> str:
    """Return the text of a ``README.md`` with its front matter.

    Args:
        subject: what it is about.
        repo: ``owner/name``.
        licence: of the base, as the front matter of its own card says it; empty where nobody knows.
        compared: of an artifact, what `compare` says of it.
    """
    own = Manifest(**_without_markup(asdict(subject.manifest)))
    told = {"result": _without_markup(subject.result), "about": _without_markup(subject.about)}
    shown = replace(subject, manifest=own, **told)
    parts = [
        f"---\n{_front_matter(subject, repo, licence)}\n---",
        f"# {repo.split('/')[-1]}",
        _summary(shown),
        "## Use",
        _use(shown, repo, subject.about.get("use")),
        "## What was done",
        _steps(shown),
        "## Measured",
        _measured(shown, repo, compared),
        "## Rebuild",
        _rebuild(subject),
        "## Licence",
        _licence(subject, licence),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _without_markup(value: Any) -> Any:
    """Return what a file said, with texts that can become neither HTML nor another part of a page in Markdown."""
    if isinstance(value, Mapping):
        return {_without_markup(name): _without_markup(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_markup(each) for each in value]
    if not isinstance(value, str):
        return value
    text = escaped(value).replace("\n", " ")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("`", "'")


def _front_matter(subject: Record, repo: str, licence: Mapping[str, str]) -> str:
    from huggingface_hub import ModelCardData

    results = _results(subject)
    own, pipeline = subject.manifest, None
    if own.base["library"] == "timm":
        classes = subject.config.get("num_classes", len(own.labels or []) or None)
        if classes is not None:
            pipeline = "image-classification" if classes else "image-feature-extraction"
    else:
        pipeline = next((word for end, word in PIPELINES.items() if own.base["architecture"].endswith(end)), None)
    commands = [step["request"]["command"] for step in own.steps]
    tags = ["peftc", "model-compression", *(["low-rank"] if own.modules else [])]
    tags += [tag for command, tag in TAGS.items() if command in commands]
    data = ModelCardData(
        library_name="peftc" if subject.format == "artifact" else subject.about.get("library_name"),
        base_model=subject.hub_base,
        **licence,
        pipeline_tag=pipeline,
        tags=tags + [str(tag) for tag in subject.about.get("tags") or []],
        metrics=sorted({each.metric_type for each in results}) or None,
        eval_results=results or None,
        model_name=repo.split("/")[-1] if results else None,
    )
    return str(data.to_yaml())


def _plain(spec: str) -> str:
    """Return a data set without its split, and one on somebody's disk without its place."""
    spec = re.split("[?@]", spec, maxsplit=1)[0]
    return spec if spec.startswith(("hf:", "sklearn:")) else Path(spec).name


def _results(subject: Record) -> list[Any]:
    """Return metrics as the hub lists them, the newest on each split of each data set."""
    from huggingface_hub import EvalResult

    found = subject.measured("evaluate")
    newest = {
        (each["task"], _plain(each["data"]["spec"]), each["data"]["split"], cut_text(each["data"])): each
        for each in found
    }
    results = []
    for (task, spec, split, cut), entry in newest.items():
        name, known = spec.removeprefix("hf:"), " (the model has learnt from it)" if entry.get("seen") else ""
        kind = {"causal-lm": "text-generation", "masked-lm": "fill-mask"}.get(task, task)
        about = {"task_type": kind, "dataset_type": name, "dataset_name": name + cut + known, "dataset_split": split}
        for metric, figure in entry["metrics"].items():
            about |= {"metric_type": METRICS.get(metric, metric), "metric_name": metric}
            if figure["value"] is not None:  # as it is of what is compared with another model
                results.append(EvalResult(**about, metric_value=figure["value"]))
    return results


def _summary(subject: Record) -> str:
    record = subject.manifest
    base = f"`{subject.name}`" if subject.spec else "a network that was in memory"
    weights = sum(entry["bytes"] for name, entry in record.files.items() if not name.endswith(".json"))
    kind = "The updates of" if record.delta or subject.format == "peft" else "A smaller model made from"
    what = f"{kind} {base} (`{record.base['architecture']}` of {record.base['library']}) with peftc"
    lines = [f"{what}: {count(record.parameters)} parameters, {size(weights)} on disk."]
    if record.modules:
        told = "These modules are products of thin matrices in the place of one each:"
        lines += [told, markdown(modules_table("factored", record.modules))]
    if record.kept_layers:
        lines.append("Layers kept: " + ", ".join(f"`{name}`" for name in record.kept_layers) + ".")
    if record.delta:
        beneath = record.delta["source"]["spec"]
        lines.append(f"It is a delta: the other weights are those of `{beneath}`, which has to be there.")
    return "\n\n".join(lines)


def _use(subject: Record, repo: str, use: Any) -> str:
    """Return how to load what was pushed: of an export as its format says it, in lines of Python."""
    architecture = subject.manifest.base["architecture"]
    if subject.format == "artifact":
        code = f'import peftc\n\nnetwork = peftc.load("{repo}")  # an nn.Module in eval mode\n'
        if subject.manifest.base["library"] == "python":
            more = f"Its network is code, `{architecture}`, which is not here: pass `allow_code=True`."
        else:
            more = f"`peftc` has to be installed. In a shell every command of it takes the id, as `peftc show {repo}`."
            if quantization.is_ours(subject.config):
                more += " After `import peftc.transformers` the `from_pretrained` of transformers takes it as well."
        return f"```python\n{code}```\n\n{more}"
    if not isinstance(use, str) or "`" in use:
        by = subject.data.get("runtime")
        ran = f", which {by} ran when it was written" if by else ""
        whose = f"Its format, `{subject.format}`, is that of another package{ran}."
        return f"{whose} `export.json` has what that says of it."
    code = "".join(f"{escaped(line)}\n" for line in use.splitlines())
    code = code.replace("{repo}", repo).replace("{architecture}", architecture)
    if subject.about.get("library_name") == "transformers" and (subject.folder / "tokenizer_config.json").is_file():
        code += f'tokenizer = transformers.AutoTokenizer.from_pretrained("{repo}")\n'
    return f"```python\n{code}```"


def _steps(subject: Record) -> str:
    lines = []
    for number, step in enumerate(subject.manifest.steps, 1):
        request = step["request"]
        data = request.get("data") or (request.get("statistics", {}).get("request") or {}).get("data")
        spec = data["spec"] if isinstance(data, Mapping) else data
        known = {**request, "data": _plain(str(spec)) if spec else None}
        facts = [f"{kind} {amount}" for kind, amount in (request.get("budget") or {}).items()]
        facts += [text.format(known[key]) for key, text in TOLD.items() if known.get(key)]
        told = f" ({', '.join(facts)})" if facts else ""
        lines.append(f"{number}. `{request['command']}`: {DONE.get(request['command'], 'a step of peftc')}{told}")
    return "\n".join(lines) or "Nothing yet."


def _measured(subject: Record, repo: str, compared: Report | None) -> str:
    """Return the tables of what was measured, and on what."""
    if compared is not None:
        table = compared.tables[0]
        *others, own = table.rows  # the base comes first
        rows = [*others, [f"**{repo.split('/')[-1]}**", *own[1:]]]
        told = [note for note in compared.notes if note.startswith(("quality:", "speed:"))]
        lacks = [kind for kind in ("quality", "speed") if not any(note.startswith(kind) for note in told)]
        were = "was" if len(lacks) == 1 else "were"
        told += [f"{' and '.join(lacks).capitalize()} {were} not measured."] if lacks else []
        return "\n\n".join([markdown(replace(table, rows=rows)), *told])
    report = subject.result.get("report") or {}
    tables = [Table(**table) for table in report.get("tables", [])]
    notes = [note for note in report.get("notes", []) if not note.startswith("compared on random inputs")]
    by = subject.data.get("runtime")
    told = [f"Compared with the model that it was made from, run by {by}."] if by else []
    return "\n\n".join([*told, *(markdown(table) for table in tables), *notes])


def _rebuild(subject: Record) -> str:
    lines = command_lines(subject.manifest)
    versions = subject.result.get("versions") or {}
    told = ", ".join(f"{name} {versions[name]}" for name in ("torch", "timm", "transformers") if name in versions)
    where = f" and {told}, on `{subject.result['device']}`" if told and "device" in subject.result else ""
    fence = "`" * max(3, 1 + max((len(run) for line in lines for run in re.findall("`+", line)), default=0))
    commands = "\n".join([f"{fence}sh", *lines, fence])
    return f"{commands}\n\nWritten with peftc {versions.get('peftc', __version__)}{where}."


def _licence(subject: Record, licence: Mapping[str, str]) -> str:
    base = f"`{subject.name}`" if subject.spec else "the base"
    if not licence:
        asked = f"peftc does not know the licence of {base}: look it up before you use this."
        return f"{asked} What is made from a model stays under its terms."
    name = licence.get("license_name") or licence["license"]
    link = f", see {licence['license_link']}" if "license_link" in licence else ""
    return f"The licence of {base} is `{name}`{link}. Its terms hold for what is made from it."


def markdown(table: Table) -> str:
    """Return a table in Markdown."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join("" if cell is None else str(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(table.columns), line(["---"] * len(table.columns)), *(line(row) for row in table.rows)])
