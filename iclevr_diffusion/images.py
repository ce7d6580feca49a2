"""Pictures of pictures: grids and tables with captions, strips, and files that say how they were drawn."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo


def to_image(pixel_values: np.ndarray) -> Image.Image:
    """Makes an image of mode L, RGB or RGBA of uint8 `pixel_values` (C, H, W) with C of 1, 3 or 4."""
    if len(pixel_values) == 1:
        return Image.fromarray(np.ascontiguousarray(pixel_values[0]))
    return Image.fromarray(np.ascontiguousarray(pixel_values.transpose(1, 2, 0)))


def on_white(image: Image.Image) -> Image.Image:
    """Makes an image of mode RGB, with white where it is transparent."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def make_grid(
    images: Sequence[Image.Image], captions: Sequence[str] | None = None, *, columns: int = 8, min_width: int = 128
) -> Image.Image:
    """Lays images out in rows, each with its caption below it.

    Args:
        images: Images of one size.
        captions: One caption an image; a line break in it starts a new line.
        columns: Images in a row; a last row that is not full ends in white.
        min_width: Images narrower than this many pixels are enlarged by a whole factor, so that captions fit.
    """
    if not images or len({image.size for image in images}) != 1:
        raise ValueError(
            "`images` must hold at least one image, all of one size,"
            f" got sizes {sorted({image.size for image in images})}."
        )
    captions = [""] * len(images) if captions is None else captions
    if len(captions) != len(images):
        raise ValueError(f"`captions` must hold one caption an image, got {len(captions)} for {len(images)} images.")
    if columns < 1:
        raise ValueError(f"`columns` must be at least 1, got {columns}.")
    width, height = images[0].size
    scale = -(-min_width // width)
    font, margin = _font_that_fits(captions, scale * width), 2
    line_height = sum(font.getmetrics())
    num_lines = max(len(caption.splitlines()) for caption in captions)
    caption_top = scale * height + 2 * margin
    cell_size = (scale * width + 2 * margin, caption_top + num_lines * line_height + 2 * margin)

    cells = []
    for image, caption in zip(images, captions, strict=True):
        cell = Image.new("RGB", cell_size, "white")
        enlarged = on_white(image).resize((scale * width, scale * height), Image.Resampling.NEAREST)
        cell.paste(enlarged, (margin, margin))
        draw = ImageDraw.Draw(cell)
        for line, text in enumerate(caption.splitlines()):
            draw.text((cell.width / 2, caption_top + line * line_height), text, "black", font, anchor="ma")
        cells.append(cell)
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    cells += [Image.new("RGB", cells[0].size, "white")] * (rows * columns - len(cells))
    return make_image_grid(cells, rows=rows, cols=columns)


def make_table(
    rows: Sequence[Sequence[Image.Image]],
    row_captions: Sequence[str] = (),
    column_captions: Sequence[str] = (),
    *,
    min_width: int = 64,
) -> Image.Image:
    """Lays images out in rows and columns, with a caption at the left of each row and one above each column.

    Args:
        rows: Rows of the same number of images, all of one size.
        row_captions: One caption a row, or none at all; a line break in it starts a new line.
        column_captions: One caption a column, or none at all.
        min_width: Images narrower than this many pixels are enlarged by a whole factor.
    """
    sizes = {image.size for row in rows for image in row}
    if len(sizes) != 1 or len({len(row) for row in rows}) != 1:
        raise ValueError(
            "`rows` must hold rows of the same number of images, all of one size, got rows of"
            f" {[len(row) for row in rows]} images of sizes {sorted(sizes)}."
        )
    for name, captions, count in (("row", row_captions, len(rows)), ("column", column_captions, len(rows[0]))):
        if len(captions) not in (0, count):
            raise ValueError(f"`{name}_captions` must hold {count} captions, one a {name}, got {len(captions)}.")
    ((width, height),) = sizes
    scale = -(-min_width // width)
    width, height, margin = scale * width, scale * height, 4
    row_font, column_font = ImageFont.load_default(13), _font_that_fits(column_captions, width)
    num_lines = max((len(caption.splitlines()) for caption in column_captions), default=0)
    top = margin + (num_lines * sum(column_font.getmetrics()) + margin if num_lines else 0)
    longest = max((row_font.getlength(line) for caption in row_captions for line in caption.splitlines()), default=0)
    left = margin + (round(longest) + 2 * margin if longest else 0)

    table = Image.new("RGB", (left + len(rows[0]) * (width + margin), top + len(rows) * (height + margin)), "white")
    draw = ImageDraw.Draw(table)
    for column, caption in enumerate(column_captions):
        middle = left + column * (width + margin) + width / 2
        draw.multiline_text((middle, top - margin), caption, "black", column_font, "md", 0, "center")
    for row, caption in enumerate(row_captions):
        middle = top + row * (height + margin) + height / 2
        draw.multiline_text((left - 2 * margin, middle), caption, "black", row_font, "rm", 0, "right")
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            enlarged = on_white(image).resize((width, height), Image.Resampling.NEAREST)
            table.paste(enlarged, (left + column * (width + margin), top + row * (height + margin)))
    return table


def _font_that_fits(
    captions: Sequence[str], width: int, largest: int = 14, smallest: int = 9
) -> ImageFont.FreeTypeFont:
    lines = [line for caption in captions for line in caption.splitlines()]
    for size in range(largest, smallest, -1):
        font = ImageFont.load_default(size)
        if all(font.getlength(line) <= width for line in lines):
            return font
    return ImageFont.load_default(smallest)


def make_strip(states: Sequence[Image.Image]) -> Image.Image:
    """Joins the states of one image on its way from noise to result, left to right."""
    if not states:
        raise ValueError("`states` must hold at least one image; ask the pipeline for them with `num_states`.")
    return make_image_grid([on_white(state) for state in states], rows=1, cols=len(states))


def save_png(image: Image.Image, path: str | Path, metadata: Mapping[str, Any]) -> None:
    """Writes a PNG file with `metadata` as its text entries: strings as they are, everything else as JSON.

    The file is complete or absent: it is written beside its place and moved there.
    """
    info = PngInfo()
    for key, value in metadata.items():
        info.add_text(key, value if isinstance(value, str) else json.dumps(value))
    _save_whole(image, Path(path), format="PNG", pnginfo=info)


def save_gif(frames: Sequence[Image.Image], path: str | Path, metadata: Mapping[str, Any], *, duration: int) -> None:
    """Writes a GIF file that shows `frames` over and over, each for `duration` milliseconds.

    `metadata` is its comment, as JSON. A frame has at most 256 colours. The file is complete or absent.
    """
    if not frames:
        raise ValueError("`frames` must hold at least one image, got none.")
    first, *others = (on_white(frame) for frame in frames)
    comment = json.dumps(dict(metadata)).encode("ascii")
    options = {"save_all": True, "append_images": others, "duration": duration, "loop": 0, "comment": comment}
    _save_whole(first, Path(path), format="GIF", **options)


def _save_whole(image: Image.Image, path: Path, **options: Any) -> None:  # noqa: ANN401 -- Pillow's own
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        image.save(unfinished, **options)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def file_stem(position: int, labels: str | Sequence[str]) -> str:
    """Names an image file by its position and what it was asked for, labels or text: `0007_red-cube_blue-sphere`."""
    words = (re.sub(r"[^\w]+", "-", label) for label in ([labels] if isinstance(labels, str) else labels))
    return f"{position:04d}_{'_'.join(words)}".encode()[:200].decode(errors="ignore")  # names may be of 255 bytes
