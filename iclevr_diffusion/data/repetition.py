import numpy as np


def repeat_factors(class_labels: np.ndarray, threshold: float) -> np.ndarray:
    """Returns how often an image is to be shown in a pass for each time that one of frequent labels is.

    A label that a share f of the images show has the factor max(1, sqrt(threshold / f)), an image that of its rarest
    label, and one without labels the factor 1: the repeat-factor sampling of *LVIS: A Dataset for Large Vocabulary
    Instance Segmentation* (Gupta et al., 2019, https://arxiv.org/abs/1908.03195v2, appendix B.2), with the square root
    of *Exploring the Limits of Weakly Supervised Pretraining* (Mahajan et al., 2018, https://arxiv.org/abs/1805.00932).

    Args:
        class_labels: 1 where an image shows a label, uint8 (num_images, num_classes).
        threshold: Share of the images above which a label is frequent, in (0, 1].

    Returns:
        Factors of at least 1, float64 (num_images,).
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"`threshold` must lie in (0, 1], a share of the images, got {threshold}.")
    shares = class_labels.sum(axis=0, dtype=np.int64) / len(class_labels)
    # A label that no image shows counts as frequent; no image asks for its factor.
    label_factors = np.sqrt(threshold / np.where(shares > 0, shares, threshold)).clip(min=1)
    factors = np.ones(len(class_labels))
    for column, factor in enumerate(label_factors.tolist()):
        np.maximum(factors, factor, out=factors, where=class_labels[:, column] > 0)
    return factors
