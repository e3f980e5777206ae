"""Searches by trials: cells as choices, the strategies on made figures, costs, and the real script."""

import json
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from support.scripts import TINY_STAGE, Scripts

import evidence.cells as cell_table
import evidence.strategies
from evidence.strategies import (
    Surrogate,
    Table,
    TrainedCell,
    distances,
    luck,
    report,
    simulate,
    simulate_beyond,
)
from genotypes import PRIMITIVES, genotype_from_dict, genotype_to_dict, get_genotype, random_genotype
from networks.cost import measure_cost
from networks.registry import trained_network
from packed import load
from run.checkpoint import load_checkpoint
from trials import strategies
from trials.cells import Candidate, Space
from trials.costs import Costs
from trials.regression import Ridge
from trials.strategies import (
    STRATEGIES,
    Epoch,
    Evolution,
    Halving,
    Job,
    Judge,
    Predictor,
    Strategy,
    Trial,
    front,
    front_scores,
    fronts,
    rungs,
)
from trials.training import Trainer

optuna = pytest.importorskip("optuna")

SPACE = Space((24,), (5,))
WORTH = {
    "bin_conv_3x3": 1.0,
    "bin_conv_5x5": 0.7,
    "max_pool_3x3": 0.3,
    "skip_connect": 0.0,
    "avg_pool_3x3": -0.5,
    "bin_dil_conv_3x3": -0.3,
    "bin_dil_conv_5x5": -1.0,
}


def rng(number: int = 0) -> np.random.Generator:
    return np.random.default_rng(number)


def candidate(number: int, **size: int) -> Candidate:
    return Candidate.of(random_genotype(number), **{"init_channels": 24, "layers": 5, **size})


def worth(cell: Candidate) -> float:
    """In points, of a made landscape: the operations, and what is the cell's alone."""
    own = rng(int(cell.key, 16)).normal()
    return sum(WORTH[name] for name, _ in cell.normal + cell.reduce) / 2 + 0.3 * own


def curve(cell: Candidate, epochs: int = 8) -> tuple[Epoch, ...]:
    """Rising towards 60 % and the cell's worth, with less noise the later: after an eighth of the epochs the
    correlation with the worth is 0.6, after a quarter 0.75, at the end 0.9."""
    noise = rng(int(cell.key, 16) + 1).normal(size=epochs)
    share = np.arange(1, epochs + 1) / epochs
    top1 = 60 * share**0.3 + worth(cell) + 0.6 * noise / np.sqrt(share)
    return tuple(Epoch(3 - value / 30, 3.2 - value / 30, value) for value in top1)


def searched(strategy: Strategy, seed: int = 0) -> list[Trial]:
    trials: list[Trial] = []
    while job := strategy.next(trials, np.random.default_rng([seed, len(trials)])):
        made = curve(job.candidate, strategy.epochs)[: job.epochs]
        trials.append(Trial(job, made, costs={"ops": 1.0, "kilobytes": 10 + 10 * worth(job.candidate) ** 2}))
    return trials


# Cells as choices


def test_a_candidate_is_the_network_not_the_order_of_its_inputs():
    cell = random_genotype(3)
    turned = cell._replace(normal=tuple(cell.normal[i ^ 1] for i in range(8)))
    size = {"init_channels": 24, "layers": 5}
    assert Candidate.of(cell, **size) == Candidate.of(turned, **size)
    assert Candidate.of(cell, **size).key == Candidate.of(turned, **size).key != candidate(4).key
    assert candidate(3).key != candidate(3, layers=8).key
    assert Candidate.from_dict(json.loads(json.dumps(candidate(3).to_dict()))) == candidate(3)


def test_draws_are_uniform_over_what_a_search_can_derive():
    cells = [SPACE.draw(rng(number)) for number in range(700)]
    for cell in cells[:50]:
        assert genotype_from_dict(cell.to_dict()["genotype"]) == cell.genotype
    edges = [pair for cell in cells for pair in cell.normal + cell.reduce]
    counts = np.array([sum(name == each for each, _ in edges) for name in PRIMITIVES])
    assert np.abs(counts / len(edges) - 1 / 7).max() < 0.015
    inputs = [tuple(source for _, source in cell.normal[4:6]) for cell in cells]  # 2 of 4 states: six ways
    assert np.abs(np.unique(inputs, axis=0, return_counts=True)[1] / 700 - 1 / 6).max() < 0.05


def test_a_mutation_changes_one_choice():
    for number in range(200):
        parent = candidate(number)
        child = SPACE.mutate(parent, rng(number))
        assert genotype_from_dict(child.to_dict()["genotype"]) == child.genotype
        before, after = set(parent.choices.items()), set(child.choices.items())
        assert child != parent
        changed = {name.rsplit(" ", 1)[0] for name, _ in before ^ after}
        assert len(changed) == 1  # of one node; the order of its two inputs may have changed with one of them
        kept = sum(
            (parent.normal + parent.reduce).count(pair) > 0 for pair in set(child.normal + child.reduce)
        )
        assert kept >= len(set(child.normal + child.reduce)) - 1
    sized = Space((16, 24), (5,))
    sizes = [sized.mutate(candidate(0), rng(number)).init_channels for number in range(400)]
    assert 60 < sizes.count(16) < 140


def test_every_choice_is_among_its_alternatives():
    space = Space((16, 24), (5, 8))
    cell = space.draw(rng())
    assert cell.choices.keys() == space.alternatives.keys()
    assert all(value in space.alternatives[name] for name, value in cell.choices.items())


# Strategies


def test_rungs():
    assert rungs(8, 2, 1) == (1, 2, 4, 8)
    assert rungs(6, 2, 1) == (1, 2, 3, 6)
    assert rungs(8, 4, 2) == (2, 8)
    assert rungs(1, 2, 1) == (1,)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("trainings", [1, 2, 10])
def test_a_strategy_spends_its_budget_and_is_the_same_again(name, trainings):
    strategy = STRATEGIES[name](SPACE, Judge(), 8, 8 * trainings)
    if name == "predictor":
        strategy = replace(strategy, pool=50)
    trials = searched(strategy)
    spent = sum(trial.job.cost for trial in trials)
    assert 8 * trainings - 8 < spent <= 8 * trainings
    assert len({(trial.key, trial.job.epochs) for trial in trials}) == len(trials)
    assert [trial.job for trial in searched(strategy)] == [trial.job for trial in trials]
    assert searched(strategy, seed=1)[0].job != trials[0].job
    reached = {}
    for trial in trials:  # each goes on where it stopped
        assert trial.job.start == reached.get(trial.key, 0)
        reached[trial.key] = trial.job.epochs
    best = strategy.best(trials)
    assert best.job.epochs == max(reached.values())


def test_halving_promotes_the_best_half_of_a_rung():
    strategy = Halving(SPACE, Judge(), 8, 1_000, eta=2)
    made = [
        Trial(Job(candidate(i), 0, 1), (Epoch(1, 1, float(top1)),)) for i, top1 in enumerate([3, 9, 5, 7])
    ]
    assert strategy.next(made, rng()).candidate == candidate(1)
    second = strategy.next([*made, Trial(Job(candidate(1), 1, 2))], rng())
    assert second == Job(candidate(3), 1, 2)
    both = [*made, *(Trial(Job(candidate(i), 1, 2)) for i in (1, 3))]
    assert strategy.next(both, rng()).start == 0  # the second half never goes on
    known = [
        *made,
        *(Trial(Job(candidate(i), 1, 2), (Epoch(1, 1, 1.0), Epoch(1, 1, 9.0 - i))) for i in (1, 3)),
    ]
    assert strategy.next(known, rng()) == Job(candidate(1), 2, 4)
    failed = [*made, Trial(Job(candidate(1), 1, 2), failed=True)]
    assert strategy.next(failed, rng()) == Job(candidate(3), 1, 2)


def test_trials_at_work_are_paid_for():
    strategy = Strategy(SPACE, Judge(), 8, 16)
    one = Trial(Job(candidate(0), 0, 8))
    assert strategy.next([one], rng()).cost == 8
    assert strategy.next([one, Trial(Job(candidate(1), 0, 8))], rng()) is None


def test_evolution_mutates_the_best_of_a_sample_of_the_youngest():
    strategy = Evolution(SPACE, Judge(), 8, 400, population=4, sample=4)
    old = [
        Trial(Job(candidate(i), 0, 2), (Epoch(1, 1, 1.0), Epoch(1, 1, top1)))
        for i, top1 in enumerate((9.0, 1.0, 2.0, 5.0, 3.0))
    ]
    child = strategy.next(old, rng()).candidate

    def edges(cell: Candidate) -> set:
        return {
            (kind, i // 2, pair)
            for kind in ("normal", "reduce")
            for i, pair in enumerate(getattr(cell, kind))
        }

    assert len(edges(child) - edges(candidate(3))) == 1  # candidate 0 was the best, and has died of age
    last = [Trial(Job(candidate(i), 0, 2), (Epoch(1, 1, 1.0), Epoch(1, 1, float(i)))) for i in range(140)]
    assert strategy.next(last, rng()) == Job(candidate(139), 2, 8)


def test_the_better_strategies_beat_chance_on_a_made_landscape():
    spread = np.std([worth(SPACE.draw(rng(i))) for i in range(300)])
    reached = {}
    for name, kind in STRATEGIES.items():
        strategy = kind(SPACE, Judge(), 8, 80, **({"pool": 100} if name == "predictor" else {}))
        found = [strategy.best(searched(strategy, seed)) for seed in range(8)]
        reached[name] = np.mean([worth(best.job.candidate) for best in found]) / spread
    assert reached["halving"] > reached["random"] + 0.2
    assert reached["evolution"] > reached["random"]
    assert reached["predictor"] > reached["halving"] + 0.2


def test_what_trials_are_judged_by():
    def trial(losses, top1, ops):
        made = tuple(Epoch(loss, 2.0, top1) for loss in losses)
        return Trial(Job(candidate(0), 0, 2), made, costs={"ops": ops, "kilobytes": ops})

    trials = [trial([2, 1], 50.0, 1e6), trial([1, 1], 40.0, 2e6), trial([3, 0], 45.0, 4e6)]
    assert list(Judge().scores(trials, 2)) == [50, 40, 45]
    assert list(Judge("training_loss").scores(trials, 2)) == [-3, -2, -3]
    assert list(Judge("training_loss").scores(trials, 1)) == [-2, -1, -3]
    weighed = Judge("accuracy", 100.0).scores(trials, 2)
    assert list(np.argsort(-weighed)) == [0, 1, 2]  # the OPs alone
    assert [t.costs["ops"] for t in front(trials, Judge(objectives=("kilobytes",)))] == [1e6]


def test_fronts_against_the_definition():
    points = rng(5).integers(0, 6, (40, 2)).astype(float)
    number = fronts(points)
    for i, p in enumerate(points):
        above = [number[j] for j, q in enumerate(points) if (q >= p).all() and (q > p).any()]
        assert number[i] == (max(above) + 1 if above else 0)
    scores = front_scores(points)
    assert all((scores[number == n] >= -n).all() and (scores[number == n] < 1 - n).all() for n in set(number))


def test_a_search_for_a_front_spreads_along_it():
    strategy = Predictor(
        SPACE,
        Judge(objectives=("kilobytes",)),
        8,
        160,
        costs_of=lambda c: {"kilobytes": 10 + 10 * worth(c) ** 2},
        pool=200,
        eta=2,
    )
    trials = searched(strategy)
    members = front(trials, strategy.judge)
    figures = [trial.curve[-1].valid_top1 for trial in members]
    assert len(members) > 2 and figures == sorted(figures, reverse=True)
    costs = [trial.costs["kilobytes"] for trial in members]
    assert costs == sorted(costs, reverse=True)


def test_limits_are_kept():
    strategy = Predictor(SPACE, Judge(), 8, 40, lambda c: "skip_connect" not in dict(c.normal), pool=50)
    trials = searched(strategy)
    assert trials and all("skip_connect" not in dict(t.job.candidate.normal) for t in trials)
    assert Strategy(SPACE, Judge(), 8, 80, lambda _: False).next([], rng()) is None


def test_ridge_against_the_normal_equations():
    x, noise = rng().normal(size=(40, 6)), rng(1).normal(size=40)
    x[:, 5] = 2.0  # does not vary
    y = x @ [1, 2, 0, 0, -1, 5] + 0.1 * noise
    ridge = Ridge.fit(x, y)
    assert ridge.left_out_r2 > 0.95
    assert np.abs(ridge.predict(x) - y).max() < 0.5
    a = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), np.inf)
    residuals = []
    for penalty in 10.0 ** np.arange(-1, 4):
        hat = a @ np.linalg.solve(a.T @ a + penalty * np.eye(6), a.T) + 1 / 40
        residuals.append(np.mean((((y - hat @ y) / (1 - np.diag(hat))) / y.std()) ** 2))
    assert np.isclose(1 - ridge.left_out_r2, min(residuals))


# Costs


def test_costs_are_those_of_the_exported_file_and_of_what_runs_it(tmp_path, scripts, data_flags):
    flags = [*data_flags, *TINY_STAGE, "--arch", "random:3", "--binary", "--from_scratch"]
    scripts.run("train.py", *flags)
    run = scripts.runs("eval-*")[0]
    scripts.run("export.py", run)
    packed = load(run / "model.ebnas", threads=1)
    packed(np.zeros((1, 3, 16, 16), np.float32))
    plan, _ = packed._plan(16, 16)
    cell = candidate(3, init_channels=4, layers=3)
    costs = Costs(load_checkpoint(run)["data"], groups=2).of(cell)
    assert costs["kilobytes"] == (run / "model.ebnas").stat().st_size / 1_000
    assert costs["ram"] == plan.new_arena().base.nbytes / 1_000
    trained = trained_network(load_checkpoint(run))
    assert costs["ops"] == measure_cost(trained, 16).ops


# The script


@pytest.fixture
def made_trainings(monkeypatch, without_pictures):
    """Trials cost nothing: their curves are those of the made landscape, and OPs are not counted. What was
    trained, in order."""
    asked = []

    def train(self, cell, epochs, progress=lambda _: None):
        asked.append((cell.key, epochs))
        progress(epochs)
        return curve(cell, self.stage1_epochs + self.epochs)[:epochs]

    monkeypatch.setattr(Trainer, "train", train)
    monkeypatch.setattr("trials.costs.measure_cost", lambda *_: SimpleNamespace(ops=1e6))
    return asked


TINY_TRIALS = (
    "--set shapes --image_size 16 --train_images 200 --holdout 50 --workers 0 --init_channels 4 --groups "
    "2 --layers 3 --stage1_epochs 2 --epochs 6"
).split()


def result(scripts, name: str = "EXP") -> dict:
    return json.loads((scripts.runs(f"search-{name}-*")[0] / "result.json").read_text())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_search_leaves_a_genotype_and_says_what_to_do(scripts, made_trainings, strategy):
    flags = [*TINY_TRIALS, "--strategy", strategy, "--budget", 8 * 150 * 4]
    output = scripts.run("search_trials.py", *flags).stdout
    folder = scripts.runs("search-EXP-*")[0]
    found = get_genotype(str(folder))
    assert genotype_from_dict(result(scripts)["best"]["genotype"]) == found
    assert f"--arch runs/{folder.name}" in output and "python train.py --set shapes" in output
    assert sum(epochs for _, epochs in made_trainings) >= result(scripts)["images"] / 150 > 8 * 3
    study = optuna.load_study(
        study_name=None,
        storage=optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(folder / "trials.journal"))
        ),
    )
    assert len(study.trials) == result(scripts)["trials"] and "normal 2 first" in study.trials[0].params
    assert study.trials[0].intermediate_values


def test_a_search_that_was_stopped_anywhere_ends_as_one_that_was_not(
    scripts, tmp_path, made_trainings, monkeypatch
):
    flags = [*TINY_TRIALS, "--strategy", "halving", "--budget", 8 * 150 * 3]
    scripts.run("search_trials.py", *flags)
    whole, trained = result(scripts), list(made_trainings)
    (tmp_path / "again").mkdir()
    again = Scripts(tmp_path / "again")
    train, left = Trainer.train, [3, 5]

    def ends(self, *words):
        left[0] -= 1
        if not left[0]:
            del left[0]
            raise KeyboardInterrupt
        return train(self, *words)

    monkeypatch.setattr(Trainer, "train", ends)
    output = again.run("search_trials.py", *flags, code=130).stdout
    folder = again.runs("search-EXP-*")[0]
    assert f"--resume runs/{folder.name}" in output
    again.run("search_trials.py", *flags, "--resume", "auto", code=130)
    monkeypatch.setattr(Trainer, "train", train)
    again.run("search_trials.py", "--resume", f"runs/{folder.name}")
    assert result(again) == whole and made_trainings[len(trained) :] == trained
    line = again.run("search_trials.py", "--resume", f"runs/{folder.name}", code=2).stderr
    assert "finished search; give a larger --budget" in line
    again.run("search_trials.py", "--resume", f"runs/{folder.name}", "--budget", 8 * 150 * 5)
    assert result(again)["images"] > whole["images"]
    line = again.run("search_trials.py", "--resume", f"runs/{folder.name}", "--layers", 5, code=2).stderr
    assert "--layers [3], not [5]" in line


def test_limits_and_fronts(scripts, made_trainings, monkeypatch):
    flags = [*TINY_TRIALS, "--init_channels", "4,8", "--strategy", "halving", "--budget", 8 * 150 * 3]
    scripts.run("search_trials.py", *flags, "--most_kilobytes", "30", "--save", "small")
    assert result(scripts, "small")["best"]["costs"]["kilobytes"] <= 30
    output = scripts.run("search_trials.py", *flags, "--objective", "accuracy,kilobytes").stdout
    assert "--init_channels" in output
    folder = scripts.runs("search-EXP-*")[0]
    members = json.loads((folder / "front" / "1.json").read_text())
    assert members["costs"]["kilobytes"] > 0 and (folder / "front.png").exists()
    assert len(result(scripts)["front"]) == len(list((folder / "front").iterdir()))
    monkeypatch.setattr(strategies, "MOST_TRIES", 5)
    line = scripts.run("search_trials.py", *TINY_TRIALS, "--most_ops", 1, "--save", "none", code=2).stderr
    assert "no cell that was drawn is within the limits" in line and "ops" in line


def test_what_is_wrong_is_said_in_a_line(scripts, fails, made_trainings, monkeypatch):
    assert "accuracy, then any of" in fails("search_trials.py", "--objective", "kilobytes")
    assert "which 2 groups and" in fails("search_trials.py", *TINY_TRIALS, "--init_channels", 5)
    assert "give 150 or more" in fails("search_trials.py", *TINY_TRIALS, "--budget", 149)
    assert "cannot be used" in fails("search_trials.py", *TINY_TRIALS, "--storage", "nosuch://host/name")
    assert "leaves none of 200" in fails("search_trials.py", *TINY_TRIALS, "--holdout", 200)
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "pip install optuna" in fails("search_trials.py", *TINY_TRIALS)


def test_real_trainings_are_killed_resumed_and_shared(scripts):
    """A search of one process is killed within a training; two processes end it, on the one storage."""
    trial = ["--stage1_epochs", 1, "--epochs", 3, "--batch_size", 10, "--train", "--drop_path_prob 0"]
    flags = [*TINY_TRIALS, *trial, "--strategy", "halving", "--budget", 150 * 5, "--eta", 2]
    process = scripts.start("search_trials.py", *flags)
    while not scripts.runs("eval-trial-*/metrics.jsonl"):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    process.kill()
    process.wait()
    first = scripts.runs("search-EXP-*")[0]
    processes = [
        scripts.start("search_trials.py", "--resume", f"runs/{first.name}"),
        scripts.start("search_trials.py", "--storage", f"runs/{first.name}/trials.journal"),
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    results = [json.loads((run / "result.json").read_text()) for run in scripts.runs("search-EXP-*")]
    assert len(results) == 2 and results[0] == results[1] and results[0]["images"] == 150 * 5
    for run in scripts.runs("eval-trial-*"):  # each was trained no further than it was to
        done = len((run / "metrics.jsonl").read_text().splitlines())
        assert done == 1 if "stage1" in run.name else done <= 3


def test_a_training_in_parts_is_the_one_in_one_go(tmp_path, monkeypatch, without_pictures):
    flags = {
        **{"set": "shapes", "image_size": 16, "train_images": 200, "holdout": 50, "workers": 0},
        **{"batch_size": 10, "groups": 2, "drop_path_prob": 0, "seed": 0},
    }
    curves = []
    for name, parts in (("parts", (1, 2, 3)), ("whole", (3,))):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        for epochs in parts:
            made = Trainer(flags, [], 0, 3).train(candidate(1, init_channels=4, layers=3), epochs)
            assert len(made) == epochs
        curves.append(made)
    assert curves[0] == curves[1]


# On a table


def made_table(count: int = 60) -> list[TrainedCell]:
    """Two seeds of the first twenty."""
    cells = []
    for number in range(count):
        cell = candidate(1_000 + number)
        made, seeds = curve(cell), rng(number).normal(size=2) * 0.5
        tests = (made[-1].valid_top1 + seeds[0], 60 + worth(cell) + seeds[1])
        cells.append(TrainedCell(cell, made, tests[: 2 if number < 20 else 1], 1e6 + number))
    return cells


def test_a_table_gives_its_cells_and_their_neighbours():
    cells = made_table(30)
    table = Table([*cells[:29], cells[0]])
    assert table.far[0, 0] == 0 and 8 < np.mean(table.far[0, 1:29]) < 16
    assert table.neighbours[0, 0] == 29  # the row that is there twice
    steps = [table.mutate(table.choices[3], rng(i)).row for i in range(300)]
    assert 3 not in steps and 30 < steps.count(table.neighbours[3, 0]) < 90
    drawn = table.redrawn(rng())
    assert (drawn.far == distances(drawn.cells)).all() and len(drawn.cells) == 30
    assert np.isclose(np.mean([table.reached(choice) for choice in table.choices]), 0)


def row(cell: Candidate, seed: int, name: str = "") -> dict:
    """Of a file of rows."""
    train_loss, valid_loss, valid_top1 = map(list, zip(*curve(cell), strict=True))
    return {
        **{"cell": name or cell.key, "random": not name, "seed": seed, "images": 100, "ops": 1e6},
        **{"genotype": genotype_to_dict(cell.genotype), "train_loss": train_loss, "valid_loss": valid_loss},
        **{"valid_top1": valid_top1, "cpu_seconds": [1.0] * 8, "test_top1": valid_top1[-1] + seed},
        **{"parameters": 1, "packed_bytes": 1},
    }


def test_the_study_of_a_table_of_trained_cells(scripts, tmp_path, monkeypatch):
    cells = [candidate(2_000 + i) for i in range(12)]
    rows = [row(cell, 0) for cell in cells] + [row(cells[0], 1), row(candidate(1), 0, "EBNAS")]
    (tmp_path / "figures" / "cells").mkdir(parents=True)
    path = tmp_path / "figures" / "cells" / "rows.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    found = evidence.strategies.trained_cells(cell_table.Table(path))
    assert sorted(len(each.tests) for each in found) == [1] * 11 + [2]  # random cells alone
    assert {each.curve for each in found} == {curve(cell) for cell in cells}
    monkeypatch.setattr(evidence.strategies, "SIMULATED", {"simulations": 2, "tables": 2, "each": 2})
    output = scripts.run("study.py", "strategies", "--out", "figures").stdout
    assert "| predictor | 20 | 2 |" in output and "strategies.png" in output
    again = scripts.run("study.py", "strategies", "--out", "figures", "--table").stdout
    assert again == (path.parent / "strategies.md").read_text() + "\n"
    assert "no table of cells" in scripts.run("study.py", "strategies", "--out", "none", code=2).stderr


def test_strategies_on_a_table(tmp_path):
    cells = made_table()
    ticks = []
    settings = {
        "simulations": 150,
        "tables": 6,
        "each": 4,
        "budgets": (2, 5),
        "progress": lambda: ticks.append(1),
    }
    reached = simulate(cells, **settings)
    assert len(ticks) == 2 * 7
    # the best of two, and of five, of which each is known by one run: 0.56 and 1.16 without noise
    assert 0.2 < reached["random", 2].mean < reached["random", 5].mean < 1.3
    assert reached["halving", 5].gain > 0.1 and reached["halving", 5].gain_high > reached["halving", 5].gain
    assert all(0.05 < each.high - each.mean < 1 for each in reached.values())  # none of 0, by chance
    best = max(cell.truth for cell in cells)
    table = Table(cells)
    assert all(each.mean <= (best - table.mean) / table.std for each in reached.values())
    assert simulate(cells, **settings) == reached
    beyond = simulate_beyond(cells, simulations=10, budgets=(2,), pool=30)
    text = report(reached, beyond, table.std)
    assert text.count("\n| ") == 9 and "| halving | 5 | 150 |" in text
    few = {"simulations": 3, "tables": 2, "each": 2, "budgets": (2,)}
    assert all(path.stat().st_size for path in evidence.strategies.run(cells, tmp_path, **few))


def test_the_interval_covers_the_mean_of_tables():
    """Of 100 tables whose means have a standard deviation of 0.3, and of 0, with 20 searches on each."""
    for between in (0.3, 0.0):
        tables = between * rng().normal(size=(100, 1)) + rng(1).normal(size=(100, 20))
        half = evidence.strategies._half_width(tables, 1_000)
        assert 1.96 * 0.85 * between < half < 1.96 * max(1.3 * between, 0.15)


def test_what_a_seed_keeps_of_a_chosen_run():
    cells = made_table(20)
    alike = [replace(cell, tests=(cell.curve[-1].valid_top1,) * 2) for cell in cells]
    assert luck(alike) == 1 and luck(made_table(2)) == 1
    chance = [
        replace(cell, tests=(cell.curve[-1].valid_top1, rng(i).normal())) for i, cell in enumerate(cells)
    ]
    assert luck(chance) < 0.5
    assert 0.5 < luck(cells) <= 1


def test_the_surrogate_has_the_spread_of_the_table_and_is_no_smoother_than_it():
    surrogate = Surrogate(made_table(120))
    cells = [SPACE.draw(rng(number)) for number in range(300)]
    reached = np.array([surrogate.reached(cell) for cell in cells])
    assert 0.7 < reached.std() < 1.3 and abs(reached.mean()) < 0.4
    assert reached.tolist() == [surrogate.reached(cell) for cell in cells]
    last = [surrogate.train(cell)[-1].valid_top1 for cell in cells]
    early = [surrogate.train(cell)[0].valid_top1 for cell in cells]
    truths = [worth(cell) for cell in cells]
    assert np.corrcoef(truths, reached)[0, 1] > 0.4  # it has learnt what operations are worth
    assert np.corrcoef(last, reached)[0, 1] > np.corrcoef(early, reached)[0, 1] > 0.3
