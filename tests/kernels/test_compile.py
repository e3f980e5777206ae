"""--compile by regions: how often what is compiled, one graph a region, nothing that waits for the host."""

import copy
import shutil

import pytest
import torch
from support.batches import WORLD, Batches
from support.scripts import TINY_SEARCH, TINY_STAGE
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from architect import Architect
from genotypes import GENOTYPES
from images.loaders import Batch
from kernels.compilation import compile_regions, regions
from model import ModelConfig, Network, build_model
from model_search import SearchConfig, Supernet
from networks.bats import BatsConfig, BatsUnit
from networks.bnas import BnasUnit
from networks.dcp_nas import DcpConvolution
from training.engine import Position, Precision, Training, evaluate, train_one_epoch, training_step


@pytest.fixture(autouse=True)
def forget_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network(layers: int = 3, **changes) -> Network:
    torch.manual_seed(0)
    settings = {"init_channels": 4, "groups": 2, "num_classes": 4, "auxiliary": True, **changes}
    return build_model(ModelConfig(GENOTYPES["EBNAS"], layers=layers, **settings))


def compilations(model: nn.Module, images: torch.Tensor) -> int:
    counter = CompileCounter()
    compile_regions(model, backend=counter)
    model(images)
    return counter.frame_count


def test_regions_are_compiled_once_per_shape_not_once_per_occurrence():
    """From 6 cells on a network has every shape that it can have."""
    images = torch.randn(2, 3, 16, 16)
    counts, numbers = {}, {}
    for layers in (6, 9):
        torch._dynamo.reset()
        model = network(layers)
        numbers[layers] = sum(isinstance(module, regions()) for module in model.modules())
        counts[layers] = compilations(model, images)
    assert counts[6] == counts[9] < numbers[6] < numbers[9]


def outcome(module: nn.Module, images: torch.Tensor) -> tuple:
    """Results, gradients of all parameters, and BN statistics after a step."""
    results = module(images)
    results = torch.stack(results) if isinstance(results, tuple) else results
    results.square().mean().backward()
    return results.detach(), [p.grad for p in module.parameters()], dict(module.named_buffers())


def test_a_compiled_network_computes_what_an_eager_one_does():
    """In float64, where rounding moves no sign."""
    eager, images = network().double(), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    compiled = copy.deepcopy(eager)
    compile_regions(compiled, backend="aot_eager")
    torch.testing.assert_close(outcome(compiled, images), outcome(eager, images))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_an_inductor_unit_computes_what_an_eager_one_does():
    eager, images = network().double().cells[2].operations[0], torch.randn(4, 16, 8, 8, dtype=torch.float64)
    compiled = copy.deepcopy(eager)
    compile_regions(compiled)
    torch.testing.assert_close(outcome(compiled, images), outcome(eager, images))


class WithTail(Batches):
    """Batches of 8, and one of 6."""

    def epoch(self, _epoch, start=0):
        yield from super().epoch(_epoch, start)
        yield Batch(self.batches[0].images[:6], self.batches[0].targets[:6], 6)


def test_tails_and_evaluation_run_eager():
    model, counter, counts = network(), CompileCounter(), []
    compile_regions(model.cells[0].preprocess1, backend=counter)
    optimizer = torch.optim.Adam(model.parameters())
    shared = {"world": WORLD, "precision": Precision("fp32", WORLD.device)}
    training = Training(model, nn.CrossEntropyLoss(), optimizer, **shared)
    for loader in (Batches(1), WithTail(1)):
        train_one_epoch(training, loader, start=Position(0))
        evaluate(model, loader, **shared)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] > 0


def test_a_tail_of_an_architecture_step_runs_eager():
    model, counter, counts = Supernet(SearchConfig(8, 3, 4)), CompileCounter(), []
    architect = Architect(
        model, learning_rate=1e-3, weight_decay=0.0, path_reg_weight=1.5, edge_reg_weight=0.8
    )
    compile_regions(model.cells[0].preprocess1, backend=counter)
    shared = {"ramp": 1.0, "world": WORLD, "precision": Precision("fp32", WORLD.device)}
    for batch in WithTail(1).epoch(0):
        architect.step(iter([batch]), batch_size=8, **shared)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("changes", [{}, {"activation_bits": 32}, {"weight_binarization": "balanced"}])
def test_a_training_step_reads_nothing_on_the_host(precision, changes):
    """A CUDA graph could not hold it: FakeTensorMode raises where a tensor's value is asked for."""
    with FakeTensorMode():
        model = network(**changes)
        model.drop_path_prob = 0.2
        batch = Batch(torch.randn(4, 3, 16, 16), torch.randint(4, (4,)), 4)
        step(model, list(model.parameters()), batch, Precision(precision, WORLD.device))


def test_a_step_of_the_search_reads_nothing_on_the_host():
    with FakeTensorMode():
        model, precision = Supernet(SearchConfig(8, 3, 4)), Precision("fp32", WORLD.device)
        batch = Batch(torch.randn(4, 3, 16, 16), torch.randint(4, (4,)), 4)
        architect = Architect(
            model, learning_rate=1e-3, weight_decay=0.0, path_reg_weight=1.5, edge_reg_weight=0.8
        )
        architect.step(iter([batch]), ramp=1.0, batch_size=4, world=WORLD, precision=precision)
        step(model, model.weight_parameters(), batch, precision)


def step(model: nn.Module, parameters: list[nn.Parameter], batch: Batch, precision: Precision) -> None:
    optimizer = torch.optim.Adam(parameters, fused=True)
    settings = {"grad_clip": 5.0, "auxiliary_weight": 0.4}
    training_step(Training(model, nn.CrossEntropyLoss(), optimizer, WORLD, precision, **settings), batch)


def test_a_step_in_cuda_graphs_begins_with_the_networks_forward_pass(monkeypatch):
    begun, model = [], network()
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(True))
    monkeypatch.setattr(nn.Module, "compile", lambda _module, **_options: None)
    compile_regions(model, mode="reduce-overhead")
    for _ in range(3):
        model(torch.randn(2, 3, 16, 16))
    assert len(begun) == 3


@pytest.mark.parametrize("script", ["train.py", "train_search.py"])
def test_the_scripts_pass_the_mode_on(script, scripts, data_flags, monkeypatch):
    calls = []
    monkeypatch.setattr(nn.Module, "compile", lambda _module, **options: calls.append(options))
    flags = {"train.py": TINY_STAGE, "train_search.py": TINY_SEARCH}[script]
    compiled = ["--epochs", 1, "--compile", "--compile_mode", "reduce-overhead"]
    scripts.run(script, *data_flags, *flags, *compiled)
    assert calls and all(call["mode"] == "reduce-overhead" and call["fullgraph"] for call in calls)


def test_a_mode_alone_has_no_use(scripts, data_flags):
    output = scripts.run(
        "train.py", *data_flags, *TINY_STAGE, "--epochs", 1, "--compile_mode", "default"
    ).stdout
    assert "--compile_mode has no use here: it needs --compile" in output


def test_a_row_computes_compiled_what_it_does_eager():
    """The units of BNAS, BATS and DCP-NAS, each one graph."""
    settings = BatsConfig(GENOTYPES["BATS"], init_channels=12).conv_settings
    units = (
        BnasUnit(4, 4, 3, padding=1),
        BatsUnit(4, 4, 3, padding=1, groups=2, shuffles=True, settings=settings),
        DcpConvolution(4, 3, stride=2, dilation=2, weight_bits=1),
    )
    images = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for eager in map(nn.Module.double, units):
        compiled = copy.deepcopy(eager)
        compile_regions(compiled, backend="aot_eager")
        torch.testing.assert_close(outcome(compiled, images), outcome(eager, images))
