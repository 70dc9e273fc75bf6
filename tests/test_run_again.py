"""Interrupt, run again, go on: what trains in 03, 04 and 05, in a real kernel."""

import json
import os

import pytest
from jupyter_client.manager import start_new_kernel

from scripts.run_notebooks import ENVIRONMENT
from tests.coco_val import SIZES_OF
from tests.notebooks import NOTEBOOKS, copy_course, read, said

TRAININGS = {"03": 5, "04": 4, "05": 6}  # notebook: how many of its cells train
SMOKE = {"CLIP_PROFILE": "smoke", "LOKY_MAX_CPU_COUNT": "1"}  # 05's race in the kernel itself
MARK, BAR = "about to step", "?run/s]"  # the latter is a race's bar at its start
# Sections of 04 that count bytes and operations: half of its time, and nothing is trained there.
COUNTING = "## What it costs in memory", "## How long it would take"
# Before each step of an optimizer the kernel says so, and waits until it is interrupted.
WAIT = f"""
import signal, sys, time
from torch.optim.optimizer import register_optimizer_step_pre_hook

def wait(*_, out=sys.stdout):  # which cells may redirect
    before, end = signal.getsignal(signal.SIGINT), time.time() + 60
    print({MARK!r}, file=out, flush=True)
    while signal.getsignal(signal.SIGINT) is before and time.time() < end:
        time.sleep(0.05)

its_waiting = register_optimizer_step_pre_hook(wait)
"""


def sources(number):
    """A notebook's code, without the sections that only count."""
    (path,) = [path for path in NOTEBOOKS if path.name.startswith(number)]
    cells, section = [], ""
    for cell in read(path).cells:
        section = cell.source if cell.source.startswith("## ") else section
        if cell.cell_type == "code" and not section.startswith(COUNTING):
            cells.append(cell.source)
    return cells


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A copy of the course, with two seeds: images are drawn and embedded once for all tests."""
    folder = tmp_path_factory.mktemp("course")
    copy_course(folder)
    with open(folder / "helpers/config.py", "a", encoding="utf-8") as table:
        table.write(SIZES_OF.format(sizes={"seeds": 2}))
    return folder


@pytest.fixture
def start(course, tmp_path):
    """start(**env): a kernel in that copy, as a function of a cell's source."""
    kernels = []

    def start(**env):
        env = {**os.environ, **ENVIRONMENT, "CLIP_RESULTS": str(tmp_path / "results"), **env}
        quiet = ["--log-level=ERROR"]
        kernels.append(start_new_kernel(cwd=course / "notebooks", env=env, extra_arguments=quiet))
        manager, client = kernels[-1]

        def run(source, mark=MARK):
            """What the cell says, and how often it was interrupted because it said `mark`."""
            outputs, interrupts = [], []

            def listen(message):
                outputs.append(message["content"])
                if mark in outputs[-1].get("text", "") and not (interrupts and mark == BAR):
                    interrupts.append(mark)
                    manager.interrupt_kernel()

            reply = client.execute_interactive(source, output_hook=listen, timeout=300)["content"]
            error = reply.get("ename")
            assert error is None or interrupts and error == "KeyboardInterrupt", (source, reply)
            return said(outputs), len(interrupts)

        return run

    yield start
    for manager, client in kernels:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("number", TRAININGS)
def test_interrupted_and_run_again_all_is_as_it_was(number, start, course, tmp_path):
    cells = sources(number)
    result, kept = tmp_path / f"results/{number}.json", course / "data/cache/smoke/heads"

    run = start(**SMOKE)
    for cell in cells:
        run(cell)
    written, models = result.read_bytes(), {p: p.read_bytes() for p in kept.rglob("*.*")}

    run(WAIT)
    after_a_whole_run = [run(cell) for cell in cells]
    assert sum(interrupts > 0 for _, interrupts in after_a_whole_run) == TRAININGS[number]
    assert result.read_bytes() == written

    result.unlink()
    run = start(**SMOKE)
    run(WAIT)
    for cell, as_said in zip(cells, after_a_whole_run):
        assert run(cell) == as_said, f"a number of an earlier run: {cell}"
    assert not result.exists()

    run("its_waiting.remove()")
    for cell in cells:
        run(cell)
    assert json.loads(result.read_text())["metrics"] == json.loads(written)["metrics"]
    assert {p: p.read_bytes() for p in kept.rglob("*.*")} == models


def test_processes_are_interrupted_too(start, tmp_path):
    """Races on two cores: what is not finished is no result, and later races are run."""
    run = start(CLIP_PROFILE="smoke")
    for cell in sources("05"):
        tuning = "def side_by_side" in cell
        _, interrupts = run(cell, mark=BAR if tuning else MARK)
        assert interrupts == tuning
    assert not (tmp_path / "results").exists()
