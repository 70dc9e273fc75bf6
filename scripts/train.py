"""Train on a profile: heads on cached features, then the towers that --tune names.

The weights before and after tuning, averaged, are the model. WiSE-FT, Wortsman et al. 2021.

    python -m scripts.train --help
    accelerate launch -m scripts.train --profile coco --loss siglip
"""

import argparse
import copy
import gc
import json
import sys
from pathlib import Path

from accelerate import PartialState

from helpers import load_or_build
from helpers.config import get_profile, pick_device
from helpers.model import average_weights, save_model
from helpers.storage.files import atomic_write
from helpers.training import fit


def arguments(argv):
    parser = argparse.ArgumentParser("python -m scripts.train", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--profile", help="smoke, mini, coco-val or coco (default: mini)")
    add("--data", default="", help="your own folder of pictures with captions, or caption file")
    add("--columns", default="", help="what its columns are called, as in photo,comment")
    add("--skip-faults", action="store_true", help="leave out what is wrong there")
    add("--loss", choices=("clip", "siglip"), default="clip")
    add("--tune", choices=("both", "image", "text", "heads"), default="both")
    add("--epochs", type=int, help="of fine-tuning; the profile says how many by default")
    add("--batch-size", type=int, help="images that a loss compares while towers are tuned")
    add("--lr", type=float, help="peak learning rate of the heads while towers are tuned")
    add("--image-lr", type=float, help="of the image tower")
    add("--text-lr", type=float, help="of the text tower")
    add("--alpha", type=float, help="share of the tuned weights in the averaged model")
    add("--grad-cache-chunk", type=int, help="rows whose activations are held at once")
    add("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    add("--precision", choices=("no", "bf16", "fp16"), help="default: the device's best")
    add("--save-every", type=int, default=200, help="steps between two checkpoints")
    add("--seed", type=int)
    add("--output", type=Path, help="folder of the model and its checkpoints")
    args = parser.parse_args(argv)
    if args.epochs == 0 or args.batch_size in (0, 1):
        parser.error("--epochs wants 1 or more, --batch-size 2 or more")
    return args


def load_examples(profile):
    """The train and dev splits, prepared by one process while others wait."""
    # Without `cpu`, processes on a machine without GPU would not find each other.
    with PartialState(cpu=pick_device().type == "cpu").main_process_first():
        return [load_or_build.examples(profile, split) for split in ("train", "dev")]


def finished(history):
    """The history; the script ends where Ctrl-C has ended the training."""
    if history.interrupted:
        sys.exit(130)
    return history


def main(argv=None):
    args = arguments(argv)
    profile = get_profile(args.profile, args.data, args.columns, args.skip_faults)
    seed = profile.seed if args.seed is None else args.seed
    output = args.output or profile.cache / f"{args.loss}-{args.tune}-{seed}"
    train, dev = load_examples(profile)
    name = {"clip": "projection", "siglip": "siglip-projection"}[args.loss]
    model = load_or_build.fresh_heads(profile, name, seed)
    shared = {"seed": seed, "precision": args.precision}
    settings = load_or_build.heads_training(profile, name) | {"checkpoints": output / "heads"}
    histories = {"heads": finished(fit(model, train, dev, **settings, **shared))}
    tuned = [side for side in ("image", "text") if args.tune in (side, "both")]
    if tuned:
        before = copy.deepcopy(model.cpu())
        settings = load_or_build.tuning(profile, "image" in tuned, "text" in tuned)
        names = ["epochs", "batch_size", "lr", *(f"{side}_lr" for side in tuned)]
        names += ["grad_cache_chunk", "gradient_checkpointing", "save_every"]
        settings |= {k: v for k, v in vars(args).items() if k in names and v is not None}
        settings["checkpoints"] = output / "towers"
        model = load_or_build.for_batches_of(model, settings["batch_size"])
        dev = load_or_build.first(dev, load_or_build.DEV_LOOKED_AT)
        histories["towers"] = finished(fit(model, train, dev, **settings, **shared))
    if PartialState().is_main_process:
        meta = {"profile": profile.name, "seed": seed}
        parts = [f"{side}_tower" for side in tuned]
        if tuned:
            save_model(model.cpu(), output / "tuned", meta, parts)
            meta["alpha"] = load_or_build.ALPHA[name] if args.alpha is None else args.alpha
            model = average_weights(before, model, meta["alpha"])
        save_model(model.cpu(), output / "model", meta, parts)
        usual = args.loss == "clip" and load_or_build.tuning(profile).items() <= settings.items()
        if usual and load_or_build.finetuned(profile) is None:
            load_or_build.save_finetuned(profile, model, meta)  # where notebooks look for it
        atomic_write(output / "history.json", json.dumps(histories, indent=1))
        print(f"The model is in {output / 'model'}, its history beside it.")
    # The group's threads must end before Python does; what fit has left in cycles holds the group.
    gc.collect()
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
