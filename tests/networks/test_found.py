"""What a search says it has found, and skips that give way to the next best operations."""

import pytest
import torch
from support.scripts import TINY_SEARCH

from genotypes import EDGES, GENOTYPES, PRIMITIVES, Genotype, get_genotype
from model import ModelConfig, build_model
from model_search import derive_cell
from networks.cost import measure_cost
from networks.found import describe_found, published_costs

SKIP = PRIMITIVES.index("skip_connect")


def test_the_published_cell_is_beside_itself_as_its_table_has_it():
    lines = list(describe_found(GENOTYPES["EBNAS"]))
    rows = {line[:36].strip(): line[36:].split() for line in lines[3:7]}
    assert rows["CIFAR-10, C 84, 16 cells"] == ["10,048,846"] * 2 + ["0.688"] * 2 + ["2.32"] * 2
    assert rows["ImageNet, C 112, 14 cells"] == ["17,033,568"] * 2 + ["1.724"] * 2 + ["10.13"] * 2
    assert lines[-2:] == [
        "skips: 0 in the normal cell, 0 in the reduction cell (EBNAS: 0 and 0)",
        "pools: 4 in the normal cell, 1 in the reduction cell (EBNAS: 4 and 1)",
    ]


def test_the_auxiliary_head_by_hand():
    """1,344 channels of 8 x 8, pooled to 2 x 2: a 1x1 and a 2x2 convolution with BN, a linear layer."""
    without, with_head = (published_costs(GENOTYPES["EBNAS"], "CIFAR-10")[head] for head in (False, True))
    convolutions = (1344 * 128, 128 * 768 * 4)
    linear = 768 * 10
    assert with_head.parameters - without.parameters == sum(convolutions) + 2 * (128 + 768) + linear + 10
    assert with_head.float_macs - without.float_macs == 4 * convolutions[0] + convolutions[1] + linear
    assert with_head.bn_elements - without.bn_elements == 4 * 128 + 768
    assert with_head.avg_pool_elements - without.avg_pool_elements == 4 * 1344
    assert with_head.binary_macs == without.binary_macs


def test_a_network_without_a_head_costs_the_same_either_way():
    model = build_model(ModelConfig(GENOTYPES["EBNAS"], init_channels=14, layers=3))
    assert measure_cost(model, 32, auxiliary=True) == measure_cost(model, 32)


@pytest.mark.parametrize("most", range(9))
@pytest.mark.parametrize("seed", range(3))
def test_the_strongest_skips_stay(most, seed):
    draw = torch.Generator().manual_seed(seed)
    alpha, beta = torch.randn(14, 7, generator=draw), torch.randn(12, generator=draw)
    alpha[::2, SKIP] += 4
    free, limited = derive_cell(alpha, beta), derive_cell(alpha, beta, most)
    row_of = {edge: index for index, edge in enumerate(EDGES)}
    skips, changed = [], {}
    for node in range(4):
        before, after = (dict((s, name) for name, s in c[2 * node : 2 * node + 2]) for c in (free, limited))
        assert before.keys() == after.keys()  # the edges stay
        for source, name in before.items():
            row = alpha[row_of[node, source]]
            if name == "skip_connect":
                skips.append((row.softmax(0)[SKIP].item(), after[source] == "skip_connect"))
            else:
                assert after[source] == name
            if after[source] != name:
                others = [row[p].item() if p != SKIP else -99 for p in range(7)]
                changed[node, source] = (after[source], PRIMITIVES[others.index(max(others))])
    stays = [kept for _, kept in sorted(skips, reverse=True)]
    assert len(skips) >= 2
    assert stays == [True] * min(most, len(skips)) + [False] * max(len(skips) - most, 0)
    assert all(now == next_best for now, next_best in changed.values())


def test_no_limit_is_the_original_rule():
    alpha = torch.zeros(14, 7)
    alpha[:, SKIP] = 1
    assert derive_cell(alpha, torch.zeros(12)) == derive_cell(alpha, torch.zeros(12), 8)
    assert {name for name, _ in derive_cell(alpha, torch.zeros(12), 0)} == {"max_pool_3x3"}  # first on a tie


def test_a_search_of_no_skips_finds_none_and_says_what_it_found(scripts, data_flags, monkeypatch):
    for name in ("draw_curves", "draw_genotype"):
        monkeypatch.setattr(f"train_search.{name}", lambda *_: [])

    def skipping(cell: str) -> Genotype:
        return get_genotype(str(scripts.runs(f"search-{cell}-*")[0]))

    from model_search import Supernet

    make = Supernet.__init__

    def favour_skips(self, config):
        make(self, config)
        self.alphas_normal.data[:, SKIP] += 5

    monkeypatch.setattr(Supernet, "__init__", favour_skips)
    flags = [*data_flags, *TINY_SEARCH, "--epochs", 1]
    log = scripts.run("train_search.py", *flags, "--save", "free").stdout
    assert "skips: 8 in the normal cell" in log
    log = scripts.run("train_search.py", *flags, "--save", "one", "--most_skips", 1).stdout
    assert "skips: 1 in the normal cell" in log and "most_skips 1" in log
    assert sum(name == "skip_connect" for name, _ in skipping("free").normal) == 8
    assert sum(name == "skip_connect" for name, _ in skipping("one").normal) == 1
    assert skipping("one").reduce == skipping("free").reduce
