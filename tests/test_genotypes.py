"""Genotypes: the registry, the round trip through a file, and what a file may not hold."""

import json
from collections import Counter
from itertools import permutations

import pytest

from genotypes import (
    EDGES,
    GENOTYPES,
    NODES,
    PRIMITIVES,
    Genotype,
    describe,
    genotype_from_dict,
    genotype_to_dict,
    get_genotype,
    random_genotype,
    save_genotype,
)
from utils import InputError

PUBLISHED = """\
normal bin_conv_3x3 0, max_pool_3x3 1 | max_pool_3x3 0, max_pool_3x3 1 | bin_conv_3x3 1, bin_conv_5x5 0 | \
max_pool_3x3 0, bin_dil_conv_3x3 1
reduce bin_conv_5x5 0, bin_conv_5x5 1 | bin_conv_3x3 1, bin_dil_conv_5x5 2 | bin_dil_conv_5x5 2, \
bin_conv_3x3 1 | max_pool_3x3 0, bin_conv_3x3 1"""


def test_the_registered_cell_is_the_published_one():
    assert describe(get_genotype("EBNAS")) == PUBLISHED
    assert GENOTYPES["EBNAS"].normal_concat == GENOTYPES["EBNAS"].reduce_concat == (2, 3, 4, 5)


def test_random_genotypes_are_uniform_over_what_a_search_can_derive():
    """By counting, over 4,000 draws: within 5 standard deviations."""
    draws = [random_genotype(seed) for seed in range(4_000)]
    assert draws[7] == get_genotype("random:7") == genotype_from_dict(genotype_to_dict(draws[7]))
    for kind in ("normal", "reduce"):
        for node in range(NODES):
            inputs = Counter(tuple(s for _, s in getattr(g, kind)[2 * node : 2 * node + 2]) for g in draws)
            assert set(inputs) == set(permutations(range(2 + node), 2))
            assert_uniform(inputs)
        for position in range(2 * NODES):
            assert_uniform(Counter(getattr(g, kind)[position][0] for g in draws), choices=len(PRIMITIVES))
    with pytest.raises(InputError, match="takes a seed"):
        get_genotype("random:x")


def assert_uniform(counts: Counter, choices: int = 0) -> None:
    n, p = counts.total(), 1 / (choices or len(counts))
    assert all(abs(count - n * p) < 5 * (n * p * (1 - p)) ** 0.5 for count in counts.values())
    assert len(counts) == round(1 / p)


def test_fourteen_edges_node_by_node():
    assert EDGES[:5] == ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2))
    assert len(EDGES) == 14


def test_round_trip_through_a_file_and_a_run_folder(tmp_path):
    save_genotype(tmp_path / "genotype.json", GENOTYPES["EBNAS"], epoch=3)
    assert json.loads((tmp_path / "genotype.json").read_text())["epoch"] == 3
    assert get_genotype(str(tmp_path / "genotype.json")) == GENOTYPES["EBNAS"]
    assert get_genotype(str(tmp_path)) == GENOTYPES["EBNAS"]
    assert isinstance(get_genotype(str(tmp_path)), Genotype)
    assert list(tmp_path.iterdir()) == [tmp_path / "genotype.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"normal": 1}', '{"normal": null}'])
def test_a_file_that_is_no_genotype(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"broken\.json"):
        get_genotype(str(path))


@pytest.mark.parametrize("source", [-1, 2, "0", 1.0, True, None])
def test_inputs_that_do_not_exist(source):
    fields = genotype_to_dict(GENOTYPES["EBNAS"])
    fields["normal"][0][1] = source
    with pytest.raises(InputError, match="which does not exist; its inputs are 0 to 1"):
        genotype_from_dict(fields)


@pytest.mark.parametrize("concat", [[], [1, 2], [2, 6], [3, 3], "2345", [2.0]])
def test_concat_must_list_different_nodes(concat):
    fields = {**genotype_to_dict(GENOTYPES["EBNAS"]), "reduce_concat": concat}
    with pytest.raises(InputError, match="reduce_concat"):
        genotype_from_dict(fields)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError, match="choose from EBNAS"):
        get_genotype("NASNet")
    with pytest.raises(InputError, match="choose from EBNAS"):
        get_genotype("__import__('os')")
