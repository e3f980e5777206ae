"""The table of trained cells: one form of each cell, its rows, what is asked of it, and what it shows."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from scipy import stats
from support.scripts import ROOT

import study
from evidence import cells as cells_module
from evidence.analysis import (
    FEATURES,
    Cells,
    correlation,
    features,
    front,
    left_out_predictions,
    percentile,
    rankings,
    rho,
    scores_of,
    standings,
    what_it_shows,
)
from evidence.cell_pictures import draw_cells
from evidence.cells import ROWS, Table, distance, write_rows
from evidence.plan import CellOf
from evidence.statistics import holm
from evidence.studies import FIRST_CELL, NAMED_SEEDS, SCALES, cells, medium, named_cells
from genotypes import (
    GENOTYPES,
    NODES,
    Genotype,
    canonical,
    genotype_to_dict,
    random_genotype,
    save_genotype,
)
from trials.regression import Ridge
from utils import InputError

EBNAS = GENOTYPES["EBNAS"]


def made_rows(n: int = 40, epochs: int = 4) -> list[dict]:
    """Random cells whose accuracy falls by a point with each dilated convolution, a quarter of them with a
    second seed, and the published cell; seeds differ by half a point."""
    random = np.random.default_rng(0)
    rows = []

    def row(cell: str, genotype: Genotype, seed: int) -> dict:
        dilated = sum("dil" in name for name, _ in (*genotype.normal, *genotype.reduce))
        test = 60 - dilated + random.normal() / 2
        valid = test - 20 / np.arange(1, epochs + 1) + random.normal(size=epochs)
        loss = 4 - test / 20 - 0.2 * np.arange(epochs)
        return {
            **{"cell": cell, "random": cell.startswith("random"), "seed": seed},
            "genotype": genotype_to_dict(canonical(genotype)),
            **{"train_loss": loss.tolist(), "valid_loss": (loss + 0.1).tolist()},
            **{"valid_top1": valid.tolist(), "cpu_seconds": [30.0] * epochs},
            **{"stage1_epochs": 0, "images": 1000, "test_top1": float(test), "test_epoch": epochs - 1},
            **{"parameters": 1000, "ops": 1e6 + 1e4 * dilated, "packed_bytes": 40_000 + 100 * dilated},
            **{"commit": "0", "machine": {"device": "-", "torch": "-", "python": "-"}},
        }

    for number in range(n):
        rows.append(row(f"random:{number}", random_genotype(number), number))
        if number % 4 == 0:
            rows.append(row(f"random:{number}", random_genotype(number), 1000 + number))
    return rows + [row("EBNAS", EBNAS, seed) for seed in NAMED_SEEDS]


@pytest.fixture(scope="module")
def table() -> Table:
    return Table.of(made_rows())


# One form of each cell


def renamed(genotype: Genotype, order: tuple[int, ...], swap: bool) -> Genotype | None:
    """With nodes and inputs listed in another order; None where a node would read one behind it."""
    names = {0: 0, 1: 1, **{2 + old: 2 + new for new, old in enumerate(order)}}
    made = {}
    for kind in ("normal", "reduce"):
        pairs = []
        for new, old in enumerate(order):
            inputs = [(name, names[s]) for name, s in getattr(genotype, kind)[2 * old : 2 * old + 2]]
            if any(source >= 2 + new for _, source in inputs):
                return None
            pairs += reversed(inputs) if swap else inputs
        made[kind] = tuple(pairs)
    return genotype._replace(**made)


def test_a_network_has_one_form_under_renaming():
    changed = 0
    for seed in range(30):
        genotype = random_genotype(seed)
        form = canonical(genotype)
        assert canonical(form) == form
        for order in permutations(range(NODES)):
            for swap in (False, True):
                other = renamed(genotype, order, swap)
                if other is not None:
                    changed += other != genotype
                    assert canonical(other) == form
    assert changed > 50
    assert len({canonical(random_genotype(seed)) for seed in range(300)}) == 300


def test_another_operation_or_input_is_another_cell():
    first, *others = EBNAS.normal
    for pair in (("skip_connect", first[1]), (first[0], 1)):
        assert canonical(EBNAS._replace(normal=(pair, *others))) != canonical(EBNAS)
    assert canonical(EBNAS._replace(normal=EBNAS.reduce)) != canonical(EBNAS)
    one_state = EBNAS._replace(normal_concat=(2, 3))
    assert canonical(one_state) != canonical(EBNAS)


def test_networks_of_one_form_compute_the_same():
    """A cell with the weights of another form of it gives the same channels, in the order of its nodes."""
    import torch

    from model import ModelConfig

    sources = ("skip_connect", 0), ("bin_conv_3x3", 1)
    pairs = (
        *sources,
        ("max_pool_3x3", 0),
        ("avg_pool_3x3", 1),
        *sources,
        ("skip_connect", 1),
        ("skip_connect", 2),
    )
    genotype = EBNAS._replace(normal=pairs, reduce=pairs)
    order = (1, 0, 2, 3)
    other = renamed(genotype, order, swap=False)
    assert other is not None and canonical(other) == canonical(genotype)
    size = {"init_channels": 4, "layers": 3, "groups": 2, "num_classes": 3}
    bits = {"weight_bits": 1, "activation_bits": 1}
    ours, theirs = (ModelConfig(each, **size, **bits).build().double().eval() for each in (genotype, other))
    cell, same = ours.cells[0], theirs.cells[0]
    for name, module in same.named_children():
        if name != "operations":
            module.load_state_dict(cell.get_submodule(name).state_dict())
    for edge, moved in enumerate((2, 3, 0, 1, 4, 5, 6, 7)):
        same.operations[edge].load_state_dict(cell.operations[moved].state_dict())
    x = torch.randn(2, 12, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = cell(x, x), same(x, x)
    width = a.shape[1] // NODES
    blocks = [a[:, node * width : (node + 1) * width] for node in order]
    assert torch.equal(torch.cat(blocks, 1), b)


# The table


def test_a_cell_is_found_under_any_name_and_costs_what_its_epochs_did(table):
    found = table.query("random:3", 2)
    row = table.runs[canonical(random_genotype(3))][0]
    assert (found.valid_top1, found.images, found.cpu_seconds) == (row["valid_top1"][1], 2000, 60)
    assert found.train_losses == tuple(row["train_loss"][:2]) and found.test_top1 is None
    assert table.query("random:3").test_top1 == row["test_top1"]
    other = renamed(random_genotype(3), (0, 1, 2, 3), swap=True)
    assert other != random_genotype(3) and table.query(other, 2) == found
    first, second = (table.query("random:0", run=run).test_top1 for run in range(2))
    assert table.test_top1("random:0") == pytest.approx((first + second) / 2) and first != second
    assert len(table.random) == 40 and table.named == {"EBNAS": canonical(EBNAS)}
    for wrong, error in (
        (("random:999",), KeyError),
        (("nothing",), KeyError),
        (("random:3", 5), ValueError),
        (("random:3", 0), ValueError),
    ):
        with pytest.raises(error):
            table.query(*wrong)
    with pytest.raises(IndexError):
        table.query("random:1", run=1)


def test_the_nearest_cell_is_itself_then_one_of_few_other_edges(table):
    cell = canonical(random_genotype(5))
    assert table.nearest(cell) == cell and distance(cell, cell) == 0
    (name, source), *rest = cell.normal
    changed = cell._replace(
        normal=((next(n for n in ("skip_connect", "bin_conv_3x3") if n != name), source), *rest)
    )
    assert distance(cell, changed) >= 1 and table.nearest(changed) == cell
    others = [each for each in table.random if each != cell]
    assert table.nearest(changed, others) in others


@pytest.mark.parametrize(
    "damage",
    [{"genotype": None}, {"valid_top1": []}, {"seed": "1"}, {"random": 1}, {"train_loss": [None] * 4}],
)
def test_a_file_that_is_no_table_is_one_line(tmp_path, damage):
    path = tmp_path / ROWS
    rows = made_rows(3)
    write_rows([*rows[:2], rows[2] | damage], path)
    with pytest.raises(InputError, match="line 3: not a row"):
        Table(path)
    path.write_text("{")
    with pytest.raises(InputError, match="line 1"):
        Table(path)
    with pytest.raises(InputError, match="no table of cells"):
        Table(tmp_path / "nothing")


def test_the_table_needs_no_torch(tmp_path):
    write_rows(made_rows(3), tmp_path / ROWS)
    path = str(tmp_path / ROWS)
    code = f"import sys; from evidence.cells import Table; Table({path!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_searches_of_the_docs_run(tmp_path, monkeypatch, capsys):
    write_rows(made_rows(), tmp_path / ROWS)
    monkeypatch.setattr(cells_module, "DEFAULT", tmp_path / ROWS)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "cells.md").read_text(), re.DOTALL)
    exec(compile(code, "docs/cells.md", "exec"), {})
    reached = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    mean = np.mean([row["test_top1"] for row in made_rows() if row["random"]])
    assert len(reached) == 2
    assert all(float(text.split()[0]) > mean + 1 for text in reached.values()), "both are better than chance"


# What it shows


def test_ridge_finds_what_counts_and_a_left_out_cell_by_it(table):
    shown = Cells(table)
    predicted = left_out_predictions(shown)
    r = correlation(predicted, shown.accuracy)
    assert 0.8 < r.low < r.value < r.high <= 1
    x = np.random.default_rng(0).normal(size=(200, 3))
    y = x @ (1.0, -2.0, 0.0) + 5
    np.testing.assert_allclose(Ridge.fit(x, y).predict(x[:5]), y[:5], atol=0.01)
    x = np.column_stack([x, np.ones(200)])  # what does not vary has no say
    np.testing.assert_allclose(Ridge.fit(x, y).predict(x[:5]), y[:5], atol=0.01)
    counts = dict(zip(FEATURES, features(EBNAS), strict=True))
    assert counts["normal: max_pool_3x3"] == 4 and counts["reduce: bin_dil_conv_5x5"] == 2
    assert counts["normal: depth"] == 1 and counts["normal: width"] == 8
    assert counts["reduce: depth"] == 2 and counts["reduce: width"] == 6


def test_curves_rank_as_scipy_says_and_better_the_longer(table):
    shown = Cells(table)
    found = rankings(shown)
    accuracy = found["held-out accuracy"]
    for epoch, estimate in enumerate(accuracy):
        of_scipy = stats.spearmanr(shown.curve("valid_top1")[:, epoch], shown.last_test).statistic
        assert estimate.value == pytest.approx(of_scipy) and estimate.low < estimate.value < estimate.high
    assert found["sum of training losses"][0].value > 0.9, "made so"
    assert found["OPs"][0].value > 0.5, "fewer dilated convolutions are fewer OPs here"
    assert np.isnan(rho(np.ones(5), np.arange(5)).value)


def test_a_percentile_is_of_the_random_cells(table):
    assert percentile(np.array([1.0, 2.0, 3.0, 4.0]), 2.5) == 50
    assert percentile(np.array([1.0, 2.0, 3.0]), 2.0) == 50
    (found,) = standings(Cells(table)).values()
    runs = [row["test_top1"] for row in table.runs[canonical(EBNAS)]]
    assert found.runs == 3 and found.mean == pytest.approx(np.mean(runs))
    assert found.percentile.low < found.percentile.value < found.percentile.high
    best, worst = made_rows(), made_rows()
    for rows, shift in ((best, 20), (worst, -20)):
        for row in rows[-3:]:
            row["test_top1"] = 60 + shift
    high, low = (standings(Cells(Table.of(rows)))["EBNAS"] for rows in (best, worst))
    assert (high.percentile.low, low.percentile.high) == (100, 0) and high.p < 0.001 and low.p > 0.999
    several = made_rows()
    for number in range(2):
        several += [{**several[0], "cell": f"EBNAS_R{number}", "random": False} | {"seed": 2000 + number}]
        several[-1]["genotype"] = genotype_to_dict(random_genotype(900 + number))
    assert standings(Cells(Table.of(several)))["the published search (2 cells)"].runs == 2


def test_holm_is_that_of_the_paper():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.6, "b": 0.9}) == pytest.approx({"a": 1.0, "b": 1.0}) and holm({}) == {}


def test_the_front_is_of_what_nothing_beats():
    assert front([3, 1, 2, 2, 4], [60, 50, 55, 58, 59]) == [1, 3, 0]


def test_a_table_is_shown_however_few_rows_it_has(tmp_path, table):
    rows = made_rows()
    words = [what_it_shows(Table.of(part), {}) for part in (rows[:1], rows[:3], rows[-3:], rows[:9], rows)]
    assert "Distribution" not in words[0] and "Distribution" in words[1]
    assert "What ranks" not in words[3] and "What ranks" in words[4] and "EBNAS | 3" in words[4]
    (tmp_path / "scores").mkdir()
    scores = {f"random:{number}": -features(random_genotype(number))[5] for number in range(20)}
    (tmp_path / "scores" / "supernet R0.json").write_text(json.dumps(scores))
    assert "supernet R0 | 20 |" in what_it_shows(table, scores_of(tmp_path))
    names = {path.name for path in draw_cells(table, tmp_path)}
    assert names == {f"{name}.png" for name in ("distribution", "cost", "ranking", "prediction", "scores")}
    draw_cells(Table.of(rows[:3]), tmp_path)
    (tmp_path / "scores" / "bad.json").write_text("[1]")
    with pytest.raises(InputError, match=r"bad\.json holds no numbers"):
        scores_of(tmp_path)


# The studies


@pytest.mark.parametrize("scale", [name for name, scale in SCALES.items() if scale.instrument])
def test_the_table_is_of_other_cells_and_seeds_than_what_chose_how_it_is_made(scale):
    plan = SCALES[scale].instrument
    tried, made = (
        {(job.flags["arch"], job.flags["seed"]) for job in make(SCALES[scale]).final_jobs()}
        for make in (medium, cells)
    )
    assert not {arch for arch, _ in tried} & {arch for arch, _ in made}
    random = sorted(pair for pair in made if pair[0].startswith("random"))
    assert len(random) == plan.cells + plan.twice and len({seed for _, seed in made}) == len(random) + 3
    assert {seed for arch, seed in made if arch == "EBNAS"} == set(NAMED_SEEDS)
    assert min(int(arch.removeprefix("random:")) for arch, _ in random) == FIRST_CELL
    trained = {way.images * (way.epochs + way.stage1_epochs) for way in plan.ways.values()}
    assert scale == "tiny" or len(trained) < 3
    assert plan.chosen in plan.ways and plan.long not in plan.ways.values()


def test_ways_cost_the_same_and_the_long_training_eight_times_as_much():
    """In images of all epochs, those that are held out not among them."""
    scale = SCALES["medium"]

    def visits(way) -> int:
        return (way.images - scale.network["holdout"]) * (way.epochs + way.stage1_epochs)

    assert {visits(way) for way in scale.instrument.ways.values()} == {45_000}
    assert visits(scale.instrument.long) == 8 * 45_000


def test_names_of_one_network_are_one_row():
    swapped = renamed(EBNAS, (0, 1, 2, 3), swap=True)
    other = random_genotype(1234)
    named = named_cells(replace(SCALES["tiny"], found={"mine": other, "again": swapped}))
    assert named["EBNAS = again"] == "EBNAS" and named["mine"] == CellOf(other)
    study = cells(replace(SCALES["tiny"], found={"mine": other}))
    elsewhere = cells(replace(SCALES["tiny"], found={"moved": other}))
    assert study.jobs().keys() == elsewhere.jobs().keys(), "a file is known by what is in it"


def test_the_real_scripts_fill_the_table(scripts, monkeypatch, without_pictures):
    """Two random cells, and one of a file."""
    few = replace(SCALES["tiny"].instrument, cells=2, twice=0)
    tiny = replace(SCALES["tiny"], instrument=few)
    monkeypatch.setitem(study.SCALES, "tiny", tiny)
    monkeypatch.setattr("evidence.studies.NAMED_SEEDS", range(2000, 2001))
    monkeypatch.setattr("evidence.studies.GENOTYPES", {})
    folder = scripts.folder / "results" / "tiny" / "cells"
    (folder / "found").mkdir(parents=True)
    save_genotype(folder / "found" / "mine.json", random_genotype(7))
    output = scripts.run("study.py", "cells", "--scale", "tiny").stdout
    assert "3 of 3 runs" in output and "| mine | 1 |" in output
    table = Table(folder / ROWS)
    assert len(table.rows) == 3 and table.named == {"mine": canonical(random_genotype(7))}
    for row in table.rows:
        assert len(row["valid_top1"]) == 2 and min(row["cpu_seconds"]) > 0 and row["images"] == 50
        assert row["commit"] and row["machine"]["torch"]
    run = next(
        run for run in scripts.runs("*-study-*") if json.loads((run / "args.json").read_text())["seed"] == 100
    )
    scripts.run("export.py", run / "best.pt", "--output", "exported.ebnas")
    row = next(row for row in table.rows if row["seed"] == 100)
    assert row["packed_bytes"] == (scripts.folder / "exported.ebnas").stat().st_size
    assert "3 of 3 runs" in scripts.run("study.py", "cells", "--scale", "tiny").stdout
    assert len(scripts.runs("*-study-*")) == 3
    assert "has no table of cells" in scripts.run("study.py", "cells", "--scale", "small", code=2).stderr
