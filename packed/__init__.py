"""Packed 1-bit networks."""

from .program import (
    KERNELS,
    PackedFileError,
    PackedNetwork,
    Program,
    Step,
    View,
    available_kernels,
    load,
    program_bytes,
    read_program,
    unpack_bits,
)

__all__ = [
    "KERNELS",
    "PackedFileError",
    "PackedNetwork",
    "Program",
    "Step",
    "View",
    "available_kernels",
    "load",
    "program_bytes",
    "read_program",
    "unpack_bits",
]
