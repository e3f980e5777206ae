"""What a network costs: parameters, MACs, OPs as the binary-network papers count them, stored bytes."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from binary_ops import BinaryConv2d
from model import float_buffers

BITS_PER_OP = 64
"""1-bit multiply-accumulates that count as one operation (Liu et al., Bi-Real Net, ECCV 2018)."""


@dataclass(frozen=True)
class Cost:
    """The cost of one image. MACs of convolutions and linear layers; elements of
    the outputs of BN, PReLU and `AvgPool2d` layers, and of ImageNet's global mean (not CIFAR's); bytes as
    stored: a bit per binary weight, four bytes for any other parameter, BN statistic or filter scale. RPReLU
    counts as PReLU: export folds its shift into what reads the result.
    """

    parameters: int
    binary_macs: int
    float_macs: int
    bn_elements: int
    prelu_elements: int
    avg_pool_elements: int
    binary_bytes: int
    float_bytes: int
    one_sided_macs: int = 0
    """Of the float MACs, those with 1-bit weights or 1-bit activations, but not both."""

    @property
    def convolution_ops(self) -> float:
        """Binary MACs / 64 + float MACs: without the elementwise terms."""
        return self.binary_macs / BITS_PER_OP + self.float_macs

    @property
    def ops(self) -> float:
        """OPs with 2 per BN element and 1 per PReLU and average-pool element."""
        return self.convolution_ops + 2 * self.bn_elements + self.prelu_elements + self.avg_pool_elements


def measure_cost(model: nn.Module, image_size: int, *, auxiliary: bool = False) -> Cost:
    """Count one forward pass of an image (3, image_size, image_size), on torch's meta device: no arithmetic.

    A MAC is binary where weights and activations both have one bit, so in a W1A1 network. The auxiliary head,
    which is of training only, counts where `auxiliary` says so.
    """
    model = copy.deepcopy(model).to("meta").eval()
    if not auxiliary:
        model.auxiliary_head = None
    model.training = auxiliary  # of the network alone: then it runs its head, and its BN stays as it is
    bits = {m: (m.weight_bits, m.activation_bits) for m in model.modules() if isinstance(m, BinaryConv2d)}
    for layer in bits:  # nothing is computed: no signs are needed
        layer.weight_bits = layer.activation_bits = 32
    names = "binary_macs float_macs one_sided_macs bn_elements prelu_elements avg_pool_elements"
    counts = dict.fromkeys(names.split(), 0)

    def count(layer: nn.Module, _inputs, output: torch.Tensor) -> None:
        elements = output[0].numel()
        if isinstance(layer, nn.Conv2d):
            macs = elements * layer.weight[0].numel()
            counts["binary_macs" if bits.get(layer) == (1, 1) else "float_macs"] += macs
            counts["one_sided_macs"] += macs if set(bits.get(layer, ())) == {1, 32} else 0
        elif isinstance(layer, nn.Linear):
            counts["float_macs"] += elements * layer.in_features
        elif isinstance(layer, nn.BatchNorm2d):
            counts["bn_elements"] += elements
        elif isinstance(layer, nn.PReLU):
            counts["prelu_elements"] += elements
        elif isinstance(layer, nn.AvgPool2d):
            counts["avg_pool_elements"] += elements

    for layer in model.modules():
        if not any(layer.children()):
            layer.register_forward_hook(count)
    if getattr(model, "auxiliary_head", None) is not None:  # it begins with an average pool, as a function

        def count_pooled(_layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            counts["avg_pool_elements"] += inputs[0].numel()

        model.auxiliary_head.features.register_forward_pre_hook(count_pooled)
    with torch.no_grad():
        model(torch.empty(1, 3, image_size, image_size, device="meta"))

    if model.config.family == "imagenet" and model.config.counts_global_mean:
        counts["avg_pool_elements"] += model.classifier.in_features

    binary_layers = [layer for layer, (weight_bits, _) in bits.items() if weight_bits == 1]
    binary_weights = sum(layer.weight.numel() for layer in binary_layers)
    scales = sum(layer.filter_scales for layer in binary_layers)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    statistics = sum(buffer.numel() for buffer in float_buffers(model).values())
    return Cost(
        parameters=parameters,
        binary_bytes=sum((layer.weight.numel() + 7) // 8 for layer in binary_layers),
        float_bytes=4 * (parameters - binary_weights + statistics + scales),
        **counts,
    )
