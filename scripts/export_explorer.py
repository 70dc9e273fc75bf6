"""The explorer without Python: a dozen images with their maps, computed beforehand, in one file.

python -m scripts.export_explorer writes build/explorer.html, which needs no network.
"""

import base64
import html
import io
import json
from pathlib import Path

import transformers
from PIL import Image

from helpers import load_or_build
from helpers.attention import compare, patch_grid, token_scores, word_scores
from helpers.config import ROOT, Profile, get_profile
from helpers.storage.files import atomic_write
from helpers.viz.overlays import heat

TEMPLATE = Path(__file__).with_name("explorer.html")


def settings(layers: int, heads: int) -> dict[str, list[dict]]:
    """What can be chosen under each method, in the page's order, as options of `token_scores`.

    raw: layer by layer the mean of all heads, then each; rollout and flow: the first 1, 2, …
    layers; relevance: the last 1, 2, … layers.
    """
    which, depths = [None, *range(heads)], range(1, layers + 1)
    raw = [{"layer": layer, "head": head} for layer in range(layers) for head in which]
    first = [{"layers": slice(k)} for k in depths]
    last = [{"layers": slice(-k, None)} for k in depths]
    return {"raw": raw, "rollout": first, "flow": first, "relevance": last}


def offered(model) -> tuple[int, int]:
    """The layers and the heads that both towers have."""
    both = [tower.model.config for tower in (model.image_tower, model.text_tower)]
    layers = min(config.num_hidden_layers for config in both)
    return layers, min(config.num_attention_heads for config in both)


def measured(model, image, captions: list[str], other: str) -> dict:
    """An image and what every method says of it, its captions and another's, ready for JSON.

    "maps" {method: [one map a setting]}, "captions" [{"own", "words", "scores" {method: …},
    "special" {method: …}, "relevance" [one map a setting]}].
    """
    captions = [*captions, other]
    _, _, pixels, _, sides, similarity = compare(model, [image], captions)
    attentions, source = sides["image"]
    # The image is the same in every row, and only relevance reads the caption.
    one_image = [weights[:1] for weights in attentions], source[:1]
    maps, words = {}, {}
    for method, options in settings(*offered(model)).items():
        side = sides["image"] if method == "relevance" else one_image
        rows = [token_scores(side, similarity, method, **row) for row in options]
        maps[method] = [patch_grid(model.image_tower, pixels["pixel_values"], row) for row in rows]
        rows = [token_scores(sides["text"], similarity, method, **row) for row in options]
        words[method] = [word_scores(model.text_tower, captions, row) for row in rows]
    relevance = maps.pop("relevance")
    texts = []
    for c, text in enumerate(captions):
        of_caption = {method: [row[c] for row in rows] for method, rows in words.items()}
        texts.append(
            {
                "text": text,
                "own": c + 1 < len(captions),
                "cosine": round(similarity[c].item(), 3),
                "words": of_caption["raw"][0].words,
                "scores": {m: [rounded(row.scores) for row in r] for m, r in of_caption.items()},
                "special": {m: [round(row.special, 3) for row in r] for m, r in of_caption.items()},
                "relevance": [rounded(grid[c]) for grid in relevance],
            }
        )
    maps = {method: [rounded(grid[0]) for grid in grids] for method, grids in maps.items()}
    seen = image.crop(model.image_tower.visible(image.size))  # the maps lie over this part
    return {"src": jpeg(seen), "maps": maps, "captions": texts}


def rounded(values) -> list[float]:
    """Three digits of each: what a picture can show, at a third of the size."""
    return [float(f"{value:.3g}") for value in values.flatten().tolist()]


def jpeg(image: Image.Image) -> str:
    """An image as the address of an <img>, 360 pixels at most."""
    image = image.convert("RGB")
    image.thumbnail((360, 360))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def page(model, images: list, captions: list[list[str]], credit: str = "") -> str:
    """The explorer's page over some images, each with its captions and one of the next image's."""
    others = [own[0] for own in captions[1:] + captions[:1]]
    layers, heads = offered(model)
    side = model.image_tower.size // model.image_tower.model.config.patch_size
    data = {
        "grid": [side, side],
        "layers": layers,
        "heads": heads,
        "palette": [[round(255 * part) for part in heat(1.0)(i)[:3]] for i in range(0, 256, 4)],
        "pictures": [measured(model, *row) for row in zip(images, captions, others)],
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    text = text.replace("</", "<\\/")  # stays inside its <script>
    template = TEMPLATE.read_text(encoding="utf-8")
    return template.replace("%CREDIT%", html.escape(credit)).replace("%DATA%", text)


def write_page(profile: Profile, path: Path, count: int = 12) -> Path:
    """Writes the page over the first images of val, by the last of the profile's models."""
    model = list(load_or_build.models(profile).values())[-1][0]
    images = load_or_build.data(profile, "val")
    captions = [list(dict.fromkeys(images.captions(i)))[:3] for i in range(count)]
    drawings = "Pictures made from OpenMoji's drawings, CC BY-SA 4.0."
    source = profile.source.name if profile.source else "COCO 2017"
    credit = drawings if profile.rendered else f"Pictures: {source}."
    atomic_write(path, page(model, [images.image(i) for i in range(count)], captions, credit))
    return path


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    written = write_page(get_profile(), ROOT / "build" / "explorer.html")
    size = written.stat().st_size / 1e6
    print(f"{written.relative_to(ROOT)}: {size:.1f} MB, to be opened in any browser")
