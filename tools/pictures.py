"""Draws the pictures of README and the notebooks into assets/: `python -m tools.pictures`, once heads are trained.

Drawings in them are OpenMoji's (CC BY-SA 4.0).
"""

from __future__ import annotations

from helpers import artifacts, minicoco, overlays, plots
from helpers.attention import explain
from helpers.evaluation import nearest
from helpers.profiles import ROOT, get_profile
from helpers.scenes import draw

DIAGRAM = (1, 5, 11, 14, 20)  # val scenes with short captions
LOOKED_FOR = "an elephant in the desert"
SENTENCES = ("a red car in the desert", "a teddy bear and a banana", "boats on the lake at sunset")


def main() -> None:
    """clip_desc.png (the two towers), scenes.png (what MiniCOCO looks like), retrieval.png (typed sentences),
    attention.png (what in the pictures found for a sentence made them fit)."""
    plots.style()
    profile = get_profile("mini")
    model = artifacts.heads(profile)
    assets = ROOT / "assets"
    scenes = [minicoco.scene_of("val2017", i, profile.seed) for i in DIAGRAM]
    told = [minicoco.five_captions("val2017", i, profile.seed, s) for i, s in zip(DIAGRAM, scenes, strict=True)]
    pictures, captions = [draw(scene)[0] for scene in scenes], [five[-1][0] for five in told]
    similarity = (model.encode_images(pictures) @ model.encode_texts(captions).T).numpy()
    plots.clip_diagram(pictures, captions, similarity).savefig(assets / "clip_desc.png", dpi=130)
    gallery, told = artifacts.gallery(profile, 1000)
    plots.image_grid(gallery[40:52], told[40:52], columns=6, title="MiniCOCO").savefig(assets / "scenes.png")
    found = model.encode_texts(list(SENTENCES)) @ model.encode_images(gallery).T
    plots.typed_sentences(SENTENCES, gallery, found.numpy()).savefig(assets / "retrieval.png")
    model = artifacts.finetuned(profile) or model
    cosines, rows = nearest(model.encode_texts([LOOKED_FOR])[0], model.encode_images(gallery), k=5)
    pictures = [gallery[i] for i in rows.tolist()]
    grids, _ = explain(model, pictures, [LOOKED_FOR] * len(pictures))
    titles, title = [f"cosine {cosine:.2f}" for cosine in cosines], f"“{LOOKED_FOR}”, and what spoke for it"
    grids = [grid / grid.max() for grid in grids]
    figure = overlays.maps(pictures, grids, titles, title=title, label="relevance, largest = 1", sources=True)
    figure.savefig(assets / "attention.png")


if __name__ == "__main__":
    main()
