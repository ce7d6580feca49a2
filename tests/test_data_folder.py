"""What is wrong with a folder of images is refused with the file and the entry named."""

import errno
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from iclevr_diffusion.data import IclevrBuilder, IclevrFolder, open_store

IMAGE = "CLEVR_train_000001_0.png"


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "data"
    (root / "iclevr").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for k in range(2):
        Image.fromarray(pixels).save(root / "iclevr" / f"CLEVR_train_000001_{k}.png")
    Image.fromarray(pixels).save(root / "outside.png")
    write_labels(root, {IMAGE: ["red cube"], "CLEVR_train_000001_1.png": ["red cube", "blue cube"]})
    (root / "objects.json").write_text('{"red cube": 0, "blue cube": 1}')
    return root


def write_labels(root: Path, labels: object) -> None:
    (root / "train.json").write_text(labels if isinstance(labels, str) else json.dumps(labels))


def refusal(root: Path, error: type[Exception] = ValueError) -> str:
    """Returns the message with which both ways to the images refuse the folder."""
    with pytest.raises(error) as store_error:
        open_store(root, resolution=16, cache_dir=root.parent / "cache", progress=False)
    with pytest.raises(error) as builder_error:
        IclevrBuilder(root, resolution=16, cache_dir=root.parent / "arrow").download_and_prepare()
    assert str(builder_error.value) == str(store_error.value)
    return str(store_error.value)


def test_an_unknown_label_is_refused_with_the_nearest_one(root):
    write_labels(root, {IMAGE: ["red cube", "blue cub"]})
    message = refusal(root)
    assert "train.json" in message and IMAGE in message and "'blue cub'" in message and "'blue cube'" in message


def test_an_object_named_twice_is_refused(root):
    write_labels(root, {IMAGE: ["red cube", "red cube"]})
    message = refusal(root)
    assert "train.json" in message and IMAGE in message and "once" in message


def test_a_missing_image_is_refused(root):
    (root / "iclevr" / IMAGE).unlink()
    message = refusal(root, FileNotFoundError)
    assert "train.json" in message and f"iclevr/{IMAGE}" in message


def test_a_folder_in_place_of_an_image_is_refused(root):
    (root / "iclevr" / IMAGE).unlink()
    (root / "iclevr" / IMAGE).mkdir()
    assert IMAGE in refusal(root, FileNotFoundError)


def cut_in_half(content):
    return content[: len(content) // 2]


def cut_the_end(content):
    return content[: content.index(b"IEND") - 6]  # all pixels are there, their checksum is not


def flip_a_bit_of_the_pixels(content):
    middle = content.index(b"IDAT") + 200
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def flip_a_bit_of_the_checksum(content):
    end = content.index(b"IEND") - 5
    return content[:end] + bytes([content[end] ^ 1]) + content[end + 1 :]


def replace_by_rubbish_with_a_valid_checksum(content):
    start, end = content.index(b"IDAT") + 4, content.index(b"IEND") - 8
    rubbish = b"\0" * (end - start)
    return content[:start] + rubbish + zlib.crc32(b"IDAT" + rubbish).to_bytes(4, "big") + content[end + 4 :]


def empty(content):
    return b""


@pytest.mark.parametrize(
    "damage",
    [
        cut_in_half,
        cut_the_end,
        flip_a_bit_of_the_pixels,
        flip_a_bit_of_the_checksum,
        replace_by_rubbish_with_a_valid_checksum,
        empty,
    ],
)
def test_a_broken_image_is_refused(root, damage):
    path = root / "iclevr" / IMAGE
    path.write_bytes(damage(path.read_bytes()))
    message = refusal(root)
    assert "train.json" in message and f"iclevr/{IMAGE}" in message and "not a readable PNG" in message


def test_a_picture_that_is_no_png_is_refused(root):
    Image.new("RGB", (16, 16)).save(root / "iclevr" / IMAGE, format="JPEG")
    assert "not a readable PNG" in refusal(root)


def test_an_image_of_16_bit_grey_is_refused(root):
    Image.fromarray(np.full((16, 16), 40_000, dtype=np.uint16)).save(root / "iclevr" / IMAGE)
    message = refusal(root)
    assert IMAGE in message and "8-bit" in message


@pytest.mark.parametrize(
    "file_name",
    [
        "../outside.png",
        "sub/../../outside.png",
        "{root}/outside.png",
        "..\\outside.png",
        "C:x.png",
        "",
        ".",
        "a\0.png",
    ],
)
def test_a_path_that_leaves_the_image_folder_is_refused(root, file_name):
    file_name = file_name.format(root=root)
    write_labels(root, {IMAGE: ["red cube"], file_name: ["red cube"]})
    message = refusal(root)
    assert "train.json" in message and repr(file_name) in message and "inside" in message


@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_link_out_of_the_image_folder_is_refused(root, place):
    if place == "file":
        os.symlink(root / "outside.png", root / "iclevr" / "link.png")
    else:
        os.symlink(root, root / "iclevr" / "link")
    file_name = "link.png" if place == "file" else "link/outside.png"
    write_labels(root, {file_name: ["red cube"]})
    message = refusal(root)
    assert repr(file_name) in message and "outside of" in message


def test_an_image_in_a_subfolder_or_behind_a_link_inside_is_read(root, tmp_path):
    (root / "iclevr" / "sub").mkdir()
    (root / "outside.png").rename(root / "iclevr" / "sub" / "a.png")
    os.symlink("sub/a.png", root / "iclevr" / "b.png")
    write_labels(root, {"sub/a.png": [], "b.png": ["red cube"]})
    store = open_store(root, resolution=16, cache_dir=tmp_path / "cache", progress=False)
    assert store.file_names == ["b.png", "sub/a.png"]
    assert np.array_equal(store.pixel_values[0], store.pixel_values[1])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([IMAGE], "must be a JSON object that maps image file names to lists of object names, got a list"),
        ("{", "is not valid JSON"),
        (f'{{"{IMAGE}": ["red cube"], "{IMAGE}": []}}', f"the entry '{IMAGE}' occurs twice"),
        ({IMAGE: "red cube"}, f"entry '{IMAGE}': expected a list of object names"),
        ({IMAGE: [0]}, f"entry '{IMAGE}': expected a list of object names"),
        ({IMAGE: None}, f"entry '{IMAGE}': expected a list of object names"),
        ({}, "names no image"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_labels_of_the_wrong_shape_are_refused(root, content, expected):
    write_labels(root, content)
    message = refusal(root)
    assert "train.json" in message and expected in message


def test_labels_that_are_no_text_are_refused(root):
    (root / "train.json").write_bytes(b'{"\xff": []}')
    assert "train.json` is not valid JSON" in refusal(root)


@pytest.mark.parametrize("file_name", ["train.json", "objects.json", "iclevr"])
def test_a_folder_without_one_of_its_parts_is_refused(root, file_name):
    (root / file_name).rename(root / "elsewhere")
    assert file_name in refusal(root, FileNotFoundError)


def test_without_a_folder_the_environment_variable_is_named(monkeypatch):
    monkeypatch.delenv("ICLEVR_ROOT", raising=False)
    with pytest.raises(ValueError, match="ICLEVR_ROOT"):
        IclevrFolder()


def test_a_folder_that_may_not_be_written_is_enough(root, tmp_path):
    for path in [*root.rglob("*"), root]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert len(open_store(root, resolution=16, cache_dir=tmp_path / "cache", progress=False)) == 2
    finally:
        for path in [root, *root.rglob("*")]:
            path.chmod(0o755)


@pytest.mark.parametrize(
    "error",
    [PermissionError("Permission denied"), OSError(errno.ENOSPC, "No space left"), OSError(errno.ENOLCK, "No locks")],
)
def test_a_cache_that_cannot_be_made_is_refused_with_the_way_out(root, tmp_path, monkeypatch, error):
    def refuse(*args, **kwargs):
        raise error

    owner = (FileLock, "acquire") if getattr(error, "errno", None) == errno.ENOLCK else (Path, "mkdir")
    monkeypatch.setattr(*owner, refuse)
    with pytest.raises(PermissionError, match="ICLEVR_CACHE"):
        open_store(root, resolution=16, cache_dir=tmp_path / "cache", progress=False)
