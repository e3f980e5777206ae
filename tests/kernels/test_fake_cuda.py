"""Nothing in a network is made on the CPU while it runs elsewhere: on tensors without data, without a GPU."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from genotypes import GENOTYPES, PRIMITIVES
from model import ModelConfig, build_model
from model_search import SearchConfig, Supernet

EVERY_OPERATION = tuple((name, index % 2) for index, name in enumerate((*PRIMITIVES, PRIMITIVES[0])))


def derived(family: str, **bits) -> nn.Module:
    genotype = GENOTYPES["EBNAS"]._replace(normal=EVERY_OPERATION, reduce=EVERY_OPERATION)
    network = build_model(
        ModelConfig(genotype, family, init_channels=8, layers=3, groups=2, auxiliary=True, **bits)
    )
    network.drop_path_prob = 0.2
    return network


NETWORKS = {
    "supernet": lambda: Supernet(SearchConfig(8, 3)),
    "cifar": lambda: derived("cifar"),
    "cifar, balanced": lambda: derived("cifar", weight_binarization="balanced"),
    "cifar, stage 1": lambda: derived("cifar", activation_bits=32),
    "imagenet": lambda: derived("imagenet"),
}


def asks_for_a_driver() -> bool:
    """Whether tensors without data ask for the CUDA driver where they are copied, as torch 2.6's do."""
    with FakeTensorMode():
        try:
            torch.empty(1, device="cuda").uniform_()
        except RuntimeError:
            return True
    return False


@pytest.fixture
def autocast_on_cuda():
    """As torch.autocast("cuda"), which turns itself off where there is no GPU."""

    def enable(dtype: torch.dtype | None) -> None:
        torch.set_autocast_enabled("cuda", dtype is not None)
        if dtype is not None:
            torch.set_autocast_dtype("cuda", dtype)

    before = torch.get_autocast_dtype("cuda")
    yield enable
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", before)


def forward(make, device: str, size: int) -> tuple[nn.Module, torch.Tensor]:
    """A network in training mode on `device`, and the sum of what it gives for fake images there."""
    with torch.device(device):
        network, images = make(), torch.randn(2, 3, size, size)
    outputs = [output for output in network(images) if output is not None]
    assert {output.device.type for output in outputs} == {device}
    return network, sum(output.float().sum() for output in outputs)


@pytest.mark.skipif(asks_for_a_driver(), reason="this torch has no CUDA tensors without a driver")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_forward_stays_on_cuda(name, dtype, autocast_on_cuda):
    with FakeTensorMode():
        autocast_on_cuda(dtype)
        network, _ = forward(NETWORKS[name], "cuda", 33)
        with torch.no_grad():
            logits, _ = network.eval()(torch.randn(2, 3, 33, 33, device="cuda"))
    assert logits.device.type == "cuda" and logits.dtype == (dtype or torch.float32)


@pytest.mark.parametrize("name", NETWORKS)
def test_backward_stays_on_its_device(name):
    """On the meta device: autograd would ask for the CUDA driver."""
    network, total = forward(NETWORKS[name], "meta", 33)
    total.backward()
    assert {parameter.grad.device.type for parameter in network.parameters()} == {"meta"}


class Broken(nn.Module):
    """Its bias is made where torch makes tensors by default."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x + torch.ones(x.shape[-1]),)


@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_a_tensor_made_on_the_cpu_is_noticed(device):
    mode = FakeTensorMode() if device == "cuda" else nullcontext()
    with mode, pytest.raises(RuntimeError, match="cpu"):
        forward(Broken, device, 8)
