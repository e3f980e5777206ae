"""Which run this is: a new one, one that is resumed, or one whose processes torchrun has restarted."""

from __future__ import annotations

import glob
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flags import options
from run.checkpoint import load_checkpoint
from run.distributed import World, launch_name, restarted
from run.runs import find_launched, find_resumable
from utils import InputError

HERE = ("device", "gpu", "resume")
"""Flags of the process, which a run that goes on does not take from its checkpoint."""


@dataclass(frozen=True)
class Origin:
    """Where a run begins: at its first step, or at the checkpoint of `folder` that it goes on from.

    `flags` are the run's own: those of its checkpoint, where the user has not given others. `name` is that of
    a new run's folder. `asked`: whether a run to go on with was looked for.
    """

    script: str
    name: str
    flags: dict[str, Any]
    asked: bool = False
    folder: Path | None = None
    checkpoint: dict | None = None

    def own_images(self, data: dict[str, Any]) -> dict[str, Any]:
        """`data` (see images.describe_data), for a resumed run with its own statistics, whose last bits
        depend on the processor. Raises InputError where it was run on other images."""
        if self.checkpoint is None:
            return data
        saved = self.checkpoint["data"]
        same = {entry: data[entry] == saved[entry] for entry in ("set", "image_size", "classes")}
        same |= {entry: np.allclose(data[entry], saved[entry], rtol=1e-5) for entry in ("mean", "std")}
        if differing := [entry for entry in same if not same[entry]]:
            raise InputError(
                f"{self.folder} was run on other images: not the same {', '.join(differing)}; give its --data"
            )
        return {**data, "mean": saved["mean"], "std": saved["std"]}

    def check_unchanged(self) -> None:
        """Raise InputError where the run has moved on since its checkpoint was read."""
        current = load_checkpoint(self.folder)
        if any(current[entry] != self.checkpoint[entry] for entry in ("epoch", "step", "finished")):
            raise InputError(
                f"{self.folder} has moved on in another process; look at it, then resume it again"
            )


def find_origin(
    flags: Mapping[str, Any],
    given: Collection[str],
    *,
    script: str,
    name: str,
    parser: options.Parser,
    world: World,
) -> Origin:
    """Where the run of these settled `flags` begins, the same on every process. `given`: those of them that
    the user gave.

    Raises InputError: the run that is named cannot be resumed, or was run with other flags than those given.
    """
    path = world.broadcast(_find(flags, given, script=script, name=name) if world.is_main else None)
    asked = flags["resume"] is not None or restarted()
    if path is None:
        return Origin(script, name, dict(flags), asked)
    checkpoint = load_checkpoint(path)
    try:
        parser.check(checkpoint["args"])
    except InputError as error:
        raise InputError(f"{path} is damaged: of its flags, {error}; use an earlier one") from None
    saved = {key: value for key, value in checkpoint["args"].items() if key not in {*given, *HERE}}
    if empty := [key for key, value in saved.items() if value is None and flags.get(key) is not None]:
        raise InputError(f"{path} is damaged: of its flags, --{empty[0]} has no value; use an earlier one")
    return Origin(script, name, {**flags, **saved}, asked, path.parent, checkpoint)


def _find(flags: Mapping[str, Any], given: Collection[str], *, script: str, name: str) -> Path | None:
    runs = f"{glob.escape(name)}-[0-9]*"
    if restarted() and flags["resume"] in (None, "auto"):  # any other names the run, on every start
        return find_launched(launch_name(), runs)
    if flags["resume"] is None:
        return None
    return find_resumable(flags["resume"], script=script, args=dict(flags), given=given, runs=runs)
