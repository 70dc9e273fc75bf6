"""The one way in for images, whoever made them: grey, transparent, turned, broken or too large."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from helpers.config import worker_threads
from helpers.storage.download import WHERE

# Some hundred megabytes once decoded; COCO's images have about 300,000.
MOST_PIXELS = 50_000_000
LARGEST = 800  # pixels of the longer side of an image that is shown


def open_image(path) -> Image.Image:
    """The image in a file (or file object), upright, RGB, transparent parts white.

    Of an animation the first frame. Always decoded in full: a JPEG read at half its resolution is
    faster, and gives other pixels and so another embedding. Raises
    FileNotFoundError, or OSError for a file that is no whole image or has more than `MOST_PIXELS`.
    """
    name = path if isinstance(path, (str, os.PathLike)) else getattr(path, "name", "This file")
    try:
        with warnings.catch_warnings():
            # Of broken EXIF and large images: both are dealt with here.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                width, height = image.size
                if width * height <= MOST_PIXELS:
                    return _as_rgb(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name} does not exist. {WHERE}") from None
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error …
    except Exception as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "empty, or in no format that Pillow reads" if unknown else error
        fix = "Delete it and fetch or render it again, or choose another picture."
        raise OSError(f"{name} is no whole picture ({reason}). {fix}") from error
    raise OSError(
        f"{name} has {width:,} × {height:,} pixels, more than {MOST_PIXELS:,}. Save it smaller."
    )


def _as_rgb(image: Image.Image) -> Image.Image:
    image.load()
    # What is wrong with its EXIF says nothing against the pixels.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    # 16 bits: convert() would clip at 255 instead of scaling.
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    # The pixels are upright: an orientation left in here would turn them once more.
    image.info = {}
    return image


def broken(paths) -> set:
    """Those of the files that hold no whole image: each is decoded, in several threads."""

    def fails(path):
        try:
            open_image(path)
        except OSError:
            return True
        return False

    looks = {"desc": "checking pictures", "total": len(paths), "file": sys.stdout, "delay": 2}
    failed = tqdm(prefetch(fails, paths), **looks)
    return {path for path, wrong in zip(paths, failed, strict=True) if wrong}


def shown(image: Image.Image) -> Image.Image:
    """The image, or one of at most `LARGEST` pixels a side: large photographs draw slowly."""
    if isinstance(image, Image.Image) and max(image.size) > LARGEST:
        image = image.copy()
        image.thumbnail((LARGEST, LARGEST))
    return image


def prefetch(load, items, workers=None, ahead=None):
    """load(item) for each item, in order, while threads work on the next `ahead` ones.

    Threads suffice: decoding and tokenising release Python's lock. And they work in notebooks on
    every system. An error of `items` comes after the results of what was begun before it.
    """
    workers = workers or worker_threads()
    ahead = ahead or workers
    waiting, items, failure = deque(), iter(items), None
    with ThreadPoolExecutor(workers) as pool:
        try:
            while failure is None:
                try:
                    waiting.append(pool.submit(load, next(items)))
                except Exception as error:
                    # The end of the items, too.
                    failure = error
                while len(waiting) > (ahead if failure is None else 0):
                    yield waiting.popleft().result()
        finally:
            # After an error, or when the reader stops: what has not begun never will.
            for future in waiting:
                future.cancel()
    if not isinstance(failure, StopIteration):
        raise failure
