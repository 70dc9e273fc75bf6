"""Numbers in the notebooks' prose: printed above, measured in data/results, or cited."""

import json
import re

import pytest

from scripts.run_notebooks import ROOT
from tests.notebooks import NOTEBOOKS, read

# Pictures, formulas, code and what is folded have their own numbers.
APART = re.compile(r"<details>.*?</details>|!\[[^\]]*\]\([^)]*\)|\$+[^$]*\$+|`[^`]*`", re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])(\d*\.\d+|\d+ ?%)(?! ?GHz)")
CITED = re.compile(r"https?://|\d{4}\.\d{5}")
# Levels of confidence, their factors, certainty and one half.
CONSTANTS = {"95 %", "100 %", "1.96", "4.3", "0.5"}


def leaves(content):
    if isinstance(content, (dict, list)):
        parts = content.values() if isinstance(content, dict) else content
        return [leaf for part in parts for leaf in leaves(part)]
    return [abs(float(content))] if isinstance(content, (int, float)) else []


@pytest.fixture(scope="module")
def measured():
    files = (ROOT / "data" / "results").glob("*.json")
    contents = [json.loads(path.read_text()) for path in files]
    return [leaf for content in contents for leaf in leaves(content.get("metrics", []))]


def printed(cell):
    data = [output.get("data", {}) for output in cell.outputs]
    texts = [output.get("text", "") for output in cell.outputs]
    texts += [part.get(kind, "") for part in data for kind in ("text/plain", "text/html")]
    return "\n".join([cell.source, *texts])


def is_known(number, above, measured):
    digits = number.rstrip(" %")
    if re.search(rf"(?<![\d.]){re.escape(digits)}(?!\d)", above):
        return True
    places = len(digits.partition(".")[2])
    scale = 100 if "%" in number else 1
    return any(round(scale * value, places) == float(digits) for value in measured)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_number_in_prose_is_printed_above_measured_or_cited(path, measured):
    above, unknown = "", []
    for cell in read(path).cells:
        if cell.cell_type == "code":
            above += printed(cell)
            continue
        for paragraph in APART.sub("", cell.source).split("\n\n"):
            if not CITED.search(paragraph):
                numbers = set(NUMBER.findall(paragraph)) - CONSTANTS
                unknown += [n for n in numbers if not is_known(n, above, measured)]
    assert not unknown
