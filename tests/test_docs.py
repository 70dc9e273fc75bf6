"""README, the cards and the committed model: links, numbers of the code and of data/results."""

import json
import re

import pytest

from helpers.config import ROOT, get_profile
from helpers.minicoco.backgrounds import PLACES, SIZE, TIMES
from helpers.minicoco.scenes import NOVEL_COMBINATIONS
from helpers.minicoco.sprites import CAPTIONED, CATEGORIES, COLOURS, UNCAPTIONED, UNSEEN

CARDS = ["docs/data_card.md", "docs/model_card.md"]
PAGES = ["README.md", "CONTRIBUTING.md", "data/README.md", "assets/tiny-vit/README.md", *CARDS]


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def links(page):
    """The addresses of a page's links and pictures, those in examples of code left out."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"(?m)^    .*$|`[^`]*`", "", text_of(page)))


def anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"(?m)^#+ (.*)$", text_of(page))
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_files_and_scripts_lead_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not re.match(r"\w+:", link):
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
    files = re.findall(r"(?:helpers|scripts|benchmarks|tests)/[\w/]+\.py", text_of(page))
    modules = re.findall(r"-m ((?:scripts|benchmarks)\.\w+)", text_of(page))
    names = [*files, *(f"{name.replace('.', '/')}.py" for name in modules)]
    assert [name for name in names if not (ROOT / name).is_file()] == []


def test_readme_leads_to_both_cards_and_says_first_how_to_use_photographs():
    assert set(CARDS) <= set(links("README.md"))
    assert "CLIP_PROFILE=coco make course" in "".join(text_of("README.md").split("\n## ")[:2])


def test_the_data_card_gives_the_sizes_of_the_code(monkeypatch):
    monkeypatch.delenv("CLIP_PROFILE", raising=False)
    mini, half = get_profile("mini"), get_profile("coco-val")
    captions = 2 * mini.train_images + 5 * (mini.dev_images + mini.val_images)
    novel = [len(NOVEL_COMBINATIONS[folder]) for folder in ("probes", "probes_dev")]
    assert novel[0] == 12
    card = " ".join(text_of("docs/data_card.md").split())
    for part in (
        f"{len(CATEGORIES)}: {len(CAPTIONED)} in scenes and captions, {len(UNCAPTIONED)} that only",
        f"{len(UNSEEN)} that nothing ever saw",
        f"in one of {len(COLOURS)} colours, in {len(PLACES)} places at {len(TIMES)} times of day",
        f"{SIZE} × {SIZE} pixels",
        f"{mini.train_images:,} train, {mini.dev_images:,} dev, {mini.val_images:,} val",
        f"5 a dev or val image: {captions:,} |",
        f"| {mini.val_images:,} each: of captioned categories, in drawings kept back, never",
        f"the same words | {mini.val_images:,} |",
        f"({novel[0]} for val, {novel[1]} for dev)",
        f"{len(UNCAPTIONED + UNSEEN)} withheld categories",
        f"({half.train_images:,} train, {half.dev_images} dev and {half.val_images:,} test)",
    ):
        assert part in card


def test_the_data_card_gives_the_attainable_recall_of_the_results():
    metrics = json.loads(text_of("data/results/01.json"))["metrics"]

    def recall(model, digits):
        ways = "text_to_image", "image_to_text"
        return [f"{metrics[f'{model}/{way}/recall@1']['mean']:.{digits}f}" for way in ways]

    image, text = recall("attainable", 2)
    sentence = f"recall@1 of {image} from text to image and {text} from image to text"
    assert sentence in " ".join(text_of("docs/data_card.md").split())
    for detail in range(5):
        image, text = recall(f"attainable-detail-{detail}", 3)
        row = rf"(?m)^\| {detail} \| .* \| {image} \| {text} \|$"
        assert re.search(row, text_of("docs/data_card.md"))


def test_the_committed_model_in_half_precision_keeps_the_recall_of_its_run():
    kept = json.loads(text_of("assets/finetuned/heads.json"))["meta"]
    rows = json.loads(text_of("data/results/study.json"))["rows"]
    [row] = [row for row in rows if all(row[n] == kept[n] for n in ("seed", "fingerprint"))]
    of_file = json.loads(text_of("data/results/06.json"))["metrics"]
    for name in ("text_to_image/recall@1", "image_to_text/recall@1"):
        before = row["measured"][str(kept["alpha"])]["val"][name]["value"]
        assert of_file[f"finetuned-averaged/{name}"]["mean"] == pytest.approx(before, abs=1e-3)
