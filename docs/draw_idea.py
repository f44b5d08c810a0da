"""Draws `docs/idea.png`, the picture of the idea in the README: `python docs/draw_idea.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

LAYERS = 8
TOKENS = "tt" + "m" * 7 + "ttt"
COLOURS = {"t": "#3b6ea8", "m": "#e08a3c"}
TITLES = {0: "stock model: insert layer 0", 5: "insert layer 5 of 8"}


def main() -> None:
    """Draw the rows that each decoder layer computes, in the stock model and above an insert layer."""
    figure, panels = plt.subplots(1, 2, figsize=(9.2, 3.9), sharey=True)
    for panel, (insert_layer, title) in zip(panels, TITLES.items(), strict=True):
        draw(panel, insert_layer)
        panel.set_title(title, fontsize=12)
    panels[0].set_ylabel("decoder layer", fontsize=11)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("idea.png"), dpi=130)


def draw(panel: Axes, insert_layer: int) -> None:
    """Draw one square per layer and token; a token that is absent from a layer leaves its square empty."""
    for column, kind in enumerate(TOKENS):
        for layer in range(LAYERS):
            absent = kind == "m" and layer < insert_layer
            square = FancyBboxPatch(
                (column + 0.12, layer + 0.12),
                0.76,
                0.76,
                boxstyle="round,pad=0,rounding_size=0.12",
                facecolor="white" if absent else COLOURS[kind],
                edgecolor="#cccccc" if absent else COLOURS[kind],
                linestyle=":" if absent else "-",
            )
            panel.add_patch(square)
        if kind == "m" and insert_layer:
            panel.annotate(
                "",
                (column + 0.5, insert_layer + 0.1),
                (column + 0.5, -0.3),
                arrowprops={"arrowstyle": "->", "color": COLOURS["m"], "linewidth": 1.3},
            )
    image = TOKENS.index("m"), TOKENS.rindex("m") + 1
    for (start, end), label, kind in (
        ((0, image[0]), "text", "t"),
        (image, "image tokens", "m"),
        ((image[1], len(TOKENS)), "question", "t"),
    ):
        panel.text((start + end) / 2, -0.45, label, ha="center", va="top", color=COLOURS[kind], fontsize=10.5)
    present = sum(LAYERS - insert_layer if kind == "m" else LAYERS for kind in TOKENS)
    share = present / (LAYERS * len(TOKENS))
    panel.text(
        len(TOKENS) / 2,
        LAYERS + 0.15,
        f"{share:.0%} of the rows computed",
        ha="center",
        fontsize=10,
        color="#555555",
    )
    panel.set(xlim=(-0.2, len(TOKENS) + 0.2), ylim=(-1.05, LAYERS + 0.7), xticks=[])
    panel.set_yticks([layer + 0.5 for layer in range(LAYERS)], [str(layer) for layer in range(LAYERS)])
    panel.tick_params(length=0)
    for spine in panel.spines.values():
        spine.set_visible(False)


if __name__ == "__main__":
    main()
