"""A chart's SVG read back: what a reader sees, independent of what drew it."""

import re
from xml.etree import ElementTree

import numpy as np


class Drawn:
    """curves: (role, dashed, points in the values of the axes) of the lines; ends, dots: (role,
    point) of the discs.
    """

    def __init__(self, svg: str):
        self.root = ElementTree.fromstring(svg)
        self.width, self.height = map(float, self.root.get("viewBox").split()[2:])
        texts = [
            (one.get("style"), float(one.get("x")), float(one.get("y")), one.text)
            for one in self.root.iter("text")
        ]
        self.x_ticks = [
            (x, text) for style, x, _, text in texts if "middle" in style and "--soft" in style
        ]
        self.y_ticks = [text for style, _, _, text in texts if "end" in style]
        self.numbers = [(x, y, text) for style, x, y, text in texts if "--ink" in style]
        paths = [(one.get("style"), _points(one.get("d"))) for one in self.root.iter("path")]
        lines = [(style, points) for style, points in paths if "fill: none" in style]
        self.grid = [points[0][1] for style, points in lines if "--hair" in style]
        shown = [(_role(style), style, points) for style, points in lines if "--hair" not in style]
        self.discs = [(role, points[0]) for role, _, points in shown if points[0] == points[-1]]
        self.lines = [
            (role, "dasharray" in style, points)
            for role, style, points in shown
            if points[0] != points[-1]
        ]
        self.bands = [(_role(style), points) for style, points in paths if "fill: var" in style]

    def y(self, pixel: float) -> float:
        """The value at a height, by the grid and its ticks; per cent as shares."""
        values = [_value(text) for text in self.y_ticks]
        return float(np.interp(pixel, self.grid[::-1], values[::-1]))

    def x(self, pixel: float) -> float:
        places, values = zip(*[(place, _value(text)) for place, text in self.x_ticks], strict=True)
        return float(np.interp(pixel, places, values))

    def points(self, pixels: list[tuple[float, float]]) -> list[tuple[float, float]]:
        """Places in the values of the axes."""
        return [(self.x(x), self.y(y)) for x, y in pixels]


def _points(d: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", d)]


def _role(style: str) -> str:
    return re.search(r"var\(--([\w-]+)\)", style)[1]


def _value(text: str) -> float:
    number = float(text.replace("−", "-").replace(",", "").removesuffix("\u00a0%"))
    return number / 100 if text.endswith("%") else number
