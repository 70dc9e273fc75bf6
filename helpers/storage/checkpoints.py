"""Checkpoints that a killed run goes on from, bit for bit: tensors in safetensors, everything else in JSON, no pickle.

    <folder>/step-00000250/{weights,optimizer}.safetensors, state.json      <folder>/best-0003.safetensors

A checkpoint is written under another name and renamed when it is complete. What training draws at random follows from
(seed, step), so a checkpoint needs no state of a random number generator.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from helpers.storage.files import replace_when_complete


class Checkpoints:
    """The checkpoints of one run in `folder`; with folder None nothing is kept.

    settings: what must be equal in a run that goes on from here; keep: how many of the last are kept.
    """

    def __init__(self, folder, model, optimizer, run, settings: dict, keep: int = 2):
        self.folder = None if folder is None else Path(folder)
        self.model, self.optimizer, self.run, self.settings, self.keep = (
            model,
            optimizer,
            run,
            settings,
            keep,
        )
        self.writes = self.folder is not None and run.is_main_process
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            for partial in self.folder.glob(
                ".*.tmp"
            ):  # left by a run that was killed while writing
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink()

    def trainable(self) -> dict:
        """Copies on the CPU of the parameters that training changes, by name."""
        named = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        return {
            name: p.detach().cpu().clone(memory_format=torch.contiguous_format) for name, p in named
        }

    def paths(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return [] if self.folder is None else sorted(self.folder.glob("step-????????"))

    def save(self, state: dict) -> None:
        """Write the checkpoint of state["step"], and drop what it makes superfluous."""
        if not self.writes:
            return
        optimizer = self.optimizer.state_dict()[
            "state"
        ]  # {number of the parameter: {"exp_avg": tensor, …}}
        moments = {
            f"{k}.{name}": t.cpu().contiguous()
            for k, row in optimizer.items()
            for name, t in row.items()
        }
        scaler = self.run.scaler.state_dict() if self.run.scaler is not None else None
        content = {
            "state": state,
            "settings": self.settings,
            "threads": torch.get_num_threads(),
            "scaler": scaler,
        }
        with replace_when_complete(self.folder / f"step-{state['step']:08d}") as partial:
            partial.mkdir()
            save_file(self.trainable(), partial / "weights.safetensors")
            save_file(moments, partial / "optimizer.safetensors")
            (partial / "state.json").write_text(json.dumps(content))
        for old in self.paths()[: -self.keep]:
            shutil.rmtree(old)
        for old in self.folder.glob("best-????.safetensors"):
            if old != self._best_path(state["best"]):
                old.unlink()

    def save_best(self, epoch: int) -> None:
        """Keep the present weights as the best so far; a checkpoint that names this epoch has to follow."""
        if self.writes:
            with replace_when_complete(self._best_path(epoch)) as partial:
                save_file(self.trainable(), partial)

    def best(self, state: dict) -> dict | None:
        """The best weights of a resumed run, None where there are none yet."""
        return None if state["best"] is None else _read(self._best_path(state["best"]))

    def resume(self, state: dict) -> dict:
        """The state of the last checkpoint, its weights and moments put in place; without a checkpoint `state` itself.

        ValueError where it belongs to another run: other shapes, other settings, each named.
        """
        if not self.paths():
            return state
        path = self.paths()[-1]
        try:
            content = json.loads((path / "state.json").read_text())
            kept, threads = content["settings"], content["threads"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{path} is no checkpoint of this course ({error!r}). Delete it."
            ) from error
        fix = "Delete the folder, name another one, or use the settings that it was written with."
        for name in sorted(kept.keys() | self.settings.keys()):
            if kept.get(name) != self.settings.get(name):
                was, now = kept.get(name), self.settings.get(name)
                raise ValueError(
                    f"{path} was written with {name} = {was!r}, this run has {now!r}. {fix}"
                )
        weights, own = _read(path / "weights.safetensors"), self.trainable()
        for name in sorted(weights.keys() | own.keys()):
            was, now = (
                list(tensors[name].shape) if name in tensors else None for tensors in (weights, own)
            )
            if was != now:
                raise ValueError(f"{path} has {name} of shape {was}, this model has {now}. {fix}")
        self.model.load_state_dict(weights, strict=False)
        moments = {}
        for name, tensor in _read(path / "optimizer.safetensors").items():
            number, kind = name.split(".")
            moments.setdefault(int(number), {})[kind] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        if content["scaler"] is not None and self.run.scaler is not None:
            self.run.scaler.load_state_dict(content["scaler"])
        if self.run.is_main_process:
            said = f"Going on from {path.name} in {self.folder.name}/."
            if threads != torch.get_num_threads():
                said += f" It was computed with {threads} threads, now there are {torch.get_num_threads()}:"
                said += " the last bits may differ."
            print(said)
        return content["state"]

    def last(self) -> str:
        """The last complete checkpoint, in words."""
        return (
            f"The last good checkpoint is {self.paths()[-1]}."
            if self.paths()
            else "There is no checkpoint yet."
        )

    def how_to_resume(self) -> str:
        if self.folder is None:
            return (
                "Nothing was kept: give `checkpoints` a folder, and an interrupted run can go on."
            )
        return f"{self.last()} The same call goes on from there."

    def _best_path(self, epoch: int | None) -> Path:
        return self.folder / f"best-{epoch or 0:04d}.safetensors"


def _read(path: Path) -> dict:
    """The tensors of a safetensors file in memory of their own: those of a mapped file may be unaligned, and
    unaligned tensors can change the last bits of a product."""
    try:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} is missing or no safetensors file ({error}). Delete {path.parent}."
        ) from error
