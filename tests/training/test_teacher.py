"""The loss of distillation is its formula; teachers are found, must fit, and stay what they are."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torchvision
from support.scripts import TINY_STAGE, receive
from torch import nn

from genotypes import GENOTYPES
from images.loaders import Batch
from images.sets import STATISTICS
from model import ModelConfig, build_model
from run.checkpoint import load_checkpoint
from run.distributed import World
from training.engine import Precision, Training, training_loss, training_step
from training.teacher import DistillationLoss, Taught, Teacher, find_teacher
from utils import InputError

WORLD = World(torch.device("cpu"))
IMAGENET = {
    "classes": [f"n{i:08d}" for i in range(1000)],
    "mean": STATISTICS["imagenet"].mean,
    "std": STATISTICS["imagenet"].std,
    "image_size": 64,
}


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (1.0, 4.0), (0.3, 2.0)])
def test_the_loss_is_its_formula(weight, temperature, soft):
    torch.manual_seed(0)
    logits, teacher = (3 * torch.randn(2, 5, 7, dtype=torch.float64)).requires_grad_()
    labels = torch.rand(5, 7, dtype=torch.float64).softmax(1) if soft else torch.randint(7, (5,))
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    loss = DistillationLoss(criterion, weight=weight, temperature=temperature)
    actual = loss(logits, Taught(labels, teacher.detach()))

    expected = torch.zeros((), dtype=torch.float64)
    for student_row, teacher_row in zip(logits, teacher.detach(), strict=True):
        p = [math.exp(x / temperature) for x in teacher_row.tolist()]
        q = (student_row / temperature).exp()
        for i in range(7):
            share = p[i] / sum(p)
            expected = expected + share * (math.log(share) - (q[i] / q.sum()).log()) * temperature**2 / 5
    expected = weight * expected + (1 - weight) * criterion(logits, labels)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(each, logits, retain_graph=True) for each in (actual, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_a_step_with_a_teacher():
    """Both classifiers learn from it, from the images of the batch; it learns nothing itself. A student that
    is the teacher, but for the mode, has nothing to learn."""
    torch.manual_seed(0)
    fields = {"init_channels": 4, "layers": 3, "groups": 2}
    network = build_model(ModelConfig(GENOTYPES["EBNAS"], **fields))
    teacher = Teacher(network, "a teacher", {})
    model = build_model(ModelConfig(GENOTYPES["EBNAS"], auxiliary=True, **fields))
    batch = Batch(torch.randn(6, 3, 16, 16), torch.randint(10, (6,)), 6)
    before = copy.deepcopy(network.state_dict())
    criterion = DistillationLoss(nn.CrossEntropyLoss(), temperature=3.0)
    settings = {"world": WORLD, "precision": Precision("fp32", WORLD.device), "targets_of": teacher}
    optimizer = torch.optim.Adam(model.parameters())
    training = Training(model, criterion, optimizer, auxiliary_weight=0.4, **settings)
    objective, loss, logits = training_loss(training, batch)
    taught = Taught(batch.targets, network(batch.images)[0].detach())
    torch.testing.assert_close(loss, criterion(logits, taught))
    assert objective > loss > 0
    training_step(training, batch)
    assert all(parameter.grad is None for parameter in network.parameters()) and not network.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])
    _, loss, _ = training_loss(replace(training, model=copy.deepcopy(network)), batch)
    assert abs(loss) < 1e-6


@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    """The state of torchvision's smallest network, random, where torchvision would have downloaded it to."""
    torch.manual_seed(0)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    network = torchvision.models.get_model("squeezenet1_1")
    url = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT.url
    path = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.save(network.state_dict(), path)
    return network.eval(), path


def test_a_teacher_of_torchvision(downloaded):
    network, path = downloaded
    teacher = find_teacher("squeezenet1_1", IMAGENET, WORLD)
    images = torch.randn(2, 3, 64, 64)
    logits = teacher(Batch(images, torch.zeros(2), 2)).logits
    torch.testing.assert_close(logits, network(images).detach())
    for change, words in [
        ({"classes": list("abc")}, "tells 1000 classes apart (tench, ...), not these 3 (a, ...)"),
        ({"mean": (0.5, 0.5, 0.5)}, "learnt from images of mean 0.4850, 0.4560, 0.4060, not 0.5000"),
        ({"image_size": 16}, "takes no images of 16 x 16"),
    ]:
        with pytest.raises(InputError) as error:
            find_teacher("squeezenet1_1", {**IMAGENET, **change}, WORLD)
        assert words in str(error.value)
    path.write_bytes(b"not whole")
    with pytest.raises(InputError, match=r"no weights from https://.*; put that file into"):
        find_teacher("squeezenet1_1", IMAGENET, WORLD)


def test_a_run_goes_on_with_its_teacher_only(interrupted, scripts, data_flags, at_step, without_pictures):
    teacher = interrupted.rename(interrupted.with_name("teacher"))
    at_step(2, receive(15))
    scripts.run("train.py", *data_flags, *TINY_STAGE, "--teacher", f"runs/{teacher.name}", code=143)
    (run,) = scripts.runs("eval-*")
    assert "--teacher other is neither" in scripts.fails("train.py", "--resume", run, "--teacher", "other")
    moved = teacher.rename(teacher.with_name("moved"))
    at_step(1, receive(15))
    scripts.run("train.py", "--resume", run, "--teacher", f"runs/{moved.name}", code=143)
    assert "resumed" in (run / "log.txt").read_text()
    checkpoint = torch.load(moved / "last.pt", weights_only=True)
    checkpoint["model"]["classifier.bias"] += 1
    torch.save(checkpoint, moved / "last.pt")
    line = scripts.run("train.py", "--resume", run, code=2).stderr
    assert f"--teacher runs/{moved.name} has changed" in line and line.count("\n") == 1


def test_the_whole_chain(stopped, scripts, data_flags, without_pictures):
    """Stage 2 from stage 1, both with all options; the average is what is evaluated and packed."""
    (teacher,) = (stopped / "runs").iterdir()
    flags = [*data_flags, *TINY_STAGE, "--activation", "rprelu", "--teacher", teacher, "--learning_rate", 0.4]
    flags += ["--stage1_weight_decay", 1e-3, "--ema", 0.5, "--clip_weights"]
    scripts.run("train.py", *flags)
    message = scripts.run("train.py", *data_flags, *TINY_STAGE, "--binary", code=2).stderr
    assert "no finished stage-1 run" in message  # that one has another activation
    scripts.run("train.py", *flags, "--binary")
    (stage1,), (stage2,) = scripts.runs("eval-*-stage1-*"), scripts.runs("eval-*-stage2-*")
    assert f"starting from runs/{stage1.name}" in (stage2 / "log.txt").read_text()
    for run, decays in ((stage1, [1e-3, 0.0]), (stage2, [0.0])):
        checkpoint = load_checkpoint(run)
        groups = checkpoint["state"]["optimizer"]["param_groups"]
        assert [group["weight_decay"] for group in groups] == decays
        live = checkpoint["state"]["live"]
        latent = torch.cat([live[name].flatten() for name in live if ".conv" in name])
        assert latent.abs().max() == 1 - 2**-24
        shifts = [live[name] for name in live if name.endswith("prelu.shift")]
        assert shifts and all(shift.ne(0).any() for shift in shifts)
        assert not torch.equal(checkpoint["model"]["classifier.weight"], live["classifier.weight"])
    output = scripts.run("evaluate.py", stage2, "--packed").stdout
    assert "the class of the float form on 100.00 % of 30 images" in output
    scripts.run("export.py", stage2)
