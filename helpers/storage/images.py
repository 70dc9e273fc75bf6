"""Opening a picture, whoever made it: grey, transparent, turned, broken or far too large."""

from __future__ import annotations

import contextlib
import os
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from helpers.storage.download import WHERE

MOST_PIXELS = (
    50_000_000  # of a picture, a few hundred megabytes once decoded; COCO's have some 300,000
)


def open_image(path, size: int | None = None) -> Image.Image:
    """The picture in a file (or file object) as upright RGB, transparent parts white; of an animation the first frame.

    `size`: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its resolution, several times faster, while both sides keep at
    least `size` pixels. Raises FileNotFoundError, or OSError for a file that is no whole picture or has more than
    `MOST_PIXELS`, which is refused before anything is decoded.
    """
    name = path if isinstance(path, (str, os.PathLike)) else getattr(path, "name", "This file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of corrupt EXIF, of large pictures: both are dealt with here
            with Image.open(path) as image:
                width, height = image.size  # as the header says
                if width * height > MOST_PIXELS:
                    raise Image.DecompressionBombError(f"({width:,} × {height:,} pixels)")
                return _as_rgb(image, size)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name} does not exist. {WHERE}") from None
    except (
        Image.DecompressionBombError
    ) as error:  # ours, or Pillow's for still larger ones: both say (… pixels)
        count = str(error).partition("(")[2].partition(")")[0]
        fix = "Save it smaller, or choose another picture."
        raise OSError(
            f"{name} has {count}, more than {MOST_PIXELS // 10**6} million. {fix}"
        ) from None
    except (
        Exception
    ) as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error …
        unknown = isinstance(error, UnidentifiedImageError)
        reason = (
            "empty, or in no format that Pillow reads" if unknown else error or type(error).__name__
        )
        fix = "Delete it and fetch or render it again, or choose another picture."
        raise OSError(f"{name} is no whole picture ({reason}). {fix}") from error


def _as_rgb(image: Image.Image, size: int | None) -> Image.Image:
    if size:
        image.draft("RGB", (size, size))
    image.load()
    with contextlib.suppress(
        Exception
    ):  # what is wrong with its EXIF says nothing against the pixels
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits: convert() would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info = {}  # the pixels are upright: an orientation left in here would turn them once more
    return image
