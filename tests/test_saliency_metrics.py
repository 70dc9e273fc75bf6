"""What a map is worth: questions and coverage; notebook 07's pointing game, energy, deletion."""

import numpy as np
import pytest
import torch

from helpers import saliency_metrics as metrics
from helpers.data import CaptionedImages
from helpers.probes import Instances
from tests import tiny
from tests.notebooks import NOTEBOOKS, taken
from tests.test_probes import instance, write_instances

GRID = (2, 2)
pointing_game, energy, centre_prior, curves = taken(
    next(path for path in NOTEBOOKS if path.name.startswith("07")),
    *("pointing_game", "energy", "centre_prior", "curves"),
)


@pytest.fixture
def data(tmp_path):
    """Ten images: a dog on the left half, and, but for the first, a cat in the upper middle."""
    tiny.write_dataset(tmp_path)
    images, rows = CaptionedImages(tmp_path), []
    for i, image_id in enumerate(images.image_ids.tolist()):
        rows.append(instance(2 * i, image_id, 18, [0, 0, 24, 32]))
        rows += [instance(2 * i + 1, image_id, 17, [24, 0, 12, 16])] * (i > 0)
    kinds = [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}, {"id": 3, "name": "apple"}]
    write_instances(tmp_path, rows, images.image_ids.tolist(), categories=kinds)
    return images, Instances(tmp_path)


def test_questions_name_two_objects_of_one_image(data):
    images, instances = data
    questions = metrics.questions(images, instances)
    assert sorted(q.i for q in questions) == list(range(1, 10)), "the first shows one object"
    assert {q.name for q in questions} == {"cat", "dog"}, "not always the same is named"
    for q in questions:
        assert {q.name, q.other} == {"cat", "dog"}
        assert (q.caption, q.wrong) == (f"a picture of a {q.name}", f"a picture of a {q.other}")
    assert metrics.questions(images, instances, 4) == questions[:4], "the first of more"
    part = images.subset(images.image_ids[3:])
    names = {images.image_ids[q.i]: q.name for q in questions}
    assert all(names[part.image_ids[q.i]] == q.name for q in metrics.questions(part, instances))
    for annotation in instances.coco.dataset["annotations"]:
        annotation["iscrowd"] = int(annotation["category_id"] == 17)
    assert metrics.questions(images, instances) == [], "crowds are no objects"


def test_coverage_is_the_share_of_each_patch(data):
    images, instances = data
    dog = metrics.patch_coverage(instances, images.image_ids[1], "dog", GRID)
    assert dog.tolist() == [[1, 0], [1, 0]]

    def right_half(size):
        return (size[0] / 2, 0, *size)

    part = metrics.patch_coverage(instances, images.image_ids[1], "dog", GRID, right_half)
    assert part.tolist() == [[0, 0], [0, 0]]
    cat = metrics.patch_coverage(instances, images.image_ids[2], "cat", GRID)
    assert cat[0, 1] == pytest.approx(0.5, abs=0.05) and cat.sum() == cat[0, 1]
    assert metrics.patch_coverage(instances, images.image_ids[1], "apple", (3, 5)).sum() == 0


# Maps by hand, the object in the right column: what the pointing game makes of each.
BY_HAND = {
    "the peak touches the object": ([[0.0, 0.9], [0.1, 0.2]], 1.0),
    "it does not": ([[0.9, 0.0], [0.1, 0.2]], 0.0),
    "one of two peaks does": ([[0.9, 0.9], [0.1, 0.2]], 0.5),
    "both do": ([[0.0, 0.7], [0.0, 0.7]], 1.0),
    "a constant map scores chance": ([[1.0, 1.0], [1.0, 1.0]], 0.5),
    "NaN has not pointed": ([[torch.nan, 1.0], [1.0, 1.0]], 0.0),
}


def test_pointing_game_and_energy_by_hand():
    grids = torch.tensor([grid for grid, _ in BY_HAND.values()])
    coverage = torch.tensor([[0.0, 0.2], [0.0, 1.0]]).expand(len(BY_HAND), 2, 2)
    assert pointing_game(grids, coverage).tolist() == [hit for _, hit in BY_HAND.values()]
    coverage = torch.tensor([[0.0, 0.5], [0.0, 1.0]]).expand(2, 2, 2)
    maps = torch.tensor([[[1.0, 2.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert energy(maps, coverage).tolist() == [0.5, coverage.mean()]


def test_random_maps_score_what_chance_says():
    generator = torch.Generator().manual_seed(1)
    coverage = (torch.rand(2000, 4, 4, generator=generator) < 0.2).float()
    maps = torch.rand(2000, 4, 4, generator=generator)
    for measure in (pointing_game, energy):
        values = measure(maps, coverage)
        assert abs(values.mean() - coverage.mean()) < 4 * values.std() / 2000**0.5


@pytest.mark.parametrize("grid", [(12, 12), (3, 5), (14, 10)])
def test_the_centre_has_one_peak_in_the_middle(grid):
    flat = centre_prior(2, grid)[1].flatten()
    assert (flat == flat.max()).sum() == 1
    assert divmod(flat.argmax().item(), grid[1]) == (grid[0] // 2, grid[1] // 2)


def test_deletion_and_insertion_by_hand():
    model = tiny.whole()
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (2, 3, 16, 16), dtype=np.uint8))
    texts = model.text_tower.tokenize(["a red dog", "two cat"])
    maps = torch.tensor([[[4.0, 3.0], [2.0, 1.0]], [[1.0, 2.0], [4.0, 3.0]]])
    deletion, insertion = curves(model, {"pixel_values": pixels}, texts, maps, steps=4)
    assert model.training and deletion.shape == insertion.shape == (2, 5)

    @torch.no_grad()
    def cosine(patches):  # [B, 2, 2], which patches are there
        mask = patches.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
        image_embeds = model.encode_image(model.image_tower.normalise(pixels) * mask)
        return (image_embeds * model.encode_text(**texts)).sum(dim=-1)

    model.eval()
    order = torch.tensor([[[0, 1], [2, 3]], [[3, 2], [0, 1]]])
    for step in range(5):
        assert torch.allclose(deletion[:, step], cosine((order >= step).float()), atol=1e-5)
        assert torch.allclose(insertion[:, step], cosine((order < step).float()), atol=1e-5)
