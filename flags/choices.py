"""What a flag can be, by name. What implements a name imports these, and so no parser needs torch."""

SETS = ("cifar10", "cifar100", "shapes", "folder")
TRAINED_SETS = ("cifar10", "cifar100", "folder", "imagenet")
"""What a checkpoint of another program can be of."""

STAGE1_BITS = {"w1a32": (1, 32), "w32a1": (32, 1), "w32a32": (32, 32)}
"""Bits of weights and of activations in stage 1; stage 2 is W1A1."""
"""What stage 1 makes binary: weights, activations, or nothing."""

FAMILIES = ("cifar", "imagenet")
"""Of images: small or large, and so of a network's stem."""

WEIGHT_BINARIZATIONS = ("plain", "balanced")
ACTIVATIONS = ("prelu", "rprelu")
PRECISIONS = ("fp32", "bf16", "fp16")
MEMORY_FORMATS = ("auto", "contiguous", "channels_last")
FORMS = ("plain", "torch", "native")
"""Of a network: see kernels/."""

CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")
COMPILE_MODES = ("default", *CUDA_GRAPH_MODES, "max-autotune-no-cudagraphs")
RIVALS = ("channels_last", "compile", "onnxruntime", "onnxruntime_int8", "openvino")
"""What `benchmark.py infer` compares with, beside eager: see comparison/engines.py."""

CLOCKS = ("wall", "cpu")
COSTS = ("kilobytes", "ram", "ops")
"""`kilobytes`: of the file that export.py writes, in 1,000 bytes. `ram`: in the same unit, of the memory that
the packed network computes one image in. `ops`: as networks/cost.py counts them."""
