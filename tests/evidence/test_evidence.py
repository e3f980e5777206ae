"""Studies as values, their figures on disk, and their statistics against the formulas."""

import json
import math

import numpy as np
import pytest
from scipy import stats

import train
import train_search
from evidence import runner
from evidence.plan import Arm, BestOf, FolderOf, Job, Study
from evidence.report import report
from evidence.results import Results
from evidence.statistics import Summary, difference, rank_correlation, spread
from evidence.studies import ONE_STAGE, SCALES, STUDIES
from flags.options import command_line
from genotypes import genotype_to_dict, get_genotype, random_genotype
from run.runs import RUNS
from study import scale_of
from training.stage_flags import settle
from utils import InputError

FIRST = Job("train.py", {"seed": 0, "epochs": 1})


def stage2(first: Job, seed: int) -> Job:
    return Job("train.py", {"seed": seed, "pretrained": FolderOf(first)})


def test_a_job_is_known_by_what_it_computes():
    same = Job("train.py", {"epochs": 1, "seed": 0})
    assert FIRST.key == same.key and stage2(FIRST, 0).key == stage2(same, 0).key
    other = Job("train.py", {"epochs": 2, "seed": 0})
    assert len({FIRST.key, other.key, stage2(FIRST, 0).key, stage2(other, 0).key}) == 4
    best = Job("train.py", {"arch": BestOf((FIRST, other))})
    assert list(best.chain) == [FIRST, other, best]


def test_jobs_with_figures_run_again_only_where_their_weights_are_needed():
    """teacher -> first stage -> second stage, of which another network takes the best cell."""
    teacher = Job("train.py", {"stage1": "w32a32"})
    first = Job("train.py", {"teacher": FolderOf(teacher)})
    second = stage2(first, 0)
    later = Job("train.py", {"arch": BestOf((second,))})
    here = {teacher.key, first.key}
    for done, weights, missing in (
        (set(), set(), {teacher, first, second, later}),
        ({teacher.key, first.key}, here, {second, later}),
        ({teacher.key, first.key}, {first.key}, {second, later}),
        ({teacher.key, first.key}, {teacher.key}, {first, second, later}),
        ({teacher.key, first.key}, set(), {teacher, first, second, later}),
        ({teacher.key, first.key, second.key}, set(), {later}),
    ):
        assert later.missing(done, lambda job, weights=weights: job.key in weights) == {
            j.key for j in missing
        }


def test_the_best_of_searched_cells_is_given_by_its_genotype(tmp_path, monkeypatch):
    """Here of a machine that has the figures alone."""
    monkeypatch.chdir(tmp_path)
    RUNS.mkdir()
    searches = [Job("train_search.py", {"seed": seed}) for seed in range(2)]
    networks = [Job("train.py", {"arch": FolderOf(search), "binary": True}) for search in searches]
    found = [random_genotype(seed) for seed in range(2)]
    records = {
        search.key: {"figures": {"genotype": genotype_to_dict(genotype)}}
        for search, genotype in zip(searches, found, strict=True)
    }
    records |= {
        job.key: {"figures": {"best": {"score": score}}}
        for job, score in zip(networks, (40, 50), strict=True)
    }
    assert get_genotype(str(runner.flag_text(BestOf(tuple(networks)), records))) == found[1]


DIFFERING = {
    ("regularisers", "without path"): {"path_reg_weight"},
    ("regularisers", "without edge"): {"edge_reg_weight"},
    ("regularisers", "without both"): {"path_reg_weight", "edge_reg_weight"},
    ("sampling", "k 4 and 4"): {"k_normal"},
    ("sampling", "k 8 and 8"): {"k_reduce"},
    ("stages", "W1A1 from scratch"): {"epochs", "from_scratch"},
    ("stages", "W32A1, then W1A1"): {"stage1"},
    ("stages", "balanced weights"): {"weight_binarization"},
    ("beyond", "RPReLU"): {"activation"},
    ("beyond", "teacher"): set(),
    ("beyond", "decay in stage 1"): {"stage1_weight_decay"},
    ("beyond", "moving average"): {"ema"},
    ("beyond", "clipped weights"): {"clip_weights"},
    ("beyond", "twice the epochs"): {"epochs"},
    ("beyond", "twice, with a teacher"): {"epochs"},
    ("beyond", "all of them"): {"activation", "stage1_weight_decay", "ema", "clip_weights"},
}
"""By study and arm: the flags, but for other jobs' results, in which its runs differ from the reference's."""


UNEQUAL = ("ranking", "transfer", "small_20", "small_100", "small_500")
"""Studies whose runs have other epochs than their scale."""


def flags_of(final: Job) -> dict[tuple[str, str], object]:
    """Of a chain's search and of its last run, by script and name."""
    jobs = [job for job in final.chain if job.script == "train_search.py" or job is final]
    plain = ((job.script, name, value) for job in jobs for name, value in job.flags.items())
    return {(s, name): value for s, name, value in plain if not isinstance(value, FolderOf | BestOf)}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("name", "arm"), DIFFERING)
def test_an_arm_differs_in_what_it_says_alone(name, arm, scale):
    study = STUDIES[name](SCALES[scale])
    (ours,) = [each for each in study.arms if each.name == arm]
    assert ours.jobs.keys() == study.reference.jobs.keys() and study.paired
    for seed, final in ours.jobs.items():
        flags, theirs = flags_of(final), flags_of(study.reference.jobs[seed])
        differing = {n for s, n in flags.keys() | theirs if flags.get((s, n)) != theirs.get((s, n))}
        assert differing == DIFFERING[name, arm] and flags["train.py", "seed"] == seed


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    "name", [name for name in STUDIES if name not in ("ranking", "transfer") and "small" not in name]
)
def test_epochs_are_equal_and_chosen_on_training_images(name, scale):
    study = STUDIES[name](SCALES[scale])
    finals = study.final_jobs()
    assert len({job.key for job in finals}) == len(finals) == sum(len(arm.jobs) for arm in study.arms)
    epochs = SCALES[scale].stage1_epochs + SCALES[scale].stage2_epochs
    longer = [job for arm in study.arms if arm.name.startswith("twice") for job in arm.jobs.values()]
    for final in finals:
        stages = [final, *([final.flags["pretrained"].job] if "pretrained" in final.flags else [])]
        assert sum(job.flags["epochs"] for job in stages) == (2 * epochs if final in longer else epochs)
        assert all(job.flags["holdout"] > 0 for job in stages)
        assert final.flags.get("binary") or final.flags["arch"] in ONE_STAGE


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", STUDIES)
def test_every_run_is_one_that_its_script_takes(name, scale):
    for job in STUDIES[name](SCALES[scale]).jobs().values():
        known = {flag: value for flag, value in job.flags.items() if not isinstance(value, FolderOf | BestOf)}
        if job.script == "train_search.py":
            assert not train_search.parser().read(command_line(known)).idle
        else:
            flags = train.parser().read(command_line(known))
            settle(flags, family="cifar")  # or it raises
            assert not flags.idle


def test_differences_are_those_of_the_t_tests():
    ours, theirs = {0: 51.0, 1: 52.5, 2: 50.0}, {0: 50.0, 1: 51.0, 2: 49.5}
    d = np.array([1.0, 1.5, 0.5])
    half = stats.t.ppf(0.975, 2) * d.std(ddof=1) / math.sqrt(3)
    found = difference(ours, theirs, paired=True)
    assert found.pairs == 3 and found.verdict == ("better" if half < 1 else "undecided")
    np.testing.assert_allclose((found.mean, found.low, found.high), (1, 1 - half, 1 + half))
    np.testing.assert_allclose(found.better, stats.t.cdf(1 / (d.std(ddof=1) / math.sqrt(3)), 2))
    assert difference(ours, {**theirs, 3: 49.0}, paired=True) == found, "the seeds in common"
    welch = difference(ours, theirs, paired=False)
    assert (
        not welch.pairs and welch.high - welch.low > found.high - found.low and welch.verdict == "undecided"
    )
    assert difference({0: 51.0}, theirs, paired=False) is None
    same = difference(theirs, theirs, paired=True)
    assert (same.mean, same.low, same.high, same.better) == (0, 0, 0, 0.5)


def test_ranks_are_compared_over_common_seeds():
    found = rank_correlation({0: 1.0, 1: 2.0, 2: 3.0, 9: 0.0}, {0: 10.0, 1: 30.0, 2: 20.0})
    assert found.rho == pytest.approx(0.5) and found.n == 3
    random = np.random.default_rng(0)
    ours = dict(enumerate(random.integers(0, 9, 12)))  # with ties
    theirs = {seed: value**3 + random.normal(0, 200) for seed, value in ours.items()}
    found = rank_correlation(ours, theirs)
    of_scipy = stats.spearmanr(list(ours.values()), list(theirs.values()))
    np.testing.assert_allclose((found.rho, found.p), (of_scipy.statistic, of_scipy.pvalue))
    ends = np.arctanh(found.rho) + np.array((-1, 1)) * stats.norm.ppf(0.975) / math.sqrt(12 - 3)
    np.testing.assert_allclose((found.low, found.high), np.tanh(ends))
    assert math.isnan(rank_correlation(ours, dict.fromkeys(ours, 1.0)).low)


def test_the_spread_of_cells_is_told_from_that_of_seeds():
    random = np.random.default_rng(0)
    cells = random.normal(0, 3, (200, 1)) + random.normal(0, 1, (200, 2))
    found = spread(cells.tolist())
    assert abs(found.cells - 3) < 0.4 and abs(found.seeds - 1) < 0.15 and found.p < 1e-6
    assert found.low < found.ratio < found.high and found.low < 3 < found.high
    assert spread([[1.0], [2.0]]) is None
    assert Summary.of([1.0]).n == 1 and math.isnan(Summary.of([1.0]).std)


def record(top1: float) -> dict:
    figures = {"best": {"score": top1}, "test": {"top1": top1}}
    cost = {"parameters": 1000, "ops": 1e6, "bytes": 1e4}
    flags = {"seed": 0}
    return {
        **{"script": "train.py", "figures": figures, "seconds": 60.0},
        **{"cost": cost, "flags": flags, "genotype": None},
    }


def two_arms(name: str = "search") -> Study:
    arms = (Arm("one", {0: FIRST}), Arm("other", {0: stage2(FIRST, 0), 1: stage2(FIRST, 1)}))
    return Study(name, "Is it?", arms)


def test_what_goes_with_the_accuracy_of_cells_is_looked_for_where_there_are_enough():
    genotypes = [random_genotype(seed) for seed in range(12)]
    records = {}
    for seed, genotype in enumerate(genotypes):
        dilated = sum("dil" in name for name, _ in (*genotype.normal, *genotype.reduce))
        records[Job("train.py", {"seed": seed}).key] = {
            **record(50 - dilated),
            "genotype": genotype_to_dict(genotype),
        }

    def table(n: int) -> str:
        study = Study(
            "search", "Is it?", (Arm("random", {i: Job("train.py", {"seed": i}) for i in range(n)}),)
        )
        return report(study, {"scale": "tiny", "jobs": records})

    (line,) = (line for line in table(12).splitlines() if line.startswith("| all dilated"))
    assert line.endswith("| -1.00 | 0.000 |")
    assert "over 12 cells" in table(12) and "all dilated" not in table(9)

    jobs = {i: Job("train.py", {"seed": i}) for i in range(12)}
    other = Arm("of another kind", jobs, lambda figures, _: -2 * figures["test"]["top1"])
    ranks = Study("ranking", "Is it?", (Arm("long", jobs), other), analysis="ranks")
    assert line in report(ranks, {"scale": "tiny", "jobs": records}).splitlines()


def test_figures_of_one_study_serve_another_and_none_is_lost(tmp_path):
    results = Results(tmp_path, "tiny", ("search", "stages"))
    results.keep(two_arms(), {FIRST.key: record(50)})
    results.keep(two_arms("stages"), {stage2(FIRST, 1).key: record(60)})
    content = results.content(two_arms("stages"))
    assert set(content["jobs"]) == {FIRST.key, stage2(FIRST, 1).key}
    assert json.loads((tmp_path / "stages.json").read_text()) == content
    table = report(two_arms("stages"), content)
    assert "2 of 3 runs" in table and "| other | 1 | 60.00 | - |" in table
    other = Study("search", "Is it?", (Arm("another", {0: Job("train.py", {"seed": 7})}),))
    results.keep(other, {})
    assert FIRST.key in json.loads((tmp_path / "search.json").read_text())["jobs"], "the declaration changed"
    with pytest.raises(InputError, match="is of scale tiny, not full"):
        Results(tmp_path, "full", ("search",))
    for damage in ({"figures": {}}, {"seconds": "60"}, {"cost": None}, {"genotype": "EBNAS"}, {"flags": {}}):
        content["jobs"][FIRST.key] = record(50) | damage
        (tmp_path / "stages.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=f"record {FIRST.key} is damaged; remove its line"):
            Results(tmp_path, "tiny", ("stages",))
    (tmp_path / "search.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        Results(tmp_path, "tiny", ("search",))


FAILING = {
    "print('boom', file=sys.stderr); sys.exit(1)": "boom",
    "os.kill(os.getpid(), signal.SIGKILL)": "ended by SIGKILL",
    "sys.exit(0)": "left no result.json",
    "folder = pathlib.Path('runs', 'eval-' + sys.argv[sys.argv.index('--save') + 1] + '-1'); folder.mkdir()\n"
    "(folder / 'result.json').write_text('{}')": "is damaged; move it away",
}
"""Scripts, and what is said of them."""


@pytest.mark.parametrize(("script", "why"), FAILING.items())
def test_a_run_that_fails_is_not_tried_again_by_the_next_that_needs_it(tmp_path, monkeypatch, script, why):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "PROGRAM", tmp_path)
    lines = ("import os, pathlib, signal, sys", "print('tried', file=open('tried', 'a'))", script)
    (tmp_path / "train.py").write_text("\n".join(lines))
    ours = runner.Runner(Results(tmp_path / "results", "tiny", ("search",)), data=None, at_once=1)
    ours.run(two_arms(), (1, 1))
    assert (tmp_path / "tried").read_text() == "tried\n"
    assert list(ours.failed) == [FIRST.key] and why in ours.failed[FIRST.key]
    assert not ours.results.records()


def test_more_seeds_are_more_runs_and_the_same_ones():
    few, more = (scale_of("all", None, None, seeds)[0] for seeds in (None, 8))
    for name, make in STUDIES.items():
        if name != "transfer":  # the best of more
            assert make(few).jobs().keys() <= make(more).jobs().keys()
    assert [len(arm.jobs) for arm in STUDIES["search"](more).arms] == [10, 8, 8, 8]


def test_figures_of_other_images_of_the_same_name_are_refused():
    ours = {"flags": {"set": "folder", "image_size": 16}, "images": {"classes": "a", "mean": [0.5, 0.4, 0.3]}}
    same = ours | {"images": {"classes": "a", "mean": [0.5001, 0.4, 0.3]}}
    larger = {
        "flags": {"set": "folder", "image_size": 32},
        "images": {"classes": "b", "mean": [0.1, 0.2, 0.3]},
    }
    runner._check_images(ours, [same, larger, {"flags": ours["flags"]}])
    for images in ({"classes": "b", "mean": [0.5, 0.4, 0.3]}, {"classes": "a", "mean": [0.5, 0.4, 0.31]}):
        with pytest.raises(InputError, match="of other images"):
            runner._check_images(ours, [same, ours | {"images": images}])
