"""Sets that are larger than memory: batches that are read ahead, Parquet files, and stores that are checked once."""

import importlib.util
import io
import json
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from iclevr_diffusion.checkpoint import newest_checkpoint, read_manifest
from iclevr_diffusion.data import BatchLoader, ImageStore, StreamedImages, open_source, open_store
from iclevr_diffusion.data import image_set as image_set_module
from iclevr_diffusion.data import parquet_column as parquet_column_module
from iclevr_diffusion.data import store as store_module
from iclevr_diffusion.data.image_set import Blocks, ImageSet
from iclevr_diffusion.data.parquet_column import ParquetColumn
from iclevr_diffusion.training_data import DataConfig

NAMES = ["blue", "green", "red"]
SCRIPTS = Path(__file__).resolve().parents[1] / "train_scripts"
TINY = {"resolution": 8, "block_out_channels": (8, 16), "attention_levels": (), "batch_size": 4, "warmup_steps": 1}
TINY |= {"attention_head_dim": 8, "sample_every": 0, "num_inference_steps": 2, "lr_schedule": "constant"}


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two Parquet files of 60 random images each, in row groups of 7."""
    folder = tmp_path_factory.mktemp("parquet") / "set"
    folder.mkdir()
    random = np.random.default_rng(0)
    for k in range(2):
        images = [
            {"bytes": png(random.integers(256, size=(8, 8, 3), dtype=np.uint8)), "path": None} for _ in range(60)
        ]
        labels = [[NAMES[j] for j in range(3) if (i + k) >> j & 1] for i in range(60)]
        table = pyarrow.table({"image": images, "labels": labels})
        parquet.write_table(table, folder / f"part-{k}.parquet", row_group_size=7)
    return folder


@pytest.fixture
def streamed(folder):
    return StreamedImages(open_source(folder), 8)


@pytest.fixture(scope="module")
def store(folder, tmp_path_factory):
    return open_store(folder, resolution=8, cache_dir=tmp_path_factory.mktemp("cache"), progress=False)


class NumberedImages(ImageSet):
    """Images of one pixel that hold their position, and note who asks for them."""

    def __init__(self, num_images, blocks=None, class_labels=None):
        self.class_labels = np.zeros((num_images, 1), np.uint8) if class_labels is None else class_labels
        self.blocks = blocks
        self.pixel_values = self
        self.shape = (num_images, 1, 1, 1)
        self.asked_for = []

    def __getitem__(self, positions):
        self.asked_for.append((threading.current_thread().name, positions.tolist()))
        return positions.astype(np.uint8).reshape(-1, 1, 1, 1)


def rows_of(loader, steps):
    return [loader.batch(step)["pixel_values"].flatten().tolist() for step in steps]


def test_a_column_of_parquet_files_is_read_by_the_number_of_the_row(folder):
    paths = sorted(folder.iterdir())
    column = ParquetColumn(paths, "labels")
    expected = [labels for path in paths for labels in parquet.read_table(path)["labels"].to_pylist()]
    assert [column[row] for row in range(120)] == expected and len(column) == 120
    assert column.starts.tolist() == [*range(0, 60, 7), *range(60, 120, 7)]
    with pytest.raises(IndexError, match="`row` must lie between 0 and 119, got 120"):
        column[120]


def test_faults_of_parquet_files_name_the_file(folder, tmp_path):
    with pytest.raises(ValueError, match=r"part-0\.parquet` must have the column 'pixels', got image, labels"):
        ParquetColumn(sorted(folder.iterdir()), "pixels")
    (tmp_path / "a.parquet").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"a\.parquet` is not a Parquet file"):
        ParquetColumn([tmp_path / "a.parquet"], "labels")
    with pytest.raises(FileNotFoundError, match=r"b\.parquet` does not exist"):
        ParquetColumn([tmp_path / "b.parquet"], "labels")
    parquet.write_table(pyarrow.table({"labels": pyarrow.array([], pyarrow.string())}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="`paths` must hold rows, got 1 files without any"):
        ParquetColumn([tmp_path / "c.parquet"], "labels")


def test_streamed_images_are_those_of_the_store(streamed, store):
    assert len(streamed) == len(store) == 120 and streamed.resolution == 8 and streamed.vocabulary == store.vocabulary
    assert streamed.file_names == store.file_names and streamed.pixel_values.shape == store.pixel_values.shape
    for positions in (5, slice(50, 70), np.array([100, 3, 3]), np.array([], dtype=np.int64)):
        np.testing.assert_array_equal(streamed.pixel_values[positions], store.pixel_values[positions])
    np.testing.assert_array_equal(streamed.class_labels, store.class_labels)
    for split in ("train", "validation", "held-out", "all"):
        np.testing.assert_array_equal(streamed.indices(split), store.indices(split))
    mean, std = streamed.statistics(streamed.indices("train"))
    np.testing.assert_array_equal(mean, store.statistics(store.indices("train"))[0])
    assert std == store.statistics(store.indices("train"))[1]


def test_a_pass_over_parquet_files_reads_each_row_group_once(folder, tmp_path, monkeypatch):
    reads = Counter()
    read_row_group = parquet.ParquetFile.read_row_group

    def count(self, number, **arguments):
        table = read_row_group(self, number, **arguments)
        reads[table.column(0)[0].as_py()["bytes"]] += 1
        return table

    size = sum(path.stat().st_size for path in folder.iterdir())
    monkeypatch.setattr(parquet_column_module, "_BUFFER_SIZE", size // 6)  # not all at a time
    settings = tmp_path / "set.yaml"
    settings.write_text(f"images: {folder}\nchannels: 3\n")  # otherwise it has to look at the images for them
    streamed = StreamedImages(open_source(settings), 8)
    assert 7 < streamed.blocks.shuffle_size < 60
    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", count)
    loader = BatchLoader(streamed, np.arange(120), 10, seed=0, resident=False)
    for step in range(12):
        loader.batch(step)
    assert len(reads) == 18 and set(reads.values()) == {1}


def test_a_pass_over_blocks_shows_every_image_once_not_far_from_its_block():
    images = NumberedImages(120, Blocks(np.arange(0, 120, 8), shuffle_size=20))
    passes = rows_of(BatchLoader(images, np.arange(120), 120, seed=0, resident=False), range(2))
    assert all(sorted(one) == list(range(120)) for one in passes) and passes[0] != passes[1]
    for one in passes:
        places = np.argsort(one).reshape(15, 8)  # of the images of each block
        assert (np.ptp(places, axis=1) < 20 + 2 * 8).all()
        assert np.ptp(places, axis=1).mean() > 8  # blocks mix
    first_blocks = [one[0] // 8 for one in passes]
    assert first_blocks != [0, 0]


@pytest.mark.parametrize("blocks", [None, Blocks(np.arange(0, 120, 8), 20)])
@pytest.mark.parametrize("repeat_threshold", [None, 0.5])
def test_batches_read_ahead_are_those_read_when_they_are_asked_for(blocks, repeat_threshold):
    class_labels = (np.arange(120) % 10 == 0).astype(np.uint8)[:, None]
    settings = {"seed": 1, "resident": False, "repeat_threshold": repeat_threshold}

    def make(batch_size, **more):
        return BatchLoader(NumberedImages(120, blocks, class_labels), np.arange(120), batch_size, **settings, **more)

    expected = rows_of(make(12), range(30))
    assert rows_of(make(12, num_workers=3), range(30)) == expected
    assert rows_of(make(12, num_workers=2), [7, 8, 3, 29, 0]) == [expected[step] for step in (7, 8, 3, 29, 0)]
    parts = [rows_of(make(4, num_workers=1, num_processes=3, process_index=i), range(30)) for i in range(3)]
    assert [sum(slices, []) for slices in zip(*parts, strict=True)] == expected
    resident = BatchLoader(
        NumberedImages(120, blocks, class_labels), np.arange(120), 12, **{**settings, "resident": True}
    )
    assert rows_of(resident, range(30)) == expected


def test_threads_read_the_batches_that_follow():
    images = NumberedImages(120)
    loader = BatchLoader(images, np.arange(120), 4, seed=0, resident=False, num_workers=1)
    loader.batch(0)
    for future in list(loader._pending.values()):
        future.result(timeout=30)
    assert len(images.asked_for) == 1 + 4
    assert threading.current_thread().name not in {name for name, _ in images.asked_for}


def test_a_fault_in_a_thread_is_raised_where_its_batch_is_asked_for():
    class Broken(NumberedImages):
        def __getitem__(self, positions):
            raise ValueError("`cat.png` is not a readable image")

    loader = BatchLoader(Broken(9), np.arange(9), 3, seed=0, resident=False, num_workers=1)
    with pytest.raises(ValueError, match=r"cat\.png"):
        loader.batch(0)


def test_a_store_is_read_through_once(folder, tmp_path, monkeypatch):
    store = open_store(folder, resolution=8, cache_dir=tmp_path, progress=False)
    record = store.path.with_suffix(".checked")
    assert not record.exists()  # written a moment ago: its time stamp could hide a change
    monkeypatch.setattr(store_module, "_COARSEST_TIME_STAMP", 0)
    assert ImageStore(store.path).sha256 == store.sha256 and record.exists()
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "_hash_names", lambda *_: pytest.fail("read through again"))
        assert ImageStore(store.path).sha256 == store.sha256
    content = bytearray(store.path.read_bytes())
    content[-1] ^= 1
    store.path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        ImageStore(store.path)


@pytest.mark.parametrize("name", ["scenes", "file_names", "class_labels", "pixel_values"])
def test_damage_to_any_part_of_a_store_is_noticed(store, tmp_path, name):
    content = bytearray(store.path.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    content[8 + int.from_bytes(content[:8], "little") + header[name]["data_offsets"][0]] ^= 1
    (tmp_path / "store.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        ImageStore(tmp_path / "store.safetensors")


def test_statistics_of_many_images_are_measured_once(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(image_set_module, "_MANY", 50)
    images = StreamedImages(open_source(folder), 8, tmp_path / "cache")
    indices = np.arange(60)
    mean, std = images.statistics(indices)
    np.testing.assert_array_equal(mean, images._measure(indices)[0])
    others = images._measure(np.arange(55))
    monkeypatch.setattr(ImageSet, "_measure", lambda *_: others)
    again = StreamedImages(open_source(folder), 8, tmp_path / "cache").statistics(indices)
    np.testing.assert_array_equal(again[0], mean)
    assert again[1] == std != others[1] and again[0].dtype == np.float32
    assert images.statistics(np.arange(55))[1] == others[1]  # of other images they are others
    assert images.statistics(np.arange(49)) is others and len(list((tmp_path / "cache").glob("*.npz"))) == 2

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(image_set_module, "FileLock", refuse)  # as in a cache that is read-only
    assert images.statistics(indices)[1] == std and images.statistics(np.arange(51)) is others


def test_writing_into_the_labels_of_a_store_leaves_its_file_as_it_is(store):
    before = store.path.read_bytes()
    torch.from_numpy(ImageStore(store.path).class_labels).fill_(7)
    assert store.path.read_bytes() == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_workers": -1}, "`num_workers` must be at least 0, got -1"),
        ({"repeat_threshold": 0.0}, r"`repeat_threshold` must lie in \(0, 1\].* got 0.0"),
        ({"repeat_threshold": 1.5}, r"`repeat_threshold` must lie in \(0, 1\].* got 1.5"),
    ],
)
def test_settings_that_make_no_batches_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)


def test_a_negative_number_of_threads_is_refused():
    with pytest.raises(ValueError, match="`num_workers` must be at least 0, got -1"):
        BatchLoader(NumberedImages(3), np.arange(3), 1, seed=0, num_workers=-1)


def test_copies_of_parquet_files_are_the_same_set_and_others_are_not(folder, streamed, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile))
    assert StreamedImages(open_source(copy), 8).sha256 == streamed.sha256
    assert StreamedImages(open_source(copy), 16).sha256 != streamed.sha256
    table = parquet.read_table(copy / "part-1.parquet")
    parquet.write_table(table.slice(0, 59), copy / "part-1.parquet", row_group_size=7)
    assert StreamedImages(open_source(copy), 8).sha256 != streamed.sha256


def test_another_column_of_images_is_another_set(folder, tmp_path):
    images = [{"bytes": png(np.full((8, 8, 3), value, dtype=np.uint8)), "path": None} for value in (1, 2)]
    table = pyarrow.table({"image": images, "mask": images[::-1], "labels": [["a"], ["b"]]})
    (tmp_path / "set").mkdir()
    parquet.write_table(table, tmp_path / "set" / "a.parquet")
    (tmp_path / "mask.yaml").write_text("images: set\nimage_column: mask\n")
    first, second = (StreamedImages(open_source(tmp_path / source), 8) for source in ("set", "mask.yaml"))
    assert first.pixel_values[0].max() == 1 and second.pixel_values[0].max() == 2
    assert first.sha256 != second.sha256


def hashes(folder):
    return read_manifest(newest_checkpoint(folder / "checkpoints"))["files"]


def test_a_streamed_run_that_was_stopped_ends_as_an_unbroken_one(folder, tmp_path, monkeypatch):
    from accelerate.state import AcceleratorState

    spec = importlib.util.spec_from_file_location("train_ddpm", SCRIPTS / "train_ddpm.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_ddpm", script)
    spec.loader.exec_module(script)

    def train(name, max_steps, **fields):
        AcceleratorState._reset_state(reset_partial_state=True)
        fields = {**TINY, "data": str(folder), "streaming": True, "repeat_threshold": 0.9, **fields}
        script.main(script.DDPMConfig(output_dir=str(tmp_path / name), max_steps=max_steps, **fields))
        return hashes(tmp_path / name)

    unbroken = train("unbroken", 3)
    train("broken", 1)
    assert train("broken", 3, num_workers=0) == unbroken


@pytest.mark.slow
def test_two_processes_that_stream_end_as_unbroken_ones(folder, tmp_path):
    def train(name, max_steps):
        fields = {**TINY, "data": folder, "streaming": "true", "max_steps": max_steps, "output_dir": tmp_path / name}
        fields["attention_levels"], fields["block_out_channels"] = "", "8 16"
        words = [
            word for key, value in fields.items() for word in (f"--{key}", *str(value).split(" ") * (value != ""))
        ]
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", str(SCRIPTS / "accelerate" / "two_cpu.yaml"), str(SCRIPTS / "train_ddpm.py")]
        done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return hashes(tmp_path / name)

    unbroken = train("unbroken", 4)
    train("broken", 2)
    assert train("broken", 4) == unbroken
