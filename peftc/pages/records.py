"""Artifacts > what their manifests and results say, side by side: for `compare` and `report`, without torch."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftc.errors import ArtifactError, UsageError, did_you_mean
from peftc.report import Table, by_kind, count, rank_span, span
from peftc.store import artifact, documents, manifest
from peftc.store.exports import read_export
from peftc.store.manifest import Manifest
from peftc.store.source import EXPORT, FILES, MANIFEST

LOG = "log.jsonl"
BASE, DENSE = "base", "DENSE"  # of `--against`: what an artifact records; what stands for a model that nobody knows
TRAINING = ("distill", "finetune")  # the commands that train weights
TOLD = {"step": int, "loss?": float, "score?": (float, None)}  # what a line of it says


@dataclass
class Row:
    """A model in the comparison.

    Attributes:
        name: the folder as it was named, or what the dense model is called.
        stages: the commands that made it; none for a dense model that is not among what is compared.
        parameters, bytes, macs: its size, where known.
        quality: what `evaluate` kept, on the data that most of the artifacts were measured on.
        speed: what `bench` kept, of the machine and input that most were timed on.
        share: parameters, in shares of the base's.
        change: how much more of the first metric it has than the base, on the same samples, with its interval.
        speedup: how many times faster than the base it is, both timed in one run, with its range.
        base: the name of the dense model that it is set beside; None for a dense model.
        made_from: those of the models beside it that it was made from, by name, the earliest first.
        trained: the commands that trained it since the dense model, which has had none of that; oldest first.
        against: what `--against` takes for the dense model, as in `Record`.
    """

    name: str
    stages: list[str] = field(default_factory=list)
    parameters: int | None = None
    bytes: int | None = None
    macs: int | None = None
    quality: Mapping[str, Any] | None = None
    speed: Mapping[str, Any] | None = None
    share: float | None = None
    change: Mapping[str, Any] | None = None
    speedup: Mapping[str, Any] | None = None
    base: str | None = None
    made_from: list[str] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    against: str = BASE


@dataclass
class Record:
    """An artifact or an export, as its files tell of it."""

    folder: Path  # where it lies
    manifest: Manifest  # what it is made of; of an export what it kept of the artifact's that it was made from
    result: Mapping[str, Any]  # what was measured, and the report of its last step; empty where it is gone
    about: Mapping[str, Any] = field(default_factory=dict)  # how to use an export; empty for an artifact
    called: str = ""  # what it is called; the folder as it was named where nothing else is said
    against: str = BASE  # what `--against` takes for the dense model: that, a folder, or `DENSE` where nobody knows

    def __post_init__(self) -> None:
        self.called = self.called or str(self.folder)

    @property
    def format(self) -> str:
        """``artifact``, or the word of an export."""
        return str(self.about.get("format", "artifact"))

    @property
    def spec(self) -> str | None:
        """What the user named as the base; None for a live network."""
        spec = self.manifest.base.get("source", {}).get("spec")
        return None if spec is None else str(spec)

    @property
    def hub_base(self) -> str | None:
        """The hub id of the base, or None where it lay on somebody's disk."""
        spec = (self.spec or "").partition("@")[0]
        if spec.startswith("timm:"):
            return str((self.config.get("pretrained_cfg") or {}).get("hf_hub_id") or "") or None
        named = spec.startswith("hf:") or (
            spec.count("/") == 1 and not spec.startswith((".", "/", "~")) and not spec.endswith(FILES)
        )
        return spec.removeprefix("hf:") if named and not Path(spec).exists() else None

    @property
    def name(self) -> str:
        """The hub id of the base, or the name of its folder: where it lay is nobody's business."""
        return self.hub_base or Path((self.spec or "").partition("@")[0]).name or str(self.spec)

    @property
    def config(self) -> dict[str, Any]:
        """Content of ``config.json``; empty where there is none."""
        try:
            found = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def data(self) -> Mapping[str, Any]:
        """The figures of its last step."""
        return (self.result.get("report") or {}).get("data") or {}

    @property
    def stages(self) -> list[str]:
        """The commands that made it, oldest first, that of an export with its format."""
        made = [str(step["request"]["command"]) for step in self.manifest.steps]
        return [*made[:-1], f"export {self.about['format']}"] if self.about else made

    @property
    def base_id(self) -> str | None:
        """The id of the artifact that `--against base` means for it; None where that is what the manifest records."""
        at = self.manifest.head_step
        return self.manifest.steps[at - 1]["id"] if at and not self.manifest.begins else None

    @property
    def trained(self) -> list[str]:
        """The commands that trained it since the dense model, oldest first."""
        since = self.manifest.steps[self.manifest.head_step if self.base_id else 0 :]
        return [word for step in since if (word := str(step["request"]["command"])) in TRAINING]

    @property
    def place(self) -> str | None:
        """Where the artifact lay that `--against base` means for it; None where it keeps none."""
        place = (self.result.get("places") or {}).get(self.base_id, {})
        return place.get("spec")

    @property
    def base(self) -> str:
        """What the dense model is called: what `--against base` means for it."""
        told = self.against if self.against not in (BASE, DENSE) else None
        spec = str((self.place if self.base_id else self.spec) or told or "the dense model")
        return Path(spec.partition("@")[0]).name or spec

    def measured(self, kind: str) -> list[dict[str, Any]]:
        """Return what `evaluate` or `bench` kept, oldest first; of an export its quality, as it was written."""
        written = self.data.get("quality") if self.about and kind == "evaluate" else None
        return [{"at": 0, **written}] if written else list((self.result.get("measured") or {}).get(kind, []))

    def log(self) -> list[dict[str, Any]]:
        """Return the training that made it, step by step; empty where there was none. A damaged line is left out."""
        try:
            lines = (self.folder / LOG).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            return []
        found = []
        for line in lines:
            with suppress(ValueError):
                found.append(documents.parsed(line))
        return [entry for entry in found if documents.misfit(entry, TOLD) is None]


def of(folder: Path) -> Record:
    """Return the record of an artifact, or of an export, which has to say what it was made from.

    Raises:
        ArtifactError: it is neither, it does not say that, or what lies there as its result is of another model.
    """
    if (folder / MANIFEST).is_file():
        return _own(Record(folder, manifest.read(folder), artifact.read_result(folder)))
    export = read_export(folder)
    made_from = export.about.get("made_from")
    if not made_from:
        why, hint = "an older peftc exported it", "export it again with `--overwrite`"
        raise ArtifactError(f"`{folder}` does not say what it was made from", why=why, hint=hint)
    kept = Manifest(
        id=export.id,
        base=made_from["base"],
        steps=[*made_from["steps"], {"id": export.id, "request": dict(export.request)}],
        files=export.files,
        parameters=made_from["parameters"],
        modules=export.about["modules"],
        kept_layers=made_from["kept_layers"],
    )
    return _own(Record(folder, kept, artifact.read_result(folder), export.about))


def _own(record: Record) -> Record:
    """Return a record whose result is of its model; one that was written for another is refused (ArtifactError)."""
    own = record.manifest
    earlier = {step["id"] for step in own.steps} - {own.id}
    after = ((record.data.get("size") or {}).get("after") or {}).get("parameters")
    if record.result.get("id", own.id) != own.id:
        why = f"it was written for `{record.result['id'][:16]}`, and the folder holds `{own.id[:16]}`"
    elif strange := sorted((record.result.get("places") or {}).keys() - earlier):
        why = f"its model was made from `{strange[0][:16]}`, and the one in the folder was not"
    elif after not in (None, own.parameters):
        why = f"its model has {count(after)} parameters, the one in the folder {count(own.parameters)}"
    else:
        return record
    hint = "put its own back, or remove it: then `peftc evaluate` and `peftc bench` measure the model again"
    raise ArtifactError(f"`{record.folder / artifact.RESULT}` belongs to another model", why=why, hint=hint)


def read(models: Sequence[str | Path]) -> list[Record]:
    """Return a record of each artifact or export; one of statistics is refused, and one that is not as it was written.

    Of weights no more is read than the headers: lengths, and which artifact they are of. That tells files that are
    gone, cut or of another model; `peftc show --verify` reads all of their bytes.
    """
    folders = [Path(getattr(model, "spec", model)) for model in models]
    if not folders:
        raise UsageError("there is nothing to compare", hint="name artifacts: `peftc compare small healed`")
    resolved = [folder.resolve() for folder in folders]
    for folder, path in zip(folders, resolved, strict=True):
        if resolved.count(path) > 1:
            raise UsageError(f"`{folder}` is named twice", hint="name each artifact once")
        if not (folder / MANIFEST).is_file() and not (folder / EXPORT).is_file():
            what = "is no artifact" if folder.exists() else "does not exist"
            hint = "name artifacts; the model that they were made from stands beside them where it was measured"
            raise ArtifactError(
                f"`{folder}` {what}", why=f"there is no `{folder / MANIFEST}`", hint=did_you_mean(folder, hint)
            )
    found = [of(folder) for folder in folders]
    for record in found:
        if record.manifest.holds_statistics:
            what = f"`{record.folder}` holds statistics, not a model"
            raise ArtifactError(what, hint=f"`peftc show {record.folder}`")
        if not record.about:
            artifact.tensor_table(record.folder, record.manifest)
    _find_dense(found)
    return found


def _find_dense(records: Sequence[Record]) -> None:
    """Note how `--against` has to name the dense model of those records for which `base` would not find it."""
    named = {each.manifest.id: str(each.folder) for each in records if not each.about}
    for record in records:
        at = record.base_id
        if at is None or (record.place and manifest.lies(record.place, at, record.folder)):
            continue
        told = [str(places[at]["spec"]) for each in records if at in (places := each.result.get("places") or {})]
        there = [spec for spec in told if Path(spec).expanduser().is_dir()]
        record.against = named.get(at) or next(iter(there), DENSE)


def rows(records: Sequence[Record]) -> list[Row]:
    """Return a row for each dense model that is not among the artifacts, then one for each artifact."""
    quality, speed = (_common(records, kind) for kind in QUESTIONS)
    found = []
    for at, record in enumerate(records):
        own, size = record.manifest, (record.data.get("size") or {}).get("after") or {}
        stored = sum(entry["bytes"] for entry in own.files.values()) if record.about else own.weight_bytes
        row = Row(record.called, record.stages, own.parameters, stored, size.get("macs"))
        row.quality, row.speed, row.against = quality.get(at), speed.get(at), record.against
        found.append(row)
    macs = {_structure(record): row.macs for record, row in zip(records, found, strict=True) if row.macs is not None}
    for record, row in zip(records, found, strict=True):  # a training that kept the structure did not count it again
        row.macs = row.macs if row.macs is not None else macs.get(_structure(record))
        if row.macs is None and row.speed:  # of the input that was timed, which may be another than the model's own
            row.macs = row.speed["model"]["macs"]
    there = {record.manifest.id: row for record, row in zip(records, found, strict=True) if not record.about}
    for record, row in zip(records, found, strict=True):
        earlier = [step["id"] for step in record.manifest.steps if step["id"] != record.manifest.id]
        row.made_from = [there[each].name for each in earlier if each in there]
    named = {record.base: there[record.base_id] for record in records if record.base_id in there}
    dense = [id(row) for row in named.values()]
    paired = [(record, row) for record, row in zip(records, found, strict=True) if id(row) not in dense]
    bases = {name: named.get(name) or Row(name) for name in dict.fromkeys(record.base for record, _ in paired)}
    for name, base in bases.items():
        _fill(base, name, [pair for pair in paired if pair[0].base == name])
    for record, row in paired:
        _beside(row, bases[record.base], record.base, record.trained)
    return [*(base for base in bases.values() if not base.stages), *found]


def _beside(row: Row, base: Row, name: str, trained: list[str]) -> None:
    """Add what is known of a model against its base, by the name it had: only what was measured of both at once."""
    row.base, row.trained = base.name, trained
    if base.parameters and row.parameters is not None:
        row.share = row.parameters / base.parameters
    rated, timed = (((each or {}).get("against") or {}) for each in (row.quality, row.speed))
    if row.quality and rated.get("name") == name:
        change = (rated.get("difference") or {}).get(row.quality["metric"], {})
        row.change = change if change and None not in change.values() else None
    if row.speed and timed.get("name") == name:
        row.speedup = (row.speed.get("speedup") or {}).get("saturating")


def _on_what(entry: Mapping[str, Any]) -> list[Any]:
    return [entry["task"], entry["data"]["digest"], entry["data"]["samples"]]


def cut_text(data: Mapping[str, Any]) -> str:
    """Return how a text was cut to be measured on, as an addition to its name; nothing where that was not asked for."""
    cut = data.get("windows")
    if cut is None:
        return ""
    by = f", protocol {cut['protocol']}" if cut["protocol"] else ""
    return f"{by}, windows of {cut['length']:,} tokens, stride {cut['stride']:,}, first token: {cut['first_token']}"


def _where(entry: Mapping[str, Any]) -> list[Any]:
    at, model = entry["environment"], entry["model"]
    return [at["device_name"], at["threads"], model["dtype"], model["saturating"]["batch"], entry["input"]]


QUESTIONS = {"evaluate": _on_what, "bench": _where}  # only what agrees in all of it can be compared


def _common(records: Sequence[Record], kind: str) -> dict[int, dict[str, Any]]:
    """Return place -> entry, for the question that most records answer.

    Of several answers of one record, those against its base tell most, then those against another model; of those the
    newest.
    """
    answers = [
        (json.dumps(QUESTIONS[kind](entry), sort_keys=True), entry["at"], at, entry)
        for at, record in enumerate(records)
        for entry in record.measured(kind)
    ]
    counts = Counter(asked for asked, at in {(asked, at) for asked, _, at, _ in answers})
    if not counts:
        return {}
    most = max(counts.values())
    newest = max((when, turn) for turn, (asked, when, _, _) in enumerate(answers) if counts[asked] == most)
    chosen = answers[newest[1]][0]  # of one second the later one: a record's answers are in order
    ours = [(when, at, entry) for asked, when, at, entry in answers if asked == chosen]

    def tells(answer: tuple[int, int, dict[str, Any]]) -> tuple[bool, bool, int]:
        when, at, entry = answer
        against = entry.get("against") or {}
        return against.get("name") == records[at].base, bool(against), when

    return {at: entry for _, at, entry in sorted(ours, key=tells)}


def _structure(record: Record) -> str:
    """Return what networks of the same multiply-adds share."""
    own = record.manifest
    return manifest.digest([own.base["architecture"], own.base.get("files"), own.modules, own.kept_layers])


def _fill(row: Row, name: str, made: Sequence[tuple[Record, Row]]) -> None:
    """Add to a dense model what those that were made from it tell of it, which knew it by a name."""
    for record, own in made:
        before = (record.data.get("size") or {}).get("before") or {}
        of_this_one = 2 if "retrain" in record.data else 1  # `prune-layers --retrain` is two stages in one report
        since = len(record.stages) - (record.manifest.head_step if record.base_id else 0)
        if since == of_this_one and row.parameters is None:
            row.parameters, row.bytes, row.macs = (before.get(key) for key in ("parameters", "bytes", "macs"))
        rated, timed = (((each or {}).get("against") or {}) for each in (own.quality, own.speed))
        if own.quality and rated.get("name") == name:
            row.quality = row.quality or {**own.quality, "metrics": rated["metrics"], "against": None}
        if own.speed and timed.get("name") == name:
            row.speed = row.speed or {**own.speed, "model": timed, "against": None, "speedup": None}
            row.parameters, row.macs = row.parameters or timed["parameters"], row.macs or timed["macs"]
            row.bytes = row.bytes or timed["bytes_on_disk"]


def modules_table(title: str, modules: Mapping[str, dict[str, Any]]) -> Table:
    """Group factored modules of one kind and form, with the span of their ranks."""
    columns = {"form": lambda some: some[0]["form"], "rank": lambda some: rank_span(edit["rank"] for edit in some)}
    return by_kind(title, modules, columns)


def statistics_table(modules: Mapping[str, Mapping[str, Any]]) -> Table:
    """Group modules of one kind: whose second moment is kept, of how many features, over how many rows."""

    def counts(key: str) -> Callable[[list[Any]], str]:
        return lambda some: span([count(n) for n in sorted({each[key] for each in some})])

    sides = {"of its": lambda some: " and ".join(sorted({f"{each['side']}s" for each in some}))}
    return by_kind("statistics", modules, {**sides, "features": counts("width"), "rows": counts("rows")})
