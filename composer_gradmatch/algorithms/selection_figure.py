"""The figure of one minibatch's picks: images or texts, those that were picked framed, with their weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Drawn", "draw_selection"]

_PICKED, _LEFT_OUT = "#0173b2", "#767676"
_COLUMNS = 8
#: Inches: of a cell, of what is said above an image, of a line of text, and of the title's lines.
_CELL, _CAPTION, _LINE, _TITLE = 1.2, 0.22, 0.26, 0.22
_WIDTH = 11.0
#: As many letters of a text as there is room for.
_LETTERS = 150
_DPI = 110


@dataclass(frozen=True)
class Drawn:
    """A sample to draw.

    Attributes:
        sample (np.ndarray | str): An image of shape (H, W) or (H, W, 3), or a text.
        label (str): What it is, for people; empty where that is not known.
        weight (float, optional): The weight that it is trained on with; None if it is left out.
    """

    sample: np.ndarray | str
    label: str
    weight: float | None

    @property
    def caption(self) -> str:
        """What stands beside it."""
        weight = "" if self.weight is None else f"w = {self.weight:.2f}"
        return ", ".join(filter(None, (self.label, weight)))

    @property
    def color(self) -> str:
        """Whether it is picked."""
        return _LEFT_OUT if self.weight is None else _PICKED


def draw_selection(drawn: Sequence[Drawn], title: str) -> np.ndarray:
    """Draws samples, in their order.

    Args:
        drawn (Sequence[Drawn]): All images, or all texts.
        title (str): Above them, in one line or more.

    Returns:
        np.ndarray: The figure, uint8, shape (H, W, 3).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    top = _TITLE * (1 + title.count("\n"))
    texts = isinstance(drawn[0].sample, str)
    columns = 1 if texts else min(_COLUMNS, len(drawn))
    rows = -(-len(drawn) // columns)
    # As wide as half a row at least, for the title.
    width = _WIDTH if texts else _CELL * max(columns, _COLUMNS // 2)
    height = rows * (_LINE if texts else _CELL + _CAPTION) + 0.1
    # Not by pyplot, which would show it in a notebook, and asks for a display elsewhere.
    figure = Figure(figsize=(width, height + top), dpi=_DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes: Any = figure.add_axes((0.0, 0.0, 1.0, height / (height + top)))
    axes.axis("off")
    axes.set(xlim=(0, width), ylim=(height, 0))
    figure.text(0.08 / width, 1 - 0.06 / (height + top), title, va="top", fontsize=9, color="black", parse_math=False)
    for i, each in enumerate(drawn):
        if isinstance(each.sample, str):
            _draw_text(axes, each, i * _LINE)
        else:
            _draw_image(axes, each, i % columns * _CELL, i // columns * (_CELL + _CAPTION))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # Letters that the font lacks are drawn as boxes.
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw_image(axes: Any, drawn: Drawn, left: float, top: float) -> None:
    from matplotlib.patches import Rectangle

    assert not isinstance(drawn.sample, str)
    image, side = _stretched(drawn.sample), _CELL - 0.12
    scale = side / max(image.shape[:2])
    height, width = image.shape[0] * scale, image.shape[1] * scale
    x, y = left + (_CELL - width) / 2, top + _CAPTION + (side - height) / 2
    picked = drawn.weight is not None
    extent = (x, x + width, y + height, y)
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, extent=extent, aspect="auto", alpha=1.0 if picked else 0.45)
    if picked:
        axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=drawn.color, linewidth=2.5))
    middle = left + _CELL / 2
    caption = _shortened(drawn.caption, 18)
    axes.text(middle, y - 0.05, caption, ha="center", fontsize=8, color=drawn.color, parse_math=False)


def _draw_text(axes: Any, drawn: Drawn, top: float) -> None:
    from matplotlib.patches import Rectangle

    assert isinstance(drawn.sample, str)
    if drawn.weight is not None:
        box = Rectangle((0.05, top + 0.02), _WIDTH - 0.1, _LINE - 0.04, linewidth=1.5)
        box.set(facecolor="#e3f0f8", edgecolor=drawn.color)
        axes.add_patch(box)
    text = _shortened(drawn.sample, _LETTERS) or "(empty)"
    for x, said in ((0.12, _shortened(drawn.caption, 20)), (1.55, text)):
        color = "black" if drawn.weight is not None else _LEFT_OUT
        axes.text(x, top + _LINE / 2, said, va="center", fontsize=8, color=color, clip_on=True, parse_math=False)


def _stretched(image: np.ndarray) -> np.ndarray:
    """Stretches an image to the range of its values; those that are not finite are drawn as the lowest."""
    image = image.astype(np.float64)
    finite = image[np.isfinite(image)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    return (np.nan_to_num(image, nan=low, posinf=high, neginf=low) - low) / (high - low or 1.0)


def _shortened(text: str, letters: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= letters else text[: letters - 1] + "…"
