"""The other systems' networks compute what their authors' programs compute: float64, to 1e-9."""

import json
import re

import numpy as np
import pytest
import torch
from support.reference_values import RELATIVE, float64, load
from torch import Tensor
from torch.nn import functional as F

from binary_ops import binary_sign
from genotypes import GENOTYPES, OPERATIONS, genotype_from_dict
from model import build_model
from networks.bnas import BnasConv2d, latent_weight
from networks.registry import SYSTEMS
from run import originals

FLOOR = 1e-3
"""Some gradients are 0 but for rounding: what is smaller than this is compared with it."""

RENAMED = {
    "bnas": originals.RENAMED["bnas"],
    "bats": {
        r"(preprocess\d|_ops\.\d)\.op\.0\.": r"\1.bn.",
        r"(preprocess\d|_ops\.\d)\.op\.1\.": r"\1.conv.",
        r"(preprocess\d|_ops\.\d)\.op\.2\.": r"\1.prelu.",
        r"(conv_\d)\.0\.": r"\1.",
        r"\.activation\.": ".prelu.",
        r"activation_post_process\.alpha": "alpha",
        r"(head\.features)\.(\d+)": lambda match: f"{match[1]}.{int(match[2]) - 1}",
        r"^stem1\.(\d)": lambda match: f"stem1.{int(match[1]) - 1}",
    },
    "dcp": {
        r"MFilters": "modulation",
        r"(preprocess\d|_ops\.\d)\.op\.0\.": r"\1.bn1.",
        r"(preprocess\d|_ops\.\d)\.op\.1\.": r"\1.conv.",
        r"(preprocess\d|_ops\.\d)\.op\.2\.": r"\1.bn2.",
        r"(preprocess\d|_ops\.\d)\.op\.3\.": r"\1.prelu.",
        r"(_ops\.\d)\.net\.": r"\1.",
        r"^stem1\.(\d)": lambda match: f"stem1.{int(match[1]) - 1}",
    },
}
"""The authors' names -> ours; what follows depends on the module."""

DCP_PARTS = {
    True: {"bn0": "bn1", "conv1": "conv_1", "conv2": "conv_2", "bn": "bn2", "relu": "prelu"},  # a reduction
    False: {
        "bn0": "bn0",
        "conv1": "depthwise",
        "bn1": "bn1",
        "relu0": "prelu1",
        "conv2": "pointwise",
        "relu1": "prelu2",
    },
}


def our_name(system: str, name: str, names: set[str]) -> str:
    """Our name of the authors' parameter `name`, one of `names`."""
    ours = name
    for pattern, new in RENAMED[system].items():
        ours = re.sub(pattern, new, ours)
    if system == "dcp" and (
        match := re.fullmatch(r"(cells.*?)\.(bn0|bn1|bn|conv1|conv2|relu0|relu1|relu)\.(\w+)", ours)
    ):
        module, part, rest = match.groups()
        stem = name.rsplit(".", 2)[0]
        if f"{stem}.bn0.weight" in names:
            part = DCP_PARTS[f"{stem}.relu.weight" in names].get(part, part)
        elif part == "bn" and f"{stem}.bn.weight" in names:
            part = "1"
        ours = f"{module}.{part}.{rest}"
    return ours.replace("._ops.", ".operations.")


class Golden:
    """A golden file: its network with its state, its batch, and comparisons with its values."""

    def __init__(self, file: str, system: str, prefix: str = "", **fields):
        self.values, self.prefix = load(f"baselines/{file}"), prefix
        self.settings = settings = json.loads(str(self.values["config"]))
        genotype = GENOTYPES[{"bnas_cifar": "BNAS-A", "bnas_imagenet": "BNAS-D"}.get(file, "DCP-NAS-L")]
        if "genotype" in self.values.files:
            text = json.loads(str(self.values["genotype"]))
            text |= {"normal_concat": text["concat"], "reduce_concat": text["concat"]}
            genotype = genotype_from_dict(text, known=OPERATIONS[system])
        if "groups" in settings:
            fields |= {"groups": settings["groups"], "auxiliary": settings["auxiliary"]}
        config = SYSTEMS[system](
            genotype,
            family=settings.get("kind", "imagenet"),
            init_channels=settings["C"],
            layers=settings["layers"],
            num_classes=settings["classes"],
            **fields,
        )
        self.network = build_model(config).double()
        names = {name[6:] for name in self.values.files if name.startswith("state.")}
        self.theirs = {our_name(system, name, names): name for name in names}
        state = self.network.state_dict()
        state = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
        assert set(state) == set(self.theirs)
        for name, tensor in state.items():
            tensor.copy_(float64(self.values, f"state.{self.theirs[name]}"))
        images = np.random.RandomState(settings["input_seed"]).randn(*settings["input_shape"])
        self.images, self.targets = torch.from_numpy(images), torch.tensor(settings["targets"])

    def value(self, name: str) -> Tensor | None:
        name = self.prefix + name
        return torch.from_numpy(np.asarray(self.values[name])) if name in self.values.files else None

    def compare(self, ours: Tensor, name: str) -> None:
        theirs = self.value(name)
        assert ours.shape == theirs.shape, name
        error = ((ours.detach() - theirs).norm() / theirs.norm().clamp_min(FLOOR)).item()
        assert error <= RELATIVE, f"{name}: relative error {error:.2e}"

    def training_pass(self) -> None:
        """Forward and backward; logits, loss and BN statistics are compared."""
        network, smoothing = self.network, self.settings.get("label_smooth", 0)
        logits, auxiliary = network(self.images)
        self.compare(logits, "logits_train")
        loss = F.cross_entropy(logits, self.targets, label_smoothing=smoothing)
        if auxiliary is not None:
            self.compare(auxiliary, "aux_train")
            loss = loss + 0.4 * F.cross_entropy(auxiliary, self.targets)
        self.compare(loss, "loss")
        loss.backward()
        for parameter in network.parameters():
            if parameter.grad is None:  # of what only `none` reads: the authors' zeros pass a gradient of 0
                parameter.grad = torch.zeros_like(parameter)
        statistics = [name for name in network.state_dict() if "running_" in name]
        for name in statistics:
            if self.value(f"stats.{self.theirs[name]}") is not None:
                self.compare(network.state_dict()[name], f"stats.{self.theirs[name]}")

    def compare_gradients(self, kind: str) -> None:
        """With those that the file holds as `kind`, or their norms; as many as it holds."""
        compared = 0
        for name, parameter in self.network.named_parameters():
            if self.value(f"{kind}.{self.theirs[name]}") is not None:
                self.compare(parameter.grad, f"{kind}.{self.theirs[name]}")
                compared += 1
            if self.value(f"{kind}norm.{self.theirs[name]}") is not None:
                self.compare(parameter.grad.norm(), f"{kind}norm.{self.theirs[name]}")
                compared += 1
        held = [
            name
            for name in self.values.files
            if name.startswith((f"{self.prefix}{kind}.", f"{self.prefix}{kind}norm."))
        ]
        assert compared == len(held) > 0

    @torch.no_grad()
    def compare_evaluation(self, name: str) -> None:
        self.network.eval()
        self.compare(self.network(self.images)[0], name)


@pytest.mark.parametrize(
    ("file", "prefix", "fields"),
    [
        ("bats", "", {}),
        ("bats", "xnor.", {"variant": "mean"}),
        ("bats", "w32a1.", {"weight_bits": 32}),
        ("bats_imagenet", "", {}),
        ("bats_imagenet", "xnor.", {"variant": "mean"}),
        ("bats_imagenet", "w32a1.", {"weight_bits": 32}),
        ("dcpnas", "", {}),
        ("dcpnas", "step1.", {"weight_bits": 32}),
    ],
)
def test_bats_and_dcp_nas(file, prefix, fields):
    golden = Golden(file, "dcp" if file == "dcpnas" else "bats", prefix, **fields)
    optimizer = torch.optim.SGD(golden.network.parameters(), lr=0.0)
    golden.network.register_update_rule(optimizer)
    golden.training_pass()
    golden.compare_evaluation("logits_eval")
    optimizer.step()  # DCP-NAS adds the reconstruction loss's gradients
    golden.compare_gradients("grad")


@pytest.mark.parametrize("family", ["cifar", "imagenet"])
def test_bnas(family):
    """As the authors' code runs: also its update rule, an SGD step, and the evaluation after it."""
    golden = Golden(f"bnas_{family}", "bnas")
    network, settings = golden.network, golden.settings
    binary = {
        f"{name}.weight"
        for name, m in network.named_modules()
        if isinstance(m, BnasConv2d) and m.weight_bits == 1
    }
    assert {golden.theirs[name] for name in binary} == set(settings["binarised"])
    first = next(m for m in network.modules() if isinstance(m, BnasConv2d))
    golden.compare(latent_weight(first.weight), "latent.cells.0.preprocess0.op.0.weight")
    golden.compare(first.effective_weight(), "binary.cells.0.preprocess0.op.0.weight")

    optimizer = torch.optim.SGD(
        network.parameters(), settings["lr"], settings["momentum"], weight_decay=settings["weight_decay"]
    )
    network.register_update_rule(optimizer)
    golden.training_pass()
    golden.compare_gradients("grad")
    golden.compare_evaluation("logits_eval")
    if settings["grad_clip"]:
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), settings["grad_clip"])
        golden.compare(norm, "gradnorm_all")
    optimizer.step()
    golden.compare_gradients("update")
    for name, parameter in network.named_parameters():
        if golden.value(f"after.{golden.theirs[name]}") is not None:
            golden.compare(parameter, f"after.{golden.theirs[name]}")
    golden.compare_evaluation("logits_eval_after")


def _as_intended(golden: Golden) -> None:
    for module in golden.network.modules():
        if isinstance(module, BnasConv2d):
            module.weight_bits = 1


def _relu_before_s0(golden: Golden) -> None:
    golden.network.stem0.append(torch.nn.ReLU())


def _no_relu_before_s0(golden: Golden) -> None:
    del golden.network.stem0[-1]
    golden.network.stem1.insert(0, torch.nn.ReLU())


def _no_residual(golden: Golden) -> None:
    golden.network.cells[0].preprocess1.residual = False


def _positive_zero(golden: Golden) -> None:
    for module in golden.network.modules():
        if isinstance(module, BnasConv2d):
            module.binarized_input = binary_sign


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("bnas_cifar", _positive_zero),
        ("bnas_cifar", _as_intended),
        ("bnas_imagenet", _relu_before_s0),
        ("bats_imagenet", _no_relu_before_s0),
        ("bats_imagenet", _no_residual),
    ],
)
def test_what_is_easily_got_wrong_shows(file, change):
    """sign(0) = 0 in BNAS's dead channels; its last two convolutions, whose weights are real; the ReLU before
    s0, which BNAS has not and BATS, working in place, has; the residual of BATS's preprocessing."""
    golden = Golden(file, file.split("_")[0])
    change(golden)
    with pytest.raises(AssertionError, match="logits_train"), torch.no_grad():
        golden.compare(golden.network(golden.images)[0], "logits_train")
