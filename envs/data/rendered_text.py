"""Generates the rendered questions without an image: sums, opposites, colours of well-known objects."""

from __future__ import annotations

import random

OPPOSITES = (
    "hot cold, big small, up down, left right, fast slow, day night, open closed, old new, light dark, "
    "high low, wet dry, full empty, hard soft, early late, rich poor, happy sad, black white, near far"
)
PAIRS = tuple(tuple(pair.split()) for pair in OPPOSITES.split(", "))
COLOURS_OF_THINGS = {
    "the sky": "blue",
    "the sun": "yellow",
    "grass": "green",
    "snow": "white",
    "coal": "black",
    "blood": "red",
    "chocolate": "brown",
    "a banana": "yellow",
    "a tomato": "red",
    "an elephant": "gray",
    "a frog": "green",
    "the sea": "blue",
    "milk": "white",
    "wood": "brown",
}


def text_question(rng: random.Random) -> tuple[str, str, str]:
    """Draw a question without an image: its kind, its text and its answer."""
    kind = rng.choice(("sum", "opposite", "thing"))
    if kind == "sum":
        one, other = rng.randint(0, 9), rng.randint(0, 9)
        return kind, f"What is {one} plus {other}?", str(one + other)
    if kind == "opposite":
        word, answer = rng.sample(rng.choice(PAIRS), 2)
        return kind, f"What is the opposite of {word}?", answer
    thing = rng.choice(sorted(COLOURS_OF_THINGS))
    return kind, f"What color is {thing}?", COLOURS_OF_THINGS[thing]
