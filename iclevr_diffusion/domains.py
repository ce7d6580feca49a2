import json
import math

import numpy as np
import torch
from torch import Tensor

from iclevr_diffusion.data import BatchLoader, ImageSet, normalize
from iclevr_diffusion.training import TrainingRun
from iclevr_diffusion.training_data import DataConfig, TrainingData, open_images

# Added to a run's seed, which is smaller, so that domain A is shuffled otherwise than domain B.
SEED_OF_A = 2**32


class UnpairedImages:
    """Batches of images of two domains, A and B, no image of which belongs to one of the other's.

    Domain B is the training images of a run. Every batch is a pure function of its number, as `TrainingRun.batches`
    asks for.

    Args:
        run: The run.
        data: Its images.
        config: Its configuration; a folder of domain A is split, resized and held on the device like the other.
        domain_a: `images` for those of domain B in another order, `noise` for `NoiseImages`, or whatever
            `config.data` may be.

    Raises:
        ValueError: If `domain_a` is nothing of that, or the images of the two domains differ in their channels.
    """

    def __init__(self, run: TrainingRun, data: TrainingData, config: DataConfig, domain_a: str) -> None:
        accelerator = run.accelerator
        settings = {
            "device": accelerator.device,
            "num_processes": accelerator.num_processes,
            "process_index": accelerator.process_index,
        }
        seed = SEED_OF_A + config.seed
        self._device = accelerator.device
        self._b, self._store_b, self._indices_b = data.loader, data.store, data.indices
        shape = data.store.pixel_values.shape[1:]
        self.num_channels: int = shape[0]
        facts = {"domain_a": domain_a}
        if domain_a == "noise":
            self._store_a = self._indices_a = None
            self._a = NoiseImages(shape, config.batch_size, seed=seed, **settings)
        else:
            self._store_a, self._indices_a = data.store, data.indices
            if domain_a != "images":
                root, self._store_a = open_images(
                    *("domain_a", domain_a, config.resolution),
                    progress=accelerator.is_main_process,
                    streaming=config.streaming,
                )
                self._indices_a = self._store_a.indices(config.split)
                facts = {"domain_a": self._store_a.sha256, "root": str(root), "num_images": len(self._indices_a)}
                if self._store_a.pixel_values.shape[1:] != shape:
                    raise ValueError(
                        f"`domain_a` must hold images of {shape[0]} channels, as `data` does, got"
                        f" {self._store_a.pixel_values.shape[1]} in {domain_a}."
                    )
            self._a = BatchLoader(
                *(self._store_a, self._indices_a, config.batch_size),
                seed=seed,
                resident=config.resident and not config.streaming,
                num_workers=config.num_workers,
                repeat_threshold=config.repeat_threshold,
                **settings,
            )
        run.pin(domain_a=facts["domain_a"])
        run.describe("domain_a.json", json.dumps(facts, indent=2) + "\n")

    def batch(self, step: int) -> dict[str, Tensor]:
        """Returns `a` and `b`, images (batch_size, C, H, W) in [-1, 1] on the run's device, of batch `step` from 0."""
        return {
            name: normalize(source.batch(step)["pixel_values"]) for name, source in (("a", self._a), ("b", self._b))
        }

    def examples(self, num_images: int) -> dict[str, Tensor]:
        """Returns `a` and `b`, as many validation images of each, up to `num_images`, always the same ones."""
        pixel_values_b = _choose(self._store_b, self._indices_b, num_images, seed=0)
        if self._store_a is None:
            pixel_values_a = NoiseImages(pixel_values_b.shape[1:], num_images, seed=0).batch(0)["pixel_values"]
        else:
            pixel_values_a = _choose(self._store_a, self._indices_a, num_images, seed=1)
        num_images = min(len(pixel_values_a), len(pixel_values_b))
        pairs = (("a", pixel_values_a), ("b", pixel_values_b))
        return {name: normalize(pixel_values[:num_images]).to(self._device) for name, pixel_values in pairs}


class NoiseImages:
    """Batches of images of noise: each channel of each pixel is drawn by itself, evenly from 0 to 255.

    Like the order of `BatchLoader`, it comes of raw Philox numbers, a stream that NumPy never changes.

    Args:
        shape: Shape (C, H, W) of an image.
        batch_size: Number of images a process and batch.
        seed: Seed of the noise, from 0 to 2**64 - 1; with the step and the process it decides a batch.
        device: Where the batches are wanted.
        num_processes: Number of processes that train together.
        process_index: Number of this process, from 0.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        batch_size: int,
        *,
        seed: int,
        device: str | torch.device = "cpu",
        num_processes: int = 1,
        process_index: int = 0,
    ) -> None:
        self.shape = (batch_size, *shape)
        self.seed = seed
        self.device = torch.device(device)
        self.num_processes = num_processes
        self.process_index = process_index

    def batch(self, step: int) -> dict[str, Tensor]:
        """Returns `pixel_values`, uint8 (batch_size, C, H, W), for `normalize`, of batch `step`, counted from 0."""
        number = step * self.num_processes + self.process_index
        size = math.prod(self.shape)
        words = np.random.Philox(key=(number << 64) + self.seed).random_raw(-(-size // 8)).astype("<u8")
        pixel_values = words.view(np.uint8)[:size].reshape(self.shape)
        return {"pixel_values": torch.from_numpy(pixel_values).to(self.device)}


def _choose(store: ImageSet, training_indices: np.ndarray, num_images: int, *, seed: int) -> Tensor:
    """Picks images, uint8 (num_images, C, H, W), for validation; training images where a small data set has no other."""
    indices = store.indices("validation")
    indices = indices if len(indices) else training_indices
    chosen = np.random.default_rng(seed).permutation(indices)[:num_images]
    return torch.from_numpy(store.pixel_values[chosen])
