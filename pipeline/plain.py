"""YAML that holds plain data alone: nothing that constructs, points back, repeats a key or goes on without end."""

import re
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 1 << 16
_DEEPEST = 20
_NULL = ("", "~", "null", "Null", "NULL")
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_LONGEST = 40
"""Of a whole number's digits: a longer one stays a word, and is no choice that anybody has."""
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NO_NUMBER = re.compile(r"([-+]?)\.(inf|nan)", re.IGNORECASE)


class _Loader(yaml.SafeLoader):
    """Scanner and parser alone. With `comments` off, one is an error: the text is a value and nothing else."""

    comments = True

    def scan_to_next_token(self) -> None:
        begun = self.pointer
        super().scan_to_next_token()
        if not self.comments and "#" in self.buffer[begun : self.pointer]:
            raise ValueError("holds a comment")


def read(path: Path) -> Any:
    """The data of a file. Raises `ValueError`, in one line, for what is not plain YAML; `OSError` as `open` does."""
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    try:
        return parse(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from error


def parse(text: str, *, comments: bool = True) -> Any:
    """The data of one document: dicts with strings as keys, lists, strings, numbers, booleans, `None`.

    A word is null, a boolean or a decimal number where it looks like one, else a string: dates, octal and base-60
    numbers are nothing special. Raises `ValueError`, in one line, for tags, anchors, keys that are given twice,
    more than `MOST_BYTES`, and what is no YAML.
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f"longer than {MOST_BYTES:,} bytes")
    try:
        loader = _Loader(text)
        loader.comments = comments
        loader.get_event()  # the stream's start
        if loader.check_event(yaml.StreamEndEvent):
            return None
        loader.get_event()
        value = _value(loader, loader.get_event(), 0)
        loader.get_event()
        if not loader.check_event(yaml.StreamEndEvent):
            raise ValueError("holds several documents")
        return value
    except yaml.MarkedYAMLError as error:
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{error.problem}{where}") from error
    except (yaml.YAMLError, OverflowError) as error:
        raise ValueError(str(error).splitlines()[0]) from error


def dump(value: Any) -> str:
    """Plain data as YAML that `parse` reads back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Quotes the words that `parse` would take for something else, too."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if isinstance(_scalar(text), str) else "'"
    ),
)


def _value(loader: _Loader, event: Any, depth: int) -> Any:
    line = event.start_mark.line + 1
    if depth > _DEEPEST:
        raise ValueError(f"nested deeper than {_DEEPEST} levels in line {line}")
    if isinstance(event, yaml.AliasEvent) or event.anchor:
        raise ValueError(f"an anchor or alias in line {line}; write the value out")
    if event.tag:
        raise ValueError(f"a tag in line {line}; give plain values")
    if isinstance(event, yaml.ScalarEvent):
        return _scalar(event.value) if event.implicit[0] else _text(event.value, line)
    if isinstance(event, yaml.SequenceStartEvent):
        items = []
        while not isinstance(event := loader.get_event(), yaml.SequenceEndEvent):
            items.append(_value(loader, event, depth + 1))
        return items
    found: dict[str, Any] = {}
    while not isinstance(event := loader.get_event(), yaml.MappingEndEvent):
        line = event.start_mark.line + 1
        if not isinstance(event, yaml.ScalarEvent) or event.tag or event.anchor:
            raise ValueError(f"a key that is no plain word in line {line}")
        if event.value in found:
            raise ValueError(f"the key {event.value[:60]!r} is given twice, again in line {line}")
        found[_text(event.value, line)] = _value(loader, loader.get_event(), depth + 1)
    return found


def _text(text: str, line: int) -> str:
    """A quoted string, which can spell what no file name and no output can hold."""
    if "\0" in text or (not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)):
        raise ValueError(f"a character that is no text in line {line}")
    return text


def _scalar(word: str) -> Any:
    if word in _NULL:
        return None
    if word in _BOOL:
        return _BOOL[word]
    try:
        if _INT.fullmatch(word):
            return int(word) if len(word) <= _LONGEST else word
        if _FLOAT.fullmatch(word):
            return float(word)
    except ValueError:  # underscores where none may stand
        return word
    if found := _NO_NUMBER.fullmatch(word):
        return float(found[1] + found[2])
    return word
