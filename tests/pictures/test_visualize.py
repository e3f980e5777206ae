"""Pictures: what a cell's figure shows is its genotype, nothing overlaps, curves are the run's numbers."""

import errno
import json
import runpy
import sys
from copy import deepcopy
from functools import cache
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, PathPatch
from matplotlib.transforms import Affine2D
from support.reference_values import REFERENCE
from support.scripts import ROOT

import pictures
from architect import Architect
from genotypes import (
    EDGES,
    GENOTYPES,
    PRIMITIVES,
    Genotype,
    genotype_from_dict,
    get_genotype,
    save_genotype,
)
from model_search import SearchConfig, Supernet
from pictures import draw_curves, draw_genotype
from pictures.canvas import GREY, LABELS, STATES, color_of, label_of
from pictures.cell import cell_figure
from pictures.curves import curve_figures
from run.runs import Run
from search_space import ENTRIES
from train_search import epoch_record as search_record
from train_search import finish as finish_search
from training.stages import epoch_record as training_record
from utils import InputError

DRAWS = [
    genotype_from_dict(draw["genotype"]) for draw in json.loads((REFERENCE / "genotypes.json").read_text())
]
WHITE = to_rgba("white")
DOUBLED = Genotype(  # the same input twice, by two operations and by the same one; a node that nothing reads
    normal=(
        *(("skip_connect", 0), ("bin_conv_5x5", 0)),
        *(("max_pool_3x3", 2), ("max_pool_3x3", 2)),
        *(("avg_pool_3x3", 1), ("avg_pool_3x3", 1)),
        *(("bin_dil_conv_5x5", 3), ("skip_connect", 3)),
    ),
    normal_concat=(5, 3),
    reduce=(("bin_conv_3x3", 1),) * 8,
    reduce_concat=(2,),
)


# Reading a figure back, in inches: what a person sees, not how it was made.


def points(patch) -> np.ndarray:
    """Along the curve of a patch, (n, 2)."""
    path = patch._path_original if isinstance(patch, FancyArrowPatch) else patch.get_path()
    return path.to_polygons(Affine2D().scale(200), closed_only=False)[0] / 200


def overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """boxes (n, 2, 2) as [lower, upper] corners, others (m, 2, 2) -> (n, m): which have points in common."""
    return ((boxes[:, None, 0] < others[:, 1]) & (others[:, 0] < boxes[:, None, 1])).all(-1)


def contains(box: np.ndarray, point: np.ndarray, margin: float) -> bool:
    (x0, y0), (x1, y1) = box
    return x0 - margin <= point[0] <= x1 + margin and y0 - margin <= point[1] <= y1 + margin


class Cell:
    """The parts of a cell's figure: artists and, as [lower, upper] corners, the room that they take."""

    def __init__(self, figure):
        axes = figure.axes[0]
        self.figure, self.texts = figure, axes.texts
        shapes = [patch for patch in axes.patches if isinstance(patch, FancyBboxPatch | Circle)]
        extents = {shape: shape.get_path().get_extents(shape.get_patch_transform()) for shape in shapes}
        self.boxes = {shape: np.sort(extent.get_points(), axis=0) for shape, extent in extents.items()}
        self.labels = [shape for shape in shapes if shape.get_facecolor() == WHITE]
        self.badges = [shape for shape in shapes if isinstance(shape, Circle) and shape.radius < 0.2]
        self.states = [shape for shape in shapes if shape not in self.labels and shape not in self.badges]
        curves = [p for p in axes.patches if type(p) is PathPatch and p.get_edgecolor() != WHITE]
        arrows = [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]
        grey = to_rgba(GREY)
        self.curves = {curve: points(curve) for curve in curves}
        self.concat = {arrow: points(arrow) for arrow in arrows if arrow.get_edgecolor() == grey}
        self.arrows = {arrow: points(arrow) for arrow in arrows if arrow not in self.concat}

    def text_in(self, shape) -> str:
        (text,) = [text for text in self.texts if contains(self.boxes[shape], text.get_position(), 0)]
        return text.get_text()

    def state_at(self, point: np.ndarray) -> int:
        (shape,) = [shape for shape in self.states if contains(self.boxes[shape], point, 0.01)]
        return STATES.index(self.text_in(shape))

    def pairs(self) -> list[tuple[int, str, int, bool]]:
        """(node, operation, source, marked as stride 2) of each label, by following its curve back and its
        arrow on."""
        names, found = {label_of(name): name for name in (*ENTRIES, *LABELS)}, []
        for label in self.labels:
            (x0, y0), (x1, y1) = self.boxes[label]
            name, y = names[self.text_in(label)], (y0 + y1) / 2
            before = np.array([[x0 - 0.3, y - 0.01], [x0 + 0.01, y + 0.01]])
            after = np.array([[x1 - 0.01, y - 0.01], [x1 + 0.01, y + 0.01]])
            (curve,) = [curve for curve, line in self.curves.items() if contains(before, line[-1], 0)]
            (arrow,) = [arrow for arrow, line in self.arrows.items() if contains(after, line[0], 0)]
            assert {part.get_edgecolor() for part in (label, curve, arrow)} == {to_rgba(color_of(name))}
            marked = any(contains(before, self.boxes[badge].mean(0), 0) for badge in self.badges)
            node = self.state_at(self.arrows[arrow][-1]) - 2
            found.append((node, name, self.state_at(self.curves[curve][0]), marked))
        return sorted(found)

    def assert_nothing_overlaps(self) -> None:
        renderer, inches = self.figure.canvas.get_renderer(), self.figure.axes[0].transData.inverted()
        corners = [text.get_window_extent(renderer).get_points() for text in self.texts]
        boxes = np.array([*self.boxes.values()])
        texts = np.sort([inches.transform(each) for each in corners], axis=1)
        assert (overlaps(boxes, boxes) == np.eye(len(boxes), dtype=bool)).all()
        assert (overlaps(texts, texts) == np.eye(len(texts), dtype=bool)).all()
        for text in texts:
            (around,) = overlaps(text[None], boxes)
            for box in boxes[around]:
                assert (box[0] <= text[0]).all()
                assert (text[1] <= box[1]).all()
        for line in [*self.curves.values(), *self.concat.values()]:
            steps = np.linspace(line[:-1], line[1:], 100, endpoint=False).reshape(-1, 1, 2)
            inside = ((steps > boxes[:, 0] + 0.01) & (steps < boxes[:, 1] - 0.01)).all(2).any(0)
            at_source = [contains(box, line[0], 0.01) for box in boxes]
            assert list(inside) == at_source


def expected_pairs(genotype: Genotype, kind: str) -> list[tuple[int, str, int, bool]]:
    pairs = enumerate(getattr(genotype, kind))
    return sorted((i // 2, name, source, kind == "reduce" and source < 2) for i, (name, source) in pairs)


@cache
def drawn(genotype: Genotype, kind: str) -> Cell:
    return Cell(cell_figure(genotype, kind))


@pytest.mark.parametrize("kind", ["normal", "reduce"])
@pytest.mark.parametrize("genotype", [*GENOTYPES.values(), DOUBLED, *DRAWS])
def test_a_cell_shows_its_genotype(genotype, kind):
    cell = drawn(genotype, kind)
    assert cell.pairs() == expected_pairs(genotype, kind)
    concat = [cell.state_at(line[0]) for line in cell.concat.values()]
    assert sorted(concat) == sorted(getattr(genotype, f"{kind}_concat"))


@pytest.mark.parametrize("kind", ["normal", "reduce"])
@pytest.mark.parametrize("genotype", [*GENOTYPES.values(), DOUBLED, *DRAWS[::5]])
def test_labels_nodes_and_edges_do_not_overlap(genotype, kind):
    drawn(genotype, kind).assert_nothing_overlaps()


def test_double_edges_run_apart():
    ends = [line[-1] for line in drawn(DOUBLED, "normal").curves.values()]
    assert len(ends) == 8
    assert min(abs(a - b).max() for a, b in combinations(ends, 2)) > 0.3


def test_pictures_of_a_genotype_are_written(tmp_path):
    paths = draw_genotype(GENOTYPES["EBNAS"], tmp_path, name="cell")
    assert [path.name for path in paths] == ["cell-normal.png", "cell-reduce.png"]
    assert sorted(tmp_path.iterdir()) == paths
    widths = [assert_picture(path) for path in paths]
    assert widths[0] == widths[1] >= 1600  # pixels: twice the width of a README


def assert_picture(path: Path) -> int:
    """A PNG, white around, with something on it; gives its width."""
    pixels = imread(path)[..., :3]
    assert path.read_bytes().startswith(b"\x89PNG")
    assert (pixels[[0, -1]] == 1).all()
    assert (pixels[:, [0, -1]] == 1).all()
    assert pixels.std() > 0.02
    return pixels.shape[1]


@pytest.fixture
def coarse(monkeypatch):
    """A quarter of the pixels each way, where only their being there is tested."""
    monkeypatch.setattr(pictures, "DPI", pictures.DPI / 4)


# Runs.


def write_run(folder: Path, records: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def means(epoch: int) -> dict:
    top1 = 20 + 7 * epoch - epoch**2  # highest at epoch 3 and, again, at 4
    speed = {"samples": 100, "seconds": 2.0, "cpu_seconds": 1.9, "images_per_second": 50.0}
    return {"loss": 2.3 - 0.1 * epoch, "top1": top1, "top5": 60 + epoch, **speed}


def training_records(epochs: int) -> list[dict]:
    """As train.py writes them."""
    return [
        {"epoch": e, **training_record({**means(e), "loss": 2.2}, means(e), learning_rate=1e-3)}
        for e in range(epochs)
    ]


def search_records(epochs: int) -> list[dict]:
    """As train_search.py writes them, of a small supernet whose alpha and beta walk at random."""
    torch.manual_seed(0)
    model = Supernet(SearchConfig(8, 3, 10))
    weights = {"learning_rate": 1e-3, "weight_decay": 0.0, "path_reg_weight": 1.5, "edge_reg_weight": 0.8}
    architect, records = Architect(model, **weights), []
    for epoch in range(epochs):
        with torch.no_grad():
            for parameter in model.arch_state().values():
                parameter += 0.3 * torch.randn_like(parameter)
        before = records[-1] if records else None
        record = search_record(architect, model.genotype(), means(epoch), means(epoch), before=before)
        records.append(json.loads(json.dumps({"epoch": epoch, **record})))
    return records


SEARCH = search_records(4)


@pytest.fixture(scope="module")
def search_figures(tmp_path_factory) -> dict[str, Figure]:
    """Of a search of 4 epochs, the first two of weights only."""
    run = write_run(tmp_path_factory.mktemp("search"), SEARCH)
    (run / "args.json").write_text(json.dumps({"arch_start_epoch": 2}))
    return curve_figures(run)


def line(axes, start: str):
    (found,) = [line for line in axes.get_lines() if str(line.get_label()).startswith(start)]
    return found


def test_curves_of_training_are_its_metrics_with_the_best_epoch_marked(tmp_path):
    run = write_run(tmp_path / "run", training_records(6))
    figures = curve_figures(run)
    assert list(figures) == ["curves.png"]
    loss, accuracy = figures["curves.png"].axes
    assert list(line(loss, "train").get_ydata()) == [2.2] * 6
    assert list(line(loss, "validation").get_ydata()) == [means(e)["loss"] for e in range(6)]
    validation = line(accuracy, "validation")
    assert list(validation.get_ydata()) == [20, 26, 30, 32, 32, 30]
    assert validation.get_label() == "validation, last 30.00 %"
    best = line(accuracy, "best")
    assert (list(best.get_xdata()), list(best.get_ydata())) == ([3], [32])
    assert best.get_label() == "best: 32.00 %, epoch 3"


def test_alpha_and_beta_of_a_search(search_figures):
    kept = genotype_from_dict(SEARCH[-1]["genotype"])
    panels = [axes for part in search_figures["arch-alpha.png"].subfigs for axes in part.axes if axes.axison]
    assert len(panels) == 2 * len(EDGES)
    for axes, (kind, edge) in zip(
        panels, ((k, e) for k in ("normal", "reduce") for e in range(14)), strict=True
    ):
        node, source = EDGES[edge]
        assert axes.get_title("left") == f"{STATES[source]} → {STATES[2 + node]}"
        alpha = np.array([record["arch"][f"alphas_{kind}"][edge] for record in SEARCH])
        softmax = np.exp(alpha) / np.exp(alpha).sum(1, keepdims=True)
        drawn = {line.get_color(): line for line in axes.get_lines()}
        for operation, name in enumerate(PRIMITIVES):
            np.testing.assert_allclose(drawn[color_of(name)].get_ydata(), softmax[:, operation])
        chosen = [name for i, (name, s) in enumerate(getattr(kept, kind)) if (i // 2, s) == (node, source)]
        assert axes.get_title("right") == "".join(label_of(name) for name in chosen)
    panels = {axes.get_title("left"): axes for axes in search_figures["arch-beta.png"].axes}
    beta = np.array([record["arch"]["betas_reduce"][3:7] for record in SEARCH])
    drawn = [
        line for line in panels["reduction cell, node 2"].get_lines() if len(line.get_xdata()) == len(SEARCH)
    ]
    np.testing.assert_allclose([line.get_ydata() for line in drawn], 1 / (1 + np.exp(-beta.T)))  # b_4 is 0
    solid = [source for source, line in enumerate(drawn) if line.get_linestyle() == "-"]
    assert solid == sorted(source for _, source in kept.reduce[4:6])


def test_curves_of_one_training_epoch_are_written_elsewhere(tmp_path):
    run = write_run(tmp_path / "run", training_records(1))
    paths = draw_curves(run, folder=tmp_path / "elsewhere")
    assert paths == [*(tmp_path / "elsewhere").iterdir()] == [tmp_path / "elsewhere" / "curves.png"]
    assert assert_picture(*paths) >= 1600
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]


def test_epochs_before_the_architecture_steps_are_shaded(tmp_path, search_figures):
    def shaded(figures: dict[str, Figure]) -> list[str]:
        return [patch.get_label() for patch in figures["curves.png"].axes[0].patches]

    assert shaded(search_figures) == ["weights only"]
    without_args = write_run(tmp_path, SEARCH[:1])
    assert shaded(curve_figures(without_args)) == []


def test_a_last_line_that_a_crash_cut_short_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", training_records(3))
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"epoch": 3, "train_lo')
    assert list(line(curve_figures(run)["curves.png"].axes[0], "train").get_xdata()) == [0, 1, 2]


def without(name):
    return lambda record: record.pop(name)


def setting(name, value, inside=None):
    return lambda record: (record[inside] if inside else record).update({name: value})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("valid_top1"), "field 'valid_top1' is missing"),
        (without("epoch"), "field 'epoch' must be a whole number"),
        (without("arch"), "field 'arch' must be an object"),
        (without("genotype"), "a genotype is a JSON object"),
        (setting("epoch", "1"), "field 'epoch' must be a whole number"),
        (setting("epoch", 0), "field 'epoch' does not follow"),
        (setting("train_loss", "low"), "field 'train_loss' must be a finite number"),
        (setting("train_loss", "2.25"), "field 'train_loss' must be a finite number"),
        (setting("train_loss", True), "field 'train_loss' must be a finite number"),
        (setting("train_loss", float("nan")), "field 'train_loss' must be a finite number"),
        (setting("train_top1", 1e300), "field 'train_top1' must be a finite number"),
        (setting("train_top1", 10**400), "field 'train_top1' must be a finite number"),
        (setting("arch", [1]), "field 'arch' must be an object"),
        (setting("alphas_reduce", [[0.0] * 7] * 13, "arch"), "field 'alphas_reduce' must be 14 x 7 finite"),
        (setting("alphas_normal", [[0.0], []], "arch"), "field 'alphas_normal' must be 14 x 7 finite"),
        (setting("betas_normal", [None] * 12, "arch"), "field 'betas_normal' must be 12 finite numbers"),
    ],
)
def test_malformed_metrics_name_line_and_field(tmp_path, damage, message):
    records = deepcopy(SEARCH[:2])
    damage(records[1])
    run = write_run(tmp_path / "run", records)
    with pytest.raises(InputError) as error:
        draw_curves(run)
    assert str(error.value).startswith(f"{run / 'metrics.jsonl'}, line 2: {message}")
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]


GOOD = "".join(json.dumps(record) + "\n" for record in SEARCH[:2]).encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", None, r"cannot read .*metrics\.jsonl: no such file"),
        ("metrics.jsonl", "a folder", r"cannot read .*metrics\.jsonl: is a directory"),
        ("metrics.jsonl", b"", r"metrics\.jsonl holds no epoch"),
        ("metrics.jsonl", GOOD + b"\xff\n", r"metrics\.jsonl, line 3: not UTF-8 text"),
        ("metrics.jsonl", b'{"epoch": 0\n' + GOOD, r"metrics\.jsonl, line 1: not JSON"),
        ("metrics.jsonl", GOOD + b'{"epoch": 2\n', r"metrics\.jsonl, line 3: not JSON"),
        ("metrics.jsonl", GOOD + b"[1, 2]\n", r"metrics\.jsonl, line 3: not a JSON object"),
        ("metrics.jsonl", GOOD + b"[" * 100_000 + b"\n", r"metrics\.jsonl, line 3: .* nested too deeply"),
        ("args.json", "a folder", r"cannot read .*args\.json: is a directory"),
        ("args.json", b"", r"args\.json, line 1: not JSON"),
        ("args.json", b"[]", r"args\.json, line 1: not a JSON object"),
        ("args.json", b'{\n "seed": 0,\n "note": "\xff"\n}', r"args\.json, line 3: not UTF-8 text"),
        ("args.json", b'{\n "seed": 0,\n "note": ', r"args\.json, line 3: not JSON"),
        ("args.json", b"{}", r"args\.json: field 'arch_start_epoch' must be a whole number"),
        ("args.json", b'{"arch_start_epoch": "1"}', r"args\.json: field 'arch_start_epoch' must be"),
        ("args.json", b'{"arch_start_epoch": NaN}', r"args\.json: field 'arch_start_epoch' must be"),
    ],
)
def test_damaged_files_are_named_with_the_line(tmp_path, name, content, message):
    (tmp_path / "metrics.jsonl").write_bytes(GOOD)
    (tmp_path / name).unlink(missing_ok=True)
    if content == "a folder":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        draw_curves(tmp_path)
    assert "\n" not in str(error.value)


def test_a_search_with_damaged_metrics_ends_well(tmp_path, coarse, capsys):
    (tmp_path / "metrics.jsonl").write_text("[]\n")
    images = SimpleNamespace(set="shapes", data="data", image_size=16, value_range=None)
    run, network = Run(tmp_path), SimpleNamespace(stem="cifar")
    settings = SimpleNamespace(images=images, network=network)
    finish_search(SimpleNamespace(run=run, settings=settings, finish=lambda: None), GENOTYPES["EBNAS"], {})
    run.close()
    log = capsys.readouterr().out
    assert f"no pictures: {tmp_path / 'metrics.jsonl'}, line 1: not a JSON object\n" in log
    assert "python train.py --set shapes" in log


# The script.


def script(monkeypatch, capsys, *words: object) -> list[str]:
    """What visualize.py prints for these arguments, run in this process as a user's command is."""
    monkeypatch.setattr(sys, "argv", ["visualize.py", *map(str, words)])
    runpy.run_path(str(ROOT / "visualize.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def test_script_draws_a_search_of_one_epoch_into_its_folder(tmp_path, monkeypatch, capsys, coarse):
    run = write_run(tmp_path / "run", SEARCH[:1])
    save_genotype(run / "genotype.json", GENOTYPES["EBNAS"])
    names = ["genotype-normal", "genotype-reduce", "curves", "arch-alpha", "arch-beta"]
    assert script(monkeypatch, capsys, run) == [str(run / f"{name}.png") for name in names]
    for name in names:
        assert_picture(run / f"{name}.png")


def test_script_draws_a_genotype_file_under_its_name(tmp_path, monkeypatch, capsys, coarse):
    save_genotype(tmp_path / "mine.json", DOUBLED)
    printed = script(monkeypatch, capsys, tmp_path / "mine.json", "--out", tmp_path / "new" / "folder")
    assert printed == [str(tmp_path / "new" / "folder" / f"mine-{kind}.png") for kind in ("normal", "reduce")]
    assert all(Path(path).stat().st_size > 0 for path in printed)


def test_script_draws_a_registered_genotype_here(tmp_path, monkeypatch, capsys, coarse):
    monkeypatch.chdir(tmp_path)
    printed = script(monkeypatch, capsys, "EBNAS")
    assert printed == ["EBNAS-normal.png", "EBNAS-reduce.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == printed


def test_script_draws_an_earlier_epoch_and_a_genotype_as_text(tmp_path, monkeypatch, capsys, coarse):
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "run", SEARCH[:2])
    printed = script(monkeypatch, capsys, f"{run}@1")
    assert printed == [str(run / f"epoch-1-{kind}.png") for kind in ("normal", "reduce")]
    assert script(monkeypatch, capsys, str(GENOTYPES["BATS"])) == [
        "genotype-normal.png",
        "genotype-reduce.png",
    ]
    assert all(Path(path).stat().st_size > 0 for path in printed)


def test_script_derives_a_search_again_with_fewer_skips(tmp_path, monkeypatch, capsys, coarse, fails):
    run, skipping = write_run(tmp_path / "run", SEARCH), json.loads(json.dumps(SEARCH[-1]))
    for row in skipping["arch"]["alphas_normal"]:
        row[0] = 5.0  # skip_connect, everywhere
    write_run(run, [*SEARCH[:-1], skipping])
    output = tmp_path / "fewer.json"
    printed = script(monkeypatch, capsys, run, "--most_skips", 2, "--output", output)
    assert printed[0] == f"epoch 3 of {run}, at most 2 skips in the normal cell:"
    assert "skips: 2 in the normal cell" in "\n".join(printed)
    assert printed[-3:] == [str(output), *(str(tmp_path / f"fewer-{k}.png") for k in ("normal", "reduce"))]
    normal = get_genotype(str(output)).normal
    assert sum(name == "skip_connect" for name, _ in normal) == 2
    script(monkeypatch, capsys, f"{run}@1", "--most_skips", 8, "--output", output)
    assert get_genotype(str(output)) == genotype_from_dict(SEARCH[1]["genotype"])  # as it was found

    assert "say where to, with --output" in fails("visualize.py", run, "--most_skips", 2)
    derived = ("--most_skips", 2, "--output")
    assert "EBNAS is none" in fails("visualize.py", "EBNAS", *derived, "x.json")
    assert "has no epoch 9" in fails("visualize.py", f"{run}@9", *derived, "x.json")
    assert "is what is read" in fails("visualize.py", run, *derived, run / "metrics.jsonl")
    write_run(run, training_records(2))
    assert "has no alpha and beta of epoch 1" in fails("visualize.py", run, *derived, "x.json")


def test_script_refuses_what_it_cannot_draw_or_write(tmp_path, fails, coarse):
    assert fails("visualize.py", "EBNAZ").startswith("error: unknown genotype 'EBNAZ'")
    assert "neither genotype" in fails("visualize.py", tmp_path)
    (tmp_path / "file").write_text("")
    assert "cannot draw into file: file exists" in fails("visualize.py", "EBNAS", "--out", "file")
    assert "cannot draw into file/a: not a directory" in fails("visualize.py", "EBNAS", "--out", "file/a")
    (tmp_path / "run").mkdir()
    save_genotype(tmp_path / "run" / "genotype.json", GENOTYPES["EBNAS"])
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    assert "metrics.jsonl: is a directory" in fails("visualize.py", "run")


def test_a_full_disk_is_not_the_users_fault(tmp_path, monkeypatch, coarse):
    def write(path, _content):
        raise OSError(errno.ENOSPC, "cannot write: no space left on device", str(path))

    monkeypatch.setattr(pictures, "write_atomically", write)
    with pytest.raises(OSError, match="no space left") as error:
        draw_genotype(GENOTYPES["EBNAS"], tmp_path)
    assert error.value.errno == errno.ENOSPC


def test_drawing_leaves_the_users_matplotlib_alone(tmp_path, monkeypatch, coarse):
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 33)
    before = dict(matplotlib.rcParams)
    draw_genotype(GENOTYPES["EBNAS"], tmp_path, name="user")
    assert dict(matplotlib.rcParams) == before
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 10)
    draw_genotype(GENOTYPES["EBNAS"], tmp_path, name="plain")
    assert (imread(tmp_path / "user-normal.png") == imread(tmp_path / "plain-normal.png")).all()


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pictures need matplotlib .*requirements\.txt"):
        draw_genotype(GENOTYPES["EBNAS"], tmp_path)
