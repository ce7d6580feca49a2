import threading
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from iclevr_diffusion.data.image_set import ImageSet
from iclevr_diffusion.data.repetition import repeat_factors

_ONE = 2**24  # of the whole numbers that stand for shares of one


class BatchLoader:
    """Shuffled training batches of a set of images, by number.

    Batch `step` is a pure function of the seed, the step, the indices and the batch size. So a resumed run has nothing
    to restore, and no state can go wrong. The processes cut one global batch of `batch_size * num_processes` images
    into consecutive parts; the images of all batches in a row are one shuffled pass over the indices after the other,
    and a batch may span the end of a pass.

    Where the images have `blocks`, a pass comes near to each block once: the blocks are shuffled, and each image is moved
    by a random part of `blocks.shuffle_size` from the place where its block begins, as `py1e` of MosaicML's Streaming does
    (https://docs.mosaicml.com/projects/streaming/en/stable/dataset_configuration/shuffling.html). Any order but this is
    that of all images alike.

    Args:
        store: The images.
        indices: Positions in the store to draw from, such as `store.indices("train")`.
        batch_size: Number of images a process and batch.
        seed: Seed of the shuffling, from 0 to 2**64 - 1.
        device: Where the batches are wanted.
        resident: Whether to hold all images of `indices` on the device, as uint8, from the start. Otherwise the images
            of a batch are read when it is asked for, or before. The batches are the same.
        num_workers: Number of threads that read the batches to come where images are not resident; 0 reads a batch when
            it is asked for. Reading a file, decoding and copying let go of Python's lock.
        repeat_threshold: Share of the images below which a label is rare, in (0, 1]: images of rare labels come more than
            once a pass, see `repeat_factors`. An image whose factor is 1.3 comes twice in three of ten passes; factors
            are scaled by a hair, so that all passes have the same length. None shows each image once.
        num_processes: Number of processes that train together.
        process_index: Number of this process, from 0.
    """

    def __init__(
        self,
        store: ImageSet,
        indices: np.ndarray,
        batch_size: int,
        *,
        seed: int,
        device: str | torch.device = "cpu",
        resident: bool = True,
        num_workers: int = 0,
        repeat_threshold: float | None = None,
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
        if num_workers < 0:
            raise ValueError(f"`num_workers` must be at least 0, got {num_workers}.")
        if not 0 <= process_index < num_processes:
            raise ValueError(
                f"`process_index` must lie between 0 and `num_processes` - 1 = {num_processes - 1}, got {process_index}."
            )
        self.batch_size = batch_size
        self.seed = seed
        self.device = torch.device(device)
        self.num_processes = num_processes
        self.process_index = process_index
        self._store = store
        self._orders: dict[int, np.ndarray] = {}
        self._order_lock = threading.Lock()
        self._pass_length, self._stops = len(self.indices), None
        if repeat_threshold is not None:
            totals = np.cumsum(repeat_factors(store.class_labels[self.indices], repeat_threshold))
            self._pass_length = round(totals[-1])
            self._stops = np.rint(totals * (self._pass_length * _ONE / totals[-1])).astype(np.int64)
        self._on_gpu = self.device.type == "cuda"  # where memory can be pinned
        self._resident: tuple[Tensor, Tensor] | None = None
        if resident:
            pixel_values = torch.from_numpy(store.pixel_values[self.indices])
            class_labels = torch.from_numpy(store.class_labels[self.indices])
            self._resident = (pixel_values.to(self.device), class_labels.to(self.device, torch.float32))
        self._num_ahead = 4 * num_workers
        self._threads = ThreadPoolExecutor(num_workers) if num_workers and not resident else None
        self._pending: dict[int, Future[tuple[Tensor, Tensor]]] = {}

    def batch(self, step: int) -> dict[str, Tensor]:
        """Returns batch `step`, counted from 0, of this process.

        Returns:
            `pixel_values`, uint8 (batch_size, C, H, W), for `normalize`, and `class_labels`, float32 (batch_size,
            num_classes) of 0 and 1, both on the device.
        """
        if step < 0:
            raise ValueError(f"`step` must be at least 0, got {step}.")
        if self._resident is not None:
            rows = torch.from_numpy(self._rows(step))
            # From other memory a GPU takes a copy only when its work so far is done.
            rows = rows.pin_memory() if self._on_gpu else rows
            rows = rows.to(self.device, non_blocking=self._on_gpu)
            pixel_values, class_labels = (values.index_select(0, rows) for values in self._resident)
        else:
            pixel_values, class_labels = self._read(step) if self._threads is None else self._read_ahead(step)
            # Without waiting for the work that the device still has to do; only pinned memory may be left while it is read.
            pixel_values = pixel_values.to(self.device, non_blocking=self._on_gpu)
            class_labels = class_labels.to(self.device, non_blocking=self._on_gpu)
        return {"pixel_values": pixel_values, "class_labels": class_labels}

    def _read_ahead(self, step: int) -> tuple[Tensor, Tensor]:
        """Returns what `_read` does, and has threads read the batches that follow."""
        wanted = range(step, step + self._num_ahead + 1)
        for number in self._pending.keys() - set(wanted):
            self._pending.pop(number).cancel()
        for number in wanted:
            if number not in self._pending:
                self._pending[number] = self._threads.submit(self._read, number)
        return self._pending.pop(step).result()

    def _read(self, step: int) -> tuple[Tensor, Tensor]:
        """Reads the images and labels of a batch into memory."""
        positions = self.indices[self._rows(step)]
        pixel_values = torch.from_numpy(self._store.pixel_values[positions])
        class_labels = torch.from_numpy(self._store.class_labels[positions]).float()
        if self.device.type == "cuda":
            return pixel_values.pin_memory(), class_labels.pin_memory()
        return pixel_values, class_labels

    def _rows(self, step: int) -> np.ndarray:
        """Returns the positions in `indices` of the images of a batch."""
        start = (step * self.num_processes + self.process_index) * self.batch_size
        epochs, offsets = np.divmod(np.arange(start, start + self.batch_size), self._pass_length)
        rows = np.empty_like(offsets)
        for epoch in range(epochs[0], epochs[-1] + 1):
            rows[epochs == epoch] = self._order(epoch)[offsets[epochs == epoch]]
        return rows

    def _order(self, epoch: int) -> np.ndarray:
        """Returns the positions in `indices` in the order of pass `epoch`, int64 (pass_length,)."""
        with self._order_lock:  # threads that read ahead want the same one
            if epoch not in self._orders:
                if len(self._orders) > 1:
                    self._orders.clear()
                self._orders[epoch] = self._make_order(int(epoch))
            return self._orders[epoch]

    def _make_order(self, epoch: int) -> np.ndarray:
        """Makes an order by sorting raw Philox numbers, a stream that NumPy never changes.

        `Generator.permutation` may change with a NumPy version, and then a resumed run would see other batches.
        """
        random = np.random.Philox(key=(epoch << 64) + self.seed)
        keys = random.random_raw(self._pass_length)
        rows = np.arange(len(self.indices))
        if self._stops is not None:
            # An image comes as often as a whole number lies in its part of the line, of the length of its factor; the
            # line is moved by a random share of one (systematic sampling; Madow, 1949).
            numbers = (self._stops + (int(random.random_raw()) % _ONE)) // _ONE
            rows = np.repeat(rows, np.diff(numbers, prepend=0))
        if self._store.blocks is not None:
            starts, shuffle_size = self._store.blocks
            blocks = np.searchsorted(starts, self.indices[rows], side="right") - 1
            order = np.argsort(random.random_raw(len(starts)), kind="stable")
            sizes = np.bincount(blocks, minlength=len(starts))
            first_places = np.empty_like(sizes)
            first_places[order] = np.cumsum(sizes[order]) - sizes[order]
            moves = (keys >> np.uint64(40)).astype(np.int64) * min(shuffle_size, self._pass_length)
            keys = first_places[blocks] * _ONE + moves
        return rows[np.argsort(keys, kind="stable")]


def normalize(pixel_values: Tensor) -> Tensor:
    """Returns uint8 `pixel_values` in [0, 255] as float32 in [-1, 1], both ends exactly."""
    if pixel_values.dtype != torch.uint8:
        raise ValueError(f"`pixel_values` must be uint8 in [0, 255], got {pixel_values.dtype}.")
    return pixel_values.to(torch.float32).div_(127.5).sub_(1)
