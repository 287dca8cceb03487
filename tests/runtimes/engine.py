"""What vLLM makes of folders. `test_vllm.py` runs this with the Python of another environment, which has no pytest.

    python engine.py JOBS TOLD

JOBS is JSON: name -> folder, prompts (token ids) and how to start the engine. TOLD is the answer: tokens, or an error.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

ENGINE: dict[str, Any] = {
    "dtype": "float32",  # in bfloat16 the dense model itself differs from that of transformers
    "enforce_eager": True,
    "max_model_len": 64,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 128,
    "seed": 0,
    "disable_log_stats": True,
    "skip_tokenizer_init": True,
}


def answer(folder: str, prompts: list[list[int]], length: int, how: dict[str, Any]) -> dict[str, Any]:
    """Load a folder, and continue prompts greedily."""
    from vllm import LLM, SamplingParams

    # vLLM gives each worker a memory node of its own, if it is not told where they run
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(how.get("tensor_parallel_size", 1))))
    try:
        engine = LLM(model=folder, **ENGINE, **how)
    except Exception as error:  # noqa: BLE001  each has a kind of its own, and what it says is looked at
        return {"error": f"{type(error).__name__}: {error}"}
    chosen = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": each} for each in prompts]
    tokens = [list(each.outputs[0].token_ids) for each in engine.generate(asked, chosen, use_tqdm=False)]
    engine.llm_engine.engine_core.shutdown()
    del engine
    gc.collect()
    return {"tokens": tokens}


def main() -> None:
    """Do all jobs in this process."""
    jobs = json.loads(Path(sys.argv[1]).read_text())
    told = {}
    for name, job in jobs.items():
        told[name] = answer(**job)
        Path(sys.argv[2]).write_text(json.dumps(told))


if __name__ == "__main__":  # tensor parallel starts processes that import this
    main()
