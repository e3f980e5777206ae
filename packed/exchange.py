"""A packed network for other engines: ONNX, and torch.export's .pt2. Both compute in float32.

They hold its float form, a float for each bit and the scales folded into the weights: the same function, to
rounding, but without 1-bit arithmetic and with float's bytes. `sign` is +1 at 0, as everywhere here.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator

import torch

from .float_form import FloatForm
from .program import Program

OPSET = 18
LARGEST_BATCH = (1 << 31) - 1  # torch 2.6 refuses a batch without a limit


def metadata(program: Program) -> dict[str, object]:
    """What an engine's user needs beside the graph: the classes, and how a picture becomes its input."""
    values = {name: getattr(program, name) for name in ("classes", "image_size", "resize", "mean", "std")}
    values["preprocessing"] = (
        "RGB; the shorter side made `resize` pixels, bilinear; the central `image_size` square; bytes / 255, "
        "less `mean`, over `std`, channel by channel"
    )
    if program.value_range is not None:
        values["value_range"] = program.value_range
        values["preprocessing"] = (
            "of more than 8 bits a channel, bytes from 0 at the first of `value_range` to 255 at the second; "
            + values["preprocessing"]
        )
    return values


def pt2_bytes(program: Program) -> bytes:
    """A file for torch.export.load: images (batch, 3, size, size) -> logits (batch, classes). Its extra file
    metadata.json holds `metadata`."""
    model, images, dynamic = _arguments(program)
    buffer = io.BytesIO()
    with _quiet():
        exported = torch.export.export(model, (images,), dynamic_shapes=dynamic)
        torch.export.save(exported, buffer, extra_files={"metadata.json": json.dumps(metadata(program))})
    return buffer.getvalue()


def onnx_bytes(program: Program) -> bytes:
    """An ONNX file: `images` (batch, 3, size, size) -> `logits` (batch, classes), with `metadata` as its
    properties, each in JSON. Raises ImportError where onnx or onnxscript is missing."""
    import onnx
    import onnxscript  # noqa: F401  (torch.onnx needs it)

    model, images, dynamic = _arguments(program)
    names = {"input_names": ["images"], "output_names": ["logits"]}
    with _quiet():
        exported = torch.onnx.export(
            model, (images,), dynamo=True, opset_version=OPSET, dynamic_shapes=dynamic, **names
        )
    proto = exported.model_proto
    onnx.helper.set_model_props(proto, {name: json.dumps(value) for name, value in metadata(program).items()})
    return proto.SerializeToString()


def _arguments(program: Program) -> tuple[FloatForm, torch.Tensor, dict]:
    """The module, two images to trace it with, and which sizes vary: the batch's."""
    images = torch.zeros(2, program.buffers[0][0], program.image_size, program.image_size)
    batch = torch.export.Dim("batch", max=LARGEST_BATCH)
    return FloatForm(program, fold=True), images, {"images": {0: batch}}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters print and warn of on their way."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
