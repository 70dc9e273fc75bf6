"""What goes wrong on the way: a full disk, a killed process, two at once, a pickle for weights.

Beside it: a run killed in a step or while it writes a checkpoint (test_checkpoints.py), a download
killed or out of room (test_download.py), shards cut short (test_features.py), captions with markup
(test_widgets.py).
"""

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError

from helpers.config import ROOT
from helpers.data import CaptionedImages
from helpers.minicoco import render as minicoco
from helpers.model import CLIP, load_heads, load_model, save_heads, save_model
from helpers.storage import checkpoints, shards
from helpers.storage.files import atomic_write
from tests.test_checkpoints import run
from tests.test_features import extract
from tests.tiny import image_tower, text_tower, write_dataset

FULL = OSError(errno.ENOSPC, "No space left on device")
REFUSED = PermissionError(errno.EACCES, "Permission denied")
# safetensors has an error of its own for a full disk.
OWN = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
EXTRACT = """
import os, signal, sys
from pathlib import Path
from helpers.storage import shards
from helpers.data import CaptionedImages
from tests.test_faults import failing_at
from tests.test_features import extract

def die(path):
    os.kill(os.getpid(), signal.SIGKILL)

shards.save_file = failing_at(2, shards.save_file, die)
extract(CaptionedImages(sys.argv[1]), Path(sys.argv[2]))
"""
RENDER = """
import os, signal, sys
from pathlib import Path
from helpers.minicoco import render
from tests.test_faults import draw

write_annotations = render.write_annotations
def write(folder, split, *rest):
    if split == sys.argv[2]:
        Path(folder, f"instances_{split}.json").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
    write_annotations(folder, split, *rest)

render.write_annotations = write
draw(Path(sys.argv[1]))
"""


def failing_at(number, save_file, fail):
    """`save_file`, but the call of this number leaves half a file and fails."""
    calls = []

    def save(tensors, path):
        calls.append(path)
        if len(calls) == number:
            Path(path).write_bytes(b"half a file")
            fail(path)
        save_file(tensors, path)

    return save


def raising(error):
    def fail(*args):
        raise error

    return fail


def start(code, *arguments):
    """A process of its own that runs `code`, its output on pipes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def killed(code, *arguments):
    """Runs `code` until it kills itself, and its workers, who share its pipes, have ended."""
    process = start(code, *arguments)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == -9, errors


def bytes_of(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# A full disk


@pytest.fixture
def data(tmp_path):
    """The folder of ten images of two sizes of shard, 6 and 4."""
    write_dataset(tmp_path / "coco")
    return tmp_path / "coco"


def test_full_disk_while_embeddings_are_cached(data, tmp_path, monkeypatch):
    dataset, cache = CaptionedImages(data), tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(shards, "save_file", failing_at(2, shards.save_file, raising(FULL)))
        message = "00000010.safetensors could not be written .*No space left.*Free some disk"
        with pytest.raises(OSError, match=message):
            extract(dataset, cache)
    # The shard before it, and nothing else.
    assert [Path(name).name for name in bytes_of(cache)] == ["00000000-00000006.safetensors"]
    _, rows = extract(dataset, cache)
    assert rows[0] == 4, "the six images of that shard are not embedded again"


def test_full_disk_while_a_checkpoint_is_written(data, tmp_path, monkeypatch):
    expected = run(data, tmp_path / "undisturbed")[1].state_dict()
    with monkeypatch.context() as patch:
        save_file = failing_at(7, checkpoints.save_file, raising(OWN))
        patch.setattr(checkpoints, "save_file", save_file)
        with pytest.raises(OSError, match="could not be written .*No space left.*Free some disk"):
            run(data, tmp_path / "run")
    assert not list((tmp_path / "run").glob(".*")), "nothing half written"
    resumed = run(data, tmp_path / "run")[1].state_dict()
    assert all(tensor.equal(expected[name]) for name, tensor in resumed.items())


@pytest.mark.parametrize("error", [FULL, REFUSED], ids=["full", "refused"])
def test_a_file_that_cannot_be_written_is_left_as_it_was(tmp_path, monkeypatch, error):
    file = tmp_path / "results.json"
    atomic_write(file, "old")

    def write(path, content):
        path.open("wb").write(content[:1])
        raise error

    monkeypatch.setattr(Path, "write_bytes", write)
    message = rf"results.json could not be written \({error.strerror}\). Free .*, or make .* writ"
    with pytest.raises(OSError, match=message):
        atomic_write(file, "new")
    assert list(tmp_path.iterdir()) == [file] and file.read_text() == "old"


# A killed process


def test_killed_while_a_shard_is_written(data, tmp_path):
    extract(CaptionedImages(data), tmp_path / "undisturbed")
    killed(EXTRACT, data, tmp_path / "cache")
    _, rows = extract(CaptionedImages(data), tmp_path / "cache")
    assert rows[0] == 4, "the finished shard of six images is not computed again"
    files = bytes_of(tmp_path / "cache").items()
    shards = {name: content for name, content in files if name.endswith(".safetensors")}
    assert shards == bytes_of(tmp_path / "undisturbed")


def draw(folder):
    """The bytes of a small MiniCOCO."""
    row = {"data": folder / "minicoco", "train_images": 12, "val_images": 6, "seed": 0}
    return bytes_of(minicoco.render(SimpleNamespace(**row)))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("rendered"))


@pytest.mark.parametrize("split", ["train2017", "compositional"])
def test_killed_while_minicoco_is_rendered(rendered, tmp_path, split):
    killed(RENDER, tmp_path, split)
    assert not (tmp_path / "minicoco").exists(), "nothing that looks whole"
    assert list(tmp_path.glob("*.tmp")), "killed in the middle of it"
    assert draw(tmp_path) == rendered
    assert not list(tmp_path.glob("*.tmp"))


def test_two_processes_render_at_once(rendered, tmp_path):
    # Both have to wait until both are there.
    with FileLock(tmp_path / ".minicoco.lock"):
        pair = [start(RENDER, tmp_path, "") for _ in range(2)]
        for process in pair:
            assert "waiting for it" in process.stdout.readline()
    outputs = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    # One draws, the other takes what is there.
    assert sorted("100%" in out for out, _ in outputs) == [False, True]
    assert bytes_of(tmp_path / "minicoco") == rendered


# A pickle where weights should be


@pytest.fixture(params=["plain", "zip"])
def trap(request, tmp_path):
    """The bytes of a pickle, bare or as torch.save makes it, that nobody may read."""
    marker = tmp_path / "unpickled"

    class Trap:
        def __reduce__(self):
            return Path.touch, (marker,)

    file = tmp_path / "trap"
    if request.param == "plain":
        file.write_bytes(pickle.dumps({"logit_scale": Trap()}))
        pickle.loads(file.read_bytes())
    else:
        torch.save({"logit_scale": Trap()}, file)
        torch.load(file, weights_only=False)
    assert marker.exists(), "the trap is sprung by whoever reads it"
    marker.unlink()
    yield file.read_bytes()
    assert not marker.exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "best"])
def test_a_pickle_in_a_checkpoint_is_refused_unread(data, tmp_path, trap, name):
    run(data, tmp_path / "run", epochs=1)
    [path] = (tmp_path / "run").glob("best-*" if name == "best" else f"step-*/{name}")
    path.write_bytes(trap)
    with pytest.raises(ValueError, match=f"{path.name} is missing or no safetensors file .*Delete"):
        run(data, tmp_path / "run", epochs=1)


def test_a_pickle_in_place_of_heads_is_refused_unread(tmp_path, trap):
    save_heads(CLIP(3, 4, embed_dim=8), tmp_path / "heads", {})
    (tmp_path / "heads/heads.safetensors").write_bytes(trap)
    with pytest.raises(ValueError, match="heads.safetensors is damaged, or not the file .*delete"):
        load_heads(tmp_path / "heads")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("tower", ["image_tower", "text_tower"])
def test_a_pickle_in_a_tuned_tower_is_refused_unread(tmp_path, trap, tower, name):
    save_model(CLIP(16, 16, 8, image_tower(), text_tower()), tmp_path / "finetuned", {})
    (tmp_path / "finetuned" / tower / "model.safetensors").unlink()
    (tmp_path / "finetuned" / tower / name).write_bytes(trap)
    with pytest.raises(ValueError, match="a tower in .* cannot be read .*delete"):
        load_model(tmp_path / "finetuned", max_length=12)
