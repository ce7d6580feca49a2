import itertools

import numpy as np
import pytest
import torch

from iclevr_diffusion import distribution
from iclevr_diffusion.distribution import (
    compare_features,
    diversity,
    frechet_distance,
    kernel_distance,
    memorisation,
    precision_recall_density_coverage,
    relative_diversity,
)


def points(*rows):
    return torch.tensor([row if isinstance(row, tuple) else (row,) for row in rows], dtype=torch.float64)


def random_features(num_images, num_features=6, seed=0):
    return torch.randn(num_images, num_features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features_with(mean, deviations, num_images=40, seed=0):
    """Features whose own mean and covariance are exactly `mean` and a diagonal of `deviations`, squared."""
    centred = random_features(num_images, len(mean), seed)
    centred = centred - centred.mean(dim=0)
    white = torch.linalg.qr(centred).Q * (num_images - 1) ** 0.5
    return white * torch.tensor(deviations) + torch.tensor(mean)


# Frechet distance


def test_the_frechet_distance_of_diagonal_gaussians_has_a_closed_form():
    real = features_with([1.0, 2.0, 3.0], [1.0, 2.0, 0.5])
    generated = features_with([1.5, 2.0, 1.0], [3.0, 2.0, 0.0], num_images=70, seed=1)
    assert frechet_distance(real, generated) == pytest.approx((0.25 + 0 + 4) + (4 + 0 + 0.25), rel=1e-10)


def test_the_frechet_distance_of_two_points_in_many_dimensions_is_counted_by_hand():
    axes = torch.eye(50)
    real, longer, across = (torch.stack([-a, a]) for a in (axes[0], 2 * axes[0], 2 * axes[1]))
    assert frechet_distance(real, longer) == pytest.approx((8**0.5 - 2**0.5) ** 2)  # variances 2 and 8 on one axis
    assert frechet_distance(real, across) == pytest.approx(2 + 8)  # no axis in common


@pytest.mark.parametrize(("num_real", "num_generated"), [(60, 40), (60, 5), (4, 5)])
def test_the_frechet_distance_is_the_published_formula(num_real, num_generated):
    real = random_features(num_real) @ random_features(6, seed=9)
    generated = 1 + random_features(num_generated, seed=1)
    covariances = real.T.cov(), generated.T.cov()
    trace_of_root = torch.linalg.eigvals(covariances[0] @ covariances[1]).sqrt().real.sum()
    expected = (real.mean(0) - generated.mean(0)).square().sum() + sum(c.trace() for c in covariances)
    # Rounding leaves eigenvalues of about 1e-15 where a singular product has 0, and their roots reach the formula.
    assert frechet_distance(real, generated) == pytest.approx((expected - 2 * trace_of_root).item(), abs=1e-5)


@pytest.mark.parametrize("num_images", [3, 200])
def test_features_have_no_frechet_distance_from_themselves_even_where_they_are_few(num_images):
    for seed in range(10):
        features = 1000 + random_features(num_images, 20, seed)
        assert 0 <= frechet_distance(features, features.flip(0)) < 1e-8


# Kernel distance


def test_the_kernel_distance_is_counted_by_hand():
    # Within: k(0, 1) = 1 and k(1, 2) = 27. Across: the mean of k(0, 1) = 1, k(0, 2) = 1, k(1, 1) = 8 and k(1, 2) = 27.
    assert kernel_distance(points(0, 1), points(1, 2)) == pytest.approx(1 + 27 - 2 * 37 / 4)
    # In two dimensions the product is halved: k((2, 0), (1, 3)) = 2^3, k((0, 2), (0, 4)) = 5^3.
    real, generated = points((2, 0), (1, 3)), points((0, 2), (0, 4))
    across = (1 + 1 + 4**3 + 7**3) / 4
    assert kernel_distance(real, generated) == pytest.approx(8 + 125 - 2 * across)


def test_the_kernel_distance_can_be_negative():
    assert kernel_distance(points(0, 1), points(0, 1)) == pytest.approx(1 + 1 - 2 * (1 + 1 + 1 + 8) / 4)


def test_the_kernel_distance_does_not_depend_on_the_number_of_images():
    real, generated = random_features(6), 0.5 + random_features(5, seed=1)
    of_subsets = [
        kernel_distance(real[list(rows)], generated[list(columns)])
        for rows in itertools.combinations(range(6), 3)
        for columns in itertools.combinations(range(5), 2)
    ]
    assert np.mean(of_subsets) == pytest.approx(kernel_distance(real, generated))


# Precision, recall, density, coverage


def test_neighbours_on_a_line_are_counted_by_hand():
    # Radii of the real points 1, 1 and 2, of the generated ones 9.5, 0.5 and 0.5. The first generated point lies in the
    # first two real balls; its own ball holds every real point.
    measures = precision_recall_density_coverage(points(0, 1, 3), points(0.5, 10, 10.5), num_neighbors=1)
    assert measures == pytest.approx({"precision": 1 / 3, "recall": 1, "density": 2 / 3, "coverage": 2 / 3})


def test_a_generator_that_repeats_one_image_is_precise_but_has_no_recall():
    # Second neighbours of the real points are 5, 5 and 4 away: the generated point lies on the border of the first ball.
    measures = precision_recall_density_coverage(
        points((0, 0), (3, 4), (0, 4)), points((0, -5), (0, -5), (0, -5)), num_neighbors=2
    )
    assert measures == pytest.approx({"precision": 1, "recall": 0, "density": 3 / (2 * 3), "coverage": 1 / 3})


def test_points_that_crowd_between_real_ones_have_a_density_above_1():
    measures = precision_recall_density_coverage(points(-1, 0, 1), points(0, 0), num_neighbors=1)
    assert measures == pytest.approx({"precision": 1, "recall": 1 / 3, "density": 3, "coverage": 1})


def test_equal_distributions_have_a_density_of_about_1():
    measures = precision_recall_density_coverage(random_features(600), random_features(600, seed=1))
    assert measures["density"] == pytest.approx(1, abs=0.1)
    assert min(measures.values()) > 0.8


# All of them


def test_every_measure_is_given_by_its_name():
    real, generated = random_features(9), random_features(8, seed=1)
    assert compare_features(real, generated) == {
        "frechet_distance": frechet_distance(real, generated),
        "kernel_distance": kernel_distance(real, generated),
        **precision_recall_density_coverage(real, generated, num_neighbors=5),
    }


def test_neither_the_order_of_the_images_nor_the_chunks_change_a_measure(monkeypatch):
    real, generated = random_features(50), 0.3 + random_features(40, seed=1)
    expected = compare_features(real, generated)
    monkeypatch.setattr(distribution, "_CHUNK_SIZE", 7)
    shuffle = torch.Generator().manual_seed(2)
    reordered = (features[torch.randperm(len(features), generator=shuffle)] for features in (real, generated))
    assert compare_features(*reordered) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_features_in_single_precision_and_as_arrays_are_measured_in_double_precision():
    real, generated = 100 + random_features(20).float(), 100 + random_features(20, seed=1).float()
    expected = compare_features(real.double(), generated.double())
    assert compare_features(real.numpy(), generated.numpy()) == expected


MEASURES = [frechet_distance, kernel_distance, precision_recall_density_coverage, compare_features]


@pytest.mark.parametrize("measure", MEASURES)
def test_features_that_cannot_be_compared_are_refused(measure):
    features = random_features(8)
    with pytest.raises(ValueError, match=r"`real` must have shape \(num_images, num_features\), got \(8,\)"):
        measure(features[:, 0], features)
    with pytest.raises(ValueError, match=r"`generated` must have shape .* got \(8, 0\)"):
        measure(features, features[:, :0])
    with pytest.raises(ValueError, match="must have the same width, got 6 and 5; take both from the same judge"):
        measure(features, features[:, :5])
    with pytest.raises(ValueError, match="`generated` must be finite, got NaN or infinity"):
        measure(features, features.clone().fill_(torch.inf))


@pytest.mark.parametrize(("measure", "at_least"), list(zip(MEASURES, [2, 2, 6, 6], strict=True)))
def test_too_few_images_are_refused(measure, at_least):
    enough, too_few = random_features(at_least), random_features(at_least - 1)
    measure(enough, enough)
    for real, generated, name in ((too_few, enough, "real"), (enough, too_few, "generated")):
        with pytest.raises(ValueError, match=f"`{name}` must hold at least {at_least} images, got {at_least - 1};"):
            measure(real, generated)


def test_a_ball_needs_a_neighbour():
    with pytest.raises(ValueError, match="`num_neighbors` must be at least 1, got 0"):
        precision_recall_density_coverage(random_features(8), random_features(8), num_neighbors=0)


# Diversity


def test_diversity_is_the_mean_distance_of_pairs_within_a_condition():
    features = points((0, 0), (0, 2), (9, 9), (0, 6), (3, 4), (0, 0))
    conditions = torch.tensor([7, 7, 1, 7, 3, 3])
    assert diversity(features, conditions) == pytest.approx({3: 5, 7: (2 + 6 + 4) / 3})
    assert list(diversity(features, conditions)) == [3, 7]


def test_diversity_does_not_depend_on_the_number_of_images():
    features = random_features(6)
    of_subsets = [
        diversity(features[list(rows)], torch.zeros(3, dtype=torch.int64))[0]
        for rows in itertools.combinations(range(6), 3)
    ]
    assert np.mean(of_subsets) == pytest.approx(diversity(features, torch.zeros(6, dtype=torch.int64))[0])


def test_relative_diversity_weighs_every_shared_condition_the_same():
    real = points(0, 4, 0, 10, 0, 1, 5), torch.tensor([1, 1, 2, 2, 3, 3, 4])
    generated = points(0, 3, 6, 7, 8, 0, 0), torch.tensor([1, 1, 1, 2, 2, 4, 4])
    # Condition 1: (3 + 6 + 3) / 3 against 4. Condition 2: 1 against 10. Conditions 3 and 4 lack a pair in one of them.
    assert relative_diversity(*real, *generated) == {
        "value": pytest.approx((4 + 1) / (4 + 10)),
        "num_conditions": 2,
        "num_real": 4,
        "num_generated": 5,
    }


def test_relative_diversity_is_1_for_the_real_images_and_0_for_a_repeated_one_in_pixels_too():
    pixels = torch.randint(256, (12, 3 * 16 * 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    conditions = torch.arange(12) % 3
    assert relative_diversity(pixels, conditions, pixels, conditions)["value"] == 1
    repeated = pixels[conditions]
    assert relative_diversity(pixels, conditions, repeated, conditions)["value"] == 0


def test_relative_diversity_says_why_it_is_missing():
    pair, single = (points(0, 1), torch.tensor([0, 0])), (points(0, 1), torch.tensor([0, 1]))
    missing = relative_diversity(*pair, *single)
    assert missing["missing"] == "no condition has two real and two generated images"
    assert (missing["value"], missing["num_conditions"], missing["num_real"], missing["num_generated"]) == (
        None,
        0,
        0,
        0,
    )
    alike = relative_diversity(points(1, 1), torch.tensor([0, 0]), *pair)
    assert alike["value"] is None
    assert alike["missing"] == "the real images of a condition are all the same"


def test_conditions_that_do_not_fit_the_images_are_refused():
    features, conditions = random_features(4), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"`conditions` must hold one whole number for each of the 4 images, got .*3"):
        diversity(features, conditions[:3])
    with pytest.raises(ValueError, match=r"`generated_conditions` must hold .* got shape \(4,\) of torch.float32"):
        relative_diversity(features, conditions, features, conditions.float())
    with pytest.raises(ValueError, match="`real_features` must be finite"):
        relative_diversity(features * torch.nan, conditions, features, conditions)
    with pytest.raises(ValueError, match="must have the same width, got 6 and 5"):
        relative_diversity(features, conditions, features[:, :5], conditions)


# Memorisation


def grey_images(*levels):
    """Images of one level each: the root mean square distance of two of them is the difference of their levels."""
    return np.array(levels, dtype=np.uint8)[:, None, None, None] * np.ones((3, 16, 16), dtype=np.uint8)


def random_images(num_images, size=20, seed=0):
    return np.random.default_rng(seed).choice(np.array([0, 1, 254, 255], np.uint8), (num_images, 3, size, size))


def test_copies_are_counted_by_hand():
    # Scene 0 has the levels 0 and 2, scene 1 the level 100. The ratios are 1 / 99, 40 / 58, 25 / 73 and 24 / 74: the
    # first and the last lie below 1/3. The second closest image to the first is of the same scene, and as close.
    found = memorisation(
        grey_images(1, 60, 75, 76), grey_images(0, 2, 100), np.array([0, 0, 1]), held_out=grey_images(51, 40)
    )
    assert found.pop("nearest").tolist() == [0, 2, 2, 2]
    ratios = found.pop("distance_ratios")
    assert len(ratios) == 4 and np.median(ratios) == pytest.approx(found["median_distance_ratio"])
    assert found == {
        "copies": 0.5,
        "median_distance_ratio": pytest.approx((24 / 74 + 25 / 73) / 2),
        "median_nearest_distance": pytest.approx((24 + 25) / 2),
        "held_out": {
            "copies": 0,
            "median_distance_ratio": pytest.approx((49 / 49 + 38 / 60) / 2),
            "median_nearest_distance": pytest.approx((49 + 38) / 2),
        },
        "num_generated": 4,
        "num_train": 3,
    }


def test_an_image_that_equals_training_images_of_two_scenes_is_a_copy():
    found = memorisation(grey_images(5), grey_images(5, 5, 9), np.array([0, 1, 2]), held_out=grey_images(7))
    assert (found["copies"], found["median_distance_ratio"], found["held_out"]["copies"]) == (1, 0, 0)


def test_training_images_are_found_among_others_and_held_out_ones_are_no_copies(monkeypatch):
    monkeypatch.setattr(distribution, "_CHUNK_SIZE", 8)
    train = random_images(30)
    found = memorisation(train[[22, 3, 17]], train, np.arange(30) // 3, held_out=random_images(20, seed=1))
    assert found["nearest"].tolist() == [22, 3, 17]
    assert (found["copies"], found["median_nearest_distance"], found["held_out"]["copies"]) == (1, 0, 0)


def test_distances_in_pixels_are_exact():
    # Black images are the hardest: the 12,288 products that are summed up are the largest there are.
    train, images = (np.random.default_rng(seed).integers(0, 2, (7, 3, 64, 64), np.uint8) for seed in (0, 1))
    differences = images.astype(np.int64)[:, None] - train.astype(np.int64)
    expected = np.sqrt(np.square(differences).sum(axis=(2, 3, 4)) / images[0].size).min(axis=1)
    found = [
        memorisation(image[None], train, np.arange(7), held_out=images)["median_nearest_distance"] for image in images
    ]
    assert found == expected.tolist()


def test_neither_the_order_of_the_images_nor_the_chunks_change_what_is_found(monkeypatch):
    generated, train, held_out = random_images(9), random_images(20, seed=1), random_images(8, seed=2)
    scenes = np.arange(20) // 2
    expected = memorisation(generated, train, scenes, held_out=held_out)
    monkeypatch.setattr(distribution, "_CHUNK_SIZE", 3)
    found = memorisation(generated[::-1], train[::-1], scenes[::-1], held_out=held_out[::-1])
    assert (19 - found.pop("nearest"))[::-1].tolist() == expected.pop("nearest").tolist()
    assert found.pop("distance_ratios")[::-1].tolist() == expected.pop("distance_ratios").tolist()
    assert found == expected


@pytest.mark.filterwarnings("error")
def test_training_images_may_be_a_memory_map(tmp_path):
    train = random_images(6)
    np.save(tmp_path / "train.npy", train)
    mapped = np.load(tmp_path / "train.npy", mmap_mode="r")
    assert memorisation(train, mapped, np.arange(6), held_out=mapped)["copies"] == 1


def test_images_that_cannot_be_compared_are_refused():
    images, scenes = random_images(4), np.arange(4)
    with pytest.raises(ValueError, match=r"`generated` must hold .* uint8 \(num_images, C, H, W\) .* got float64"):
        memorisation(images / 255, images, scenes, held_out=images)
    with pytest.raises(ValueError, match=r"`generated` must hold at least one image .* \(0, 3, 20, 20\)"):
        memorisation(images[:0], images, scenes, held_out=images)
    with pytest.raises(
        ValueError, match=r"`train` must hold .* \(num_images, 3, 20, 20\) .* got uint8 \(4, 3, 16, 16\)"
    ):
        memorisation(images, random_images(4, size=16), scenes, held_out=images)
    with pytest.raises(ValueError, match=r"`held_out` must hold .* got uint8 \(4, 20, 20, 3\)"):
        memorisation(images, images, scenes, held_out=images.transpose(0, 2, 3, 1))
    with pytest.raises(ValueError, match=r"`train_scenes` must hold one number for each of the 4 .* got shape \(3,\)"):
        memorisation(images, images, scenes[:3], held_out=images)
    with pytest.raises(ValueError, match="`train_scenes` must name at least two scenes, got one"):
        memorisation(images, images, np.zeros(4), held_out=images)


@pytest.mark.slow
def test_of_real_images_those_of_the_training_split_are_copies_and_held_out_ones_are_not(iclevr_root, tmp_path):
    from iclevr_diffusion.data import open_store

    store = open_store(iclevr_root, cache_dir=tmp_path, progress=False)
    train, held_out = store.indices("train"), store.indices("held-out")[::20]
    found = memorisation(
        store.pixel_values[train[::400]],
        store.pixel_values[train],
        store.scenes[train],
        held_out=store.pixel_values[held_out],
    )
    assert found["copies"] == 1
    assert found["held_out"]["copies"] == 0
