"""The figures of finished runs on disk: results/NAME.json, one file a study, each whole in itself."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evidence.plan import Study
from utils import InputError, write_atomically


class Store:
    """`folder`/NAME.json holds what a study asked and the record of each of its finished jobs by key.

    A job whose record stands in any file of the folder is done. Processes of several machines may share the
    folder: who writes holds its lock. Raises InputError on a file of another scale, or a damaged one.
    """

    def __init__(self, folder: Path, scale: str, names: Iterable[str]):
        self.folder, self.scale = folder, scale
        self.paths = [folder / f"{name}.json" for name in names]
        self.records()

    def records(self) -> dict[str, dict]:
        """The records of all files, by key."""
        found = {}
        for path in self.paths:
            if path.exists():
                found |= self._read(path)["jobs"]
        return found

    def keep(self, study: Study, records: dict[str, dict]) -> dict[str, Any]:
        """Write to the study's file what `records` and the other files hold of its jobs, and give it back."""
        with self._locked():
            known = self.records() | records
            jobs = {job.key: job for last in study.jobs() for job in last.chain}
            content = {
                "study": study.name,
                "question": study.question,
                "scale": self.scale,
                "arms": {arm.name: {str(s): job.key for s, job in arm.jobs.items()} for arm in study.arms},
                "jobs": {key: known[key] for key in jobs if key in known},
            }
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / f"{study.name}.json", _a_line_each(content).encode())
        return content

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise InputError(f"{path} is not JSON: {error}; remove it, or give another --out") from None
        if (
            not isinstance(content, dict)
            or not isinstance(content.get("jobs"), dict)
            or "scale" not in content
        ):
            raise InputError(f"{path} is not the file of a study; remove it, or give another --out")
        if content["scale"] != self.scale:
            raise InputError(f"{path} is of --scale {content['scale']}, not {self.scale}; give another --out")
        return content


def _a_line_each(content: dict[str, Any]) -> str:
    """JSON with an arm and a job on a line of its own, so that a reader and a diff see them apart."""

    def text(value: Any) -> str:
        if not isinstance(value, dict):
            return json.dumps(value)
        return "{\n  " + ",\n  ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n }"

    return "{\n " + ",\n ".join(f"{json.dumps(k)}: {text(v)}" for k, v in content.items()) + "\n}\n"
