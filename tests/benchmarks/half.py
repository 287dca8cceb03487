"""What a training holds of weights that are stored in bfloat16, kept so under `--mixed-precision bf16`, and widened.

    OMP_NUM_THREADS=1 python tests/benchmarks/half.py [--out DIR] [--ways lora dora distill]

A Llama shape of 134 million parameters from a config, in `distill` the teacher of one of 63 million, learns for three
steps of four windows of 32 tokens. Each way runs in a process of its own, in turns; a widened one is made by leaving
`peftc.models.halved` out. The peak is of anonymous memory above that after the imports: weights that stay as they are
stored lie on their file, and are none. It takes three minutes on two cores, and 3 GB. Both have to learn the same, to
the bit.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SHAPE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
WORDS = 32_000
WAYS = {
    "lora": ["finetune", "--method", "lora", "--delta"],
    "dora": ["finetune", "--method", "dora", "--delta"],
    "distill": ["distill", "--teacher", "TEACHER", "--loss", "logits=1"],
}


def llama(folder: Path, layers: int) -> Path:
    """Write a Llama with random weights in bfloat16 and a tokenizer of few words; once."""
    if not (folder / "model.safetensors").is_file():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from tests.networks import LLAMA, save_transformers

        save_transformers(folder, "LlamaForCausalLM", **LLAMA)
        config = LlamaConfig(vocab_size=WORDS, tie_word_embeddings=False, **SHAPE | {"num_hidden_layers": layers})
        torch.manual_seed(0)
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="50GB")
    return folder


def worker(widened: bool, words: list[str]) -> None:
    """Run a command line and print the bytes of weights by kind, the peak of memory, and the losses."""
    import torch
    from typer.testing import CliRunner

    from peftc.cli.app import app
    from peftc.models import halved
    from peftc.steps import distill, finetune  # noqa: F401
    from peftc.training import imitation, journal, loop
    from tests.benchmarks.processes import Peak

    if widened:
        halved.suits = lambda network, recipe: False  # type: ignore[assignment]
    held: dict[str, int] = {}
    fit, check, teachers = loop.fit, imitation.Imitation.check, []

    def checked(self: Any) -> None:
        teachers.extend([] if self.teacher is None else [self.teacher.module])
        check(self)

    def counted(module: Any, *rest: Any, **named: Any) -> Any:
        for each in (module, *teachers):
            for parameter in each.parameters():
                kind = "learns" if parameter.requires_grad else str(parameter.dtype).removeprefix("torch.")
                held[kind] = held.get(kind, 0) + parameter.nbytes
        return fit(module, *rest, **named)

    imitation.Imitation.check, loop.fit = checked, counted  # type: ignore[method-assign, assignment]
    torch.zeros(1)
    peak = Peak()
    done = CliRunner().invoke(app, words)
    if done.exit_code:
        raise SystemExit(done.stderr or str(done.exception))
    log = (Path(words[-1]) / journal.LOG).read_text()
    print(json.dumps({"held": held, "peak": peak.added(), "log": log}))


def main() -> None:
    """Measure each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "peftc-half")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    from tests.conftest import TEXTS

    (asked.out / "story.txt").write_text(" ".join(TEXTS) * 40)
    model, student = llama(asked.out / "model", 12), llama(asked.out / "student", 2)
    print("| | weights | learn, MB | frozen bfloat16, MB | frozen float32, MB | peak, MB |\n|---|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory(dir=asked.out) as folder:
        for way in asked.ways:
            logs = []
            for widened in (True, False):
                words = [str(model) if word == "TEACHER" else word for word in WAYS[way]]
                words = [words[0], str(student if way == "distill" else model), *words[1:], "--data"]
                words += [str(asked.out / "story.txt"), *"--steps 3 --batch-size 4 --max-length 32".split()]
                words += [*"--held-out 0 --mixed-precision bf16 --device cpu -q -o".split(), f"{folder}/{way}{widened}"]
                line = [sys.executable, __file__, "--worker", str(int(widened)), *words]
                out = subprocess.run(line, env=os.environ, stdout=subprocess.PIPE, text=True, check=True).stdout
                found = json.loads(out.splitlines()[-1])
                sizes = [found["held"].get(kind, 0) / 1e6 for kind in ("learns", "bfloat16", "float32")]
                shown = " | ".join(f"{size:,.1f}" for size in sizes)
                print(
                    f"| {way} | {'widened' if widened else 'kept'} | {shown} | {found['peak'] / 1e6:,.0f} |", flush=True
                )
                logs.append(found["log"])
            assert logs[0] == logs[1], f"{way} learns otherwise"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(bool(int(sys.argv[2])), sys.argv[3:])
    else:
        main()
