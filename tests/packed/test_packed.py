"""Packed networks against the float form, their files, threads and cache, and the scripts around them."""

import csv
import dataclasses
import os
import shutil
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.packed_programs import (
    SEVEN,
    assert_only_rounding,
    data_entry,
    float_logits,
    needs_kernel,
    network,
    random_program,
    skip_without,
)
from support.scripts import ROOT
from torch import nn

import export
import infer
from genotypes import GENOTYPES
from images.sets import load_set
from images.shapes import SHAPES, draw_shapes
from model import ModelConfig, build_model
from networks import lowering
from packed import (
    KERNELS,
    PackedNetwork,
    kernel,
    load,
    program_bytes,
    read_program,
)
from packed.kernel import Plan
from packed.picture import central_square, read_rgb
from run import checkpoint
from run.distributed import World
from utils import InputError

NETWORKS = {  # of a genotype each; the image's height and width
    "cifar": ({"genotype": GENOTYPES["EBNAS"], "init_channels": 28, "layers": 6}, (32, 32)),
    "deep": ({"genotype": GENOTYPES["EBNAS"], "init_channels": 4, "layers": 20, "groups": 2}, (24, 24)),
    "seven operations": ({"genotype": SEVEN, "init_channels": 12, "layers": 5, "groups": 3}, (32, 32)),
    "odd sizes": ({"genotype": SEVEN, "init_channels": 20, "layers": 3, "groups": 1}, (33, 27)),
    "balanced": (
        {"genotype": SEVEN, "init_channels": 6, "layers": 4, "groups": 6, "weight_binarization": "balanced"},
        (19, 32),
    ),
    "rprelu": (
        {"genotype": SEVEN, "init_channels": 12, "layers": 5, "groups": 3, "activation": "rprelu"},
        (32, 27),
    ),
    "imagenet": (
        {"genotype": GENOTYPES["EBNAS"], "family": "imagenet", "init_channels": 56, "layers": 5},
        (64, 64),
    ),
    "imagenet, odd": (
        {"genotype": SEVEN, "family": "imagenet", "init_channels": 24, "layers": 3, "groups": 3},
        (97, 75),
    ),
}


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """Small layers: OpenMP's barriers take longer than the work where the cores are shared with others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {name: network(**fields) for name, (fields, _) in NETWORKS.items()}


def packed_form(model: nn.Module, **options) -> PackedNetwork:
    return PackedNetwork(lowering.lower(model, data_entry(model.config.num_classes)), **options)


@pytest.mark.parametrize("kernel", [*KERNELS, "torch"])
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_equal_the_float_form(name, kernel, models):
    if kernel != "torch":
        skip_without(kernel)
    images = torch.randn(5, 3, *NETWORKS[name][1], generator=torch.Generator().manual_seed(1))
    net = packed_form(models[name], kernel=kernel)
    expected = float_logits(models[name], images)
    difference = (net(images) - expected).abs().amax(1)
    for image in images[difference > 1e-3]:
        assert_only_rounding(models[name], net, image)
    assert (difference < 1e-3).sum() >= 3


def test_2000_images():
    """Same top-1 on 99.9 %; logits within 1e-3, but where a threshold's rounding can be shown."""
    model = network(genotype=GENOTYPES["EBNAS"], init_channels=14, layers=5)
    net = packed_form(model)
    images = torch.randn(2000, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    expected = torch.cat([float_logits(model, batch) for batch in images.split(250)])
    logits = net(images)
    assert (logits.argmax(1) == expected.argmax(1)).float().mean() >= 0.999
    differing = images[(logits - expected).abs().amax(1) > 1e-3]
    assert len(differing) < 40
    for image in differing:
        assert_only_rounding(model, net, image)


@pytest.mark.parametrize("strict", [False, True])
def test_sign_thresholds_are_those_of_the_exact_bn(strict):
    """At each threshold and at the float32 next below it, against the BN's sign in rational numbers."""
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(400).eval()
    with torch.no_grad():
        bn.weight.normal_()
        bn.bias.normal_()
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.1, 2)
        bn.weight[:20] = 0
        bn.bias[:3] = 0
        bn.bias[20:40], bn.running_mean[20:40] = 0, 0  # zero exactly at x = 0
        bn.weight[40:60] *= 1e-30
        bn.weight[60:80] = 1e-44  # zero where no float32 is
        bn.bias[60:80] *= 1e10
    threshold, inverted = lowering.sign_thresholds(bn, strict=strict)
    scale, shift = (values.numpy() for values in lowering._affine(bn))
    assert not np.isnan(threshold).any() and (threshold < np.inf).all()
    largest = np.finfo(np.float32).max
    finite = np.clip(threshold, -largest, largest)
    zero = np.zeros(400, np.float32)
    for x in (finite, np.nextafter(finite, -largest), zero, -zero):
        parts = zip(scale.tolist(), x.tolist(), shift.tolist(), strict=True)
        exact = [Fraction(a) * Fraction(v) + Fraction(b) for a, v, b in parts]
        exact = [value > 0 if strict else value >= 0 for value in exact]
        # scale and shift are float64 themselves: a zero that they put elsewhere is not the threshold's doing
        near = np.abs(scale * x + shift) < 1e-12 * (np.abs(scale * x) + np.abs(shift))
        np.testing.assert_array_equal(((x >= threshold) ^ inverted) | near, np.array(exact) | near)
        assert near.mean() < 0.05


def test_export_refuses(models):
    with pytest.raises(InputError, match="W1A32"):
        lowering.lower(network(**NETWORKS["cifar"][0], activation_bits=32), data_entry())
    model = network(**NETWORKS["deep"][0])
    model.cells[3].preprocess1.bn1.running_var[2] = np.inf
    with pytest.raises(InputError, match=r"cells\.3\.preprocess1\.bn1\.running_var is not finite"):
        lowering.lower(model, data_entry())


def test_file_round_trip_and_size(tmp_path):
    """The published CIFAR configuration at its full width: the file has at most 1/20 of the float32 bytes."""
    model = build_model(ModelConfig(genotype=GENOTYPES["EBNAS"])).eval()
    program = lowering.lower(model, data_entry())
    path = tmp_path / "model.ebnas"
    path.write_bytes(program_bytes(program))
    assert path.stat().st_size * 20 <= 4 * sum(p.numel() for p in model.parameters())
    again = read_program(path)
    assert program_bytes(again) == path.read_bytes()
    assert again.config == program.config and again.classes == program.classes


@needs_kernel
def test_threads_and_sizes_do_not_disturb_each_other(kernel, models):
    """Two networks, each called by three Python threads with several sizes: bit for bit the lone results."""
    skip_without(kernel)
    nets = [packed_form(models[name], kernel=kernel, threads=2) for name in ("deep", "seven operations")]
    rng = np.random.default_rng(0)
    batches = [
        rng.standard_normal((n, 3, s, s), np.float32)
        for n, s in ((5, 16), (1, 24), (8, 20), (2, 17), (3, 32))
    ]
    expected = [[np.concatenate([net(image[None]) for image in batch]) for batch in batches] for net in nets]
    failures = []

    def work(start: int) -> None:
        for turn in range(15):
            which, i = (start + turn) % 2, (start * 2 + turn) % len(batches)
            if not np.array_equal(nets[which](batches[i]), expected[which][i]):
                failures.append((which, i))

    workers = [threading.Thread(target=work, args=(start,)) for start in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_inputs(models):
    net = packed_form(models["deep"])
    pictures = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), np.uint8)
    images = net.normalize(pictures)
    mean, std = (torch.tensor(data_entry()[name]).view(3, 1, 1) for name in ("mean", "std"))
    expected = (torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(255) - mean) / std
    torch.testing.assert_close(torch.from_numpy(images), expected)
    assert isinstance(net(images), np.ndarray) and isinstance(net(expected), torch.Tensor)
    assert net(images[:0]).shape == (0, 10)
    np.testing.assert_array_equal(net(images[:, :, ::-1].transpose(0, 1, 3, 2)[::-1]).shape, (2, 10))
    for wrong in (images[0], images[:, :2], images.astype(np.float64), pictures, images[:, :, :0]):
        with pytest.raises(ValueError, match="expected float32 images"):
            net(wrong)
    for value in (np.nan, np.inf, -2e6):
        spoilt = images.copy()
        spoilt[1, 2, 3, 4] = value
        with pytest.raises(ValueError, match="finite"):
            net(spoilt)
    with pytest.raises(ValueError, match="too large"):
        net(np.zeros((1, 3, 4097, 4096), np.float32))
    for wrong in (pictures[0, 0], pictures[..., :2], images, images.transpose(0, 2, 3, 1)):
        with pytest.raises(ValueError, match="expected uint8"):
            net.preprocess(wrong)


def test_sizes(models):
    """A loaded network takes the size of training; preprocess makes it of one picture or several."""
    net = packed_form(models["deep"], any_size=False)  # 32 x 32
    pictures = [np.full((40, 30, 3), 9, np.uint8), np.full((32, 32, 3), 9, np.uint8)]
    images = net.preprocess(pictures)
    assert images.shape == (2, 3, 32, 32) and (images[0] == images[1]).all()
    np.testing.assert_array_equal(net.preprocess(pictures[0]), images[:1])
    assert net(images).shape == (2, 10) and net.preprocess([]).shape == (0, 3, 32, 32)
    with pytest.raises(ValueError, match="trained on images of 32 x 32, and these are 24 x 32"):
        net(images[:, :, :24])
    assert packed_form(models["deep"])(images[:, :, :24]).shape == (2, 10)


def test_unknown_kernel(models, monkeypatch):
    with pytest.raises(ValueError, match="unknown kernel 'fast'"):
        packed_form(models["deep"], kernel="fast")
    monkeypatch.setenv("EBNAS_KERNEL", "c")
    assert packed_form(models["deep"]).kernel == "c"


def test_without_a_compiler(models, monkeypatch, tmp_path):
    """One warning, and the float form."""
    images = torch.randn(2, 3, 24, 24)
    expected = packed_form(models["deep"])(images)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    kernel.library.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="no C compiler") as warned:
            net = packed_form(models["deep"])
        assert len(warned) == 1 and net.kernel == "torch"
        assert (net(images) - expected).abs().max() < 1e-3
        with pytest.raises(ValueError, match="cannot be built"):
            packed_form(models["deep"], kernel="c")
    finally:
        kernel.library.cache_clear()


@needs_kernel
def test_an_error_in_a_thread_is_raised(kernel, models, monkeypatch):
    """No memory is uninitialised in the logits of a call of which a part failed."""
    skip_without(kernel)
    net = packed_form(models["deep"], kernel=kernel, threads=3)
    images = np.zeros((7, 3, 24, 24), np.float32)
    expected = net(images)
    new_arena, caller = Plan.new_arena, threading.current_thread()

    def fail(plan, threads):
        if threading.current_thread() is not caller:
            raise MemoryError("no arena")
        return new_arena(plan, threads)

    net._plans.clear()
    with monkeypatch.context() as patched:
        patched.setattr(Plan, "new_arena", fail)
        with pytest.raises(MemoryError, match="no arena"):
            net(images)
    np.testing.assert_array_equal(net(images), expected)


USE = """
import sys
sys.modules["torch"] = None  # any import of it fails
import numpy, packed
net = packed.load(sys.argv[1])
pictures = numpy.load(sys.argv[3])
read = net.preprocess([sys.argv[4]])
packed.picture.Image = None  # as where Pillow is missing
assert (net.preprocess(pictures)[:1] == read).all()
numpy.save(sys.argv[2], net(net.preprocess(pictures)))
assert net.kernel != "torch"
"""


def test_the_folder_alone_in_two_processes_that_compile_at_once(models, tmp_path):
    """A copy of packed/ with NumPy and safetensors, without PyTorch and the rest of this project: pictures
    that are not square, from a file and as arrays."""
    shutil.copytree(ROOT / "packed", tmp_path / "alone" / "packed")
    images, path = tmp_path / "images.npy", tmp_path / "model.ebnas"
    pictures = np.random.default_rng(0).integers(0, 256, (2, 71, 50, 3), np.uint8)
    np.save(images, pictures)
    Image.fromarray(pictures[0]).save(tmp_path / "a.png")
    path.write_bytes(program_bytes(lowering.lower(models["deep"], data_entry())))
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path),
        "PYTHONPATH": str(tmp_path / "alone"),
        "EBNAS_CFLAGS": "-O0",  # a quarter of the time
    }
    command = [sys.executable, "-c", USE, str(path)]
    runs = [
        subprocess.Popen([*command, f"{i}.npy", "images.npy", "a.png"], env=environment, cwd=tmp_path)
        for i in range(2)
    ]
    assert [run.wait() for run in runs] == [0, 0]
    net = load(path)
    squares = [central_square(picture, resize=32, size=32) for picture in pictures]
    expected = net(net.normalize(squares))
    for i in range(2):
        np.testing.assert_allclose(np.load(tmp_path / f"{i}.npy"), expected, rtol=1e-5, atol=1e-5)
    assert len(list((tmp_path / "ebnas").iterdir())) == 1, "one library, and nothing left beside it"


def test_a_damaged_cache_is_no_obstacle(models, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("EBNAS_CFLAGS", "-O0")
    library = kernel.compile_kernel(kernel.cache_folder())
    library.write_bytes(library.read_bytes()[:5000])
    kernel.library.cache_clear()
    try:
        assert packed_form(models["deep"])(np.zeros((1, 3, 16, 16), np.float32)).shape == (1, 10)
    finally:
        kernel.library.cache_clear()


@pytest.fixture
def run_folder(tmp_path, models) -> Path:
    """A run's folder with a stage-2 checkpoint."""
    model = models["deep"]
    data = data_entry(image_size=24)
    header = {"script": "train", "kind": "stage2", "args": {}, "config": model.config.to_dict(), "data": data}
    world = World(torch.device("cpu"))
    checkpoint.Checkpointer(tmp_path, header=header, model=model, stateful={}, world=world).save(epoch=1)
    return tmp_path


def call(module, monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main(module.parser().read())


def test_export_script(run_folder, monkeypatch, models, capsys):
    call(export, monkeypatch, run_folder)
    assert "times fewer" in capsys.readouterr().out
    net = load(run_folder / "model.ebnas")
    assert net.image_size == 24 and net.classes[3] == "class 3"
    assert net.config == models["deep"].config.to_dict()
    images = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(5))
    assert (net(images) - float_logits(models["deep"], images)).abs().max() < 1e-3

    with pytest.raises(InputError, match="no checkpoint"):
        call(export, monkeypatch, run_folder / "absent")
    before = (run_folder / checkpoint.LAST).read_bytes()
    for output, message in (
        (run_folder / "absent" / "model.ebnas", "there is no folder"),
        (run_folder, "not a regular file"),
        ("/dev/null", "not a regular file"),
        (run_folder / checkpoint.LAST, "is what is read"),
    ):
        with pytest.raises(InputError, match=message):
            call(export, monkeypatch, run_folder, "--output", output)
    assert (run_folder / checkpoint.LAST).read_bytes() == before


def test_export_reads_what_it_writes(run_folder, monkeypatch):
    """What no packed file may hold is said at once, and no file is left."""
    saved = torch.load(run_folder / checkpoint.LAST)
    for field, value in (("std", [0.2, 1e-50, 0.2]), ("classes", ["one"]), ("mean", [float("nan")] * 3)):
        torch.save({**saved, "data": {**saved["data"], field: value}}, run_folder / checkpoint.LAST)
        with pytest.raises(InputError, match=r"makes no packed network|is damaged"):
            call(export, monkeypatch, run_folder)
    assert not (run_folder / "model.ebnas").exists()


def test_export_needs_nothing_of_training():
    """`import export` takes no session, stages, engine, data sets or logger with it."""
    training = ("training", "run.runs", "images.sets", "architect", "torchvision")
    code = f"import sys, export; print(sorted(sys.modules.keys() & {set(training)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder set whose first class has test pictures of several modes and sizes."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures" / "test" / "one"
    folder.mkdir(parents=True)
    for name in ("train/one", "train/two", "test/two"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.new("RGB", (24, 24)).save(tmp_path / "pictures" / name / "z.png")
    smooth = Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8)).resize((90, 60))
    smooth.save(folder / "a.png")
    smooth.resize((41, 77)).convert("L").save(folder / "b.png")
    smooth.resize((24, 24)).save(folder / "c.png")
    smooth.convert("RGBA").resize((25, 30)).save(folder / "d.png")
    return tmp_path / "pictures"


def test_pictures_are_prepared_as_in_training(pictures):
    test_set = load_set("folder", pictures, train=False, image_size=24, workers=0)
    expected = test_set.images[test_set.labels == 0]
    paths = sorted((pictures / "test" / "one").iterdir())
    ours = np.stack([central_square(read_rgb(path), resize=24, size=24) for path in paths])
    assert np.abs(ours.transpose(0, 3, 1, 2).astype(int) - expected.numpy()).max() <= 1


def infer_script(*arguments, **environment) -> subprocess.CompletedProcess:
    """Runs infer.py as a user without PyTorch would."""
    code = "import sys, runpy; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
    command = [sys.executable, "-c", code + "runpy.run_path(sys.argv[0], run_name='__main__')"]
    return subprocess.run(
        [*command, str(ROOT / "infer.py"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


def test_infer_script(run_folder, pictures, monkeypatch):
    call(export, monkeypatch, run_folder)
    model, folder = run_folder / "model.ebnas", pictures / "test" / "one"
    done = infer_script(model, folder / "a.png", folder / "b.png")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 12 and lines[0].endswith("a.png")
    net = load(model)
    images = net.preprocess(central_square(read_rgb(folder / "a.png"), resize=24, size=24)[None])
    assert lines[1].split("%  ")[1] == net.classes[net(images)[0].argmax()]

    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    done = infer_script(model, folder, "--output", run_folder / "out.csv", "--top", 2)
    assert done.returncode == 0 and "left out 1" in done.stderr
    with open(run_folder / "out.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["file", "class1", "probability1", "class2", "probability2"]
    assert [row[0] for row in rows[1:]] == ["a.png", "b.png", "c.png", "d.png"]
    assert rows[1][1] == lines[1].split("%  ")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.ebnas", "a.png"], "absent.ebnas: no such file"),
        (["last.pt", "a.png"], "not a packed network"),
        (["pictures", "a.png"], "not a regular file"),
        (["/dev/zero", "a.png"], "not a regular file"),
        (["pipe", "a.png"], "not a regular file"),
        ([""], "path is empty"),
        (["a.png", "model.ebnas"], "model.ebnas is a network; give one at most, and before the pictures"),
        (["--list", "a.png"], "--list takes no other arguments; leave out paths"),
        (["--list", "--output", "x.csv"], "leave out output"),
        (["model.ebnas", "absent.png"], "cannot read"),
        (["model.ebnas", "last.pt"], "cannot read"),
        (["model.ebnas", "pipe"], "cannot read"),
        (["model.ebnas", "empty"], "no pictures"),
        (["model.ebnas", "a.png", "pictures"], "one folder"),
        (["model.ebnas", "a.png", "--threads", "0"], "at least 1"),
        (["model.ebnas", "a.png", "--top", "x"], "--top is x; it must be a whole number"),
        (["model.ebnas", "a.png", "--output", "x.csv"], "CSV of a folder"),
        (["model.ebnas", "pictures", "--output", "model.ebnas"], "is what is read"),
        (["model.ebnas", "pictures", "--output", "pictures/test/one/a.png"], "is what is read"),
        (["model.ebnas", "pictures", "--output", "/dev/null"], "not a regular file"),
        (["model.ebnas", "pictures", "--output", "empty"], "not a regular file"),
        (["model.ebnas", "pictures", "--output", "absent/x.csv"], "no folder"),
    ],
)
def test_infer_errors(arguments, message, run_folder, pictures, monkeypatch, fails):
    call(export, monkeypatch, run_folder)
    (run_folder / "empty").mkdir()
    os.mkfifo(run_folder / "pipe")
    Image.new("RGB", (24, 24)).save(run_folder / "a.png")
    model = (run_folder / "model.ebnas").read_bytes()
    assert message in fails("infer.py", *arguments)
    assert (run_folder / "model.ebnas").read_bytes() == model


def test_infer_with_the_network_that_comes_along(tmp_path, scripts, fails):
    """Without a network it takes a shipped one, and says which; a CSV on stdout stays a CSV."""
    drawn, labels = draw_shapes(10, 32, seed=5)
    (tmp_path / "shapes").mkdir()
    for pixels, label in zip(drawn, labels, strict=True):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / "shapes" / f"{list(SHAPES)[label]}.png")
    shipped = [line.split(" ")[0] for line in scripts.run("infer.py", "--list").stdout.splitlines()]
    assert shipped == sorted(f"models/{path.name}" for path in (ROOT / "models").glob("*.ebnas"))
    for arguments in (["shapes"], [ROOT / "models" / "shapes.ebnas", "shapes"]):
        done = scripts.run("infer.py", *arguments)
        rows = list(csv.DictReader(done.stdout.splitlines()))
        assert len(rows) == 10
        if "shapes.ebnas" in done.stderr or len(arguments) == 2:  # the default where no better one is shipped
            assert sum(row["file"] == f"{row['class1']}.png" for row in rows) >= 9
        assert ("no network given: models/" in done.stderr) == (len(arguments) == 1)
    assert "give a picture" in fails("infer.py")
    assert "give a picture" in fails("infer.py", ROOT / "models" / "shapes.ebnas")


@pytest.mark.parametrize("facts", [None, "{", "[]", "{}"])
def test_a_network_without_a_description_is_listed(facts, tmp_path, scripts, monkeypatch):
    monkeypatch.setattr(infer, "MODELS", tmp_path)
    (tmp_path / "mine.ebnas").write_bytes(b"\0" * 2000)
    if facts:
        (tmp_path / "mine.json").write_text(facts)
    assert scripts.run("infer.py", "--list").stdout == "models/mine.ebnas (2 kB): no description\n"


def odd_model(folder: Path, **fields) -> Path:
    """A packed network with three classes and other `fields`, in a file."""
    program = random_program(np.random.default_rng(4))
    last = program.steps[-1]
    tensors = {"weight": np.zeros((3, last.source.channels), np.float32), "bias": np.float32([3, 2, 1])}
    steps = (*program.steps[:-1], dataclasses.replace(last, tensors=tensors))
    fields = {"classes": ("a", "b", "c"), **fields}
    path = folder / "odd.ebnas"
    path.write_bytes(program_bytes(dataclasses.replace(program, steps=steps, **fields)))
    return path


def test_infer_prints_odd_names(tmp_path):
    """Newlines and escape codes in names never reach a terminal, nor other letters one that knows ASCII."""
    model = odd_model(tmp_path, classes=("ü ñ", "line\nbreak", "\x1b[2Jescape"))
    picture = tmp_path / "pictures" / "new\nline.png"
    picture.parent.mkdir()
    Image.new("RGB", (9, 9)).save(picture)
    done = infer_script(model, picture, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert [line.split("%  ")[-1] for line in done.stdout.splitlines()] == [
        str(picture).replace("\n", "\\n"),
        "\\xfc \\xf1",
        "line\\nbreak",
        "\\x1b[2Jescape",
    ]
    done = infer_script(model, picture.parent, "--output", tmp_path / "x.csv")
    assert (done.returncode, done.stderr) == (0, "")
    (row,) = list(csv.reader((tmp_path / "x.csv").read_text().splitlines()))[1:]
    assert row[0] == "new\\nline.png"
    assert row[1::2] == ["ü ñ", "line\\nbreak", "\\x1b[2Jescape"]


def test_infer_with_neither_compiler_nor_torch(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    arguments = (odd_model(tmp_path), tmp_path / "a.png")
    bare = {"PATH": str(tmp_path), "CC": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for environment, code, message in (
        (bare, 1, "needs a C compiler or PyTorch"),
        ({"EBNAS_KERNEL": "torch"}, 2, "not installed"),
        ({"EBNAS_KERNEL": "fast"}, 2, "unknown kernel 'fast'"),
    ):
        done = infer_script(*arguments, **environment)
        assert (done.returncode, done.stdout) == (code, "")
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and message in done.stderr


def test_infer_of_a_network_too_large_for_its_images(tmp_path, monkeypatch):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    model = odd_model(tmp_path, image_size=512, resize=512)
    monkeypatch.setattr("packed.kernel.LARGEST_PLAN", 1 << 20)
    with pytest.raises(InputError, match="512 x 512 are too large"):
        call(infer, monkeypatch, model, tmp_path / "a.png")
