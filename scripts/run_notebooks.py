"""Executes notebooks, in order and from top to bottom, and saves what they show.

    python scripts/run_notebooks.py --out build/notebooks           # copies; the notebooks themselves stay as they are
    python scripts/run_notebooks.py --in-place --only 03            # as committed: refuses noise and machine paths

Stops at the first error with the notebook, the cell and the traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parent.parent
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
MACHINE_PATH = re.compile(
    r"(?<![\w.~])/(?:work|root|home|Users|tmp|private|mnt)/[\w.]|[A-Z]:\\+Users\\"
)
LIMIT_OUTPUT, LIMIT_NOTEBOOK = 200_000, 3_000_000  # bytes


class NotebookError(Exception):
    """A notebook did not run: names the notebook and the cell, with the traceback."""


def execute(path: Path, cwd: Path, env: dict[str, str] | None = None, timeout: int | None = None):
    """Runs the notebook `path` in the folder `cwd` and returns it executed and tidied. The file stays as it is.

    `env` is added to the environment; `timeout` is seconds a cell. Raises NotebookError.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        extra_arguments=[
            "--log-level=ERROR"
        ],  # its word about unencrypted loopback is no reader's concern
        resources={"metadata": {"path": str(cwd)}},
        store_widget_state=False,
        coalesce_streams=True,
        record_timing=False,
    )
    quiet = {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    with client.setup_kernel(env={**os.environ, "PYTHONHASHSEED": "0", **quiet, **(env or {})}):
        for number, cell in enumerate(notebook.cells, 1):
            try:
                client.execute_cell(cell, number - 1)
            except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
                first_line = cell.source.strip().split("\n")[0]
                reason = ANSI.sub("", str(error)).strip()
                raise NotebookError(
                    f"{path.name}, cell {number} ({first_line!r}) failed:\n{reason}"
                ) from error
    return tidy(notebook)


def tidy(notebook):
    """Drops widget views, timings and versions; a progress bar keeps its last state."""
    kept = {
        key: notebook.metadata[key] for key in ("accelerator", "colab") if key in notebook.metadata
    }
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": kernel, "language_info": {"name": "python"}, **kept}
    )
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                output.text = settle(output.text)
        if cell.cell_type == "code":
            cell.outputs = [
                o
                for o in cell.outputs
                if WIDGET_VIEW not in o.get("data", {}) and o.get("text") != ""
            ]
    return notebook


def settle(text: str) -> str:
    """What a terminal shows in the end: a carriage return goes back to the start of the line and overwrites it."""
    lines = []
    for line in ANSI.sub("", text).split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return "\n".join(lines) if any(lines) else ""


def problems(notebook) -> list[str]:
    """What must not be committed in an executed notebook, each with its cell."""
    found = ["metadata.widgets is saved"] if "widgets" in notebook.metadata else []
    if len(nbformat.writes(notebook).encode()) > LIMIT_NOTEBOOK:
        found.append(f"the notebook is over {LIMIT_NOTEBOOK:,} bytes")
    for number, cell in enumerate(notebook.cells, 1):
        if MACHINE_PATH.search(cell.source):
            found.append(f"cell {number}: a path of this machine in the source")
        for output in cell.get("outputs", []):
            shown = {
                k: v for k, v in output.get("data", {}).items() if not k.startswith("image/png")
            }
            text = json.dumps([output.get("text", ""), shown], ensure_ascii=False)
            if output.output_type == "error" or output.get("name") == "stderr":
                found.append(f"cell {number}: {output.get('name', 'error')}: {text[:300]}")
            if MACHINE_PATH.search(text) or str(ROOT) in text:
                found.append(f"cell {number}: a path of this machine in an output: {text[:300]}")
            if len(json.dumps(output)) > LIMIT_OUTPUT:
                found.append(
                    f"cell {number}: an output of {len(json.dumps(output)):,} bytes, over {LIMIT_OUTPUT:,}"
                )
            if WIDGET_VIEW in output.get("data", {}):
                found.append(f"cell {number}: a saved widget view")
    return found


def save(notebook, path: Path) -> None:
    """Writes the notebook atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    os.replace(partial, path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="folder for the executed copies")
    where.add_argument("--in-place", action="store_true", help="overwrite the notebooks")
    parser.add_argument("--profile", help="sets CLIP_PROFILE")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="NN", help="notebooks whose names start so"
    )
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all in notebooks/")
    args = parser.parse_args()

    paths = args.notebooks or sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    paths = [path for path in paths if path.name.startswith(tuple(args.only))]
    if not paths:
        parser.error("there is no such notebook")
    env = {"CLIP_PROFILE": args.profile} if args.profile else {}
    if args.out:  # the committed results and models belong to the committed notebooks
        build = args.out.resolve().parent
        env |= {"CLIP_RESULTS": str(build / "results"), "CLIP_TRAINED": str(build / "trained")}
        for part in ("heads", "finetuned"):
            shutil.copytree(ROOT / "assets" / part, build / "trained" / part, dirs_exist_ok=True)
    start = time.time()
    for path in paths:
        print(f"{path.name:<40}", end="", flush=True)
        began = time.time()
        try:
            notebook = execute(path, cwd=path.resolve().parent, env=env)
            if args.in_place and (found := problems(notebook)):
                raise NotebookError(f"{path.name} is not fit to be committed:\n" + "\n".join(found))
        except NotebookError as error:
            print(f"failed after {time.time() - began:.0f} s\n\n{error}", flush=True)
            return 1
        save(notebook, path if args.in_place else args.out / path.name)
        print(f"{time.time() - began:6.0f} s", flush=True)
    print(f"{'in all':<40}{time.time() - start:6.0f} s → {args.out or 'in place'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
