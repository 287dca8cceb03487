"""Run a folder by the library of its network. Started as a script: there peftc cannot be imported, unless it has to be.

It reads one JSON object per line and answers each with one: ``load`` builds the network of a folder and tells the
shapes of its parameters, ``run`` computes a batch and writes what comes of it, ``again`` computes the last batch once
more, for those who time it.
"""

import json
import os
import sys
from importlib import import_module
from typing import Any

SENTENCES = "sentence_transformers"
MAIN = ("logits", "logits_per_image", "last_hidden_state")


def picked(value: Any) -> Any:
    """Return the tensor that matters of what a network returned, and what it is called."""
    for name in MAIN:
        if getattr(value, name, None) is not None:
            return getattr(value, name), name
    while not hasattr(value, "shape"):
        value = next(iter(value.values())) if isinstance(value, dict) else value[0]
    return value, "output"


def load(folder: str, library: str, architecture: str, trusted: bool) -> Any:
    """Return the network of a folder, as those load it who know nothing of peftc, with no tensor lacking or left over.

    Args:
        folder, library, architecture: of the network.
        trusted: the folder brings its own class, and `AutoModel` finds it.
    """
    if library == SENTENCES:
        return of_sentences(folder)
    if library == "timm":
        import timm

        network = timm.create_model(f"local-dir:{folder}", pretrained=True)
    else:
        import transformers

        made = transformers.AutoModel if trusted else getattr(transformers, architecture)
        more = {"trust_remote_code": True} if trusted else {}
        network, info = made.from_pretrained(folder, local_files_only=True, output_loading_info=True, **more)
        wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
        if wrong:
            raise SystemExit(f"from_pretrained does not find what it needs: {wrong[:4]}")
    return network.float().eval()


def of_sentences(folder: str) -> Any:
    """Return what sentence-transformers builds of a folder: it pools, and gives the vectors of the tokens."""
    import torch
    from sentence_transformers import SentenceTransformer

    whole = SentenceTransformer(folder, device="cpu", local_files_only=True)

    class Tokens(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole = whole

        def forward(self, **inputs: Any) -> Any:
            told = self.whole(dict(inputs))
            if not torch.isfinite(told["sentence_embedding"]).all():
                raise SystemExit("the vectors of sentences are not finite")
            return told["token_embeddings"]

    return Tokens().float().eval()


def main() -> None:
    """Serve the lines of standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import torch
    from safetensors.torch import load_file, save_file

    network: Any = None
    batch: dict[str, Any] = {}
    with torch.inference_mode():
        for line in sys.stdin:
            asked = json.loads(line)
            if asked["do"] == "load":
                torch.set_num_threads(asked["threads"])
                sys.path[:0] = asked["paths"]
                if not asked["imports"]:
                    sys.modules["peftc"] = None  # type: ignore[assignment]
                for name in asked["imports"]:
                    import_module(name)
                network = load(*(asked[name] for name in ("folder", "library", "architecture", "trusted")))
                if asked["padding"] is not None:
                    network.config.pad_token_id = asked["padding"]
            if asked["do"] == "run":
                batch = load_file(asked["inputs"])
            if asked["do"] != "load":
                value = network(**batch) if asked["named"] else network(next(iter(batch.values())))
            if asked["do"] == "run":
                save_file({"output": picked(value)[0].contiguous()}, asked["outputs"])
            shapes = [list(each.shape) for each in network.parameters()] if asked["do"] == "load" else []
            answers.write(json.dumps({"shapes": shapes}) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
