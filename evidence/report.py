"""A study's table, in Markdown, from the content of its file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from evidence.plan import Arm, Job, Study
from evidence.statistics import Summary, difference, spread

SEARCH_FIGURES = ("valid_top1", "discrete_top1", "discrete_top1_new_statistics", "alpha_entropy")


def test_accuracies(study: Study, content: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """By arm and seed: top-1 on the test images, in percent, of the finished runs."""
    jobs = content["jobs"]
    return {
        arm.name: {
            seed: jobs[job.key]["figures"]["test"]["top1"]
            for seed, job in arm.jobs.items()
            if job.key in jobs
        }
        for arm in study.arms
    }


def report(study: Study, content: Mapping[str, Any]) -> str:
    """The table of arms, what is decided, and the searches behind the arms where there are any."""
    accuracies = test_accuracies(study, content)
    reference = accuracies[study.reference.name]
    wanted = sum(len(arm.jobs) for arm in study.arms)
    done = sum(map(len, accuracies.values()))
    lines = [
        f"## {study.name} ({content['scale']}): {study.question}",
        "",
        f"{done} of {wanted} runs. Test top-1 in percent; the difference is from `{study.reference.name}`, "
        "with its 95 % interval.",
        "",
    ]
    rows = [["arm", "n", "mean", "std", "difference", "P(better)", "OPs", "kB", "minutes"]]
    for arm in study.arms:
        values = accuracies[arm.name]
        if values:
            is_reference = arm is study.reference
            compared = None if is_reference else difference(values, reference, paired=study.paired)
            rows.append([*_accuracy_cells(arm.name, values, compared), *_cost_cells(arm, content["jobs"])])
    lines += _table(rows)
    if study.name == "resolution" and (found := spread([list(v.values()) for v in accuracies.values()])):
        lines += [
            "",
            f"Standard deviation between cells {found.cells:.2f}, between the seeds of a cell "
            f"{found.seeds:.2f}; F = {found.f:.2f}, p = {found.p:.3f} that all cells are equal.",
        ]
    lines += _search_lines(study, content["jobs"])
    return "\n".join(lines) + "\n"


def _accuracy_cells(name: str, values: Mapping[int, float], compared) -> list[str]:
    summary = Summary.of(list(values.values()))
    cells = [name, str(summary.n), f"{summary.mean:.2f}", _number(summary.std)]
    if compared is None:
        return [*cells, "", ""]
    words = f"{compared.mean:+.2f} [{compared.low:+.2f}, {compared.high:+.2f}]"
    words += " (pairs)" if compared.paired else ""
    return [*cells, words, f"{compared.better:.2f}"]


def _cost_cells(arm: Arm, jobs: Mapping[str, dict]) -> list[str]:
    """OPs and bytes of the trained networks, and the time of whole chains, each a mean."""
    records = [jobs[job.key] for job in arm.jobs.values() if job.key in jobs]
    ops = [record["cost"]["ops"] for record in records]
    size = [record["cost"]["bytes"] for record in records]
    minutes = [
        sum(jobs[key]["seconds"] for key in {part.key for part in job.chain}) / 60
        for job in arm.jobs.values()
        if job.key in jobs
    ]
    return [f"{_mean(ops):.3g}", f"{_mean(size) / 1000:.1f}", f"{_mean(minutes):.1f}"]


def _search_lines(study: Study, jobs: Mapping[str, dict]) -> list[str]:
    """Of the arms with a search: the supernet's validation accuracy, and that of the network that it is cut
    down to; what was found."""
    rows = [
        ["arm", "n", "supernet", "cut down", "with new BN statistics", "entropy of alpha", "skips", "pools"]
    ]
    for arm in study.arms:
        searches = filter(None, map(_search_of, arm.jobs.values()))
        found = [jobs[search.key]["figures"] for search in searches if search.key in jobs]
        if found:
            columns = [[figures[name] for figures in found] for name in SEARCH_FIGURES]
            counts = [
                [sum(n for name, n in figures["operations"].items() if word in name) for figures in found]
                for word in ("skip", "pool")
            ]
            cells = [_mean_and_std(column) for column in (*columns, *counts)]
            rows.append([arm.name, str(len(found)), *cells])
    if len(rows) == 1:
        return []
    return ["", "The searches: validation top-1 in percent; operations of both cells' 16.", "", *_table(rows)]


def _search_of(job: Job) -> Job | None:
    return next((part for part in job.chain if part.script == "train_search.py"), None)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _mean_and_std(values: list[float]) -> str:
    summary = Summary.of(values)
    return f"{summary.mean:.2f} ± {_number(summary.std)}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _table(rows: list[list[str]]) -> list[str]:
    head, *body = rows
    alignment = ["---", *("---:" for _ in head[1:])]
    return ["| " + " | ".join(row) + " |" for row in (head, alignment, *body)]
