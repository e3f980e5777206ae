"""The figures of finished runs on disk: results/NAME.json, one file a study, each whole in itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from evidence.plan import Study
from genotypes import genotype_from_dict
from utils import InputError, write_atomically


class Results:
    """`folder`/NAME.json holds what a study asked and the record of each of its finished jobs by key.

    A job whose record stands in any of the files is done. Processes of several machines may share the folder:
    who writes holds its lock. Records are never removed. Raises InputError on a file of another `scale` (its
    name, with the set's), or a damaged one.
    """

    def __init__(self, folder: Path, scale: str, names: Iterable[str]):
        self.folder, self.scale = folder, scale
        self.paths = {name: folder / f"{name}.json" for name in names}
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file; give a folder for the figures")
        self.records()

    def records(self) -> dict[str, dict]:
        """The records of all files, by key."""
        found = {}
        for path in self.paths.values():
            found |= self._records_of(path)
        return found

    def content(self, study: Study) -> dict[str, Any]:
        """The content of a study's file: its own records, and those of its jobs that other files hold."""
        known, jobs = self.records(), study.jobs()
        own = self._records_of(self.paths[study.name])
        return {
            "study": study.name,
            "question": study.question,
            "scale": self.scale,
            "arms": {arm.name: {str(s): job.key for s, job in arm.jobs.items()} for arm in study.arms},
            "jobs": own | {key: known[key] for key in jobs if key in known},
        }

    def prepare(self) -> None:
        """Make the folder, before the hours of work whose figures it is for. Raises InputError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / ".lock", "a", encoding="utf-8"):
                pass
        except OSError as error:
            raise InputError(
                f"no figures can be written to {self.folder}: {error.strerror}; give another --out"
            ) from None

    def keep(self, study: Study, records: Mapping[str, dict]) -> None:
        """Add `records` to the study's file."""
        with self.updated(study, records):
            pass

    @contextmanager
    def updated(self, study: Study, records: Mapping[str, dict]) -> Iterator[dict[str, Any]]:
        """The content of the study's file, with `records` and what other files hold of its jobs. Within it no
        other process writes to the folder: what is drawn of the content is not older than the file."""
        self.prepare()
        with FileLock(self.folder / ".lock"):
            content = self.content(study)
            content["jobs"].update(records)
            write_atomically(self.paths[study.name], _a_line_each(content).encode())
            yield content

    def _records_of(self, path: Path) -> dict[str, dict]:
        if not path.exists():
            return {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not JSON: {error}; remove it, or give another --out") from None
        if not isinstance(content, dict) or not isinstance(content.get("jobs"), dict):
            raise InputError(f"{path} is not the file of a study; remove it, or give another --out")
        if content.get("scale") != self.scale:
            raise InputError(
                f"{path} is of scale {content.get('scale')}, not {self.scale}; give another --out"
            )
        for key, record in content["jobs"].items():
            if not is_whole(record):
                raise InputError(
                    f"{path}: the record {key} is damaged; remove its line to make that run again"
                )
        return content["jobs"]


def is_whole(record: Any) -> bool:
    """Whether a record has the figures that tables and pictures are made of."""
    try:
        figures, numbers = record["figures"], [record["seconds"], record["flags"]["seed"]]
        if record["script"] == "train.py":
            numbers += [figures["test"]["top1"], figures["best"]["score"]]
            numbers += [record["cost"][name] for name in ("parameters", "ops", "bytes")]
            cell = record["genotype"] or {"normal": [], "reduce": []}
        else:
            numbers += [figures["valid_top1"], figures["discrete_top1"], figures["alpha_entropy"]]
            numbers += [figures["discrete_top1_new_statistics"], *figures["operations"].values()]
            numbers += figures.get("random_cells", [])
            cell = figures["genotype"]
            genotype_from_dict(cell)
        operations = [name for kind in ("normal", "reduce") for name, _ in cell[kind]]
    except (LookupError, TypeError, ValueError, AttributeError, InputError):
        return False
    return all(type(n) in (int, float) and math.isfinite(n) for n in numbers) and all(
        isinstance(name, str) for name in operations
    )


def _a_line_each(content: Mapping[str, Any]) -> str:
    """JSON with an arm and a job on a line of its own, so that a reader and a diff see them apart."""

    def text(value: Any) -> str:
        if not isinstance(value, dict):
            return json.dumps(value)
        return "{\n  " + ",\n  ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n }"

    return "{\n " + ",\n ".join(f"{json.dumps(k)}: {text(v)}" for k, v in content.items()) + "\n}\n"
