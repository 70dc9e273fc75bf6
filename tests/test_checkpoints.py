"""Checkpoints: a killed run goes on bit for bit; what does not belong together is refused."""

import json
import textwrap

import pytest
import torch
from safetensors.torch import load_file

from helpers.data import CaptionedImages
from helpers.model import CLIP
from helpers.training import Examples, fit
from tests.processes import finish
from tests.tiny import image_tower, text_tower, write_dataset

RUN = """
    import sys
    import torch
    from pathlib import Path
    from safetensors.torch import save_file
    from helpers import training
    from helpers.storage import checkpoints
    from tests.processes import die
    from tests.test_checkpoints import run

    torch.set_num_threads(2)
    data, folder, when, where = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    steps = 0
    take_step, save_file_of_checkpoint = training.take_step, checkpoints.save_file

    def step(*args):
        global steps
        if where == "step" and steps == when:
            die()
        steps += 1
        return take_step(*args)

    def save(tensors, path):
        if where == "write" and steps >= when:
            Path(path).write_bytes(b"half a file")
            die()
        return save_file_of_checkpoint(tensors, path)

    training.take_step, checkpoints.save_file = step, save
    history, model = run(data, folder)
    save_file(dict(model.state_dict()), folder / "final.safetensors")
    (folder / "losses.txt").write_text(repr([row["losses"] for row in history]))
"""


def run(data, folder, embed_dim=8, **changes):
    """Both towers, SigLIP, dropout in the heads: three epochs of three steps, two looks at each."""
    model = CLIP(16, 16, embed_dim, image_tower(), text_tower(), logit_bias=-10.0)
    examples = Examples(CaptionedImages(data, "val2017"))
    settings = {"epochs": 3, "batch_size": 4, "image_lr": 1e-3, "text_lr": 1e-3}
    settings |= {"save_every": 2, "select": "dev_recall@1", "dev_per_epoch": 2}
    settings["checkpoints"] = folder
    return fit(model, examples, examples, **{**settings, **changes}), model


def train(data, folder, when=-1, where="step", status=0):
    """What a process prints that trains, and is killed there if `when` says so."""
    return finish("-c", textwrap.dedent(RUN), data, folder, when, where, status=status)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run that nobody disturbs: (its data, its losses, its final weights)."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_dataset(folder / "coco", images=12)
    train(folder / "coco", folder / "whole")
    final = load_file(folder / "whole/final.safetensors")
    return folder / "coco", (folder / "whole/losses.txt").read_text(), final


# In a step, after a look at dev (they follow the steps 0, 1, 3, 4, 6, 7 and 9) or between two; or
# while a checkpoint is written.
KILLED = [(2, "step"), (4, "step"), (5, "step"), (0, "write"), (4, "write"), (6, "write")]


@pytest.mark.parametrize("when, where", KILLED)
def test_killed_anywhere_it_goes_on_bit_for_bit(uninterrupted, tmp_path, when, where):
    data, losses, final = uninterrupted
    train(data, tmp_path, when, where, status=-9)
    assert not (tmp_path / "losses.txt").exists()
    assert ("Going on from step-0000000" in train(data, tmp_path)) == (when > 0)
    assert (tmp_path / "losses.txt").read_text() == losses
    torch.testing.assert_close(load_file(tmp_path / "final.safetensors"), final, rtol=0, atol=0)
    assert not list(tmp_path.glob(".*"))


def test_a_finished_run_is_read_not_trained_again(uninterrupted, tmp_path):
    history, model = run(uninterrupted[0], tmp_path)
    again, same = run(uninterrupted[0], tmp_path)
    assert again == history
    torch.testing.assert_close(same.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_the_last_two_and_the_best_are_what_is_left_and_no_pickle(uninterrupted, tmp_path):
    history, model = run(uninterrupted[0], tmp_path, save_every=1)
    names = sorted(path.name for path in tmp_path.glob("step-*"))
    assert names == ["step-00000008", "step-00000009"]
    recalls = [row["dev_recall@1"] for row in history]
    (best,) = tmp_path.glob("best-*")
    assert best.name == f"best-{recalls.index(max(recalls)) + 1:04d}.safetensors"
    parameters = dict(model.named_parameters())
    assert all(parameters[name].equal(tensor) for name, tensor in load_file(best).items())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    for path in files:
        json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)


OTHERS = {
    "written with batch_size = 4, this run has 3": {"batch_size": 3},
    "written with epochs = 1, this run has 5": {"epochs": 5},
    "written with text_lr = 0.001, this run has 0.0": {"text_lr": 0.0},
    "written with precision = 'no', this run has 'bf16'": {"precision": "bf16"},
    "size mismatch for image_head.1.weight": {"embed_dim": 12},
}


def test_another_run_is_refused_by_name(uninterrupted, tmp_path):
    run(uninterrupted[0], tmp_path, epochs=1)
    for message, changes in OTHERS.items():
        with pytest.raises((ValueError, RuntimeError), match=message):
            run(uninterrupted[0], tmp_path, **{"epochs": 1, **changes})
