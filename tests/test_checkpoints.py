"""Checkpoints: a killed run goes on bit for bit; what does not belong together is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

from helpers import training
from helpers.data import CaptionedImages
from helpers.model import CLIP
from helpers.storage import checkpoints
from helpers.training import Examples, fit
from tests.processes import dying_at, killed
from tests.tiny import image_tower, text_tower, write_dataset


def run(data, folder, embed_dim=8, **changes):
    """Both towers, SigLIP, dropout in the heads: three epochs of three steps, two looks at each."""
    model = CLIP(16, 16, embed_dim, image_tower(), text_tower(), logit_bias=-10.0)
    examples = Examples(CaptionedImages(data, "val2017"))
    settings = {"epochs": 3, "batch_size": 4, "image_lr": 1e-3, "text_lr": 1e-3}
    settings |= {"save_every": 2, "select": "dev_recall@1", "dev_per_epoch": 2}
    settings["checkpoints"] = folder
    return fit(model, examples, examples, **{**settings, **changes}), model


def run_and_die(data, folder, name, number):
    """The same, but its process is killed in this call of a function."""
    module = MODULES[name]
    setattr(module, name, dying_at(number, getattr(module, name)))
    run(data, folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    write_dataset(folder, images=12)
    return folder


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """A run that nobody disturbs: its history, its final weights and its folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    history, model = run(data, folder)
    return history, model.state_dict(), folder


def assert_same_run(run, undisturbed):
    (history, model), (expected, weights, _) = run, undisturbed
    assert [row["losses"] for row in history] == [row["losses"] for row in expected]
    torch.testing.assert_close(dict(model.state_dict()), dict(weights), rtol=0, atol=0)


# Dev is looked at before the first step and after 1, 3, 4, 6, 7 and 9. Files: the best weights
# before the first step and after step 3; the checkpoint after step 6, which replaces another.
MODULES = {"take_step": training, "save_file": checkpoints}
KILLED = [("take_step", number) for number in (3, 5, 6)]
KILLED += [("save_file", number) for number in (1, 9, 19)]


@pytest.mark.parametrize("name, number", KILLED)
def test_killed_anywhere_it_goes_on_bit_for_bit(data, undisturbed, tmp_path, capsys, name, number):
    killed(run_and_die, data, tmp_path, name, number)
    assert_same_run(run(data, tmp_path), undisturbed)
    assert ("Going on from step-0000000" in capsys.readouterr().out) == (number > 1)
    assert not list(tmp_path.glob(".*"))


def test_a_finished_run_is_read_not_trained_again(data, undisturbed, monkeypatch):
    monkeypatch.setattr(training, "take_step", lambda *_: pytest.fail("a step"))
    assert_same_run(run(data, undisturbed[2]), undisturbed)


def test_the_last_two_and_the_best_are_what_is_left_and_no_pickle(undisturbed):
    history, weights, folder = undisturbed
    names = sorted(path.name for path in folder.glob("step-*"))
    assert names == ["step-00000008", "step-00000009"]
    recalls = [row["dev_recall@1"] for row in history]
    (best,) = folder.glob("best-*")
    assert best.name == f"best-{recalls.index(max(recalls)) + 1:04d}.safetensors"
    assert all(weights[name].equal(tensor) for name, tensor in load_file(best).items())
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    for path in files:
        json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)


OTHERS = {
    "written with batch_size = 4, this run has 3": {"batch_size": 3},
    "written with epochs = 3, this run has 5": {"epochs": 5},
    "written with text_lr = 0.001, this run has 0.0": {"text_lr": 0.0},
    "written with precision = 'no', this run has 'bf16'": {"precision": "bf16"},
    "size mismatch for image_head.1.weight": {"embed_dim": 12},
}


@pytest.mark.parametrize("message", OTHERS)
def test_another_run_is_refused_by_name(data, undisturbed, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        run(data, undisturbed[2], **OTHERS[message])
