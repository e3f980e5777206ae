"""Checkpoints: written atomically, with all that an exact continuation needs, and read without pickled code.

A checkpoint is a dictionary: `format`, `script`, `kind` (search, stage1, stage2), `args`, `config` (of the
network), `data` (set, classes, mean, std, image size), `model`, `state` (optimisers, schedule, scaler),
`random` (of every process), `epoch` and `step` (the next ones to run), `sums`, `best`, `finished`.
"""

from __future__ import annotations

import io
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distributed import World
from utils import InputError, write_atomically

FORMAT = "ebnas-checkpoint-1"
ENTRIES = {
    *("script", "kind", "args", "config", "data", "model", "state", "random"),
    *("epoch", "step", "sums", "best", "finished"),
}
LAST, BEST = "last.pt", "best.pt"
LOCATION = (
    *("resume", "device", "gpu", "compile", "workers"),
    *("report_freq", "note", "model_path", "data", "tmp_data_dir"),
)
"""Flags that say where or how a run is made, not what it computes: they may differ when it is resumed."""


class Checkpointer:
    """Writes a run's checkpoints. `header` holds the fixed entries, `stateful` what has a state_dict."""

    def __init__(self, folder: Path | None, *, header: dict, model, stateful: dict[str, Any], world: World):
        self.folder, self.header, self.model, self.stateful, self.world = (
            folder,
            header,
            model,
            stateful,
            world,
        )

    def save(self, *, epoch: int, step: int = 0, sums=None, best=None, is_best=False, finished=False) -> None:
        """Replace last.pt, and best.pt where `is_best`. Called on every process; the main one writes."""
        states = self.world.gather(random_state(self.world.device))
        if self.folder is None:
            return
        content = {
            "format": FORMAT,
            **self.header,
            "model": self.model.state_dict(),
            "state": {name: thing.state_dict() for name, thing in self.stateful.items()},
            "random": states,
            "epoch": epoch,
            "step": step,
            "sums": sums,
            "best": best,
            "finished": finished,
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        for name in (BEST, LAST) if is_best else (LAST,):  # a last.pt never names a best.pt that is not there
            write_atomically(self.folder / name, buffer.getvalue())

    def restore(self, checkpoint: dict) -> None:
        """Put back the model, the optimisers and their kin, and this process's random states."""
        self.model.load_state_dict(checkpoint["model"])
        for name, thing in self.stateful.items():
            thing.load_state_dict(checkpoint["state"][name])
        states = checkpoint["random"]
        if (
            len(states) == self.world.size
        ):  # else the number of processes has changed, and so have the streams
            set_random_state(states[self.world.rank], self.world.device)


def random_state(device: torch.device) -> dict:
    """The random states of Python, NumPy, torch and, on a GPU, CUDA: plain values and tensors only."""
    algorithm, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [algorithm, keys.tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict, device: torch.device) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    algorithm, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def resolve_checkpoint(path: str | Path, prefer: str = LAST) -> Path:
    """The checkpoint file that `path`, a file or a run's folder, stands for. Raises InputError: none."""
    path = Path(path)
    if path.is_dir():
        for name in (prefer, LAST, BEST):
            if (path / name).is_file():
                return path / name
        raise InputError(f"no checkpoint in {path}: a run's folder holds {LAST} after its first epoch")
    if not path.is_file():
        raise InputError(f"no checkpoint {path}: give a checkpoint file or a run's folder")
    return path


def load_checkpoint(path: str | Path, prefer: str = LAST) -> dict:
    """Read a checkpoint, tensors mapped from the file on the CPU.

    Raises InputError: missing, truncated or damaged, or of another program.
    """
    path = resolve_checkpoint(path, prefer)
    try:
        if damaged := zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums
            raise ValueError(f"checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises a dozen kinds on a damaged or foreign file
        reason = str(error).strip().split("\n")[0][:120]
        raise InputError(f"{path} is truncated or is no checkpoint ({reason}); use an earlier one") from None
    if (
        not isinstance(checkpoint, dict)
        or checkpoint.get("format") != FORMAT
        or not set(checkpoint) >= ENTRIES
    ):
        raise InputError(f"{path} is a checkpoint of another program or version, not {FORMAT}")
    return checkpoint


def runs_newest_first(pattern: str) -> list[Path]:
    """The run folders whose name fits `pattern` and that hold a checkpoint, the newest checkpoint first."""
    from logger import RUNS  # here, so that reading a checkpoint does not import it

    folders = [folder for folder in RUNS.glob(pattern) if (folder / LAST).is_file()]
    return sorted(folders, key=lambda folder: (folder / LAST).stat().st_mtime_ns, reverse=True)


def differing_flags(saved: dict, args: dict, names) -> list[str]:
    """`--layers 8, not 16` for each flag of `names` that a checkpoint saved otherwise."""
    return [
        f"--{name} {saved[name]}, not {args[name]}"
        for name in sorted(names)
        if name not in LOCATION and name in saved and saved[name] != args[name]
    ]


def find_resumable(resume: str, *, script: str, args: dict, explicit: set[str], runs: str) -> Path | None:
    """The checkpoint to go on from: of the file or folder `resume`, or for `auto` of the newest unfinished
    run of `runs` (a pattern of folder names) with the same flags, None where there is none.

    Raises InputError: of another script, already finished, or run with other flags than those given.
    """
    if resume == "auto":
        for folder in runs_newest_first(runs):
            try:
                checkpoint = load_checkpoint(folder)
            except InputError:  # a damaged run does not hide an older good one
                continue
            if not checkpoint["finished"] and not differing_flags(checkpoint["args"], args, args):
                return folder / LAST
        return None
    path = resolve_checkpoint(resume)
    if path.name != LAST or not (path.parent / "args.json").is_file():
        raise InputError(f"{path} is not the last checkpoint of a run; --resume takes a run's folder")
    checkpoint = load_checkpoint(path)
    if checkpoint["script"] != script:
        raise InputError(
            f"{path} is a checkpoint of {checkpoint['script']}.py, not of {script}.py: resume it there"
        )
    if checkpoint["finished"]:
        raise InputError(f"{path} is of a finished run; leave --resume out to start another")
    if differing := differing_flags(checkpoint["args"], args, explicit):
        raise InputError(
            f"{path} was run with {', '.join(differing)}: leave these flags out, or start a new run"
        )
    return path
