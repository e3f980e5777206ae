"""The native kernels compute what the modules do: values, gradients and running statistics, on every path
that this machine runs, with any number of threads; and who cannot run them is told so."""

import copy
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from support.scripts import ROOT, TINY_STAGE, receive
from torch import nn
from torch.nn import functional as F

from genotypes import GENOTYPES
from kernels import accelerate, choose_form, library
from kernels.fused import Geometry
from kernels.library import paths, unavailable
from kernels.native import avg_pool, max_pool, pointwise, unit
from kernels.native_search import cell as search_cell
from kernels.native_search import preprocessed
from model import ModelConfig, build_model
from model_search import SearchConfig, Supernet
from operations import BinaryUnit, FactorizedReduce
from utils import InputError

pytestmark = pytest.mark.skipif(unavailable() is not None, reason="no C compiler")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=paths())
def path(request, monkeypatch) -> str:
    """Each path of the kernel in turn."""
    monkeypatch.setenv("EBNAS_KERNEL", request.param)
    return request.param


def assert_close(ours, theirs, tolerance=1e-9):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    ours, theirs = ours.double(), theirs.double()
    # where a BN follows, gradients of what shifts its input are 0 but for rounding
    assert (ours - theirs).norm() <= tolerance * (theirs.norm() + 1)


def random_unit(generator) -> tuple[nn.Module, tuple[int, ...]]:
    """A unit of any geometry, and the size of its input."""

    def draw(*choices):
        return choices[torch.randint(len(choices), (), generator=generator)]

    groups, c_in, c_out = draw(1, 2, 3), draw(1, 2, 3, 6), draw(1, 2, 4, 7)
    kernel, dilation = draw((1, 1), (3, 1), (3, 2), (5, 1), (5, 2))
    stride, residual = draw(1, 2), draw(False, True)
    stride = 1 if kernel == 1 else stride
    bits = dict(
        zip(("weight_bits", "activation_bits"), draw((1, 1), (1, 32), (32, 1), (32, 32)), strict=True)
    )
    made = BinaryUnit(
        groups * c_in,
        groups * (c_in if residual else c_out),
        kernel,
        bits=bits,
        stride=stride,
        padding=kernel // 2 * dilation,
        dilation=dilation,
        groups=groups,
        residual=residual,
        activation=draw("prelu", "rprelu"),
    )
    size = draw(1, 2, 3, 5), groups * c_in, draw(1, 2, 3, 7, 8, 13, 32), draw(1, 2, 4, 7, 9, 16, 33)
    return made, size


def spread(module: nn.Module) -> nn.Module:
    """Parameters and running statistics that are not the initial ones, slopes on both sides of 0."""
    for parameter in module.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return module.double()


def outcome(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The result, all gradients and all buffers."""
    y = module(x)
    torch.manual_seed(1)
    gradients = torch.autograd.grad(y, (x, *module.parameters()), torch.randn_like(y))
    return [y.detach(), *gradients, *module.buffers()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("number", range(40))
def test_units_of_random_geometry_equal_their_modules(number, training, path):
    plain, size = random_unit(torch.Generator().manual_seed(number))
    if training and size[0] * size[2] * size[3] < 8:
        size = (5, size[1], 5, 3)  # BN needs values; few of them leave a variance of rounding errors
    spread(plain).train(training)
    native = accelerate(copy.deepcopy(plain), "native")
    x = (2 * torch.randn(size, dtype=torch.float64) + 1).requires_grad_()
    for ours, theirs in zip(outcome(native, x), outcome(plain, x), strict=True):
        assert_close(ours, theirs)


def stem(groups, c_in, c_out, kernel, stride, padding, *, relu):
    convolution = nn.Conv2d(groups * c_in, groups * c_out, kernel, stride, padding, groups=groups, bias=False)
    norm = nn.BatchNorm2d(groups * c_out)
    return nn.Sequential(convolution, norm, *([nn.ReLU()] if relu else []))


@pytest.mark.parametrize("of_images", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("shape", "relu", "size"),
    [
        ((1, 3, 42, 3, 1, 1), True, (16, 16)),
        ((1, 3, 11, 3, 2, 1), False, (9, 33)),
        ((4, 2, 7, 3, 2, 1), True, (13, 8)),
        ((2, 3, 5, 2, 1, 0), True, (5, 2)),
        ((1, 6, 9, 2, 1, 0), True, (2, 2)),  # of one pixel: a product of matrices
    ],
)
def test_stems_of_random_numbers_equal_their_modules(shape, relu, size, training, of_images, path):
    """Images need no gradient."""
    plain = spread(stem(*shape, relu=relu)).train(training)
    native = accelerate(copy.deepcopy(plain), "native")
    x = torch.randn(5, shape[0] * shape[1], *size, dtype=torch.float64, requires_grad=not of_images)
    results = []
    for module in (native, plain):
        y = module(x)
        wanted = [*module.parameters(), *([] if of_images else [x])]
        torch.manual_seed(1)
        gradients = torch.autograd.grad(y, wanted, torch.randn_like(y))
        results.append([y.detach(), *gradients, *module.buffers()])
    for pair in zip(*results, strict=True):
        assert_close(*pair)


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: BinaryUnit(180, 44, 1, bits={}), (2, 180, 3, 5)),
        (lambda: BinaryUnit(131, 65, 1, bits={"activation_bits": 32}), (1, 131, 7, 7)),
        (lambda: FactorizedReduce(140, 38, bits={}), (2, 140, 7, 7)),
    ],
)
def test_1x1_units_of_many_weights_and_few_pixels_equal_their_modules(make, size, path):
    """Their weight gradients are taken of all pixels at once."""
    plain = spread(make())
    native = accelerate(copy.deepcopy(plain), "native")
    x = torch.randn(size, dtype=torch.float64, requires_grad=True)
    for ours, theirs in zip(outcome(native, x), outcome(plain, x), strict=True):
        assert_close(ours, theirs)


def test_gradients_may_be_slices_of_a_concatenation_of_random_numbers(path):
    """They are read where they are; to the bit what a copy of them gives."""
    modules = [
        BinaryUnit(6, 6, 3, bits={}, padding=1, groups=3, residual=True),
        BinaryUnit(6, 6, 1, bits={}),
        stem(1, 6, 6, 3, 1, 1, relu=True),
    ]
    forms = [accelerate(spread(module), "native") for module in modules]
    forms += [lambda x: max_pool(x, 1), lambda x: avg_pool(x, 1)]
    x = torch.randn(3, 6, 7, 9, dtype=torch.float64, requires_grad=True)
    wide = torch.randn(3, 18, 7, 9, dtype=torch.float64)
    for form in forms:
        y = form(x)
        slices = wide[:, 6:12], wide[:, 6:12].contiguous(), wide.mT.contiguous().mT[:, 6:12]
        first, *others = (torch.autograd.grad(y, x, grad, retain_graph=True)[0] for grad in slices)
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (33, 33), (4, 5), (32, 32)])
def test_a_factorised_reduction_equals_its_modules(size, training, path):
    bits = {"weight_bits": 1, "activation_bits": 1}
    plain = spread(FactorizedReduce(6, 10, bits=bits)).train(training)
    native = accelerate(copy.deepcopy(plain), "native")
    x = torch.randn(3, 6, *size, dtype=torch.float64, requires_grad=True)
    for ours, theirs in zip(outcome(native, x), outcome(plain, x), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("c_in", "c_out"), [(3, 5), (48, 16), (130, 33)])
def test_a_1x1_convolution_and_bn_without_parameters(c_in, c_out, training, path):
    """The supernet's preprocessing."""
    norm = nn.BatchNorm2d(c_out, affine=False).double().train(training)
    theirs = copy.deepcopy(norm)
    x = torch.randn(3, c_in, 9, 7, dtype=torch.float64).sign().requires_grad_()
    weight = torch.randn(c_out, c_in, 1, 1, dtype=torch.float64, requires_grad=True)
    results = pointwise(x, [weight], None, norm, None, signs=False), theirs(F.conv2d(x, weight))
    grad = torch.randn_like(results[0])
    assert_close(*(y.detach() for y in results))
    for pair in zip(*(torch.autograd.grad(y, (x, weight), grad) for y in results), strict=True):
        assert_close(*pair)
    assert_close(norm.running_mean, theirs.running_mean)
    assert_close(norm.running_var, theirs.running_var)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (33, 31), (1, 1), (2, 3), (1, 20), (16, 5)])
@pytest.mark.parametrize("stride", [1, 2])
def test_pools_equal_torchs_on_ties(stride, size, dtype, path):
    """A maximum to the bit, its gradient to the first of equal pixels."""
    x = torch.randint(-1, 2, (2, 3, *size)).to(dtype).requires_grad_()
    ours, theirs = max_pool(x, stride), F.max_pool2d(x, 3, stride, 1)
    assert torch.equal(ours, theirs)
    average = avg_pool(x, stride), F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)
    torch.testing.assert_close(*average)
    grad = torch.randn_like(ours)
    exact, close = ([torch.autograd.grad(y, x, grad)[0] for y in pair] for pair in ((ours, theirs), average))
    assert torch.equal(*exact)
    torch.testing.assert_close(*close)


@pytest.mark.parametrize("stride", [1, 2])
def test_pools_pass_gradients_where_torchs_do(stride, path):
    """Of several NaN to the last; of nothing but -infinity to the first pixel of the image."""
    x = torch.randint(0, 3, (2, 3, 11, 21)).float()
    x[0][torch.rand(3, 11, 21) < 0.3] = float("nan")
    x[1] = -float("inf")
    x.requires_grad_()
    ours, theirs = max_pool(x, stride), F.max_pool2d(x, 3, stride, 1)
    grad = torch.randn_like(theirs)
    assert torch.equal(*(torch.autograd.grad(y, x, grad)[0] for y in (ours, theirs)))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_maximum_is_nan_where_torchs_is(stride, path):
    x = torch.randn(1, 1, 9, 20)
    x[0, 0, 2, 3], x[0, 0, 5, 5], x[0, 0, 0, 0] = float("nan"), float("inf"), -float("inf")
    torch.testing.assert_close(
        max_pool(x, stride), F.max_pool2d(x, 3, stride, 1), equal_nan=True, rtol=0, atol=0
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kernel", [1, 3])
def test_what_is_not_finite_comes_out(kernel, bad, path):
    """So that a run with a NaN ends: it must not become a sign."""
    plain = BinaryUnit(4, 4, kernel, bits={}, padding=kernel // 2)
    native = accelerate(copy.deepcopy(plain), "native")
    x = torch.randn(2, 4, 6, 6)
    x[1, 2, 3, 3] = bad
    assert torch.equal(native(x).isfinite(), plain(x).isfinite())


@pytest.mark.parametrize("groups", [1, 6])
def test_the_backward_pass_has_the_signs_of_the_forward_pass(groups, path):
    """Where rounding decides a third of them: of x = 1, BN1 gives 0 but for a few ulps."""
    norm1, norm2, prelu = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.PReLU(6)
    x = torch.randint(0, 3, (16, 6, 9, 7)).float().requires_grad_()
    mean, var = x.detach().mean((0, 2, 3)), x.detach().var((0, 2, 3), unbiased=False)
    with torch.no_grad():
        norm1.bias.copy_((mean - 1) * (var + norm1.eps).rsqrt() + torch.linspace(-1e-6, 1e-6, 6))
    weight = torch.eye(6).view(6, 6, 1, 1) if groups == 1 else torch.ones(6, 1, 1, 1)
    weight.requires_grad_()
    convolution = Geometry((1, 1), (0, 0), (1, 1), groups, True)
    out = unit(x, None, weight, convolution, norm1, norm2, prelu)
    saved = [tensor for tensor in out.grad_fn.saved_tensors if tensor is not None]
    (signs,) = [t for t in saved if t.shape == x.shape and t.abs().eq(1).all()]  # of the convolution's result
    ties = signs[x == 1]
    assert (ties < 0).any() and (ties > 0).any()

    y = signs.double().requires_grad_()
    moments = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), unbiased=False, keepdim=True)
    grad = torch.randn_like(out)
    (of_y,) = torch.autograd.grad(
        F.prelu((y - moments[0]) * (moments[1] + norm2.eps).rsqrt(), prelu.weight.double()), y, grad.double()
    )
    expected = (of_y * signs).sum((0, 2, 3))
    (actual,) = torch.autograd.grad(out, weight, grad)
    actual = actual.flatten(1).diagonal() if groups == 1 else actual.flatten()
    step = 2 * of_y.abs().median()  # of one sign
    assert (actual - expected).abs().max() < step / 10


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("of_architecture", [True, False])
@pytest.mark.parametrize(
    ("channels", "k", "size"), [(8, (8, 4), (10, 13)), (16, (4, 8), (9, 9)), (8, (8, 4), (32, 33))]
)
def test_a_supernet_equals_its_modules(channels, k, size, of_architecture, training, path):
    """In an architecture step, and in a weight step: the gradients that are asked for, running statistics."""
    plain = Supernet(SearchConfig(channels, 3, 7, *k)).double().train(training)
    for parameter in plain.arch_parameters():
        nn.init.normal_(parameter)
    for norm in plain.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, 0, 0.1)
    native = accelerate(copy.deepcopy(plain), "native")
    images, results = torch.randn(3, 3, *size, dtype=torch.float64), []
    for network in (native, plain):
        arch, weights = network.arch_parameters(), network.weight_parameters()
        for parameter in arch:
            parameter.requires_grad_(of_architecture)
        for parameter in weights:
            parameter.requires_grad_(not of_architecture)
        logits, _ = network(images)
        gradients = torch.autograd.grad(
            F.cross_entropy(logits, torch.arange(3)), arch if of_architecture else weights
        )
        results.append([logits.detach(), *gradients, *network.buffers()])
    for pair in zip(*results, strict=True):
        assert_close(*pair)


@pytest.fixture
def threads():
    yield torch.set_num_threads
    torch.set_num_threads(1)


def test_any_number_of_threads_gives_the_same_bits(threads):
    units = [
        BinaryUnit(12, 12, 3, bits={}, padding=1, groups=6, residual=True),
        BinaryUnit(40, 20, 1, bits={}),
        FactorizedReduce(8, 12, bits={}),
    ]
    units += [stem(1, 3, 21, 3, 1, 1, relu=True), BinaryUnit(180, 44, 1, bits={})]
    inputs = [torch.randn(37, c, 16, 16, requires_grad=True) for c in (12, 40, 8, 3)]
    inputs.append(torch.randn(2, 180, 3, 5, requires_grad=True))
    x = torch.randn(37, 2, 16, 16, requires_grad=True)
    supernet = accelerate(Supernet(SearchConfig(8, 3)), "native")
    signs = torch.randn(13, 24, 16, 16).sign()
    results = []
    for count in (1, 2, 3, 5):
        threads(count)
        made = [
            outcome(accelerate(copy.deepcopy(m), "native"), i) for m, i in zip(units, inputs, strict=True)
        ]
        pools = max_pool(x, 1).square().sum() + avg_pool(x, 2).square().sum()
        made.append(torch.autograd.grad(pools, x))
        cell = supernet.cells[0]  # the stem is torch's, whose sums depend on the threads
        statistics: list = []
        states = preprocessed(signs, [cell.preprocess0, cell.preprocess1], statistics).values()
        edges, operations = torch.ones(14), torch.full((14, 7), 0.1, requires_grad=True)
        y = search_cell(cell, *states, edges, operations, statistics)
        of = operations, *(p for p in cell.parameters())
        made.append([y.detach(), *torch.autograd.grad(y.square().sum(), of)])
        results.append([tensor for part in made for tensor in part])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_operators_have_true_fakes():
    """What torch.compile, torch.export and the count of memory see."""
    x, grad, stride = torch.randn(2, 6, 7, 9), torch.randn(2, 6, 4, 5), 2
    check = {"test_utils": ("test_schema", "test_faketensor")}
    pool = torch.ops.ebnas.pool.default, torch.ops.ebnas.pool_backward.default
    torch.library.opcheck(pool[0], (x, stride, False), **check)
    torch.library.opcheck(pool[1], (grad, x, x.shape, stride, False), **check)
    vectors = [torch.rand(6) for _ in range(4)]
    arguments = (x, None, torch.randn(6, 2, 3, 3), torch.rand(6), None, None, *vectors, *(None,) * 4)
    settings = [1, 1, 1, 1, 1, 1, 3, 1, 1, 1]
    torch.library.opcheck(torch.ops.ebnas.unit.default, (*arguments, settings, 1e-5), **check)
    images, weight, norm = torch.randn(2, 3, 7, 9), torch.randn(6, 3, 3, 3), [torch.rand(6) for _ in range(2)]
    settings = [2, 2, 1, 1, 1, 1, 1, True, True]
    forward = images, weight, *norm, None, None, settings, 1e-5
    torch.library.opcheck(torch.ops.ebnas.conv_norm.default, forward, **check)
    backward = grad, images, weight, *norm, grad, torch.rand(3, 6), True, settings
    torch.library.opcheck(torch.ops.ebnas.conv_norm_backward.default, backward, **check)


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    for function in (library.load, library.unavailable):
        function.cache_clear()
    yield
    for function in (library.load, library.unavailable):
        function.cache_clear()


def test_without_a_compiler_torch_computes_and_says_so(no_compiler):
    form = choose_form("auto", CPU)
    assert form.name == "torch" and "no C compiler" in form.words and "speed" in form.words
    with pytest.raises(InputError, match="--kernels native cannot run here: no C compiler"):
        choose_form("native", CPU)


def test_the_form_follows_what_is_asked_for():
    assert choose_form("auto", CPU).name == "native"
    for wanted in ("plain", "torch"):
        assert choose_form(wanted, CPU).name == wanted
    assert choose_form("auto", CPU, precision="bf16").name == "torch"
    assert choose_form("auto", CPU, compiled=True).name == "torch"
    with pytest.raises(InputError, match="not in bf16"):
        choose_form("native", CPU, precision="bf16")


def test_a_run_goes_on_in_another_form_and_says_so(scripts, data_flags, at_step, without_pictures):
    at_step(2, receive(signal.SIGTERM))
    flags = [*data_flags, *TINY_STAGE, "--kernels", "torch"]
    scripts.run("train.py", *flags, code=143)
    (run,) = scripts.runs("*")
    at_step(10**6, receive(signal.SIGTERM))
    scripts.run("train.py", "--resume", run, "--kernels", "native")
    text = (run / "log.txt").read_text()
    assert (
        "kernels: native" in text and "so far it was torch: the same computation, rounded otherwise" in text
    )


def driven(folder, compiler: str, *flags: str, emulator: tuple[str, ...] = ()) -> list[tuple[str, float]]:
    """What native_driver.c prints, compiled so: names and numbers."""
    program = folder / f"driver-{compiler}"
    source = ROOT / "tests" / "support" / "native_driver.c"
    warnings = ("-Wall", "-Wextra", "-Werror", "-Wno-unused-function")
    include = f"-I{ROOT / 'kernels' / 'source'}"
    command = [compiler, *library.FLAGS, "-O2", *flags, *warnings, include, source, "-o", program, "-lm"]
    subprocess.run(command, check=True)
    done = subprocess.run([*emulator, program], check=True, capture_output=True, text=True)
    lines = (line.rsplit(" ", 1) for line in done.stdout.splitlines())
    return [(name, float(number)) for name, number in lines]


def test_the_neon_path_computes_what_plain_c_does(tmp_path):
    """Under an emulator, in float64."""
    compiler, emulator = "aarch64-linux-gnu-gcc", "qemu-aarch64"
    if missing := [tool for tool in (compiler, emulator) if shutil.which(tool) is None]:
        pytest.skip(f"{' and '.join(missing)} not installed")
    root = ("-L", "/usr/aarch64-linux-gnu")
    neon = driven(tmp_path, compiler, "-DDOUBLE", emulator=(emulator, *root))
    plain = driven(tmp_path, "gcc", "-DDOUBLE", "-DPLAIN_C")
    assert len(neon) == len(plain) > 5_000
    for (name, ours), (same, theirs) in zip(neon, plain, strict=True):
        assert name == same and ours == pytest.approx(theirs, rel=1e-8, abs=1e-9), name


@pytest.mark.sanitizer
@pytest.mark.parametrize("path_name", paths())
def test_under_sanitizers(path_name, tmp_path):
    """These tests, with the kernels compiled under the address and undefined-behaviour sanitizers."""
    if os.environ.get("EBNAS_CFLAGS"):
        pytest.skip("this is the run under sanitizers")
    runtime = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True)
    libraries = [runtime.stdout.strip(), "libstdc++.so.6"]
    if runtime.returncode or not os.path.isabs(libraries[0]):
        pytest.skip("gcc has no address sanitizer here")
    environment = {
        **os.environ,
        "EBNAS_KERNEL": path_name,
        "EBNAS_CFLAGS": "-O0 -fsanitize=address,undefined -fno-sanitize-recover=all",
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "XDG_CACHE_HOME": str(tmp_path),
        "CC": "gcc",
    }
    chosen = f"{path_name} and (random or factorised or 1x1 or pools or supernet)"
    flags = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-k", chosen]
    command = [sys.executable, "-m", "pytest", *flags, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_drop_path_is_in_the_units():
    """The same samples are dropped, and all gradients are the plain ones. There are no max pools, because
    rounding decides what they choose."""
    pairs = tuple((name.replace("max", "avg"), source) for name, source in GENOTYPES["EBNAS"].normal)
    genotype = GENOTYPES["EBNAS"]._replace(normal=pairs, reduce=pairs)
    torch.manual_seed(0)
    plain = build_model(ModelConfig(genotype, init_channels=8, layers=3, groups=2)).double()
    native = accelerate(copy.deepcopy(plain), "native")
    x, results = torch.randn(6, 3, 16, 16, dtype=torch.float64), []
    for network in (plain, native):
        network.drop_path_prob = 0.5
        torch.manual_seed(1)
        logits, _ = network(x)
        logits.square().sum().backward()
        results.append((logits, dict(network.named_parameters())))
    assert_close(results[1][0], results[0][0])
    for name, parameter in results[0][1].items():
        assert_close(results[1][1][name].grad, parameter.grad)
    assert all(type(cell).__name__ == "NativeCell" for cell in native.cells)
