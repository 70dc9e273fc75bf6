"""The captions of MiniCOCO: sentences about a scene, and which scenes a sentence fits.

A caption is a sentence and its claim: what must be true of a picture for the sentence to fit it.
"""

from __future__ import annotations

import math
import random

import numpy as np

from helpers.minicoco.backgrounds import PLACES, TIMES
from helpers.minicoco.scenes import Scene, relation_of
from helpers.minicoco.sprites import CATEGORIES, COLOURS

RELATIONS = {
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "higher up than"),
    "below": ("below", "under"),
    "near": ("next to", "beside", "near"),
}
NUMBERS = {2: "two", 3: "three"}


def noun_phrase(rng: random.Random, category: str, colour: str | None, count: int) -> str:
    """A noun with its number and colour: "a red car", "two gray cats", "a pair of orange scissors"."""
    one, many = rng.choice(CATEGORIES[category][5].split()).replace("_", " ").split("/")
    noun = one if count == 1 else many
    if colour:
        head, of, rest = noun.rpartition("of ")
        noun = f"{head}{of}{colour} {rest}"
    if count > 1:
        return f"{NUMBERS[count]} {noun}"
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def setting(rng: random.Random, scene: Scene, place: bool, time: bool) -> str:
    """Where and when: "on the beach at sunset", or as much of it as is told."""
    phrases = PLACES[scene.place][0].split("|")
    hour = TIMES[scene.time] or rng.choice(("during the day", "in daylight"))
    return " ".join(([rng.choice(phrases)] if place else []) + ([hour] if time else []))


def listed(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def caption(rng: random.Random, scene: Scene, detail: int) -> tuple[str, dict]:
    """One sentence about the scene and its claim. Detail 0 tells everything, 4 is the tersest."""
    things = rng.sample(scene.things, len(scene.things))
    alone = len(things) == 1
    place, time, coloured, relate = True, True, [True] * len(things), not alone
    if detail == 1:
        time = rng.random() < 0.5
        coloured = [rng.random() < 0.6 for _ in things]
    elif detail == 2:
        things, time, relate = things[:2], rng.random() < 0.4, relate and rng.random() < 0.5
    elif detail == 3:
        coloured = [False] * len(things)
        place, time, relate = (
            alone or rng.random() < 0.7,
            alone or rng.random() < 0.4,
            relate and rng.random() < 0.4,
        )
    elif detail == 4:
        pair = not alone and rng.random() < 0.8
        things, relate = things[: 2 if pair else 1], False
        place, time = (
            (rng.random() < 0.5, rng.random() < 0.2) if pair else (True, rng.random() < 0.7)
        )
    relation = relation_of(*things[:2]) if relate else None
    mentions = [(t.category, t.colour if c else None, t.count) for t, c in zip(things, coloured)]
    claim = {
        "things": mentions,
        "relation": [things[0].category, relation, things[1].category]
        if relation not in (None, "near")
        else None,
        "place": scene.place if place else None,
        "time": scene.time if time else None,
    }
    nouns = [noun_phrase(rng, *m) for m in mentions]
    where = setting(rng, scene, place, time)
    verb = "are" if mentions[0][2] > 1 or (not relation and len(nouns) > 1) else "is"
    if relation:
        word = rng.choice(RELATIONS[relation])
        rest = f", with {listed(nouns[2:])}" if len(nouns) > 2 else ""
        body, clause = (
            f"{nouns[0]} {word} {nouns[1]}{rest}",
            f"{nouns[0]} {verb} {word} {nouns[1]}{rest}",
        )
    else:
        body = clause = listed(nouns)
    there = "are" if mentions[0][2] > 1 else "is"
    style = rng.randrange(5)
    if style == 0 or (style == 3 and not where):
        text = f"there {there} {body} {where}"
    elif style == 1:
        text = f"{rng.choice(('a picture of', 'an image of', 'a drawing of', 'a scene with'))} {body} {where}"
    elif style == 2 and where and not (relation and len(nouns) > 2):
        text = f"{clause} {where}" if relation else f"{body} {verb} {where}"
    elif style == 3 and where:
        text = f"{where}, {'there ' + there + ' ' if not relation else ''}{clause}"
    else:
        text = f"{body} {where}"
    text = " ".join(text.split())
    return text[0].upper() + text[1:] + ".", claim


def fits(scenes: list[Scene], claims: list[dict]) -> np.ndarray:
    """True where a caption's claim holds in a scene: bool `[captions, scenes]`."""
    names, shades = list(CATEGORIES), [None, *COLOURS]
    count, shade = (np.zeros((len(scenes), len(names)), np.int8) for _ in range(2))
    xy = np.full((len(scenes), len(names), 2), np.nan, np.float32)
    for i, scene in enumerate(scenes):
        for t in scene.things:
            c = names.index(t.category)
            count[i, c], shade[i, c], xy[i, c] = t.count, shades.index(t.colour), (t.x, t.y)
    places, times = np.array([s.place for s in scenes]), np.array([s.time for s in scenes])
    table = np.ones((len(claims), len(scenes)), bool)
    for row, claim in zip(table, claims):
        for category, colour, number in claim["things"]:
            c = names.index(category)
            row &= count[:, c] == number
            if colour:
                row &= shade[:, c] == shades.index(colour)
        if claim["place"]:
            row &= places == claim["place"]
        if claim["time"]:
            row &= times == claim["time"]
        if claim["relation"]:
            a, relation, b = claim["relation"]
            axis, sign = (
                (0 if relation in ("left", "right") else 1),
                (1 if relation in ("left", "above") else -1),
            )
            row &= sign * (xy[:, names.index(b), axis] - xy[:, names.index(a), axis]) > 0
    return table


def ceiling(table: np.ndarray, owner: np.ndarray, ks=(1, 5, 10)) -> dict[str, float]:
    """Expected recall of a perfect retriever, ties in random order.

    table: bool `[M, N]` from `fits`; owner: int `[M]`, each caption's own image. Returns "text_to_image/recall@k" and
    "image_to_text/recall@k" (found when any of the image's captions is among the first k), between 0 and 1.
    """
    images_of = table.sum(1)  # images that a caption fits
    captions_of = table.sum(0)  # captions that fit an image, its own among them
    own = np.bincount(owner, minlength=table.shape[1])
    result = {}
    for k in ks:
        result[f"text_to_image/recall@{k}"] = float(np.minimum(1, k / images_of).mean())
        missed = [
            math.comb(int(m - o), k) / math.comb(int(m), k) if m > k else 0.0
            for m, o in zip(captions_of, own)
        ]
        result[f"image_to_text/recall@{k}"] = float(1 - np.mean(missed))
    return result
