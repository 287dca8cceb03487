"""The models of peftc in lm-eval: `peftc` is whatever peftc loads, and `hf` builds factors as well."""

import sys
from dataclasses import replace
from typing import Any

from peftc import processes
from peftc.cli import console
from peftc.errors import PeftcError, SourceError, UsageError, meant
from peftc.models.load import load
from peftc.models.place import runnable
from peftc.models.tokenizer import tokenizer_of
from peftc.runtimes import quantizer
from peftc.store.source import Source

NAME = "peftc"
# what lm-eval heeds where it is given a network; what else it takes would be ignored
HEEDED = (
    "add_bos_token backend batch_size chat_template_args enable_thinking logits_cache max_batch_size max_length "
    "mixed_precision_dtype prefix_token_id softmax_dtype think_end_token truncation"
).split()


class Loaded:
    """What stands before lm-eval's own class for networks of transformers: it hands that a network of peftc."""

    def __init__(
        self,
        pretrained: str,
        device: str = "auto",
        dtype: str = "auto",
        revision: str | None = None,
        base: str | None = None,
        trust_remote_code: bool = False,
        allow_code: bool = False,
        **how: Any,
    ) -> None:
        if unknown := sorted(how.keys() - set(HEEDED)):
            near = meant(unknown[0], HEEDED)
            hint = f"did you mean `{near[0]}`?" if near else "`--model hf` takes what lm-eval takes"
            raise UsageError(f"`--model {NAME}` does not take `{unknown[0]}`", hint=hint)
        if processes.size() > 1:
            why = "each of them would run every task"
            raise UsageError(f"`--model {NAME}` runs in one process", why=why, hint="use `--model hf` in a launch")
        source = Source(str(pretrained), revision=revision, base=base, trust_remote_code=trust_remote_code)
        model = load(replace(source, allow_code=allow_code))
        if not getattr(model.module, "can_generate", bool)():
            why = f"it is a {type(model.module).__name__}"
            raise SourceError(f"lm-eval asks language models that generate, and `{model.name}` is none", why=why)
        runnable(model, device=device, dtype=dtype)
        given: dict[str, Any] = {"pretrained": model.module, "tokenizer": tokenizer_of(model)}
        super().__init__(**given, **how)  # type: ignore[call-arg]


def register() -> None:
    """Let lm-eval know the model `peftc`, and transformers the factors; a second time changes nothing.

    Raises:
        UsageError: lm-eval is not installed.
    """
    try:
        from lm_eval.api.registry import model_registry, register_model
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        what = "`peftc.lm_eval` needs the package `lm-eval`"
        raise UsageError(what, why=str(error), hint="pip install 'lm-eval[hf]'") from error
    quantizer.register()
    if NAME not in model_registry:
        register_model(NAME)(type("Peftc", (Loaded, HFLM), {"__doc__": Loaded.__doc__}))


def main() -> None:
    """Run lm-eval's command line; a refusal of peftc ends it without a traceback."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except PeftcError as error:
        console.error(str(error))
        sys.exit(error.exit_code)
