"""The image store, its split and its batches."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from iclevr_diffusion.data import (
    BatchLoader,
    IclevrBuilder,
    IclevrFolder,
    ImageStore,
    normalize,
    open_store,
    scene_of_file,
    split_of_scene,
)
from iclevr_diffusion.labels import LabelVocabulary

NAMES = ["gray cube", "red cube", "blue sphere"]


def write_folder(root: Path, num_scenes: int = 40, size: tuple[int, int] = (16, 16)) -> Path:
    """Writes scenes of zero, one and two objects; every pixel is random, so that no two images are alike."""
    random = np.random.default_rng(0)
    labels = {}
    (root / "iclevr").mkdir(parents=True)
    for scene in range(num_scenes):
        for k in range(3):
            file_name = f"CLEVR_train_{scene:06d}_{k}.png"
            labels[file_name] = [NAMES[(scene + j) % 3] for j in range(k)]
            pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "iclevr" / file_name)
    shuffled = dict(
        sorted(labels.items(), key=lambda entry: hash(entry[0]) % 7)
    )  # the order of the file must not count
    (root / "train.json").write_text(json.dumps(shuffled))
    (root / "objects.json").write_text(json.dumps({name: i for i, name in enumerate(NAMES)}))
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("folder") / "data")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def store(root, cache):
    return open_store(root, resolution=16, cache_dir=cache, progress=False)


@pytest.fixture
def own_root(root, tmp_path):
    return Path(shutil.copytree(root, tmp_path / "own"))


def decode(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).transpose(2, 0, 1)


def test_a_store_holds_the_pixels_and_labels_of_the_files(root, store):
    labels = json.loads((root / "train.json").read_text())
    assert store.file_names == sorted(labels)
    assert store.vocabulary == LabelVocabulary(NAMES)
    assert store.pixel_values.dtype == np.uint8 and isinstance(store.pixel_values, np.memmap)
    assert store.class_labels.shape == (120, 3) and store.class_labels.dtype == np.uint8
    for i, file_name in enumerate(store.file_names):
        np.testing.assert_array_equal(store.pixel_values[i], decode(root / "iclevr" / file_name))
        assert store.vocabulary.decode(store.class_labels[i : i + 1])[0] == sorted(labels[file_name], key=NAMES.index)
    assert store.scenes.tolist() == [scene for scene in range(40) for _ in range(3)]


def test_a_store_is_a_safetensors_file(store):
    tensors = load_file(store.path)
    np.testing.assert_array_equal(tensors["pixel_values"], store.pixel_values)
    np.testing.assert_array_equal(tensors["class_labels"], store.class_labels)


def test_a_store_is_written_once_and_opened_afterwards(root, cache, store):
    before = os.stat(store.path)
    again = open_store(root, resolution=16, cache_dir=cache, progress=False)
    assert (os.stat(again.path).st_ino, os.stat(again.path).st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert again.sha256 == store.sha256


def test_the_same_data_elsewhere_has_the_same_hash(own_root, store, tmp_path):
    copy = open_store(own_root, resolution=16, cache_dir=tmp_path / "cache", progress=False)
    assert copy.sha256 == store.sha256


def change_image(root):
    path = root / "iclevr" / "CLEVR_train_000003_1.png"
    pixels = np.array(Image.open(path))
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(path)


def change_label(root):
    labels = json.loads((root / "train.json").read_text())
    labels["CLEVR_train_000003_1.png"] = ["blue sphere"]
    (root / "train.json").write_text(json.dumps(labels))


def change_vocabulary(root):
    (root / "objects.json").write_text(json.dumps({name: 2 - i for i, name in enumerate(NAMES)}))


@pytest.mark.parametrize("change", [change_image, change_label, change_vocabulary])
def test_changed_sources_make_another_store(own_root, tmp_path, change):
    first = open_store(own_root, resolution=16, cache_dir=tmp_path / "cache", progress=False)
    change(own_root)
    second = open_store(own_root, resolution=16, cache_dir=tmp_path / "cache", progress=False)
    assert first.path != second.path and first.sha256 != second.sha256


def test_another_resolution_makes_another_store_by_a_direct_resize(tmp_path):
    root = write_folder(tmp_path / "wide", num_scenes=1, size=(20, 14))
    stores = [open_store(root, resolution=r, cache_dir=tmp_path / "cache", progress=False) for r in (16, 8)]
    assert [store.resolution for store in stores] == [16, 8]
    for store in stores:
        with Image.open(root / "iclevr" / store.file_names[0]) as image:
            resized = image.resize((store.resolution, store.resolution), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(store.pixel_values[0], np.asarray(resized).transpose(2, 0, 1))


def test_images_with_palette_or_alpha_are_read_as_rgb(tmp_path):
    root = write_folder(tmp_path / "data", num_scenes=1)
    paths = sorted((root / "iclevr").iterdir())
    red = Image.new("RGB", (16, 16), "red")
    red.convert("RGBA").save(paths[0])
    red.convert("P", palette=Image.Palette.ADAPTIVE).save(paths[1])
    store = open_store(root, resolution=16, cache_dir=tmp_path / "cache", progress=False)
    assert (store.pixel_values[:2, 0] == 255).all() and (store.pixel_values[:2, 1:] == 0).all()


@pytest.mark.parametrize("damage", ["flipped bit", "cut", "cut to a stump", "no header"])
def test_a_damaged_store_is_noticed_and_written_again(root, tmp_path, damage, store):
    path = open_store(root, resolution=16, cache_dir=tmp_path, progress=False).path
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    broken = {"flipped bit": content, "cut": content[:-10], "cut to a stump": content[:4], "no header": b"x" * 99}
    path.write_bytes(broken[damage])
    with pytest.raises(ValueError, match="delete it"):
        ImageStore(path)
    with pytest.warns(UserWarning, match="written again"):
        again = open_store(root, resolution=16, cache_dir=tmp_path, progress=False)
    assert again.sha256 == store.sha256


def test_a_store_that_cannot_be_finished_leaves_nothing_behind(own_root, tmp_path):
    (own_root / "iclevr" / "CLEVR_train_000039_2.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"CLEVR_train_000039_2\.png"):
        open_store(own_root, resolution=16, cache_dir=tmp_path / "cache", progress=False)
    assert [path.suffix for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []


def test_images_that_change_while_they_are_read_are_refused(own_root, tmp_path, monkeypatch):
    read_image = IclevrFolder.read_image

    def read_and_change(self, file_name, resolution):
        image = read_image(self, file_name, resolution)
        os.utime(self.image_folder / file_name, ns=(0, 0))
        return image

    monkeypatch.setattr(IclevrFolder, "read_image", read_and_change)
    with pytest.raises(ValueError, match="changed while they were read"):
        open_store(own_root, resolution=16, cache_dir=tmp_path / "cache", progress=False)
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def test_two_processes_open_a_new_store_at_once(root, tmp_path, store):
    context = multiprocessing.get_context("fork")
    barrier, hashes = context.Barrier(2), context.SimpleQueue()

    def open_at_once():
        barrier.wait()
        hashes.put(open_store(root, resolution=16, cache_dir=tmp_path, progress=False).sha256)

    processes = [context.Process(target=open_at_once) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [hashes.get(), hashes.get()] == [store.sha256] * 2
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_a_store_lies_in_the_users_cache_and_never_in_the_data_folder(own_root, tmp_path, monkeypatch):
    files = sorted(own_root.rglob("*"))
    monkeypatch.setenv("ICLEVR_ROOT", str(own_root))
    monkeypatch.delenv("ICLEVR_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert open_store(resolution=16, progress=False).path.parent == tmp_path / "xdg" / "iclevr_diffusion"
    monkeypatch.setenv("ICLEVR_CACHE", str(tmp_path / "own cache"))
    assert open_store(resolution=16, progress=False).path.parent == tmp_path / "own cache"
    assert sorted(own_root.rglob("*")) == files


def test_a_given_vocabulary_replaces_that_of_the_folder(root, tmp_path):
    vocabulary = LabelVocabulary(["blue sphere", "extra", "gray cube", "red cube"])
    store = open_store(root, resolution=16, cache_dir=tmp_path, vocabulary=vocabulary, progress=False)
    assert store.vocabulary == vocabulary and store.class_labels.shape == (120, 4)
    assert store.class_labels[1].tolist() == [0, 0, 1, 0]  # scene 0, its second image: a gray cube


@pytest.mark.parametrize("resolution", [0, -1, 16.0, "16", True])
def test_a_resolution_that_is_no_number_of_pixels_is_refused(root, tmp_path, resolution):
    for opening in (open_store, IclevrBuilder):
        with pytest.raises(ValueError, match="`resolution` must be a number of pixels"):
            opening(root, resolution=resolution, cache_dir=tmp_path)


def test_statistics_are_the_mean_image_and_the_deviation_around_it(store):
    indices = store.indices("train")
    pixel_values = store.pixel_values[indices].astype(np.float64) / 127.5 - 1
    mean, std = store.statistics(indices)
    assert mean.dtype == np.float32 and isinstance(std, float)
    np.testing.assert_allclose(mean, pixel_values.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(std, (pixel_values - pixel_values.mean(axis=0)).std(), rtol=1e-9)
    assert store.statistics(indices[:1])[1] == 0.0
    with pytest.raises(ValueError, match="at least one image"):
        store.statistics(indices[:0])


def test_conditions_are_the_distinct_label_sets(store):
    assert store.conditions(store.indices("all")) == [
        (),
        ("gray cube",),
        ("red cube",),
        ("blue sphere",),
        ("gray cube", "red cube"),
        ("gray cube", "blue sphere"),
        ("red cube", "blue sphere"),
    ]
    assert store.conditions(np.array([1, 4, 10])) == [("gray cube",), ("red cube",)]


def test_the_splits_part_the_images_by_scene(store):
    parts = [store.indices(split) for split in ("train", "validation", "held-out")]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), store.indices("all"))
    scenes = [set(store.scenes[part].tolist()) for part in parts]
    assert not scenes[0] & scenes[1] and not scenes[0] & scenes[2] and not scenes[1] & scenes[2]
    with pytest.raises(ValueError, match=r"`split` must be one of .* or all, got 'test'"):
        store.indices("test")


def test_the_split_of_a_scene_never_changes():
    splits = [split_of_scene(scene) for scene in range(100)]
    assert [scene for scene in range(100) if splits[scene] == "validation"] == [3, 92]
    assert [scene for scene in range(100) if splits[scene] == "held-out"] == [0, 25, 53, 69, 91]
    assert splits.count("train") == 93


def test_the_split_parts_scenes_90_5_5():
    splits = [split_of_scene(scene) for scene in range(20_000)]
    shares = [splits.count(split) / len(splits) for split in ("train", "validation", "held-out")]
    np.testing.assert_allclose(shares, [0.9, 0.05, 0.05], atol=0.007)  # over three standard deviations


def test_the_scene_comes_from_the_file_name():
    assert scene_of_file("CLEVR_train_001234_0.png") == scene_of_file("CLEVR_train_001234_2.png") == 1234
    others = ["photo.png", "photo_1.png", "a/photo.png", "CLEVR_train_1.png", f"CLEVR_train_{'9' * 30}_0.png"]
    scenes = [scene_of_file(name) for name in others]
    assert len(set(scenes)) == len(others) and all(-(2**63) <= scene < 0 for scene in scenes)
    assert scene_of_file("photo.png") == scenes[0]


def batch_rows(store, loader, steps):
    """Returns the positions in the store of the images of the batches, found by their pixels."""
    position = {store.pixel_values[i].tobytes(): i for i in range(len(store))}
    return [[position[image.numpy().tobytes()] for image in loader.batch(step)["pixel_values"]] for step in steps]


def test_a_batch_holds_images_with_their_labels(store):
    batch = BatchLoader(store, store.indices("train"), 8, seed=0).batch(3)
    assert batch["pixel_values"].shape == (8, 3, 16, 16) and batch["pixel_values"].dtype == torch.uint8
    assert batch["class_labels"].shape == (8, 3) and batch["class_labels"].dtype == torch.float32
    (rows,) = batch_rows(store, BatchLoader(store, store.indices("train"), 8, seed=0), [3])
    np.testing.assert_array_equal(batch["class_labels"].numpy(), store.class_labels[rows])


@pytest.mark.parametrize("batch_size", [7, 50])  # neither divides the 10 images; the second spans whole passes
def test_every_pass_shows_every_image_once_in_another_order(store, batch_size):
    indices = np.arange(30, 40)
    rows = batch_rows(store, BatchLoader(store, indices, batch_size, seed=0), range(100 // batch_size + 1))
    stream = [row for batch in rows for row in batch][:100]
    passes = [stream[start : start + 10] for start in range(0, 100, 10)]
    assert all(sorted(one) == indices.tolist() for one in passes)
    assert len({tuple(one) for one in passes}) == 10


def test_a_batch_depends_only_on_the_seed_and_the_step(store):
    indices = store.indices("all")
    forwards = batch_rows(store, BatchLoader(store, indices, 16, seed=5), range(40))
    fresh = BatchLoader(store, indices, 16, seed=5)
    assert batch_rows(store, fresh, reversed(range(40))) == forwards[::-1]
    assert batch_rows(store, BatchLoader(store, indices, 16, seed=6), range(40)) != forwards


def test_the_order_of_the_batches_never_changes(store):
    loader = BatchLoader(store, np.arange(10), 10, seed=1)
    assert batch_rows(store, loader, [0, 1]) == [[3, 5, 2, 9, 7, 0, 8, 6, 1, 4], [0, 6, 5, 3, 4, 9, 7, 8, 2, 1]]


def test_images_on_the_device_and_images_from_the_file_make_the_same_batches(store):
    loaders = [BatchLoader(store, store.indices("train"), 9, seed=2, resident=resident) for resident in (True, False)]
    for step in (0, 5, 100):
        on_device, from_file = (loader.batch(step) for loader in loaders)
        assert torch.equal(on_device["pixel_values"], from_file["pixel_values"])
        assert torch.equal(on_device["class_labels"], from_file["class_labels"])


def test_the_processes_share_the_batch_that_one_process_would_see(store):
    whole = batch_rows(store, BatchLoader(store, store.indices("all"), 12, seed=3), range(15))
    parts = [
        batch_rows(
            store,
            BatchLoader(store, store.indices("all"), 4, seed=3, num_processes=3, process_index=process_index),
            range(15),
        )
        for process_index in range(3)
    ]
    assert [sum(slices, []) for slices in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": np.array([], dtype=np.int64)}, "`indices` must be a non-empty"),
        ({"indices": np.array([0, 120])}, "`indices` must lie between 0 and 119, got 0 to 120"),
        ({"indices": np.array([-1, 3])}, "`indices` must lie between"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"seed": -1}, "`seed` must lie between"),
        ({"process_index": 2, "num_processes": 2}, "`process_index` must lie between 0 and .* 1, got 2"),
    ],
)
def test_a_loader_refuses_what_makes_no_batches(store, change, message):
    arguments = {"indices": np.arange(4), "batch_size": 2, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        BatchLoader(store, **arguments)


def test_a_negative_step_is_refused(store):
    with pytest.raises(ValueError, match="`step` must be at least 0"):
        BatchLoader(store, np.arange(4), 2, seed=0).batch(-1)


def test_normalize_maps_bytes_to_minus_one_to_one():
    pixel_values = torch.arange(256, dtype=torch.uint8)
    normalized = normalize(pixel_values)
    assert normalized.dtype == torch.float32 and normalized[0] == -1 and normalized[255] == 1
    np.testing.assert_allclose(normalized.numpy(), np.arange(256) / 127.5 - 1, atol=1e-7)
    assert pixel_values.dtype == torch.uint8 and pixel_values[255] == 255
    with pytest.raises(ValueError, match=r"must be uint8 in \[0, 255\], got torch.float32"):
        normalize(normalized)


def test_the_real_files_are_what_is_known_of_them(iclevr_root):
    store = open_store(iclevr_root)
    assert store.pixel_values.shape == (18_009, 3, 64, 64) and len(store.vocabulary) == 24
    assert len(set(store.scenes.tolist())) == 6_003 and store.scenes.min() >= 0
    assert np.bincount(store.class_labels.sum(axis=1)).tolist() == [0, 6_003, 6_003, 6_003]
    assert np.bincount([len(labels) for labels in store.conditions(store.indices("all"))]).tolist() == [
        0,
        24,
        276,
        1_888,
    ]
    counts = store.class_labels.sum(axis=0, dtype=np.int64)
    assert (counts.min(), counts.max()) == (1_422, 1_577)
    parts = [store.indices(split) for split in ("train", "validation", "held-out")]
    np.testing.assert_allclose([len(part) / 18_009 for part in parts], [0.9, 0.05, 0.05], atol=0.01)
    scenes = [set(store.scenes[part].tolist()) for part in parts]
    assert sum(map(len, scenes)) == 6_003 == len(set.union(*scenes))
