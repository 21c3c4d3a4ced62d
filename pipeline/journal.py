"""How far a preparation of data is: a SQLite file, since no memory would hold the documents of every corpus."""

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from eval.errors import UserError
from pipeline.tokenizing import BAD_ENCODING, EMPTY

STATE = "state.db"
SPLITS = ("train", "val")
KEPT, DUPLICATE = "kept", "duplicates"
FATES = (KEPT, DUPLICATE, EMPTY, BAD_ENCODING)
"""What becomes of documents, each of one."""


@dataclass
class State:
    """How far a preparation is."""

    source: int = 0
    position: Any = None
    """Of the source being read; `None`: at its beginning."""
    kept: int = 0
    inside: str = ""
    """Of a document that is too long for one piece, the digest of its pieces so far."""
    begun: bool = False
    """Whether tokens of it were kept."""
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    complete: bool = False
    """Whether all is read, and no token changes its split any more."""

    @property
    def made(self) -> int:
        """Tokens of all splits."""
        return sum(self.tokens.values())


class Journal:
    """`state.db`: the choices, how far the work is, what became of each source, and the documents seen."""

    def __init__(self, out: Path, choices: dict[str, Any]):
        path = out / STATE
        if not path.exists() and next(out.glob("*.bin"), None):
            raise UserError(f"{out}: holds shards of another origin; give another --out")
        begun: tuple[dict[str, Any], State] | None = None
        try:
            self.database = sqlite3.connect(path)
            self.database.execute("CREATE TABLE IF NOT EXISTS seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
            self.database.execute("CREATE TABLE IF NOT EXISTS state (choices TEXT, state TEXT)")
            columns = ", ".join(f"{fate} INTEGER DEFAULT 0" for fate in FATES)
            self.database.execute(
                f"CREATE TABLE IF NOT EXISTS sources (number INTEGER PRIMARY KEY, chain BLOB DEFAULT x'', {columns})"
            )
            for row in self.database.execute("SELECT choices, state FROM state"):
                begun = json.loads(row[0]), State(**json.loads(row[1]))
        except (sqlite3.DatabaseError, ValueError, TypeError) as error:
            if "disk" in str(error):  # full, or failing
                raise
            damaged(path)
        if begun and begun[0] != choices and not begun[1].made:
            begun = None  # nothing is lost by other choices
            for table in ("seen", "state", "sources"):
                self.database.execute(f"DELETE FROM {table}")
        if begun is None:
            self.state = State()
            self.database.execute("INSERT INTO state VALUES (?, ?)", (json.dumps(choices), ""))
            numbers = ((number,) for number in range(len(choices["inputs"])))
            self.database.executemany("INSERT INTO sources (number) VALUES (?)", numbers)
            self.commit()
        else:
            check_same(choices, begun[0], out)
            self.state = begun[1]

    def is_new(self, digest: bytes) -> bool:
        """Whether a document was not yet seen; it is from now on. Half a sha256 tells documents apart."""
        return self.database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest[:16],)).rowcount == 1

    def count(self, source: int, fate: str) -> None:
        """One more document of a source met this fate."""
        self.database.execute(f"UPDATE sources SET {fate} = {fate} + 1 WHERE number = ?", (source,))

    def chain(self, source: int, digest: bytes) -> None:
        """Hash a source's next document into the hash of those before: what stands for its sha256 if it has none."""
        (before,) = self.database.execute("SELECT chain FROM sources WHERE number = ?", (source,)).fetchone()
        after = hashlib.sha256(before + digest).digest()
        self.database.execute("UPDATE sources SET chain = ? WHERE number = ?", (after, source))

    def outcome(self) -> Iterator[tuple[str, dict[str, int]]]:
        """Of each source its chain in hex and the count of each fate."""
        for chain, *counts in self.database.execute(f"SELECT chain, {', '.join(FATES)} FROM sources ORDER BY number"):
            yield chain.hex(), dict(zip(FATES, counts, strict=True))

    def commit(self) -> None:
        """From here a cut-off work goes on."""
        self.database.execute("UPDATE state SET state = ?", (json.dumps(asdict(self.state)),))
        self.database.commit()

    def close(self) -> None:
        """Drop what was not committed."""
        self.database.close()


def begun_here(path: Path) -> bool:
    """Whether a file is the journal of a preparation, however early that was cut off; others' databases are not."""
    if not path.is_file():
        return False
    try:
        # Not read-only: what a kill left half written could not be rolled back then, nor anything be read.
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.DatabaseError:
        return False
    return tables <= {"seen", "state", "sources"}


def check_same(choices: dict[str, Any], begun: dict[str, Any], out: Path) -> None:
    """Raise `UserError` where the work in `out` was begun with other choices."""
    for key, value in choices.items():
        if key not in begun:
            raise UserError(
                f"{out}: prepared by an earlier version of Headroom, which had no {key}; give another --out, or delete "
                "it (pretrain reads it as it is, if it was finished)"
            )
        if begun[key] != value:
            raise UserError(f"{out}: holds shards made with other {key}; give another --out or delete it")


def damaged(path: Path) -> NoReturn:
    """Raise the `UserError` for a file of a preparation that cannot be read."""
    raise UserError(f"{path}: damaged; delete the folder and prepare it again")
