"""A genotype in a text, as programs of this kind print it: found and read without running any of it.

    Genotype(normal=[('bin_conv_3x3', 1), ...], normal_concat=range(2, 6), reduce=[...], reduce_concat=[2])
    {"normal": [["bin_conv_3x3", 1], ...], "normal_concat": [2, 3, 4, 5], ...}
    normal bin_conv_3x3 0, max_pool_3x3 1 | ...      this program's own log: the cell `normal`,
    reduce bin_conv_5x5 0, bin_conv_5x5 1 | ...      and on the next line the cell `reduce`

Quotes may be of any kind or missing. Spaces, line breaks and a log's time stamp before a line do not matter.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from utils import InputError, one_line

FIELDS = ("normal", "normal_concat", "reduce", "reduce_concat")

QUOTES = "'\"`\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}" + (
    "\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}"
)
TOKEN = re.compile(
    rf"\s*(?:#[^\n]*\s*)*(?:[{QUOTES}](?P<string>[^{QUOTES}\n]*)[{QUOTES}]"
    r"|(?P<number>-?\d+(?:\.\d+)?)|(?P<name>[A-Za-z_][\w.]*)|(?P<mark>\S))"
)

LOG_PREFIX = re.compile(
    r"^[ \t]*[\[(]?\d+[-/:]\d\S*(?:[ \t]+\d+:\d\S*)?(?:[ \t]+[AP]M)?[\])]?"  # 12/01 05:19:09 PM
    r"(?:[ \t]*[-|:]?[ \t]*\[?(?:DEBUG|INFO|WARNING|ERROR)\]?)?[ \t]*[-|:]?[ \t]*",
    re.MULTILINE,
)

NAME = rf"[{QUOTES}]?\b(?:normal|reduce)(?:_concat)?\b[{QUOTES}]?\s*[=:]\s*[\w\[(]"
START = re.compile(
    rf"Genotype\w*\s*\(\s*(?={NAME}|[\[(])"  # with names, or in the order of FIELDS
    rf"|(?={NAME.replace('(?:normal|reduce)(?:_concat)?', 'normal')})"
)

PAIR = r"[A-Za-z_]\w*[ \t]+\d+"
CELL = rf"{PAIR}(?:\s*[,|]\s*{PAIR})*"
DESCRIBED = re.compile(rf"\bnormal[ \t]+(?P<normal>{CELL})\s+reduce[ \t]+(?P<reduce>{CELL})")

DEEPEST = 6
"""How deep brackets may be nested: a genotype's are three deep."""

LONGEST_RANGE = 1000

CUT = "is cut short: the text ends within it"


def find_genotype(text: str) -> tuple[dict[str, Any], int] | None:
    """The fields of the last genotype in `text`, unchecked, and the line on which it begins, from 1; None
    where there is none.

    Raises InputError, with the line, where the last one is cut short or cannot be read.
    """
    text = LOG_PREFIX.sub("", text).replace("\\'", "'").replace('\\"', '"')
    last: tuple[int, dict[str, Any] | InputError] | None = None
    end = 0
    for match in START.finditer(text):
        if match.start() < end:  # within the one before: `normal=` that stands second
            continue
        reader = _Reader(text, match.end())
        try:
            last, end = (match.start(), reader.fields()), reader.position
        except InputError as error:
            last = (match.start(), error)
    for match in DESCRIBED.finditer(text):
        if last is None or match.start() > last[0]:
            last = (match.start(), _described(match))
    if last is None:
        return None
    start, found = last
    line = text.count("\n", 0, start) + 1
    if isinstance(found, InputError):
        raise InputError(f"the genotype on line {line} {found}")
    return found, line


def _described(match: re.Match) -> dict[str, Any]:
    """The fields of what `genotypes.describe` prints: all nodes are concatenated."""
    fields: dict[str, Any] = {}
    for kind in ("normal", "reduce"):
        pairs = [pair.split() for pair in re.split(r"[,|]", match[kind])]
        fields[kind] = [(operation, int(source)) for operation, source in pairs]
        fields[f"{kind}_concat"] = (2, 3, 4, 5)
    return fields


class _Reader:
    """Reads values from `position` of a text on. Raises InputError at what does not belong there."""

    def __init__(self, text: str, position: int):
        self.text, self.position = text, position

    def next(self) -> re.Match | None:
        return TOKEN.match(self.text, self.position)

    def take(self) -> re.Match:
        token = self.next()
        if token is None:
            raise InputError(CUT)
        self.position = token.end()
        return token

    def takes(self, marks: str) -> bool:
        """Whether one of `marks` comes next; it is then read."""
        token = self.next()
        if token is None or token["mark"] is None or token["mark"] not in marks:
            return False
        self.position = token.end()
        return True

    def fields(self) -> dict[str, Any]:
        """`normal=VALUE, normal_concat=VALUE, ...` in any order, or the values alone in the order of FIELDS,
        up to the last field or to what is none."""
        fields: dict[str, Any] = {}
        while len(fields) < len(FIELDS):
            token = self.next()
            name = token and (token["string"] or token["name"])
            is_call = name and re.match(r"\s*\(", self.text[token.end() : token.end() + 80])
            if name in FIELDS:
                self.take()
                if not self.takes("=:"):
                    raise self.wrong("= after the name of a field")
            elif is_call or (token and token["mark"] in ("[", "(")):
                name = FIELDS[len(fields)]
            else:
                if token is None or not self.text[token.end() :].strip():
                    raise InputError(CUT)
                break
            fields[name] = self.value()
            if not self.takes(","):
                if not self.takes(")}"):
                    raise self.wrong("a comma or the end")
                break
        return fields

    def value(self, depth: int = 0) -> Any:
        token = self.take()
        if token["string"] is not None:
            return token["string"]
        if token["number"] is not None:
            return float(token["number"]) if "." in token["number"] else int(token["number"])
        if token["name"] is not None:
            if not self.takes("("):
                return token["name"]  # a word whose quotes a shell has taken
            return self.call(token["name"], self.items(depth))
        if token["mark"] in ("[", "("):
            return self.items(depth)
        raise self.wrong("a value", token)

    def items(self, depth: int) -> tuple[Any, ...]:
        """The items between an opening bracket and its closing one."""
        if depth > DEEPEST:
            raise InputError("is nested too deeply")
        items = []
        while not self.takes(")]"):
            items.append(self.value(depth + 1))
            if not self.takes(","):
                if not self.takes(")]"):
                    raise self.wrong("a comma or a closing bracket")
                break
        return tuple(items)

    def call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """`range(2, 6)`, `list(range(2, 6))`, `np.int64(2)`: the numbers that they stand for."""
        if name != "range":
            return arguments[0] if len(arguments) == 1 else arguments
        whole = all(type(argument) is int for argument in arguments)
        if not whole or not 1 <= len(arguments) <= 3 or arguments[2:] == (0,):
            raise InputError(f"has range{arguments}, which is none")
        numbers = range(*arguments)
        if len(numbers) > LONGEST_RANGE:
            raise InputError(f"has range{arguments}, which is too long")
        return tuple(numbers)

    def wrong(self, expected: str, token: re.Match | None = None) -> InputError:
        token = token or self.next()
        if token is None:
            return InputError(CUT)
        return InputError(f"has {one_line(token[0], 30)} where {expected} must stand")


def looks_like_genotype(text: str) -> bool:
    """Whether `text` is meant as a genotype rather than as a name or a path."""
    return bool(START.search(text) or DESCRIBED.search(text) or re.search(r"Genotype\w*\s*\(", text))


def read_text(path: Path) -> str:
    """A text file, with a byte order mark or without: UTF-8, or UTF-16 as PowerShell's `>` writes it."""
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    return content.decode(encoding, "replace")
