"""Run a packed 1-bit network on the CPU, from its file alone.

    from packed import load
    net = load("model.ebnas")                     # written by export.py
    logits = net(net.preprocess("photo.jpg"))     # files, or RGB arrays uint8 (h, w, 3), of any size
    logits = net(images)                          # float32 (n, 3, size, size), normalised as in training

Arrays in, arrays out; tensors in, tensors out. The network runs in one call of binary_cpu.c, which the
system's C compiler builds at first use into the user's cache. Without a compiler one warning is given and the
float form of the same program runs on PyTorch, if that is installed.

This folder runs alone: NumPy and safetensors are all that it needs, and Pillow to read files. (lowering.py,
which makes the programs, needs the rest of the project.) EBNAS_KERNEL = avx512, avx2, neon, c or torch forces
a path; EBNAS_CFLAGS adds flags for the compiler.
"""

from .compiler import NoCompiler
from .kernel import KERNELS, available_kernels
from .network import PackedNetwork, load
from .program import (
    PackedFileError,
    Program,
    Step,
    View,
    parse_program,
    program_bytes,
    read_program,
    unpack_bits,
)

__all__ = [
    "KERNELS",
    "NoCompiler",
    "PackedFileError",
    "PackedNetwork",
    "Program",
    "Step",
    "View",
    "available_kernels",
    "load",
    "parse_program",
    "program_bytes",
    "read_program",
    "unpack_bits",
]
