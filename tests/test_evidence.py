"""Studies as values, their figures on disk, and their statistics against the formulas."""

import json
import math

import numpy as np
import pytest
from scipy import stats

import train
import train_search
from evidence.plan import Arm, BestOf, FolderOf, Job, Study
from evidence.report import report
from evidence.statistics import Summary, difference, spread
from evidence.store import Store
from evidence.studies import ONE_STAGE, SCALES, STUDIES
from stages import settle
from study import command_line
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


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", STUDIES)
def test_arms_differ_in_what_they_say_alone(name, scale):
    study = STUDIES[name](SCALES[scale])
    ends = study.jobs()
    assert len({job.key for job in ends}) == len(ends) == sum(len(arm.jobs) for arm in study.arms)
    keys = {
        flag for end in ends for flag, value in end.flags.items() if not isinstance(value, FolderOf | BestOf)
    }
    differing = {flag for flag in keys if len({repr(end.flags.get(flag)) for end in ends}) > 1} - {"binary"}
    beyond = {
        "init_channels",
        "groups",
        "layers",
        "auxiliary",
        "activation",
        "teacher",
        "stage1_weight_decay",
        "ema",
        "clip_weights",
    }
    assert differing <= {"seed", "arch", "stage1", "weight_binarization", "epochs", "from_scratch", *beyond}
    for end in ends:
        assert end.flags["holdout"] > 0, "an epoch is chosen on training images"
        assert end.flags.get("binary") or end.flags["arch"] in ONE_STAGE
        stages = [end, *([end.flags["pretrained"].job] if "pretrained" in end.flags else [])]
        assert (
            sum(job.flags["epochs"] for job in stages)
            == SCALES[scale].stage1_epochs + SCALES[scale].stage2_epochs
        )


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", STUDIES)
def test_every_run_is_one_that_its_script_takes(name, scale):
    for job in {job.key: job for end in STUDIES[name](SCALES[scale]).jobs() for job in end.chain}.values():
        known = {flag: value for flag, value in job.flags.items() if not isinstance(value, FolderOf | BestOf)}
        if job.script == "train_search.py":
            assert not train_search.parser().parse_args(command_line(known)).idle
        else:
            args = settle(train.parser().parse_args(command_line(known)), family="cifar")  # or it raises
            assert not args.idle


def test_differences_are_those_of_the_t_tests():
    ours, theirs = {0: 51.0, 1: 52.5, 2: 50.0}, {0: 50.0, 1: 51.0, 2: 49.5}
    d = np.array([1.0, 1.5, 0.5])
    half = stats.t.ppf(0.975, 2) * d.std(ddof=1) / math.sqrt(3)
    found = difference(ours, theirs, paired=True)
    assert found.paired and found.undecided == (1 - half < 0)
    np.testing.assert_allclose((found.mean, found.low, found.high), (1, 1 - half, 1 + half))
    np.testing.assert_allclose(found.better, stats.t.cdf(1 / (d.std(ddof=1) / math.sqrt(3)), 2))
    unpaired = difference(ours, {**theirs, 3: 49.0}, paired=True)
    assert not unpaired.paired and unpaired.high - unpaired.low > found.high - found.low
    assert difference({0: 51.0}, theirs, paired=False) is None


def test_the_spread_of_cells_is_told_from_that_of_seeds():
    random = np.random.default_rng(0)
    cells = random.normal(0, 3, (200, 1)) + random.normal(0, 1, (200, 2))
    found = spread(cells.tolist())
    assert abs(found.cells - 3) < 0.4 and abs(found.seeds - 1) < 0.15 and found.p < 1e-6
    assert spread([[1.0], [2.0]]) is None
    assert Summary.of([1.0]).n == 1 and math.isnan(Summary.of([1.0]).std)


def record(top1: float) -> dict:
    figures = {"best": {"score": top1}, "test": {"top1": top1}}
    return {"figures": figures, "seconds": 60.0, "cost": {"ops": 1e6, "bytes": 1e4}, "flags": {}}


def two_arms(name: str = "search") -> Study:
    arms = (Arm("one", {0: FIRST}), Arm("other", {0: stage2(FIRST, 0), 1: stage2(FIRST, 1)}))
    return Study(name, "Is it?", arms)


def test_figures_of_one_study_serve_another(tmp_path):
    store = Store(tmp_path, "tiny", ("search", "stages"))
    store.keep(two_arms(), {FIRST.key: record(50)})
    content = store.keep(two_arms("stages"), {stage2(FIRST, 1).key: record(60)})
    assert set(content["jobs"]) == {FIRST.key, stage2(FIRST, 1).key}
    assert json.loads((tmp_path / "stages.json").read_text()) == content
    table = report(two_arms("stages"), content)
    assert "2 of 3 runs" in table and "| other | 1 | 60.00 | - |" in table
    with pytest.raises(InputError, match="is of --scale tiny, not full"):
        Store(tmp_path, "full", ("search",))
    (tmp_path / "search.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        Store(tmp_path, "tiny", ("search",))
