"""Which modules may be factored, and for every other one the reason why not.

PELA's eligibility is the default (papers notes, section 1.2): heads, norms, embeddings, the patch embedding and outputs
narrower than ten stay dense unless included. Patterns match whole components of dotted names.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from peftc.errors import UsageError
from peftc.models import families
from peftc.models.model import Model
from peftc.nn import forms, lowrank, surgery
from peftc.nn.adapted import Adapted
from peftc.plans.plan import Target

NARROW = 10
SKIPPED = "skipped as asked"
LOW_RANK = (lowrank.LowRankLinear, lowrank.LowRankEmbedding, lowrank.LowRankConv2d)
READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # their fused paths bypass the module's forward


def find_targets(
    model: Model, *, conv_method: str, include: Sequence[str] = (), skip: Sequence[str] = ()
) -> tuple[dict[str, Target], dict[str, str]]:
    """Return the eligible modules, and name -> reason for each other one of their kinds (UsageError: a bad pattern)."""
    modules = {name: module for name, module in model.module.named_modules() if forms.kind_of(module)}
    include, skip = patterns_for(modules, include, skip)
    defaults = kept_dense(model, modules, families.skips(model.library, model.architecture))
    for name, module in modules.items():
        if isinstance(module, nn.Linear) and name not in defaults:
            rules = (why for pattern, why in families.LINEAR_ONLY.items() if families.matches(name, pattern))
            if why := next(rules, f"fewer than {NARROW} outputs" if module.out_features < NARROW else None):
                defaults[name] = why
    found: dict[str, Target] = {}
    reasons: dict[str, str] = {}
    taken: set[int] = set()
    for name, module in modules.items():
        impossible = _impossible(model.module, name, module)
        included = families.matches(name, *include)
        if impossible:
            reasons[name] = impossible
        elif families.matches(name, *skip):
            reasons[name] = SKIPPED
        elif name in defaults and not included:
            reasons[name] = defaults[name]
        elif id(module.weight) in taken:
            continue
        elif bound := _bound(model.module, name, module, skip):
            reasons[name] = bound
        else:
            same = [n for n, other in modules.items() if n != name and other.weight is module.weight]
            one_matrix = not isinstance(module, nn.Conv2d) or module.kernel_size == (1, 1)
            form = str(forms.kind_of(module)) if one_matrix else conv_method
            found[name] = Target(name, form, tuple(module.weight.shape), tuple(same))
            taken.add(id(module.weight))
        if included and impossible:
            what = f"cannot factor `{name}`, which `--include` names"
            raise UsageError(what, why=impossible, hint="narrow the pattern, or add `--skip`")
    for target in found.values():
        for alias in target.aliases:
            reasons.pop(alias, None)
    return found, reasons


def spared(model: Model, reasons: Mapping[str, str]) -> list[str]:
    """Return the largest modules that stay dense only because nobody includes them, largest first."""
    known = {name: each.entries for name, each in every_weight(model).items() if reasons.get(name, SKIPPED) != SKIPPED}

    def is_open(name: str) -> bool:
        module = model.module.get_submodule(name)
        return not (_impossible(model.module, name, module) or _bound(model.module, name, module, ()))

    found = sorted(filter(is_open, known), key=lambda name: -known[name])
    return [name for name in found if 10 * known[name] >= known[found[0]]][:3]


def patterns_for(modules: Mapping[str, Any], include: Sequence[str], skip: Sequence[str]) -> list[list[str]]:
    """Return the patterns of ``--include`` and ``--skip``, one or several each (UsageError: one matches no module)."""
    found = [[each] if isinstance(each, str) else list(each) for each in (include, skip)]
    for option, patterns in zip(("--include", "--skip"), found, strict=True):
        for pattern in patterns:
            if not any(families.matches(name, pattern) for name in modules):
                why = "patterns match whole parts of dotted names, as `head`, `blocks.0`, `*.fc1`"
                hint = f"names look like `{next(filter(None, modules), 'nothing: no module has a weight')}`"
                raise UsageError(f"`{option} {pattern}` matches no module", why=why, hint=hint)
    return found


def every_weight(model: Model) -> dict[str, Target]:
    """Return every Linear, Conv and Embedding weight as a target, eligible or not; a shared one once."""
    found: dict[str, Target] = {}
    seen: set[int] = set()
    for name, module in model.module.named_modules():
        form = forms.kind_of(module)
        if form and id(module.weight) not in seen and module.weight.is_floating_point():  # type: ignore[union-attr, operator]
            seen.add(id(module.weight))
            found[name] = Target(name, form, tuple(module.weight.shape))  # type: ignore[arg-type]
    return found


def _bound(network: nn.Module, name: str, module: Any, skip: Sequence[str]) -> str | None:
    """Return why a weight that others share has to stay dense, or None."""
    weight = f"{name}.weight"
    group = next((names for names in surgery.stored_names(network).values() if weight in names), [])
    for alias in group:
        if alias == weight:
            continue
        other = alias.removesuffix(".weight")
        owner = network.get_submodule(alias.rpartition(".")[0])
        if not (alias.endswith(".weight") and forms.kind_of(owner)):
            return f"its weight is also `{alias}`"
        if families.matches(other, *skip):
            return f"it shares its weight with `{other}`, which is skipped as asked"
        if why := _impossible(network, other, owner):
            return f"it shares its weight with `{other}`: {why}"
    return None


def _impossible(network: nn.Module, name: str, module: Any) -> str | None:
    """Return why a module cannot be factored at all, or None."""
    path = name.split(".")
    parents = [network.get_submodule(".".join(path[:depth])) for depth in range(len(path))]
    if any(isinstance(parent, LOW_RANK) for parent in parents):
        return "already factored"
    if any(isinstance(parent, Adapted) for parent in parents):
        return "beside or in an update that cannot be merged"
    if any(isinstance(parent, READS_WEIGHTS) for parent in parents[-1:]):
        return f"its parent `{type(parents[-1]).__name__}` reads the weight directly"
    if isinstance(module.weight, nn.parameter.UninitializedParameter):
        return "it has no weight before its first call"
    if isinstance(module, nn.Conv1d | nn.Conv3d):
        return f"no method here factors a {type(module).__name__}"
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return "depthwise or grouped convolution"
    if parametrize.is_parametrized(module) or hasattr(module, "weight_g"):
        return "its weight is computed by a parametrization"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "its rows are renormalised (max_norm)"
    if not module.weight.is_floating_point():
        return f"its weight is {module.weight.dtype}, already quantized"
    if not forms.computes_plainly(module):
        return f"its class `{type(module).__name__}` changes how the weight is used"
    return None


def kept_dense(model: Model, modules: Mapping[str, Any], patterns: Mapping[str, str]) -> dict[str, str]:
    """Return name -> reason for modules that are left alone unless included: by pattern, and by what they are."""
    reasons: dict[str, str] = {}
    outputs = heads(model, modules)
    stem = next((name for name, module in modules.items() if isinstance(module, nn.Conv2d)), None)
    for name, module in modules.items():
        reason = next((why for pattern, why in patterns.items() if families.matches(name, pattern)), None)
        if isinstance(module, nn.Embedding):
            reason = "embedding"
        elif name in outputs:
            reason = "output head"
        elif name == stem:
            reason = "stem"
        if reason:
            reasons[name] = reason
    return reasons


def heads(model: Model, modules: Mapping[str, Any]) -> set[str]:
    """Return the modules that turn features into outputs."""
    if model.library == "timm":
        names = (model.config.get("pretrained_cfg") or {}).get("classifier") or ()
        asked = model.module.get_classifier() if hasattr(model.module, "get_classifier") else ()
        asked = asked if isinstance(asked, tuple) else (asked,)
        found = {name for name, module in modules.items() if any(module is head for head in asked)}
        return found | set((names,) if isinstance(names, str) else names)
    if model.library == "transformers":
        network: Any = model.module
        body = getattr(network, "base_model_prefix", "")
        outside = set() if not hasattr(network, body or "\0") else {n for n in modules if not n.startswith(f"{body}.")}
        output = network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
        return outside | {name for name, module in modules.items() if module is output}
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    return set(linears[-1:])
