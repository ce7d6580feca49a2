"""The typed `datasets` view and its Parquet export."""

import json

import numpy as np
import pytest
from datasets import ClassLabel, Image, List, Value, load_dataset
from PIL import Image as PILImage

from iclevr_diffusion.data import IclevrBuilder, export_parquet, open_store

NAMES = ["gray cube", "red cube", "blue sphere"]
FEATURES = {
    "image": Image(),
    "labels": List(ClassLabel(names=NAMES)),
    "scene": Value("int64"),
    "file_name": Value("string"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    (root / "iclevr").mkdir()
    random = np.random.default_rng(0)
    labels = {}
    for scene in range(4):  # held-out, train, train, validation
        for k in range(3):
            file_name = f"CLEVR_train_{scene:06d}_{k}.png"
            labels[file_name] = NAMES[::-1][:k]
            PILImage.fromarray(random.integers(0, 256, (14, 20, 3), dtype=np.uint8)).save(root / "iclevr" / file_name)
    (root / "train.json").write_text(json.dumps(labels))
    (root / "objects.json").write_text(json.dumps({name: i for i, name in enumerate(NAMES)}))
    return root


def assert_same_as_the_store(splits, store):
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "validation": 3, "held_out": 3}
    for name, split in splits.items():
        assert split.features == FEATURES
        indices = store.indices(name.replace("_", "-"))
        assert split["file_name"][:] == [store.file_names[i] for i in indices]
        assert split["scene"][:] == store.scenes[indices].tolist()
        for row, i in zip(split, indices, strict=True):
            np.testing.assert_array_equal(np.asarray(row["image"]).transpose(2, 0, 1), store.pixel_values[i])
            assert sorted(row["labels"]) == np.flatnonzero(store.class_labels[i]).tolist()


@pytest.fixture(scope="module")
def store(root, tmp_path_factory):
    return open_store(root, resolution=16, cache_dir=tmp_path_factory.mktemp("cache"), progress=False)


def test_the_builder_gives_typed_splits_with_the_images_of_the_store(root, store, tmp_path):
    builder = IclevrBuilder(root, resolution=16, cache_dir=tmp_path)
    builder.download_and_prepare()
    splits = builder.as_dataset()
    assert_same_as_the_store(splits, store)
    assert splits["train"][2]["labels"] == [2, 1]  # in the order of train.json


def test_the_builder_prepares_with_several_processes(root, store, tmp_path):
    builder = IclevrBuilder(root, resolution=16, cache_dir=tmp_path)
    builder.download_and_prepare(num_proc=2)
    assert_same_as_the_store(builder.as_dataset(), store)


def test_changed_labels_are_noticed_by_the_builder(root, tmp_path):
    folders = []
    content = (root / "train.json").read_text()
    try:
        for text in (content, content.replace("red cube", "gray cube")):
            (root / "train.json").write_text(text)
            folders.append(IclevrBuilder(root, resolution=16, cache_dir=tmp_path).cache_dir)
    finally:
        (root / "train.json").write_text(content)
    assert folders[0] != folders[1]
    assert IclevrBuilder(root, resolution=8, cache_dir=tmp_path).cache_dir not in folders


def test_a_split_without_images_is_left_out(root, tmp_path):
    labels = {"CLEVR_train_000001_0.png": []}
    (tmp_path / "iclevr").symlink_to(root / "iclevr")
    (tmp_path / "train.json").write_text(json.dumps(labels))
    (tmp_path / "objects.json").write_text((root / "objects.json").read_text())
    builder = IclevrBuilder(tmp_path, resolution=16, cache_dir=tmp_path / "cache")
    builder.download_and_prepare()
    assert list(builder.as_dataset()) == ["train"]


def test_exported_parquet_loads_back_with_its_types(root, store, tmp_path):
    files = export_parquet(root, tmp_path / "new" / "export", resolution=16)
    assert set(files) == {"train", "validation", "held_out"}
    loaded = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert_same_as_the_store(loaded, store)
    assert loaded["train"].features["labels"].feature.int2str(loaded["train"][2]["labels"]) == [
        "blue sphere",
        "red cube",
    ]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["export"]


def test_export_refuses_a_folder_that_holds_something(root, tmp_path):
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(ValueError, match="`folder` must be new or empty"):
        export_parquet(root, tmp_path, resolution=16)
    assert (tmp_path / "keep.txt").read_text() == "mine"


def test_a_failed_export_leaves_nothing_behind(root, tmp_path):
    labels = json.loads((root / "train.json").read_text()) | {"missing.png": []}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "iclevr").symlink_to(root / "iclevr")
    (tmp_path / "data" / "train.json").write_text(json.dumps(labels))
    (tmp_path / "data" / "objects.json").write_text((root / "objects.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        export_parquet(tmp_path / "data", tmp_path / "export", resolution=16)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.slow
def test_the_real_files_load_back_from_parquet(iclevr_root, tmp_path):
    files = export_parquet(iclevr_root, tmp_path / "export")
    loaded = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in loaded.items()} == {
        "train": 16_275,
        "validation": 873,
        "held_out": 861,
    }
    store, split = open_store(iclevr_root), loaded["held_out"]
    assert split.features["labels"] == List(ClassLabel(names=list(store.vocabulary.names)))
    for row, i in zip(split, store.indices("held-out"), strict=True):
        np.testing.assert_array_equal(np.asarray(row["image"]).transpose(2, 0, 1), store.pixel_values[i])
