"""The float form of a packed network in other engines, for `benchmark.py infer`.

PyTorch eager, channels-last and compiled; ONNX Runtime in float32 and static int8; OpenVINO. Each has its
binary weights fixed beforehand, as any deployment in float would.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from binary_ops import BinaryConv2d, sign
from model import ModelConfig, build_model
from operations import BinaryUnit, FactorizedReduce
from packed import Program, Step, unpack_bits
from utils import InputError

Runner = Callable[[], np.ndarray]


class FixedBinaryConv2d(nn.Module):
    """BinaryConv2d with its weights binarised once, as any deployment in float would have them."""

    def __init__(self, conv: BinaryConv2d):
        super().__init__()
        weight = conv.effective_weight().detach()
        if (alpha := getattr(conv, "alpha", None)) is not None:  # BATS's scale of each filter
            weight = weight * alpha.detach().view(-1, 1, 1, 1)
        self.register_buffer("weight", weight)
        self.zero_has_sign = type(conv).binarized_input is BinaryConv2d.binarized_input
        self.arguments = (None, conv.stride, conv.padding, conv.dilation, conv.groups)

    def forward(self, x: Tensor) -> Tensor:
        if not self.zero_has_sign:
            signs = x.sign()
        elif torch.onnx.is_in_onnx_export():  # it knows no copysign, which binary_ops.sign is made of
            signs = torch.where(x >= 0, 1.0, -1.0)
        else:
            signs = sign(x)
        return F.conv2d(signs, self.weight, *self.arguments)


class Logits(nn.Module):
    """A network without its auxiliary output, its binary weights fixed."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = copy.deepcopy(network)
        for name, module in list(self.network.named_modules()):
            if isinstance(module, BinaryConv2d):
                parent, _, child = name.rpartition(".")
                setattr(self.network.get_submodule(parent), child, FixedBinaryConv2d(module))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[0]


def float_network(program: Program) -> nn.Module:
    """The network that a packed file was made of, as float modules: BN, sign, convolution, BN, PReLU.

    Parameters that the file holds folded are unfolded so that the function is the same. Raises InputError
    for a network of another system than EBNAS.
    """
    if system := program.config.get("system"):
        raise InputError(f"a file of {system} cannot be unfolded to compare with; give its --arch instead")
    model = build_model(ModelConfig.from_dict({**program.config, "auxiliary": False})).eval()
    modules = dict(model.named_modules())
    names = list(modules)
    with torch.no_grad():
        for step in program.steps:
            module, tensors = modules[step.name], {k: torch.from_numpy(v) for k, v in step.tensors.items()}
            if step.op == "binary":
                fill_unit(module, step, tensors)
            elif step.op == "float":
                module.weight.copy_(tensors["weight"])
                norm = modules[names[names.index(step.name) + 1]]
                set_affine(norm, slice(None), torch.ones_like(tensors["bias"]), tensors["bias"])
            elif step.op == "linear":
                module.weight.copy_(tensors["weight"])
                module.bias.copy_(tensors["bias"])
    return model


def fill_unit(unit: BinaryUnit | FactorizedReduce, step: Step, tensors: dict[str, Tensor]) -> None:
    """Put a binary step into its unit; a factorised reduction's two steps hold half of the filters each."""
    if isinstance(unit, FactorizedReduce):
        second, half = step.padding < 0, step.target.channels
        conv, part = (unit.conv_2, slice(half, None)) if second else (unit.conv_1, slice(0, half))
    else:
        conv, part = unit.conv, slice(None)
    scale, bias, slope = tensors["affine"]
    unit.bn1.running_mean.copy_(tensors["threshold"].clamp_min(torch.finfo(torch.float32).min))
    set_affine(unit.bn1, slice(None), torch.ones_like(unit.bn1.weight), torch.zeros_like(unit.bn1.bias))
    conv.weight.copy_(torch.from_numpy(unpack_bits(step)))
    weight_scale = conv.effective_weight().abs().flatten(1)[:, 0]
    set_affine(unit.bn2, part, scale / weight_scale, bias)
    unit.prelu.weight[part] = slope


def set_affine(norm: nn.BatchNorm2d, part: slice, scale: Tensor, bias: Tensor) -> None:
    norm.running_var[part] = 1 - norm.eps
    norm.weight[part] = scale
    norm.bias[part] = bias


def make_runner(rival: str, model: nn.Module, images: Tensor, threads: int) -> Runner:
    """A call without arguments that gives the logits of `images`. Raises ImportError: not installed."""
    if rival in ("channels_last", "compile"):
        if rival == "channels_last":
            model = copy.deepcopy(model).to(memory_format=torch.channels_last)
            images = images.to(memory_format=torch.channels_last)
        run = torch.compile(model) if rival == "compile" else model
        return lambda: run(images).numpy()
    if rival == "openvino":
        import openvino

        core = openvino.Core()
        core.set_property("CPU", {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"})
        compiled = core.compile_model(core.read_model(onnx_bytes(model, images)), "CPU")
        request, array = compiled.create_infer_request(), images.numpy()
        return lambda: next(iter(request.infer([array]).values()))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    content = onnx_bytes(model, images)
    if rival == "onnxruntime_int8":
        content = quantized(content, images)
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, feed)[0]


def onnx_bytes(model: nn.Module, images: Tensor) -> bytes:
    import onnx  # noqa: F401  (torch.onnx needs it)

    buffer = io.BytesIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # the exporter prints graphs
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images,), buffer, dynamo=False, opset_version=17)
    return buffer.getvalue()


def quantized(content: bytes, images: Tensor) -> bytes:
    """Static int8 of an ONNX network, calibrated on `images`."""
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.left = [{onnx_input(content): images.numpy()}]

        def get_next(self):
            return self.left.pop() if self.left else None

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        source.write_bytes(content)
        quantization.quantize_static(source, target, Reader())
        return target.read_bytes()


def onnx_input(content: bytes) -> str:
    import onnx

    return onnx.load_from_string(content).graph.input[0].name
