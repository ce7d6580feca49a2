"""How often images of rare labels are shown."""

import numpy as np
import pytest

from iclevr_diffusion.data import BatchLoader
from iclevr_diffusion.data.image_set import ImageSet
from iclevr_diffusion.data.repetition import repeat_factors


def labelled(class_labels):
    images = ImageSet()
    images.class_labels = np.asarray(class_labels, dtype=np.uint8)
    images.pixel_values = np.arange(len(images.class_labels), dtype=np.uint8).reshape(-1, 1, 1, 1)
    return images


# Of 100 images all have label 0, four label 1, one label 2, none label 3; with a threshold of 0.16 a label of a share of
# 0.04 has the factor sqrt(0.16 / 0.04) = 2 and one of 0.01 sqrt(0.16 / 0.01) = 4.
CLASS_LABELS = np.zeros((100, 4), dtype=np.uint8)
CLASS_LABELS[:, 0] = 1
CLASS_LABELS[10:14, 1] = 1
CLASS_LABELS[13, 2] = 1


def test_an_image_has_the_factor_of_its_rarest_label():
    factors = repeat_factors(CLASS_LABELS, 0.16)
    assert factors[:10].tolist() == [1] * 10 and factors[14:].tolist() == [1] * 86
    np.testing.assert_allclose(factors[10:14], [2, 2, 2, 4])


def test_images_without_labels_are_not_repeated():
    assert repeat_factors(np.array([[0, 0], [1, 0]]), 1.0).tolist() == [1, np.sqrt(2)]


@pytest.mark.parametrize("threshold", [0, -0.1, 1.1, float("nan")])
def test_a_threshold_that_is_no_share_is_refused(threshold):
    with pytest.raises(ValueError, match=r"`threshold` must lie in \(0, 1\]"):
        repeat_factors(CLASS_LABELS, threshold)


def test_a_pass_shows_each_image_as_often_as_its_factor():
    loader = BatchLoader(labelled(CLASS_LABELS), np.arange(100), 106, seed=0, repeat_threshold=0.16)
    for step in range(3):  # 96 + 3 * 2 + 4 = 106 are one pass
        counts = np.bincount(loader.batch(step)["pixel_values"].flatten().numpy(), minlength=100)
        assert counts[:10].tolist() == [1] * 10 and counts[10:14].tolist() == [2, 2, 2, 4]
        assert counts[14:].tolist() == [1] * 86


def test_fractions_of_factors_are_met_over_many_passes():
    # Half of ten images are rare with a factor of sqrt(0.8 / 0.5) = 1.265; the 11.32 of a pass are rounded to 11.
    class_labels = np.repeat([[1], [0]], 5, axis=0)
    loader = BatchLoader(labelled(class_labels), np.arange(10), 11, seed=3, repeat_threshold=0.8)
    counts = np.array(
        [np.bincount(loader.batch(i)["pixel_values"].flatten().numpy(), minlength=10) for i in range(2000)]
    )
    scale = 11 / (5 * np.sqrt(1.6) + 5)
    np.testing.assert_allclose(counts.mean(axis=0), scale * repeat_factors(class_labels, 0.8), atol=0.04)
    assert counts[:, 0].min() >= 1 and counts.max() == 2


def test_a_threshold_below_all_shares_changes_nothing():
    plain, repeated = (
        BatchLoader(labelled(CLASS_LABELS), np.arange(100), 30, seed=0, repeat_threshold=threshold)
        for threshold in (None, 0.01)
    )
    for step in range(8):
        assert plain.batch(step)["pixel_values"].tolist() == repeated.batch(step)["pixel_values"].tolist()


def test_shares_are_those_of_the_images_that_are_trained_on():
    indices = np.array([0, 1, 2, 13])  # label 1 is shown by a quarter of these
    loader = BatchLoader(labelled(CLASS_LABELS), indices, 5, seed=0, repeat_threshold=1.0)
    assert sorted(loader.batch(0)["pixel_values"].flatten().tolist()) == [0, 1, 2, 13, 13]
