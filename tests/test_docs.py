"""README and the cards: links that lead somewhere, and numbers that are those of the code and of data/results."""

import json
import re

import pytest

from helpers.config import ROOT, get_profile
from helpers.minicoco import render
from helpers.minicoco.backgrounds import PLACES, SIZE, TIMES
from helpers.minicoco.captions import NUMBERS
from helpers.minicoco.scenes import UNPAIRED
from helpers.minicoco.sprites import CAPTIONED, CATEGORIES, COLOURS, UNCAPTIONED, UNSEEN

CARDS = ["docs/data_card.md", "docs/model_card.md"]
PAGES = ["README.md", "CONTRIBUTING.md", "data/README.md", "assets/tiny-vit/README.md", *CARDS]


def links(page):
    """The addresses of a page's links and pictures, those in examples of code left out."""
    text = re.sub(r"(?m)^    .*$|`[^`]*`", "", (ROOT / page).read_text(encoding="utf-8"))
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"(?m)^#+ (.*)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_readme_leads_to_both_cards():
    assert set(CARDS) <= set(links("README.md"))


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_somewhere(page):
    for link in links(page):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"


def test_the_first_screen_says_what_the_pictures_are_and_what_is_unmeasured():
    screen = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## ")[0]
    assert "drawings that the course renders itself" in screen and "unmeasured" in screen
    assert "CLIP_PROFILE=coco make course" in screen and len(screen.splitlines()) < 35


def test_the_data_card_gives_the_sizes_of_the_code(monkeypatch):
    monkeypatch.delenv("CLIP_PROFILE", raising=False)
    card = " ".join((ROOT / "docs/data_card.md").read_text(encoding="utf-8").split())
    mini, half, probes = get_profile("mini"), get_profile("coco-val"), render.PROBES
    assert (len(PLACES), len(TIMES), len(UNPAIRED), max(NUMBERS)) == (12, 3, 12, 3)
    for told in (
        f"{len(CATEGORIES)}: {len(CAPTIONED)} in scenes and captions, {len(UNCAPTIONED)} that only",
        f"{len(UNSEEN)} that nothing ever saw",
        f"in one of {len(COLOURS)} colours, in {len(PLACES)} places at {len(TIMES)} times of day",
        f"{SIZE} × {SIZE} pixels",
        f"{mini.train_images:,} train, {mini.val_images:,} val",
        f"| {5 * (mini.train_images + mini.val_images):,} |",
        f"{mini.dev_images} train images, chosen by their hashed id",
        f"{probes['known']} of captioned categories, {probes['unseen_drawing']} in drawings kept back",
        f"{probes['uncaptioned']} never captioned, {probes['unseen']} never seen, {probes['pairs']} in colour–category",
        f"the same words | {probes['compositional']} |",
        f"{len(UNCAPTIONED + UNSEEN)} withheld categories",
        f"({half.train_images:,} train, dev among them, and {half.val_images:,} test)",
    ):
        assert told in card, told


def test_the_data_card_gives_the_ceilings_of_the_results():
    card = " ".join((ROOT / "docs/data_card.md").read_text(encoding="utf-8").split())
    metrics = json.loads((ROOT / "data/results/01.json").read_text())["metrics"]
    image, text = (
        metrics[f"ceiling/{way}/recall@1"]["mean"] for way in ("text_to_image", "image_to_text")
    )
    assert f"recall@1 of {image:.2f} from text to image and {text:.2f} from image to text" in card
