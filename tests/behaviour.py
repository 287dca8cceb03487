"""What peftc writes and says, as digests, to be compared before and after a change that is to change neither.

    python -m tests.behaviour before.json     # some minutes of one core
    python -m tests.behaviour after.json && diff before.json after.json

It runs a chain, one case of each method and of each format, and command lines that are refused, all on small models
with fixed seeds and in an empty folder. `result.json` and logs hold times and are left out; tables with times as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

UNSTABLE = ("result.json", "log.jsonl", "chain.json", "lock")  # and a program of torch.export names lines of code
DIGITS = "--data sklearn:digits"
FEW = f"{DIGITS} --num-samples 64 --batch-size 16 --steps 4 --held-out 0.25 --evaluations 1"
CHAIN = f"""
analyze vit {DIGITS} --ratio 0.75 --plan plan.json --calibration-samples 64
decompose vit --plan plan.json {DIGITS} --calibration-samples 64 -o 1-small
distill 1-small {FEW} -o 2-healed
finetune 2-healed {FEW} -o 3-tuned
prune-layers 3-tuned {DIGITS} --num-samples 100 --keep 3 -o 4-shallow
finetune 4-shallow {FEW} --delta -o 5-delta
merge 5-delta -o 5-release
calibrate vit {DIGITS} --calibration-samples 32 -o stats
decompose vit --statistics stats --ratio 0.4 -o third
decompose vit --keep-all-ranks -o all
truncate all --ratio 0.4 -o cut
decompose bert --ratio 0.6 --joint --method svd -o bert-joint
decompose llama --ratio 0.6 --data story.txt --max-length 16 --calibration-samples 8 -o llama-small
prune-layers llama --score block-influence --data story.txt --max-length 16 --num-samples 8 --keep 1 -o llama-one
distill 1-small {FEW} --loss features=1,logits=0.5 --ema 0.9 --augment crop -o 2-other
finetune net --data photos --steps 2 --held-out 0 --method full --head new -o net-full
evaluate 5-release {DIGITS} --against base --json
evaluate 1-small {DIGITS} --against vit --num-samples 50
evaluate llama-small --data story.txt --max-length 16 --against base
show 5-release --commands
show 5-release --json
compare 1-small 2-healed 3-tuned 4-shallow
methods --json
"""
EACH = {
    "decompose": f"decompose vit --ratio 0.6 --method NAME {DIGITS} --calibration-samples 32 -o svd-NAME",
    "decompose_conv": "decompose net --ratio 0.5 --method svd --conv-method NAME -o conv-NAME",
    "loss": f"distill 1-small {FEW} --loss NAME=1 -o loss-NAME",
    "importance": f"prune-layers vit --keep 3 {DIGITS} --num-samples 60 --score NAME -o score-NAME",
    "adapter": f"finetune 1-small {FEW} --method NAME --head keep -o tuned-NAME",
}
FORMATS = (
    "extract-lora net-full net --rank 2 -o 6-extracted",
    "export vit --format timm -o plain", "export 1-small --format safetensors -o tensors",
    "export bert --format hf -o plain-bert", "export bert-joint --format hf-code -o code",
    "export 5-delta --format peft -o adapter", "export 1-small --format torch-export -o graph --rounds 5",
    "export 1-small --format onnx -o net-onnx --rounds 5", "export 1-small --dense --format timm -o multiplied",
)  # fmt: skip
REFUSALS = """
decompose
decompose vit
decompose nowhere --ratio 0.5
decompose vit --ratio 2
decompose vit --ratio 0.5 --rank 3
decompose vit --ratio 0.5 --method nothing
decompose vit --ratio 0.5 --max-drop 0.1
decompose vit --ratio 0.5 --set a=b
decompose vit --ratio 0.5 --allocation nothing
decompose vit --ratio 0.5 --device cuda:9
decompose vit --ratio 0.5 --max-shard-size nothing
decompose vit --plan nowhere.json
decompose vit --ratio 0.5 -o photos
decompose vit --ratio 0.5 -o 1-small
decompose 1-small --ratio 0.000001 -o no
decompose vit --speedup 0.5
decompose vit --statistics photos --ratio 0.5
decompose vit --ratio 0.5 --sequential
decompose vit --rank-multiple 0 --ratio 0.5
decompose vit --ratio 0.5 --include nothing.*
distill vit --data sklearn:digits
distill 1-small
distill 1-small --data nowhere.csv
distill 1-small --data sklearn:digits --loss nothing=1
distill 1-small --data sklearn:digits --loss features=x
distill 1-small --data sklearn:digits --steps 1 --epochs 1
distill 1-small --data sklearn:digits --augment nothing
distill 1-small --data sklearn:digits --teacher nowhere
finetune 1-small --data sklearn:digits --method nothing
finetune 1-small --data sklearn:digits --head nothing
finetune 1-small --data sklearn:digits --steps 0
finetune 1-small --data sklearn:digits --held-out 2
finetune bert --data sklearn:digits
finetune 1-small --data sklearn:nothing
finetune 1-small --data sklearn:digits@nothing
prune-layers vit
prune-layers vit --data sklearn:digits --keep 0
prune-layers vit --data sklearn:digits --keep 9
prune-layers vit --data sklearn:digits --score nothing --keep 2
prune-layers net --data photos --keep 1
truncate vit --ratio 0.5
truncate all --ratio 7
merge vit
extract-lora vit nowhere
extract-lora vit bert
calibrate vit
calibrate vit --data sklearn:digits --method svd
export vit
export vit --format nothing
export vit --format hf
export 1-small --format timm
export vit --format peft
evaluate vit
evaluate vit --data nowhere
evaluate vit --data sklearn:digits --task nothing
evaluate vit --data sklearn:digits --against base
evaluate vit --data sklearn:digits --max-drop 0.1
evaluate bert --data sklearn:digits
evaluate llama --data generated:0
bench vit --rounds 1
bench vit --against nowhere
bench vit --min-speedup 2
show nowhere
show vit
compare
compare vit
report
run
run nowhere.toml
methods nothing
init nowhere
nothing
"""


def main(target: str) -> None:
    """Write what peftc does as JSON."""
    target = str(Path(target).resolve())
    runner = CliRunner()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        _models()
        said = [_run(runner, line) for line in _lines(CHAIN)]
        from peftc.methods.registry import METHODS

        for kind, line in EACH.items():
            said += [_run(runner, line.replace("NAME", name.replace("_", "-"))) for name in METHODS[kind]]
        said += [_run(runner, line) for line in FORMATS]
        refused = [_run(runner, line) for line in _lines(REFUSALS)]
        said.append(_run(runner, f"init vit {DIGITS}"))  # the last: what it writes changes the others
        found = {"files": _files(Path(folder)), "said": said, "refused": refused}
    Path(target).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    failed = [one["line"] for one in said if one["code"] not in (0, 3)]
    done = [one["line"] for one in refused if one["code"] not in (1, 2)]
    print(
        f"{len(found['files'])} files, {len(said)} runs, {len(refused)} refusals; failed: {failed}; not refused: {done}"
    )


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line]


def _models() -> None:
    import random

    from PIL import Image

    from tests import conftest

    Path("vit").mkdir()
    conftest.save_timm(Path("vit"), "vit_tiny_patch16_224", {**conftest.VIT, "num_classes": 10}, conftest.INPUT)
    Path("net").mkdir()
    conftest.save_timm(Path("net"), "resnet10t", {"num_classes": 5}, {"input_size": [3, 64, 64]})
    for name, kind, config in (
        ("bert", "BertForSequenceClassification", conftest.BERT),
        ("llama", "LlamaForCausalLM", conftest.LLAMA),
    ):
        Path(name).mkdir()
        conftest.save_transformers(Path(name), kind, **config)
    for name in ("cat", "dog"):
        Path("photos", name).mkdir(parents=True)
        for shade in range(8):
            Image.new("RGB", (64, 64), (shade * 30, 90, 200 if name == "cat" else 20)).save(
                f"photos/{name}/{shade}.png"
            )
    draw = random.Random(0)
    Path("story.txt").write_text("\n".join(" ".join(draw.choice(conftest.WORDS) for _ in range(12)) for _ in range(40)))


def _run(runner: CliRunner, line: str) -> dict[str, Any]:
    from peftc.cli.app import app

    result = runner.invoke(app, line.split(), env={"COLUMNS": "200"})
    has_times = line.startswith(("bench", "export"))
    said = "" if has_times else "\n".join(map(_timeless, [result.stdout, result.stderr]))
    return {"line": line, "code": result.exit_code, "said": said.replace(str(Path.cwd()), "HERE")}


def _timeless(text: str) -> str:
    """Return a text without the figures that another run would not give."""
    return re.sub(r"[\d.,]+ (s|min|MB of the process)\b", "SOME \\1", text)


def _files(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in UNSTABLE and path.parent.name != "graph":
            content = path.read_bytes()
            found[str(path.relative_to(folder))] = hashlib.sha256(content.replace(bytes(folder), b"")).hexdigest()
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
