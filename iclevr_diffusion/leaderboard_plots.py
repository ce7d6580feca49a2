"""The leaderboard's pictures: quality against speed, a heat map of labels, and the same images by every system."""

import io
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from iclevr_diffusion.leaderboard import Leaderboard, System, labels_protocols, top_k_by_label

# A colour and a shape for each machine; the colours stay apart for the colour-blind (*Color Universal Design*, Okabe and
# Ito, 2008, https://jfly.uni-koeln.de/color/). A sixth machine begins anew with hollow shapes.
STYLES = [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v")]
CELL = 128  # pixels of an image in the grid
POINT = 5  # half the width of a point, in the 1/72 inch of font sizes
PLAIN = {"parse_math": False}  # names are no formulas, even with a $ on either side
NEAR = 9  # so far a name stands from its point; further away, a line joins them


def draw_quality_against_speed(board: Leaderboard) -> Image.Image:
    """Draws each system's top-k and its interval against its images a second, and the judge's ceiling as a line."""
    return _to_image(plot_quality_against_speed(board))


def plot_quality_against_speed(board: Leaderboard) -> Any:  # noqa: ANN401 -- matplotlib is imported late
    """Makes the matplotlib figure of `draw_quality_against_speed`."""
    figure = _make_figure(8, 5.5)
    axes = figure.add_subplot()
    judge = board.judges[0]
    machines = list(dict.fromkeys(system.measured_on for system in board.ranked))
    for number, machine in enumerate(machines):
        color, marker = STYLES[number % len(STYLES)]
        points = np.array([_point(board, system) for system in board.ranked if system.measured_on == machine])
        speeds, low, value, high = points.T
        axes.errorbar(
            speeds,
            value,
            yerr=np.maximum([value - low, high - value], 0),  # a value may lie a little outside of its interval
            fmt=marker,
            color=color,
            markerfacecolor=color if number < len(STYLES) else "white",
            markersize=7,
            capsize=3,
            label=machine,
        )
    ceiling = board.ceiling(board.main_protocols, judge).get("top_k")
    if ceiling is not None:
        axes.axhline(ceiling, color="#555555", linewidth=1, linestyle="--", label="real images, held out")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.10g}")
    axes.xaxis.set_minor_formatter("")
    speeds = [_point(board, system)[0] for system in board.ranked]
    axes.set_xlim(10 ** math.floor(math.log10(min(speeds) / 1.5)), 10 ** math.ceil(math.log10(max(speeds) * 1.5)))
    axes.margins(y=0.1)
    axes.set_xlabel("images a second" + ("; only points of one shape compare" if len(machines) > 1 else ""))
    axes.set_ylabel(f"top-k, {_lists(board.main_protocols)}, by {judge}", **PLAIN)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    legend = figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
    _name_points(figure, axes, board, ceiling)
    return figure


def _point(board: Leaderboard, system: System) -> tuple[float, float, float, float]:
    """Gives a system's images a second, and its top-k as low end, value and high end."""
    score = system.scores(board.main_protocols, board.judges[0])["top_k"]
    return system.results["cost"]["images_per_second"], score["low"], score["value"], score["high"]


def _lists(protocols: Sequence[str]) -> str:
    return f"mean of {' and '.join(protocols)}" if len(protocols) > 1 else protocols[0]


def _name_points(figure: Any, axes: Any, board: Leaderboard, ceiling: float | None) -> None:  # noqa: ANN401 -- imported late
    """Writes each system's name at the closest place to its point where it covers no point, bar, line or name."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # gives the points their places in the picture
    half, points, taken = POINT * figure.dpi / 72, [], []
    for system in board.ranked:
        speed, *heights = _point(board, system)
        (x, low), (_, middle), (_, high) = (axes.transData.transform((speed, height)) for height in heights)
        points.append((system.name, speed, heights[1]))
        taken.append(Bbox([[x - half, min(low, middle - half)], [x + half, max(high, middle + half)]]))
    frame = axes.get_window_extent()
    if ceiling is not None:
        height = axes.transData.transform((points[0][1], ceiling))[1]
        taken.append(Bbox([[frame.x0, height - 1], [frame.x1, height + 1]]))
    line = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.7, "shrinkB": POINT}
    for name, speed, value in points:
        for x, y in _offsets():
            align = "center" if abs(x) < 1 else ("left" if x > 0 else "right")
            place = {"xy": (speed, value), "xytext": (x, y), "textcoords": "offset points", "fontsize": 9} | PLAIN
            text = axes.annotate(name, ha=align, va="center", **place)
            box = text.get_window_extent()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:  # no room at all: better on top of something than unnamed
            box = axes.annotate(name, ha=align, va="center", **place).get_window_extent()
        if math.hypot(x, y) > NEAR:
            # The line starts outside of the text, whose anchor is in its middle or at one end.
            axes.annotate("", arrowprops=line | {"shrinkA": 7 if align == "center" else 2}, **place)
        taken.append(box)


def _offsets() -> list[tuple[float, float]]:
    """Lists places around a point, the closest first and among these the one at its right."""
    angles = np.deg2rad([0, 180, 30, -30, 150, -150, 60, -60, 120, -120, 90, -90])
    return [
        (radius * np.cos(angle), radius * np.sin(angle))
        for radius in (NEAR, 14, 22, 32, 44, 58, 75, 95, 120)
        for angle in angles
    ]


def draw_labels(board: Leaderboard) -> Image.Image:
    """Draws for each system and label the share of images in which the ranking judge finds the label."""
    return _to_image(plot_labels(board))


def plot_labels(board: Leaderboard) -> Any:  # noqa: ANN401 -- matplotlib is imported late
    """Makes the matplotlib figure of `draw_labels`."""
    labels, rows = top_k_by_label(board)
    values = np.array([[np.nan if value is None else value for value in row] for row in rows])
    figure = _make_figure(3 + 0.42 * len(labels), 2.2 + 0.42 * len(rows))
    axes = figure.add_subplot()
    picture = axes.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    turned = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(labels)), labels, fontsize=9, **turned, **PLAIN)
    axes.set_yticks(range(len(rows)), [system.name for system in board.ranked], fontsize=9, **PLAIN)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for row, column in np.argwhere(~np.isnan(values)):
        value = values[row, column]
        text = f"{value:.2f}".removeprefix("0")
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color="black" if value > 0.5 else "white")
    lists = " and ".join(labels_protocols(board))
    bar = figure.colorbar(picture, fraction=0.03, pad=0.01)
    bar.set_label(f"top-k, {lists}\nby {board.judges[0]}", **PLAIN)
    return figure


def open_samples(board: Leaderboard) -> tuple[list[str], dict[str, Image.Image], list[str]]:
    """Opens the systems' pictures of their first images, as far as they show the same labels.

    Returns:
        What stands above each image, the pictures by system, and what is to be said about systems left out.

    Raises:
        ValueError: If no system has such a picture.
    """
    captions: list[str] = []
    pictures, notes = {}, []
    for system in board.ranked:
        if not system.samples.is_file():
            notes.append(f"{system.name} is not among the images: no samples.png lies beside its results.")
            continue
        with Image.open(system.samples) as picture:
            labels = _read_labels(picture, system)
            picture = picture.convert("RGB")
        theirs = ["\n".join(row) for row in labels]
        captions = captions or theirs
        if theirs == captions:
            pictures[system.name] = picture
        else:
            notes.append(f"{system.name} is not among the images: its samples.png shows other labels.")
    if not pictures:
        raise ValueError(
            "At least one system must have a samples.png, and none has:"
            f" {', '.join(str(system.samples) for system in board.ranked)} are missing; iclevr-evaluate writes them."
        )
    return captions, pictures, notes


def _read_labels(picture: Image.Image, system: System) -> list[list[str]]:
    try:
        labels = json.loads(picture.info["labels"])
    except (KeyError, ValueError):
        labels = None
    is_list = isinstance(labels, list) and all(isinstance(row, list) for row in labels)
    is_text = is_list and all(isinstance(label, str) for row in labels for label in row)
    if not labels or not is_text or picture.size[0] != picture.size[1] * len(labels):
        raise ValueError(
            f"{system.samples} must be square images side by side, with their labels as JSON in the text entry"
            " `labels`; run iclevr-evaluate again to write it."
        )
    return labels


def draw_samples(captions: Sequence[str], pictures: dict[str, Image.Image]) -> Image.Image:
    """Lays the systems' images out, a row a system and a column a list of labels."""
    font, margin = ImageFont.load_default(14), 6
    line_height = sum(font.getmetrics())
    left = margin + max(round(font.getlength(name)) for name in pictures) + margin
    top = margin + line_height * max(len(caption.splitlines()) for caption in captions) + margin
    step = CELL + margin
    grid = Image.new("RGB", (left + step * len(captions), top + step * len(pictures)), "white")
    draw = ImageDraw.Draw(grid)
    for column, caption in enumerate(captions):
        middle = left + step * column + CELL / 2
        draw.multiline_text((middle, top - margin), caption, "black", font, anchor="md", align="center", spacing=0)
    for row, (name, picture) in enumerate(pictures.items()):
        draw.text((left - margin, top + step * row + CELL / 2), name, "black", font, anchor="rm")
        size = picture.height
        for column in range(len(captions)):
            image = picture.crop((column * size, 0, (column + 1) * size, size))
            image = image.resize((CELL, CELL), Image.Resampling.NEAREST)
            grid.paste(image, (left + step * column, top + step * row))
    return grid


def _make_figure(width: float, height: float) -> Any:  # noqa: ANN401 -- matplotlib is imported late
    """Opens a figure of so many inches that no window shows."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "The leaderboard's pictures need matplotlib, which is not installed: pip install matplotlib."
        ) from None
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _to_image(figure: Any) -> Image.Image:  # noqa: ANN401 -- matplotlib is imported late
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")
