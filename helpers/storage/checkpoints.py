"""Checkpoints that a killed run goes on from, bit for bit: safetensors and JSON, no pickle.

    <folder>/step-00000250/{weights,optimizer}.safetensors, state.json
    <folder>/best-0003.safetensors

A checkpoint is written under another name and renamed when it is complete. What training draws at
random follows from (seed, step), so no state of a random number generator is kept.
"""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from helpers.storage.files import replace_when_complete

KEEP_LAST = 2  # checkpoints


class Checkpoints:
    """The checkpoints of one run in `folder`; with folder None nothing is written.

    run: the Accelerator of the training; settings: what a run that goes on from here must share.
    """

    def __init__(self, folder, model, optimizer, run, settings):
        self.folder = None if folder is None else Path(folder)
        self.model, self.optimizer, self.run, self.settings = model, optimizer, run, settings
        self.writes = self.folder is not None and run.is_main_process
        self.best_weights = self.trainable()
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            for partial in self.folder.glob(".*.tmp"):  # of a run that was killed while writing
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink()

    def trainable(self):
        """Copies on the CPU of the parameters that training changes, by name."""
        return {
            name: parameter.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }

    def paths(self):
        """The complete checkpoints, oldest first."""
        return [] if self.folder is None else sorted(self.folder.glob("step-????????"))

    def save(self, state):
        """Write the checkpoint of state["step"], and remove what it makes superfluous."""
        if not self.writes:
            return
        moments = self.optimizer.state_dict()["state"]  # {number: {"exp_avg": tensor, …}}
        moments = {
            f"{number}.{name}": tensor.cpu().contiguous()
            for number, row in moments.items()
            for name, tensor in row.items()
        }
        scaler = None if self.run.scaler is None else self.run.scaler.state_dict()
        content = {"state": state, "settings": self.settings, "scaler": scaler}
        with replace_when_complete(self.folder / f"step-{state['step']:08d}") as partial:
            partial.mkdir()
            save_file(self.trainable(), partial / "weights.safetensors")
            save_file(moments, partial / "optimizer.safetensors")
            (partial / "state.json").write_text(json.dumps(content))
        for old in self.paths()[:-KEEP_LAST]:
            shutil.rmtree(old)
        for old in self.folder.glob("best-????.safetensors"):
            if old != self.best_path(state["best"]):
                old.unlink()

    def save_best(self, row):
        """Keep the present weights as the best so far; row: its number in the history, from 1."""
        self.best_weights = self.trainable()
        if self.writes:
            with replace_when_complete(self.best_path(row)) as partial:
                save_file(self.best_weights, partial)

    def best_path(self, row):
        return self.folder / f"best-{row or 0:04d}.safetensors"

    def resume(self):
        """The state of the last checkpoint, its weights and moments put in place; else a new one.

        Its best weights are those of the run so far, or where it starts from.
        ValueError where it was written with other settings, or is damaged.
        """
        if not self.paths():
            return {"step": 0, "losses": [], "times": [], "history": [], "best": None}
        path = self.paths()[-1]
        content = json.loads((path / "state.json").read_text())
        before = content["settings"]
        for name, now in json.loads(json.dumps(self.settings)).items():
            if before.get(name) != now:
                fix = "Delete that folder, name another one, or use its settings"
                was = f"{self.folder} was written with {name} = {before.get(name)!r}"
                raise ValueError(f"{was}, this run has {now!r}. {fix}.")
        weights = read_tensors(path / "weights.safetensors")
        moments = {}
        for name, tensor in read_tensors(path / "optimizer.safetensors").items():
            number, kind = name.split(".")
            moments.setdefault(int(number), {})[kind] = tensor
        self.model.load_state_dict(weights, strict=False)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        if content["scaler"] is not None and self.run.scaler is not None:
            self.run.scaler.load_state_dict(content["scaler"])
        best = content["state"]["best"]
        self.best_weights = self.trainable() if best is None else read_tensors(self.best_path(best))
        self.run.print(f"Going on from {path.name} in {self.folder.name}/.")
        return content["state"]

    def how_to_resume(self):
        if not self.paths():
            return "Nothing was kept: give `checkpoints` a folder, and the same call goes on."
        return f"The same call goes on from {self.paths()[-1]}."


def read_tensors(path):
    """The tensors of a safetensors file, in memory of their own.

    Those of a mapped file may be unaligned, which can change the last bits of a product.
    """
    try:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        fix = f"Delete {path.parent}"
        raise ValueError(f"{path} is missing or no safetensors file ({error}). {fix}.") from error


def weights_digest(module):
    """SHA-256 over names, types, shapes and bytes of all weights of a module."""
    lines = []
    for name, weight in sorted(module.state_dict().items()):
        data = weight.cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest = hashlib.sha256(data).hexdigest()
        lines.append(f"{name} {weight.dtype} {tuple(weight.shape)} {digest}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
