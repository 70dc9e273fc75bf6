"""Notebook 08's Slurm lines, run with the variables of one node."""

import os
import re
import subprocess
import sys
from pathlib import Path

from scripts.run_notebooks import ROOT
from tests.notebooks import prose

SAYS_HOW_MANY = """
import sys

from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
rank, world = accelerator.process_index, accelerator.num_processes
sys.stdout.write(f"process {rank} of {world}\\n")  # in one go, so that no other comes between
accelerator.wait_for_everyone()
accelerator.end_training()
"""


def program(path, lines):
    path.write_text(f"#!/bin/bash\n{lines}\n")
    path.chmod(0o755)


def test_the_slurm_script_starts_four_processes_on_a_node(tmp_path):
    text = prose(ROOT / "notebooks" / "08_scaling_out.ipynb")
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", text, re.DOTALL)
    trained = "-m scripts.train --profile coco --loss siglip"
    assert trained in script and "--num_processes $((4 * SLURM_NNODES))" in script
    (tmp_path / "hello.py").write_text(SAYS_HOW_MANY)
    job = script.replace(trained, str(tmp_path / "hello.py")).replace("29500", "0")
    program(tmp_path / "srun", 'exec "$@"')
    program(tmp_path / "scontrol", "echo localhost; echo elsewhere")
    program(tmp_path / "job", job.partition("\n")[2])
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    node = {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "node[1-2]"}
    env = {**os.environ, **node, "PATH": path, "USER": "reader", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([tmp_path / "job"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("process "))
    assert lines == [f"process {rank} of 4" for rank in range(4)]
