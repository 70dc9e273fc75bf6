"""MiniCOCO: scenes drawn from OpenMoji, with captions, in the format of COCO 2017.

tables.json holds what is data. A category: COCO's id and supercategory, its drawings, which of the
`paints` it takes (none: it keeps its own colours), its size, and the nouns for it, singular and
plural. A place: its phrases, where ground meets sky (share of the height), the ground's colours
from far to near, and what stands along the horizon, or a room's wall. A group: how one, two or
three equal objects share a spot, in units of their size.
"""

import json
from pathlib import Path

TABLES = json.loads(Path(__file__).with_name("tables.json").read_text(encoding="utf-8"))
