"""MiniCOCO: drawings, scenes, captions and their claims, ceilings, and the files in COCO's layout."""

import itertools
import json
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from helpers.minicoco import render
from helpers.minicoco.backgrounds import PLACES, SIZE, TIMES
from helpers.minicoco.captions import RELATIONS, caption, ceiling, fits, noun_phrase
from helpers.minicoco.scenes import (
    UNPAIRED,
    Scene,
    Thing,
    draw,
    place_by_relation,
    random_scene,
    relation_of,
)
from helpers.minicoco.sprites import (
    CAPTIONED,
    CATEGORIES,
    COLOURS,
    UNCAPTIONED,
    UNSEEN,
    colours,
    drawings,
    glyph,
    sprite,
)

seeds = st.integers(0, 10**9)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    profile = SimpleNamespace(
        data=tmp_path_factory.mktemp("mini") / "minicoco", train_images=40, val_images=20, seed=0
    )
    render.render(profile)
    return profile


def read(folder, name):
    return json.loads((folder / "annotations" / name).read_text())


# --- drawings ---


def test_categories_keep_cocos_ids_and_leave_some_out():
    ids = [row[0] for row in CATEGORIES.values()]
    assert len(set(ids)) == len(ids) == 65 and len(CAPTIONED) == 55
    assert (CATEGORIES["person"][0], CATEGORIES["zebra"][0], CATEGORIES["toothbrush"][0]) == (
        1,
        24,
        90,
    )
    assert len(UNCAPTIONED) == 6 and len(UNSEEN) == 4 and not set(UNCAPTIONED) & set(UNSEEN)


def test_the_last_of_three_drawings_is_kept_for_the_probes():
    kept = [c for c in CAPTIONED if drawings(c, probe=True)]
    assert len(kept) >= 15
    for category in CATEGORIES:
        assert len(CATEGORIES[category][2].split()) <= 4 and drawings(category)
        assert not set(drawings(category)) & set(drawings(category, probe=True))


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_drawing_has_ink_and_takes_every_colour(category):
    for char in CATEGORIES[category][2].split():
        plain = np.asarray(glyph(char, category))
        assert (plain[..., 3] > 200).mean() > 0.04, char
        painted = [np.asarray(sprite(char, category, colour)) for colour in colours(category)]
        assert all(p.shape == plain.shape for p in painted)
        for a, b in itertools.combinations(painted, 2):
            assert (a != b).any(-1).sum() > 150, (char, category)


# --- scenes ---


@settings(max_examples=100, deadline=None)
@given(seeds)
def test_scenes_keep_to_what_captions_may_name(seed):
    scene = random_scene(random.Random(seed))
    assert 1 <= len(scene.things) <= 4 and scene.place in PLACES and scene.time in TIMES
    assert len({t.category for t in scene.things}) == len(scene.things)
    for t in scene.things:
        assert t.category in CAPTIONED and t.glyph in drawings(t.category)
        assert (t.colour, t.category) not in UNPAIRED and 0 < t.x < 1 and 0 < t.y < 1


def test_every_withheld_pair_is_made_of_parts_that_are_shown():
    for colour, category in UNPAIRED:
        assert category in CAPTIONED and colour in colours(category) and len(colours(category)) > 1


def test_masks_are_what_is_visible():
    car, sign = (
        Thing("car", "🚗", "red", 1, 0.5, 0.5, 0.5),
        Thing("stop sign", "🛑", None, 1, 0.5, 0.7, 0.4),
    )
    scene = Scene(things=[sign, car])
    picture, covers = draw(scene, masks=True)
    assert picture.size == (SIZE, SIZE) and [t.category for t, _ in covers] == ["car", "stop sign"]
    assert not (covers[0][1] & covers[1][1]).any(), "what stands in front hides what is behind"
    inside = np.asarray(picture)[covers[1][1]]
    assert (inside[:, 0] > 150).mean() > 0.5, "a stop sign is mostly red"


@pytest.mark.parametrize("relation", ["left", "right", "above", "below"])
def test_the_composers_layout_is_the_relation_asked_for(relation):
    things = [Thing("cat", "🐈", "black"), Thing("dog", "🐕", "brown")]
    place_by_relation(things, relation)
    assert relation_of(*things) == relation


# --- captions ---


@settings(max_examples=300, deadline=None)
@given(seeds, st.integers(0, 4))
def test_captions_are_good_english_and_true(seed, detail):
    scene = random_scene(random.Random(seed))
    text, claim = caption(random.Random(seed + 1), scene, detail)
    assert (
        text[0].isupper()
        and text.endswith(".")
        and "  " not in text
        and "_" not in text
        and "/" not in text
    )
    assert not re.search(r"\b[Aa] [aeiou]", text) and not re.search(r"\b[Aa]n [^aeiou]", text)
    assert not re.search(r"skises|scissorss|peoples|sheeps|knifes|mouses|buss\b|None", text)
    assert not re.search(r"(?i)there is (two|three)|there are an? ", text)
    assert fits([scene], [claim]).all()
    withheld = "bus|buses|zebra|umbrella|pizza|couch|sofa|laptop|giraffe|kite|carrot|toilet"
    assert not re.search(rf"\b({withheld})s?\b", text)


def test_noun_phrases():
    rng = random.Random(0)
    assert noun_phrase(rng, "skis", "red", 1) == "a pair of red skis"
    assert noun_phrase(rng, "scissors", "orange", 2) == "two pairs of orange scissors"
    assert noun_phrase(rng, "sheep", None, 3) == "three sheep"
    assert noun_phrase(rng, "elephant", None, 1) == "an elephant"
    assert noun_phrase(rng, "knife", None, 2) == "two knives"
    assert {noun_phrase(random.Random(k), "couch", None, 1) for k in range(20)} == {
        "a couch",
        "a sofa",
    }


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_fits_agrees_with_reading_the_scene_thing_by_thing(seed):
    rng = random.Random(seed)
    scenes = [random_scene(rng) for _ in range(12)]
    claims = [caption(rng, scene, detail)[1] for scene in scenes for detail in range(5)]
    claims += [
        {**c, "place": None, "time": None, "things": c["things"][:1], "relation": None}
        for c in claims
    ]
    table = fits(scenes, claims)
    for claim, row in zip(claims, table, strict=True):
        for scene, fit in zip(scenes, row, strict=True):
            by_name = {t.category: t for t in scene.things}
            true = all(
                name in by_name
                and by_name[name].count == count
                and (colour is None or by_name[name].colour == colour)
                for name, colour, count in claim["things"]
            )
            true = (
                true
                and claim["place"] in (None, scene.place)
                and claim["time"] in (None, scene.time)
            )
            if true and claim["relation"]:
                a, relation, b = claim["relation"]
                a, b = by_name[a], by_name[b]
                true = {
                    "left": a.x < b.x,
                    "right": a.x > b.x,
                    "above": a.y < b.y,
                    "below": a.y > b.y,
                }[relation]
            assert fit == true


def test_ceiling_is_what_a_perfect_retriever_reaches_on_average():
    rng = np.random.default_rng(0)
    owner = np.arange(40) // 5
    table = rng.random((40, 8)) < 0.15
    table[np.arange(40), owner] = True
    expected = ceiling(table, owner)
    found = {name: [] for name in expected}
    for _ in range(4000):
        scores = table + rng.random(table.shape) * 0.5  # fitting first, ties at random
        image_rank = 1 + (scores > scores[np.arange(40), owner][:, None]).sum(1)
        text_rank = [1 + (scores[:, i] > scores[owner == i, i].max()).sum() for i in range(8)]
        for k in (1, 5, 10):
            found[f"text_to_image/recall@{k}"].append((image_rank <= k).mean())
            found[f"image_to_text/recall@{k}"].append((np.array(text_rank) <= k).mean())
    for name, value in expected.items():
        assert abs(np.mean(found[name]) - value) < 0.01, name


def test_a_thousand_scenes_are_varied_enough():
    scenes = [render.scene_of("val2017", i, 0) for i in range(1000)]
    told = [render.five_captions("val2017", i, 0, scene) for i, scene in enumerate(scenes)]
    claims = [claim for captions in told for _, claim in captions]
    table, owner = fits(scenes, claims), np.arange(5000) // 5
    over_all, detailed = ceiling(table, owner), ceiling(table[::5], owner[::5])
    assert (
        over_all["text_to_image/recall@1"] >= 0.75 and over_all["text_to_image/recall@10"] >= 0.90
    )
    assert detailed["text_to_image/recall@1"] >= 0.95
    assert all(len({text for text, _ in captions}) == 5 for captions in told)


def test_relations_have_words_for_every_case():
    assert set(RELATIONS) == {"left", "right", "above", "below", "near"} and set(COLOURS) >= {
        "red",
        "blue",
        "gray",
    }


# --- files ---


def test_layout_is_cocos(rendered):
    folder = rendered.data
    for split, images in (("train2017", 40), ("val2017", 20)):
        captions, instances = (
            read(folder, f"captions_{split}.json"),
            read(folder, f"instances_{split}.json"),
        )
        assert set(captions) == {"info", "licenses", "images", "annotations"}
        assert set(instances) == {"info", "licenses", "images", "annotations", "categories"}
        assert len(captions["images"]) == images and len(captions["annotations"]) == 5 * images
        coco_keys = {
            "license",
            "file_name",
            "coco_url",
            "height",
            "width",
            "date_captured",
            "flickr_url",
            "id",
        }
        assert set(captions["images"][0]) == coco_keys
        object_keys = {"segmentation", "area", "iscrowd", "image_id", "bbox", "category_id", "id"}
        assert set(instances["annotations"][0]) == object_keys
        for image in captions["images"]:
            assert (
                re.fullmatch(r"\d{12}\.jpg", image["file_name"])
                and int(image["file_name"][:12]) == image["id"]
            )
            with Image.open(folder / split / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"]) == (SIZE, SIZE)


def test_pycocotools_reads_masks_boxes_and_areas(rendered, capsys):
    coco = COCO(rendered.data / "annotations/instances_val2017.json")
    assert len(coco.getCatIds()) == 65 and len(coco.anns) == len(set(coco.anns))
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        assert mask.sum() == annotation["area"]
        ys, xs = np.nonzero(mask)
        box = [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]
        assert box == annotation["bbox"]


def test_probe_sets_hold_what_they_say(rendered):
    names = {row[0]: name for name, row in CATEGORIES.items()}
    expected = {"known": set(CAPTIONED), "uncaptioned": set(UNCAPTIONED), "unseen": set(UNSEEN)}
    for split in list(render.PROBES)[:5]:
        instances = read(rendered.data / "probes", f"instances_{split}.json")
        found = {names[a["category_id"]] for a in instances["annotations"]}
        assert len(instances["annotations"]) == len(instances["images"]) > 0
        assert found == {c["name"] for c in instances["categories"]}
        if split in expected:
            assert found <= expected[split]
        if split == "pairs":
            assert {
                (a["colour"], names[a["category_id"]]) for a in instances["annotations"]
            } <= set(UNPAIRED)
    for annotation in read(rendered.data / "probes", "captions_compositional.json")["annotations"]:
        assert annotation["caption"] != annotation["foil"]
        words = lambda text: sorted(re.sub(r"\b(an|a)\b", "a", text.lower().rstrip(".")).split())  # noqa: E731
        assert words(annotation["caption"]) == words(annotation["foil"])


def test_train_captions_never_name_what_is_withheld(rendered):
    _, claims = render.load_scenes(rendered.data, "train2017")
    for claim in claims:
        for category, colour, _ in claim["things"]:
            assert category in CAPTIONED and (colour, category) not in UNPAIRED


def test_same_seed_same_bytes_and_nothing_is_drawn_twice(rendered, tmp_path, capsys):
    again = SimpleNamespace(**{**vars(rendered), "data": tmp_path / "again"})
    render.render(again)
    for path in sorted(rendered.data.glob("**/annotations/*.json")):
        assert path.read_bytes() == (again.data / path.relative_to(rendered.data)).read_bytes(), (
            path.name
        )
    before = {p: p.stat().st_mtime_ns for p in again.data.rglob("*")}
    render.render(again)
    assert {p: p.stat().st_mtime_ns for p in again.data.rglob("*")} == before
    other = SimpleNamespace(**{**vars(again), "seed": 1})
    render.render(other)  # another fingerprint: drawn anew
    name = "annotations/captions_val2017.json"
    assert (other.data / name).read_bytes() != (rendered.data / name).read_bytes()


def test_a_broken_run_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    profile = SimpleNamespace(data=tmp_path / "minicoco", train_images=4, val_images=2, seed=0)
    monkeypatch.setattr(
        render, "write_annotations", lambda *a: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(
        OSError, match=r"minicoco could not be written \(disk full\). Free some disk space"
    ):
        render.render(profile)
    assert not profile.data.exists() and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "lost", ["val2017/000000500001.jpg", "probes/annotations/instances_pairs.json"]
)
def test_a_file_that_is_gone_is_rendered_again(tmp_path, lost):
    """As errors advise: delete a broken file and render it again."""
    profile = SimpleNamespace(data=tmp_path / "minicoco", train_images=4, val_images=2, seed=0)
    path = render.render(profile) / lost
    content = path.read_bytes()
    path.unlink()
    render.render(profile)
    assert path.read_bytes() == content


def test_ceilings_by_detail(rendered):
    ceilings = render.ceilings(rendered.data)
    assert list(ceilings) == ["all", *(f"detail {d}" for d in range(5))]
    assert all(0 < v <= 1 for row in ceilings.values() for v in row.values())
