"""Networks for torch.hub: `torch.hub.load(REPO, "ebnas", ...)`; for a clone, with source="local"."""

from __future__ import annotations

from pathlib import Path

from torch import nn

dependencies = ["numpy", "PIL", "safetensors", "torch"]


def ebnas(source: str | Path | None = None, *, arch: str = "EBNAS", **config) -> nn.Module:
    """A network: untrained, of a run, or of a packed file.

    source None: an untrained network of the genotype `arch` (a registered one, a file or a search run's
        folder); `config` are other fields of model.ModelConfig, by default CIFAR-10's: family, init_channels,
        layers, groups, num_classes, weight_bits, activation_bits, ...
    a run's folder or a checkpoint: its trained network, in evaluation mode.
        Both map images (n, 3, h, w) to logits and auxiliary logits, which are None in evaluation mode.
    an .ebnas file, or the name of one in models/ ("shapes"): its float form, images -> logits. It holds no
        latent weights and cannot be trained. Its `program` has classes, mean, std and image_size.
    Raises utils.InputError, or packed.PackedFileError, for what is no network.
    """
    from baselines import trained_network
    from checkpoint import load_checkpoint
    from genotypes import get_genotype
    from model import ModelConfig, build_model
    from packed import read_program
    from packed.float_form import FloatForm

    if source is None:
        return build_model(ModelConfig(genotype=get_genotype(arch), **config))
    shipped = Path(__file__).parent / "models" / f"{source}.ebnas"
    if str(source).endswith(".ebnas") or shipped.is_file():
        return FloatForm(read_program(shipped if shipped.is_file() else source))
    return trained_network(load_checkpoint(source))
