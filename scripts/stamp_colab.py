"""Says where the course is kept on GitHub: in each notebook's Colab badge and set-up cell.

make colab REPO=owner/name
"""

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = re.compile(r"(?!-)[A-Za-z0-9-]{1,39}(?<!-)/(?!\.{1,2}$)[A-Za-z0-9_.-]{1,100}(?<!\.git)")
# A badge's link; the set-up cell's line, plain or in JSON. Between the two groups stands the name.
PLACES = (
    re.compile(r"(colab\.research\.google\.com/github/)[\w.-]+/[\w.-]+(/blob/main/)"),
    re.compile(r'(REPO = \\?"https://github\.com/)[\w.-]+/[\w.-]+(\\?")'),
)


def stamp(text: str, repo: str) -> str:
    """`text` with `repo` ("owner/name") wherever it names the course's repository."""
    for place in PLACES:
        text = place.sub(rf"\g<1>{repo}\g<2>", text)
    return text


def main(repo: str, root: Path = ROOT) -> list[Path]:
    """Stamps notebooks, their set-up cell and README.md; returns the files that changed."""
    if not NAME.fullmatch(repo):
        raise ValueError(f"{repo!r} is no repository on GitHub: make colab REPO=owner/name")
    files = [root / "notebooks/setup_cell.py", root / "README.md", *root.glob("notebooks/*.ipynb")]
    before = {path: path.read_bytes() for path in files}
    after = {path: stamp(content.decode(), repo).encode() for path, content in before.items()}
    changed = [path for path in files if after[path] != before[path]]
    for path in changed:
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(after[path])
        os.replace(partial, path)
    return changed


if __name__ == "__main__":
    try:
        print(f"{len(main(sys.argv[1]))} files now name {sys.argv[1]}.")
    except ValueError as error:
        sys.exit(str(error))
