import numpy as np
import torch
from torch import Tensor

from iclevr_diffusion.data.store import ImageStore


class BatchLoader:
    """Shuffled training batches of a store, by number.

    Batch `step` is a pure function of the seed, the step, the indices and the batch size. So a resumed run has nothing
    to restore, and no state can go wrong. The processes cut one global batch of `batch_size * num_processes` images
    into consecutive parts; the images of all batches in a row are one shuffled pass over the indices after the other,
    and a batch may span the end of a pass.

    Args:
        store: The images.
        indices: Positions in the store to draw from, such as `store.indices("train")`.
        batch_size: Number of images a process and batch.
        seed: Seed of the shuffling, from 0 to 2**64 - 1.
        device: Where the batches are wanted.
        resident: Whether to hold all images of `indices` on the device, as uint8, from the start. Otherwise the images
            of a batch are read from the store's file. The batches are the same.
        num_processes: Number of processes that train together.
        process_index: Number of this process, from 0.
    """

    def __init__(
        self,
        store: ImageStore,
        indices: np.ndarray,
        batch_size: int,
        *,
        seed: int,
        device: str | torch.device = "cpu",
        resident: bool = True,
        num_processes: int = 1,
        process_index: int = 0,
    ) -> None:
        self.indices = np.array(indices, dtype=np.int64)
        if self.indices.ndim != 1 or not len(self.indices):
            raise ValueError(
                f"`indices` must be a non-empty list of positions in the store, got shape {self.indices.shape}; a small"
                " data set can have no scene in a split."
            )
        if self.indices.min() < 0 or self.indices.max() >= len(store):
            raise ValueError(
                f"`indices` must lie between 0 and {len(store) - 1}, got {self.indices.min()} to {self.indices.max()}."
            )
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if not 0 <= seed < 2**64:
            raise ValueError(f"`seed` must lie between 0 and 2**64 - 1, got {seed}.")
        if not 0 <= process_index < num_processes:
            raise ValueError(
                f"`process_index` must lie between 0 and `num_processes` - 1 = {num_processes - 1}, got {process_index}."
            )
        self.batch_size = batch_size
        self.seed = seed
        self.device = torch.device(device)
        self.num_processes = num_processes
        self.process_index = process_index
        self._permutations: dict[int, np.ndarray] = {}
        self._store = store
        self._class_labels = torch.from_numpy(store.class_labels[self.indices]).to(self.device, torch.float32)
        self._pixel_values = torch.from_numpy(store.pixel_values[self.indices]).to(self.device) if resident else None

    def batch(self, step: int) -> dict[str, Tensor]:
        """Returns batch `step`, counted from 0, of this process.

        Returns:
            `pixel_values`, uint8 (batch_size, C, H, W), for `normalize`, and `class_labels`, float32 (batch_size,
            num_classes) of 0 and 1, both on the device.
        """
        rows = self._rows(step)
        device_rows = torch.from_numpy(rows).to(self.device)
        if self._pixel_values is not None:
            pixel_values = self._pixel_values.index_select(0, device_rows)
        else:
            pixel_values = torch.from_numpy(self._store.pixel_values[self.indices[rows]]).to(self.device)
        return {"pixel_values": pixel_values, "class_labels": self._class_labels.index_select(0, device_rows)}

    def _rows(self, step: int) -> np.ndarray:
        """Returns the positions in `indices` of the images of a batch."""
        if step < 0:
            raise ValueError(f"`step` must be at least 0, got {step}.")
        start = (step * self.num_processes + self.process_index) * self.batch_size
        epochs, offsets = np.divmod(np.arange(start, start + self.batch_size), len(self.indices))
        rows = np.empty_like(offsets)
        for epoch in range(epochs[0], epochs[-1] + 1):
            rows[epochs == epoch] = self._permutation(epoch)[offsets[epochs == epoch]]
        return rows

    def _permutation(self, epoch: int) -> np.ndarray:
        """Returns the order of pass `epoch`.

        It comes from sorting raw Philox numbers, a stream that NumPy never changes; `Generator.permutation` may change
        with a NumPy version, and then a resumed run would see other batches.
        """
        if epoch not in self._permutations:
            if len(self._permutations) > 1:
                self._permutations.clear()
            keys = np.random.Philox(key=(int(epoch) << 64) + self.seed).random_raw(len(self.indices))
            self._permutations[epoch] = np.argsort(keys, kind="stable")
        return self._permutations[epoch]


def normalize(pixel_values: Tensor) -> Tensor:
    """Returns uint8 `pixel_values` in [0, 255] as float32 in [-1, 1], both ends exactly."""
    if pixel_values.dtype != torch.uint8:
        raise ValueError(f"`pixel_values` must be uint8 in [0, 255], got {pixel_values.dtype}.")
    return pixel_values.to(torch.float32).div_(127.5).sub_(1)
