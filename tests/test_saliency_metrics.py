"""What a map is worth: pairs, covers, the pointing game, energy, deletion and insertion."""

import json

import numpy as np
import pytest
import torch

from helpers.data import CaptionedImages
from helpers.model import CLIP
from helpers.probes import Instances
from helpers.saliency_metrics import (
    centre_prior,
    curves,
    energy,
    patch_coverage,
    pointing_game,
    questions,
    random_maps,
)
from tests import tiny

GRID = (2, 2)


@pytest.fixture
def data(tmp_path):
    """Ten pictures; the first has one object, the others two or three: a dog on the left half, a cat, some a crowd."""
    tiny.write_dataset(tmp_path)
    content = json.loads((tmp_path / "annotations/captions_val2017.json").read_text())
    annotations = []

    def add(image, category, x, y, w, h, crowd=0):
        box = [x, y, x + w, y, x + w, y + h, x, y + h]
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": image["id"],
                "category_id": category,
                "segmentation": [box],
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": crowd,
            }
        )

    for k, image in enumerate(content["images"]):
        add(image, 18, 0, 0, image["width"] / 2, image["height"])
        if k:
            add(image, 17, image["width"] / 2, 0, image["width"] / 4, image["height"] / 2)
    categories = [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}, {"id": 3, "name": "apple"}]
    instances = {"images": content["images"], "annotations": annotations, "categories": categories}
    (tmp_path / "annotations/instances_val2017.json").write_text(json.dumps(instances))
    return CaptionedImages(tmp_path), Instances(tmp_path)


def test_pairs_name_two_objects_of_one_picture(data):
    images, instances = data
    found = questions(images, instances)
    assert sorted(pair.i for pair in found) == list(
        range(1, 10)
    )  # the first picture shows one object
    assert {pair.name for pair in found} == {
        "cat",
        "dog",
    }  # which one is named is not always the same
    for pair in found:
        assert {pair.name, pair.other} == {"cat", "dog"}
        assert (
            pair.caption == f"a picture of a {pair.name}"
            and pair.wrong == f"a picture of a {pair.other}"
        )


def test_pairs_of_fewer_are_the_first_of_more(data):
    images, instances = data
    assert questions(images, instances, 4) == questions(images, instances)[:4]
    part = images.subset(images.image_ids[3:])
    named = {images.image_ids[pair.i]: pair.name for pair in questions(images, instances)}
    assert all(named[part.image_ids[pair.i]] == pair.name for pair in questions(part, instances))


def test_crowds_are_no_objects(data):
    images, instances = data
    for annotation in instances.coco.dataset["annotations"]:
        annotation["iscrowd"] = int(annotation["category_id"] == 17)
    assert questions(images, instances) == []


def test_cover_is_the_share_of_each_patch(data):
    images, instances = data
    assert torch.allclose(
        patch_coverage(instances, images.image_ids[1], "dog", GRID), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    )
    found = patch_coverage(instances, images.image_ids[2], "cat", GRID)
    assert found[0, 1] == pytest.approx(0.5, abs=0.05) and found.sum() == found[0, 1]
    assert patch_coverage(instances, images.image_ids[1], "apple", (3, 5)).sum() == 0


def test_pointing_game_by_hand():
    covers = torch.tensor([[0.0, 0.2], [0.0, 1.0]]).expand(4, 2, 2)
    maps = torch.tensor(
        [
            [[0.0, 0.9], [0.1, 0.2]],  # the peak touches the object
            [[0.9, 0.0], [0.1, 0.2]],  # it does not
            [[0.9, 0.9], [0.1, 0.2]],  # one of two peaks does not
            [[0.0, 0.7], [0.0, 0.7]],  # both do
        ]
    )
    assert pointing_game(maps, covers).tolist() == [1.0, 0.0, 0.5, 1.0]


def test_a_constant_map_scores_chance_and_one_that_is_no_number_nothing():
    covers = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
    assert pointing_game(torch.ones(1, 2, 2), covers).tolist() == [0.25]
    assert pointing_game(torch.full((1, 2, 2), torch.nan), covers).tolist() == [0.0]


def test_energy_by_hand():
    covers = torch.tensor([[[0.0, 0.5], [0.0, 1.0]]])
    assert energy(torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]), covers).tolist() == [0.5]
    assert energy(torch.zeros(1, 2, 2), covers).tolist() == [covers.mean()]


def test_random_maps_score_what_chance_says():
    covers = (torch.rand(2000, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.2).float()
    maps = random_maps(2000, (4, 4))
    assert torch.equal(maps, random_maps(2000, (4, 4))) and not torch.equal(
        maps, random_maps(2000, (4, 4), seed=1)
    )
    chance = (covers > 0).float().mean()
    for found in (pointing_game(maps, covers), energy(maps, covers)):
        assert abs(found.mean() - chance) < 4 * found.std() / 2000**0.5


@pytest.mark.parametrize("grid", [(12, 12), (3, 5), (14, 10)])
def test_the_centre_has_one_peak_in_the_middle(grid):
    flat = centre_prior(2, grid)[1].flatten()
    assert (flat == flat.max()).sum() == 1 and divmod(flat.argmax().item(), grid[1]) == (
        grid[0] // 2,
        grid[1] // 2,
    )


def test_deletion_and_insertion_by_hand():
    model = CLIP(16, 16, 8, tiny.image_tower(), tiny.text_tower())
    pixels = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16), dtype=np.uint8)
    )
    read = model.text_tower.tokenize(["a red dog", "two cat"])
    maps = torch.tensor([[[4.0, 3.0], [2.0, 1.0]], [[1.0, 2.0], [4.0, 3.0]]])
    deletion, insertion = curves(model, {"pixel_values": pixels}, read, maps, steps=4)
    assert model.training and deletion.shape == insertion.shape == (2, 5)

    def cosine(kept):  # [B, 2, 2], which patches are there
        whole = (
            model.image_tower.normalise(pixels)
            * kept.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
        )
        model.eval()
        with torch.no_grad():
            return (model.encode_image(whole) * model.encode_text(**read)).sum(dim=-1)

    order = torch.tensor([[[0, 1], [2, 3]], [[3, 2], [0, 1]]])
    for step in range(5):
        assert torch.allclose(deletion[:, step], cosine((order >= step).float()), atol=1e-5)
        assert torch.allclose(insertion[:, step], cosine((order < step).float()), atol=1e-5)
    assert torch.allclose(deletion[:, 0], insertion[:, -1]) and torch.allclose(
        deletion[:, -1], insertion[:, 0]
    )
