"""helpers/data.py against hand-written files in COCO's format and torchvision's CocoCaptions."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from torchvision.datasets import CocoCaptions

from helpers.data import (
    CaptionedImages,
    Examples,
    draw_captions,
    load_split,
    splitmix64,
    visiting_order,
)
from helpers.probes import load_probes
from helpers.storage.images import open_image
from tests.coco_files import (
    IDS,
    SAMPLE,
    image_entry,
    profile,
    write_captions,
    write_images,
    write_twelve,
)

SHARED = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@pytest.fixture
def root(tmp_path):
    return write_twelve(tmp_path)


def edit(root, change):
    path = root / "annotations" / "captions_val2017.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


# Reading


def test_agrees_with_coco_captions(root):
    images = CaptionedImages(root).check()
    oracle = CocoCaptions(root / "val2017", root / "annotations" / "captions_val2017.json")
    assert images.image_ids.tolist() == sorted(IDS) == oracle.ids
    for i, (picture, captions) in enumerate(oracle):
        assert images.captions(i) == captions
        assert np.array_equal(images.image(i), picture)


def test_all_captions_and_subsets(root):
    images = CaptionedImages(root)
    texts, owners = images.all_captions()
    assert len(texts) == len(owners) == sum(4 + i % 3 for i in IDS)
    for i in range(len(images)):
        assert [texts[m] for m in np.flatnonzero(owners == i)] == images.captions(i)
    part = images.subset([785, 139])
    assert part.image_ids.tolist() == [139, 785] and part.counts.tolist() == [5, 6]
    assert part.captions(1) == images.captions(images.image_ids.tolist().index(785))
    assert len(images) == len(IDS)


@settings(max_examples=60, **SHARED)
@given(
    captions=st.dictionaries(
        st.integers(0, 2**62),
        st.lists(st.text(st.characters(codec=None)), max_size=4),
        min_size=1,
        max_size=5,
    )
)
def test_any_caption_round_trips(tmp_path, captions):
    write_captions(tmp_path, captions)
    images = CaptionedImages(tmp_path)
    assert {int(k): images.captions(i) for i, k in enumerate(images.image_ids)} == captions


# What a training step sees


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    epoch=st.integers(0, 10_000),
    ids=st.sets(st.integers(0, 2**63 - 1), max_size=60),
)
def test_order_and_captions_follow_from_seed_epoch_and_id(seed, epoch, ids):
    ids = np.array(sorted(ids), np.int64)
    counts = np.full(len(ids), 5)
    order, drawn = visiting_order(seed, epoch, ids), draw_captions(seed, epoch, ids, counts)
    assert sorted(order) == list(range(len(ids)))
    assert ((drawn >= 0) & (drawn < counts)).all()
    # The other images present change nothing.
    assert (draw_captions(seed, epoch, ids[::2], counts[::2]) == drawn[::2]).all()
    assert visiting_order(seed, epoch, ids[::2]).tolist() == [i // 2 for i in order if i % 2 == 0]


def test_hash_is_splitmix64():
    # The first outputs of splitmix64 seeded with 1234567, as published with xoshiro.
    golden, state = 0x9E3779B97F4A7C15, 1234567
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [int(splitmix64(state + k * golden & 2**64 - 1)[0]) for k in range(3)] == known


def test_seeds_and_epochs_differ_and_captions_are_drawn_evenly():
    ids = np.arange(5_000) * 7
    assert (visiting_order(0, 0, ids) != visiting_order(0, 1, ids)).mean() > 0.99
    assert (visiting_order(0, 0, ids) != visiting_order(1, 0, ids)).mean() > 0.99
    drawn = np.stack([draw_captions(0, epoch, ids, 5) for epoch in range(5)])
    assert 0.75 < (drawn[0] != drawn[1]).mean() < 0.85
    assert np.allclose(np.bincount(drawn.flat) / drawn.size, 0.2, atol=0.01)


def epoch_of(examples, epoch, which, part=(0, 1)):
    """Image ids, captions and pixels of some batches of four images."""
    captions = []

    def tokenize(texts):
        captions.append(texts)
        return {}

    def preprocess(image, box):
        return torch.from_numpy(np.array(image.resize((8, 8), box=box))).permute(2, 0, 1)

    towers = {
        "image_tower": SimpleNamespace(size=8, preprocess=preprocess),
        "text_tower": SimpleNamespace(tokenize=tokenize),
    }
    raw = ("image", "text")
    batches = list(
        examples.batches(
            SimpleNamespace(**towers), raw, 3, epoch, batch_size=4, which=which, part=part
        )
    )
    pixels = torch.cat([batch["pixel_values"] for batch in batches])
    return [b["image_ids"].tolist() for b in batches], captions, pixels


def test_batches_are_those_of_the_hash(root):
    images = CaptionedImages(root)
    examples = Examples(images)
    for epoch in (1, 2):
        ids, captions, pixels = epoch_of(examples, epoch, range(3))
        order = visiting_order(3, epoch, images.image_ids)
        picks = draw_captions(3, epoch, images.image_ids, images.counts)
        assert sum(ids, []) == images.image_ids[order].tolist()
        assert sum(captions, []) == [images.captions(i)[picks[i]] for i in order]
        assert pixels.shape == (12, 3, 8, 8) and pixels.dtype == torch.uint8
        # Resumed at the last batch; the second of two processes.
        last = epoch_of(examples, epoch, [2])
        assert last[:2] == (ids[2:], captions[2:]) and last[2].equal(pixels[8:])
        half = epoch_of(examples, epoch, [1], part=(1, 2))
        assert half[:2] == ([ids[1][2:]], [captions[1][2:]]) and half[2].equal(pixels[6:8])


# Images

ORIENTATION = 0x0112  # the EXIF tag
RED, BLUE = (254, 0, 0), (0, 0, 254)  # as JPEG stores them


def two_colours(width=64, height=32):
    """Left half red, right half blue."""
    image = Image.new("RGB", (width, height), BLUE)
    image.paste(RED, (0, 0, width // 2, height))
    return image


def assert_colours(image, expected):
    """`expected`: position → colour."""
    assert image.mode == "RGB"
    for position, colour in expected.items():
        assert np.allclose(image.getpixel(position), colour, atol=6), position


@pytest.mark.parametrize(
    "mode, name", [("RGB", "jpg"), ("CMYK", "jpg"), ("RGBA", "png"), ("P", "png")]
)
def test_colour_modes(tmp_path, mode, name):
    two_colours().convert(mode).save(tmp_path / f"x.{name}")
    assert Image.open(tmp_path / f"x.{name}").mode == mode
    assert_colours(open_image(tmp_path / f"x.{name}"), {(5, 5): RED, (60, 5): BLUE})


@pytest.mark.parametrize("mode, name", [("L", "jpg"), ("L", "png"), ("LA", "png"), ("1", "png")])
def test_grey_modes(tmp_path, mode, name):
    grey = Image.new("L", (64, 32), 255)
    grey.paste(0, (0, 0, 32, 32))
    grey.convert(mode).save(tmp_path / f"x.{name}")
    colours = {(5, 5): (0, 0, 0), (60, 5): (255, 255, 255)}
    assert_colours(open_image(tmp_path / f"x.{name}"), colours)


def test_16_bits_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.full((32, 32), 128 * 256, np.uint16)).save(tmp_path / "x.png")
    assert_colours(open_image(tmp_path / "x.png"), {(5, 5): (128, 128, 128)})


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_white(tmp_path, mode):
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 16, 32))
    image.convert(mode).save(tmp_path / "x.png")
    assert_colours(open_image(tmp_path / "x.png"), {(5, 5): (0, 0, 0), (28, 5): (255, 255, 255)})


@pytest.mark.parametrize(
    "orientation, red, blue",
    [(1, (5, 5), (60, 5)), (3, (60, 5), (5, 5)), (6, (5, 5), (5, 60)), (8, (5, 60), (5, 5))],
)
@pytest.mark.parametrize("size, shrink", [(None, 1), (16, 2)])
def test_exif_turns_the_image_upright(tmp_path, orientation, red, blue, size, shrink):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    two_colours().save(tmp_path / "x.jpg", exif=exif, quality=95)
    image = open_image(tmp_path / "x.jpg", size)
    assert sorted(image.size) == [32 // shrink, 64 // shrink]
    assert (image.width > image.height) == (orientation < 5)
    places = {red: RED, blue: BLUE}
    assert_colours(image, {(x // shrink, y // shrink): c for (x, y), c in places.items()})
    # Not to be turned again.
    assert image.getexif().get(ORIENTATION, 1) == 1


@settings(max_examples=40, **SHARED)
@given(width=st.integers(1, 300), height=st.integers(1, 300), size=st.integers(1, 300))
def test_draft_never_decodes_below_size(tmp_path, width, height, size):
    Image.new("RGB", (width, height), RED).save(tmp_path / "x.jpg")
    small = open_image(tmp_path / "x.jpg", size)
    assert small.width >= min(size, width) and small.height >= min(size, height)
    assert open_image(tmp_path / "x.jpg").size == (width, height)


def png_of_nothing(path, width, height):
    """A PNG of a few hundred bytes whose header promises `width` x `height` pixels."""

    def chunk(kind, data):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b""))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "width, height, reason",
    [
        (10_000, 5_001, "has 10,000 × 5,001 pixels, more than 50,000,000. Save it smaller"),
        (10_000, 10_000, "has 10,000 × 10,000 pixels"),
        (60_000, 60_000, r"is no whole picture \(Image size \(3600000000 pixels\) exceeds"),
    ],
)
def test_too_many_pixels_are_refused_before_decoding(tmp_path, monkeypatch, width, height, reason):
    monkeypatch.setattr(PngImageFile, "load", lambda self: pytest.fail("it was decoded"))
    png_of_nothing(tmp_path / "bomb.png", width, height)
    for size in (None, 64):
        with pytest.raises(OSError, match=rf"bomb\.png {reason}"):
            open_image(tmp_path / "bomb.png", size)


@pytest.mark.parametrize("content", [b"", b"<html>no</html>", bytes(99)], ids=["", "page", "0s"])
def test_no_image_at_all(tmp_path, content):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(OSError, match=r"x\.jpg is no whole .*\(empty, or in no .*choose another"):
        open_image(tmp_path / "x.jpg")
    with pytest.raises(OSError, match=r"^This file is no whole picture \(empty, or in no format"):
        open_image(io.BytesIO(content))


@pytest.mark.parametrize("name", ["x.gif", "x.png", "x.webp"])
def test_the_first_frame_of_an_animation(tmp_path, name):
    blank = Image.new("RGB", (64, 32), "black")
    two_colours().save(tmp_path / name, save_all=True, append_images=[blank, blank], duration=40)
    assert Image.open(tmp_path / name).n_frames > 1
    assert_colours(open_image(tmp_path / name), {(5, 5): RED, (60, 5): BLUE})


BROKEN_EXIF = {
    "noise": bytes(range(64)),
    "a directory beyond the end": b"II*\0\xff\xff\xff\x7f",
    "an endless directory": b"II*\0\x08\0\0\0\xff\xff"
    + b"\x12\x01\x03\0\xff\xff\xff\xff\x06\0\0\0",
    "cut off": b"MM\0*\0\0\0\x08\0\x05\x01\x12",
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("exif", BROKEN_EXIF.values(), ids=BROKEN_EXIF)
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp"])
def test_broken_exif_says_nothing_against_the_pixels(tmp_path, exif, name):
    two_colours().save(tmp_path / name, exif=b"Exif\0\0" + exif, quality=95)
    image = open_image(tmp_path / name)
    assert image.size == (64, 32)
    assert_colours(image, {(5, 5): RED, (60, 5): BLUE})


# Errors


def test_a_missing_image_and_a_cut_one(tmp_path, root):
    with pytest.raises(FileNotFoundError, match=r"no\.jpg does not exist.*CLIP_COCO_DIR"):
        open_image(tmp_path / "no.jpg")
    path = CaptionedImages(root).path(3)
    for kept in (0, 10, path.stat().st_size // 2):
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(OSError, match=rf"{path.name} is no whole picture.*Delete it"):
            open_image(path)
        with pytest.raises(OSError, match=rf"{path.name} is no whole picture"):
            CaptionedImages(root).check()
        write_images(root, IDS)
    with path.open("ab") as file:
        file.write(b"some cameras append a trailer")
    CaptionedImages(root).check()


def test_missing_folder_files_and_images(root):
    for image_id in IDS[:5]:
        (root / "val2017" / f"{image_id:012d}.jpg").unlink()
    message = r"5 of 12 images do not exist: .*000000000139\.jpg.* and 2 more"
    with pytest.raises(FileNotFoundError, match=message):
        CaptionedImages(root).check()
    CaptionedImages(root).subset(IDS[5:]).check()
    shutil.rmtree(root / "val2017")
    with pytest.raises(FileNotFoundError, match=r"folder .*val2017 does not exist.*Notebook 01"):
        load_split(profile(root), "val")
    with pytest.raises(FileNotFoundError, match=r"captions_train2017\.json does not exist.*01"):
        CaptionedImages(root, "train2017")


def test_image_without_captions(root):
    edit(root, lambda data: data["images"].append(image_entry(999)))
    write_images(root, [999])
    images = CaptionedImages(root)
    assert images.captions(images.image_ids.tolist().index(999)) == []
    with pytest.raises(ValueError, match=r"captions_val2017\.json has no caption for 999\b"):
        images.check()
    with pytest.raises(ValueError, match="image 999 has no caption"):
        Examples(images)
    images.subset(IDS).check()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: data.pop("annotations"), "has no `annotations`"),
        (lambda data: data.pop("images"), "has no `images`"),
        (lambda data: data["annotations"][0].pop("caption"), "lacks 'caption'"),
        (lambda data: data["images"][0].pop("file_name"), "lacks 'file_name'"),
        (lambda data: data["images"].append(image_entry(139)), "image 139 is listed twice"),
        (
            lambda data: data["annotations"][0].update(image_id=140),
            "image 140 has captions but is not under `images`",
        ),
    ],
)
def test_a_wrong_annotation_file(root, change, message):
    edit(root, change)
    with pytest.raises(ValueError, match=rf"captions_val2017\.json.*{message}"):
        CaptionedImages(root)


@pytest.mark.parametrize("text", ["", '{"images": [', "[]", "null"])
def test_an_annotation_file_that_is_cut_off(root, text):
    (root / "annotations" / "captions_val2017.json").write_text(text)
    with pytest.raises(ValueError, match=r"val2017\.json (is no whole JSON file|has no `images`)"):
        CaptionedImages(root)


# The fingerprint that keys caches


def test_fingerprint(root):
    images = CaptionedImages(root)
    before = images.fingerprint()
    part = images.subset(IDS[:-1]).fingerprint()
    assert part != before
    Image.new("RGB", (9, 9)).save(images.path(len(IDS) - 1))
    assert images.fingerprint() != before
    assert images.subset(IDS[:-1]).fingerprint() == part
    write_images(root, IDS)
    assert images.fingerprint() == before
    edit(root, lambda data: data["annotations"][3].update(caption="something else"))
    assert CaptionedImages(root).fingerprint() != before


# Splits


def split_ids(row):
    return {name: set(load_split(row, name).image_ids.tolist()) for name in ("train", "dev", "val")}


def test_splits_of_one_folder(root):
    splits = split_ids(profile(root))
    assert {name: len(ids) for name, ids in splits.items()} == {"train": 5, "dev": 3, "val": 4}
    assert set.union(*splits.values()) == set(IDS)
    assert splits == split_ids(profile(root, seed=7))
    # By hash, not by number.
    assert splits["val"] != set(IDS[:4])


def test_splits_of_two_folders(root):
    write_captions(root, {i: ["a cat"] for i in range(1, 11)}, "train2017")
    write_images(root, range(1, 11), "train2017")
    row = profile(root, train_folder="train2017", train_images=None, val_images=None)
    splits = split_ids(row)
    assert {name: len(ids) for name, ids in splits.items()} == {"train": 7, "dev": 3, "val": 12}
    assert splits["train"] | splits["dev"] == set(range(1, 11)) and splits["val"] == set(IDS)
    assert len(split_ids(profile(root, train_folder="train2017", train_images=8))["train"]) == 5


@settings(max_examples=30, **SHARED)
@given(val=st.integers(1, 6), dev=st.integers(1, 6), train=st.integers(1, 6))
def test_splits_are_disjoint_or_refused(root, val, dev, train):
    row = profile(root, val_images=val, dev_images=dev, train_images=dev + train)
    if val + dev + train > len(IDS):
        with pytest.raises(ValueError, match="captions_val2017.json is short: .* of its 12 images"):
            load_split(row, "train")
    else:
        splits = split_ids(row)
        assert [len(splits[name]) for name in ("val", "dev", "train")] == [val, dev, train]
        assert len(set.union(*splits.values())) == val + dev + train


# Real photographs


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="no coco-sample beside the repository")
def test_real_photographs():
    row = profile(SAMPLE, train_images=200, dev_images=50, val_images=100)
    splits = split_ids(row)
    assert [len(splits[name]) for name in ("train", "dev", "val")] == [150, 50, 100]
    oracle = CocoCaptions(SAMPLE / "val2017", SAMPLE / "annotations" / "captions_val2017.json")
    images = CaptionedImages(SAMPLE)
    assert images.image_ids.tolist() == oracle.ids and len(images.all_captions()[0]) == 1_500
    for i in range(0, 300, 25):
        picture, captions = oracle[i]
        assert sorted(images.captions(i)) == sorted(captions)
        assert np.array_equal(images.image(i), picture)
    known = load_probes(row)["known"]
    assert len(known) >= 1
    assert all(known.image(i).width == known.image(i).height for i in range(len(known)))
