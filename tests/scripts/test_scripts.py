"""The real scripts, run as a user runs them: the pipeline, and every kind of bad input."""

import json

import pytest
import torch
from support.scripts import TINY_SEARCH, TINY_STAGE

from genotypes import GENOTYPES, genotype_to_dict, get_genotype
from run.checkpoint import load_checkpoint
from run.runs import read_metrics, read_result


def test_a_search_leaves_its_genotype_metrics_and_pictures(pipeline):
    (run,) = pipeline.runs("search-EXP-*")
    genotype = get_genotype(str(run))
    written = json.loads((run / "genotype.json").read_text())
    assert written["search"]["path_reg_weight"] == 1.5
    assert written["search"]["arch_start_epoch"] == 1
    records = read_metrics(run)
    assert [record["epoch"] for record in records] == [0, 1]
    assert records[-1]["genotype"] == genotype_to_dict(genotype)
    assert sum(records[-1]["operations"].values()) == 16
    first, last = (record["arch"] for record in records)
    assert first != last, "no architecture step ran in the second half"
    for name in ("log.txt", "args.json", "last.pt", "best.pt", "genotype-normal.png", "curves.png"):
        assert (run / name).stat().st_size > 0
    assert list((run / "tensorboard").iterdir())
    result = read_result(run)
    assert result["genotype"] == records[-1]["genotype"] and result["valid_top1"] == records[-1]["valid_top1"]
    assert {"discrete_top1", "discrete_top1_new_statistics"} < set(result)
    assert len(result["random_cells"]) == 2 and all(0 < score < 100 for score in result["random_cells"])
    args = json.loads((run / "args.json").read_text())
    assert args["epochs"] == 2 and "commit" in args and "train_search.py" in args["command"]


def test_the_stages_follow_each_other(pipeline):
    (stage1,), (stage2,) = pipeline.runs("eval-EXP-stage1-*"), pipeline.runs("eval-EXP-stage2-*")
    first, second = load_checkpoint(stage1), load_checkpoint(stage2)
    assert (first["kind"], second["kind"]) == ("stage1", "stage2")
    assert (first["config"]["weight_bits"], first["config"]["activation_bits"]) == (1, 32)
    assert (second["config"]["weight_bits"], second["config"]["activation_bits"]) == (1, 1)
    assert first["config"]["genotype"] == second["config"]["genotype"]
    assert str(stage1.name) in (stage2 / "log.txt").read_text()
    assert first["finished"] and second["finished"]


def test_stage_2_begins_with_the_weights_of_stage_1(pipeline, scripts, data_flags, without_pictures):
    (search,), (stage1,) = pipeline.runs("search-*"), pipeline.runs("eval-EXP-stage1-*")
    flags = [*data_flags, *TINY_STAGE, "--epochs", 1, "--arch", search, "--learning_rate", 1e-30]
    scripts.run("train.py", *flags, "--auxiliary", "--binary", "--pretrained", stage1)
    before, after = (load_checkpoint(run)["model"] for run in (stage1, *scripts.runs("*")))
    for name, value in before.items():
        if "running_" not in name and "num_batches" not in name:
            torch.testing.assert_close(after[name], value, rtol=0, atol=1e-12)


def test_evaluate_prints_the_accuracy_that_training_saw(pipeline):
    (stage2,) = pipeline.runs("eval-EXP-stage2-*")
    record = read_metrics(stage2)[-1]
    output = pipeline.run("evaluate.py", stage2).stdout
    assert f"{record['valid_top1']:.2f}" in output
    assert "stage2 W1A1" in output and "genotype" in output


def test_the_packed_form_names_the_same_classes(pipeline):
    (stage1,), (stage2,) = pipeline.runs("eval-EXP-stage1-*"), pipeline.runs("eval-EXP-stage2-*")
    record = read_metrics(stage2)[-1]
    output = pipeline.run("evaluate.py", stage2, "--packed").stdout
    assert (
        f"top-1 {record['valid_top1']:.2f} %, the class of the float form on 100.00 % of 30 images" in output
    )
    assert "W1A1" in pipeline.run("evaluate.py", stage1, "--packed", code=2).stderr


def test_holdout_reports_the_test_accuracy_of_the_epoch_it_chose(scripts, data_flags, without_pictures):
    output = scripts.run("train.py", *data_flags, *TINY_STAGE, "--holdout", 30).stdout
    (run,) = scripts.runs("eval-EXP-stage1-*")
    records = read_metrics(run)
    best = max(records, key=lambda record: record["valid_top1"])
    assert f"epoch {best['epoch']}, the best on 30 held-out training images: test top-1" in output
    result = read_result(run)
    assert result["best"] == {"epoch": best["epoch"], "score": best["valid_top1"]}
    assert f"test top-1 {result['test']['top1']:.2f} %" in output and result["chosen_on"] == "held-out"
    assert "optimistic" not in output


def test_imagenet_trains_both_stages(scripts, imagenet_flags, without_pictures):
    command = [*imagenet_flags, "--epochs", 1, "--save", "log_path", "--auxiliary", "--note", "a note"]
    assert "first run `python" in scripts.run("train_imagenet.py", *command, "--binary", code=2).stderr
    scripts.run("train_imagenet.py", *command)
    output = scripts.run("train_imagenet.py", *command, "--binary").stdout
    (stage1,), (stage2,) = scripts.runs("eval-log_path-stage1-*"), scripts.runs("eval-log_path-stage2-*")
    assert f"starting from runs/{stage1.name}/last.pt" in output
    assert json.loads((stage2 / "args.json").read_text())["note"] == "a note"
    record = read_metrics(stage2)[-1]
    assert f"{record['valid_top1']:.2f}" in scripts.run("evaluate.py", stage2, "--workers", 1).stdout


def test_progress_bars_are_for_terminals_only(scripts, data_flags, without_pictures):
    flags = [*data_flags, *TINY_STAGE, "--epochs", 1]
    assert scripts.run("train.py", *flags).stderr == ""
    shown = scripts.run("train.py", *flags, terminal=True).stderr
    assert "\repoch 0: " in shown and "\revaluate: " in shown


def test_a_loss_that_is_not_finite_stops_the_run(scripts, data_flags):
    result = scripts.run("train.py", *data_flags, *TINY_STAGE, "--learning_rate", 1e30, code=1)
    assert "the loss is nan at epoch 0, step" in result.stderr and result.stderr.count("\n") == 1
    (run,) = scripts.runs("eval-*")
    state = load_checkpoint(run)["model"]
    assert all(torch.isfinite(tensor).all() for tensor in state.values() if tensor.is_floating_point())


BAD_FLAGS = [
    ("train_search.py", "--init_channels 12", "try 8 or 16"),
    ("train_search.py", "--epochs 0", "--epochs is 0"),
    ("train_search.py", "--train_portion 1.0", "--train_portion is 1.0"),
    ("train_search.py", "--batch_size 65", "larger than the 64 images"),
    ("train_search.py", "--path_reg_weight x", "--path_reg_weight is x; it must be a number"),
    ("train_search.py", "--device cuda", "no CUDA"),
    ("train_search.py", "--device tpu", "--device tpu"),
    ("train.py", "--arch DARTS", "choose from EBNAS"),
    ("train.py", "--init_channels 15", "try 14 or 16"),
    ("train.py", "--binary", "first run `python"),
    ("train.py", "--learning_rate 0", "--learning_rate is 0.0"),
    ("train.py", "--learning_rate nan", "--learning_rate is nan"),
    ("train.py", "--drop_path_prob 1.5", "--drop_path_prob is 1.5"),
    ("train.py", "--drop_path_prob -0.1", "--drop_path_prob is -0.1"),
    ("train.py", "--label_smooth 1", "--label_smooth is 1.0"),
    ("train.py", "--batch_size 129", "larger than the 128 images"),
    ("train.py", "--accumulate 17", "--accumulate 16 or less"),
    ("train.py", "--accumulate 2 --compile --compile_mode reduce-overhead", "does not go with --accumulate"),
    (
        "train.py",
        "--teacher nowhere",
        "neither a checkpoint nor a run's folder, nor a network of torchvision's",
    ),
    (
        "train.py",
        "--teacher_weight 0 --teacher x",
        "--teacher_weight is 0.0; it must be above 0 and at most 1",
    ),
    ("train.py", "--teacher x --label_smooth 0.1", "--label_smooth has no use with --teacher_weight 1"),
    ("train.py", "--stage1_weight_decay 1 --weight_decay 1", "contradict each other; give one"),
    ("train.py", "--stage1_weight_decay 1 --binary --from_scratch", "which has no stage 1"),
    ("train.py", "--ema 1", "--ema is 1.0"),
    ("train.py", "--activation relu", "invalid choice: 'relu'"),
    ("train_search.py", "--accumulate 0", "--accumulate is 0"),
    ("train.py", "--holdout 128", "a hold-out of 128"),
    ("train.py", "--binary --pretrained nowhere", "no checkpoint nowhere"),
    ("train.py", "--pretrained nowhere --set shapes --image_size 16", "no checkpoint nowhere"),
    ("train.py", "--from_scratch --set shapes --image_size 16", "--from_scratch is for stage 2"),
    ("train.py", "--resume nowhere", "no checkpoint nowhere"),
    ("train.py", "--nonsense", "unrecognized arguments"),
    ("train.py", "--seed 5000000000", "--seed is 5000000000"),
    ("train.py", "--learning_rate 1e39", "--learning_rate is 1e+39"),
    ("train.py", "--image_size 1000000", "--image_size is 1000000"),
    ("train.py", "--save ../evil", "a name without slashes"),
    ("train.py", "--resume=", "--resume is empty"),
    ("train_search.py", "--path_reg_weight inf", "--path_reg_weight is inf"),
    ("train_imagenet.py", "--tmp_data_dir nowhere", "nowhere"),
    ("train_imagenet.py", "", "--tmp_data_dir"),
    ("evaluate.py", "nowhere", "no checkpoint nowhere"),
    ("evaluate.py", "--costs foo", "unknown genotype 'foo': choose from EBNAS"),
    ("evaluate.py", "--costs --packed", "leave out packed"),
]


@pytest.mark.parametrize(
    ("script", "flags", "expected"), BAD_FLAGS, ids=[f"{s} {f}" for s, f, _ in BAD_FLAGS]
)
def test_bad_flags_get_one_line(fails, data_flags, script, flags, expected):
    tiny = {"train_search.py": [*data_flags, *TINY_SEARCH], "train.py": [*data_flags, *TINY_STAGE]}
    assert expected in fails(script, *tiny.get(script, []), *flags.split())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda g: g.pop("reduce"), "field 'reduce' is missing"),
        (lambda g: g["normal"].pop(), "field 'normal' must list 8"),
        (
            lambda g: g["normal"].__setitem__(2, ["bin_conv_3x3", 3]),
            "node 1 takes input 3, which does not exist",
        ),
        (lambda g: g["reduce"].__setitem__(0, ["sep_conv_3x3", 0]), "unknown operation 'sep_conv_3x3'"),
        (lambda g: g.update(normal_concat=[2, 2]), "'normal_concat'"),
    ],
)
def test_malformed_genotype_files_name_the_field(fails, tmp_path, data_flags, change, expected):
    fields = genotype_to_dict(GENOTYPES["EBNAS"])
    change(fields)
    path = tmp_path / "genotype.json"
    path.write_text(json.dumps(fields))
    assert expected in fails("train.py", *data_flags, *TINY_STAGE, "--arch", path)


def test_bad_checkpoints(pipeline, fails, tmp_path, data_flags):
    (stage1,), (search,) = pipeline.runs("eval-*-stage1-*"), pipeline.runs("search-*")
    whole = (stage1 / "last.pt").read_bytes()
    truncated, foreign = tmp_path / "truncated.pt", tmp_path / "foreign.pt"
    truncated.write_bytes(whole[: len(whole) // 2])
    torch.save({"state_dict": {}}, foreign)
    stage = [*data_flags, *TINY_STAGE, "--arch", search, "--binary"]
    for path, expected in [
        (truncated, "is truncated or is no checkpoint"),
        (foreign, "of another program"),
        (search, "is a search's checkpoint; train its genotype"),
    ]:
        assert expected in fails("train.py", *stage, "--pretrained", path)
    assert "layers 3, not 4" in fails("train.py", *stage, "--layers", 4, "--pretrained", stage1)
    assert "other genotype" in fails("train.py", *stage, "--arch", "EBNAS", "--pretrained", stage1)
    line = fails("train.py", "--resume", stage1)
    assert f"is of a finished run; to train it further, give --pretrained {stage1}" in line
    assert "--resume takes a run's folder" in fails("train.py", "--resume", stage1 / "best.pt")
    assert "resume it there" in fails("train.py", "--resume", search)
    assert "is a search" in fails("evaluate.py", search)


def test_missing_data_says_what_to_do(fails):
    assert "train" in fails("train.py", "--set", "folder", "--data", "nowhere")
