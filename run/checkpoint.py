"""Checkpoints: written atomically, with all that an exact continuation needs; read without pickled code, and
checked in full before anything is built from them.

A checkpoint is a dictionary: `format`, `script`, `kind` (one of KINDS), `args`, `config` (of the
network), `data` (set, classes, mean, std, image size), `model`, `state` (optimisers, schedule, scaler),
`random` (of every process), `epoch` and `step` (the next ones to run), `sums`, `best`, `finished`, and, of
several processes within an epoch, `buffers` (the BN statistics of each). Of a run with --ema `model` is the
average, and `state` has the `live` network, which goes on training.
"""

from __future__ import annotations

import io
import math
import random
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model import build_model, float_buffers
from model_search import SearchConfig, Supernet
from networks.registry import Config, config_from_dict
from run.distributed import World
from utils import WINDOWS, InputError, RunFailed, one_line, write_atomically

FORMAT = "ebnas-checkpoint-1"
LAST, BEST = "last.pt", "best.pt"
KINDS = ("search", "stage1", "stage2", "single")  # of what trains in one stage
LIVE = "live"


class Checkpointer:
    """Writes a run's checkpoints. `header` holds the fixed entries, `stateful` what has a state_dict."""

    def __init__(
        self,
        folder: Path | None,
        *,
        header: dict[str, Any],
        model: nn.Module,
        stateful: dict[str, Any],
        world: World,
    ):
        self.folder, self.header, self.world = folder, header, world
        self.model, self.stateful = model, stateful

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The network and, with --ema, the live one, by what precedes the names of their statistics."""
        live = {f"{LIVE}.": self.stateful[LIVE]} if LIVE in self.stateful else {}
        return {"": self.model, **live}

    def _statistics(self) -> dict[str, Tensor]:
        return {
            prefix + name: buffer
            for prefix, network in self.networks.items()
            for name, buffer in float_buffers(network).items()
        }

    def save(
        self,
        *,
        epoch: int,
        step: int = 0,
        sums: list[float] | None = None,
        best: dict | None = None,
        is_best: bool = False,
        finished: bool = False,
    ) -> None:
        """Replace last.pt, and best.pt where `is_best`. Called on every process; the main one writes.

        Raises RunFailed, and leaves the files as they are, where a parameter or a statistic is not finite.
        """
        model = self.model.state_dict()
        # what is not finite here, perhaps in this process's own BN statistics alone, ends the run everywhere
        mine = random_state(self.world.device), not_finite(model)
        states, names = zip(*self.world.gather(mine), strict=True)
        if name := next(filter(None, names), None):
            raise RunFailed(f"{name} is not finite at epoch {epoch}, step {step}; lower the learning rate")
        buffers = None
        if self.world.size > 1 and step:
            buffers = self.world.gather({name: buffer.cpu() for name, buffer in self._statistics().items()})
        if self.folder is None:
            return
        content = {
            "format": FORMAT,
            **self.header,
            "model": model,
            "state": {name: thing.state_dict() for name, thing in self.stateful.items()},
            "random": list(states),
            "epoch": epoch,
            "step": step,
            "sums": sums,
            "best": best,
            "finished": finished,
            **({"buffers": buffers} if buffers else {}),
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        for name in (BEST, LAST) if is_best else (LAST,):  # a last.pt never names a best.pt that is not there
            write_atomically(self.folder / name, buffer.getvalue())

    def restore(self, checkpoint: dict) -> None:
        """Put back the model, the optimisers and their kin, and this process's random states.

        Raises InputError where the network or a state does not fit what this run has.
        """
        if network_config(checkpoint).to_dict() != self.header["config"]:
            raise InputError(
                "the checkpoint's network is not the one that its flags ask for; use an earlier one"
            )
        for name, thing in self.stateful.items():
            check_state(thing, checkpoint["state"].get(name), f"state.{name}")
        self.model.load_state_dict(checkpoint["model"])
        for name, thing in self.stateful.items():
            thing.load_state_dict(checkpoint["state"][name])
        # of another number of processes, the streams are others too, and the statistics are the main one's
        if len(checkpoint["random"]) == self.world.size:
            set_random_state(checkpoint["random"][self.world.rank], self.world.device)
            ours = self._statistics()
            for name, value in checkpoint.get("buffers", [{}] * self.world.size)[self.world.rank].items():
                ours[name].copy_(value)


def not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of a floating-point tensor that holds NaN or infinity."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    finite = torch.stack([tensor.isfinite().all() for tensor in floats.values()]).tolist()
    return next((name for name, fine in zip(floats, finite, strict=True) if not fine), None)


# Random states


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
    random.setstate(_python_state(state))
    np.random.set_state(_numpy_state(state))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def _python_state(state: dict) -> tuple:
    version, keys, gauss = state["python"]
    return version, tuple(keys), gauss


def _numpy_state(state: dict) -> tuple:
    algorithm, keys, position, has_gauss, gauss = state["numpy"]
    return algorithm, np.array(keys, dtype=np.uint32), position, has_gauss, gauss


# Reading


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
    if path.suffix == ".ebnas":
        raise InputError(f"{path} is a packed network, no checkpoint; infer.py and benchmark.py infer run it")
    return path


def load_checkpoint(path: str | Path, prefer: str = LAST) -> dict:
    """Read a checkpoint, tensors on the CPU: mapped from the file, but on Windows, which would then refuse to
    replace it.

    Raises InputError: missing, truncated or damaged, of another program, or with an entry that is not what
    this program writes.
    """
    path = resolve_checkpoint(path, prefer)
    content = read_file(path)
    if not is_own(content):
        raise InputError(f"{path} is a checkpoint of another program or version, not {FORMAT}")
    return checked(path, content)


def read_file(path: Path) -> Any:
    """What torch.save wrote into a file, plain values and tensors only, mapped from it on the CPU; also in
    the format of before torch 1.6, which other programs' files may have.

    Raises InputError where it is truncated or damaged, or holds code.
    """
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip and (damaged := zipfile.ZipFile(path).testzip()):  # torch.load skips the checksums
            raise ValueError(f"checksum of {damaged}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle's protocol, where it is no checkpoint
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip and not WINDOWS)
    except Exception as error:  # torch.load raises a dozen kinds on a damaged or foreign file
        # of what torch says, nothing on its own flags: `you have two options, do those steps only if you t`
        reason = "it holds code" if "weights_only" in str(error) else one_line(error, 100)
        raise InputError(f"{path} is truncated or is no checkpoint ({reason}); use an earlier one") from None


def is_own(content: Any) -> bool:
    """Whether what a file holds says that this program wrote it."""
    return isinstance(content, dict) and content.get("format") == FORMAT


def checked(path: Path, checkpoint: dict) -> dict:
    """`checkpoint`, of the file `path`. Raises InputError where an entry is not what this program writes."""
    try:
        _check_entries(checkpoint)
        _check_model(checkpoint)
    except InputError as error:
        raise InputError(f"{path} is damaged: {error}; use an earlier one") from None
    return checkpoint


def network_config(checkpoint: dict) -> Config | SearchConfig:
    """The configuration of a checkpoint's network."""
    build = SearchConfig.from_dict if checkpoint["kind"] == "search" else config_from_dict
    return build(checkpoint["config"])


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _has_names(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_name, value))


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _are_numbers(value: Any, count: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == count and all(map(_is_number, value))


def _is_best(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and _is_count(value.get("epoch")) and _is_number(value.get("score"))
    )


def _are_random_states(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    for state in value:
        try:  # what its generator takes is a state
            random.Random().setstate(_python_state(state))
            np.random.RandomState().set_state(_numpy_state(state))
            torch.Generator().set_state(state["torch"])
        except Exception:  # and says so in as many ways as there are wrong ones
            return False
        if not isinstance(state.get("cuda", ""), Tensor | None):
            return False
    return True


def _is_data(value: Any) -> bool:
    classes = value.get("classes") if isinstance(value, dict) else None
    return (
        isinstance(classes, list)
        and bool(classes)
        and all(map(_is_name, (*classes, value.get("set"), value.get("root"))))
        and type(value.get("image_size")) is int
        and value["image_size"] > 0
        and all(_are_numbers(value.get(name), 3) for name in ("mean", "std"))
        and min(value["std"]) > 0
        and ("value_range" not in value or _are_numbers(value["value_range"], 2))
        and isinstance(tested := value.get("test_files", []), list)
        and all(map(_is_name, tested))
    )


ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "script": (_is_name, "the name of a script"),
    "kind": (lambda value: value in KINDS, "search, stage1, stage2 or single"),
    "args": (_has_names, "flags by name"),
    "config": (lambda value: isinstance(value, dict), "the configuration of a network"),
    "data": (_is_data, "set, root, image_size, classes, mean and std"),
    "model": (_has_names, "tensors by name"),
    "state": (_has_names, "states by name"),
    "random": (_are_random_states, "random states of each process"),
    "epoch": (_is_count, "a whole number"),
    "step": (_is_count, "a whole number"),
    "sums": (lambda value: value is None or _are_numbers(value, 4), "four numbers, or none"),
    "best": (_is_best, "an epoch and its score, or none"),
    "finished": (lambda value: type(value) is bool, "true or false"),
}
"""What each entry must be: a test, and its words."""


def _check_entries(checkpoint: dict) -> None:
    for name, (fits, words) in ENTRIES.items():
        if name not in checkpoint:
            raise InputError(f"its entry {name!r} is missing")
        if not fits(checkpoint[name]):
            raise InputError(f"its entry {name!r} is not {words}")


def _check_model(checkpoint: dict) -> None:
    """Raise InputError unless the weights fit the configured network: names, shapes, types, finite values."""
    try:
        config = network_config(checkpoint)
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"its entry 'config' makes no network ({one_line(error, 80)})") from None
    if config.num_classes != len(checkpoint["data"]["classes"]):
        raise InputError(
            f"its network has {config.num_classes} classes, its data {len(checkpoint['data']['classes'])}"
        )
    # said before a network of a thousand cells is made to be compared
    cells = {name.split(".")[1] for name in checkpoint["model"] if name.startswith("cells.")}
    wanted = getattr(config, "layers", 0)  # a ResNet18 has none
    if len(cells) != wanted:
        raise InputError(f"its network has {wanted} cells, its entry 'model' {len(cells)}")
    with torch.device("meta"):  # shapes only
        expected = build_network(config).state_dict()
    statistics = {name: like for name, like in expected.items() if "running_" in name}
    parts = {"model": (checkpoint["model"], expected)}
    if LIVE in checkpoint["state"]:
        parts[f"state.{LIVE}"] = (checkpoint["state"][LIVE], expected)
        statistics |= {f"{LIVE}.{name}": like for name, like in statistics.items()}
    buffers = checkpoint.get("buffers")
    if buffers is not None:
        if not isinstance(buffers, list) or len(buffers) != len(checkpoint["random"]):
            raise InputError("its entry 'buffers' is not BN statistics of each process")
        parts |= {f"buffers[{rank}]": (part, statistics) for rank, part in enumerate(buffers)}
    for part, (tensors, wanted) in parts.items():
        if not isinstance(tensors, dict) or set(tensors) != set(wanted):
            odd = sorted(set(wanted).symmetric_difference(tensors if isinstance(tensors, dict) else ()))
            raise InputError(f"its entry {part!r} lacks, or should not have, {', '.join(map(str, odd[:3]))}")
        for name, tensor in tensors.items():
            check_tensor(tensor, wanted[name], f"{part}.{name}")


def build_network(config: Config | SearchConfig) -> nn.Module:
    return Supernet(config) if isinstance(config, SearchConfig) else build_model(config)


def check_tensor(tensor: Any, like: Tensor, name: str) -> None:
    """Raise InputError where `tensor` is not one of the shape and type of `like`, finite throughout."""
    if not isinstance(tensor, Tensor) or (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
        have = (
            f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        )
        raise InputError(f"{name} is {have}, not {like.dtype} {tuple(like.shape)}")
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise InputError(f"{name} is not finite: the training of this network has diverged")


STATE_KEYS = {
    word
    for names in (
        "state param_groups params lr betas eps momentum weight_decay",  # of Adam and SGD
        "last_epoch _last_lr _schedulers",  # of schedules
        "scale growth_factor backoff_factor growth_interval _growth_tracker",  # of GradScaler
    )
    for word in names.split()
}
"""What a state must hold to be put back, in every version of torch; others save a key more or less."""


def check_state(thing: Any, state: Any, name: str) -> None:
    """Raise InputError where `state` is none that `thing`, an optimiser, a schedule or a scaler, would save.

    An optimiser takes moments of any shape, and then reads past their end.
    """
    what = f"the checkpoint's {name}"
    if not _alike(thing.state_dict(), state):
        raise InputError(f"{what} is not that of this run's {type(thing).__name__}")
    if not isinstance(thing, torch.optim.Optimizer):
        return
    parameters = [parameter.detach() for group in thing.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    if numbers != list(range(len(parameters))) or not set(state["state"]) <= set(numbers):
        raise InputError(f"{what} is of other parameters")
    for number, moments in state["state"].items():
        moments = moments if isinstance(moments, dict) else {}
        is_sgd = isinstance(thing, torch.optim.SGD)
        if not is_sgd:
            check_tensor(moments.get("step"), torch.zeros(()), f"{what}.{number}.step")
        for key in ("momentum_buffer",) if is_sgd else ("exp_avg", "exp_avg_sq"):
            check_tensor(moments.get(key), parameters[number], f"{what}.{number}.{key}")


def _alike(ours: Any, theirs: Any) -> bool:
    """Whether two states have the same structure, in STATE_KEYS and what else both have, and numbers for
    numbers."""
    if _is_number(ours):
        return _is_number(theirs)
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, dict):
        # the moments of an optimiser are there only once it has taken a step
        return ours.keys() & STATE_KEYS <= theirs.keys() and all(
            _alike(ours[key], theirs[key]) for key in ours.keys() & theirs.keys()
        )
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(_alike, ours, theirs))
    return True
