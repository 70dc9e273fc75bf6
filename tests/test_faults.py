"""What goes wrong on the way: a full disk, a killed process, two at once, a pickle for weights.

Beside it: a run killed in a step or while it writes a checkpoint (test_checkpoints.py), a download
killed or out of room (test_download.py), shards cut short (test_features.py), captions with markup
(test_widgets.py).
"""

import errno
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from helpers.data import CaptionedImages
from helpers.minicoco import render as minicoco
from helpers.model import load_model, save_model
from helpers.storage import shards
from helpers.storage.files import atomic_write
from tests.processes import dying_at, killed, two_at_once
from tests.test_checkpoints import run
from tests.test_features import extract
from tests.test_minicoco import profile
from tests.tiny import whole, write_dataset

ERRORS = {
    "No space left on device": OSError(errno.ENOSPC, "No space left on device"),
    "Permission denied": PermissionError(errno.EACCES, "Permission denied"),
    "No space left": SafetensorError("No space left"),  # it has an error of its own
}


def bytes_of(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# A full disk


@pytest.mark.parametrize("reason", ERRORS)
def test_a_file_that_cannot_be_written_is_left_as_it_was(tmp_path, monkeypatch, reason):
    file = tmp_path / "results.json"
    atomic_write(file, "old")

    def write(path, content):
        path.open("wb").write(content[:1])
        raise ERRORS[reason]

    monkeypatch.setattr(Path, "write_bytes", write)
    message = rf"results.json could not be written \({reason}\). Free .*, or make .* writ"
    with pytest.raises(OSError, match=message):
        atomic_write(file, "new")
    assert list(tmp_path.iterdir()) == [file] and file.read_text() == "old"


# A killed process


@pytest.fixture
def data(tmp_path):
    """Ten images: shards of 6 and 4."""
    write_dataset(tmp_path / "coco")
    return tmp_path / "coco"


def extract_and_die(data, cache):
    shards.save_file = dying_at(2, shards.save_file)
    extract(CaptionedImages(data), cache)


def test_killed_while_a_shard_is_written(data, tmp_path):
    extract(CaptionedImages(data), tmp_path / "undisturbed")
    killed(extract_and_die, data, tmp_path / "cache")
    _, rows = extract(CaptionedImages(data), tmp_path / "cache")
    assert rows[0] == 4, "the finished shard of six images is not computed again"
    files = bytes_of(tmp_path / "cache").items()
    whole = {name: content for name, content in files if name.endswith(".safetensors")}
    assert whole == bytes_of(tmp_path / "undisturbed")


def draw(folder):
    """The bytes of a small MiniCOCO."""
    return bytes_of(minicoco.render(profile(Path(folder), 12, 6)))


def draw_and_die(folder, number):
    """Dies while it writes the annotations of a split."""
    minicoco.write_annotations = dying_at(number, minicoco.write_annotations)
    draw(folder)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("rendered"))


@pytest.mark.parametrize("split", [1, 9])
def test_killed_while_minicoco_is_rendered(rendered, tmp_path, split):
    killed(draw_and_die, tmp_path, split)
    assert not (tmp_path / "minicoco").exists(), "nothing that looks whole"
    assert list(tmp_path.glob("*.tmp")), "killed in the middle of it"
    assert draw(tmp_path) == rendered
    assert not list(tmp_path.glob("*.tmp"))


def test_two_processes_render_at_once(rendered, tmp_path):
    code = "import sys; from tests.test_faults import draw; draw(sys.argv[1])"
    outputs = two_at_once(tmp_path / ".minicoco.lock", "waiting for it", "-c", code, tmp_path)
    # One draws, the other takes what is there.
    assert sorted("100%" in output for output in outputs) == [False, True]
    assert bytes_of(tmp_path / "minicoco") == rendered


# A pickle where weights should be


@pytest.fixture
def trap(tmp_path):
    """The bytes of a pickle, as torch.save makes it, that nobody may read."""
    marker = tmp_path / "unpickled"

    class Trap:
        def __reduce__(self):
            return Path.touch, (marker,)

    file = tmp_path / "trap"
    torch.save({"logit_scale": Trap()}, file)
    torch.load(file, weights_only=False)
    assert marker.exists(), "the trap is sprung by whoever reads it"
    marker.unlink()
    yield file.read_bytes()
    assert not marker.exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "best"])
def test_a_pickle_in_a_checkpoint_is_refused_unread(data, tmp_path, trap, name):
    run(data, tmp_path / "run", epochs=1)
    path = max((tmp_path / "run").glob("best-*" if name == "best" else f"step-*/{name}"))
    path.write_bytes(trap)
    with pytest.raises(ValueError, match=f"{path.name} is missing or no safetensors file .*Delete"):
        run(data, tmp_path / "run", epochs=1)


TOWER = "a tower in .* cannot be read .*delete"
SAVED = {"heads.safetensors": "heads.safetensors is damaged, or not the file .*delete"}
SAVED |= {f"{tower}_tower/model.safetensors": TOWER for tower in ("image", "text")}
SAVED |= {f"{tower}_tower/pytorch_model.bin": TOWER for tower in ("image", "text")}


@pytest.mark.parametrize("name", SAVED)
def test_a_pickle_in_a_tuned_model_is_refused_unread(tmp_path, trap, name):
    save_model(whole(), tmp_path / "finetuned", {})
    path = tmp_path / "finetuned" / name
    path.with_name("model.safetensors").unlink(missing_ok=True)
    path.write_bytes(trap)
    with pytest.raises(ValueError, match=SAVED[name]):
        load_model(tmp_path / "finetuned", max_length=12)
