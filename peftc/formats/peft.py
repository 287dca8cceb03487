"""An adapter in the format of Hugging Face peft: ``PeftModel.from_pretrained`` puts it on the base."""

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from peftc.errors import ExportError
from peftc.formats import exported
from peftc.formats.exported import Exported, Inputs
from peftc.methods import registry
from peftc.models import delta, interchange
from peftc.models.from_peft import TENSORS
from peftc.models.interchange import Adapter
from peftc.models.model import Model, detached
from peftc.nn import surgery
from peftc.nn.adapted import Adapted, adapted_modules
from peftc.nn.forms import form_of
from peftc.store import artifact
from peftc.store.source import ADAPTER

UNMERGED = True  # the updates are what is written
LIBRARY = "peft"
USE = """\
import peft

base = ...  # the model that the updates were made for
network = peft.PeftModel.from_pretrained(base, "{repo}")
"""


def peft(model: Model, example: Inputs, folder: Path) -> Exported:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` of a delta of `lora`, `rslora` or `dora`."""
    modules = adapted_modules(model.module)
    if not modules or model.manifest is None:
        why = "nothing of it lies beside its weights"
        hint = "write some beside its weights: `peftc finetune MODEL --data DATA --delta -o tuned`"
        raise ExportError(f"`{model.name}` has no updates to export", why=why, hint=hint)
    adapters = {name: _adapter(model.manifest.adapters[name], name, each) for name, each in modules.items()}
    known = surgery.tensors_of(model.module)
    held = delta.held(model)
    whole = {name.rpartition(".")[0] for name in held}  # what is no update peft takes module by module, biases included
    names = held | {name for name in known if ".update." in name or name.rpartition(".")[0] in whole}
    source = model.manifest.delta.get("source", {})
    config, tensors = interchange.to_peft(adapters, {name: known[name] for name in sorted(names)}, source.get("spec"))
    artifact.write_json(folder / ADAPTER, config)
    whole = save({name: each.contiguous() for name, each in tensors.items()}, {"format": "pt"})
    (folder / TENSORS).write_bytes(whole)  # as the user's mask has it: `save_file` makes it the owner's alone
    return _loaded(model, folder, config)


def _adapter(entry: dict[str, Any], name: str, module: Adapted) -> Adapter:
    """Return how a module is adapted, where peft computes the same on it."""
    base: Any = module.base
    if why := interchange.why_not(base):
        hint = "export the whole model: `--format safetensors`"
        raise ExportError(f"the update of `{name}` cannot be exported as `peft`", why=why, hint=hint)
    function = registry.find("adapter", entry["method"], "method")
    settings = registry.settings_of(function) | entry["settings"]
    window = tuple(getattr(base, "kernel_size", ()))
    rank, alpha = settings.get("rank", 0), float(settings.get("alpha", 0.0))
    return Adapter(entry["method"], rank, alpha, float(settings.get("dropout", 0.0)), form_of(base) or "", window)


def _loaded(model: Model, folder: Path, config: dict[str, Any]) -> Exported:
    """Put what was written on the base, by peft itself."""
    try:
        import peft as library
    except ImportError:
        raise ExportError("peft is not installed", why="it loads what is exported", hint="pip install peft") from None
    base = detached(model.module)
    for module in adapted_modules(base).values():
        surgery.replace(base, module, module.base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = library.PeftModel.from_pretrained(base, folder).eval()
    runs = Model(network, model.source, model.library, model.config, model.base, model.name)

    def run(inputs: Inputs) -> Tensor:
        return exported.computed(runs, inputs)[0]

    is_named = config["modules_to_save"] and model.labels
    notes = [f"the base needs outputs for {len(model.labels or [])} classes before peft loads it"] if is_named else []
    about = {"load": "peft.PeftModel.from_pretrained(base, folder)", "base": config["base_model_name_or_path"]}
    runtime = f"peft {library.__version__}, torch {torch.__version__}"
    return Exported(runtime, run, lambda inputs: lambda: run(inputs), notes=notes, about=about)
