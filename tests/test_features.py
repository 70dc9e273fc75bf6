import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from helpers import features
from helpers.data import CaptionedImages
from helpers.encoders import ImageTower, TextTower
from helpers.features import (
    _read_shard,
    _write_shard,
    embed_images,
    embed_texts,
    extract_embeddings,
    prefetch,
)
from tests.tiny import WORDS, image_tower, text_tower, write_dataset

OPTIONS = {
    "batch_size": 3,
    "shard_size": 6,
    "progress": False,
}  # 10 images: two shards, of two batches each


@pytest.fixture
def dataset(tmp_path):
    write_dataset(tmp_path / "coco")
    return CaptionedImages(tmp_path / "coco", "val2017")


@contextmanager
def counted(*towers):
    """How many rows each tower embeds."""
    rows = [0] * len(towers)

    def count(k):
        def hook(module, args, kwargs, output):
            rows[k] += len(output)

        return hook

    handles = [
        tower.register_forward_hook(count(k), with_kwargs=True) for k, tower in enumerate(towers)
    ]
    yield rows
    for handle in handles:
        handle.remove()


def extract(dataset, cache, image=None, text=None, **options):
    """The embeddings, and how many images and captions went through the towers for them."""
    image, text = image or image_tower(), text or text_tower()
    with counted(image, text) as rows:
        embeddings = extract_embeddings(image, text, dataset, cache, **{**OPTIONS, **options})
    return embeddings, rows


# What comes out


def test_embeddings_equal_one_by_one_forward_passes(dataset, tmp_path):
    image, text = image_tower(), text_tower()
    embeddings, _ = extract(dataset, tmp_path / "cache", image, text)
    image.eval(), text.eval()
    with torch.inference_mode():
        for i, embed in enumerate(features.image_embeds):
            picture = image.preprocess(dataset.image(i, size=16))
            torch.testing.assert_close(embed, image(picture[None])[0])
        for caption, embed in zip(features.captions, features.text_embeds, strict=True):
            torch.testing.assert_close(embed, text(**text.tokenize([caption]))[0])
    captions, owner = dataset.all_captions()
    assert features.captions == captions and features.owner.tolist() == owner.tolist()
    assert features.image_ids.tolist() == list(range(100, 110))
    assert features.image_embeds.dtype == features.text_embeds.dtype == torch.float32
    assert not features.image_embeds.is_inference() and not features.text_embeds.is_inference()


def test_each_distinct_caption_is_embedded_once(dataset, tmp_path):
    embeddings, (images, captions) = extract(dataset, tmp_path / "cache")
    assert len(features.captions) == 30 and images == 10
    assert captions == len(set(features.captions)) < 30


def test_batches_of_captions_need_little_padding():
    rng, tower, widths = np.random.default_rng(0), text_tower(max_length=32), []
    texts = [" ".join(rng.choice(WORDS, n)) for n in rng.integers(1, 20, 200)]
    tower.register_forward_hook(
        lambda m, a, kw, out: widths.append(kw["input_ids"].numel()), with_kwargs=True
    )
    embed_texts(tower, texts, batch_size=10)
    needed = sum(len(text.split()) + 2 for text in set(texts))
    assert needed <= sum(widths) < 1.1 * needed


def test_embed_images_takes_datasets_paths_and_pictures(dataset):
    tower = image_tower()
    paths = [dataset.path(i) for i in range(len(dataset))]
    expected = embed_images(tower, dataset, batch_size=4)
    torch.testing.assert_close(embed_images(tower, paths, batch_size=3), expected)
    pictures = [dataset.image(i, size=16) for i in range(len(dataset))]
    torch.testing.assert_close(embed_images(tower, pictures), expected)
    assert embed_images(tower, []).shape == (0, 16) and embed_texts(text_tower(), []).shape == (
        0,
        16,
    )


def test_modes_and_gradients_are_left_as_they_were(dataset, tmp_path):
    image, text = image_tower().train(), text_tower().eval()
    image.model.layernorm.eval()
    before = [module.training for module in image.modules()]
    seen = []
    image.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    embeddings, _ = extract(dataset, tmp_path / "cache", image, text)
    assert seen and not any(seen), "embedded in eval mode"
    assert [module.training for module in image.modules()] == before and not text.training
    assert all(weight.requires_grad for weight in image.parameters())
    nn.Linear(16, 2)(features.image_embeds).sum().backward()  # as training the heads does


def test_progress_goes_to_stdout(dataset, tmp_path, capsys):
    extract(dataset, tmp_path / "cache", progress=True)
    out, err = capsys.readouterr()
    assert "images" in out and "10/10" in out and "captions" in out and err == ""


# The cache


def test_second_run_reads_the_cache(dataset, tmp_path):
    first, rows = extract(dataset, tmp_path / "cache")
    assert rows[0] == 10 and rows[1] > 10
    again, rows = extract(dataset, tmp_path / "cache")
    assert rows == [0, 0]
    assert torch.equal(first.image_embeds, again.image_embeds) and torch.equal(
        first.text_embeds, again.text_embeds
    )
    assert not list(tmp_path.rglob("*.tmp"))


def test_changed_weights_never_meet_a_stale_cache(dataset, tmp_path):
    first, all_rows = extract(dataset, tmp_path / "cache")
    changed = image_tower()
    with torch.no_grad():
        changed.model.layernorm.bias[3] += 0.01
    second, rows = extract(dataset, tmp_path / "cache", image=changed)
    assert rows == [10, 0] and not torch.equal(first.image_embeds, second.image_embeds)
    assert extract(dataset, tmp_path / "cache", text=text_tower(seed=1))[1] == [0, all_rows[1]]


def test_changed_data_never_meets_a_stale_cache(dataset, tmp_path):
    extract(dataset, tmp_path / "cache")
    Image.new("RGB", (30, 30), "red").save(dataset.path(4))  # a picture of another size in bytes
    second, rows = extract(dataset, tmp_path / "cache")
    assert rows == [10, 0]
    torch.testing.assert_close(
        second.image_embeds[4], embed_images(image_tower(), [dataset.path(4)])[0]
    )

    file = dataset.annotation_file
    file.write_text(file.read_text().replace('"a dog"', '"a cat"', 1))
    reworded = CaptionedImages(dataset.root, "val2017")
    third, rows = extract(reworded, tmp_path / "cache")
    assert rows[1] > 10 and third.captions[0] == "a cat"
    torch.testing.assert_close(third.text_embeds[0], embed_texts(text_tower(), ["a cat"])[0])

    part, rows = extract(reworded.subset([101, 105]), tmp_path / "cache")
    assert rows[0] == 2 and part.image_ids.tolist() == [101, 105]


@pytest.mark.parametrize(
    "image, text, changed",
    [
        ({"mean": 0.4}, {}, "images"),
        ({"size": 24}, {}, "images"),
        ({}, {"max_length": 5}, "captions"),
        ({}, {"words": WORDS[::-1]}, "captions"),
    ],
)
def test_changed_preprocessing_never_meets_a_stale_cache(dataset, tmp_path, image, text, changed):
    extract(dataset, tmp_path / "cache")
    _, rows = extract(dataset, tmp_path / "cache", image_tower(**image), text_tower(**text))
    assert (rows[0] == 10, rows[1] > 10) == (changed == "images", changed == "captions")


@pytest.mark.parametrize("tower", [ImageTower, TextTower])
def test_changed_pooling_never_meets_a_stale_cache(dataset, tmp_path, tower, monkeypatch):
    extract(dataset, tmp_path / "cache")
    monkeypatch.setattr(tower, "pooling", "max")
    _, rows = extract(dataset, tmp_path / "cache")
    assert (rows[0] > 0, rows[1] > 0) == (tower is ImageTower, tower is TextTower)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-100], lambda data: b"", lambda data: data[:-1] + b"\x99"]
)
def test_damaged_shard_is_computed_again_and_no_other(dataset, tmp_path, damage):
    first, _ = extract(dataset, tmp_path / "cache")
    shard = sorted(tmp_path.glob("cache/images-*/*.safetensors"))[0]  # 6 of the 10 images
    whole = shard.read_bytes()
    shard.write_bytes(damage(whole))
    second, rows = extract(dataset, tmp_path / "cache")
    assert rows == [6, 0] and torch.equal(first.image_embeds, second.image_embeds)
    assert shard.read_bytes() == whole


def test_a_flip_of_any_byte_of_a_shard_is_noticed(tmp_path):
    rows, features = np.arange(2), torch.randn(2, 4)
    _write_shard(tmp_path, rows, features)
    [shard] = tmp_path.iterdir()
    whole, read = shard.read_bytes(), torch.empty(2, 4)
    assert _read_shard(tmp_path, rows, read) and torch.equal(read, features)
    for i, byte in enumerate(whole):
        shard.write_bytes(whole[:i] + bytes([byte ^ 1]) + whole[i + 1 :])
        read = torch.empty(2, 4)
        assert not _read_shard(tmp_path, rows, read) or torch.equal(read, features), f"byte {i}"


def test_shard_size_may_change(dataset, tmp_path):
    first, _ = extract(dataset, tmp_path / "cache")
    second, _ = extract(dataset, tmp_path / "cache", shard_size=4, batch_size=5)
    torch.testing.assert_close(first.image_embeds, second.image_embeds)
    torch.testing.assert_close(first.text_embeds, second.text_embeds)


def test_killed_run_resumes_after_its_last_finished_shard(dataset, tmp_path):
    """A process is killed (SIGKILL) in the middle of the second shard of images; the next run embeds the other four."""
    code = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from tests.test_features import *\n"
        "tower, calls = image_tower(), []\n"
        "def die(*_):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 4:\n"
        "        while not list(Path(sys.argv[2]).glob('images-*/*.safetensors')): time.sleep(0.01)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "tower.register_forward_pre_hook(die)\n"
        "extract_embeddings(tower, text_tower(), CaptionedImages(sys.argv[1]), Path(sys.argv[2]), **OPTIONS)\n"
    )
    command = [sys.executable, "-c", code, str(dataset.root), str(tmp_path / "cache")]
    killed = subprocess.run(command, cwd=Path(__file__).parent.parent, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob("cache/images-*/*"))) == 1, "one whole shard and nothing else"
    resumed, rows = extract(dataset, tmp_path / "cache")
    assert rows[0] == 4, "the finished shard of six images is not computed again"
    torch.testing.assert_close(resumed.image_embeds, embed_images(image_tower(), dataset))


def test_broken_picture_is_named_and_nothing_hangs(dataset, tmp_path):
    path = dataset.path(8)
    path.write_bytes(path.read_bytes()[:200])
    threads = threading.active_count()
    with pytest.raises(OSError, match=path.name):
        extract(dataset, tmp_path / "cache")
    assert threading.active_count() == threads
    assert len(list(tmp_path.glob("cache/images-*/*.safetensors"))) == 1, (
        "the shard before it is kept"
    )


# Loading in the background


def test_prefetch_keeps_order_and_loads_only_a_little_ahead():
    loaded = []

    def load(i):
        time.sleep(0.002 * (i % 3))
        loaded.append(i)
        return i * i

    for n, value in enumerate(prefetch(load, range(20), workers=4, ahead=3)):
        assert value == n * n
        assert len(loaded) <= n + 1 + 3
    assert sorted(loaded) == list(range(20))


def test_prefetch_stops_when_its_reader_does():
    threads, loaded = threading.active_count(), []
    stream = prefetch(loaded.append, range(1000), workers=2, ahead=4)
    next(stream)
    stream.close()
    assert len(loaded) <= 5 and threading.active_count() == threads


def test_prefetch_passes_errors_on():
    stream = prefetch(lambda i: 1 // (2 - i), range(9), workers=2)
    assert next(stream) == 0 and next(stream) == 1
    with pytest.raises(ZeroDivisionError):
        next(stream)


def test_prefetch_gives_what_was_begun_before_its_source_failed():
    def source():
        yield from (1, 2)
        raise OSError("a broken picture")

    got = []
    with pytest.raises(OSError, match="a broken picture"):
        for value in prefetch(lambda i: 10 * i, source(), workers=2, ahead=4):
            got.append(value)
    assert got == [10, 20]


def test_on_a_cpu_each_batch_has_one_thread(dataset, monkeypatch):
    monkeypatch.setattr(features, "ON_CPU", 2)
    monkeypatch.setattr(features, "pick_device", lambda: torch.device("cpu"))
    tower, seen, threads = image_tower(), [], torch.get_num_threads()
    tower.register_forward_hook(
        lambda _, args, output: seen.append((len(output), torch.get_num_threads()))
    )
    torch.set_num_threads(3)
    try:
        found = embed_images(tower, dataset)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert set(seen) == {(2, 1)} and 2 * len(seen) == len(dataset)
    pixels = torch.stack(
        [tower.preprocess(dataset.image(i, tower.size)) for i in range(len(dataset))]
    )
    with torch.inference_mode():
        torch.testing.assert_close(found, tower(pixels))
