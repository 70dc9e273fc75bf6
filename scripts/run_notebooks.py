"""Executes notebooks, in order and from top to bottom, and saves what they show.

    python scripts/run_notebooks.py --out build/notebooks    # copies; the originals stay
    python scripts/run_notebooks.py --in-place --only 03     # as committed; see `problems`

Stops at the first error with the notebook, the cell and the traceback. In place, solutions are run
and checked like all cells, and saved without what they print, which would give the answer away.
"""

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
SOLUTION = "#@title Solution"  # how the cell of a solution starts
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
LIMIT_OUTPUT, LIMIT_NOTEBOOK = 200_000, 3_000_000  # bytes
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
FOLDERS = "work|root|home|Users|tmp|private|mnt"
MACHINE_PATH = re.compile(rf"(?<![\w.~])/(?:{FOLDERS})/[\w.]|[A-Z]:\\+Users\\")
INLINE = "module://matplotlib_inline.backend_inline"
ENVIRONMENT = {"PYTHONHASHSEED": "0", "MPLBACKEND": INLINE, "PYDEVD_DISABLE_FILE_VALIDATION": "1"}


class NotebookError(Exception):
    """A notebook did not run, or shows what must not be committed."""


def execute(path: Path, cwd: Path, env: dict[str, str] | None = None, timeout: int | None = None):
    """Runs the notebook `path` in the folder `cwd` and returns it executed and tidied.

    The file stays as it is. `env` is added to the environment; `timeout` is seconds a cell.
    Raises NotebookError, which names the notebook and the cell.
    """
    notebook = nbformat.read(path, as_version=4)
    kernel = {"kernel_name": "python3", "extra_arguments": ["--log-level=ERROR"]}
    saved = {"store_widget_state": False, "coalesce_streams": True}
    where = {"metadata": {"path": str(cwd)}}
    client = NotebookClient(notebook, timeout=timeout, resources=where, **kernel, **saved)
    with client.setup_kernel(env={**os.environ, **ENVIRONMENT, **(env or {})}):
        for number, cell in enumerate(notebook.cells):
            try:
                client.execute_cell(cell, number)
            except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
                where = f"{path.name}, cell {number + 1} ({cell.source.strip().splitlines()[0]!r})"
                raise NotebookError(f"{where} failed:\n{ANSI.sub('', str(error))}") from error
    return tidy(notebook)


def tidy(notebook):
    """Drops widget views, timings and versions; a progress bar keeps its last state."""
    for key in set(notebook.metadata) - {"accelerator", "colab"}:
        del notebook.metadata[key]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata |= {"kernelspec": kernel, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            for output in cell.outputs:
                if output.output_type == "stream":
                    output.text = settle(output.text)
            outputs = [o for o in cell.outputs if WIDGET_VIEW not in o.get("data", {})]
            cell.outputs = [o for o in outputs if o.get("text") != ""]
    return notebook


def settle(text: str) -> str:
    """What a terminal shows in the end: after a carriage return a line is overwritten."""
    lines = []
    for line in ANSI.sub("", text).split("\n"):
        final = ""
        for part in line.split("\r"):
            final = part + final[len(part) :]
        lines.append(final.rstrip())
    return "\n".join(lines) if any(lines) else ""


def without_solutions(notebook):
    """Empties the outputs of solutions."""
    for cell in notebook.cells:
        if cell.source.startswith(SOLUTION):
            cell.outputs = []
    return notebook


def problems(notebook) -> list[str]:
    """What must not be committed in an executed notebook, each with its cell."""
    found = ["metadata.widgets is saved"] if "widgets" in notebook.metadata else []
    if len(nbformat.writes(notebook).encode()) > LIMIT_NOTEBOOK:
        found.append(f"the notebook is over {LIMIT_NOTEBOOK:,} bytes")
    for number, cell in enumerate(notebook.cells, 1):
        if MACHINE_PATH.search(cell.source):
            found.append(f"cell {number}: a path of this machine in the source")
        for output in cell.get("outputs", []):
            size = len(json.dumps(output))
            data = dict(output.get("data", {}))
            data.pop("image/png", None)
            text = json.dumps([output.get("text", ""), data], ensure_ascii=False)
            if output.output_type == "error" or output.get("name") == "stderr":
                found.append(f"cell {number}: {output.get('name', 'error')}: {text[:300]}")
            if MACHINE_PATH.search(text) or str(ROOT) in text:
                found.append(f"cell {number}: a path of this machine in an output: {text[:300]}")
            if size > LIMIT_OUTPUT:
                found.append(f"cell {number}: an output of {size:,} bytes, over {LIMIT_OUTPUT:,}")
            if WIDGET_VIEW in data:
                found.append(f"cell {number}: a saved widget view")
    return found


def save(notebook, path: Path) -> None:
    """Writes the notebook atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    nbformat.write(notebook, partial)
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="folder for the executed copies")
    where.add_argument("--in-place", action="store_true", help="overwrite the notebooks")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NN", help="their first letters")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all in notebooks/")
    args = parser.parse_args()

    paths = args.notebooks or sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    paths = [path for path in paths if path.name.startswith(tuple(args.only))]
    if not paths:
        parser.error("there is no such notebook")
    env, start = {}, time.time()
    if args.out:  # the committed results and models belong to the committed notebooks
        build = args.out.resolve().parent
        env = {"CLIP_RESULTS": str(build / "results"), "CLIP_TRAINED": str(build / "trained")}
        for part in ("heads", "finetuned"):
            shutil.copytree(ROOT / "assets" / part, build / "trained" / part, dirs_exist_ok=True)
    for path in paths:
        print(f"{path.name:<40}", end="", flush=True)
        began = time.time()
        try:
            notebook = execute(path, cwd=path.resolve().parent, env=env)
            if args.in_place and (found := problems(without_solutions(notebook))):
                raise NotebookError(f"{path.name} is not fit to be committed:\n" + "\n".join(found))
        except NotebookError as error:
            print(f"failed after {time.time() - began:.0f} s\n\n{error}", flush=True)
            sys.exit(1)
        save(notebook, path if args.in_place else args.out / path.name)
        print(f"{time.time() - began:6.0f} s", flush=True)
    print(f"{'in all':<40}{time.time() - start:6.0f} s → {args.out or 'in place'}")


if __name__ == "__main__":
    main()
