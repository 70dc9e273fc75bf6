"""Features: what comes out, the cache, captions that are refused, and loading in the background."""

import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save
from transformers import BertTokenizerFast

from helpers import features
from helpers.data import CaptionedImages
from helpers.encoders import ImageTower
from helpers.features import embed_images, embed_texts, extract_embeddings
from helpers.storage.caption_files import refuse_unknown_words
from helpers.storage.images import open_image, prefetch
from tests.tiny import WORDS, image_tower, text_tower, write_dataset


@pytest.fixture
def dataset(tmp_path):
    """Ten images: two shards, of two batches each."""
    write_dataset(tmp_path / "coco")
    return CaptionedImages(tmp_path / "coco", "val2017")


def extract(dataset, cache=None, image=None, text=None, **options):
    """The embeddings, and how many images and captions went through the towers for them."""
    image, text = image or image_tower(), text or text_tower()
    rows = {image: 0, text: 0}

    def count(tower, args, output):
        rows[tower] += len(output)

    for tower in rows:
        tower.register_forward_hook(count)
    options = {"batch_size": 3, "shard_size": 6, "progress": False, **options}
    cache = cache or dataset.root.parent / "cache"
    return extract_embeddings(image, text, dataset, cache, **options), list(rows.values())


# What comes out


def test_embeddings_equal_one_by_one_forward_passes(dataset):
    image, text = image_tower(hidden_dropout_prob=0.5).train(), text_tower().train()
    embeddings, rows = extract(dataset, image=image, text=text)
    assert image.training and text.training
    image.eval()
    text.eval()
    with torch.inference_mode():
        for i, embed in enumerate(embeddings.image_embeds):
            pixels = image.preprocess(dataset.image(i))
            torch.testing.assert_close(embed, image(pixels[None])[0])
        for caption, embed in zip(embeddings.captions, embeddings.text_embeds, strict=True):
            torch.testing.assert_close(embed, text(**text.tokenize([caption]))[0])
    captions, owner = dataset.all_captions()
    assert embeddings.captions == captions and embeddings.owner.tolist() == owner.tolist()
    assert rows == [10, len(set(captions))] and rows[1] < len(captions), "each distinct one once"
    assert embeddings.image_ids.tolist() == list(range(100, 110))
    for embeds in (embeddings.image_embeds, embeddings.text_embeds):
        assert embeds.dtype == torch.float32 and not embeds.is_inference()


def test_batches_of_captions_need_little_padding():
    rng, tower, widths = np.random.default_rng(0), text_tower(max_length=32), []
    texts = [" ".join(rng.choice(WORDS, n)) for n in rng.integers(1, 20, 200)]
    tower.register_forward_hook(
        lambda m, a, kw, out: widths.append(kw["input_ids"].numel()), with_kwargs=True
    )
    embed_texts(tower, texts, batch_size=10)
    needed = sum(len(text.split()) + 2 for text in set(texts))
    assert needed <= sum(widths) < 1.1 * needed


def test_embed_images_takes_datasets_and_lists_and_none_at_all(dataset):
    tower = image_tower()
    images = [dataset.image(i) for i in range(len(dataset))]
    expected = embed_images(tower, dataset, batch_size=4)
    torch.testing.assert_close(embed_images(tower, images, batch_size=3), expected)
    assert embed_images(tower, []).shape == embed_texts(text_tower(), []).shape == (0, 16)


# Captions that a tokenizer does not know


def test_a_fifth_of_unknown_words_is_refused_with_examples_before_anything_is_embedded(dataset):
    image, text = image_tower(), text_tower()
    # What BertTokenizerFast.from_pretrained makes of a folder without tokenizer files.
    text.tokenizer = BertTokenizerFast()
    for tower in (image, text):
        tower.register_forward_pre_hook(lambda *_: pytest.fail("embedded"))
    with pytest.raises(ValueError, match="vocabulary of 5 lacks 100% .*'a dog', ") as error:
        extract(dataset, image=image, text=text)
    assert not (dataset.root.parent / "cache").exists()
    assert sum(repr(text) in str(error.value) for text in set(dataset.all_captions()[0])) == 3


def test_the_share_is_of_words_not_of_their_pieces():
    tower = text_tower(words=[*WORDS, "##s"], max_length=32)
    for text in ("a red dog runs and zebra", "dogs dogs dogs dogs dogs zebra"):
        refuse_unknown_words(tower, [text, text])
    for text in ("a red dog runs zebra", "dogs dogs dogs dogs zebra"):
        with pytest.raises(ValueError, match="lacks 20% of"):
            refuse_unknown_words(tower, [text, text])


# The cache


def test_second_run_reads_the_cache(dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(features, "DELAY", 0)
    towers = {"image": image_tower(), "text": text_tower()}
    first, rows = extract(dataset, **towers, progress=True)
    out, err = capsys.readouterr()
    assert "images and captions" in out and "100%" in out and err == ""
    assert rows[0] == 10 and rows[1] > 10
    again, rows = extract(dataset, **towers)  # whose tokenizer remembers what it was asked
    assert rows == [0, 0] and not list(tmp_path.rglob("*.tmp"))
    assert torch.equal(first.image_embeds, again.image_embeds)
    assert torch.equal(first.text_embeds, again.text_embeds)


def nudged(tower, **changes):
    """The tower with one weight of thousands changed, or with other attributes."""
    if not changes:
        list(tower.parameters())[-1].data.view(-1)[3] += 0.01
    for name, value in changes.items():
        setattr(tower, name, value)
    return tower


@pytest.mark.parametrize(
    "tower",
    [
        nudged(image_tower()),
        image_tower(mean=0.4),
        image_tower(size=24),
        nudged(image_tower(), pooling="max"),
        nudged(text_tower()),
        text_tower(max_length=5),
        text_tower(words=WORDS[::-1]),
        nudged(text_tower(), pooling="max"),
    ],
)
def test_another_tower_never_meets_a_stale_cache(dataset, tower):
    extract(dataset)
    of_images = isinstance(tower, ImageTower)
    _, rows = extract(dataset, **{"image" if of_images else "text": tower})
    assert (rows[0] == 10, rows[1] > 10) == (of_images, not of_images)


def test_changed_data_never_meets_a_stale_cache(dataset):
    extract(dataset)
    Image.new("RGB", (30, 30), "red").save(dataset.path(4))  # of another size in bytes
    second, rows = extract(dataset)
    assert rows == [10, 0]
    alone = embed_images(image_tower(), [open_image(dataset.path(4))])[0]
    torch.testing.assert_close(second.image_embeds[4], alone)

    file = dataset.annotation_file
    file.write_text(file.read_text().replace('"a dog"', '"a cat"', 1))
    reworded = CaptionedImages(dataset.root, "val2017")
    third, rows = extract(reworded)
    assert rows[1] > 10 and third.captions[0] == "a cat"
    torch.testing.assert_close(third.text_embeds[0], embed_texts(text_tower(), ["a cat"])[0])

    part, rows = extract(reworded.subset([101, 105]))
    assert rows[0] == 2 and part.image_ids.tolist() == [101, 105]


def other_shape(data):
    return save({"features": torch.zeros(6, 15)})


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b"", other_shape])
def test_shard_that_is_damaged_is_computed_again_and_no_other(dataset, tmp_path, damage):
    first, _ = extract(dataset)
    shard = sorted(tmp_path.glob("cache/images-*/*.safetensors"))[0]  # 6 of the 10 images
    whole = shard.read_bytes()
    shard.write_bytes(damage(whole))
    second, rows = extract(dataset)
    assert rows == [6, 0] and torch.equal(first.image_embeds, second.image_embeds)
    assert shard.read_bytes() == whole


def test_broken_picture_is_named_and_nothing_hangs(dataset, tmp_path):
    path = dataset.path(8)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(OSError, match=path.name):
        extract(dataset)
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]
    shards = list(tmp_path.glob("cache/images-*/*.safetensors"))
    assert len(shards) == 1, "the shard before it is kept"


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
