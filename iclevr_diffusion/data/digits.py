import hashlib
import io
import json
from functools import cached_property

import numpy as np
from PIL import Image

from iclevr_diffusion.data.source import check_resolution
from iclevr_diffusion.data.split import scene_of_file
from iclevr_diffusion.labels import LabelVocabulary

DIGIT_NAMES = tuple("0123456789")
# Says what `DigitImages.read_image` does to the pixels. Change both together: it is part of the key of stores.
TRANSFORM = "grey, direct bilinear resize, 1"
MNIST_ID = "ylecun/mnist"
MNIST_REVISION = "77f3279092a1c1579b2250db8eafed0ad422088c"


class DigitImages:
    """Grey images of written digits that are held in memory, each a scene of its own.

    Args:
        name: First part of the images' names: `digits` makes `digits-00000.png`, `digits-00001.png`, ...
        pixel_values: Images, uint8 (num_images, H, W) in [0, 255], in an order that never changes.
        digits: The digit in each, 0 to 9.
        vocabulary: Names of the classes and their indices, the ten digits in their order by default.

    Raises:
        ValueError: If `vocabulary` lacks a digit.
    """

    num_channels = 1

    def __init__(
        self, name: str, pixel_values: np.ndarray, digits: np.ndarray, vocabulary: LabelVocabulary | None = None
    ) -> None:
        self.name = name
        self.pixel_values = pixel_values
        self.vocabulary = LabelVocabulary(DIGIT_NAMES) if vocabulary is None else vocabulary
        self.file_names = [f"{name}-{i:05d}.png" for i in range(len(pixel_values))]
        self.scenes = np.array([scene_of_file(file_name) for file_name in self.file_names], dtype=np.int64)
        columns = np.array([self.vocabulary.index(digit) for digit in DIGIT_NAMES])
        self.class_labels = np.zeros((len(pixel_values), len(self.vocabulary)), dtype=np.uint8)
        self.class_labels[np.arange(len(pixel_values)), columns[digits]] = 1
        self._position = {file_name: i for i, file_name in enumerate(self.file_names)}

    def fingerprint(self, resolution: int) -> str:
        """Returns a hash that changes with the labels, any pixel, or what is done to the images."""
        check_resolution(resolution)
        key = [TRANSFORM, resolution, self.vocabulary.names, self.name, self.pixel_values.shape]
        sha256 = hashlib.sha256(json.dumps(key).encode())
        sha256.update(self.pixel_values.tobytes())
        sha256.update(self.class_labels.tobytes())
        return sha256.hexdigest()

    def read_image(self, file_name: str, resolution: int) -> Image.Image:
        """Returns an image in grey of `resolution` x `resolution` pixels, with the filter that `IclevrFolder` has."""
        image = Image.fromarray(self.pixel_values[self._position[file_name]])
        return image.resize((resolution, resolution), Image.Resampling.BILINEAR)


class MNISTImages:
    """The training images of MNIST, fetched and decoded when they are first asked for.

    Their fingerprint is that of the revision that is fetched, so that a store which is there already is opened without
    them: no connection, nothing decoded.

    Args:
        vocabulary: Names of the classes and their indices, the ten digits in their order by default.

    Raises:
        ValueError: If `vocabulary` lacks a digit.
    """

    name = "mnist"
    num_channels = 1

    def __init__(self, vocabulary: LabelVocabulary | None = None) -> None:
        self.vocabulary = LabelVocabulary(DIGIT_NAMES) if vocabulary is None else vocabulary
        for digit in DIGIT_NAMES:
            self.vocabulary.index(digit)

    def fingerprint(self, resolution: int) -> str:
        """Returns a hash that changes with the revision, the names, or what is done to the images."""
        check_resolution(resolution)
        key = [TRANSFORM, resolution, self.vocabulary.names, MNIST_ID, MNIST_REVISION]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()

    @cached_property
    def images(self) -> DigitImages:
        """The images in memory."""
        import datasets  # here, as it takes a second and no other source needs it

        dataset = datasets.load_dataset(MNIST_ID, revision=MNIST_REVISION, split="train")
        dataset = dataset.cast_column("image", datasets.Image(decode=False))
        files = [image["bytes"] for image in dataset["image"]]
        pixel_values = np.stack([np.asarray(Image.open(io.BytesIO(file), formats=["PNG"])) for file in files])
        return DigitImages(self.name, pixel_values, np.array(dataset["label"]), self.vocabulary)

    @property
    def file_names(self) -> list[str]:
        """Names of the images, `mnist-00000.png` and so on."""
        return self.images.file_names

    @property
    def class_labels(self) -> np.ndarray:
        """The digit in each, multi-hot uint8 (num_images, num_classes)."""
        return self.images.class_labels

    @property
    def scenes(self) -> np.ndarray:
        """The number of each, int64 (num_images,): an image is a scene of its own."""
        return self.images.scenes

    def read_image(self, file_name: str, resolution: int) -> Image.Image:
        """Returns an image in grey of `resolution` x `resolution` pixels, as `DigitImages` does."""
        return self.images.read_image(file_name, resolution)


def load_digits(vocabulary: LabelVocabulary | None = None) -> DigitImages:
    """Opens the 1,797 digits of 8x8 pixels that come with scikit-learn; nothing is downloaded.

    They are the test part of *Optical Recognition of Handwritten Digits* (Alpaydin and Kaynak, 1998,
    https://doi.org/10.24432/C50P49), in 17 shades of grey.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError:
        raise ImportError(
            "`digits` are the images that come with scikit-learn, which is not installed; `pip install scikit-learn`."
        ) from None
    bunch = datasets.load_digits()
    return DigitImages("digits", np.round(bunch.images * (255 / 16)).astype(np.uint8), bunch.target, vocabulary)


def load_mnist(vocabulary: LabelVocabulary | None = None) -> MNISTImages:
    """Opens the 60,000 training images of MNIST, 28x28 pixels, which `datasets` fetches from the Hub.

    *Gradient-Based Learning Applied to Document Recognition* (LeCun et al., 1998, https://doi.org/10.1109/5.726791).
    Its 10,000 test images stay aside: the store splits the training images by itself.

    Raises:
        ValueError: If `vocabulary` lacks a digit.
    """
    return MNISTImages(vocabulary)
