"""Caches headers between scans, so that unchanged files are not opened again.

The cache is an SQLite database, keyed by path, size and modification time. Any of it may be lost. If the database
cannot be used, one warning is logged and all headers are read. The description of an image, which it shares with all
images of its series, is stored once, under a hash of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sqlite3
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from gpuprep._version import __version__
from gpuprep.core.formatting import printable
from gpuprep.core.series import Description, Dose, Image, OtherImage, SliceHeader
from gpuprep.dicom.elements import IMAGE_TAGS
from gpuprep.dicom.headers import Contents

log = logging.getLogger(__name__)


class File(NamedTuple):
    """File status from the folder listing, without opening the file."""

    path: str
    bytes: int
    mtime_ns: int
    identity: tuple[int, int]
    """Device and inode: equal for all hard links of a file."""


def default_index() -> Path | None:
    """Return the default path of the index, in the user's cache folder; None without a home folder."""
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # neither HOME nor a passwd entry, as in some containers
        log.warning(
            "there is no home folder, so headers are not kept and every scan reads them all: set XDG_CACHE_HOME to a "
            "folder that can be written, or give --index FILE|none"
        )
        return None
    return Path(cache) / "gpuprep" / "headers.sqlite"


class HeaderIndex:
    """Index of the headers of files, in an SQLite database.

    Parameters
    ----------
    path : path
        The database; it and its folder are created if absent.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._db: sqlite3.Connection | None = None
        self._descriptions: dict[int, Description] = {}
        """Descriptions that have been read from the database, by their hash."""
        self._hashes: dict[Description, int] = {}
        """Hashes of descriptions that have been written into the database."""
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # its descriptions are for nobody else
            self._db = sqlite3.connect(path, timeout=30)
            self._prepare(self._db)
        except (OSError, sqlite3.Error) as exc:
            self._disable(path, exc)
        except BaseException:
            self._close()
            raise

    def _prepare(self, db: sqlite3.Connection) -> None:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        if any(not _OWN_TABLE.fullmatch(name) for name in tables):
            raise sqlite3.DatabaseError("it is a database of another program")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        if former := set(tables) - {_TABLE, _DESCRIPTIONS}:  # written by another version, which reads other attributes
            log.warning("the index of headers is of another version: it is made anew, and every header is read once")
            for name in former:
                db.execute(f'DROP TABLE "{name}"')
        db.execute(
            f"CREATE TABLE IF NOT EXISTS {_TABLE} (folder BLOB, name BLOB, bytes INTEGER, mtime_ns INTEGER, "
            "contents TEXT, PRIMARY KEY (folder, name)) WITHOUT ROWID"
        )
        db.execute(f"CREATE TABLE IF NOT EXISTS {_DESCRIPTIONS} (id INTEGER PRIMARY KEY, description TEXT)")
        db.commit()

    def known(self, folder: str, files: list[File], *, complete: bool) -> dict[str, Contents]:
        """Return the stored contents of unchanged files, by path; if `complete`, delete rows of files that are gone."""
        if self._db is None:
            return {}
        known: dict[str, Contents] = {}
        try:
            rows = self._db.execute(f"{_SELECT} WHERE folder = ?", (os.fsencode(folder),)).fetchall()
            if rows:
                stored = {row[0]: row for row in rows}
                start = len(os.fsencode(os.path.join(folder, "")))  # of the file name within the path
                same = [
                    (file, row[3])
                    for file in files
                    if (row := stored.pop(os.fsencode(file.path)[start:], None)) is not None
                    and (row[1], row[2]) == (file.bytes, file.mtime_ns)
                ]
                texts = ",".join([text for _, text in same])  # parsed in one call, which is faster
                parsed = json.loads(f"[{texts}]")
                self._load_descriptions(self._db, parsed)
                for (file, _), values in zip(same, parsed, strict=True):
                    known[file.path] = self._from_json(values, file)
                if complete and stored:
                    gone = [(os.fsencode(folder), name) for name in stored]
                    self._db.executemany(f"DELETE FROM {_TABLE} WHERE folder = ? AND name = ?", gone)  # noqa: S608
                    self._db.commit()
        except sqlite3.Error as exc:
            self._disable(folder, exc)
        except Exception:  # damaged rows: their files are read again and the rows replaced
            return {}
        return known

    def _load_descriptions(self, db: sqlite3.Connection, parsed: list[Any]) -> None:
        """Load the descriptions of the images of parsed rows."""
        ids = {image[_DESCRIPTION] for values in parsed for image in values[0]}.difference(self._descriptions)
        for hashed in ids:
            (text,) = db.execute(f"SELECT description FROM {_DESCRIPTIONS} WHERE id = ?", (hashed,)).fetchone()  # noqa: S608
            self._descriptions[hashed] = Description._make(json.loads(text))

    def _to_json(self, contents: Contents) -> list[Any]:
        """Return contents in JSON types; the path and modification time of headers are omitted, as `File` has them."""
        images = []
        for image in contents.images:
            values: list[Any] = [*image[:-1], image.header[2:]]
            values[_DESCRIPTION] = self._hashes[image.description]
            images.append(values)
        return [images, contents.passed_over, contents.unreadable, contents.segmentations, contents.others]

    def _from_json(self, values: list[Any], file: File) -> Contents:
        images, passed_over, unreadable, segmentations, others = values
        if unreadable:
            unreadable = [(path, reason) for path, reason in unreadable]
        if others:
            others = [OtherImage(*other) for other in others]
        found = [_image_from_json(v, file, self._descriptions[v[_DESCRIPTION]]) for v in images]
        return Contents(found, passed_over, unreadable, segmentations, others)

    def add(self, files: list[File], contents: list[Contents]) -> None:
        """Store the contents of files."""
        if self._db is None:
            return
        new = {image.description for c in contents for image in c.images}.difference(self._hashes)
        self._hashes.update((description, _hash_of(description)) for description in new)
        described = [(self._hashes[description], json.dumps(description)) for description in new]
        rows = [
            (os.fsencode(folder), os.fsencode(name), f.bytes, f.mtime_ns, json.dumps(self._to_json(c)))
            for f, c in zip(files, contents, strict=True)
            if c.cacheable
            for folder, name in [os.path.split(f.path)]
        ]
        try:
            self._db.executemany(f"INSERT OR REPLACE INTO {_DESCRIPTIONS} VALUES (?, ?)", described)  # noqa: S608
            self._db.executemany(f"INSERT OR REPLACE INTO {_TABLE} VALUES (?, ?, ?, ?, ?)", rows)  # noqa: S608
            self._db.commit()
        except sqlite3.Error as exc:
            self._disable("", exc)

    def close(self) -> None:
        """Commit and close the database."""
        if self._db is not None:
            try:
                self._db.commit()
            except sqlite3.Error as exc:
                self._disable("", exc)
            else:
                self._close()

    def _disable(self, what: object, exc: Exception) -> None:
        text = printable(f"{what}: {exc}")
        log.warning(
            "the index of headers cannot be used (%s), so every header is read: give --index FILE|none, or set "
            "XDG_CACHE_HOME to a folder that can be written",
            text,
        )
        self._close()

    def _close(self) -> None:
        """Close the database, ignoring errors: headers that are not stored are read again at the next scan."""
        db, self._db = self._db, None
        if db is not None:
            with suppress(sqlite3.Error):
                db.close()


_SPACING, _ORIENTATION = Image._fields.index("pixel_spacing_mm"), Image._fields.index("orientation")
_DESCRIPTION, _DOSE = Image._fields.index("description"), Image._fields.index("dose")
_POSITION = SliceHeader._fields.index("position_mm") - 2
_FIELDS = [t._fields for t in (Image, Description, Dose, SliceHeader, OtherImage)] + [
    tuple(f.name for f in fields(Contents))
]
_SCHEMA = (__version__, _FIELDS, sorted(IMAGE_TAGS))
_VERSION = hashlib.sha256(repr(_SCHEMA).encode()).hexdigest()[:12]
_TABLE = f"files_{_VERSION}"
_DESCRIPTIONS = f"descriptions_{_VERSION}"
_OWN_TABLE = re.compile("(files|descriptions)_[0-9a-f]{12}")
_SELECT = f"SELECT name, bytes, mtime_ns, contents FROM {_TABLE}"  # noqa: S608 - a constant


def _hash_of(description: Description) -> int:
    """Return a 63-bit hash of a description."""
    digest = hashlib.blake2b(json.dumps(description).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _image_from_json(values: list[Any], file: File, description: Description) -> Image:
    """Return an image, with the lists of JSON converted back to tuples."""
    values[_DESCRIPTION], values[_DOSE] = description, Dose(*values[_DOSE])
    if (header := values.pop())[_POSITION] is not None:
        header[_POSITION] = tuple(header[_POSITION])
    for n in (_SPACING, _ORIENTATION):
        if values[n] is not None:
            values[n] = tuple(values[n])
    return Image._make((*values, SliceHeader(file.path, file.mtime_ns, *header)))
