import hashlib
import pickle
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from iclevr_diffusion import inception
from iclevr_diffusion.inception import WEIGHTS_NAME, WEIGHTS_SHA256, InceptionFeatures, standard_fid_kid


class SmallExtractor(nn.Module):
    """Features of uint8 images by a fixed random network, in double precision to compare formulas closely."""

    num_features = 8

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.convolution = nn.Conv2d(3, self.num_features, 5, stride=3).double()

    def forward(self, pixel_values):
        assert pixel_values.dtype == torch.uint8
        return self.convolution(pixel_values.double() / 255).relu().amax((2, 3))


def random_images(num_images, seed=0, darker=1):
    return (np.random.default_rng(seed).integers(0, 256, (num_images, 3, 16, 16)) // darker).astype(np.uint8)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A file that passes for the published weights."""
    path = tmp_path / "weights.pth"
    path.write_bytes(b"weights")
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", hashlib.sha256(b"weights").hexdigest())
    return path


@pytest.fixture
def stand_in(monkeypatch):
    """Takes the place of torch-fidelity and keeps what its Inception network is built from."""
    built = []

    class FeatureExtractorInceptionV3(nn.Module):
        def __init__(self, name, features_list, feature_extractor_weights_path=None):
            super().__init__()
            built.append((features_list, feature_extractor_weights_path.read()))
            self.fc = nn.Linear(1, 1)

        def forward(self, pixel_values):
            return (pixel_values.flatten(1).float(),)

    name = "torch_fidelity.feature_extractor_inceptionv3"
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(FeatureExtractorInceptionV3=FeatureExtractorInceptionV3))
    return built


# The weights file


def test_the_weights_are_named_by_their_hash():
    assert len(WEIGHTS_SHA256) == 64
    assert f"-{WEIGHTS_SHA256[:8]}." in WEIGHTS_NAME


def test_a_missing_file_is_refused_with_what_was_expected_and_where_it_is(tmp_path, stand_in):
    with pytest.raises(FileNotFoundError) as error:
        InceptionFeatures(tmp_path / "none.pth")
    for part in (WEIGHTS_NAME, WEIGHTS_SHA256, "toshas/torch-fidelity", "v0.2.0", "none.pth` does not exist"):
        assert part in str(error.value)
    assert not stand_in


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_different_file_is_refused_before_anything_in_it_is_read(tmp_path, stand_in):
    sprung, path = tmp_path / "sprung", tmp_path / WEIGHTS_NAME
    path.write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(ValueError, match=f"{WEIGHTS_SHA256}.* but .* has the SHA-256 (?!{WEIGHTS_SHA256})"):
        InceptionFeatures(path)
    assert not stand_in
    assert not sprung.exists()


def test_the_network_is_built_from_the_bytes_that_were_checked(weights, stand_in):
    extractor = InceptionFeatures(weights)
    assert stand_in == [(["2048"], b"weights")]
    assert extractor(torch.ones(2, 3, 16, 16, dtype=torch.uint8)).shape == (2, 3 * 16 * 16)


def test_without_torch_fidelity_it_says_what_to_install(weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"torch-fidelity.* run `pip install torch-fidelity`"):
        InceptionFeatures(weights)


# The formulas


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all extracted features")
def test_fid_and_kid_are_those_of_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    kid = pytest.importorskip("torchmetrics.image.kid")
    real, generated = random_images(40), random_images(40, seed=1, darker=2)
    extractor = SmallExtractor()
    metrics = {
        "fid": fid.FrechetInceptionDistance(feature=extractor),
        "kid": kid.KernelInceptionDistance(feature=extractor, subsets=1, subset_size=40),  # all images at once
    }
    for metric in metrics.values():
        metric.update(torch.from_numpy(real), real=True)
        metric.update(torch.from_numpy(generated), real=False)
    expected = {"fid": metrics["fid"].compute().item(), "kid": metrics["kid"].compute()[0].item()}
    assert expected["fid"] > 0.1
    assert standard_fid_kid(extractor, real, generated) == pytest.approx(expected, rel=1e-6)


def test_batches_and_memory_maps_do_not_change_fid_and_kid(tmp_path):
    real, generated = random_images(11), random_images(9, seed=1)
    np.save(tmp_path / "real.npy", real)
    mapped = np.load(tmp_path / "real.npy", mmap_mode="r")
    extractor = SmallExtractor()
    found = standard_fid_kid(extractor, mapped, generated, batch_size=4)
    assert found == pytest.approx(standard_fid_kid(extractor, real, generated), rel=1e-9)


def test_images_of_another_form_are_refused():
    images, extractor = random_images(4), SmallExtractor()
    with pytest.raises(
        ValueError, match=r"`real` must hold at least two images as uint8 .* got float64 \(4, 3, 16, 16\)"
    ):
        standard_fid_kid(extractor, images / 255, images)
    with pytest.raises(ValueError, match=r"`generated` must hold at least two images .* got uint8 \(1, 3, 16, 16\)"):
        standard_fid_kid(extractor, images, images[:1])
    with pytest.raises(ValueError, match=r"`real` must hold .* got uint8 \(4, 16, 16, 3\)"):
        standard_fid_kid(extractor, images.transpose(0, 2, 3, 1), images)
