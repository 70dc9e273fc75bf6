"""A reader's own pictures: every way to write captions down, and all that can be wrong there."""

import json

import numpy as np
import pytest
from PIL import Image

from helpers import config, load_or_build
from helpers.config import get_profile
from helpers.data import Examples, load_split, visiting_order
from helpers.storage import own_data
from helpers.storage.caption_tables import read_table

WORDS = "dog cat bus tree boat lamp kite cup pear chair".split()


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The course's folder, so that nothing is written into the real one."""
    monkeypatch.setattr(config, "ROOT", tmp_path / "course")
    for name in ("CLIP_DATA", "CLIP_COLUMNS", "CLIP_SKIP_FAULTS", "CLIP_PROFILE", "CLIP_RESULTS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".albums").mkdir()  # what is hidden above the folder is no matter
    return tmp_path / ".albums/photos"


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)
    Image.fromarray(pixels).save(path, **({"format": "JPEG"} if path.suffix == ".JPG" else {}))


def caption(i):
    return f"a {WORDS[i % 10]}, a {WORDS[i // 10]} and an old tree"


def write_pictures(root, count=60):
    """Pictures in the folder and in a sub-folder, of several kinds."""
    kinds = [".jpg", ".JPG", ".png", ".webp", ".tiff"]
    names = [("more/" if i % 7 == 0 else "") + f"img_{i}{kinds[i % 5]}" for i in range(count)]
    for i, name in enumerate(names):
        picture(root / name, seed=i)
    return names


def write_table(root, names, kind, encoding="utf-8"):
    rows = [(name, caption(i)) for i, name in enumerate(names)]
    if kind == "txt":
        for name, text in rows:
            (root / name).with_suffix(".txt").write_text(text, encoding)
            (root / name).with_suffix(".json").write_text("{}")  # as img2dataset leaves it
        return root
    file = root / f"captions.{kind}"
    if kind == "json":  # COCO's, with ids that are strings
        images = [{"id": name.split(".")[0], "file_name": name} for name in names]
        notes = [{"id": i, "image_id": name.split(".")[0], "caption": text}
                 for i, (name, text) in enumerate(rows)]  # fmt: skip
        text = json.dumps({"images": images, "annotations": notes})
    elif kind == "jsonl":
        text = "\n".join(json.dumps({"path": name, "text": text}) for name, text in rows)
    else:
        lines = [("FileName", "Title"), *rows]
        between = {"csv": '"{}","{}"', "tsv": "{}\t{}"}[kind]
        text = "\n".join(between.format(*row) for row in lines)
    file.write_text(text, encoding)
    return file


@pytest.fixture
def names(root):
    """60 pictures in the reader's folder, by name."""
    return write_pictures(root)


def splits_of(profile):
    own_data.prepare(profile, lambda: load_or_build.towers(get_profile("smoke"))[1])
    return {split: load_split(profile, split) for split in ("train", "dev", "val")}


# The first of them in every encoding: one function reads the bytes of all.
WRITTEN = [("csv", "utf-8"), ("csv", "utf-8-sig"), ("csv", "utf-16"), ("txt", "utf-16")]
WRITTEN += [("tsv", "utf-8"), ("jsonl", "utf-8"), ("json", "utf-8")]


@pytest.mark.parametrize("kind, encoding", WRITTEN)
def test_every_way_to_write_captions_down_is_read(root, names, kind, encoding):
    file = write_table(root, names, kind, encoding)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    splits = splits_of(get_profile("smoke", data=str(file)))
    assert {name: len(images) for name, images in splits.items()} == dict(train=40, dev=8, val=12)
    found = {}
    for images in splits.values():
        for i in range(len(images)):
            assert images.image(i).size == (24, 20)
            found[int(images.path(i).stem.split("_")[1])] = images.captions(i)
    assert found == {i: [caption(i)] for i in range(60)}
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_all_that_is_wrong_is_said_at_once_with_counts_and_the_first_three(root, names, capsys):
    for i in range(5):
        (root / names[10 + i]).write_bytes((root / names[10 + i]).read_bytes()[:200])
        picture(root / f"bare_{i}.png")
    rows = [f'{name},"{"" if i in (20, 21) else caption(i)}"' for i, name in enumerate(names)]
    rows += ["gone.jpg,a dog", "lost.jpg,a cat", "img_3.webp,"]
    (root / "captions.csv").write_text("\n".join(["image,comment", *rows]))
    with pytest.raises(ValueError, match=r"columns image, comment.*caption or text or title.*COLU"):
        get_profile("mini", data=str(root))
    profile = get_profile("smoke", data=str(root), columns="image,comment")
    with pytest.raises(ValueError) as error:
        splits_of(profile)
    _, *lines, fix = str(error.value).splitlines()
    assert lines == [
        "pictures without caption: 5 (bare_0.png, bare_1.png, bare_2.png and 2 more)",
        "captions without picture: 2 (gone.jpg, lost.jpg)",
        f"broken pictures: 5 ({', '.join(sorted(names[10:15])[:3])} and 2 more)",
        "empty captions: 3 (img_20.jpg, more/img_21.JPG, img_3.webp)",
    ]
    assert "skip_faults=True" in fix and not profile.data.exists()
    profile = get_profile("smoke", str(root), "image,comment", skip_faults=True)
    assert sum(map(len, splits_of(profile).values())) == 53
    assert capsys.readouterr().out.count("Left out: ") == 4


def test_what_cannot_be_captions_is_refused_with_what_is_accepted(root):
    picture(root / "a.jpg")
    for path, sentence in [("nowhere", "does not exist"), ("a.jpg", "cannot be read")]:
        with pytest.raises((ValueError, FileNotFoundError), match=f"{sentence}.*CSV, TSV or JSONL"):
            get_profile("mini", data=str(root / path))
    write_pictures(root, count=39)
    (root / "a.jpg").unlink()
    write_table(root, [p.name for p in sorted(root.glob("img*"))], "csv")
    with pytest.raises(ValueError, match=r"33 pictures can be used; the course needs 40"):
        splits_of(get_profile("smoke", str(root), skip_faults=True))
    (root / "more.csv").write_text("image,caption\na.jpg,a dog, running\n")
    with pytest.raises(ValueError, match="more.csv cannot be read.*1 rows have .* first is row 2"):
        get_profile("mini", data=str(root / "more.csv"))
    with pytest.raises(ValueError, match=r"several tables, captions.csv, more.csv"):
        get_profile("mini", data=str(root))


def test_where_no_picture_is_found_that_is_said(root):
    names = write_pictures(root)
    write_table(root, [f"gone_{name.split('/')[-1]}" for name in names], "csv")
    with pytest.raises(ValueError, match="captions without picture: 60 .*\n.*\n0 pictures can be"):
        splits_of(get_profile("smoke", data=str(root)))


def test_a_tower_that_is_none_is_not_blamed_on_the_folder(root):
    def refuse():
        raise ValueError("no tower")

    root.mkdir()
    write_table(root, ["a.jpg"], "csv")
    with pytest.raises(ValueError, match="^no tower$"):
        own_data.prepare(get_profile("smoke", data=str(root)), refuse)


def test_a_picture_is_found_by_name_alone_unless_another_caption_names_it(root):
    names = write_pictures(root, count=45)
    picture(root / "spring/twice.jpg")
    rows = [{"path": f"C:\\photos\\{name}", "text": ["a dog", "a\u2028cat"]} for name in names]
    rows += [{"path": f"{season}/twice.jpg", "text": "a bus"} for season in ("spring", "summer")]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (root / "c.jsonl").write_text(lines + "\n\n", "utf-8")
    (root / "._c.jsonl").write_bytes(b"\0")  # what a Mac leaves beside it
    table, bare = read_table(root)
    assert len(table) == 2 * 45 + 2 and not bare and "a\u2028cat" in set(table["caption"])
    assert list(table["image"][table["path"].isna()]) == ["summer/twice.jpg"]


def test_captions_in_another_language_name_a_multilingual_tower(root, names):
    rows = [f"{name},犬が走る {i} 猫" for i, name in enumerate(names)]
    (root / "captions.csv").write_text("\n".join(["image,caption", *rows]), "utf-8")
    with pytest.raises(ValueError, match="lacks .*multilingual text tower in CLIP_TEXT_MODEL"):
        splits_of(get_profile("smoke", data=str(root)))


def test_twins_stay_together_and_a_column_split_is_followed(root, names):
    for i in range(8):
        (root / f"twin_{i}.jpg").write_bytes((root / names[5 * i]).read_bytes())
    names += [f"twin_{i}.jpg" for i in range(8)]
    said = ["test" if i < 20 else "val" if i < 30 else "train" for i in range(len(names))]
    rows = [f'{name},"{caption(i)}",{said[i]}' for i, name in enumerate(names)]
    (root / "c.csv").write_text("\n".join(["image,caption,split", *rows]))
    table, _ = read_table(root)
    splits = own_data.dealt(dict(zip(table["path"], table["split"])))
    split_of = {path.name: split for split, paths in splits.items() for path in paths}
    for i in range(8):
        assert split_of[f"twin_{i}.jpg"] == split_of[names[5 * i].split("/")[-1]]
    assert len(splits["val"]) == 20 + 4 and len(splits["dev"]) == 10 + 2
    drawn = own_data.dealt(dict.fromkeys(table["path"], ""))
    assert {split: len(paths) for split, paths in drawn.items()}["val"] in (13, 14)


def test_the_profile_is_one_like_any_other_beside_the_courses(root, names, monkeypatch):
    write_table(root, names, "csv")
    profile = get_profile("mini", data=str(root))
    monkeypatch.setenv("CLIP_DATA", str(root))
    assert get_profile("mini") == profile and not profile.rendered
    monkeypatch.delenv("CLIP_DATA")
    for folder in (profile.cache, profile.data, profile.trained, profile.results):
        assert profile.name in folder.parts and profile.name.startswith("mini-photos-")
    assert profile.head_epochs == 600 and profile.tune_epochs == 100
    assert get_profile("mini", str(root / "captions.csv")).name != profile.name


def test_where_most_captions_are_shared_equal_ones_are_positives_of_each_other(root, names, capsys):
    rows = [f"{name},a {WORDS[i % 10]}" for i, name in enumerate(names)]
    (root / "c.csv").write_text("\n".join(["image,caption", *rows]))
    profile = get_profile("smoke", data=str(root))
    assert profile.shared_captions and not get_profile("smoke").shared_captions
    train = load_or_build.examples(profile, "train")
    assert "equal ones are positives" in capsys.readouterr().out
    for split in ("dev", "val"):  # so that recall has one right answer
        texts, _ = load_split(profile, split).all_captions()
        assert len(set(texts)) == len(texts) >= 2
    for examples in (train, Examples(embeds=train.embeds)):
        model = load_or_build.fresh_heads(profile, "projection", 0)
        (batch,) = examples.batches(model, [], 0, 1, len(train), [0])
        texts = np.array(train.embeds.captions)[visiting_order(0, 1, train.image_ids)]
        same = batch["image_ids"][:, None] == batch["image_ids"]
        assert np.array_equal(same, texts[:, None] == texts) and same.sum() > len(texts)


def test_a_split_too_small_to_test_on_is_refused(root, names):
    rows = [f'{name},"{caption(i)}",{"test" if i < 3 else "train"}' for i, name in enumerate(names)]
    (root / "c.csv").write_text("\n".join(["image,caption,split", *rows]))
    profile = get_profile("smoke", data=str(root))
    with pytest.raises(ValueError, match="Only 3 pictures would be left for val, where 8 are"):
        splits_of(profile)
    assert not profile.data.exists()
