"""The exercises' answers, checked: a hint when wrong, and what to notice when right.

exercises.json holds, for each exercise, the right answer, known wrong ones with a hint each, the
hint for all others, and what to notice. Where the answer is a function, "inputs" are its arguments
and "right" is its result; several "tests" are tried in their order. {"tensor": …} is a tensor, and
"within" is how far an answer may be off. Where it is text, "patterns" are regular expressions, each
with the hint for the answers that it fits; what none of them fits is right.
"""

import copy
import json
import re
import textwrap
from pathlib import Path

import torch


def tensors(entry: dict):
    """{"tensor": [[1, 2]]} as a tensor, any other object as it is."""
    return torch.tensor(entry["tensor"]) if "tensor" in entry else entry


TABLE = Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
EXERCISES = json.loads(TABLE, object_hook=tensors)


def check(name: str, answer, strict: bool = False) -> None:
    """Prints whether `answer` solves the exercise `name`. With `strict`, a wrong answer raises.

    Raises ValueError for an exercise that does not exist, AssertionError only if strict.
    """
    if name not in EXERCISES:
        raise ValueError(f"There is no exercise {name!r}. There are: {', '.join(EXERCISES)}.")
    if answer is ...:
        mark, hint = "·", "not yet. Replace the ... with your answer and run this cell again."
    else:
        try:
            hint = mistake(EXERCISES[name], answer)
        except Exception as error:
            # A reader's function may raise anything.
            hint = f"your answer raised {error!r}."
        mark = "✗" if hint else "✓"
    if hint and strict:
        raise AssertionError(f"{name}: {hint}")
    print(f"{mark} {name}: {hint or EXERCISES[name]['notice']}")


def mistake(exercise: dict, answer) -> str | None:
    """The hint for a wrong answer, None for a right one."""
    if "patterns" in exercise:
        return text_mistake(exercise["patterns"], answer)
    for test in exercise.get("tests", [exercise]):
        result = answer(*copy.deepcopy(test["inputs"])) if "inputs" in test else answer
        if same(result, test["right"], exercise.get("within", 1e-5)):
            continue
        for wrong, hint in test.get("wrong", ()):
            if same(result, wrong, 1e-6, relative=0.01):
                return hint
        shape, right = getattr(result, "shape", None), getattr(test["right"], "shape", None)
        if right is not None and shape is not None and shape != right:
            return f"the result has shape {list(shape)}, not {list(right)}."
        if "inputs" in test:
            return f"{test['hint']} You get {textwrap.shorten(str(result), 80)}"
        return test["hint"]
    return None


def same(result, right, within: float, relative: float = 1e-4) -> bool:
    """Whether both are equal, nearly; numbers of any type and library count."""
    if isinstance(right, dict):
        return {str(key): int(value) for key, value in dict(result).items()} == right
    if isinstance(right, list):
        result = list(result)
        return len(result) == len(right) and all(
            same(a, b, within, relative) for a, b in zip(result, right)
        )
    if isinstance(result, list):  # of rows, each a list, an array or a tensor
        result = torch.stack([torch.as_tensor(row) for row in result]) if result else torch.empty(0)
    result = torch.as_tensor(result).detach().cpu().double()
    right = torch.as_tensor(right).double()
    if right.dim() == 0 and result.numel() == 1:
        result = result.squeeze()  # a number in brackets
    return result.shape == right.shape and torch.allclose(result, right, relative, within)


def text_mistake(patterns: list, answer) -> str | None:
    """The hint of the first regular expression that fits a wrong answer, written out as text."""
    for pattern, hint in patterns:
        match = re.search("".join(pattern), str(answer))  # a long one stands in several strings
        if match:
            return match.expand(hint)
    return None
