"""The captions of MiniCOCO: sentences about a scene, and which scenes a sentence fits.

A caption is a sentence and its facts: what must be true of an image for the sentence to fit it,
{"objects": [(category, colour or None, count), …], "relation": [a, relation, b] or None,
"place": … or None, "time": … or None}.
"""

import math
import random
from itertools import combinations

import numpy as np

from helpers.minicoco import TABLES
from helpers.minicoco.backgrounds import PLACES, TIMES
from helpers.minicoco.scenes import KINDS, Scene, random_numbers, relation_of, side_by_side
from helpers.minicoco.sprites import CATEGORIES, COLOURS

RELATIONS = TABLES["relations"]
NUMBERS = {2: "two", 3: "three"}
# Which details the two captions of a train image have, in turn: the mix of the others' five.
DETAILS = list(combinations(range(5), 2))


def noun_phrase(rng: random.Random, category: str, colour: str | None, count: int) -> str:
    """A noun with its number and colour: "two gray cats", "a pair of orange scissors"."""
    noun = rng.choice(CATEGORIES[category]["nouns"])[count > 1]
    if colour:
        head, of, rest = noun.rpartition("of ")
        noun = f"{head}{of}{colour} {rest}"
    if count > 1:
        return f"{NUMBERS[count]} {noun}"
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def setting(rng: random.Random, scene: Scene, place: bool, time: bool) -> str:
    """Where and when: "on the beach at sunset", or as much of it as the caption says."""
    hours = TIMES[scene.time]["phrases"]
    hour = rng.choice(hours) if len(hours) > 1 else hours[0]
    phrases = [rng.choice(PLACES[scene.place]["phrases"])] if place else []
    return " ".join(phrases + [hour] if time else phrases)


def listed(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def caption(rng: random.Random, scene: Scene, detail: int) -> tuple[str, dict]:
    """One sentence about the scene and its facts. Detail 0 says everything, 4 is the tersest."""
    facts = chosen_facts(rng, scene, detail)
    text = sentence(rng, scene, facts)
    if facts["relation"] and facts["relation"][1] == "near":
        facts["relation"] = None  # near is what anybody calls near: no fact
    return text, facts


def chosen_facts(rng: random.Random, scene: Scene, detail: int) -> dict:
    """What a caption of this detail says of the scene."""
    objects = rng.sample(scene.objects, len(scene.objects))
    alone = len(objects) == 1
    place, time, coloured, relate = True, True, [True] * len(objects), not alone
    if detail == 1:
        time = rng.random() < 0.5
        coloured = [rng.random() < 0.6 for _ in objects]
    elif detail == 2:
        objects = objects[:2]
        time = rng.random() < 0.4
        relate = relate and rng.random() < 0.5
    elif detail == 3:
        coloured = [False] * len(objects)
        place = alone or rng.random() < 0.7
        time = alone or rng.random() < 0.4
        relate = relate and rng.random() < 0.4
    elif detail == 4:
        pair, relate = not alone and rng.random() < 0.8, False
        objects = objects[: 2 if pair else 1]
        place = rng.random() < 0.5 if pair else True
        time = rng.random() < (0.2 if pair else 0.7)
    relation = None
    if relate:
        a, b = objects[:2]
        near = side_by_side(a, b) and rng.random() < 0.5
        relation = [a.category, "near" if near else relation_of(a, b), b.category]
    colours = [o.colour if named else None for o, named in zip(objects, coloured)]
    return {
        "objects": [(o.category, colour, o.count) for o, colour in zip(objects, colours)],
        "relation": relation,
        "place": scene.place if place else None,
        "time": scene.time if time else None,
    }


def sentence(rng: random.Random, scene: Scene, facts: dict) -> str:
    """The facts in one of five ways to say them."""
    nouns = [noun_phrase(rng, *mention) for mention in facts["objects"]]
    where = setting(rng, scene, bool(facts["place"]), bool(facts["time"]))
    related = facts["relation"] is not None
    there = "are" if facts["objects"][0][2] > 1 else "is"
    verb = there if related or len(nouns) == 1 else "are"
    if related:
        word = rng.choice(RELATIONS[facts["relation"][1]])
        rest = f", with {listed(nouns[2:])}" if len(nouns) > 2 else ""
        body = f"{nouns[0]} {word} {nouns[1]}{rest}"
        clause = f"{nouns[0]} {verb} {word} {nouns[1]}{rest}"
    else:
        body = clause = listed(nouns)
    style = rng.randrange(5)
    if style == 0 or (style == 3 and not where):
        text = f"there {there} {body} {where}"
    elif style == 1:
        text = f"{rng.choice(TABLES['introductions'])} {body} {where}"
    elif style == 2 and facts["place"] and not (related and len(nouns) > 2):
        text = f"{clause} {where}" if related else f"{body} {verb} {where}"
    elif style == 3:
        text = f"{where}, {clause}" if related else f"{where}, there {there} {clause}"
    else:
        text = f"{body} {where}"
    return text.strip().capitalize() + "."


def captions_of(split: str, index: int, seed: int, scene: Scene) -> list[tuple[str, dict]]:
    """The captions of one image with their facts, the most detailed first, no two alike.

    Two where many images are trained on, else five.
    """
    rng = random_numbers(split, index, seed, "captions")
    captions: dict[str, dict] = {}
    for detail in DETAILS[index % 10] if split == "train2017" else range(5):
        text, facts = caption(rng, scene, detail)
        while text in captions:
            text, facts = caption(rng, scene, detail)
        captions[text] = facts
    return list(captions.items())


def caption_and_foil(split: str, index: int, seed: int, scene: Scene) -> dict[str, str]:
    """A true "caption" and a "foil", with colours ("binding") or objects ("order") swapped."""
    rng, kind = random_numbers(split, index, seed, "foil"), KINDS[index % 2]
    a, b = scene.objects
    where = setting(rng, scene, place=True, time=False)
    if kind == "binding":

        def phrase(o, colour):  # one seed: the same noun in both sentences
            return noun_phrase(random.Random(o.category), o.category, colour, 1)

        true = f"{phrase(a, a.colour)} and {phrase(b, b.colour)} {where}."
        foil = f"{phrase(a, b.colour)} and {phrase(b, a.colour)} {where}."
    else:
        first, second = (noun_phrase(rng, o.category, None, 1) for o in (a, b))
        relation = RELATIONS[relation_of(a, b)][0]
        true = f"{first} {relation} {second} {where}."
        foil = f"{second} {relation} {first} {where}."
    return {"caption": true.capitalize(), "foil": foil.capitalize(), "kind": kind}


def fits(scenes: list[Scene], caption_facts: list[dict]) -> np.ndarray:
    """True where all facts of a caption hold in a scene: bool `[captions, scenes]`."""
    column = {name: c for c, name in enumerate(CATEGORIES)}
    colour_id = {colour: k for k, colour in enumerate([None, *COLOURS])}
    count, colours = (np.zeros((len(scenes), len(column)), np.int8) for _ in range(2))
    xy = np.full((len(scenes), len(column), 2), np.nan, np.float32)
    for i, scene in enumerate(scenes):
        for o in scene.objects:
            c = column[o.category]
            count[i, c] = o.count
            colours[i, c] = colour_id[o.colour]
            xy[i, c] = o.x, o.y
    places = np.array([scene.place for scene in scenes])
    times = np.array([scene.time for scene in scenes])
    table = np.ones((len(caption_facts), len(scenes)), bool)
    for row, facts in zip(table, caption_facts):
        for category, colour, number in facts["objects"]:
            c = column[category]
            row &= count[:, c] == number
            if colour:
                row &= colours[:, c] == colour_id[colour]
        if facts["place"]:
            row &= places == facts["place"]
        if facts["time"]:
            row &= times == facts["time"]
        if facts["relation"]:
            a, relation, b = facts["relation"]
            axis = 0 if relation in ("left", "right") else 1
            gap = xy[:, column[b], axis] - xy[:, column[a], axis]  # nan where one is missing
            row &= gap > 0 if relation in ("left", "above") else gap < 0
    return table


def attainable(table: np.ndarray, owner: np.ndarray, ks=(1, 5, 10)) -> dict[str, float]:
    """Expected recall of a rule that knows which captions fit which images, and nothing else.

    text → image: a guess among the images that the caption fits. image → text: of the captions that
    fit the image, the one first that fits fewest images; ties in random order. A sensible rule, not
    an optimum.

    table: bool `[M, N]` from `fits`; owner: int `[M]`, each caption's own image. Returns
    "text_to_image/recall@k" and "image_to_text/recall@k" (a hit when any of the image's captions is
    among the first k), between 0 and 1.
    """
    images_of = table.sum(1)  # [M], images that a caption fits
    missed = {k: [] for k in ks}
    for image in np.unique(owner):
        rivals = images_of[table[:, image]]  # of all captions that fit the image
        own = images_of[owner == image]  # of those that are its own
        first = own.min()
        above, tied = int((rivals < first).sum()), int((rivals == first).sum())
        others = tied - int((own == first).sum())
        for k in ks:
            drawn = min(max(0, k - above), tied)  # of the tied ones, so many are among the first k
            missed[k].append(math.comb(others, drawn) / math.comb(tied, drawn))
    result = {}
    for k in ks:
        result[f"text_to_image/recall@{k}"] = float(np.minimum(1, k / images_of).mean())
        result[f"image_to_text/recall@{k}"] = float(1 - np.mean(missed[k]))
    return result
