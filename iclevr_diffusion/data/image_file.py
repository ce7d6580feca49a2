"""An image file of anyone's: where it may lie, what it may be, and the pixels that a model is shown of it."""

import io
import os
import re
import stat
from pathlib import Path, PureWindowsPath
from typing import BinaryIO

from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP")
# Says what `read_upright` and `fit` do to the pixels. Change both together: it is part of the key of stores.
TRANSFORM = "upright, bilinear resize, alpha on white, 1"

# Pillow's modes of 8 bits a channel and what becomes of them, without and with alpha.
_MODES = {"1": "L", "L": "L", "LA": "L", "P": "RGB", "PA": "RGB", "RGB": "RGB", "RGBA": "RGB", "CMYK": "RGB"}
_WITH_ALPHA = {"L": "LA", "RGB": "RGBA"}


def check_path(where: str, folder: Path, file_name: str, example: str) -> None:
    """Refuses a file name that is no path inside `folder`.

    Args:
        where: The file and the entry that hold the name, for the message.
        folder: The folder of the images.
        file_name: The name.
        example: A right name, for the message.
    """
    # Windows rules see more: `\` and `C:` leave a folder there, `/` and `..` everywhere.
    path = PureWindowsPath(file_name)
    is_path = path.name and not path.anchor and ".." not in path.parts and "/".join(path.parts) == file_name
    if not is_path or re.search("[\0\ud800-\udfff]", file_name):  # lone halves of letters are in no UTF-8
        raise ValueError(f"{where}: expected the path of an image inside `{folder}`, such as {example!r}.")


def file_status(where: str, folder: Path, file_name: str) -> tuple[int, int, int]:
    """Returns size and time stamps of a file in `folder`; with another one of these it counts as changed.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the name is a link that leaves `folder`.
    """
    path = folder / file_name
    try:
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode) or "/" in file_name:
            if not path.resolve().is_relative_to(folder.resolve()):
                raise ValueError(
                    f"{where}: `{path}` links to a place outside of `{folder}`; copy the images into it, or put"
                    " the table beside the real folder of the images."
                )
            status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        status = None
    if status is None or not stat.S_ISREG(status.st_mode):
        raise FileNotFoundError(f"{where}: there is no file `{path}`.")
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_mode(file: BinaryIO, where: str) -> str:
    """Returns L, LA, RGB or RGBA, what `read_upright` makes of an opened image file, by its header alone."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            return _mode_of(image, where)
    except Image.UnidentifiedImageError:
        raise _unreadable(where, "it is of another format, or empty") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(where, error) from error


def read_upright(content: bytes, where: str) -> Image.Image:
    """Decodes an image file and turns it as its EXIF data say.

    Args:
        content: The file.
        where: Where it lies, for messages.

    Returns:
        The image in mode L, LA, RGB or RGBA.

    Raises:
        ValueError: If it is damaged, no PNG, JPEG or WebP, of more than 8 bits a channel, or moves.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            mode = _mode_of(image, where)
            image.verify()  # the checksums, which decoding does not look at
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    except Image.UnidentifiedImageError:
        raise _unreadable(where, "it is of another format, or empty") from None
    except _RefusedModeError:
        raise
    except Exception as error:  # Pillow lets struct.error, zlib.error, SyntaxError and others through
        raise _unreadable(where, error) from error
    return upright if upright.mode == mode else upright.convert(mode)


def fit(image: Image.Image, resolution: int, channels: int, *, center_crop: bool = False) -> Image.Image:
    """Makes an image of `read_upright` as large as a model's, with as many channels.

    Args:
        image: The image.
        resolution: Height and width wanted, in pixels.
        channels: 1 makes it grey and 3 coloured, both on white where it is transparent; 4 keeps its transparency, or
            makes it opaque.
        center_crop: Whether to take the largest square in its middle; otherwise it is resized directly, and its aspect
            is lost where it is no square.
    """
    if image.size != (resolution, resolution):
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side) if center_crop else None
        image = image.resize((resolution, resolution), Image.Resampling.BILINEAR, box=box)
    if channels == 4:
        return image.convert("RGBA")
    return lay_on_white(image).convert("L" if channels == 1 else "RGB")


def lay_on_white(image: Image.Image) -> Image.Image:
    """Returns an image without alpha: what is transparent is white."""
    if image.mode not in ("LA", "RGBA"):
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


class _RefusedModeError(ValueError):
    """An image that is whole, but not of a kind that is read."""


def _mode_of(image: Image.Image, where: str) -> str:
    """Says what an opened image, not yet decoded, becomes."""
    if image.mode not in _MODES or any("16" in str(tile.args) for tile in image.tile):
        raise _RefusedModeError(
            f"{where}: expected 8 bits a channel in grey, palette, RGB or CMYK, with or without alpha, got"
            f" {'16 bits a channel' if image.mode in _MODES else f'mode {image.mode}'}; save the image with 8 bits."
        )
    if image.format != "JPEG" and getattr(image, "n_frames", 1) > 1:  # a phone's JPEG may hold a preview as well
        raise _RefusedModeError(
            f"{where}: expected one image, got an animation of {image.n_frames}; save the frames as images."
        )
    mode = _MODES[image.mode]
    return _WITH_ALPHA[mode] if image.has_transparency_data else mode


def _unreadable(where: str, reason: object) -> ValueError:
    return ValueError(f"{where}: not a readable PNG, JPEG or WebP image ({reason}); save it again or leave it out.")
