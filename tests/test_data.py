"""helpers/data.py against hand-written files in COCO's format and torchvision's CocoCaptions."""

import io
import json
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from torchvision.datasets import CocoCaptions

from helpers.data import CaptionedImages, Examples, load_split, splitmix64
from helpers.data import draw_captions as draw
from helpers.data import visiting_order as visit
from helpers.storage.images import open_image
from tests import coco_files
from tests.coco_files import IDS, image_entry, profile, write_captions, write_images


@pytest.fixture
def root(tmp_path):
    return coco_files.write_twelve(tmp_path)


def edit(root, change):
    path = root / "annotations" / "captions_val2017.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


# Reading


def test_images_captions_and_subsets(root):
    images = CaptionedImages(root).check()
    oracle = CocoCaptions(root / "val2017", root / "annotations" / "captions_val2017.json")
    assert images.image_ids.tolist() == oracle.ids
    for i, (image, _) in enumerate(oracle):
        rows = sorted(oracle.coco.imgToAnns[oracle.ids[i]], key=lambda row: row["id"])
        assert images.captions(i) == [row["caption"] for row in rows]
        assert np.array_equal(images.image(i), image)
    texts, owners = images.all_captions()
    assert len(images) == len(IDS) and len(texts) == len(owners) == sum(4 + i % 3 for i in IDS)
    for i in range(len(images)):
        assert [texts[m] for m in np.flatnonzero(owners == i)] == images.captions(i)
    part = images.subset([785, 139])
    assert part.image_ids.tolist() == [139, 785] and part.counts.tolist() == [5, 6]
    assert part.captions(1) == images.captions(images.image_ids.tolist().index(785))


# What a training step sees


SEEDS, SETS = st.integers(-(2**63), 2**63 - 1), st.sets(st.integers(0, 2**63 - 1), max_size=60)


@given(seed=SEEDS, epoch=st.integers(0, 10_000), ids=SETS)
def test_order_and_captions_follow_from_seed_epoch_and_id(seed, epoch, ids):
    ids = np.array(sorted(ids), np.int64)
    counts = np.full(len(ids), 5)
    order, drawn = visit(seed, epoch, ids), draw(seed, epoch, ids, counts)
    assert sorted(order) == list(range(len(ids)))
    assert ((drawn >= 0) & (drawn < counts)).all()
    # The other images present change nothing.
    assert (draw(seed, epoch, ids[::2], counts[::2]) == drawn[::2]).all()
    assert visit(seed, epoch, ids[::2]).tolist() == [i // 2 for i in order if i % 2 == 0]


def test_hash_is_splitmix64():
    # The first outputs of splitmix64 seeded with 1234567, as published with xoshiro.
    golden, state = 0x9E3779B97F4A7C15, 1234567
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [int(splitmix64(state + k * golden & 2**64 - 1)[0]) for k in range(3)] == known


def test_seeds_and_epochs_differ_and_captions_are_drawn_evenly():
    ids = np.arange(5_000) * 7
    for other in ((0, 1), (1, 0)):
        assert (visit(0, 0, ids) != visit(*other, ids)).mean() > 0.99
    drawn = np.stack([draw(0, epoch, ids, 5) for epoch in range(5)])
    assert 0.75 < (drawn[0] != drawn[1]).mean() < 0.85
    assert np.allclose(np.bincount(drawn.flat) / drawn.size, 0.2, atol=0.01)


def preprocess(image, box):
    return torch.from_numpy(np.array(image.resize((8, 8), box=box))).permute(2, 0, 1)


def epoch_of(examples, epoch, which, part=(0, 1)):
    """Image ids, captions and pixels of some batches of four images, one after the other."""
    model = Mock(image_tower=Mock(size=8, preprocess=preprocess))
    model.text_tower.tokenize = lambda texts: {"captions": texts}
    batches = list(examples.batches(model, ("image", "text"), 3, epoch, 4, which, part))
    pixels = torch.cat([batch["pixel_values"] for batch in batches])
    captions = [caption for batch in batches for caption in batch["captions"]]
    return torch.cat([batch["image_ids"] for batch in batches]).tolist(), captions, pixels


def test_batches_are_those_of_the_hash(root):
    images = CaptionedImages(root)
    examples = Examples(images)
    for epoch in (1, 2):
        ids, captions, pixels = epoch_of(examples, epoch, range(3))
        order = visit(3, epoch, images.image_ids)
        picks = draw(3, epoch, images.image_ids, images.counts)
        assert ids == images.image_ids[order].tolist()
        assert captions == [images.captions(i)[picks[i]] for i in order]
        assert pixels.shape == (12, 3, 8, 8) and pixels.dtype == torch.uint8
        # Resumed at the last batch; the second of two processes.
        for which, part, rows in (([2], (0, 1), slice(8, 12)), ([1], (1, 2), slice(6, 8))):
            some = epoch_of(examples, epoch, which, part)
            assert some[:2] == (ids[rows], captions[rows]) and some[2].equal(pixels[rows])


# Images

ORIENTATION = 0x0112  # the EXIF tag
RED, BLUE, BLACK, WHITE = (254, 0, 0), (0, 0, 254), (0, 0, 0), (255, 255, 255)  # as JPEG has them
LEFT, RIGHT = (5, 5), (60, 5)


def halves(left=RED, right=BLUE, mode="RGB"):
    """Left half red, right half blue."""
    image = Image.new(mode, (64, 32), right)
    image.paste(left, (0, 0, 32, 32))
    return image


def assert_halves(image, left=RED, right=BLUE, places=(LEFT, RIGHT)):
    assert image.mode == "RGB"
    for place, colour in zip(places, (left, right)):
        assert np.allclose(image.getpixel(place), colour, atol=6), place


MORE = {"save_all": True, "append_images": [Image.new("RGB", (64, 32))]}
ANIMATED = dict.fromkeys([".apng", ".gif", ".webp"], MORE)
READ = [
    ("RGB.jpg CMYK.jpg RGBA.png P.png RGB.apng RGB.webp P.gif", halves(), (RED, BLUE)),
    ("L.jpg L.png LA.png 1.png", halves(BLACK, WHITE), (BLACK, WHITE)),
    ("RGBA.png LA.png P.png", halves((0, 0, 0, 255), (0, 0, 0, 0), "RGBA"), (BLACK, WHITE)),
    # 16 bits, to be scaled and not clipped.
    ("I;16.png", Image.new("I;16", (64, 32), 128 * 256), [(128, 128, 128)] * 2),
]


@pytest.mark.parametrize("names, image, colours", READ)
def test_modes_transparent_parts_and_the_first_frame(tmp_path, names, image, colours):
    for path in map(tmp_path.joinpath, names.split()):
        image.convert(path.stem).save(path, **ANIMATED.get(path.suffix, {}))
        saved = Image.open(path)
        assert saved.mode == path.stem
        assert (getattr(saved, "n_frames", 1) > 1) == (path.suffix in ANIMATED)
        assert_halves(open_image(path), *colours)


TURNED = [(1, (LEFT, RIGHT)), (3, (RIGHT, LEFT)), (6, (LEFT, (5, 60))), (8, ((5, 60), LEFT))]


@pytest.mark.parametrize("orientation, places", TURNED)
def test_exif_turns_the_image_upright(tmp_path, orientation, places):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    halves().save(tmp_path / "x.jpg", exif=exif, quality=95)
    image = open_image(tmp_path / "x.jpg")
    assert image.size == ((64, 32) if orientation < 5 else (32, 64))
    assert_halves(image, places=places)
    # Not to be turned again.
    assert image.getexif().get(ORIENTATION, 1) == 1


BOMBS = {
    (10_000, 5_001): "has 10,000 × 5,001 pixels, more than 50,000,000. Save it smaller",
    (10_000, 10_000): "has 10,000 × 10,000 pixels",
    (20_000, 10_000): r"is no whole picture \(Image size \(200000000 pixels\) exceeds",
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("width, height", BOMBS)
def test_too_many_pixels_are_refused_before_decoding(tmp_path, monkeypatch, width, height):
    path = tmp_path / "bomb.png"
    Image.new("1", (width, height)).save(path)
    monkeypatch.setattr(PngImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(OSError, match=rf"bomb\.png {BOMBS[width, height]}"):
        open_image(path)


NOISE, CUT = bytes(range(64)), b"MM\0*\0\0\0\x08\0\x05\x01\x12"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("exif", [NOISE, CUT], ids=["noise", "cut"])
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp"])
def test_broken_exif_says_nothing_against_the_pixels(tmp_path, exif, name):
    halves().save(tmp_path / name, exif=b"Exif\0\0" + exif, quality=95)
    assert_halves(open_image(tmp_path / name))


# Errors


def test_cut_images_and_what_is_none(root):
    path = CaptionedImages(root).path(3)
    whole = path.read_bytes()
    for content in (b"", b"<html>no</html>", bytes(99), whole[:10], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(OSError, match=rf"{path.name} is no whole picture .*Delete it"):
            open_image(path)
        with pytest.raises(OSError, match="^This file is no whole picture"):
            open_image(io.BytesIO(content))


def test_missing_folder_files_and_images(root):
    with pytest.raises(FileNotFoundError, match=r"no\.jpg does not exist.*CLIP_COCO_DIR"):
        open_image(root / "no.jpg")
    for image_id in IDS[:5]:
        (root / "val2017" / f"{image_id:012d}.jpg").unlink()
    message = r"5 of 12 images do not exist: .*000000000139\.jpg.* and 2 more"
    with pytest.raises(FileNotFoundError, match=message):
        CaptionedImages(root).check()
    CaptionedImages(root).subset(IDS[5:]).check()
    (root / "val2017").rename(root / "elsewhere")
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


WRONG = {
    "has no `images`": lambda data: data.pop("images"),
    "lacks 'caption'": lambda data: data["annotations"][0].pop("caption"),
    "lacks 140": lambda data: data["annotations"][0].update(image_id=140),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_annotation_file(root, message):
    edit(root, WRONG[message])
    with pytest.raises(ValueError, match=rf"captions_val2017\.json.*{message}"):
        CaptionedImages(root)


def test_an_annotation_file_that_is_cut_off(root):
    (root / "annotations" / "captions_val2017.json").write_text('{"images": [')
    with pytest.raises(ValueError, match=r"val2017\.json is no whole JSON file"):
        CaptionedImages(root)


# Splits


def split_ids(root, sizes, **changes):
    """The image ids of each split, of the sizes expected and without common ids in one folder."""
    row = profile(root, **changes)
    splits = [set(load_split(row, name).image_ids.tolist()) for name in ("train", "dev", "val")]
    assert [len(ids) for ids in splits] == sizes
    return splits


def test_splits_of_one_folder_and_of_two(root):
    splits = split_ids(root, [5, 3, 4])
    assert set.union(*splits) == set(IDS)
    assert splits == split_ids(root, [5, 3, 4], seed=7)
    # By hash, not by number.
    assert splits[2] != set(IDS[:4])
    write_captions(root, {i: ["a cat"] for i in range(1, 11)}, "train2017")
    write_images(root, range(1, 11), "train2017")
    two = {"train_folder": "train2017", "dev_folder": "train2017", "val_images": None}
    train, dev, val = split_ids(root, [7, 3, 12], **two, train_images=None)
    assert train | dev == set(range(1, 11)) and val == set(IDS)
    split_ids(root, [5, 3, 12], **two)


def test_too_few_images_for_the_splits_are_refused(root):
    message = "val2017.json is short: train wants 6 of 12 images, 5 left"
    with pytest.raises(ValueError, match=message):
        load_split(profile(root, train_images=6), "train")
