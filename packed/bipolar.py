"""A packed network as QONNX, which tools for FPGAs exchange: ONNX whose signs are `BipolarQuant` nodes.

A 1-bit convolution is a BatchNormalization that takes off its thresholds, BipolarQuant, Conv of weights that
come out of a BipolarQuant too, and a BatchNormalization of scale and bias. So a tool sees which values have
one bit; the rest is float32.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np

from .exchange import OPSET, metadata
from .float_form import Pieces
from .program import Program, Step, View, unpack_bits

DOMAIN = "qonnx.custom_op.general"


def qonnx_bytes(program: Program) -> bytes:
    """A QONNX file: `images` (1, 3, size, size) -> `logits` (1, classes), with `metadata` as its properties.

    No node depends on the batch, so qonnx's ChangeBatchSize gives it another. Raises ImportError: no onnx.
    """
    import onnx
    from onnx import helper

    graph = _Graph(helper, onnx.numpy_helper)
    graph.run(program)
    size = program.image_size
    ends = [("images", (1, program.buffers[0][0], size, size)), ("logits", (1, len(program.classes)))]
    images, logits = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, s) for name, s in ends)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    proto = helper.make_model(
        helper.make_graph(graph.nodes, "network", [images], [logits], graph.constants), opset_imports=opsets
    )
    proto.ir_version = min(proto.ir_version, 10)  # what older engines read
    helper.set_model_props(proto, {name: json.dumps(value) for name, value in metadata(program).items()})
    known = onnx.ModelProto.FromString(proto.SerializeToString())
    for node in known.graph.node:  # onnx infers no shapes of another domain's nodes
        if node.domain == DOMAIN:
            node.op_type, node.domain = "Identity", ""
            del node.input[1:]
    known = onnx.shape_inference.infer_shapes(known, strict_mode=True)
    proto.graph.value_info.extend(known.graph.value_info)
    return proto.SerializeToString()


class _Value(NamedTuple):
    """A tensor of the graph (1, channels, height, width)."""

    name: str
    channels: int
    height: int
    width: int


class _Graph:
    """Nodes and constants, as they are added."""

    def __init__(self, helper: Any, numpy_helper: Any):
        self.helper, self.numpy_helper = helper, numpy_helper
        self.nodes, self.constants = [], []

    def node(self, op: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"{op.lower()}_{len(self.nodes)}"
        if op == "BipolarQuant":
            attributes["domain"] = DOMAIN
        name = f"node_{len(self.nodes)}"
        self.nodes.append(self.helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def constant(self, values: Any, dtype: type = np.float32) -> str:
        name = f"constant_{len(self.constants)}"
        array = np.ascontiguousarray(values, dtype)
        self.constants.append(self.numpy_helper.from_array(array, name))
        return name

    def slice(self, x: str, axes: list[int], starts: list[int], ends: list[int]) -> str:
        return self.node("Slice", x, *(self.constant(values, np.int64) for values in (starts, ends, axes)))

    def run(self, program: Program) -> None:
        """Compute what FloatForm does, step by step."""
        buffers = [_Values(self) for _ in program.buffers]
        size, channels = program.image_size, program.buffers[0][0]
        buffers[0].write(View(0, 0, channels), _Value("images", channels, size, size))
        for step in program.steps:
            x, residual = (view and buffers[view.buffer].read(view) for view in (step.source, step.residual))
            if step.op == "linear":
                pooled = self.node("Flatten", self.node("GlobalAveragePool", x.name), axis=1)
                weight, bias = (self.constant(step.tensors[name]) for name in ("weight", "bias"))
                self.node("Gemm", pooled, weight, bias, output="logits", transB=1)
                continue
            y = {"binary": self.binary, "float": self.float, "pool": self.pool}[step.op](step, x, residual)
            target = buffers[step.target.buffer]
            if step.add:
                y = y._replace(name=self.node("Add", target.read(step.target).name, y.name))
            target.write(step.target, y)

    def binary(self, step: Step, x: _Value, residual: _Value | None) -> _Value:
        scale, bias, slope = step.tensors["affine"]
        threshold, one = step.tensors["threshold"], self.constant(1.0)
        always = np.isneginf(threshold)  # +1, whatever x is
        signs = self.scaled(x.name, ~always, np.where(always, 1, 0), np.where(always, 0, threshold))
        signs = self.node("BipolarQuant", signs, one)
        weight = self.node("BipolarQuant", self.constant(unpack_bits(step)), one)
        y = self.convolution(step, x._replace(name=signs), weight, len(scale))  # exact sums
        y = y._replace(name=self.scaled(y.name, scale, bias, np.zeros_like(bias)))
        name = y.name if residual is None else self.node("Add", y.name, residual.name)
        return y._replace(name=self.node("PRelu", name, self.constant(slope.reshape(-1, 1, 1))))

    def scaled(self, x: str, scale: np.ndarray, bias: np.ndarray, mean: np.ndarray) -> str:
        """(x - mean) * scale + bias, channel by channel. A BatchNormalization, which such tools know best."""
        tensors = map(self.constant, (scale, bias, mean, np.ones_like(mean)))
        return self.node("BatchNormalization", x, *tensors, epsilon=0.0)

    def float(self, step: Step, x: _Value, _residual: _Value | None) -> _Value:
        weight, bias = step.tensors["weight"], step.tensors["bias"]
        y = self.convolution(step, x, self.constant(weight), len(bias), self.constant(bias))
        return y._replace(name=self.node("Relu", y.name)) if step.relu else y

    def convolution(self, step: Step, x: _Value, weight: str, filters: int, *bias: str) -> _Value:
        """Padded by as many zeros as it takes for ceil(size / stride) results; a padding of -1 leaves out the
        first pixel of each row and column."""
        left_out, before = max(-step.padding, 0), max(step.padding, 0)
        name = x.name
        if left_out:
            name = self.slice(name, [2, 3], [left_out] * 2, [x.height, x.width])
        height, width = (-(-size // step.stride) for size in (x.height, x.width))
        reach = (step.kernel - 1) * step.dilation + 1
        after = [
            max(0, (results - 1) * step.stride + reach - (size - left_out) - before)
            for results, size in ((height, x.height), (width, x.width))
        ]
        geometry = {"strides": [step.stride] * 2, "dilations": [step.dilation] * 2, "group": step.groups}
        geometry |= {"pads": [before, before, *after], "kernel_shape": [step.kernel] * 2}
        y = self.node("Conv", name, weight, *bias, **geometry)
        for end, size, results in zip(after, (x.height, x.width), (height, width), strict=True):
            if (before + size - left_out + end - reach) // step.stride >= results:
                # padded by more than the kernel reaches
                y = self.slice(y, [2, 3], [0, 0], [height, width])
                break
        return _Value(y, filters, height, width)

    def pool(self, step: Step, x: _Value, _residual: _Value | None) -> _Value:
        if step.shuffle > 1:
            apart = [0, step.shuffle, x.channels // step.shuffle, x.height, x.width]
            name = self.node("Reshape", x.name, self.constant(apart, np.int64))
            name = self.node("Transpose", name, perm=[0, 2, 1, 3, 4])
            together = self.constant([0, x.channels, x.height, x.width], np.int64)
            return x._replace(name=self.node("Reshape", name, together))
        if step.kernel == 1:
            return x
        geometry = {"kernel_shape": [step.kernel] * 2, "strides": [step.stride] * 2}
        geometry |= {"pads": [step.padding] * 4, "ceil_mode": int(step.average and step.kernel == 2)}
        name = self.node("AveragePool" if step.average else "MaxPool", x.name, **geometry)
        height, width = (-(-size // step.stride) for size in (x.height, x.width))
        return _Value(name, x.channels, height, width)


class _Values(Pieces):
    """A buffer of a program, as values of the graph."""

    def __init__(self, graph: _Graph):
        super().__init__()
        self.graph = graph

    @staticmethod
    def channels(piece: _Value) -> int:
        return piece.channels

    def join(self, pieces: list[_Value]) -> _Value:
        if len(pieces) == 1:
            return pieces[0]
        name = self.graph.node("Concat", *(piece.name for piece in pieces), axis=1)
        return pieces[0]._replace(name=name, channels=sum(piece.channels for piece in pieces))

    def cut(self, piece: _Value, first: int, end: int) -> _Value:
        if (first, end) == (0, piece.channels):
            return piece
        name = self.graph.slice(piece.name, [1], [first], [end])
        return piece._replace(name=name, channels=end - first)
