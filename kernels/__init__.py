"""Fast forms of networks: the same values as the plain modules, which define them, in less time and memory."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from kernels.fused import FUSED
from kernels.fused_search import FUSED_SEARCH

Module = TypeVar("Module", bound=nn.Module)

FORMS: dict[str, dict[type, type]] = {"plain": {}, "torch": {**FUSED, **FUSED_SEARCH}}
"""By name of a form, which class takes the place of which. A class that a form does not have stays plain."""


def accelerate(model: Module, form: str = "torch") -> Module:
    """Have `model`, and all that it is made of, compute in a form of FORMS; from whatever form it is in.

    Only the classes of its modules change, which differ in `forward` alone: parameters, buffers, names in a
    state_dict, hooks and copies stay as they are.
    """
    for module in model.modules():
        plain = _PLAIN.get(type(module), type(module))
        module.__class__ = FORMS[form].get(plain, plain)
    return model


_PLAIN = {fast: plain for form in FORMS.values() for plain, fast in form.items()}
