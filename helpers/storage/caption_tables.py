"""Which captions a reader's own folder holds: a table, COCO's JSON, or a text beside each picture.

A table is CSV, TSV or JSONL, with a row for each caption. Pictures may lie in sub-folders, and be
named from the table's folder or from the whole folder. Nothing here opens a picture.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections import defaultdict
from pathlib import Path

import pandas as pd

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"}
TABLES = {".csv", ".tsv", ".jsonl", ".json"}
COLUMNS = {
    "image": ["image", "file", "filename", "file_name", "path"],
    "caption": ["caption", "text", "title"],
    "split": ["split"],
}
ACCEPTED = (
    "DATA names a CSV, TSV or JSONL of file and caption, COCO's captions JSON, or a folder in "
    "which each picture has a .txt of the same name."
)


def read_table(source: Path, columns: str = "") -> tuple[pd.DataFrame, list[str]]:
    """The captions of a folder or caption file, and the pictures there that no caption names.

    Returns a table of image, path (None where there is no such picture), caption and split, a row
    a caption. columns: "photo,comment", where the columns are not called as in COLUMNS. Raises
    FileNotFoundError or ValueError for what cannot be read as captions.
    """
    file = caption_file(source)
    root = source if source.is_dir() else source.parent
    if root.name == "annotations":  # COCO's: the pictures lie beside it
        root = root.parent
    pictures = [path for path in sorted(root.rglob("*")) if path.suffix.lower() in PICTURES]
    pictures = [path for path in pictures if not is_hidden(path.relative_to(root))]
    listed = [str(path) for path in pictures]
    if file is None:
        table = text_files(pictures)
    else:
        table, of_coco = parsed(file)
        listed = of_coco or listed
    table = with_known_columns(table, columns, file or root)
    find = finder([file.parent if file else root, root], pictures)
    table["path"] = [find(name) for name in table["image"]]
    named = {*table["image"], *map(str, table["path"])}
    return table, [Path(name).name for name in listed if name not in named]


def caption_file(source: Path) -> Path | None:
    """The table that `source` is or holds; None for pictures with texts beside them."""
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist. {ACCEPTED}")
    files = [*sorted(source.glob("*")), *sorted(source.glob("annotations/captions_*"))]
    if not source.is_dir():
        files = [source]
    tables = [path for path in files if path.suffix.lower() in TABLES]
    if not source.is_dir() and not tables:
        raise ValueError(f"{source} cannot be read as captions. {ACCEPTED}")
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables)
        raise ValueError(f"{source} holds several tables, {names}: name one of them as DATA.")
    return tables[0] if tables else None


def is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def text_files(pictures: list[Path]) -> pd.DataFrame:
    """Each picture with the lines of its .txt, a caption a line."""
    rows = []
    for path in pictures:
        text = path.with_suffix(".txt")
        lines = decoded(text).strip().splitlines() or [""] if text.is_file() else []
        rows += [(str(path), line) for line in lines]
    return pd.DataFrame(rows, columns=["image", "caption"])


def parsed(file: Path) -> tuple[pd.DataFrame, list[str]]:
    """The rows of a caption file; and of COCO's the pictures that it lists."""
    text, kind = decoded(file), file.suffix.lower()
    try:
        if kind == ".jsonl":
            return pd.DataFrame([json.loads(line) for line in text.splitlines() if line]), []
        if kind == ".json":
            content = json.loads(text)
            names = {image["id"]: image["file_name"] for image in content["images"]}
            table = pd.DataFrame(content["annotations"])[["image_id", "caption"]]
            table["image"] = [names.get(image_id, str(image_id)) for image_id in table["image_id"]]
            return table, list(names.values())
        head = text.split("\n", 1)[0]
        delimiter = max("\t,;", key=head.count)
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
        too_long = [number for number, row in enumerate(rows, 2) if None in row]
        if too_long:
            raise ValueError(f"row {too_long[0]} has too many cells: put a caption with a "
                             f"{delimiter!r} in quotes")  # fmt: skip
        return pd.DataFrame(rows), []
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be read as captions ({error}). {ACCEPTED}") from None


def decoded(path: Path) -> str:
    """The text of a file in UTF-8 or UTF-16, without its byte order mark."""
    content = path.read_bytes()
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it as UTF-8.") from None


def with_known_columns(table: pd.DataFrame, columns: str, file: Path) -> pd.DataFrame:
    """The columns image, caption and split as stripped text, under these names."""
    wanted = dict(zip(COLUMNS, ([name.strip()] for name in columns.split(",") if name.strip())))
    known = {str(name).strip().lower(): name for name in table}
    result = pd.DataFrame()
    for what, names in (COLUMNS | wanted).items():
        match = [known[name.lower()] for name in names if name.lower() in known]
        if not match and what != "split":
            raise ValueError(
                f"{file} has the columns {', '.join(map(str, table)) or '(none)'}; none is called "
                f"{' or '.join(names)}. Say which are meant, as in "
                'get_profile(PROFILE, data=DATA, columns="photo,comment"), or set CLIP_COLUMNS.'
            )
        column = table[match[0]] if match else pd.Series("", table.index)
        result[what] = column.fillna("").astype(str).str.strip()
    return result


def finder(folders: list[Path], pictures: list[Path]):
    """A function from a picture's name to its path: from one of the folders, or by name alone."""
    by_name = defaultdict(list)
    for path in pictures:
        by_name[path.name.lower()].append(path)
        by_name[path.stem.lower()].append(path)

    def find(name: str) -> Path | None:
        name = name.replace("\\", "/")
        for folder in folders:
            if name and (folder / name).is_file():
                return folder / name
        same = by_name[Path(name).name.lower()]
        return same[0] if len(same) == 1 else None

    return find
