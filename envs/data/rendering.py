"""Renders images with questions, in LLaVA's instruction JSON.

The data trains and evaluates the tiny backbone without any download: coloured shapes (`coco/`), written words
and handwritten digits (`textvqa/`), several shapes and their relations (`gqa/`), and questions without an
image. A `Scene` lists all objects before anything is drawn, so every question has a certain answer.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .rendered_text import text_question

SIZE = 64
"""Side of an image in pixels; each quarter (32 x 32 pixels) holds at most one shape."""

COLOURS = {
    "red": (250, 10, 10),
    "green": (10, 240, 10),
    "blue": (10, 10, 250),
    "yellow": (250, 250, 10),
    "teal": (10, 128, 128),
    "gray": (128, 128, 128),
    "black": (10, 10, 10),
    "brown": (165, 42, 42),
}
SHAPES = ("circle", "rectangle", "triangle", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right")
WORDS = (
    *("stop", "open", "exit", "taxi", "milk", "cafe", "hotel", "bank", "park", "sale", "shop"),
    *("food", "zoo", "book", "fish", "bread", "train", "north", "south", "east", "west", "music"),
    *("pizza", "juice", "water", "night", "king", "gold", "tea", "bus", "map", "sun"),
)
KINDS = {
    "coco": ("caption", "color", "shape", "size"),
    "textvqa": ("word", "digit", "place"),
    "gqa": ("count", "exist", "place", "relation"),
}
"""Kinds of questions about the pictures of each source."""
SOURCES = tuple(KINDS)

Side = Literal["train", "held_out"]


# `side_of` hashes a scene's repr: names of `Item`, `Scene` and their fields are part of the split.
@dataclass(frozen=True)
class Item:
    """One object in a picture.

    `what` is a shape, a word of WORDS or a digit; `box` is (left, top, right, bottom) in pixels; `place`
    indexes PLACES; `sample` is the row of scikit-learn's digits, and -1 for other objects.
    """

    what: str
    colour: str
    rgb: tuple[int, int, int]
    size: str
    place: int
    box: tuple[int, int, int, int]
    sample: int = -1


@dataclass(frozen=True)
class Scene:
    """All that a picture shows: its source, its RGB background and its objects."""

    source: str
    background: tuple[int, int, int]
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Question:
    """A question about a scene, its kind and its answer."""

    kind: str
    text: str
    answer: str


def side_of(scene: Scene) -> Side:
    """The scene's side of the split, by a hash of all objects in it; a fifth of scenes is held out."""
    return "held_out" if hashlib.sha256(repr(scene).encode()).digest()[0] % 5 == 0 else "train"


def draw_scene(source: str, rng: random.Random, side: Side) -> Scene:
    """Draw a scene of this source and side of the split.

    The samples of handwritten digits are disjoint between the two sides, too.
    """
    compose = {"coco": _compose_coco, "textvqa": _compose_textvqa, "gqa": _compose_gqa}[source]
    while True:
        background = (rng.randint(215, 255), rng.randint(215, 255), rng.randint(215, 255))
        scene = Scene(source, background, compose(rng, side))
        if side_of(scene) == side:
            return scene


def _compose_coco(rng: random.Random, side: Side) -> tuple[Item, ...]:
    """One or two different shapes."""
    count = rng.choice((1, 1, 2))
    return _shapes(rng, count, rng.sample(SHAPES, count))


def _compose_gqa(rng: random.Random, side: Side) -> tuple[Item, ...]:
    """One to four shapes."""
    count = rng.choice((1, 2, 2, 3, 4))
    return _shapes(rng, count, rng.choices(SHAPES, k=count))


def _shapes(rng: random.Random, count: int, shapes: list[str]) -> tuple[Item, ...]:
    """Shapes of different colours in different quarters of the image, in reading order."""
    places = sorted(rng.sample(range(4), count))
    colours = rng.sample(sorted(COLOURS), count)
    items = []
    for place, shape, colour in zip(places, shapes, colours, strict=True):
        size = rng.choice(("small", "large"))
        side = rng.randint(11, 15) if size == "small" else rng.randint(22, 28)
        items.append(_item(rng, shape, colour, size, place, side))
    return tuple(items)


def _item(
    rng: random.Random, what: str, colour: str, size: str, place: int, side: int, sample: int = -1
) -> Item:
    """A square object of `side` pixels at a random position inside its quarter of the image."""
    left = place % 2 * 32 + rng.randint(1, 31 - side)
    top = place // 2 * 32 + rng.randint(1, 31 - side)
    red, green, blue = (min(255, max(0, value + rng.randint(-10, 10))) for value in COLOURS[colour])
    return Item(what, colour, (red, green, blue), size, place, (left, top, left + side, top + side), sample)


def _compose_textvqa(rng: random.Random, side: Side) -> tuple[Item, ...]:
    """A written word in the upper or lower half of the image, and a handwritten digit in the other half."""
    dark = ("red", "blue", "teal", "black", "brown")
    sample = rng.choice(_digit_samples(side))
    digit_place = rng.randrange(4)
    digit = _item(rng, str(_digits()[1][sample]), rng.choice(dark), "large", digit_place, 28, sample)
    word = rng.choice(WORDS)
    height = rng.choice((17, 18, 19))
    width = round(ImageFont.load_default(height).getlength(word))
    left, top = rng.randint(1, 62 - width), (1 - digit_place // 2) * 32 + rng.randint(3, 30 - height)
    place = 2 * (1 - digit_place // 2) + (left + width // 2 >= 32)
    colour = rng.choice(dark)
    text = Item(word, colour, COLOURS[colour], "large", place, (left, top, left + width, top + height))
    return (text, digit)


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 handwritten digits: images (1797, 8, 8) in [0, 16] and their values."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target


@cache
def _digit_samples(side: Side) -> tuple[int, ...]:
    """Rows of scikit-learn's digits that belong to one side of the split."""
    return tuple(i for i in range(len(_digits()[1])) if (i % 5 == 0) == (side == "held_out"))


def render(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB image of 64 x 64 pixels; equal scenes give equal pixels."""
    image = Image.new("RGB", (SIZE, SIZE), scene.background)
    draw = ImageDraw.Draw(image)
    for item in scene.items:
        left, top, right, bottom = item.box
        if item.sample >= 0:
            ink = Image.fromarray((_digits()[0][item.sample] * 255 / 16).astype(np.uint8))
            image.paste(
                item.rgb, item.box, ink.resize((right - left, bottom - top), Image.Resampling.BILINEAR)
            )
        elif item.what in WORDS:
            font = ImageFont.load_default(bottom - top)
            draw.text((left, top), item.what, fill=item.rgb, font=font, anchor="lt")
        elif item.what == "circle":
            draw.ellipse(item.box, fill=item.rgb)
        elif item.what == "rectangle":
            draw.rectangle(item.box, fill=item.rgb)
        elif item.what == "triangle":
            draw.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=item.rgb)
        else:
            third_x, third_y = (right - left) // 3, (bottom - top) // 3
            draw.rectangle((left, top + third_y, right, bottom - third_y), fill=item.rgb)
            draw.rectangle((left + third_x, top, right - third_x, bottom), fill=item.rgb)
    return image


def questions(scene: Scene, rng: random.Random, kinds: Collection[str] = ()) -> list[Question]:
    """Questions about a scene in random order, of the given `kinds` or by default those of its source."""
    kinds = kinds or KINDS[scene.source]
    generate = _text_questions if scene.source == "textvqa" else _shape_questions
    selected = [question for question in dict.fromkeys(generate(scene.items, rng)) if question.kind in kinds]
    rng.shuffle(selected)
    return selected


def _text_questions(items: tuple[Item, ...], rng: random.Random) -> Iterator[Question]:
    """Questions about the written word and the handwritten digit."""
    word, digit = items
    for form in ("What word is written?", "What does the sign say?"):
        yield Question("word", form, word.what)
    for form in ("What digit is drawn?", "Which number is handwritten?"):
        yield Question("digit", form, digit.what)
    yield Question("place", "Where is the digit?", PLACES[digit.place])


def _shape_questions(items: tuple[Item, ...], rng: random.Random) -> Iterator[Question]:
    """Questions about number, attributes, existence and relations of shapes."""
    yield Question("count", "How many shapes are there?", str(len(items)))
    shape = rng.choice((rng.choice(items).what, rng.choice(SHAPES)))
    yield Question("count", f"How many {_plural(shape)} are there?", str(sum(i.what == shape for i in items)))
    if len(items) <= 2:
        caption = " and ".join(f"a {item.size} {item.colour} {item.what}" for item in items)
        yield Question("caption", rng.choice(("Describe the image.", "What is in the image?")), caption)
    for item in items:
        yield from _attribute_questions(item, items, rng)
    yield from _existence_questions(items, rng)
    yield from _relation_questions(items, rng)


def _relation_questions(items: tuple[Item, ...], rng: random.Random) -> Iterator[Question]:
    """Questions about the relative positions of two shapes."""
    for _ in range(2 * len(items) - 2):
        one, other = rng.sample(items, 2)
        between = f"the {_refer(one, items, rng)} {{}} the {_refer(other, items, rng)}?"
        if one.place % 2 != other.place % 2:
            answer = "left" if one.place % 2 < other.place % 2 else "right"
            yield Question("relation", "Is " + between.format("left or right of"), answer)
        if one.place // 2 != other.place // 2:
            answer = "above" if one.place < other.place else "below"
            yield Question("relation", "Is " + between.format("above or below"), answer)


def _attribute_questions(item: Item, items: tuple[Item, ...], rng: random.Random) -> Iterator[Question]:
    """Questions about one shape's colour, form, size and place."""
    alone = len(items) == 1
    if sum(other.what == item.what for other in items) == 1:
        form = rng.choice(("What color is the {}?", "What is the color of the {}?"))
        name = rng.choice((item.what, "shape")) if alone else item.what
        yield Question("color", form.format(name), item.colour)
    plain = rng.choice(("What shape is in the image?", "What shape is present?"))
    yield Question("shape", plain if alone else f"What is the {item.colour} shape?", item.what)
    yield Question("size", f"Is the {_refer(item, items, rng)} small or large?", item.size)
    yield Question("place", f"Where is the {_refer(item, items, rng)}?", PLACES[item.place])


def _existence_questions(items: tuple[Item, ...], rng: random.Random) -> Iterator[Question]:
    """As many questions with answer yes as with answer no, except where all shapes are present."""
    for template, present, candidates in (
        ("{} shape", {item.colour for item in items}, COLOURS),
        ("{}", {item.what for item in items}, SHAPES),
    ):
        for answer, pool in (("yes", sorted(present)), ("no", sorted(set(candidates) - present))):
            if pool:
                form = rng.choice(("Is there a {}?", "Does the image contain a {}?"))
                yield Question("exist", form.format(template.format(rng.choice(pool))), answer)


def _refer(item: Item, items: tuple[Item, ...], rng: random.Random) -> str:
    """A noun phrase that refers to this object and to no other of the scene."""
    by_shape = sum(other.what == item.what for other in items) == 1
    return item.what if by_shape and rng.random() < 0.5 else f"{item.colour} shape"


def _plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def render_instructions(
    out: Path,
    images: int,
    seed: int,
    *,
    side: Side = "held_out",
    questions_per_image: int = 4,
    sources: tuple[str, ...] = SOURCES,
) -> Path:
    """Write pictures and questions about them as LLaVA's instruction JSON, and return that file's path.

    Each question is a record of one turn. Every fifth picture has a further record of three turns, and every
    third is followed by a question without an image. Ids have the form `gqa-000123-2-count`: source, picture,
    number, kind. Equal seeds write equal files.

    Args:
        out: Folder for `instructions.json` and the pictures (`coco/000000.png`, ...).
        images: Number of pictures.
        seed: Seed of all random choices.
        side: Side of the split; the tiny backbone was trained on nothing from the default side.
        questions_per_image: Largest number of questions per picture.
        sources: Sources of the pictures, which take turns.
    """
    rng = random.Random(f"{seed} {side}")
    records: list[dict[str, Any]] = []
    for number in range(images):
        source = sources[number % len(sources)]
        scene = draw_scene(source, rng, side)
        path = f"{source}/{number:06d}.png"
        (out / source).mkdir(parents=True, exist_ok=True)
        render(scene).save(out / path)
        selected = questions(scene, rng)[:questions_per_image]
        for i, question in enumerate(selected):
            records.append(_record(f"{source}-{number:06d}-{i}-{question.kind}", [question], path))
        if number % 5 == 0 and len(selected) >= 3:
            records.append(_record(f"{source}-{number:06d}-{len(selected)}-dialogue", selected[:3], path))
        if number % 3 == 0:
            question = Question(*text_question(rng))
            records.append(_record(f"text-{number:06d}-0-{question.kind}", [question], None))
    out.mkdir(parents=True, exist_ok=True)
    instructions = out / "instructions.json"
    instructions.write_text(json.dumps(records, indent=1))
    return instructions


def _record(name: str, turns: list[Question], image: str | None) -> dict[str, Any]:
    """A LLaVA record of one conversation, about `image` where there is one."""
    conversations = []
    for turn, question in enumerate(turns):
        mark = "<image>\n" if image and turn == 0 else ""
        conversations.append({"from": "human", "value": mark + question.text})
        conversations.append({"from": "gpt", "value": question.answer})
    record: dict[str, Any] = {"id": name, "conversations": conversations}
    return record | ({"image": image} if image else {})


def kind_of(record_id: str) -> str:
    """The kind of question in a rendered record's id: `"count"` of `"gqa-000123-2-count"`."""
    return record_id.rsplit("-", 1)[-1]
