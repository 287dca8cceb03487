"""Write an artifact and check it by loading it again: shared by every step that writes one."""

import hashlib
import platform
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftc import processes
from peftc.errors import ArtifactError, OutputError, PeftcError, UsageError, reason_of
from peftc.models import inputs
from peftc.models.inputs import outputs, probe
from peftc.models.load import load
from peftc.models.model import Model
from peftc.models.place import one_dtype
from peftc.models.weights import piece
from peftc.nn import surgery
from peftc.nn.surgery import parameters
from peftc.report import SIZES, Report, Table, plain, scaled
from peftc.store import artifact, manifest, maps, quantization, verified
from peftc.store.artifact import Piece
from peftc.store.job import Job, execution
from peftc.store.manifest import Manifest
from peftc.store.source import CODE, COMPANIONS, EXPORT, MANIFEST, part_files
from peftc.version import __version__

SMALL = (".json", ".txt", ".model", ".jinja", ".py")  # of an artifact's own files
NOT_COMPANIONS = ("config.json", "peftc.json", EXPORT, artifact.RESULT, maps.FILE, "data_config.json")
UNKEPT = ("summary", "told")  # of a report: they follow from what is kept
CLOSE = 1e-4  # of the largest output: two builds of one network may pick other kernels, but not other numbers


def base_record(model: Model) -> dict[str, Any]:
    """Return the manifest's record of the base, with its files' sha256 (ArtifactError: an artifact was changed)."""
    if model.manifest is not None:
        assert model.folder is not None
        verified.check(model.folder, model.manifest.files)  # again: it may have changed since it was loaded
        return model.base
    files = {path.name: manifest.file_digest(path) for path in model.files}
    if not files:
        total = hashlib.sha256()
        state = surgery.tensors_of(model.module)
        for name in surgery.stored_names(model.module):
            total.update(f"{name}:{tuple(state[name].shape)};".encode())
            for block in piece(state[name]).blocks():
                total.update(block)
        files = {"memory": total.hexdigest()}
    return {**model.base, "files": files}


def identity(model: Model, base: Mapping[str, Any], request: Mapping[str, Any]) -> str:
    """Return the id of an artifact: digest of its base, by content and not by place, and of every request."""
    content = {key: value for key, value in base.items() if key != "source"}
    earlier = [step["request"] for step in (model.manifest.steps if model.manifest else [])]
    return manifest.digest({"base": content, "config": model.config, "requests": [*earlier, request]})


@contextmanager
def writing(
    model: Model, output: Path, request: dict[str, Any], *, overwrite: bool
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Open the output folder for a request on a model; yield the job and the base record.

    Of several processes the first holds the folder; the others see its working folder and write parts alone.
    """
    base = base_record(model)
    identifier = identity(model, base, request)
    processes.wait()
    if processes.rank():
        processes.wait()  # until the first holds the folder, or says why it does not
        job = Job(output, identifier, request, done=processes.agreed(lambda: False))
        _refuse_apart(job)
        yield job, base
        return
    with ExitStack() as held:
        with processes.together():
            job = held.enter_context(execution(output, identifier, request, overwrite=overwrite))
        processes.agreed(lambda: job.done)
        _refuse_apart(job)
        yield job, base


def _refuse_apart(job: Job) -> None:
    """Refuse processes on several machines, or in several folders, that share no disk: an `OutputError`."""
    if job.done:
        return
    blind = [number for number, sees in enumerate(processes.gathered([job.work.is_dir()])) if not sees]
    if blind:
        raise OutputError(
            "the processes of this launch do not see one folder",
            why=f"process {blind[0]} of {processes.size()} does not find `{job.work}`, which the first one made",
            hint="write to a disk that all machines share: `-o`, as an absolute path",
        )


def settle(job: Job, model: Model, base: Mapping[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """Let a job write under the request that its own resolved to, and return that; the result keeps what was asked."""
    job.settle(identity(model, base, request))
    return request


def companions(model: Model) -> dict[str, bytes]:
    """Return the small files that travel with a model: tokenizer, processor, generation settings, pooling."""
    if model.folder is None:
        return {}
    named = model.manifest.files if model.manifest is not None else {}
    found = {}
    for path in sorted(model.folder.iterdir()):
        known = path.name in named and path.suffix in SMALL and not path.name.endswith(".index.json")
        known = known or any(path.match(each) for each in COMPANIONS)
        known = (known and path.name not in NOT_COMPANIONS) or (path.match(CODE) and model.source.trust_remote_code)
        if known and path.is_file():
            found[path.name] = path.read_bytes()
    return found | {name: path.read_bytes() for name, path in part_files(model.folder).items()}


def write_artifact(
    job: Job,
    model: Model,
    base: dict[str, Any],
    request: dict[str, Any],
    pieces: dict[str, Piece],
    modules: dict[str, dict[str, Any]],
    *,
    max_shard_bytes: int,
    factors: dict[str, Piece] | None = None,
    new_head: bool = False,
    **changed: Any,
) -> Manifest:
    """Write weights, config and companions of an edited model into the job's folder, and return the manifest to be.

    Args:
        pieces: the weights by name; of a delta those that the model beneath does not have.
        modules: entries of the factored modules.
        factors: those that lie beside the weights.
        new_head: the model was given other outputs than it had.
        changed: fields of the manifest: ``ordered`` and ``delta``; ``kept_layers``, ``adapters`` and ``skipped`` where
            they are not those of the model's own.
    """
    known = model.manifest
    kept = {name: getattr(known, name) for name in ("kept_layers", "adapters", "skipped")} if known else {}
    groups = surgery.stored_names(model.module)
    files = artifact.write_weights(job.folder, pieces, job.id, max_shard_bytes)
    if factors:
        files |= artifact.write_weights(job.folder, factors, job.id, max_shard_bytes, artifact.FACTORS)
    step = {"id": job.id, "request": request, **({"new_head": True} if new_head else {})}
    record = Manifest(
        id=job.id,
        base=base,
        steps=[*(known.steps if known else []), step],
        files=files,
        parameters=parameters(model.module),
        modules=modules,
        tied={alias: first for first, names in groups.items() for alias in names[1:]},
        preprocess=model.preprocess,
        labels=model.labels,
        **kept | {name: value for name, value in changed.items() if value is not None},
    )
    if model.library != "python":
        config = dict(model.config) | (told_to_transformers(record) if model.library == "transformers" else {})
        files["config.json"] = artifact.write_json(job.folder / "config.json", config)
    for name, content in companions(model).items():
        files[name] = artifact.write_companion(job.folder / name, content)
    if known is not None and model.folder is not None:
        job.places = places(model)
        job.told = (artifact.read_result(model.folder).get("report") or {}).get("notes", [])
    record.write(job.folder)
    return record


def places(model: Model) -> dict[str, Any]:
    """Return where the artifacts of a model's chain were read, by id, its own the last; of no artifact nothing."""
    if model.manifest is None or model.folder is None:
        return {}
    return {**artifact.read_result(model.folder).get("places", {}), model.manifest.id: model.place}


def told_to_transformers(record: Manifest) -> dict[str, str | dict[str, Any]]:
    """Return what ``config.json`` says beside the base's own config, so that no gap is filled with random numbers."""
    if record.adapters or record.delta:
        return {quantization.LOCKED: quantization.UNBUILT}
    if not record.modules and not record.skipped:
        return {}
    told = quantization.entry(record.modules, record.skipped, record.tied)
    return {quantization.LOCKED: quantization.BUILT, quantization.KEY: told}


def verify(folder: Path, expected: Model) -> list[str]:
    """Compare a written folder, built afresh, with its model; return what could not be (ArtifactError: it differs)."""
    source = expected.source.names(str(folder), allow_code=True, base=expected.source.base, verify=False)
    written = replace(load(source), max_memory=expected.max_memory)
    theirs = surgery.tensors_of(written.module)
    for name, tensor in surgery.tensors_of(expected.module).items():
        if not torch.equal(tensor.cpu(), theirs[name]):
            raise differs(folder, f"tensor `{name}` is not what was written")
    try:
        batch = probe(expected)
        before = _outputs(expected, batch)
    except (PeftcError, *inputs.DOES_NOT_RUN) as error:
        why = f"no random input could be made up that the model takes ({reason_of(error)})"
        return [f"outputs were not compared, only tensors: {why}"]
    after = _outputs(written, batch)
    if not torch.isfinite(before).all():
        return ["the outputs on a random input are not finite, in the model itself; they were compared all the same"]
    gap = float((before - after).abs().max()) if before.numel() else 0.0
    if before.shape != after.shape or gap > CLOSE * float(before.abs().max()):
        raise differs(folder, f"its outputs on a random input differ by {gap:.2g}")
    return []


def differs(folder: Path, why: str) -> ArtifactError:
    """Return the refusal of a folder that is not what was written."""
    return ArtifactError(
        f"the artifact in `{folder}` does not reload as it was written",
        why=why,
        hint="this is a bug in peftc: please report it",
    )


def probe_outputs(model: Model) -> Tensor | None:
    """Return what a model gives for a random input, float32, on the CPU; None where it takes none."""
    try:
        return _outputs(model, probe(model))
    except (PeftcError, *inputs.DOES_NOT_RUN):
        return None


def _outputs(model: Model, batch: Any) -> Tensor:
    return outputs(one_dtype(model), batch).float().cpu()


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a result depends on beside the request: device, threads, versions."""
    import timm
    import transformers

    versions = {each.__name__: each.__version__ for each in (torch, timm, transformers)}
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": {"peftc": __version__, "python": platform.python_version(), **versions},
    }


def finish(job: Job, record: Manifest, report: Report, device: torch.device) -> None:
    """Write the result beside the manifest and let the folder appear, which the report then names."""
    report.told = job.told
    result = {"seconds": round(job.seconds, 3), **environment(device), "report": kept(report)}
    extra = {"asked": job.asked} if job.asked else {}
    job.finish(record, result | extra | ({"places": job.places} if job.places else {}))
    report.artifact = job.output


def kept(report: Report) -> dict[str, Any]:
    """Return what a result keeps of a report."""
    return {name: each for name, each in asdict(replace(report, artifact=None)).items() if name not in UNKEPT}


def keep_measured(report: Report, model: Model, question: Any) -> None:
    """Keep the figures of a report in ``result.json`` beside the artifact that they are of, where `compare` finds them.

    Another model, or one of the hub's cache, has no place for them. The same question (on what, where and against what)
    again replaces the answer.
    """
    if model.manifest is None or model.folder is None or model.hub is not None or processes.rank():
        return
    try:
        artifact.add_measured(model.folder, report.command, plain(question), plain(report.data))
    except OSError as error:
        report.notes.append(f"not kept in `{model.folder / artifact.RESULT}`: {str(error.strerror).lower()}")


def close(job: Job, record: Manifest, report: Report, expected: Model, device: torch.device) -> None:
    """Say how large the result is, compare it with the network that it was written from, and let it appear."""
    report.data["size"] = {"after": {"parameters": record.parameters, "bytes": record.weight_bytes}}
    report.warnings += verify(job.folder, expected)
    finish(job, record, report, device)


def already(job: Job, command: str) -> Report:
    """Return the report of a finished folder again (ArtifactError: an export lost it, and its manifest cannot tell)."""
    known = job.result().get("report", {})
    data = known.get("data", {})
    if job.record == MANIFEST:
        record = manifest.read(job.output)
        data.setdefault("size", {"after": {"parameters": record.parameters, "bytes": record.weight_bytes}})
    elif not data:
        what = f"`{job.output}` was written by the same request, and its `result.json` is gone"
        raise ArtifactError(what, hint="write it again: add `--overwrite`")
    return Report(
        command,
        data,
        artifact=job.output,
        tables=[Table(**table) for table in known.get("tables", [])],
        notes=[*known.get("notes", []), f"already done: `{job.output}` was written by the same request"],
        warnings=known.get("warnings", []),
    )


def output_folder(asked: str | Path | None, model: Model, command: str) -> Path:
    """Return the folder that was asked for, or ``<model>-<step>`` (UsageError: it is no folder of its own)."""
    folder = Path(asked).expanduser() if asked is not None else Path(f"{model.name}-{command}")
    if not folder.name or folder.name == "..":
        raise UsageError(f"`-o {asked}` is no folder to be made", hint="name a new one: `-o small`")
    return folder


def shard_bytes(text: str | int) -> int:
    """Read ``--max-shard-size``: bytes, or a number with a unit (UsageError: it is neither)."""
    try:
        return scaled(str(text), SIZES)
    except ValueError as error:
        raise UsageError(f"`--max-shard-size {text}` {error}", hint="write it as `--max-shard-size 5GB`") from None
