"""Networks for torch.hub: `torch.hub.load(REPO, "ebnas", ...)`; for a clone, with source="local"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

dependencies = ["numpy", "PIL", "safetensors", "torch"]


def ebnas(source: str | Path | None = None, *, arch: str | Path | None = None, **config: Any) -> nn.Module:
    """A network: untrained, of a run, or of a packed file.

    source None: an untrained network of `arch` (EBNAS or another row of the published tables, a genotype file
        or a search run's folder) in its system's blocks; `config` are other fields of its configuration, by
        default CIFAR-10's: family (of images), init_channels, layers, groups, num_classes, weight_bits,
        activation_bits, ...
    a run's folder or a checkpoint: its trained network, in evaluation mode.
        Both map images (n, 3, h, w) to logits and auxiliary logits, which are None in evaluation mode.
    an .ebnas file, or the name of one in models/ ("shapes"): its float form, images -> logits. It holds no
        latent weights and cannot be trained. Its `program` has classes, mean, std and image_size.
    Raises utils.InputError, or packed.PackedFileError, for what is no network.
    """
    from networks.registry import trained_network
    from packed import read_program
    from packed.float_form import FloatForm
    from run.checkpoint import load_checkpoint
    from utils import InputError, os_error_message

    for name, value in (("source", source), ("arch", arch)):
        if not isinstance(value, str | Path | None):
            raise InputError(f"{name} is {value!r}; it must be a name or a path")
    if source is None:
        return _untrained("EBNAS" if arch is None else str(arch), config)
    if arch is not None or config:
        given = ", ".join(["arch"] * (arch is not None) + sorted(config))
        raise InputError(f"{source} has a network of its own; leave out {given}")
    shipped = Path(__file__).parent / "models" / f"{source}.ebnas"
    if str(source).endswith(".ebnas") or shipped.is_file():
        try:
            return FloatForm(read_program(shipped if shipped.is_file() else source))
        except OSError as error:
            raise InputError(os_error_message(error)) from None
    return trained_network(load_checkpoint(source))


def _untrained(arch: str, config: dict[str, Any]) -> nn.Module:
    from flags.choices import FAMILIES
    from model import build_model
    from networks.registry import make_config, settings_of
    from networks.rows import system_of
    from utils import InputError

    known = settings_of(system_of(arch)) - {"genotype"}
    if unknown := sorted(config.keys() - known):
        raise InputError(f"{arch} has no {unknown[0]}; it has {', '.join(sorted(known))}")
    if (family := config.get("family", "cifar")) not in FAMILIES:
        raise InputError(f"family is {family!r}, of images; choose from {FAMILIES}")
    return build_model(make_config(arch, **config))
