"""A program laid out in the memory of a microcontroller: what is kept as bits, what shares memory.

packed/kernel.py keeps every buffer of a program as floats, and packs the signs of a 1-bit convolution's
source when it computes the convolution. Here a block of channels is kept as floats only as long as something
reads its values: a residual, a pool, a float convolution or the classifier. When only signs of a block are
left to be read, each reader's signs are packed at once, 1 bit a channel and pixel, and the floats are given
up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from packed.kernel import _OPS, Plan, _CStep, _padded
from packed.program import Program, Step, View

SIGNS = len(_OPS)  # board.c's operation beyond those of binary_cpu.c
_SPLIT = 8  # channels of a float convolution whose results are packed before the next ones are computed


class Block(NamedTuple):
    """Channels `first` to `end` of a buffer, which lie side by side in memory."""

    buffer: int
    first: int
    end: int


@dataclass(eq=False)
class Memory:
    """A part of the arena: `floats` of it, needed from the first to the last of the tasks that use it."""

    name: str
    floats: int
    first: int = -1
    last: int = -1
    offset: int = 0


@dataclass(eq=False)
class Signs(Memory):
    """Byte planes of the signs of a view at one set of thresholds; `slack` as in `struct step`, in bytes."""

    slack: int = 0


@dataclass(eq=False)
class Task:
    """One entry of the table that board.c runs: a step, a part of it, or the packing of signs for it."""

    step: Step
    c_step: _CStep
    first: int = 0  # SIGNS: the bytes (of 8 channels) from first to end
    end: int = 0
    tables: int = 0  # where the arena holds the masks or borders that board.c makes, in floats
    shift: int = 0  # from the views' places to the C step's, see Plan._spread
    uses: dict[str, Memory] = field(default_factory=dict)


class BoardPlan:
    """`tasks`, `memories` and `arena` (bytes) of a program, for images of its own size."""

    def __init__(self, program: Program):
        size = program.image_size
        self.program = _split_convolutions(program)
        weights = [
            {"bias": step.tensors["bias"]} if step.op == "linear" else {} for step in self.program.steps
        ]
        self._plan = Plan(self.program, weights, size, size)
        self._weights = weights
        self.blocks = _blocks(self.program)
        self._floats = {block: self._block_memory(block) for block in self.blocks}
        self.image = self._floats[next(block for block in self.blocks if block.buffer == 0)]
        self.tasks: list[Task] = []
        self._add_tasks()
        self.memories = self._place()
        self.arena = 4 * max(memory.offset + memory.floats for memory in self.memories)
        for task in self.tasks:
            self._set_addresses(task)

    def largest(self, count: int) -> list[Memory]:
        """The largest parts of the arena at the task that needs most at once."""
        at = range(len(self.tasks))
        alive = {i: [m for m in self.memories if m.first <= i <= m.last] for i in at}
        most = max(at, key=lambda i: sum(memory.floats for memory in alive[i]))
        return sorted(alive[most], key=lambda memory: -memory.floats)[:count]

    def _plane(self, buffer: int) -> int:
        _, height, width = self._plan.sizes[buffer]
        return _padded(height * width)

    def _block_memory(self, block: Block) -> Memory:
        names = [step.name or step.op for step in self.program.steps if _writes(step, block)]
        name = names[0] if names else "the image"
        return Memory(f"floats of {name}", (block.end - block.first) * self._plane(block.buffer))

    def _block_of(self, view: View) -> Block:
        return next(block for block in self.blocks if _overlap(view, block))

    def _add_tasks(self) -> None:
        """The tasks in their order. Signs of a block are packed after the last step that needs its floats, or
        before the step that reads the signs, whichever comes first."""
        steps = self.program.steps
        needed = {block: max((i for i, s in enumerate(steps) if _needs(s, block)), default=-1)
                  for block in self.blocks}  # fmt: skip
        early: dict[int, list[tuple]] = {}  # the step after which they are packed: signs, block and reader
        late: dict[int, list[tuple]] = {}
        signs: dict[int, Signs] = {}  # of each 1-bit step
        shared: dict[tuple, tuple[Signs, int]] = {}
        for i, step in enumerate(steps):
            if step.op != "binary":
                continue
            key = (step.source, step.tensors["threshold"].tobytes(), step.stride, step.groups)
            known, reader = shared.get(key, (None, 0))
            if known is None or any(_writes(s, _as_block(step.source)) for s in steps[reader:i]):
                known = Signs(f"signs of {step.name or step.op}'s input", 0)
                for block in (block for block in self.blocks if _overlap(step.source, block)):
                    places, when = (early, needed[block]) if needed[block] < i else (late, i)
                    places.setdefault(when, []).append((known, block, i))
            known.slack = max(known.slack, self._c_step(step)[0].slack)
            signs[i] = known
            shared[key] = known, i
        for i in range(-1, len(steps)):
            for each in late.get(i, []):
                self._pack(*each)
            if i >= 0:
                self._step(i, signs.get(i))
            for each in early.get(i, []):
                self._pack(*each)

    def _c_step(self, step: Step, part: int = 0) -> tuple[_CStep, int]:
        """The C step of a step (or of a part of a shuffle) and the floats of scratch memory that it needs."""
        c_step = _CStep()
        index = next(i for i, each in enumerate(self.program.steps) if each is step)
        scratch, _ = self._plan._fill(c_step, step, self._weights[index])
        if step.shuffle > 1:
            self._plan._spread(c_step, step.shuffle, part)
        return c_step, scratch

    def _pack(self, signs: Signs, block: Block, reader: int) -> None:
        step = self.program.steps[reader]
        c_step, _ = self._c_step(step)
        first = max(block.first, step.source.first) - step.source.first
        end = min(block.end, step.source.first + step.source.channels) - step.source.first
        c_step.op = SIGNS
        task = Task(step, c_step, _byte(first, step), _byte(end, step, up=True))
        self._use(task, source=self._floats[block], signs=signs)

    def _step(self, index: int, signs: Signs | None) -> None:
        step = self.program.steps[index]
        for part in range(step.shuffle):
            c_step, scratch = self._c_step(step, part)
            task = Task(step, c_step)
            tables = _table_floats(c_step)
            uses = {"source": None if step.op == "binary" else step.source}
            uses |= {"residual": step.residual, "target": step.target}
            memories = {name: self._floats[self._block_of(view)] for name, view in uses.items() if view}
            if step.op == "binary":
                memories["signs"] = signs
            elif scratch:
                memories["scratch"] = Memory(f"scratch memory of {step.name or step.op}", scratch)
            if tables:
                memories["tables"] = Memory(f"masks of {step.name or step.op}", tables)
            if step.op == "linear":
                memories["target"] = Memory("logits", _padded(c_step.channels_out))
            self._use(task, **memories)

    def _use(self, task: Task, **memories: Memory) -> None:
        """Append a task; what it uses is needed at that time."""
        for memory in memories.values():
            memory.first = len(self.tasks) if memory.first < 0 else memory.first
            memory.last = len(self.tasks)
        task.uses = memories
        self.tasks.append(task)

    def _place(self) -> list[Memory]:
        """Give every memory its offset: the better of two orders, by time and by size, each first fit."""
        self.image.first = 0
        used = {id(memory): memory for task in self.tasks for memory in task.uses.values()}
        used[id(self.image)] = self.image
        self.image.last = max(self.image.last, 0)
        for memory in used.values():
            if isinstance(memory, Signs):
                memory.floats = self._sign_floats(memory)
        orders = (lambda memory: memory.first, lambda memory: -memory.floats)
        best = min((_first_fit(sorted(used.values(), key=order)) for order in orders), key=lambda fit: fit[0])
        for memory, offset in best[1]:
            memory.offset = offset
        return list(used.values())

    def _sign_floats(self, signs: Signs) -> int:
        c_step = next(task.c_step for task in self.tasks if task.uses.get("signs") is signs)
        per_group = -(-(c_step.channels_in // c_step.groups) // 8)
        plane = _padded(c_step.height_out * c_step.width_out)
        size = c_step.groups * (per_group * c_step.stride**2 * plane + signs.slack) + signs.slack
        whole = _padded(c_step.height_in * c_step.width_in) if c_step.stride == 2 else 0
        return (size + whole) // 4

    def _set_addresses(self, task: Task) -> None:
        """From the plan's addresses, of all buffers as floats, to the board's."""
        c_step, step, uses = task.c_step, task.step, task.uses
        views = {"source": step.source, "residual": step.residual, "target": step.target}
        for name, view in views.items():
            if view is not None and name in uses:
                block = next(block for block in self.blocks if self._floats[block] is uses[name])
                ours = uses[name].offset + (view.first - block.first) * self._plane(view.buffer)
                setattr(c_step, name, getattr(c_step, name) - self._plan._address(view) + ours)
        if "residual" not in uses:
            c_step.residual = -1
        if step.op == "linear":
            c_step.target = uses["target"].offset
        if "signs" in uses:
            c_step.slack = uses["signs"].slack
        if held := uses.get("signs") or uses.get("scratch"):
            c_step.scratch = held.offset
        if "tables" in uses:
            task.tables = uses["tables"].offset


def _split_convolutions(program: Program) -> Program:
    """Float convolutions whose results are read as signs alone, as several of 8 filters: the results of all
    of a stem at once are more than all else."""
    read = [view for step in program.steps for view in _float_reads(step)]
    steps = []
    for step in program.steps:
        packs = (
            step.op == "float"
            and step.groups == 1
            and not any(_overlap(v, _as_block(step.target)) for v in read)
        )
        width = _SPLIT if packs else step.target.channels if step.target else 1
        for first in range(0, step.target.channels if packs else 1, width):
            if not packs:
                steps.append(step)
                continue
            target = View(
                step.target.buffer, step.target.first + first, min(width, step.target.channels - first)
            )
            part = slice(first, first + target.channels)
            tensors = {name: tensor[part] for name, tensor in step.tensors.items()}
            steps.append(dataclasses.replace(step, target=target, tensors=tensors))
    return dataclasses.replace(program, steps=tuple(steps))


def _blocks(program: Program) -> list[Block]:
    """The channels of all buffers in blocks: what a step writes or reads as floats is within one, and where a
    1-bit step reads several, they meet between two of its bytes."""
    views = [View(0, 0, program.buffers[0][0])]
    for step in program.steps:
        views += [*_float_reads(step), *filter(None, [step.target])]
    while True:
        blocks = list(_merged(views))
        unaligned = [
            step.source for step in program.steps if step.op == "binary" and not _aligned(step, blocks)
        ]
        if not unaligned:
            return blocks
        views += unaligned


def _merged(views: list[View]) -> Iterator[Block]:
    block = None
    for view in sorted(views):
        if block and view.buffer == block.buffer and view.first < block.end:
            block = block._replace(end=max(block.end, view.first + view.channels))
            continue
        if block:
            yield block
        block = _as_block(view)
    yield block


def _aligned(step: Step, blocks: list[Block]) -> bool:
    inside = [block for block in blocks if _overlap(step.source, block)]
    per_group = step.source.channels // step.groups
    return all((block.first - step.source.first) % per_group % 8 == 0 for block in inside[1:])


def _byte(channel: int, step: Step, *, up: bool = False) -> int:
    """The byte of a 1-bit step's input, counted over all groups, that holds a channel; `up`: the first
    that begins at or behind it."""
    per_group = step.source.channels // step.groups
    group, within = divmod(channel, per_group)
    return group * -(-per_group // 8) + (-(-within // 8) if up else within // 8)


def _table_floats(c_step: _CStep) -> int:
    """How many floats board.c makes for a step: masks and weight counts of 1 bit, borders of a pool."""
    if c_step.op == _OPS.index("binary"):
        return (c_step.kernel**2 + 2) * _padded(c_step.height_out * c_step.width_out) // 4
    if c_step.op == _OPS.index("pool"):
        return (c_step.kernel + c_step.average) * _padded(c_step.height_in * c_step.width_in)
    return 0


def _first_fit(memories: list[Memory]) -> tuple[int, list[tuple[Memory, int]]]:
    placed: list[tuple[Memory, int]] = []
    for memory in memories:
        offset = 0
        for other, start in sorted(placed, key=lambda each: each[1]):
            meet = other.first <= memory.last and memory.first <= other.last
            if meet and offset + memory.floats > start:
                offset = max(offset, start + other.floats)
        placed.append((memory, offset))
    return max(offset + memory.floats for memory, offset in placed), placed


def _float_reads(step: Step) -> list[View]:
    """The floats that a step reads."""
    return [view for view in (step.residual, None if step.op == "binary" else step.source) if view]


def _writes(step: Step, block: Block) -> bool:
    return step.target is not None and _overlap(step.target, block)


def _needs(step: Step, block: Block) -> bool:
    return _writes(step, block) or any(_overlap(view, block) for view in _float_reads(step))


def _as_block(view: View) -> Block:
    return Block(view.buffer, view.first, view.first + view.channels)


def _overlap(view: View, block: Block) -> bool:
    return view.buffer == block.buffer and view.first < block.end and block.first < view.first + view.channels
