"""A genotype as text: pasted, in a file, in a log; what it may look like, and what is said of what is not."""

import json

import pytest

from genotypes import (
    GENOTYPES,
    PRIMITIVES,
    Genotype,
    describe,
    genotype_to_dict,
    get_genotype,
    nearest_operation,
    random_genotype,
    save_genotype,
)
from utils import InputError

OURS = GENOTYPES["EBNAS"]
TEXT = repr(OURS._replace(normal=list(OURS.normal), reduce=list(OURS.reduce))).replace(
    "reduce_concat=(2, 3, 4, 5)", "reduce_concat=range(2, 6)"
)
OTHER = repr(random_genotype(1))
DARTS = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1), "
    "('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)], "
    "normal_concat=[2, 3, 4, 5], reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), "
    "('max_pool_3x3', 1), ('max_pool_3x3', 0), ('skip_connect', 2), ('skip_connect', 2), "
    "('max_pool_3x3', 1)], reduce_concat=[2, 3, 4, 5])"
)

STAMP = "12/01 05:19:09 PM "
STAMPS = (STAMP, "2026-12-01 05:19:09,123 - INFO - ", "[2026-12-01T05:19:09] ", "05:19:09 | ")


def nested(genotype: Genotype) -> str:
    """As programs write it that list the nodes."""
    cells = {
        kind: [list(getattr(genotype, kind)[i : i + 2]) for i in range(0, 8, 2)]
        for kind in ("normal", "reduce")
    }
    return repr(genotype._replace(**cells))


FORMS = {
    "pasted": TEXT,
    "named, in a file of several": f"OLD = {OTHER}\n\nEBNAS = {TEXT}\n",
    "double quotes": TEXT.replace("'", '"'),
    "typographic quotes": TEXT.replace("('", "(\N{LEFT SINGLE QUOTATION MARK}").replace(
        "',", "\N{RIGHT SINGLE QUOTATION MARK},"
    ),
    "quotes that a shell took": TEXT.replace("'", ""),
    "escaped quotes": TEXT.replace("'", "\\'"),
    "no spaces": TEXT.replace(" ", ""),
    "line breaks": TEXT.replace(", ", ",\n  ").replace("[", "[\n").replace("]", "\n]"),
    "a comma after the last": TEXT.replace(")]", "),]").replace("6))", "6),)"),
    "lists of lists": TEXT.replace("('", "['")
    .replace("),", "],")
    .replace(")]", "]]")
    .replace("range(2, 6]", "range(2, 6)"),
    "no names": f"Genotype({list(OURS.normal)}, range(2, 6), {list(OURS.reduce)}, range(2, 6))",
    "another order": f"Genotype(reduce={OURS.reduce}, reduce_concat=range(2, 6), normal={OURS.normal}, "
    "normal_concat=list(range(2, 6)))",
    "a list for each node": nested(OURS),
    "numbers of NumPy": TEXT.replace(" 1)", " np.int64(1))"),
    "JSON": json.dumps(genotype_to_dict(OURS)),
    "JSON within a line": f'{{"epoch": 3, "a": {json.dumps(genotype_to_dict(OURS))}, "seconds": 3.5}} so far',
    "as our own log has it": f"{describe(random_genotype(1))}\n{describe(OURS)}\noperations max_pool_3x3 5",
    "comments": TEXT.replace("normal_concat", "# the nodes\nnormal_concat"),
}


@pytest.mark.parametrize("form", FORMS)
def test_it_is_read_pasted_and_from_a_file(tmp_path, form):
    assert get_genotype(FORMS[form]) == OURS
    (tmp_path / "found.txt").write_text(FORMS[form])
    assert get_genotype(str(tmp_path / "found.txt")) == OURS


@pytest.mark.parametrize("stamp", STAMPS)
@pytest.mark.parametrize("form", ["pasted", "line breaks", "as our own log has it", "JSON within a line"])
def test_the_last_one_of_a_log_counts_whatever_stands_before_its_lines(tmp_path, form, stamp):
    lines = (
        f"param size 3.6\ngenotype = {OTHER}\nepoch 1 lr 1e-3\n{FORMS[form]}\nepoch 2 lr 1e-3".splitlines()
    )
    (tmp_path / "log.txt").write_text("".join(f"{stamp}{line}\n" for line in lines))
    assert get_genotype(str(tmp_path / "log.txt")) == OURS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_it(tmp_path, encoding):
    for content in FORMS["JSON"], f"Ergebnis für später: {TEXT}":
        (tmp_path / "file").write_text(content, encoding=encoding)
        if encoding != "utf-16" or content == FORMS["JSON"]:
            assert get_genotype(str(tmp_path / "file")) == OURS


def test_an_earlier_epoch_of_a_search(tmp_path):
    run = tmp_path / "search-EXP"
    run.mkdir()
    cells = [random_genotype(seed) for seed in range(3)]
    records = [{"epoch": n, "genotype": genotype_to_dict(cell)} for n, cell in enumerate(cells)]
    lines = "".join(f"{json.dumps(record)}\n" for record in records)
    (run / "metrics.jsonl").write_text(lines + '{"epoch": 3, "geno')
    save_genotype(run / "genotype.json", cells[2])
    assert [get_genotype(f"{run}@{epoch}") for epoch in range(3)] == cells
    assert get_genotype(str(run / "metrics.jsonl").replace("metrics.jsonl", "")) == cells[2]
    with pytest.raises(InputError, match="has no epoch 3: its epochs are 0 to 2"):
        get_genotype(f"{run}@3")
    (run / "metrics.jsonl").write_text('{"epoch": 0, "train_loss": 1.0}\n')
    with pytest.raises(InputError, match="has no genotypes"):
        get_genotype(f"{run}@0")
    (run / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match=r"no metrics\.jsonl in"):
        get_genotype(f"{run}@0")


def test_operations_of_another_program_are_named_with_the_nearest_of_ours():
    with pytest.raises(InputError) as error:
        get_genotype(DARTS)
    assert str(error.value) == (
        "the genotype given: unknown operations 'sep_conv_3x3' (nearest: bin_conv_3x3), 'dil_conv_3x3' "
        "(nearest: bin_dil_conv_3x3); --system ebnas takes the nearest, --system bats or dcp has all "
        "of these operations"
    )
    taken = get_genotype(DARTS, "ebnas")
    assert taken.normal[:1] + taken.normal[-1:] == (("bin_conv_3x3", 0), ("bin_dil_conv_3x3", 2))
    assert get_genotype(DARTS, "dcp").normal[0] == ("sep_conv_3x3", 0)


@pytest.mark.parametrize(
    ("theirs", "nearest"),
    [
        ("sep_conv_7x7", "bin_conv_5x5"),
        ("conv_7x1_1x7", "bin_conv_5x5"),
        ("dil_sep_conv_3x3", "bin_dil_conv_3x3"),
        ("inv_res_3x3", "bin_conv_3x3"),
        ("identity", "skip_connect"),
        ("av_pool_5x5", "avg_pool_3x3"),
        ("none", None),
        ("shuffle", None),
    ],
)
def test_the_nearest_operation(theirs, nearest):
    assert nearest_operation(theirs, PRIMITIVES) == nearest
    words = f"nearest: {nearest}" if nearest else "there is none like it"
    with pytest.raises(InputError, match=rf"unknown operation '{theirs}' \({words}\); "):
        get_genotype(TEXT.replace("bin_conv_5x5", theirs))


@pytest.mark.parametrize(
    ("changed", "to", "message"),
    [
        (
            "('bin_conv_5x5', 0), ('max",
            "('bin_conv_5x5', 4), ('max",
            r"'normal'\[5\] is \('bin_conv_5x5', 4\): node 2",
        ),
        ("('bin_dil_conv_3x3', 1)]", "]", r"it ends after 7: node 3 lacks its second pair"),
        ("('max_pool_3x3', 0), ('bin_dil_conv_3x3', 1)]", "]", r"it ends after 6: node 3 lacks its pairs"),
        (
            "('bin_dil_conv_3x3', 1)]",
            "('bin_dil_conv_3x3', 1), ('x', 5)]",
            r"\[8\] \('x', 5\) is one too many",
        ),
        ("range(2, 6)", "range(2, 7)", r"'reduce_concat' is \(2, 3, 4, 5, 6\)"),
        ("range(2, 6)", "range(0, 10**9)", r"has \* where a comma or a closing bracket must stand"),
        ("range(2, 6)", "range(0, 1000000000)", r"which is too long"),
        ("range(2, 6)", "exec(2)", r"'reduce_concat' is 2"),
        ("range(2, 6))", "range(2", r"the genotype on line 1 is cut short"),
        ("('bin_conv_3x3', 0), ('max", "(" * 9000 + "('max", r"nested too deeply"),
        ("('bin_conv_3x3', 0), ('max", "'bin_conv_3x3', ('max", r"'normal'\[0\] is 'bin_conv_3x3', not an"),
        ("reduce=", "reduction=", r"field 'reduce' is missing"),
    ],
)
def test_what_makes_no_cell_says_where(changed, to, message):
    assert changed in TEXT
    with pytest.raises(InputError, match=message):
        get_genotype(TEXT.replace(changed, to, 1))


def test_a_log_without_a_genotype_or_with_one_cut_short(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("epoch 1\nepoch 2\n")
    with pytest.raises(InputError, match=r"log\.txt holds no genotype"):
        get_genotype(str(log))
    log.write_text(f"epoch 1\n{TEXT}\nepoch 2\n{TEXT[:200]}")  # not the one before it, in silence
    with pytest.raises(InputError, match=r"log\.txt: the genotype on line 4 is cut short"):
        get_genotype(str(log))
    log.write_text(f"epoch 1\n{TEXT.replace('bin_conv_3x3', 'conv', 1)}\n")
    with pytest.raises(InputError, match=r"log\.txt, line 2: unknown operation 'conv'"):
        get_genotype(str(log))


def test_a_name_that_is_none_is_not_repeated_at_length():
    with pytest.raises(InputError, match=r"unknown genotype 'xx+\.\.\.': choose from EBNAS") as error:
        get_genotype("x" * 5000)
    assert len(str(error.value)) < 400


def test_costs_of_a_genotype(scripts):
    lines = scripts.run("evaluate.py", "--costs", DARTS, "--system", "dcp").stdout.splitlines()[2:]
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| CIFAR-10", "a cell of its own in the blocks of dcp, C 108"],
        ["| ImageNet", "a cell of its own in the blocks of dcp, C 108"],
    ]
