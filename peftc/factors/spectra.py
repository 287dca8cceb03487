"""From eligible modules to their spectra, and from spectra and a budget to ranks: shared by analyze and decompose."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from peftc.calibration import statistics
from peftc.calibration.collection import Statistics
from peftc.errors import MethodError, UsageError, one_of
from peftc.factors import joint
from peftc.methods import registry
from peftc.methods.spectrum import Solution, Spectrum
from peftc.models.model import Model
from peftc.nn import lowrank
from peftc.plans.plan import Target


@dataclass(frozen=True)
class Factorizer:
    """The chosen methods with their settings, applied to one weight after another.

    Attributes:
        name, decompose, settings, needs: of the matrix method.
        statistics: where they are; None before the calibration, and for a method without needs.
        correct_bias: let the bias of a module make up for the mean of its inputs, where it has one.
    """

    name: str
    decompose: Callable[..., Spectrum]
    settings: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    statistics: Statistics | None = None
    correct_bias: bool = True

    def request(self) -> dict[str, Any]:
        """Return what a request says of how to factor."""
        corrects = {"bias_correction": self.correct_bias} if self.needs else {}
        return {"method": self.name, "settings": dict(self.settings), **corrects}

    def __call__(self, weight: Tensor, target: Target) -> Spectrum:
        """Decompose a weight, float32 or float64, in the target's form."""
        given: dict[str, Any] = dict(self.settings)
        if self.needs:
            assert self.statistics is not None
            found = joint.statistics_of(self.statistics, target, weight.device)
            given |= found.of(self.needs)
            gram = given.get("output_gradient_gram")
            if target.form == "spatial" and gram is not None and gram.ndim:  # every column of the kernel meets it
                given["output_gradient_gram"] = torch.kron(gram, torch.eye(target.shape[3]).to(gram))
            if self.statistics.is_lookup(target.name):
                flat = lowrank.matrix(weight, target.form)
                return transposed(self.decompose(flat.T.contiguous(), **given), flat)
        decompose = functools.partial(self.decompose, **given)
        if target.form not in registry.METHODS["decompose_conv"]:
            return decompose(lowrank.matrix(weight, target.form).contiguous())
        return registry.find("decompose_conv", target.form, "--conv-method")(weight.contiguous(), decompose)


def transposed(spectrum: Spectrum, weight: Tensor) -> Spectrum:
    """Return the spectrum of a weight, given that of its transpose."""

    def turned(weight: Tensor, vectors: bool, rung: str) -> Solution | None:
        found = spectrum.rungs[rung](weight.T.contiguous(), vectors)
        if found is None:
            return None
        up, down = (None if part is None else part.T for part in (found.down, found.up))
        return replace(found, up=up, down=down)

    return Spectrum(weight, {rung: functools.partial(turned, rung=rung) for rung in spectrum.rungs})


def factorizer(
    method: str,
    conv_method: str,
    settings: Mapping[str, Any] | None,
    *,
    with_data: bool = False,
    correct_bias: bool = True,
) -> Factorizer:
    """Find the methods by name and check the settings; UsageError where they or the data do not fit.

    Args:
        method: ``auto`` is `kfac` where there are statistics, and `svd` where there are none.
        conv_method: the form of k x k convolutions.
        settings: of the method.
        with_data: whether a calibration set or its statistics were given.
        correct_bias: as for `Factorizer`.
    """
    chosen = method if method != "auto" else "kfac" if with_data else "svd"
    function = registry.find("decompose", chosen, "--method")
    one_of("--conv-method", conv_method, list(registry.METHODS["decompose_conv"]))  # each is a form of `nn.lowrank`
    needs = tuple(registry.needs_of(function))
    unknown = [name for name in needs if name not in statistics.STATISTICS]
    if unknown:
        why = f"calibration collects {', '.join(statistics.STATISTICS)}"
        raise MethodError(f"`{chosen}` asks for `{unknown[0]}`", why=why)
    if needs and not with_data:
        hint = "name one: `--data DATA`, or collected statistics: `--statistics DIR`"
        raise UsageError(f"`--method {chosen}` needs {', '.join(needs)} of a calibration set", hint=hint)
    return Factorizer(
        chosen, function, registry.with_settings(function, chosen, settings or {}), needs, correct_bias=correct_bias
    )


def weight_of(model: Model, target: Target, device: torch.device) -> Tensor:
    """Return a module's weight on a device, as float32 unless it is stored as float64."""
    if target.members:
        return joint.stacked(model, target, device)
    weight = model.module.get_submodule(target.name).weight.detach()
    return weight.to(device, weight.dtype if weight.dtype == torch.float64 else torch.float32)  # type: ignore[union-attr]
