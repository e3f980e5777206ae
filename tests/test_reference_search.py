"""The supernet in each form, the regularisers and the derived genotypes equal the original program."""

import json

import numpy as np
import pytest
import torch
from support.reference_values import REFERENCE, assert_close, assert_gradient, float64, load
from torch.nn import functional as F

from architect import edge_regularizer, path_regularizer
from genotypes import EDGES, genotype_from_dict
from kernels import FORMS, accelerate
from model_search import LEAVING, SearchConfig, Supernet, derive_cell
from operations import CONVOLUTIONS, SearchPreprocess, SourceOperations

CONVOLUTION_INDEX = 3  # of the first convolution in PRIMITIVES


def reference_names(network: Supernet):
    """Yield (tensor of this program, or a part of it; its name in the reference): weights and BN statistics.

    A convolution of `SourceOperations` holds, one after another, the output channels of the same operation
    on all edges that leave its state; its BN the channels of all its convolutions; its pools' BN stands for
    one BN on every edge.
    """
    for suffix in ("weight", "bias", "running_mean", "running_var"):
        yield getattr(network.stem[1], suffix), f"stem.1.{suffix}"
    yield network.stem[0].weight, "stem.0.weight"
    yield network.classifier.weight, "classifier.weight"
    yield network.classifier.bias, "classifier.bias"
    for c, cell in enumerate(network.cells):
        yield from names_of_preprocess(cell.preprocess0, f"cells.{c}.preprocess0")
        yield from names_of_preprocess(cell.preprocess1, f"cells.{c}.preprocess1")
        for operations, edges in zip(cell.sources, LEAVING, strict=True):
            yield from names_of_source(operations, [f"cells.{c}._ops.{e}._ops" for e in edges])


def names_of_preprocess(module: SearchPreprocess, prefix: str):
    names = ["conv_1", "conv_2"] if len(module.convolutions) == 2 else ["conv"]
    for convolution, name in zip(module.convolutions, names, strict=True):
        yield convolution.weight, f"{prefix}.{name}.weight"
    for statistic in ("running_mean", "running_var"):
        yield getattr(module.norm, statistic), f"{prefix}.bn2.{statistic}"


def names_of_source(module: SourceOperations, prefixes: list[str]):
    kinds = [f"{CONVOLUTION_INDEX + p}" for p in range(len(CONVOLUTIONS))]
    for convolution, kind in zip(module.convolutions, kinds, strict=True):
        for part, prefix in zip(convolution.weight.chunk(len(prefixes)), prefixes, strict=True):
            yield part, f"{prefix}.{kind}.conv.weight"
    for convolution, half in zip(module.skip, ("conv_1", "conv_2"), strict=False):
        for part, prefix in zip(convolution.weight.chunk(len(prefixes)), prefixes, strict=True):
            yield part, f"{prefix}.0.{half}.weight"
    kinds = kinds + ["0"] * (len(module.skip) > 0)
    for statistic in ("running_mean", "running_var"):
        blocks = [f"{prefix}.{kind}.bn2.{statistic}" for kind in kinds for prefix in prefixes]
        yield from zip(getattr(module.norm, statistic).chunk(len(blocks)), blocks, strict=True)
        for part, kind in zip(getattr(module.pool_norm, statistic).chunk(2), ("1", "2"), strict=True):
            for prefix in prefixes:
                yield part, f"{prefix}.{kind}.1.{statistic}"


def gradient_names(network: Supernet):
    """As reference_names, with gradients in the place of parameters."""
    gradients = {p.data_ptr(): p.grad for p in network.weight_parameters()}
    parents = {p.data_ptr(): p for p in network.weight_parameters()}
    for part, name in reference_names(network):
        base = part._base if part._base is not None else part
        if base.data_ptr() in parents:
            rows = part.shape[0]
            start = part.storage_offset() // (part.numel() // rows)
            yield gradients[base.data_ptr()][start : start + rows], name


@pytest.fixture(params=FORMS)
def reference(request):
    values = load("supernet")
    network = Supernet(SearchConfig(int(values["init_channels"]), int(values["layers"]))).double()
    accelerate(network, request.param)
    named = list(reference_names(network))
    assert {f"state.{name}" for _, name in named} == {k for k in values.files if k.startswith("state.")}
    with torch.no_grad():
        for part, name in named:
            part.copy_(float64(values, f"state.{name}"))
        for name in ("alphas_normal", "alphas_reduce", "betas_normal", "betas_reduce"):
            getattr(network, name).copy_(float64(values, f"arch.{name}"))
    images = torch.from_numpy(np.random.RandomState(int(values["input_seed"])).randn(4, 3, 32, 32))
    return values, network, images, torch.from_numpy(values["target"])


def test_supernet_equals_the_original(reference):
    values, network, images, target = reference
    logits, _ = network(images)
    assert_close(logits, values["logits_train"], "logits in training mode")
    loss = F.cross_entropy(logits, target)
    assert_close(loss, values["loss"], "loss")
    loss.backward()
    for name in ("alphas_normal", "alphas_reduce", "betas_normal", "betas_reduce"):
        assert_close(getattr(network, name).grad, values[f"grad.arch.{name}"], f"gradient of {name}")
    checked = 0
    for gradient, name in gradient_names(network):
        assert_gradient(gradient, values, name)
        checked += 1
    assert checked == sum(k.startswith(("grad.", "gradnorm.")) and ".arch." not in k for k in values.files)
    network.eval()
    with torch.no_grad():
        assert_close(network(images)[0], values["logits_eval"], "logits in evaluation mode")


def test_regularizers_equal_the_original():
    values = load("regularizers")
    cases = {name.split(".")[0] for name in values.files}
    for case in sorted(cases):
        arch = {
            name: float64(values, f"{case}.{name}").requires_grad_()
            for name in ("alphas_normal", "alphas_reduce", "betas_normal", "betas_reduce")
        }
        ramp = int(values[f"{case}.epoch"]) / 49
        path = path_regularizer(arch["alphas_normal"]) + path_regularizer(arch["alphas_reduce"])
        edge = edge_regularizer(arch["betas_normal"]) + edge_regularizer(arch["betas_reduce"])
        loss = ramp * (1.5 * path + 0.8 * edge)
        loss.backward()
        assert_close(loss, values[f"{case}.loss"], f"{case} loss")
        for name, parameter in arch.items():
            assert_close(parameter.grad, values[f"{case}.grad.{name}"], f"{case} gradient of {name}")
    assert len(cases) == 4


def test_forty_genotypes_are_derived_exactly():
    draws = json.loads((REFERENCE / "genotypes.json").read_text())
    assert len(draws) == 40
    for draw in draws:
        expected = genotype_from_dict(draw["genotype"])
        for kind in ("normal", "reduce"):
            alpha = torch.tensor(draw[f"alphas_{kind}"], dtype=torch.float64)
            beta = torch.tensor(draw[f"betas_{kind}"], dtype=torch.float64)
            assert derive_cell(alpha, beta) == getattr(expected, kind)
        assert expected.normal_concat == expected.reduce_concat == (2, 3, 4, 5)
    assert len(EDGES) == 14
