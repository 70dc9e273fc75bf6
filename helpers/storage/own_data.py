"""A reader's own pictures: checked before anything is trained, and dealt out to the splits.

<profile.data>/annotations/captions_{train,dev,val}.json, as COCO writes them, with the pictures
where they are: nothing in the reader's own folder is ever written, moved or fetched.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from pathlib import Path

from helpers.storage.caption_files import refuse_unknown_words, some
from helpers.storage.caption_tables import read_table
from helpers.storage.files import replace_when_complete
from helpers.storage.images import broken

FEWEST, SMALLEST = 40, 8  # pictures in all and in a split
SIZES = {"val": (5, 1000), "dev": (10, 500)}  # one of so many pictures, and at most
# What a column `split` may say. "val" is what is reported, unless there is a test set for that.
SPLITS = {"test": "val", "dev": "dev", "val": "val", "valid": "val", "validation": "val"}
SKIP = "Mend these, or leave them out: get_profile(…, skip_faults=True), or CLIP_SKIP_FAULTS=1."


def prepare(profile, text_tower) -> bool:
    """Check `profile.source` and write its splits; False where it is as it was the last time.

    text_tower(): the tower that has to know the captions' words. Raises as it and `usable` do.
    """
    table, without_caption = read_table(profile.source, profile.columns)
    sizes = [path.stat().st_size for path in table["path"].dropna().unique()]
    state = json.dumps([table.to_csv(), sizes, without_caption, profile.skip_faults])
    stamp = hashlib.sha256(state.encode()).hexdigest()
    marker = Path(profile.data, "stamp")
    if marker.is_file() and marker.read_text() == stamp:
        return False
    good = usable(profile, table, without_caption, text_tower())
    with replace_when_complete(profile.data) as folder:
        write_splits(folder / "annotations", good, profile.shared_captions)
        (folder / "stamp").write_text(stamp)
    return True


def usable(profile, table, without_caption: list[str], text_tower):
    """The rows of `read_table` with a whole picture and a caption.

    Raises ValueError with all that is wrong at once: how many of each kind, and the first three.
    """
    missing, empty = table["path"].isna(), table["caption"] == ""
    unreadable = table["path"].isin(broken(sorted(set(table["path"].dropna()))))
    faults = {
        "pictures without caption": without_caption,
        "captions without picture": list(table["image"][missing]),
        "broken pictures": sorted(set(table["image"][unreadable])),
        "empty captions": list(table["image"][empty & ~missing]),
    }
    good = table[~missing & ~empty & ~unreadable]
    report = [f"{what}: {len(names)} ({some(names)})" for what, names in faults.items() if names]
    for line in report if profile.skip_faults else []:
        print(f"Left out: {line}")
    report = [] if profile.skip_faults or not report else [*report, SKIP]
    count = good["path"].nunique()
    if count < FEWEST:
        report.append(f"{count} pictures can be used; the course needs {FEWEST} or more.")
    try:
        if count:
            refuse_unknown_words(text_tower, list(good["caption"]))
    except ValueError as error:
        report.append(str(error))
    if report:
        raise ValueError("\n".join([f"{profile.source} cannot be used as it is.", *report]))
    return good


def write_splits(folder: Path, table, distinct: bool) -> None:
    """COCO's captions files of the table's splits; pictures are numbered by their names.

    distinct: in dev and val no two pictures share a caption.
    """
    folder.mkdir(parents=True)
    captions = table.groupby("path")["caption"].unique()
    number = {path: i for i, path in enumerate(captions.index, 1)}
    said = table.groupby("path")["split"].first().to_dict()
    splits = dealt(said, captions if distinct else None)
    smallest = min(splits, key=lambda split: len(splits[split]))
    if len(splits[smallest]) < SMALLEST:
        raise ValueError(
            f"Only {len(splits[smallest])} pictures would be left for {smallest}, where "
            f"{SMALLEST} are needed: add some{', with captions of their own' if distinct else ''}."
        )
    for split, paths in splits.items():
        notes = [(number[path], caption) for path in paths for caption in captions[path]]
        annotations = [
            {"id": i, "image_id": image_id, "caption": caption}
            for i, (image_id, caption) in enumerate(notes, 1)
        ]
        images = [{"id": number[path], "file_name": str(path)} for path in paths]
        (folder.parent / split).mkdir()  # as in COCO; the pictures stay where they are
        text = json.dumps({"images": images, "annotations": annotations}, ensure_ascii=False)
        (folder / f"captions_{split}.json").write_text(text, encoding="utf-8")


def dealt(said: dict[Path, str], captions=None) -> dict[str, list[Path]]:
    """The pictures of each split: as their table says, the others by a hash of the file's name.

    Pictures with equal bytes go to one split. With captions, by path, dev and val are drawn so that
    no two pictures there share one.
    """
    said = {path: split.lower() for path, split in said.items()}
    names = SPLITS | ({"val": "dev", "validation": "dev"} if "test" in said.values() else {})
    splits, left = {"train": [], "dev": [], "val": []}, []
    for twins in sorted(equal_files(said), key=hashed):
        split = names.get(said[twins[0]], "train")
        pile = left if split == "train" else splits[split]
        pile.append(twins)
    for split, (share, most) in SIZES.items():
        wanted = min(most, max(SMALLEST, len(said) // share)) if not splits[split] else 0
        pool, left, used = left, [], set()
        for twins in pool:
            texts = [] if captions is None else [text for path in twins for text in captions[path]]
            alike = len(set(texts)) < len(texts) or not used.isdisjoint(texts)
            if alike or sum(map(len, splits[split])) >= wanted:
                left.append(twins)
            else:
                splits[split].append(twins)
                used.update(texts)
    splits["train"] = left
    return {split: [path for twins in piles for path in twins] for split, piles in splits.items()}


def hashed(twins: list[Path]) -> str:
    """A random order that stays when the folder moves or grows."""
    return hashlib.sha256(twins[0].name.encode()).hexdigest()


def equal_files(paths) -> list[list[Path]]:
    """The files, those of equal bytes together; read are only those of equal size."""
    by_size, groups = defaultdict(list), defaultdict(list)
    for path in sorted(paths):
        by_size[path.stat().st_size].append(path)
    for same in by_size.values():
        for path in same:
            alike = hashlib.sha256(path.read_bytes()).digest() if len(same) > 1 else path
            groups[alike].append(path)
    return list(groups.values())
