"""Images of digits, and the image store of any source."""

import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from iclevr_diffusion.data import (
    BatchLoader,
    DigitImages,
    ImageStore,
    load_digits,
    load_mnist,
    open_store,
    split_of_scene,
)
from iclevr_diffusion.data.digits import MNIST_REVISION
from iclevr_diffusion.labels import LabelVocabulary


@pytest.fixture
def store(tmp_path):
    return open_store("digits", resolution=12, cache_dir=tmp_path, progress=False)


def make_digits(vocabulary=None) -> DigitImages:
    pixel_values = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    return DigitImages("made-up", pixel_values, np.arange(30) % 10, vocabulary)


def test_the_digits_are_those_of_scikit_learn_in_one_channel(store):
    bunch = pytest.importorskip("sklearn.datasets").load_digits()
    assert store.pixel_values.shape == (1797, 1, 12, 12) and store.resolution == 12
    assert store.vocabulary.names == tuple("0123456789")
    np.testing.assert_array_equal(store.class_labels.argmax(axis=1), bunch.target)
    assert (store.class_labels.sum(axis=1) == 1).all()
    image = Image.fromarray((bunch.images[5] * 255 / 16).round().astype(np.uint8)).resize((12, 12), Image.BILINEAR)
    np.testing.assert_array_equal(store.pixel_values[5, 0], np.asarray(image))
    assert store.file_names[5] == "digits-00005.png"


def test_the_digits_are_split_like_any_images(store):
    sizes = [len(store.indices(split)) for split in ("train", "validation", "held-out")]
    assert sizes == [1600, 87, 110] and len(set(store.scenes.tolist())) == 1797
    assert store.conditions(store.indices("validation")) == [(digit,) for digit in "0123456789"]


def test_batches_and_statistics_of_grey_images_have_one_channel(store):
    indices = store.indices("train")
    assert BatchLoader(store, indices, 3, seed=0).batch(0)["pixel_values"].shape == (3, 1, 12, 12)
    mean, std = store.statistics(indices)
    assert mean.shape == (1, 12, 12) and 0 < std < 1


def test_at_their_own_size_images_are_left_as_they_are():
    source = make_digits()
    for i in (0, 29):
        np.testing.assert_array_equal(np.asarray(source.read_image(source.file_names[i], 8)), source.pixel_values[i])


def test_a_named_source_can_be_given_as_an_object_and_a_folder_of_its_name_as_a_path(store, tmp_path):
    again = open_store(load_digits(), resolution=12, cache_dir=tmp_path, progress=False)
    assert again.path == store.path and again.sha256 == store.sha256
    with pytest.raises(FileNotFoundError, match="digits"):
        open_store("./digits", resolution=12, cache_dir=tmp_path, progress=False)


def test_a_vocabulary_orders_the_digits(tmp_path):
    vocabulary = LabelVocabulary(["nothing", *reversed("0123456789")])
    store = open_store("digits", resolution=8, cache_dir=tmp_path, vocabulary=vocabulary, progress=False)
    assert store.class_labels[3].tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]  # the fourth image is a 3
    with pytest.raises(ValueError, match="Unknown label '0'"):
        load_digits(LabelVocabulary(["red cube"]))
    with pytest.raises(ValueError, match="`vocabulary` must be left out for an `ImageSource`"):
        open_store(make_digits(), cache_dir=tmp_path, vocabulary=vocabulary)


@pytest.mark.parametrize("change", ["pixel", "digit", "order of the names", "resolution"])
def test_a_changed_source_has_another_fingerprint(change):
    before, after = make_digits(), make_digits()
    if change == "pixel":
        after.pixel_values[7, 3, 3] ^= 1
    elif change == "digit":
        after.class_labels[7] = after.class_labels[8]
    elif change == "order of the names":
        after = make_digits(LabelVocabulary(list("1023456789")))
    assert make_digits().fingerprint(8) == before.fingerprint(8)
    assert after.fingerprint(9 if change == "resolution" else 8) != before.fingerprint(8)


@pytest.mark.parametrize("resolution", [0, 8.0, "8"])
def test_a_resolution_that_is_no_number_of_pixels_is_refused(resolution, tmp_path):
    with pytest.raises(ValueError, match="`resolution` must be a number of pixels"):
        open_store(make_digits(), resolution=resolution, cache_dir=tmp_path)


def test_scenes_that_a_source_names_decide_the_split_and_outlast_the_file(tmp_path):
    source = make_digits()
    alone = open_store(source, resolution=8, cache_dir=tmp_path / "alone", progress=False)
    assert ImageStore(alone.path).scenes.tolist() == source.scenes.tolist()
    source.scenes = np.arange(30, dtype=np.int64) // 3
    store = open_store(source, resolution=8, cache_dir=tmp_path, progress=False)
    assert ImageStore(store.path).scenes.tolist() == source.scenes.tolist()
    assert store.sha256 != alone.sha256
    assert [split_of_scene(scene) for scene in (0, 1, 3)] == ["held-out", "train", "validation"]
    assert store.indices("validation").tolist() == [9, 10, 11] and store.indices("held-out").tolist() == [0, 1, 2]
    assert store.sha256 != alone.sha256
    np.testing.assert_array_equal(load_file(store.path)["pixel_values"][:, 0], source.pixel_values)


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    source = make_digits()
    read_image = source.read_image

    def read_and_change(file_name, resolution):
        source.pixel_values[0, 0, 0] ^= 1
        return read_image(file_name, resolution)

    source.pixel_values = source.pixel_values[:29]  # an odd number of changes
    source.file_names = source.file_names[:29]
    source.class_labels, source.scenes = source.class_labels[:29], source.scenes[:29]
    monkeypatch.setattr(source, "read_image", read_and_change)
    with pytest.raises(ValueError, match="images in `made-up` changed while they were read"):
        open_store(source, resolution=8, cache_dir=tmp_path, progress=False)


def test_without_scikit_learn_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match="`pip install scikit-learn`"):
        load_digits()


@pytest.fixture
def hub(monkeypatch):
    """Four images in the place of MNIST on the Hub, and how often and how they were asked for."""
    pixel_values = np.random.default_rng(0).integers(0, 256, (4, 28, 28), dtype=np.uint8)
    images = [Image.fromarray(image) for image in pixel_values]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    dataset = datasets.Dataset.from_dict({"image": images, "label": [7, 0, 3, 7]}, features=features)
    asked = []

    def load_dataset(name, *, revision, split):
        asked.append((name, revision, split))
        return dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return SimpleNamespace(pixel_values=pixel_values, asked=asked)


def test_mnist_is_the_training_images_of_one_revision_on_the_hub(hub, tmp_path):
    store = open_store("mnist", resolution=28, cache_dir=tmp_path, progress=False)
    assert hub.asked == [("ylecun/mnist", MNIST_REVISION, "train")]
    np.testing.assert_array_equal(store.pixel_values[:, 0], hub.pixel_values)
    assert store.class_labels.argmax(axis=1).tolist() == [7, 0, 3, 7]
    assert store.file_names[3] == "mnist-00003.png" and len(set(store.scenes.tolist())) == 4


def test_a_second_start_reads_the_store_of_mnist_alone(hub, tmp_path, monkeypatch):
    first = open_store("mnist", resolution=12, cache_dir=tmp_path, progress=False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    second = open_store("mnist", resolution=12, cache_dir=tmp_path, progress=False)
    assert second.path == first.path and second.sha256 == first.sha256 and len(hub.asked) == 1


@pytest.mark.parametrize("change", ["revision", "order of the names", "resolution"])
def test_the_store_of_mnist_belongs_to_its_revision_names_and_resolution(change, monkeypatch):
    before = load_mnist().fingerprint(12)
    assert load_mnist().fingerprint(12) == before
    vocabulary = LabelVocabulary(list("1023456789")) if change == "order of the names" else None
    if change == "revision":
        monkeypatch.setattr("iclevr_diffusion.data.digits.MNIST_REVISION", "another")
    assert load_mnist(vocabulary).fingerprint(13 if change == "resolution" else 12) != before


def test_a_vocabulary_without_digits_is_refused_before_mnist_is_fetched(hub):
    with pytest.raises(ValueError, match="Unknown label '0'"):
        load_mnist(LabelVocabulary(["red cube"]))
    assert hub.asked == []
