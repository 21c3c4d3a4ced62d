"""Cut the shipped training text out of WikiText-2's tokenised train split.

    python pipeline/assets/make_train_part.py wiki.train.tokens.xz pipeline/assets/wikitext-2/train.txt

The tokenised split has rare words replaced by `<unk>`, which the raw evaluation text never holds: a
model fine-tuned on it would learn to waste probability there. So only runs of at least two whole
sentences without `<unk>` are kept, each as a paragraph; headings stay. Articles are taken in file
order until the size is reached.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from pipeline.reading import read_text

SIZE = 4_000_000
UNKNOWN = "<unk>"


def clean_rows(line: str) -> Iterator[str]:
    """The paragraphs that are left of one line."""
    if line.lstrip().startswith("= ") or not line.strip():
        if UNKNOWN not in line:
            yield line
        return
    run: list[str] = []
    for sentence in [*line.strip().split(" . "), UNKNOWN]:
        if UNKNOWN not in sentence:
            run.append(sentence.removesuffix(" ."))
            continue
        if len(run) >= 2:
            yield f" {' . '.join(run)} . "
        run = []


def main(source: str, target: str) -> None:
    """Write the cleaned part of `source` to `target`."""
    size, rows = 0, []
    for line in read_text(source).removesuffix("\n").split("\n"):
        if size >= SIZE and line.startswith(" = ") and not line.startswith(" = = "):
            break
        for row in clean_rows(line):
            rows.append(row)
            size += len(row.encode()) + 1
    Path(target).write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
