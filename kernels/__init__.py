"""Fast forms of networks: the values of the plain modules, which define them, in less time and memory."""

from __future__ import annotations

from types import NoneType
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from binary_ops import RPReLU
from kernels.fused import FUSED
from kernels.fused_search import FUSED_SEARCH
from kernels.library import chosen_path, unavailable
from kernels.native import NATIVE
from kernels.native_search import NATIVE_SEARCH
from model_search import Supernet
from search_space import PRIMITIVES
from utils import InputError

Module = TypeVar("Module", bound=nn.Module)

FORMS: dict[str, dict[type, type]] = {
    "plain": {},
    "torch": {**FUSED, **FUSED_SEARCH},
    "native": {**FUSED, **NATIVE, **NATIVE_SEARCH},
}
"""By name of a form, which class takes the place of which: `plain` is the definitions themselves, `torch` has
fewer and larger tensor operations, `native` has C for what takes time, on a CPU, in float32 or float64. A
class that a form does not have stays as it is."""

_PLAIN = {fast: plain for form in FORMS.values() for plain, fast in form.items()}


def accelerate(model: Module, form: str = "torch") -> Module:
    """Have `model`, and all that it is made of, compute in a form of FORMS; from whatever form it is in.

    Only the classes of its modules change, which differ in `forward` alone: parameters, buffers, names in a
    state_dict, hooks and copies stay as they are. A supernet of other operations than the seven stays plain,
    and so does a unit with another normalisation than BatchNorm2d or another activation than PReLU or RPReLU.
    """
    fast = FORMS[form]
    if isinstance(model, Supernet) and model.config.operations != PRIMITIVES:
        fast = {plain: faster for plain, faster in fast.items() if plain not in FUSED_SEARCH}
    for module in model.modules():
        plain = _PLAIN.get(type(module), type(module))
        module.__class__ = fast.get(plain, plain) if _is_usual(module) else plain
    return model


def _is_usual(unit: nn.Module) -> bool:
    """Whether a module's normalisation and activation, where it has them, are those of the fast forms."""
    norms = (getattr(unit, name, None) for name in ("bn1", "bn2"))
    activation = type(getattr(unit, "prelu", None))
    return all(type(bn) in (NoneType, nn.BatchNorm2d) for bn in norms) and (
        activation in (NoneType, nn.PReLU, RPReLU)
    )


class Form(NamedTuple):
    """What a run computes with: a name of FORMS, and words for its log."""

    name: str
    words: str

    def told(self, model: nn.Module) -> Form:
        """With words for the modules of `model`, accelerated in this form, that it left plain."""
        if not (left := sum(type(module) in FORMS[self.name] for module in model.modules())):
            return self
        return self._replace(
            words=f"{self.words}; {left} modules plain, because the fast forms know the seven operations, "
            "BatchNorm2d, PReLU and RPReLU alone"
        )


def choose_form(
    wanted: str, device: torch.device, *, precision: str = "fp32", compiled: bool = False
) -> Form:
    """The form that `--kernels` asks for; `auto` is native where it can be, else torch.

    Native kernels run on a CPU, in fp32, and not in what torch.compile makes. Raises InputError where they
    are asked for and cannot run.
    """
    if wanted in ("plain", "torch"):
        return Form(wanted, f"kernels: {wanted}")
    if device.type != "cpu":
        reason = "they are for a CPU"
    elif precision != "fp32":
        reason = f"they compute in fp32, not in {precision}"
    elif compiled:
        reason = "--compile makes its own"
    else:
        reason = unavailable()
    if reason is None:
        return Form("native", f"kernels: native, {chosen_path()}")
    if wanted == "native":
        raise InputError(f"--kernels native cannot run here: {reason}; leave it out")
    if device.type == "cpu" and precision == "fp32" and not compiled:
        return Form("torch", f"kernels: torch, at a half to a third of the native ones' speed: {reason}")
    return Form("torch", "kernels: torch")
