from typing import Protocol

import numpy as np
from PIL import Image

from iclevr_diffusion.labels import LabelVocabulary


class ImageSource(Protocol):
    """Labelled images wherever they come from, as `open_store` reads them.

    Attributes:
        name: Where the images lie, for messages.
        vocabulary: Names of the classes.
        file_names: One distinct name an image; it is what `read_image` is asked for.
        class_labels: 1 where an image shows an object, uint8 (num_images, num_classes).
        scenes: The scene that each image shows, int64 (num_images,): images of one scene fall into one split.
        num_channels: Channels of every image, 1 for grey, 3 for RGB and 4 for RGBA.
    """

    name: str
    vocabulary: LabelVocabulary
    file_names: list[str]
    class_labels: np.ndarray
    scenes: np.ndarray
    num_channels: int

    def fingerprint(self, resolution: int) -> str:
        """Returns a hash that changes with the labels, any image, or what `read_image` does to the images."""
        ...

    def read_image(self, file_name: str, resolution: int) -> Image.Image:
        """Returns an image of `resolution` x `resolution` pixels in the mode of its channels; several threads call it."""
        ...


def read_pixels(source: ImageSource, resolution: int, file_name: str) -> np.ndarray:
    """Returns an image of a source as uint8 (C, resolution, resolution) in [0, 255]."""
    pixel_values = np.asarray(source.read_image(file_name, resolution))  # (H, W) or (H, W, C)
    return pixel_values.reshape(resolution, resolution, source.num_channels).transpose(2, 0, 1)


def check_resolution(resolution: int) -> None:
    """Refuses a resolution that is no number of pixels."""
    if type(resolution) is not int or resolution < 1:
        raise ValueError(f"`resolution` must be a number of pixels of at least 1, got {resolution!r}.")
