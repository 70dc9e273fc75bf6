"""helpers/coco.py against hand-written files in COCO's format and torchvision's CocoCaptions."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from torch.utils.data import DataLoader
from torchvision.datasets import CocoCaptions

from helpers.data import CaptionedImages, Collate, EpochBatches, load_split, splitmix64
from helpers.probes import load_probes
from helpers.storage.caption_files import read_captions
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


@pytest.fixture
def root(tmp_path):
    return write_twelve(tmp_path)


def edit(root, change, name="captions_val2017.json"):
    path = root / "annotations" / name
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return path


def to_tensor(image):
    return torch.from_numpy(np.array(image.resize((8, 8)))).permute(2, 0, 1)


def tokenize(texts):
    """Code points as tokens, padded to the longest, cut at 10."""
    ids = [torch.tensor([ord(c) for c in text[:10]]) for text in texts]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    return {"input_ids": padded, "attention_mask": (padded > 0).long()}


# Reading


def test_agrees_with_coco_captions(root):
    images = CaptionedImages(root).check()
    oracle = CocoCaptions(root / "val2017", root / "annotations" / "captions_val2017.json")
    assert images.image_ids.tolist() == sorted(IDS) == oracle.ids
    for i, (picture, captions) in enumerate(oracle):
        assert images.captions(i) == captions
        assert np.array_equal(images.image(i), picture)


def test_all_captions_and_their_owners(root):
    images = CaptionedImages(root)
    texts, owners = images.all_captions()
    assert len(texts) == len(owners) == sum(4 + i % 3 for i in IDS)
    for i in range(len(images)):
        assert [texts[m] for m in np.flatnonzero(owners == i)] == images.captions(i)


def test_captions_are_held_in_arrays_and_shared_by_subsets(root):
    images = CaptionedImages(root)
    digest, *arrays = images.table
    assert all(isinstance(array, np.ndarray) and array.dtype != object for array in arrays)
    held = [v for v in vars(images).values() if isinstance(v, (list, dict, set))]
    assert not held
    part = images.subset([785, 139])
    assert part.table is images.table
    assert part.image_ids.tolist() == [139, 785]
    assert part.captions(1) == images.captions(images.image_ids.tolist().index(785))
    assert len(images) == len(IDS)


def test_subset_with_an_unknown_image(root):
    with pytest.raises(ValueError, match=r"captions_val2017.json does not list the images 140"):
        CaptionedImages(root).subset([139, 140])


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    captions=st.dictionaries(
        st.integers(0, 2**62),
        st.lists(st.text(st.characters(codec=None)), max_size=4),
        min_size=1,
        max_size=5,
    )
)
def test_any_caption_round_trips(tmp_path, captions):
    path = write_captions(tmp_path, captions)
    images = CaptionedImages(tmp_path)
    assert {int(k): images.captions(i) for i, k in enumerate(images.image_ids)} == captions
    assert read_captions(path).offsets[-1] == len(images.table.utf8)


# What a training step sees


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    epoch=st.integers(0, 10_000),
    ids=st.sets(st.integers(0, 2**63 - 1), max_size=60),
)
def test_order_and_captions_follow_from_seed_epoch_and_id(seed, epoch, ids):
    images = bare_images(sorted(ids), seed)
    order = images.order(epoch)
    assert sorted(order) == list(range(len(ids)))
    drawn = images.draw(epoch)
    assert ((drawn >= 0) & (drawn < images.counts)).all()
    half = bare_images(sorted(ids)[::2], seed)  # the other images present change nothing
    assert (half.draw(epoch) == drawn[::2]).all()
    visits = [i // 2 for i in order if i % 2 == 0]
    assert half.order(epoch).tolist() == visits


def bare_images(ids, seed):
    """CaptionedImages without files: ids and five captions each."""
    images = CaptionedImages.__new__(CaptionedImages)
    images.image_ids, images.seed = np.array(ids, np.int64), seed
    images.counts = np.full(len(ids), 5)
    return images


def test_hash_is_splitmix64():
    # The first outputs of splitmix64 seeded with 1234567, as published with xoshiro.
    golden, state = 0x9E3779B97F4A7C15, 1234567
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [int(splitmix64(state + k * golden & 2**64 - 1)[0]) for k in range(3)] == known


def test_seeds_and_epochs_differ_and_captions_are_drawn_evenly():
    ids = np.arange(5_000) * 7
    images = bare_images(ids, seed=0)
    assert (images.order(0) != images.order(1)).mean() > 0.99
    assert (images.order(0) != bare_images(ids, seed=1).order(0)).mean() > 0.99
    assert 0.75 < (images.draw(0) != images.draw(1)).mean() < 0.85
    drawn = np.bincount(np.concatenate([images.draw(epoch) for epoch in range(5)]))
    assert np.allclose(drawn / drawn.sum(), 0.2, atol=0.01)


def test_every_caption_of_an_image_is_seen(root):
    images = CaptionedImages(root)
    for i in range(len(images)):
        assert {images.caption(i, epoch) for epoch in range(80)} == set(images.captions(i))


def test_workers_change_nothing(root):
    images = CaptionedImages(root, seed=3, transform=to_tensor)

    def epoch(number, workers):
        batches = EpochBatches(images, 5, number)
        return list(
            DataLoader(
                images, batch_sampler=batches, collate_fn=Collate(tokenize), num_workers=workers
            )
        )

    for number in range(2):
        alone, helped = epoch(number, 0), epoch(number, 2)
        assert len(alone) == len(helped) == 2
        for a, b in zip(alone, helped, strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(epoch(0, 0)[0]["image_ids"], epoch(1, 0)[0]["image_ids"])


def test_a_batch(root):
    images = CaptionedImages(root, transform=to_tensor)
    keys = next(iter(EpochBatches(images, 5, epoch=4)))
    batch = Collate(tokenize)([images[key] for key in keys])
    assert (
        batch["pixel_values"].shape == (5, 3, 8, 8) and batch["pixel_values"].dtype == torch.uint8
    )
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (5, 10)
    assert batch["image_ids"].tolist() == [IDS[i] for _, i in keys]
    texts = ["".join(map(chr, row[row > 0])) for row in batch["input_ids"]]
    assert texts == [images.caption(i, 4)[:10] for _, i in keys]


def test_an_item_without_an_epoch_is_of_epoch_0(root):
    images = CaptionedImages(root)
    assert images[2]["caption"] == images[0, 2]["caption"] == images.caption(2, 0)
    assert images[2]["image_id"] == 632 and images[2]["image"].size == (48, 32)


def test_a_batch_larger_than_the_data(root):
    with pytest.raises(ValueError, match="batch of 13 is larger than the 12 images"):
        EpochBatches(CaptionedImages(root), 13, 0)


# Pictures

ORIENTATION = 0x0112  # the EXIF tag
RED, BLUE = (254, 0, 0), (0, 0, 254)  # as JPEG stores them


def two_colours(width=64, height=32):
    """Left half red, right half blue."""
    image = Image.new("RGB", (width, height), BLUE)
    image.paste(RED, (0, 0, width // 2, height))
    return image


def save_turned(path, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    two_colours().save(path, exif=exif, quality=95)


def assert_colours(image, expected):
    """`expected`: position → colour."""
    assert image.mode == "RGB"
    for position, colour in expected.items():
        assert np.allclose(image.getpixel(position), colour, atol=6), (
            position,
            image.getpixel(position),
        )


@pytest.mark.parametrize(
    "mode, name", [("RGB", "x.jpg"), ("CMYK", "x.jpg"), ("RGBA", "x.png"), ("P", "x.png")]
)
def test_colour_modes(tmp_path, mode, name):
    two_colours().convert(mode).save(tmp_path / name)
    assert Image.open(tmp_path / name).mode == mode
    assert_colours(open_image(tmp_path / name), {(5, 5): RED, (60, 5): BLUE})


@pytest.mark.parametrize(
    "mode, name", [("L", "x.jpg"), ("L", "x.png"), ("LA", "x.png"), ("1", "x.png")]
)
def test_grey_modes(tmp_path, mode, name):
    grey = Image.new("L", (64, 32), 255)
    grey.paste(0, (0, 0, 32, 32))
    grey.convert(mode).save(tmp_path / name)
    assert_colours(open_image(tmp_path / name), {(5, 5): (0, 0, 0), (60, 5): (255, 255, 255)})


def test_16_bits_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.full((32, 32), 128 * 256, np.uint16)).save(tmp_path / "x.png")
    assert_colours(open_image(tmp_path / "x.png"), {(5, 5): (128, 128, 128)})


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_white(tmp_path, mode):
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 16, 32))
    image.convert(mode).save(tmp_path / "x.png")
    assert_colours(open_image(tmp_path / "x.png"), {(5, 5): (0, 0, 0), (28, 5): (255, 255, 255)})


@pytest.mark.parametrize("orientation, red, blue", [(1, (5, 5), (60, 5)), (3, (60, 5), (5, 5))])
@pytest.mark.parametrize("size, shrink", [(None, 1), (16, 2)])
def test_exif_upside_down(tmp_path, orientation, red, blue, size, shrink):
    save_turned(tmp_path / "x.jpg", orientation)
    image = open_image(tmp_path / "x.jpg", size)
    assert image.size == (64 // shrink, 32 // shrink)
    assert_colours(
        image, {(red[0] // shrink, 5 // shrink): RED, (blue[0] // shrink, 5 // shrink): BLUE}
    )


@pytest.mark.parametrize("orientation, red, blue", [(6, (5, 5), (5, 60)), (8, (5, 60), (5, 5))])
@pytest.mark.parametrize("size, shrink", [(None, 1), (16, 2)])
def test_exif_on_its_side(tmp_path, orientation, red, blue, size, shrink):
    save_turned(tmp_path / "x.jpg", orientation)
    image = open_image(tmp_path / "x.jpg", size)
    assert image.size == (32 // shrink, 64 // shrink)
    assert_colours(
        image, {(5 // shrink, red[1] // shrink): RED, (5 // shrink, blue[1] // shrink): BLUE}
    )
    assert image.getexif().get(ORIENTATION, 1) == 1  # not to be turned again


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(width=st.integers(1, 300), height=st.integers(1, 300), size=st.integers(1, 300))
def test_draft_never_decodes_below_size(tmp_path, width, height, size):
    Image.new("RGB", (width, height), RED).save(tmp_path / "x.jpg")
    small = open_image(tmp_path / "x.jpg", size)
    assert small.width >= min(size, width) and small.height >= min(size, height)
    assert open_image(tmp_path / "x.jpg").size == (width, height)


def test_draft_is_used_by_items(root):
    images = CaptionedImages(root, size=16)
    assert images[0]["image"].size == (24, 16)
    assert images.image(0).size == (48, 32)


# Files that a reader may choose


def png_of_nothing(path, width, height):
    """A PNG of a few hundred bytes whose header promises `width` x `height` pixels."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (
        chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "width, height, told",
    [
        (10_000, 5_001, "10,000 × 5,001"),
        (10_000, 10_000, "10,000 × 10,000"),
        (60_000, 60_000, "3600000000"),
    ],
)
def test_too_many_pixels_are_refused_before_decoding(tmp_path, monkeypatch, width, height, told):
    monkeypatch.setattr(PngImageFile, "load", lambda self: pytest.fail("it was decoded"))
    limit = Image.MAX_IMAGE_PIXELS
    png_of_nothing(tmp_path / "bomb.png", width, height)
    for size in (None, 64):
        with pytest.raises(
            OSError, match=rf"bomb\.png has {told} pixels, more than 50 million\. Save it smaller"
        ):
            open_image(tmp_path / "bomb.png", size)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_a_large_jpeg_is_measured_before_it_is_drafted(tmp_path):
    """`size` would have it decoded at an eighth; the refusal goes by what the file says."""
    Image.new("L", (7_100, 7_100)).save(tmp_path / "x.jpg")
    with pytest.raises(OSError, match="7,100 × 7,100 pixels"):
        open_image(tmp_path / "x.jpg", 64)
    Image.new("L", (7_000, 7_000)).save(tmp_path / "x.jpg")
    assert open_image(tmp_path / "x.jpg", 64).size == (875, 875)


@pytest.mark.parametrize(
    "content", [b"", b"Dear diary", b"<html>no</html>", bytes(99)], ids=["", "text", "page", "0s"]
)
def test_no_picture_at_all(tmp_path, content):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(
        OSError, match=r"x\.jpg is no whole picture \(empty, or in no format .*choose another"
    ):
        open_image(tmp_path / "x.jpg")
    with pytest.raises(OSError, match=r"^This file is no whole picture \(empty, or in no format"):
        open_image(io.BytesIO(content))


def test_a_folder_is_no_picture(tmp_path):
    with pytest.raises(OSError, match=r"is no whole picture"):
        open_image(tmp_path)


@pytest.mark.parametrize("name", ["x.gif", "x.png", "x.webp"])
def test_the_first_frame_of_an_animation(tmp_path, name):
    blank = Image.new("RGB", (64, 32), "black")
    two_colours().save(tmp_path / name, save_all=True, append_images=[blank, blank], duration=40)
    assert Image.open(tmp_path / name).n_frames > 1
    assert_colours(open_image(tmp_path / name), {(5, 5): RED, (60, 5): BLUE})


BROKEN_EXIF = {
    "noise": b"Exif\0\0" + bytes(range(64)),
    "a directory beyond the end": b"Exif\0\0II*\0\xff\xff\xff\x7f",
    "an endless directory": b"Exif\0\0II*\0\x08\0\0\0\xff\xff"
    + b"\x12\x01\x03\0\xff\xff\xff\xff\x06\0\0\0" * 3,
    "cut off": b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12",
    "nothing": b"Exif\0\0",
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("exif", BROKEN_EXIF.values(), ids=BROKEN_EXIF)
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp"])
def test_broken_exif_says_nothing_against_the_pixels(tmp_path, exif, name):
    two_colours().save(tmp_path / name, exif=exif, quality=95)
    image = open_image(tmp_path / name)
    assert image.size == (64, 32)
    assert_colours(image, {(5, 5): RED, (60, 5): BLUE})


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    orientation=st.sampled_from([3, 6, 8]),
    at=st.integers(0, 200),
    junk=st.binary(min_size=1, max_size=8),
)
def test_flipped_bytes_in_exif_never_lose_the_picture(tmp_path, orientation, at, junk):
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x010E], exif[0x8298] = orientation, "a description", "somebody"
    block = exif.tobytes()
    at = 6 + at % (len(block) - 6)
    two_colours().save(
        tmp_path / "x.jpg", exif=block[:at] + junk + block[at + len(junk) :], quality=95
    )
    assert sorted(open_image(tmp_path / "x.jpg").size) == [32, 64]


# Errors


def test_a_missing_picture_and_a_cut_one(tmp_path, root):
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
    two_colours().save(root / "val2017" / "cut.png")
    cut = (root / "val2017" / "cut.png").read_bytes()[:60]
    (root / "val2017" / "cut.png").write_bytes(cut)
    with pytest.raises(OSError, match=r"cut\.png is no whole picture"):
        open_image(root / "val2017" / "cut.png")


def test_check_accepts_bytes_after_the_end(root):
    with CaptionedImages(root).path(3).open("ab") as file:
        file.write(b"some cameras append a trailer")
    CaptionedImages(root).check()


def test_missing_folder_and_missing_images(root):
    for image_id in IDS[:5]:
        (root / "val2017" / f"{image_id:012d}.jpg").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"5 of 12 images do not exist: .*000000000139\.jpg.* and 2 more"
    ):
        CaptionedImages(root).check()
    CaptionedImages(root).subset(IDS[5:]).check()
    shutil.rmtree(root / "val2017")
    with pytest.raises(FileNotFoundError, match=r"folder .*val2017 does not exist.*Notebook 01"):
        CaptionedImages(root).check()


def test_missing_annotation_file(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"captions_train2017\.json does not exist.*Notebook 01"
    ):
        CaptionedImages(tmp_path, "train2017")


def test_image_without_captions(root):
    edit(root, lambda data: data["images"].append(image_entry(999)))
    write_images(root, [999])
    images = CaptionedImages(root)
    i = images.image_ids.tolist().index(999)
    assert images.captions(i) == []
    for look in (images.check, lambda: images.caption(i, 0), lambda: images.draw(0)):
        with pytest.raises(ValueError, match=r"captions_val2017\.json has no caption for 999\b"):
            look()
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
    with pytest.raises(
        ValueError, match=r"captions_val2017\.json (is no whole JSON file|has no `images`)"
    ):
        CaptionedImages(root)


# The fingerprint that keys caches


def test_fingerprint(root):
    images = CaptionedImages(root)
    before = images.fingerprint()
    assert CaptionedImages(root, seed=5).fingerprint() == before
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


def split_ids(profile):
    return {
        name: set(load_split(profile, name).image_ids.tolist()) for name in ("train", "dev", "val")
    }


def test_splits_of_one_folder(root):
    splits = split_ids(profile(root))
    assert {name: len(ids) for name, ids in splits.items()} == {"train": 5, "dev": 3, "val": 4}
    assert set.union(*splits.values()) == set(IDS)
    assert splits == split_ids(profile(root, seed=7))
    assert load_split(profile(root, seed=7), "train").seed == 7
    assert splits["val"] != set(IDS[:4])  # by hash, not by number


def test_splits_of_two_folders(root):
    write_captions(root, {i: ["a cat"] for i in range(1, 11)}, "train2017")
    write_images(root, range(1, 11), "train2017")
    splits = split_ids(profile(root, train_folder="train2017", train_images=None, val_images=None))
    assert {name: len(ids) for name, ids in splits.items()} == {"train": 7, "dev": 3, "val": 12}
    assert splits["train"] | splits["dev"] == set(range(1, 11)) and splits["val"] == set(IDS)
    assert len(split_ids(profile(root, train_folder="train2017", train_images=8))["train"]) == 5


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(val=st.integers(1, 6), dev=st.integers(1, 6), train=st.integers(1, 6))
def test_splits_are_disjoint_or_refused(root, val, dev, train):
    row = profile(root, val_images=val, dev_images=dev, train_images=dev + train)
    if val + dev + train > len(IDS):
        with pytest.raises(
            ValueError, match="captions_val2017.json lists 12 images: the profile coco-val wants"
        ):
            load_split(row, "train")
    else:
        splits = split_ids(row)
        assert [len(splits[name]) for name in ("val", "dev", "train")] == [val, dev, train]
        assert len(set.union(*splits.values())) == val + dev + train


def test_split_names_and_checks(root):
    with pytest.raises(ValueError, match="no split 'test'. Choose one of: val, dev, train"):
        load_split(profile(root), "test")
    shutil.rmtree(root / "val2017")
    with pytest.raises(FileNotFoundError, match="val2017 does not exist"):
        load_split(profile(root), "val")


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
    assert len(known) >= 1 and all(
        known.image(i).width == known.image(i).height for i in range(len(known))
    )
