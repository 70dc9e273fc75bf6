"""Pretrained transformers from folders in Hugging Face format, with what they were trained with.

towers.json says, by model_type, which are accepted: the class that reads one, how many tokens stand
before an image's patches, and how many positions captions cannot use. Weights come from safetensors
only.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer, ViTImageProcessor

KINDS = json.loads(Path(__file__).with_name("towers.json").read_text(encoding="utf-8"))

# transformers draws bars and reports the layers that we leave out; what is missing raises below.
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


class Resize(NamedTuple):
    """How an image becomes a square of pixels: by default squashed, whatever its shape.

    edge: what it is brought to before the middle is cut out, None where nothing is; squash: both
    its sides, else only the shorter one.
    """

    resample: int = Image.Resampling.BILINEAR
    edge: int | None = None
    squash: bool = True

    def plan(self, box: tuple, size: int) -> tuple[tuple, tuple]:
        """How a part of an image becomes size × size pixels: what it is resized to, and the cut.

        box: left, upper, right, lower. Returns (width, height), and in those pixels left, upper,
        right, lower of the middle.
        """
        edge, sides = self.edge or size, (box[2] - box[0], box[3] - box[1])
        full = (edge, edge)
        if not self.squash:
            full = tuple(max(edge, int(edge * side / min(sides))) for side in sides)
        left, upper = ((pixels - size) // 2 for pixels in full)
        return full, (left, upper, left + size, upper + size)


SQUASH = Resize()


def read_model(folder: Path, side: str) -> nn.Module:
    """The transformer of a folder, float32, for one side of KINDS.

    transformers fills what it does not find with random numbers and only logs it. Here that is a
    ValueError, and so is a model of another type.
    """
    kinds = KINDS[side]
    model_type = json.loads(Path(folder, "config.json").read_text()).get("model_type")
    if model_type not in kinds:
        raise ValueError(
            f"{folder}/config.json says model_type {model_type!r}, and for {side} it has to be one "
            f"of {', '.join(kinds)}: name another model."
        )
    if not list(Path(folder).glob("*.safetensors")):
        fix = "name another model, or save this one with save_pretrained where you trust it"
        raise FileNotFoundError(f"{folder} has no safetensors, and nothing else is opened: {fix}.")
    kind = getattr(transformers, kinds[model_type]["class"])
    options = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    # A weight that no gradient reaches, as DINOv2's mask token, would stop several processes.
    options |= kinds[model_type].get("options", {})
    if "add_pooling_layer" in inspect.signature(kind).parameters:
        options["add_pooling_layer"] = False
    model, report = kind.from_pretrained(folder, dtype=torch.float32, **options)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{folder}/model.safetensors lacks {len(missing)} of {len(model.state_dict())} weights "
            f"({', '.join(missing[:3])} …): is it the file of another model? Save this one again."
        )
    return model


def read_preprocessing(folder: Path) -> tuple[int, list[float], list[float], Resize]:
    """Size, mean, std and `Resize` of a folder's preprocessor_config.json.

    Raises OSError where there is none, ValueError where it makes no squares.
    """
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    full = processor.size
    cut = processor.crop_size if getattr(processor, "do_center_crop", False) else full
    edge, squash = full.height or full.shortest_edge, full.height is not None
    if not (edge and cut.height and cut.height == cut.width <= edge and full.height == full.width):
        raise ValueError(
            f"{folder}/preprocessor_config.json makes no squares (size {full}, cut to {cut}): a "
            "tower takes images that are squashed to a square, or the middle of them."
        )
    resize = Resize(processor.resample, None if squash and edge == cut.height else edge, squash)
    return cut.height, list(processor.image_mean), list(processor.image_std), resize


def save_preprocessing(folder: Path, size: int, mean, std, resize: Resize) -> None:
    """Write the preprocessor_config.json that `read_preprocessing` reads."""
    edge = resize.edge or size
    full = {"height": edge, "width": edge} if resize.squash else {"shortest_edge": edge}
    options = {"size": full, "resample": resize.resample, "image_mean": mean, "image_std": std}
    if resize.edge is not None:
        options |= {"do_center_crop": True, "crop_size": {"height": size, "width": size}}
    ViTImageProcessor(**options).save_pretrained(folder)


def read_tokenizer(folder: Path):
    """The tokenizer of a folder.

    Raises FileNotFoundError where it has no vocabulary; ImportError for a SigLIP's without the
    package sentencepiece.
    """
    vocabularies = ("tokenizer.json", "vocab.*", "spiece.model")
    if not any(list(Path(folder).glob(name)) for name in vocabularies):
        fix = "copy the tokenizer's files from where the model came from"
        raise FileNotFoundError(f"{folder} has no tokenizer.json and no vocabulary: {fix}.")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def whole_words(tower, caption: str) -> list[tuple[str, list[int]]]:
    """A caption's words as a text tower reads them, each with the places of its pieces."""
    limits = {"truncation": True, "max_length": tower.max_length}
    encoding = tower.tokenizer(caption, return_offsets_mapping=True, **limits)
    words = {}
    for k, number in enumerate(encoding.word_ids()):
        if number is not None:  # [CLS] and [SEP] belong to no word
            words.setdefault(number, []).append(k)
    spans = encoding["offset_mapping"]
    ends = [(spans[places[0]][0], spans[places[-1]][1]) for places in words.values()]
    names = [caption[start:end].strip() for start, end in ends]
    return list(zip(names, words.values()))


def report_cut_captions(tower, texts: list[str]) -> None:
    """Prints how many captions are longer than a text tower reads; nothing where none is."""
    # A token takes a byte or more, and two are special.
    long = [text for text in texts if len(text.encode()) + 2 > tower.max_length]
    cut = sum(len(ids) > tower.max_length for ids in tower.tokenizer([*long, ""])["input_ids"])
    if cut:
        print(f"{cut:,} of {len(texts):,} captions are cut: more than {tower.max_length} tokens.")
