"""Factors for ``from_pretrained`` of transformers, by its door for quantized weights.

Nothing is quantized: once the network stands and is filled it is one of plain linears, embeddings and convolutions, and
says so, which lets it train, change its dtype and carry adapters as any other does.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from peftc.errors import SourceError, UsageError, WeightError, named
from peftc.nn import surgery
from peftc.store import artifact, documents, quantization


def register() -> None:
    """Let transformers know the factors of peftc; a second time changes nothing."""
    if quantization.METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(quantization.METHOD)(FactorsConfig)
        register_quantizer(quantization.METHOD)(FactorsQuantizer)


class FactorsConfig(QuantizationConfigMixin):
    """What ``config.json`` says of factors (SourceError: it says more than is understood)."""

    def __init__(self, **told: Any) -> None:
        quantization.refuse_unknown(told)
        self.quant_method = told["quant_method"]
        self.modules, self.skipped, self.tied = (told.get(name, {}) for name in ("modules", "skipped", "tied"))

    def to_dict(self) -> dict[str, Any]:
        """Return it as it was read."""
        return quantization.entry(self.modules, self.skipped, self.tied)

    def get(self, name: str, default: Any = None) -> Any:
        """Return one of the values, as from the dictionary that transformers expects of a config it has not read."""
        return self.to_dict().get(name, default)


class FactorsQuantizer(HfQuantizer):
    """Puts low-rank modules into a network before transformers fills it."""

    requires_calibration = True  # it factors nothing itself: what is loaded has to be factored

    def update_attn_implementation(self, config: Any) -> Any:
        """Lift the lock: this is called before transformers looks for a file of that name."""
        if hasattr(config, quantization.LOCKED):
            delattr(config, quantization.LOCKED)
        return config

    update_tp_plan = update_attn_implementation  # what earlier versions call in its place

    def is_serializable(self) -> bool:
        """Return whether ``save_pretrained`` may write it."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether it may learn."""
        return True

    def preprocess_model(self, model: PreTrainedModel, dtype: Any = None, **how: Any) -> None:
        """Replace modules of a network whose parameters are on the meta device."""
        super().preprocess_model(model, dtype=dtype, **how)
        told = self.quantization_config
        here = _names_in(model, {**told.modules, **told.skipped})
        edits = {here[name]: dict(edit) for name, edit in told.modules.items() if name in here}
        for edit in edits.values():
            if "shares" in edit:
                edit["shares"] = here.get(edit["shares"], "")
        known = _known_ties(model)
        surgery.skip(model, {here[name]: lengths for name, lengths in told.skipped.items() if name in here})
        surgery.apply_edits(model, edits)
        _tie(model, known, edits, {_moved(a, here): _moved(b, here) for a, b in told.tied.items()})
        factors = {f"{name}.{part}.weight" for name in edits for part in ("up", "down", "core")}
        model.tie_weights = partial(_tie_weights, model, factors)
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        if not hasattr(HfQuantizer, "get_new_dtype"):  # then weights of a changed name would keep the dtype of the file
            self.pre_quantized = False

    def postprocess_model(self, model: PreTrainedModel, **how: Any) -> None:
        """Take what says that a filled network is quantized off it."""
        super().postprocess_model(model, **how)
        # earlier versions put what a file holds into a network of quantized weights whatever its shape
        wrong = [name for name, parameter in model.named_parameters() if parameter.shape != self.shapes[name]]
        if wrong:
            what = f"{named(wrong, 4)} of the weights have another shape than config.json says"
            raise WeightError(what, hint="they belong to another model: fetch the folder again, as a whole")
        del model.tie_weights, model.hf_quantizer, model.quantization_method
        model.is_quantized = False
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = False
        model.save_pretrained = MethodType(save_pretrained, model)


def _names_in(model: PreTrainedModel, names: Mapping[str, Any]) -> dict[str, str]:
    """Return name in ``config.json`` -> name in a network of this class, which may lack the head or have one more.

    Raises:
        SourceError: the class is the one that was written, and lacks a module; or it has none of them.
    """
    there, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."
    found = {}
    for name in names:
        choices = (name, prefix + name, name.removeprefix(prefix))
        here = next((choice for choice in choices if choice in there), None)
        if here is not None:
            found[name] = here
    lost = [name for name in names if name not in found]
    if lost and (not found or type(model).__name__ in (model.config.architectures or [])):
        what = f"config.json names the factors of {named(lost, 4)}, which `{type(model).__name__}` does not have"
        why = f"it was written with a version that calls modules otherwise than transformers {transformers.__version__}"
        raise SourceError(what, why=why, hint="install the one that wrote it: its card, or `result.json`, says which")
    return found


def _moved(tensor: str, here: Mapping[str, str]) -> str:
    """Return the name in the network of a tensor of a factor: of ``NAME.up.weight``."""
    path, part, leaf = tensor.rsplit(".", 2)
    return f"{here.get(path, path)}.{part}.{leaf}"


def _known_ties(model: PreTrainedModel) -> dict[str, dict[str, str]]:
    """Return for each network within a network the ties that its class declares: alias -> name."""
    networks = {path: each for path, each in model.named_modules() if isinstance(each, PreTrainedModel)}
    return {path: each.get_expanded_tied_weights_keys() for path, each in networks.items()}


def _tie(
    model: PreTrainedModel, known: Mapping[str, dict[str, str]], edits: Mapping[str, Any], tied: Mapping[str, str]
) -> None:
    """Declare the ties that hold now: those of the classes whose two weights are still there, and those of factors."""
    shared = {
        f"{name}.down.weight": f"{edit['shares']}.down.weight"
        for name, edit in edits.items()
        if edit.get("shares", name) != name
    }
    there = surgery.tensors_of(model)
    ours = {alias: name for alias, name in {**tied, **shared}.items() if alias in there and name in there}
    every: dict[str, str] = {}
    for path, ties in known.items():
        start = f"{path}." if path else ""
        left = {a: b for a, b in ties.items() if start + a in there and start + b in there}
        model.get_submodule(path)._tied_weights_keys = left if path else {**left, **ours}
        every |= {start + a: start + b for a, b in left.items()}
    model.all_tied_weights_keys = {**every, **ours}


def _tie_weights(model: PreTrainedModel, factors: set[str], missing_keys: set[str] | None = None, **how: Any) -> None:
    """Tie, and refuse factors that the files lack: transformers would draw them at random and go on."""
    type(model).tie_weights(model, missing_keys=missing_keys, **how)
    if lost := sorted(factors & (missing_keys or set())):
        hint = "the download is not whole, or the folder is damaged: fetch it again"
        raise WeightError(f"the weights lack {named(lost, 4)}, which config.json names", hint=hint)


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    **how: Any,
) -> None:
    """Save as transformers does, and lock the folder: it forgets the lock, and the next to load may know no factors.

    Raises:
        UsageError: it is to be pushed at once, which would be before it is locked.
    """
    if push_to_hub:
        what = "`save_pretrained(push_to_hub=True)` would push a folder that is not locked yet"
        raise UsageError(what, hint='`model.push_to_hub("OWNER/NAME")`')
    type(model).save_pretrained(model, save_directory, is_main_process, state_dict, **how)
    path = Path(save_directory, "config.json")
    if is_main_process and path.is_file() and quantization.is_ours(config := documents.read_json(path)):
        artifact.write_json(path, {**config, quantization.LOCKED: quantization.BUILT})
