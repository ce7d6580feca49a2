"""How close generated images are to real ones as a whole: pure functions of features, or of pixels.

A score of single images cannot see a generator that draws the same image again and again, or that copies its training
images. The distances here compare two clouds of points, so they depend on what made the points: a distance in a judge's
features is no FID, which is the same formula in the features of one particular Inception network.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CHUNK_SIZE = 256  # rows of a distance matrix in memory at a time

# Centred bytes lie in [-128, 127], so a product of two is at most 2**14 and a sum of 2**10 of them at most 2**24, and
# float32 holds all whole numbers up to there: in blocks of this width its fast matrix products are exact.
_EXACT_WIDTH = 1024

_COPY_RATIO = 1 / 3


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Compares the means and covariances of two sets of features by the Frechet distance of Gaussians.

    |m_r - m_g|^2 + tr(S_r + S_g - 2 (S_r S_g)^(1/2)), the square of the distance in *The Frechet distance between
    multivariate normal distributions* (Dowson and Landau, 1982, https://doi.org/10.1016/0047-259X(82)90077-X), used for
    images in *GANs Trained by a Two Time-Scale Update Rule* (Heusel et al., 2017, https://arxiv.org/abs/1706.08500,
    eq. 6). It shrinks as the number of images grows, and where both sets show the same labels: compare only values from
    the same numbers of images of the same labels.

    Neither the covariances nor a square root of a matrix is formed. With centred features X_r / sqrt(N - 1) = Q_r R_r,
    S_r = R_r' R_r, and the trace of the root is the sum of the singular values of R_r R_g'. That is as accurate for
    fewer images than features, where covariances are singular, as it is for many.

    Args:
        real: Features of real images (N, D), N at least 2.
        generated: Features of generated images (M, D), M at least 2.

    Returns:
        The squared distance, at least 0, in the square of the features' unit.
    """
    real, generated = _two_sets(real, generated, at_least=2)
    distance = (real.mean(dim=0) - generated.mean(dim=0)).square().sum()
    factors = []
    for features in (real, generated):
        centred = (features - features.mean(dim=0)) / (len(features) - 1) ** 0.5
        distance += centred.square().sum()
        factors.append(torch.linalg.qr(centred, mode="r").R)
    distance -= 2 * torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    return max(distance.item(), 0.0)  # the same features twice give 0 less a rounding error


def kernel_distance(real: Tensor, generated: Tensor) -> float:
    """Compares two sets of features by the squared maximum mean discrepancy with a cubic polynomial kernel.

    The unbiased estimate with k(x, y) = (x'y / D + 1)^3 of *Demystifying MMD GANs* (Binkowski et al., 2018,
    https://arxiv.org/abs/1801.01401, section 4), from all images at once instead of the mean over random
    subsets: the same expected value with less noise. For images drawn independently it does not depend on their number.
    Several images of a scene in one set raise it a little, and two sets drawn for the same labels take it below 0.

    Args:
        real: Features of real images (N, D), N at least 2.
        generated: Features of generated images (M, D), M at least 2.

    Returns:
        The estimate; where it is below 0, no difference is to be seen.
    """
    real, generated = _two_sets(real, generated, at_least=2)
    within = sum(
        (_kernel_sum(features, features) - _kernel(features.square().sum(dim=1), features).sum().item())
        / (len(features) * (len(features) - 1))
        for features in (real, generated)
    )
    return within - 2 * _kernel_sum(real, generated) / (len(real) * len(generated))


def precision_recall_density_coverage(real: Tensor, generated: Tensor, num_neighbors: int = 5) -> dict[str, float]:
    """Says which share of each set of features lies within the other, told by balls around every point.

    The ball around a point reaches to its `num_neighbors`-th nearest neighbour in its own set, and holds its border.
    Precision and recall are those of *Improved Precision and Recall Metric for Assessing Generative Models*
    (Kynkaanniemi et al., 2019, https://arxiv.org/abs/1904.06991, eq. 1 and 2), density and coverage those of *Reliable
    Fidelity and Diversity Metrics for Generative Models* (Naeem et al., 2020, https://arxiv.org/abs/2002.09797,
    section 3), whose default of 5 neighbours is ours.

    Args:
        real: Features of real images (N, D), N above `num_neighbors`.
        generated: Features of generated images (M, D), M above `num_neighbors`.
        num_neighbors: Neighbours within the radius of a ball; fewer make every measure stricter and noisier.

    Returns:
        `precision`, the share of generated points in any real ball; `recall`, the share of real points in any generated
        ball; `density`, the mean number of real balls around a generated point divided by `num_neighbors`, about 1 for
        equal distributions and above it where generated points crowd where real ones do; `coverage`, the share of real
        balls that hold a generated point.
    """
    if num_neighbors < 1:
        raise ValueError(f"`num_neighbors` must be at least 1, got {num_neighbors}.")
    real, generated = _two_sets(real, generated, at_least=num_neighbors + 1)
    real_radii, generated_radii = _radii(real, num_neighbors), _radii(generated, num_neighbors)
    num_precise, num_hits = 0, 0
    recalled, covered = torch.zeros(len(real), dtype=torch.bool), torch.zeros(len(real), dtype=torch.bool)
    for rows, distances in _distances(generated, real):
        in_real_ball = distances <= real_radii
        num_precise += in_real_ball.any(dim=1).sum().item()
        num_hits += in_real_ball.sum().item()
        covered |= in_real_ball.any(dim=0)
        recalled |= (distances <= generated_radii[rows, None]).any(dim=0)
    return {
        "precision": num_precise / len(generated),
        "recall": recalled.sum().item() / len(real),
        "density": num_hits / (num_neighbors * len(generated)),
        "coverage": covered.sum().item() / len(real),
    }


def compare_features(real: Tensor, generated: Tensor) -> dict[str, float]:
    """Compares the features of generated images with those of real ones by every measure of this file.

    Args:
        real: Features of real images (N, D), N at least 6.
        generated: Features of generated images (M, D), M at least 6.

    Returns:
        `frechet_distance`, `kernel_distance`, and `precision`, `recall`, `density` and `coverage` with 5 neighbours.
    """
    return {
        "frechet_distance": frechet_distance(real, generated),
        "kernel_distance": kernel_distance(real, generated),
    } | precision_recall_density_coverage(real, generated)


def diversity(features: Tensor, conditions: Tensor) -> dict[int, float]:
    """Measures how far apart the images of one condition lie from each other.

    The mean over all pairs of two different images is an unbiased estimate of the expected distance of two images of
    that condition, however few there are.

    Args:
        features: Features of images (N, D), or their pixels (N, 3 * H * W).
        conditions: Number of each image's condition, int (N,).

    Returns:
        Mean Euclidean distance for each condition of at least two images, in ascending order of the conditions.
    """
    features, conditions = _of_conditions(features, conditions, "features", "conditions")
    distances = {}
    for condition in conditions.unique().tolist():
        group = features[conditions == condition].double()
        if len(group) > 1:
            distances[condition] = torch.pdist(group).mean().item()
    return distances


def relative_diversity(
    real_features: Tensor, real_conditions: Tensor, generated_features: Tensor, generated_conditions: Tensor
) -> dict[str, Any]:
    """Measures how different generated images of the same condition are, relative to real images of it.

    The sum of `diversity` over the conditions of the generated images, divided by the same sum of the real ones, over
    the conditions of which both have at least two images; every such condition weighs the same. One sum is divided by
    the other, since a mean of quotients would follow the conditions whose few real images happen to be alike.

    Args:
        real_features: Features of real images (N, D), or their pixels (N, 3 * H * W).
        real_conditions: Number of each real image's condition, int (N,).
        generated_features: Features of generated images (M, D), or their pixels.
        generated_conditions: Number of each generated image's condition, int (M,), counted like the real ones.

    Returns:
        `value`, 1 where generated images differ as much as real ones and 0 where a condition always gives the same
        image; `num_conditions` that were compared, and their `num_real` and `num_generated` images. Where nothing can
        be compared, `value` is None and `missing` says why.
    """
    real_features, real_conditions = _of_conditions(real_features, real_conditions, "real_features", "real_conditions")
    generated_features, generated_conditions = _of_conditions(
        generated_features, generated_conditions, "generated_features", "generated_conditions"
    )
    if real_features.shape[1] != generated_features.shape[1]:
        raise ValueError(
            "`real_features` and `generated_features` must have the same width, got"
            f" {real_features.shape[1]} and {generated_features.shape[1]}; take both from the same judge."
        )
    real = diversity(real_features, real_conditions)
    generated = diversity(generated_features, generated_conditions)
    shared = [condition for condition in real if condition in generated]
    real_sum = sum(real[condition] for condition in shared)
    counts = {
        "num_conditions": len(shared),
        "num_real": sum((real_conditions == condition).sum().item() for condition in shared),
        "num_generated": sum((generated_conditions == condition).sum().item() for condition in shared),
    }
    if not shared:
        return {"value": None, **counts, "missing": "no condition has two real and two generated images"}
    if real_sum == 0:
        return {"value": None, **counts, "missing": "the real images of a condition are all the same"}
    return {"value": sum(generated[condition] for condition in shared) / real_sum, **counts}


def memorisation(
    generated: np.ndarray, train: np.ndarray, train_scenes: np.ndarray, *, held_out: np.ndarray
) -> dict[str, Any]:
    """Looks for training images among generated ones.

    d_1 is the distance to the closest training image and d_2 that to the closest one of any other scene. An image is
    called a copy if d_1 / d_2 < 1/3, which is the criterion of *Why Diffusion Models Don't Memorize* (Bonnaire et al.,
    2025, https://arxiv.org/abs/2505.17638). Theirs takes d_2 from the second closest training image, whatever it shows;
    that would hide copies here, because the images of a scene are nearly the same. An image that equals a training
    image is a copy whatever d_2 is.

    Distances are Euclidean in pixels, and exact: whole numbers up to the final root. So neither the order of the images
    nor the device's rounding changes the result. A mirrored or shifted copy is not found.

    Args:
        generated: Generated images, uint8 (M, C, H, W) in [0, 255].
        train: The images the generator was trained on, uint8 (N, C, H, W); may be a memory map.
        train_scenes: Number of each training image's scene, int (N,), at least two different ones.
        held_out: Real images that the generator did not see, uint8 (K, C, H, W): what the same measures are for them is
            what an honest generator reaches.

    Returns:
        `copies`, the share of copies; `median_distance_ratio`, the median of d_1 / d_2; `median_nearest_distance`, the
        median of d_1 as a root mean square over pixels and channels, in [0, 255]; the same three of the held-out images
        under `held_out`; `num_generated` and `num_train`; and for a sheet of the pairs two arrays (M,): `nearest`, the
        position in `train` of the closest image to each generated one, and `distance_ratios`, d_1 / d_2 of each.
    """
    _check_images(generated, "generated")
    _check_images(train, "train", shape=generated.shape[1:])
    _check_images(held_out, "held_out", shape=generated.shape[1:])
    train_scenes = np.asarray(train_scenes)
    if train_scenes.shape != (len(train),):
        raise ValueError(
            f"`train_scenes` must hold one number for each of the {len(train)} training images, got shape"
            f" {train_scenes.shape}; see `store.scenes`."
        )
    if (train_scenes == train_scenes[0]).all():
        raise ValueError(
            "`train_scenes` must name at least two scenes, got one; a copy is told by its distance to other scenes."
        )
    generated_distances, nearest = _nearest(generated, train, train_scenes)
    held_out_distances, _ = _nearest(held_out, train, train_scenes)
    return {
        **_memorisation_measures(generated_distances),
        "held_out": _memorisation_measures(held_out_distances),
        "num_generated": len(generated),
        "num_train": len(train),
        "nearest": nearest,
        "distance_ratios": _ratios(generated_distances),
    }


def _ratios(distances: np.ndarray) -> np.ndarray:
    nearest, other = distances.T
    return np.divide(nearest, other, out=np.zeros_like(nearest), where=nearest > 0)


def _memorisation_measures(distances: np.ndarray) -> dict[str, float]:
    nearest, ratios = distances[:, 0], _ratios(distances)
    return {
        "copies": float((ratios < _COPY_RATIO).mean()),
        "median_distance_ratio": float(np.median(ratios)),
        "median_nearest_distance": float(np.median(nearest)),
    }


def _nearest(images: np.ndarray, train: np.ndarray, train_scenes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distances (B, 2) to the closest training image and to that of another scene, and the first's place."""
    distances, positions = [], []
    for chunk in _centred_chunks(images):
        squared = np.concatenate([_squared_distances(chunk, others) for others in _centred_chunks(train)], axis=1)
        nearest = squared.argmin(axis=1)
        same_scene = train_scenes == train_scenes[nearest][:, None]
        other = np.where(same_scene, np.inf, squared).min(axis=1)
        distances.append(np.stack([squared.min(axis=1), other], axis=1))
        positions.append(nearest)
    num_values = images[0].size
    return np.sqrt(np.concatenate(distances) / num_values), np.concatenate(positions)


def _centred_chunks(images: np.ndarray) -> Iterator[Tensor]:
    for start in range(0, len(images), _CHUNK_SIZE):
        pixels = np.array(images[start : start + _CHUNK_SIZE])  # a copy, since a memory map may not be written to
        yield torch.from_numpy(pixels).flatten(1).float() - 128


def _squared_distances(x: Tensor, y: Tensor) -> np.ndarray:
    """Returns |x|^2 + |y|^2 - 2 x'y of whole numbers from -128 to 127 as float64 (len(x), len(y)), exactly."""
    squared = torch.zeros(len(x), len(y), dtype=torch.float64)
    for part, other in zip(x.split(_EXACT_WIDTH, dim=1), y.split(_EXACT_WIDTH, dim=1), strict=True):
        squared += part.square().sum(dim=1, dtype=torch.float64)[:, None]
        squared += other.square().sum(dim=1, dtype=torch.float64)
        squared -= 2 * (part @ other.T)
    return squared.numpy()


def _kernel(products: Tensor, features: Tensor) -> Tensor:
    return (products / features.shape[1] + 1) ** 3


def _kernel_sum(x: Tensor, y: Tensor) -> float:
    return sum(_kernel(rows @ y.T, x).sum().item() for rows in x.split(_CHUNK_SIZE))


def _distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields the rows of a chunk of `x` and their distances to `y`; from differences, so that equal points have 0."""
    for start in range(0, len(x), _CHUNK_SIZE):
        rows = slice(start, start + _CHUNK_SIZE)
        yield rows, torch.cdist(x[rows], y, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(features: Tensor, num_neighbors: int) -> Tensor:
    """Returns the distance (N,) of each point to its neighbour of that rank; the point itself comes before the first."""
    return torch.cat(
        [distances.kthvalue(num_neighbors + 1, dim=1).values for _, distances in _distances(features, features)]
    )


def _two_sets(real: Tensor, generated: Tensor, *, at_least: int) -> tuple[Tensor, Tensor]:
    """Checks two sets of features and returns them as float64 on the CPU."""
    sets = []
    for name, features in (("real", real), ("generated", generated)):
        features = _check_features(features, name)
        if len(features) < at_least:
            raise ValueError(f"`{name}` must hold at least {at_least} images, got {len(features)}; take more of them.")
        sets.append(features.double())
    if sets[0].shape[1] != sets[1].shape[1]:
        raise ValueError(
            f"`real` and `generated` must have the same width, got {sets[0].shape[1]} and {sets[1].shape[1]}; take both"
            " from the same judge."
        )
    return sets[0], sets[1]


def _of_conditions(
    features: Tensor, conditions: Tensor, features_name: str, conditions_name: str
) -> tuple[Tensor, Tensor]:
    features = _check_features(features, features_name)
    conditions = torch.as_tensor(conditions).cpu()
    if conditions.shape != (len(features),) or conditions.is_floating_point():
        raise ValueError(
            f"`{conditions_name}` must hold one whole number for each of the {len(features)} images, got shape"
            f" {tuple(conditions.shape)} of {conditions.dtype}."
        )
    return features, conditions


def _check_features(features: Tensor, name: str) -> Tensor:
    features = torch.as_tensor(features).cpu()
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(
            f"`{name}` must have shape (num_images, num_features), got {tuple(features.shape)}; flatten what each image"
            " has into one row."
        )
    if not torch.isfinite(features).all():
        raise ValueError(f"`{name}` must be finite, got NaN or infinity; were the images finite?")
    return features


def _check_images(images: np.ndarray, name: str, shape: tuple[int, ...] | None = None) -> None:
    expected = "(num_images, C, H, W)" if shape is None else f"(num_images, {', '.join(map(str, shape))})"
    fits = images.ndim == 4 and (shape is None or images.shape[1:] == shape)
    if images.dtype != np.uint8 or not fits or images.size == 0:
        raise ValueError(
            f"`{name}` must hold at least one image as uint8 {expected} in [0, 255], got {images.dtype}"
            f" {images.shape}; all images must have the size of the generated ones."
        )
