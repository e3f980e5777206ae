"""Pictures: what a cell's figure shows is its genotype, nothing overlaps, curves are the run's numbers."""

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.image import imread
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, PathPatch
from matplotlib.transforms import Affine2D
from reference_values import REFERENCE

import visualize
from architect import Architect
from figures import draw_curves, draw_genotype
from figures.canvas import COLORS, GREY, LABELS, STATES
from figures.cell import cell_figure
from figures.curves import curve_figures
from genotypes import EDGES, GENOTYPES, PRIMITIVES, Genotype, genotype_from_dict, save_genotype
from model_search import SearchConfig, Supernet
from stages import epoch_record as training_record
from train_search import epoch_record as search_record
from utils import InputError

ROOT = Path(__file__).parent.parent
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
        names, found = {label: name for name, label in LABELS.items()}, []
        for label in self.labels:
            (x0, y0), (x1, y1) = self.boxes[label]
            name, y = names[self.text_in(label)], (y0 + y1) / 2
            before = np.array([[x0 - 0.3, y - 0.01], [x0 + 0.01, y + 0.01]])
            after = np.array([[x1 - 0.01, y - 0.01], [x1 + 0.01, y + 0.01]])
            (curve,) = [curve for curve, line in self.curves.items() if contains(before, line[-1], 0)]
            (arrow,) = [arrow for arrow, line in self.arrows.items() if contains(after, line[0], 0)]
            assert {part.get_edgecolor() for part in (label, curve, arrow)} == {to_rgba(COLORS[name])}
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


@pytest.mark.parametrize("genotype", [*GENOTYPES.values(), DOUBLED, *DRAWS])
def test_a_cell_shows_its_genotype(genotype):
    for kind in ("normal", "reduce"):
        cell = Cell(cell_figure(genotype, kind))
        assert cell.pairs() == expected_pairs(genotype, kind)
        concat = [cell.state_at(line[0]) for line in cell.concat.values()]
        assert sorted(concat) == sorted(getattr(genotype, f"{kind}_concat"))


@pytest.mark.parametrize("genotype", [*GENOTYPES.values(), DOUBLED, *DRAWS[::5]])
def test_labels_nodes_and_edges_do_not_overlap(genotype):
    for kind in ("normal", "reduce"):
        Cell(cell_figure(genotype, kind)).assert_nothing_overlaps()


def test_double_edges_run_apart():
    cell = Cell(cell_figure(DOUBLED, "normal"))
    ends = [line[-1] for line in cell.curves.values()]
    assert len(ends) == 8
    assert min(abs(a - b).max() for a, b in combinations(ends, 2)) > 0.3


def test_pictures_of_a_genotype_are_written(tmp_path):
    paths = draw_genotype(GENOTYPES["EBNAS"], tmp_path, name="cell")
    assert [path.name for path in paths] == ["cell-normal.png", "cell-reduce.png"]
    assert sorted(tmp_path.iterdir()) == paths
    widths = [assert_picture(path) for path in paths]
    assert widths[0] == widths[1]


def assert_picture(path: Path) -> int:
    """A PNG at least as wide as a README, white around, with something on it; gives its width."""
    pixels = imread(path)[..., :3]
    assert path.read_bytes().startswith(b"\x89PNG")
    assert pixels.shape[1] >= 900
    assert (pixels[-1] == 1).all()
    assert pixels.std() > 0.02
    return pixels.shape[1]


# Runs.


def write_run(folder: Path, records: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def means(epoch: int) -> dict:
    top1 = 20 + 7 * epoch - epoch**2  # highest at epoch 3 and, again, at 4
    speed = {"samples": 100, "seconds": 2.0, "images_per_second": 50.0}
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
        record = search_record(architect, means(epoch), means(epoch), model.genotype(), before=before)
        records.append(json.loads(json.dumps({"epoch": epoch, **record})))
    return records


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


def test_alpha_and_beta_of_a_search(tmp_path):
    records = search_records(4)
    figures = curve_figures(write_run(tmp_path / "run", records))
    kept = genotype_from_dict(records[-1]["genotype"])
    panels = [axes for part in figures["arch-alpha.png"].subfigs for axes in part.axes if axes.axison]
    assert len(panels) == 2 * len(EDGES)
    for axes, (kind, edge) in zip(
        panels, ((k, e) for k in ("normal", "reduce") for e in range(14)), strict=True
    ):
        node, source = EDGES[edge]
        assert axes.get_title("left") == f"{STATES[source]} → {STATES[2 + node]}"
        alpha = np.array([record["arch"][f"alphas_{kind}"][edge] for record in records])
        softmax = np.exp(alpha) / np.exp(alpha).sum(1, keepdims=True)
        drawn = {line.get_color(): line for line in axes.get_lines()}
        for operation, name in enumerate(PRIMITIVES):
            np.testing.assert_allclose(drawn[COLORS[name]].get_ydata(), softmax[:, operation])
        chosen = [name for i, (name, s) in enumerate(getattr(kept, kind)) if (i // 2, s) == (node, source)]
        assert axes.get_title("right") == "".join(LABELS[name] for name in chosen)
    (panel,) = [
        axes for axes in figures["arch-beta.png"].axes if axes.get_title("left") == "reduction cell, node 2"
    ]
    beta = np.array([record["arch"]["betas_reduce"][3:7] for record in records])
    drawn = [line for line in panel.get_lines() if len(line.get_xdata()) == len(records)]
    np.testing.assert_allclose([line.get_ydata() for line in drawn], 1 / (1 + np.exp(-beta.T)))  # b_4 is 0
    solid = [source for source, line in enumerate(drawn) if line.get_linestyle() == "-"]
    assert solid == sorted(source for _, source in kept.reduce[4:6])


def test_curves_of_one_training_epoch_are_written_elsewhere(tmp_path):
    run = write_run(tmp_path / "run", training_records(1))
    paths = draw_curves(run, folder=tmp_path / "elsewhere")
    assert paths == [*(tmp_path / "elsewhere").iterdir()] == [tmp_path / "elsewhere" / "curves.png"]
    assert_picture(*paths)
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]


def test_epochs_before_the_architecture_steps_are_shaded(tmp_path):
    run = write_run(tmp_path / "run", search_records(4))

    def shaded() -> list[str]:
        return [patch.get_label() for patch in curve_figures(run)["curves.png"].axes[0].patches]

    assert shaded() == []
    (run / "args.json").write_text(json.dumps({"arch_start_epoch": 2}))
    assert shaded() == ["weights only"]


def test_a_last_line_that_a_crash_cut_short_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", training_records(3))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "train_lo')
    assert list(line(curve_figures(run)["curves.png"].axes[0], "train").get_xdata()) == [0, 1, 2]


def without(name):
    return lambda record: record.pop(name)


def setting(name, value, inside=None):
    return lambda record: (record[inside] if inside else record).update({name: value})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("valid_top1"), "line 2: field 'valid_top1' is missing"),
        (setting("train_loss", "low"), "line 2: field 'train_loss' must be a finite number"),
        (setting("train_loss", float("nan")), "line 2: field 'train_loss' must be a finite number"),
        (setting("train_top1", 10**400), "line 2: field 'train_top1' must be a finite number"),
        (setting("epoch", 0), "line 2: field 'epoch' does not follow"),
        (without("arch"), "line 2: field 'alphas_normal' is missing"),
        (
            setting("alphas_reduce", [[0.0] * 7] * 13, "arch"),
            "line 2: field 'alphas_reduce' must be 14 x 7 finite",
        ),
        (
            setting("betas_normal", [None] * 12, "arch"),
            "line 2: field 'betas_normal' must be 12 finite numbers",
        ),
        (without("genotype"), "line 2: a genotype is a JSON object"),
    ],
)
def test_malformed_metrics_name_line_and_field(tmp_path, damage, message):
    records = search_records(2)
    damage(records[1])
    run = write_run(tmp_path / "run", records)
    with pytest.raises(InputError, match=r"metrics\.jsonl") as error:
        draw_curves(run)
    assert message in str(error.value)
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        (b"", "holds no epoch"),
        (b"\xff\xfe\n", "not text"),
        (b'{"epoch": 0\n{"epoch": 1}\n', "line 1: not JSON"),
        (b"[1, 2]\n", "line 1: field 'epoch' is missing"),
    ],
)
def test_files_that_are_no_metrics(tmp_path, text, message):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_bytes(text)
    with pytest.raises(InputError, match=message):
        draw_curves(tmp_path)


# The script.


def script(monkeypatch, capsys, *words: object) -> list[str]:
    """What visualize.py prints for these arguments, run in this process."""
    monkeypatch.setattr(sys, "argv", ["visualize.py", *map(str, words)])
    visualize.main()
    return capsys.readouterr().out.splitlines()


def test_script_draws_a_search_of_one_epoch_into_its_folder(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run", search_records(1))
    save_genotype(run / "genotype.json", GENOTYPES["EBNAS"])
    names = ["genotype-normal", "genotype-reduce", "curves", "arch-alpha", "arch-beta"]
    assert script(monkeypatch, capsys, run) == [str(run / f"{name}.png") for name in names]
    for name in names:
        assert_picture(run / f"{name}.png")


def test_script_draws_a_genotype_file_under_its_name(tmp_path, monkeypatch, capsys):
    save_genotype(tmp_path / "mine.json", DOUBLED)
    printed = script(monkeypatch, capsys, tmp_path / "mine.json", "--out", tmp_path / "new" / "folder")
    assert printed == [str(tmp_path / "new" / "folder" / f"mine-{kind}.png") for kind in ("normal", "reduce")]
    assert all(Path(path).stat().st_size > 0 for path in printed)


def test_script_refuses_what_it_cannot_draw_or_write(tmp_path, monkeypatch, capsys):
    with pytest.raises(InputError, match="neither genotype"):
        script(monkeypatch, capsys, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*EBNAS-normal\.png: "):
        script(monkeypatch, capsys, "EBNAS", "--out", tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def run_script(folder: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "visualize.py"), *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_script_in_a_process(tmp_path):
    done = run_script(tmp_path, "EBNAS")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["EBNAS-normal.png", "EBNAS-reduce.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == done.stdout.split()


def test_script_with_an_unknown_name(tmp_path):
    done = run_script(tmp_path, "EBNAZ")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown genotype 'EBNAZ'")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_drawing_leaves_the_users_matplotlib_alone(tmp_path, monkeypatch):
    import matplotlib

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
