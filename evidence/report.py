"""A study's table, in Markdown, from the content of its file."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scipy.stats import entropy

from evidence.plan import Arm, Study, tested
from evidence.statistics import Difference, Summary, difference, rank_correlation, spread
from genotypes import PRIMITIVES

Records = Mapping[str, Mapping[str, Any]]
Accuracies = Mapping[str, Mapping[int, float]]

ENOUGH_CELLS = 10
"""For a look at what goes with their accuracy."""


def top1_by_arm(study: Study, records: Records) -> dict[str, dict[int, float]]:
    """By arm and seed: the accuracy that counts, in percent, of the finished runs."""
    return {
        arm.name: {
            seed: arm.accuracy(records[job.key]["figures"], seed)
            for seed, job in arm.jobs.items()
            if job.key in records
        }
        for arm in study.arms
    }


def report(study: Study, content: Mapping[str, Any]) -> str:
    """The table of the arms with what is asked of them, and the searches behind them where there are any."""
    records = content["jobs"]
    accuracies = top1_by_arm(study, records)
    wanted = [job.key for job in study.final_jobs()]
    done = sum(key in records for key in wanted)
    supernets = "" if all(arm.accuracy is tested for arm in study.arms) else "; of supernets validation top-1"
    figure = f"Test top-1 in percent, of the epoch that was best on held-out training images{supernets}."
    if study.analysis == "ways":
        figure = "Top-1 on held-out training images in percent, of the epoch that was best on them."
    lines = [
        f"## {study.name} ({content['scale']}): {study.question}",
        "",
        f"{done} of {len(wanted)} runs. {figure}",
        "",
        *markdown_table(_arm_rows(study, accuracies, records)),
    ]
    if study.analysis == "spread" and (found := spread([list(v.values()) for v in accuracies.values()])):
        lines += [
            "",
            f"Standard deviation between arms {found.cells:.2f}, between the runs of an arm "
            f"{found.seeds:.2f}; F = {found.f:.2f}, p = {found.p:.3f} that all arms are equal.",
        ]
    if study.analysis == "ways" and len(ways := _way_rows(study, accuracies, records)) > 1:
        lines += [
            "",
            "Of each way, over cells: the mean of its seeds; the standard deviation between cells and "
            f"between seeds, their ratio, F and the p of equal cells; Spearman's rho of the mean with "
            f"{study.reference.name}; CPU minutes of a run.",
            "",
            *markdown_table(ways),
        ]
    if len(searches := _search_rows(study, records)) > 1:
        lines += [
            "",
            "The searches: validation top-1 in percent, of the supernet, of what it is cut down to, what "
            "that loses (and that less the first arm's, with a 95 % interval), and with new BN statistics; "
            "entropy of softmax(alpha) in nats; how often each operation was chosen, of 16, and the entropy "
            "of the choices of all the arm's searches.",
            "",
            *markdown_table(searches),
        ]
    if len(cells := _cells(study, accuracies, records)) >= ENOUGH_CELLS:
        lines += [
            "",
            f"What goes with the mean accuracy of a cell, over {len(cells)} cells: Spearman's rho with how "
            "often it has each operation, and with its cost. A look back, at many things at once: a small p "
            "among these is a hint and no proof.",
            "",
            *markdown_table(_correlate_rows(cells)),
        ]
    return "\n".join(lines) + "\n"


def _arm_rows(
    study: Study, accuracies: Mapping[str, Mapping[int, float]], records: Records
) -> list[list[str]]:
    asked = {
        "differences": [f"difference from {study.reference.name} [95 %]", "P(better)"],
        "ranks": [f"Spearman's rho with {study.reference.name} [95 %]"],
        "ways": [f"Spearman's rho with {study.reference.name} [95 %]"],
        "spread": [],
    }[study.analysis]
    rows = [["arm", "n", "mean", "std", *asked, "params", "OPs", "kB", "minutes"]]
    for arm in study.arms:
        values, reference = accuracies[arm.name], accuracies[study.reference.name]
        if not values:
            continue
        summary = Summary.of(list(values.values()))
        answers = [""] * len(asked)
        if arm is not study.reference and study.analysis == "differences":
            answers = _difference_cells(difference(values, reference, paired=study.paired))
        elif arm is not study.reference and study.analysis in ("ranks", "ways"):
            found = rank_correlation(values, reference)
            interval = f"[{number(found.low)}, {number(found.high)}]"
            answers = [f"{number(found.rho)} {interval} (p = {number(found.p)}, {found.n} cells)"]
        cells = [arm.name, str(summary.n), f"{summary.mean:.2f}", number(summary.std), *answers]
        rows.append([*cells, *_cost_cells(arm, records)])
    return rows


def _way_rows(study: Study, accuracies: Accuracies, records: Records) -> list[list[str]]:
    rows = [
        ["way", "cells", "mean", "of cells", "of seeds", "ratio [95 %]", "F", "p", "rho [95 %]", "CPU min"]
    ]
    reference = accuracies[study.reference.name]
    for way in dict.fromkeys(arm.way for arm in study.arms if arm is not study.reference):
        arms = [arm for arm in study.arms if arm.way == way]
        by_cell: dict[int, list[float]] = defaultdict(list)
        for arm in arms:
            for cell, accuracy in accuracies[arm.name].items():
                by_cell[cell].append(accuracy)
        if not by_cell:
            continue
        means = {cell: _mean(values) for cell, values in by_cell.items()}
        found = rank_correlation(means, reference)
        spreads = [""] * 5
        if apart := spread(list(by_cell.values())):
            ratio = f"{apart.ratio:.2f} [{apart.low:.2f}, {apart.high:.2f}]"
            spreads = [f"{apart.cells:.2f}", f"{apart.seeds:.2f}", ratio, f"{apart.f:.1f}", f"{apart.p:.3f}"]
        chains = (job.chain for arm in arms for job in arm.jobs.values() if job.key in records)
        minutes = [sum(sum(records[j.key]["curve"]["cpu_seconds"]) for j in chain) / 60 for chain in chains]
        rho = f"{number(found.rho)} [{number(found.low)}, {number(found.high)}]"
        rows.append(
            [way, str(len(means)), f"{_mean(means.values()):.2f}", *spreads, rho, f"{_mean(minutes):.1f}"]
        )
    return rows


def _difference_cells(found: Difference | None) -> list[str]:
    if found is None:
        return ["", ""]
    pairs = f", {found.pairs} pairs" if found.pairs else ""
    return [f"{_interval(found)}{pairs}: {found.verdict}", f"{found.better:.2f}"]


def _interval(found: Difference) -> str:
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def _cost_cells(arm: Arm, records: Records) -> list[str]:
    """Parameters, OPs and stored kB of the trained networks; the minutes of whole chains, searches and trials
    of candidates too. Each a mean."""
    finals = [job for job in arm.jobs.values() if job.key in records]
    minutes = [sum(records[j.key]["seconds"] for j in job.chain if j.key in records) / 60 for job in finals]
    costs = [records[job.key]["cost"] for job in finals if "cost" in records[job.key]]
    if not costs:  # supernets
        return ["", "", "", f"{_mean(minutes):.1f}"]
    parameters, ops, size = (_mean(cost[name] for cost in costs) for name in ("parameters", "ops", "bytes"))
    return [f"{parameters:,.0f}", f"{ops:.3g}", f"{size / 1000:.1f}", f"{_mean(minutes):.1f}"]


def _search_rows(study: Study, records: Records) -> list[list[str]]:
    names = [name.removeprefix("bin_").removesuffix("_3x3") for name in PRIMITIVES]
    rows, reference = [], None
    for arm in study.arms:
        searches = {job.key for final in arm.jobs.values() for job in final.chain if "search" in job.script}
        found = [records[key] for key in sorted(searches) if key in records]
        if not found:
            continue
        results = [record["figures"] for record in found]
        lost = {
            record["flags"]["seed"]: result["valid_top1"] - result["discrete_top1"]
            for record, result in zip(found, results, strict=True)
        }
        reference = reference or (arm.name, lost)
        loses = _mean_and_std(list(lost.values()))
        if arm.name != reference[0] and (more := difference(lost, reference[1], paired=study.paired)):
            loses += f" ({_interval(more)})"
        supernet, cut, renewed, of_alpha = (
            _mean_and_std([result[name] for result in results])
            for name in ("valid_top1", "discrete_top1", "discrete_top1_new_statistics", "alpha_entropy")
        )
        counts = [_mean(result["operations"].get(name, 0) for result in results) for name in PRIMITIVES]
        rows.append(
            [
                *(arm.name, str(len(found)), f"{_mean(record['seconds'] / 60 for record in found):.1f}"),
                *(supernet, cut, loses, renewed, of_alpha),
                *(f"{n:.1f}" for n in counts),
                f"{entropy(counts):.2f}",
            ]
        )
    heads = ["supernet", "cut down", "loses", "new statistics", "entropy"]
    return [["arm", "n", "minutes", *heads, *names, "choices"], *rows]


def _cells(study: Study, accuracies: Accuracies, records: Records) -> list[dict[str, float]]:
    """By cell the mean accuracy of its trained networks, how often it has each operation, and its cost. Of
    ranks the reference's networks count: the other arms have measures of another kind."""
    runs: dict[str, list[tuple[float, Mapping[str, Any]]]] = defaultdict(list)
    of_reference = study.analysis in ("ranks", "ways")
    for arm in [study.reference] if of_reference else study.arms:
        for seed, accuracy in accuracies[arm.name].items():
            record = records[arm.jobs[seed].key]
            if record.get("genotype"):
                runs[json.dumps(record["genotype"])].append((accuracy, record))
    cells = []
    for of_cell in runs.values():
        _, record = of_cell[0]
        operations = Counter(name for kind in ("normal", "reduce") for name, _ in record["genotype"][kind])
        cells.append(
            {
                "accuracy": _mean(accuracy for accuracy, _ in of_cell),
                **{name: operations[name] for name in PRIMITIVES},
                "all dilated": sum(operations[name] for name in PRIMITIVES if "dil" in name),
                "OPs": record["cost"]["ops"],
                "parameters": record["cost"]["parameters"],
            }
        )
    return cells


def _correlate_rows(cells: Sequence[Mapping[str, float]]) -> list[list[str]]:
    rows = [["of a cell", "mean", "rho", "p"]]
    by_name = {name: {i: cell[name] for i, cell in enumerate(cells)} for name in cells[0]}
    for name in list(by_name)[1:]:
        found = rank_correlation(by_name[name], by_name["accuracy"])
        rows.append([name, f"{_mean(by_name[name].values()):,.1f}", number(found.rho), number(found.p, 3)])
    return rows


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _mean_and_std(values: Sequence[float]) -> str:
    summary = Summary.of(values)
    return f"{summary.mean:.2f} ± {number(summary.std)}"


def number(value: float, digits: int = 2) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = rows
    alignment = ["---", *("---:" for _ in head[1:])]
    return ["| " + " | ".join(row) + " |" for row in (head, alignment, *body)]
