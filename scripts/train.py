"""Trains on a profile: projection heads on cached features, then the towers named by --tune.

python -m scripts.train --help
accelerate launch -m scripts.train --profile coco --loss siglip
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from accelerate import PartialState

from helpers import training_context
from helpers.config import get_profile
from helpers.data import Examples, load_split
from helpers.encoders import load_towers
from helpers.features import extract_embeddings
from helpers.minicoco import render
from helpers.model import CLIP, SIGLIP_START, save_model
from helpers.storage.files import atomic_write
from helpers.training import fit, tuning


def main(argv=None) -> None:
    """Train heads on cached features, then the towers named by --tune, and keep the model as one folder."""
    parser = argparse.ArgumentParser("python -m scripts.train", description=main.__doc__)
    parser.add_argument("--profile", help="smoke, mini, coco-val or coco (default: mini)")
    parser.add_argument("--loss", choices=("clip", "siglip"), default="clip")
    parser.add_argument(
        "--tune",
        choices=("both", "image", "text", "heads"),
        default="both",
        help="what is not locked",
    )
    parser.add_argument(
        "--epochs", type=int, help="of fine-tuning; the profile says how many by default"
    )
    parser.add_argument("--batch-size", type=int, help="pairs a loss compares, over all processes")
    parser.add_argument(
        "--lr", type=float, help="peak learning rate of the heads while towers are tuned"
    )
    parser.add_argument("--image-lr", type=float, help="of the image tower")
    parser.add_argument("--text-lr", type=float, help="of the text tower")
    parser.add_argument(
        "--accumulate", type=int, default=1, help="batches whose gradients a step adds up"
    )
    parser.add_argument("--chunk", type=int, help="pairs held at once: gradient caching")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument(
        "--precision", choices=("no", "bf16", "fp16"), help="default: what the device is good at"
    )
    parser.add_argument("--every", type=int, default=200, help="steps between two checkpoints")
    parser.add_argument("--tracker", help="tensorboard, wandb, …")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--output", type=Path, help="folder of the model and its checkpoints")
    args = parser.parse_args(argv)

    profile = get_profile(args.profile)
    seed = profile.seed if args.seed is None else args.seed
    output = args.output or profile.cache / f"{args.loss}-{args.tune}-{seed}"
    if profile.rendered:
        render.render(profile)
    images = {split: load_split(profile, split) for split in ("train", "dev")}
    towers = load_towers(profile)
    splits = [
        Examples(part, extract_embeddings(*towers, part, profile.cache, profile.batch_size))
        for part in images.values()
    ]
    torch.manual_seed(seed)
    start = SIGLIP_START if args.loss == "siglip" else {}
    model = CLIP(towers[0].dim, towers[1].dim, profile.embed_dim, *towers, **start)
    shared = {
        "seed": seed,
        "precision": args.precision,
        "about": {"profile": profile.name},
        "tracker": args.tracker,
    }
    histories = {}
    histories["heads"] = fit(
        model,
        *splits,
        epochs=profile.head_epochs,
        patience=10,
        checkpoints=output / "heads",
        **shared,
    )
    if args.tune != "heads":
        image, text = args.tune in ("both", "image"), args.tune in ("both", "text")
        asked = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr}
        asked |= {
            "image_lr": args.image_lr if image else None,
            "text_lr": args.text_lr if text else None,
        }
        settings = tuning(profile, image, text) | {
            name: value for name, value in asked.items() if value is not None
        }
        run, needs = (
            PartialState(),
            training_context.memory_needed(model, image, text, settings["patches"]),
        )
        chosen, why = training_context.choose(
            training_context.look(), settings["batch_size"] // run.num_processes, needs
        )
        run.print(why)
        again = args.gradient_checkpointing or chosen["gradient_checkpointing"] and not args.chunk
        histories["towers"] = fit(
            model,
            *splits,
            accumulate=args.accumulate,
            chunk=args.chunk,
            checkpoints=output / "towers",
            gradient_checkpointing=again,
            every=args.every,
            **settings,
            **shared,
        )
    tuned = {
        "both": ("image_tower", "text_tower"),
        "image": ("image_tower",),
        "text": ("text_tower",),
        "heads": (),
    }
    if PartialState().is_main_process:
        save_model(
            model.cpu(), output / "model", shared["about"] | {"seed": seed}, tuned[args.tune]
        )
        atomic_write(output / "history.json", json.dumps(histories, indent=1))
        print(f"The model is in {output / 'model'}, its history beside it.")


if __name__ == "__main__":
    main()
