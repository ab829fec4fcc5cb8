"""Line charts as SVG text: drawn once, read on any screen, in any colour scheme and on paper.

Colours come from the page's style sheet (classes `c0` to `c6` are those of `style.COLOURS`), so that a dark page can
exchange black for white; markers and dashes carry the difference for eyes and printers without colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 400, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 46
_MARKER = {
    "o": "M-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0 -6.4 0z",
    "v": "M0 3.6L-3.6 -2.8H3.6z",
    "^": "M0 -3.6L-3.6 2.8H3.6z",
    "s": "M-3 -3H3V3H-3z",
    "D": "M0 -4L4 0L0 4L-4 0z",
    "P": "M-1.3 -3.6H1.3V-1.3H3.6V1.3H1.3V3.6H-1.3V1.3H-3.6V-1.3H-1.3z",
    "X": "M-3.6 -2L-2 -3.6L0 -1.6L2 -3.6L3.6 -2L1.6 0L3.6 2L2 3.6L0 1.6L-2 3.6L-3.6 2L-1.6 0z",
    "*": "M0 -7L1.8 -2.4L6.7 -2.2L2.9 0.9L4.1 5.7L0 3L-4.1 5.7L-2.9 0.9L-6.7 -2.2L-1.8 -2.4z",
}
_DASHES = ("", "6 3", "8 3 2 3", "6 2 2 2 2 2")
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MARKERS_A_LINE = 9
_APART = 0.5  # of a unit of the drawing, less than a pixel


@dataclass(frozen=True)
class Axis:
    """One direction of a chart.

    Args:
        low: value at the start; positive on a logarithmic axis.
        high: value at the end, above `low`.
        label: what it shows.
        log: whether it is logarithmic.
        percent: whether ticks are labelled in percent.

    Raises:
        ValueError: an interval that cannot be drawn.
    """

    low: float
    high: float
    label: str
    log: bool = False
    percent: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"axis {self.label!r}: from {self.low} to {self.high}: expected finite rising ends")
        if self.log and self.low <= 0:
            raise ValueError(f"axis {self.label!r}: starts at {self.low}: a logarithmic axis needs a positive start")

    def place(self, value: float) -> float:
        """Return where a value lies: 0 at `low`, 1 at `high`."""
        if self.log:
            return (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Return about five round values inside the axis."""
        if not self.log:
            raw = (self.high - self.low) / 7
            power = 10.0 ** math.floor(math.log10(raw))
            step = next(power * factor for factor in (1, 2, 5, 10) if raw <= power * factor * (1 + 1e-9))
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            return [k * step for k in range(first, last + 1)]
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        if last - first < 2:
            powers = range(math.floor(math.log10(self.low)), last + 1)
            found = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
            return [value for value in found if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)]
        every = math.ceil((last - first) / 6)
        return [10.0**power for power in range(first, last + 1) if (power - last) % every == 0]

    def text(self, value: float) -> str:
        """Return a tick's label."""
        if self.percent:
            return f"{100 * value:.4g}"
        power = round(math.log10(value)) if self.log else 0
        if not -3 < power < 4:
            return "10" + str(power).translate(_SUPERSCRIPTS)
        return f"{value:.4g}"


@dataclass(frozen=True)
class Curve:
    """One curve.

    Args:
        label: for the legend.
        x: positions.
        y: values; None and what a logarithmic axis cannot show are left out.
        colour: index into `style.COLOURS`.
        marker: a letter of matplotlib's.
        dash: index of the line style; None for markers without a line.
        hollow: whether markers are outlines, for what lies in front of another curve.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: int
    marker: str
    dash: int | None = 0
    hollow: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves with their axes.

    Args:
        name: of letters and digits, unlike all other charts of the page.
        title: one line.
        description: what is to be seen, for those who do not see it.
        x: the horizontal axis.
        y: the vertical axis.
        curves: the curves.
        reference: a value of y at which a line is drawn, and what it means.
        mark: "x" or "y" for a line across the other direction that the slider moves, with its first value.
    """

    name: str
    title: str
    description: str
    x: Axis
    y: Axis
    curves: tuple[Curve, ...]
    reference: tuple[float, str] | None = None
    mark: tuple[str, float] | None = None

    def to_html(self) -> str:
        """Return the figure: title, legend and drawing."""
        legend = "".join(
            f"<li>{_swatch(curve)}<span>{escape(curve.label)}</span></li>" for curve in self.curves if curve.label
        )
        if self.mark is not None:
            legend += f"<li>{_key('mark')}<span>λ of the slider</span></li>"
        if self.reference is not None:
            legend += f"<li>{_key('reference')}<span>{escape(self.reference[1])}</span></li>"
        return (
            f'<figure class="chart" aria-labelledby="{self.name}-caption">'
            f'<figcaption id="{self.name}-caption">{escape(self.title)}</figcaption>'
            f'<ul class="legend">{legend}</ul>{self._drawing()}</figure>'
        )

    def _drawing(self) -> str:
        parts = [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{self.name}-title" '
            f'aria-describedby="{self.name}-text">',
            f'<title id="{self.name}-title">{escape(self.title)}</title>',
            f'<desc id="{self.name}-text">{escape(self.description)}</desc>',
            f'<clipPath id="{self.name}-inside"><rect x="{_LEFT}" y="{_TOP}" width="{WIDTH - _LEFT - _RIGHT}" '
            f'height="{HEIGHT - _TOP - _BOTTOM}"/></clipPath>',
            *self._frame(),
            f'<g clip-path="url(#{self.name}-inside)">',
        ]
        if self.reference is not None:
            parts.append(self._across("y", self.reference[0], "reference"))
        parts += [self._line(curve) for curve in self.curves if curve.dash is not None]
        parts.append("</g>")
        parts += [self._markers(curve) for curve in self.curves]
        if self.mark is not None:
            parts.append(self._across(*self.mark, "mark"))
        return "".join([*parts, "</svg>"])

    def _frame(self) -> list[str]:
        bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
        parts = []
        for value in self.x.ticks():
            at = self._x(value)
            parts.append(f'<path class="grid" d="M{_number(at)} {_TOP}V{bottom}"/>')
            parts.append(f'<text x="{_number(at)}" y="{bottom + 16}" text-anchor="middle">{self.x.text(value)}</text>')
        for value in self.y.ticks():
            at = self._y(value)
            parts.append(f'<path class="grid" d="M{_LEFT} {_number(at)}H{right}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{_number(at + 4)}" text-anchor="end">{self.y.text(value)}</text>')
        middle, centre = (_TOP + bottom) / 2, (_LEFT + right) / 2
        return [
            *parts,
            f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>',
            f'<text x="{centre:g}" y="{HEIGHT - 8}" text-anchor="middle">{escape(self.x.label)}</text>',
            f'<text transform="translate(13 {middle:g}) rotate(-90)" text-anchor="middle">'
            f"{escape(self.y.label)}</text>",
        ]

    def _across(self, direction: str, value: float, look: str) -> str:
        """Return a line at a value of one axis; the slider's carries what is needed to move it."""
        if direction == "x":
            at, ends = _number(self._x(value)), (_LEFT, WIDTH - _RIGHT)
            place, axis = f'x1="{at}" x2="{at}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"', self.x
        else:
            at, ends = _number(self._y(value)), (HEIGHT - _BOTTOM, _TOP)
            place, axis = f'x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at}" y2="{at}"', self.y
        moves = ""
        if look == "mark":
            moves = (
                f' data-moves="{direction}" data-low="{math.log10(axis.low):g}" data-high="{math.log10(axis.high):g}"'
                f' data-from="{ends[0]}" data-to="{ends[1]}"'
            )
        return f'<line class="{look}" {place}{moves}/>'

    def _points(self, curve: Curve) -> list[tuple[float, float]]:
        return [
            (self._x(x), self._y(float(y)))
            for x, y in zip(curve.x, curve.y, strict=True)
            if y is not None and _shown(x, self.x) and _shown(float(y), self.y)
        ]

    def _line(self, curve: Curve) -> str:
        kept: list[tuple[float, float]] = []
        points = self._points(curve)
        for x, y in points:  # thousands of eigenvalues share few pixels
            if not kept or (x, y) == points[-1] or math.hypot(x - kept[-1][0], y - kept[-1][1]) >= _APART:
                kept.append((x, y))
        text = " ".join(f"{_number(x)},{_number(y)}" for x, y in kept)
        return f'<polyline class="c{curve.colour}"{_dashed(curve)} points="{text}"/>' if text else ""

    def _markers(self, curve: Curve) -> str:
        """Return markers at about equal distances along the page, where they would crowd at equal indices."""
        inside = [
            (x, y)
            for x, y in self._points(curve)
            if _TOP - 0.01 <= y <= HEIGHT - _BOTTOM + 0.01 and _LEFT - 0.01 <= x <= WIDTH - _RIGHT + 0.01
        ]
        apart, last, drawn = (WIDTH - _LEFT - _RIGHT) / _MARKERS_A_LINE, (-math.inf, -math.inf), []
        few = len(inside) <= 2 * _MARKERS_A_LINE
        for x, y in inside:
            if few or math.hypot(x - last[0], y - last[1]) >= apart:
                drawn.append(_marker(curve, x, y))
                last = (x, y)
        return "".join(drawn)

    def _x(self, value: float) -> float:
        return _LEFT + self.x.place(value) * (WIDTH - _LEFT - _RIGHT)

    def _y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - self.y.place(value) * (HEIGHT - _TOP - _BOTTOM)


def _shown(value: float, axis: Axis) -> bool:
    return math.isfinite(value) and (value > 0 or not axis.log)


def _dashed(curve: Curve) -> str:
    dash = _DASHES[(curve.dash or 0) % len(_DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _marker(curve: Curve, x: float, y: float) -> str:
    look = "hollow" if curve.hollow else "solid"
    shape = _MARKER[curve.marker]
    return f'<path class="c{curve.colour} {look}" transform="translate({_number(x)} {_number(y)})" d="{shape}"/>'


def _swatch(curve: Curve) -> str:
    line = "" if curve.dash is None else f'<path class="c{curve.colour}"{_dashed(curve)} d="M1 7H33"/>'
    return f'<svg class="swatch" viewBox="0 0 34 14" aria-hidden="true">{line}{_marker(curve, 17, 7)}</svg>'


def _key(look: str) -> str:
    line = f'<line class="{look}" x1="1" x2="33" y1="7" y2="7"/>'
    return f'<svg class="swatch" viewBox="0 0 34 14" aria-hidden="true">{line}</svg>'


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
