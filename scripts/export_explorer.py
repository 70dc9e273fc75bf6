"""The explorer without Python: a dozen pictures with their maps, computed beforehand, in one HTML file."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path

import transformers
from PIL import Image

from helpers import load_or_build
from helpers.attention import (
    attention_flow,
    batches,
    depth,
    patch_grid,
    patches,
    pooling,
    raw_attention,
    record,
    relevance,
    rollout,
    word_scores,
)
from helpers.config import ROOT, Profile, get_profile
from helpers.storage.files import atomic_write
from helpers.viz.overlays import heat

TEMPLATE = Path(__file__).with_name("explorer.html")


def readings(tower, batch: dict) -> dict[str, list]:
    """Scores of a tower's tokens, each [B, N]: "raw" by layer and head (their mean first), "rollout" and "flow" through
    the first 1, 2, … layers."""
    attentions = record(tower, batch)
    layers, _, heads, tokens, _ = attentions.shape
    start = pooling(batch, tokens).cpu()
    raw = [
        raw_attention(attentions, start, layer, h)
        for layer in range(layers)
        for h in (None, *range(heads))
    ]
    deep = range(1, layers + 1)
    return {
        "raw": raw,
        "rollout": [rollout(attentions[:k], start) for k in deep],
        "flow": [attention_flow(attentions[:k], start) for k in deep],
    }


def measured(model, image, captions: list[str], other: str) -> dict:
    """A picture and what every method says of it, of its captions and of another picture's, ready for JSON.

    "maps" {method: [one map a setting]}, "captions" [{"own", "words", "scores" {method: …}, "special" {method: …},
    "relevance" [one map a setting]}]; relevance is by the last 1, 2, … layers.
    """
    captions = [*captions, other]
    seen, _ = batches(model, [image], captions[:1])
    many, read = batches(model, [image] * len(captions), captions)

    def maps(scores):
        return [
            rounded(patch_grid(model.image_tower, seen["pixel_values"], row[:1]).flatten())
            for row in scores
        ]

    texts = readings(model.text_tower, read)
    layers, _ = depth(model.image_tower)
    pairs = [relevance(model, many, read, slice(-k, None)) for k in range(1, layers + 1)]
    texts["relevance"] = [of_tokens for _, of_tokens, _ in pairs]
    told = {
        name: [word_scores(model.text_tower, read["input_ids"], row) for row in rows]
        for name, rows in texts.items()
    }
    return {
        "src": jpeg(image),
        "maps": {name: maps(rows) for name, rows in readings(model.image_tower, seen).items()},
        "captions": [
            {
                "text": caption,
                "own": c + 1 < len(captions),
                "cosine": round(float(pairs[-1][2][c]), 3),
                "words": told["raw"][0][c].words,
                "scores": {
                    name: [rounded(row[c].scores) for row in rows] for name, rows in told.items()
                },
                "special": {
                    name: [round(row[c].special, 3) for row in rows] for name, rows in told.items()
                },
                "relevance": maps([of_patches[c : c + 1] for of_patches, _, _ in pairs]),
            }
            for c, caption in enumerate(captions)
        ],
    }


def rounded(values) -> list[float]:
    """Three digits of each: what a picture can show, at a third of the size."""
    return [float(f"{value:.3g}") for value in values.tolist()]


def jpeg(image: Image.Image) -> str:
    """A picture as the address of an <img>, 360 pixels at most."""
    image = image.convert("RGB")
    image.thumbnail((360, 360))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def page(model, images: list, captions: list[list[str]], credit: str = "") -> str:
    """The explorer's page over some pictures, each with its captions and one of the next picture's.

    HTML that needs nothing else: no network, no other file.
    """
    others = [told[0] for told in captions[1:] + captions[:1]]
    layers, heads = depth(model.image_tower)
    data = {
        "grid": list(patches(model.image_tower)),
        "layers": layers,
        "heads": heads,
        "palette": [[round(255 * part) for part in heat(1.0)(i)[:3]] for i in range(0, 256, 4)],
        "pictures": [measured(model, *row) for row in zip(images, captions, others, strict=True)],
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    text = text.replace("</", "<\\/")  # stays inside its <script>
    return (
        TEMPLATE.read_text(encoding="utf-8")
        .replace("%CREDIT%", html.escape(credit))
        .replace("%DATA%", text)
    )


def write_page(profile: Profile, path: Path, count: int = 12) -> Path:
    """Writes the page over the first pictures of val, by the last of the profile's models; returns its path."""
    model = list(load_or_build.models(profile).values())[-1][0]
    images = load_or_build.data(profile, "val")
    told = [list(dict.fromkeys(images.captions(i)))[:3] for i in range(count)]
    credit = (
        "Pictures made from OpenMoji's drawings, CC BY-SA 4.0."
        if profile.rendered
        else "Pictures: COCO 2017."
    )
    atomic_write(path, page(model, [images.image(i) for i in range(count)], told, credit))
    return path


def main() -> None:
    transformers.logging.set_verbosity_error()
    path = write_page(get_profile(), ROOT / "build" / "explorer.html")
    print(
        f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e6:.1f} MB, to be opened in any browser"
    )


if __name__ == "__main__":
    main()
