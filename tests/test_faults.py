"""What goes wrong on the way: a full disk, a killed process, two at once, a pickle where weights should be.

Beside it: a run killed while it writes a checkpoint (test_checkpoints.py), shards cut short or altered
(test_embeddings.py), captions with markup (test_plots.py, test_widgets.py).
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

from helpers import features
from helpers.config import ROOT
from helpers.data import CaptionedImages
from helpers.minicoco import render as minicoco
from helpers.model import CLIP, load_heads, load_model, save_heads, save_model
from helpers.storage import checkpoints
from helpers.storage.files import atomic_write
from tests.test_checkpoints import run
from tests.test_features import extract
from tests.tiny import image_tower, text_tower, write_dataset

FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    ),  # its own for it
]
EXTRACT = """
import os, signal, sys
from pathlib import Path
from helpers import features
from helpers.data import CaptionedImages
from tests.test_features import extract

save_file, calls = features.save_file, []
def save(tensors, path, metadata):
    calls.append(path)
    if len(calls) == 2:
        Path(path).write_bytes(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)
    save_file(tensors, path, metadata)

features.save_file = save
extract(CaptionedImages(sys.argv[1]), Path(sys.argv[2]))
"""
RENDER = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
from helpers.minicoco import render

write_annotations = render.write_annotations
def write(folder, split, *rest):
    if split == sys.argv[2]:
        Path(folder, f"instances_{split}.json").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
    write_annotations(folder, split, *rest)

render.write_annotations = write
render.render(SimpleNamespace(data=Path(sys.argv[1], "minicoco"), train_images=12, val_images=6, seed=0))
"""


def start(code, *arguments):
    """A process of its own that runs `code`, its output on pipes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def bytes_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# A full disk


@pytest.mark.parametrize("error", FULL, ids=["OSError", "SafetensorError"])
def test_full_disk_while_embeddings_are_cached(tmp_path, monkeypatch, error):
    write_dataset(tmp_path / "coco")
    dataset, cache = CaptionedImages(tmp_path / "coco"), tmp_path / "cache"
    save_file, calls = features.save_file, []

    def save(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half a shard")
            raise error
        save_file(tensors, path, metadata)

    monkeypatch.setattr(features, "save_file", save)
    with pytest.raises(
        OSError, match="00000010.safetensors could not be written .*No space left.*Free some disk"
    ):
        extract(dataset, cache)
    [kept] = [path for path in cache.rglob("*") if path.is_file()]
    assert kept.name == "00000000-00000006.safetensors", "the shard before it, and nothing else"
    _, rows = extract(dataset, cache)
    assert rows[0] == 4, "the six images of that shard are not embedded again"


@pytest.mark.parametrize("error", FULL, ids=["OSError", "SafetensorError"])
def test_full_disk_while_a_checkpoint_is_written(tmp_path, monkeypatch, error):
    write_dataset(tmp_path / "coco", images=12)
    expected = run(tmp_path / "coco", tmp_path / "undisturbed")[1].state_dict()
    save_file, calls = checkpoints.save_file, []

    def save(tensors, path):
        calls.append(path)
        if len(calls) == 7:
            raise error
        save_file(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", save)
    with pytest.raises(OSError, match="could not be written .*No space left.*Free some disk space"):
        run(tmp_path / "coco", tmp_path / "run")
    assert not list((tmp_path / "run").glob(".*")), "nothing half written"
    found = run(tmp_path / "coco", tmp_path / "run")[1].state_dict()
    assert all(tensor.equal(expected[name]) for name, tensor in found.items())


def test_full_disk_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    atomic_write(tmp_path / "results.json", "old")

    def write(path, content):
        path.open("wb").write(content[:1])
        raise FULL[0]

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(
        OSError,
        match=r"results.json could not be written \(No space left on device\). Free some disk",
    ):
        atomic_write(tmp_path / "results.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_text() == "old"


# A killed process


def test_killed_while_a_shard_is_written(tmp_path):
    write_dataset(tmp_path / "coco")
    dataset = CaptionedImages(tmp_path / "coco")
    extract(dataset, tmp_path / "undisturbed")
    killed = start(EXTRACT, tmp_path / "coco", tmp_path / "cache")
    errors = killed.communicate(timeout=300)[1]
    assert killed.returncode == -9, errors
    _, rows = extract(dataset, tmp_path / "cache")
    assert rows[0] == 4, "the finished shard of six images is not computed again"
    shards = {
        name: data
        for name, data in bytes_of(tmp_path / "cache").items()
        if name.endswith(".safetensors")
    }
    assert shards == bytes_of(tmp_path / "undisturbed")


def render(folder):
    """What RENDER does, undisturbed: the bytes of a small MiniCOCO."""
    return bytes_of(
        minicoco.render(
            SimpleNamespace(data=folder / "minicoco", train_images=12, val_images=6, seed=0)
        )
    )


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    return render(tmp_path_factory.mktemp("rendered"))


@pytest.mark.parametrize("split", ["train2017", "compositional"])
def test_killed_while_minicoco_is_rendered(rendered, tmp_path, split):
    killed = start(RENDER, tmp_path, split)
    errors = killed.communicate(timeout=120)[
        1
    ]  # returns when the workers too, who share its pipes, have ended
    assert killed.returncode == -9, errors
    assert not (tmp_path / "minicoco").exists(), "nothing that looks whole"
    assert list(tmp_path.glob("*.tmp")), "killed in the middle of it"
    assert render(tmp_path) == rendered
    assert not list(tmp_path.glob("*.tmp"))


def test_two_processes_render_at_once(rendered, tmp_path):
    with FileLock(tmp_path / ".minicoco.lock"):  # both have to wait until both are there
        pair = [start(RENDER, tmp_path, "") for _ in range(2)]
        for process in pair:
            assert "waiting for it" in process.stdout.readline()
    said = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    assert sorted("100%" in out for out, _ in said) == [False, True], (
        "one draws, the other takes what is there"
    )
    assert bytes_of(tmp_path / "minicoco") == rendered


# A pickle where weights should be


@pytest.fixture(params=["plain", "zip"])
def trap(request, tmp_path):
    """A pickle, bare or in the archive that torch.save makes, and the file that exists once somebody has read it."""
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
    return file, marker


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "best"])
def test_a_pickle_in_a_checkpoint_is_refused_unread(tmp_path, trap, name):
    file, marker = trap
    write_dataset(tmp_path / "coco")
    run(tmp_path / "coco", tmp_path / "run", epochs=1)
    [path] = (tmp_path / "run").glob("best-*" if name == "best" else f"step-*/{name}")
    path.write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=f"{path.name} is missing or no safetensors file .*Delete"):
        run(tmp_path / "coco", tmp_path / "run", epochs=1)
    assert not marker.exists()


def test_a_pickle_in_place_of_heads_is_refused_unread(tmp_path, trap):
    file, marker = trap
    save_heads(CLIP(3, 4, embed_dim=8), tmp_path / "heads", {})
    (tmp_path / "heads/heads.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="heads.safetensors is damaged, or not the file .*delete"):
        load_heads(tmp_path / "heads")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("tower", ["image_tower", "text_tower"])
def test_a_pickle_in_a_tuned_tower_is_refused_unread(tmp_path, trap, tower, name):
    file, marker = trap
    model = CLIP(16, 16, embed_dim=8, image_tower=image_tower(), text_tower=text_tower())
    save_model(model, tmp_path / "finetuned", {})
    (tmp_path / "finetuned" / tower / "model.safetensors").unlink()
    (tmp_path / "finetuned" / tower / name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="a tower in .* cannot be read .*delete"):
        load_model(tmp_path / "finetuned", max_length=12)
    assert not marker.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def refused(lock, **_):
        raise PermissionError(13, "Permission denied", lock.lock_file)

    monkeypatch.setattr(render.FileLock, "acquire", refused)
    profile = SimpleNamespace(
        data=tmp_path / "minicoco-smoke", train_images=8, val_images=4, seed=0
    )
    with pytest.raises(
        OSError,
        match=r"minicoco-smoke could not be written \(Permission denied\). Make .* writable",
    ):
        render.render(profile)
