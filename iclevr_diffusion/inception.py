"""The standard FID and KID, in the features of the Inception network that their names stand for.

They need the package torch-fidelity (`pip install torch-fidelity`) and its weights file, which nothing here
downloads. This project's tests cover the check of that file, the call of torch-fidelity and the formulas; the Inception
network itself has never run in them, for want of the file.
"""

import hashlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from iclevr_diffusion.distribution import frechet_distance, kernel_distance

# The name's last part is torch.hub's: the first 8 digits of the SHA-256. The file is the same, byte for byte, as
# `pt_inception-2015-12-05-6726825d.pth` of mseitzer/pytorch-fid, release fid_weights.
WEIGHTS_NAME = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_RELEASE = "release v0.2.0 of https://github.com/toshas/torch-fidelity"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class InceptionFeatures(nn.Module):
    """The 2048 features of Inception-v3 (Szegedy et al., 2016) that the standard FID and KID are defined by.

    Torch-fidelity's port of TensorFlow's network of 2015-12-05, which enlarges images as TensorFlow 1 did. Not tested
    here with the published weights.

    Args:
        weights: The weights file. Its SHA-256 is checked before anything in it is read.
    """

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        source = f"`{WEIGHTS_NAME}` from {WEIGHTS_RELEASE} (SHA-256 {WEIGHTS_SHA256})"
        try:
            content = Path(weights).read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(f"`weights` must be {source}, but `{weights}` does not exist.") from None
        sha256 = hashlib.sha256(content).hexdigest()
        if sha256 != WEIGHTS_SHA256:
            raise ValueError(f"`weights` must be {source}, but `{weights}` has the SHA-256 {sha256}.")
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError(
                "The standard FID and KID need the package torch-fidelity, which cannot be imported"
                f" ({error}); run `pip install torch-fidelity`."
            ) from error
        # The bytes that were checked, not the path: what is unpickled cannot have changed in between.
        self.network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=BytesIO(content)
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Maps images, uint8 (B, 3, H, W) in [0, 255], to float32 features (B, 2048)."""
        return self.network(pixel_values.to(self.network.fc.weight.device))[0]


def standard_fid_kid(
    extractor: Callable[[Tensor], Tensor], real: np.ndarray, generated: np.ndarray, *, batch_size: int = 32
) -> dict[str, float]:
    """Compares generated images with real ones by FID and KID.

    FID is `frechet_distance` of the features. It shrinks as the number of images grows, and published values take
    50,000: a value from fewer stands beside others from the same numbers only. KID is `kernel_distance` of the features
    from all images at once; other packages give the mean over random subsets, which has the same expected value.

    Args:
        extractor: `InceptionFeatures`; with any other map from uint8 images (B, 3, H, W) to features (B, D) the results
            are not FID and KID.
        real: Real images, uint8 (N, 3, H, W) in [0, 255], N at least 2; may be a memory map.
        generated: Generated images, uint8 (M, 3, H, W), M at least 2.
        batch_size: Images per call of `extractor`.

    Returns:
        `fid`, at least 0, and `kid`, which can be negative.
    """
    features = []
    for name, images in (("real", real), ("generated", generated)):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) < 2:
            raise ValueError(
                f"`{name}` must hold at least two images as uint8 (num_images, 3, H, W) in [0, 255], got"
                f" {images.dtype} {images.shape}."
            )
        with torch.inference_mode():
            batches = [
                extractor(torch.from_numpy(np.array(images[start : start + batch_size]))).cpu()
                for start in range(0, len(images), batch_size)
            ]
        features.append(torch.cat(batches))
    return {"fid": frechet_distance(*features), "kid": kernel_distance(*features)}
