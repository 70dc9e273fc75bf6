"""Says where the course is kept on GitHub: in the Colab badge of each notebook and in the address that it clones.

make colab REPO=owner/name
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = re.compile(r"(?!-)[A-Za-z0-9-]{1,39}(?<!-)/(?!\.{1,2}$)[A-Za-z0-9_.-]{1,100}(?<!\.git)")
PLACES = (  # a badge's link; the set-up cell's line, plain or in JSON. What stands between the two groups is the name
    re.compile(r"(colab\.research\.google\.com/github/)[\w.-]+/[\w.-]+(/blob/main/)"),
    re.compile(r'(REPO = \\?"https://github\.com/)[\w.-]+/[\w.-]+(\\?")'),
)


def stamp(text: str, repo: str) -> str:
    """`text` with `repo` ("owner/name") wherever it names the course's repository. ValueError for any other name."""
    if not NAME.fullmatch(repo):
        raise ValueError(
            f"{repo!r} is no repository on GitHub. Say which: make colab REPO=owner/name"
        )
    for place in PLACES:
        text = place.sub(rf"\g<1>{repo}\g<2>", text)
    return text


def main(repo: str, root: Path = ROOT) -> list[Path]:
    """Stamps all notebooks, scripts/setup_cell.py and README.md below `root`; returns the files that changed."""
    changed = []
    for path in [
        *sorted(root.glob("notebooks/*.ipynb")),
        root / "scripts/setup_cell.py",
        root / "README.md",
    ]:
        before = path.read_bytes()
        after = stamp(before.decode(), repo).encode()
        if after != before:
            partial = path.with_name(f".{path.name}.partial")
            partial.write_bytes(after)
            os.replace(partial, path)
            changed.append(path)
    return changed


if __name__ == "__main__":
    try:
        changed = main(sys.argv[1] if len(sys.argv) == 2 else "")
    except ValueError as error:
        sys.exit(str(error))
    print(f"{len(changed)} files now name {sys.argv[1]}.")
