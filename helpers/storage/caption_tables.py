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

PICTURES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".heic", ".tif", ".tiff", ".bmp"}
PICTURES |= {".gif"}  # what of these Pillow does not read, as HEIC, is reported as broken
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
    folders = [file.parent if file else root, root]
    table["path"] = table["image"].map(located(set(table["image"]), folders, pictures))
    named = {*table["image"], *map(str, table["path"])}
    return table, [name.removeprefix(f"{root}/") for name in listed if name not in named]


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
    # Hidden ones are a Mac's; a.json beside a.txt and a.jpg is about that picture alone.
    tables = [path for path in tables if not path.name.startswith(".")]
    tables = [path for path in tables if not path.with_suffix(".txt").is_file()]
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
            lines = [line for line in text.split("\n") if line.strip()]
            return pd.DataFrame([json.loads(line) for line in lines]), []
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
            raise ValueError(
                f"{len(too_long)} rows have too many cells, the first is row {too_long[0]}: put a "
                f"caption with a {delimiter!r} in quotes"
            )
        return pd.DataFrame(rows), []
    except (ValueError, KeyError, TypeError, csv.Error) as error:
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
    """The columns image, caption and split as stripped text, under these names.

    Of a JSONL, a caption may be a list of them.
    """
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
        result[what] = table[match[0]] if match else pd.Series("", table.index)
    result = result.explode("caption", ignore_index=True).fillna("").astype(str)
    return result.apply(lambda column: column.str.strip())


def located(names, folders: list[Path], pictures: list[Path]) -> dict[str, Path | None]:
    """Pictures' names with their paths: from one of the folders, else by the file's name alone.

    A name with a folder does not get a picture that another name has: a/1.jpg is not b/1.jpg.
    """
    found, by_name = {}, defaultdict(list)
    for name in names:
        paths = [folder / name.replace("\\", "/") for folder in folders if name]
        found[name] = next((path for path in paths if path.is_file()), None)
    taken = set(found.values())
    for path in pictures:
        by_name[path.name.lower()].append(path)
        by_name[path.stem.lower()].append(path)
    for name in [name for name, path in found.items() if path is None]:
        folder, _, last = name.replace("\\", "/").rpartition("/")
        same = by_name[last.lower()]
        if len(same) == 1 and not (folder and same[0] in taken):
            found[name] = same[0]
    return found
