"""Fetches COCO 2017: python -m scripts.download_coco --profile coco-val"""

import argparse
import sys

from helpers.config import get_profile
from helpers.storage.download import download


def main(argv: list[str] | None = None) -> None:
    """Fetch what a profile needs of COCO 2017 into data/coco, or where CLIP_COCO_DIR says."""
    parser = argparse.ArgumentParser("python -m scripts.download_coco", description=main.__doc__)
    sizes = "coco-val (1.1 GB to fetch) or coco (20 GB)"
    parser.add_argument("--profile", default="coco-val", help=sizes)
    parser.add_argument("--delete-zips", action="store_true", help="each as soon as it is unpacked")
    args = parser.parse_args(argv)
    try:
        profile = get_profile(args.profile)
        download(profile, args.delete_zips)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    note = "rendered by notebook 01, nothing to fetch" if profile.rendered else "complete"
    print(f"{profile.data}: {note}")


if __name__ == "__main__":
    main()
