"""What `iclevr-inspect` counts in a set of images, and when it ends with status 1."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iclevr_diffusion.data import SPLITS, open_source
from iclevr_diffusion.inspect_data import main
from iclevr_diffusion.inspection import _near_pairs, format_inspection, inspect_images, make_sheet


def write_set(folder: Path, rows: list[dict], size: tuple[int, int] = (16, 16)) -> Path:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for row in rows:
        pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def photos(tmp_path):
    """Twelve images: two for validation, two held out; `a` in nine, `b` in four, nothing in one."""
    label_sets = [["a"]] * 7 + [["b"]] * 2 + [["a", "b"]] * 2 + [[]]
    splits = ["train"] * 5 + ["validation"] + ["test"] + ["train"] * 3 + ["validation", "test"]
    rows = [
        {"file_name": f"{i}.png", "labels": labels, "split": split}
        for i, (labels, split) in enumerate(zip(label_sets, splits, strict=True))
    ]
    return write_set(tmp_path / "photos", rows)


def inspect(folder: Path | str, resolution: int = 16) -> dict:
    return inspect_images(open_source(folder), resolution=resolution, progress=False)


def test_labels_and_combinations_are_counted_by_split(photos):
    found = inspect(photos)
    assert found["num_images"] == 12 and found["splits"] == {"train": 8, "validation": 2, "held-out": 2}
    assert found["labels"] == {
        "a": {"all": 9, "train": 6, "validation": 2, "held-out": 1},
        "b": {"all": 4, "train": 3, "validation": 1, "held-out": 0},
    }
    assert [(c["labels"], c["images"]) for c in found["combinations"]] == [
        (["a"], 7),
        (["b"], 2),
        (["a", "b"], 2),
        ([], 1),
    ]
    assert found["labels_per_image"] == {"0": 1, "1": 9, "2": 2} and found["imbalance"] == 9 / 4
    assert found["unlabelled"] == ["11.png"] and found["rare_labels"] == ["a", "b"] and found["refusals"] == []
    assert found["sizes"] == {"16x16": 12} and found["formats"] == {"PNG RGB": 12}
    assert json.loads(json.dumps(found)) == found
    report = format_inspection(found)
    assert "12 images: 8 train, 2 validation, 2 held-out" in report and "2.2 times" in report


def test_it_goes_on_after_broken_images_and_names_them_all(photos, capsys):
    (photos / "1.png").write_bytes(b"rubbish")
    (photos / "4.png").unlink()
    content = (photos / "7.png").read_bytes()
    (photos / "7.png").write_bytes(content[:-30])
    found = inspect(photos)
    assert len(found["broken"]) == 3 and sum(found["sizes"].values()) == 9
    for message, line in zip(found["broken"], (2, 5, 8), strict=True):
        assert f"`{photos}/metadata.jsonl`, line {line}" in message
    with pytest.raises(SystemExit) as end:
        main([str(photos), "--out", str(photos.parent / "out")])
    assert end.value.code == 1
    assert "Images that cannot be read: 3" in capsys.readouterr().out
    assert (photos.parent / "out" / "sheet.png").is_file()


def test_equal_images_are_found_whatever_their_files_are_and_where_they_leak(photos):
    with Image.open(photos / "0.png") as image:
        image.convert("RGBA").save(photos / "1.png", compress_level=0)  # both of training
        image.save(photos / "5.webp", lossless=True)  # of validation
    lines = (photos / "metadata.jsonl").read_text().replace("5.png", "5.webp")
    (photos / "metadata.jsonl").write_text(lines)
    (photos / "5.png").unlink()
    with Image.open(photos / "2.png") as image:
        image.point([min(255, value + value % 2) for value in range(256)] * 3).save(photos / "3.png")
    found = inspect(photos)
    assert found["duplicates"] == [["0.png", "1.png", "5.webp"]] == found["duplicates_across_splits"]
    assert found["near_duplicates"] == [["2.png", "3.png"]]
    assert any("lie in several splits: 1." in warning for warning in found["warnings"])


def test_near_duplicates_differ_by_less_than_a_value_on_average(photos):
    for i, value in enumerate((100, 102, 104)):  # of one colour each
        Image.new("L", (16, 16), value).save(photos / f"{i}.png")
    pixels = np.full((16, 16), 100, dtype=np.uint8)
    pixels[0, :4] = 107  # sqrt(4 * 49 / 256) = 0.875
    Image.fromarray(pixels).save(photos / "3.png")
    assert inspect(photos)["near_duplicates"] == [["0.png", "3.png"]]


def test_where_all_images_are_nearly_the_same_each_is_named_once(photos):
    assert _near_pairs([]) == []
    thumbnails = np.random.default_rng(0).integers(100, 102, (1200, 768), dtype=np.uint8)
    assert _near_pairs(list(thumbnails)) == [(0, i) for i in range(1, 1200)]
    thumbnails[0], thumbnails[700:] = 0, thumbnails[700:] + 50
    assert _near_pairs(list(thumbnails)) == [(1, i) for i in range(2, 700)] + [(700, i) for i in range(701, 1200)]


def test_a_large_set_is_not_compared_each_with_each(photos, monkeypatch):
    monkeypatch.setattr("iclevr_diffusion.inspection.MAX_COMPARED", 11)
    assert any("Near duplicates were not looked for" in warning for warning in inspect(photos)["warnings"])


def test_it_warns_of_what_nobody_meant(tmp_path):
    names = ["Cat", "cat", "red, round", "salt AND pepper"]
    rows = [{"file_name": f"{i}.png", "labels": [names[i % 4]], "split": "train"} for i in range(8)]
    folder = write_set(tmp_path / "set", rows)
    Image.new("RGB", (4, 4)).save(folder / "forgotten.jpg")
    warnings = "\n".join(inspect(folder)["warnings"])
    assert "'Cat', 'cat'" in warnings and "'red, round', 'salt AND pepper'" in warnings
    assert "Image files that no row names: 1 (forgotten.jpg)" in warnings
    assert "fewer than 20 training images: Cat, cat" in warnings


def test_wrong_rows_are_listed_beside_broken_images(photos, capsys):
    lines = (photos / "metadata.jsonl").read_text().split("\n")
    rows = [{"file_name": "0.png", "labels": ["b"], "split": "train"}, {"file_name": "1.png", "split": "train"}]
    (photos / "metadata.jsonl").write_text("\n".join([*lines, *map(json.dumps, rows)]))
    (photos / "3.png").write_bytes(b"rubbish")
    with pytest.raises(SystemExit) as end:
        main([str(photos)])
    assert end.value.code == 1
    printed = capsys.readouterr().out
    refusals = printed[printed.index("Refusals:") :]
    assert (
        "Faults of rows, which are left out of all the counts here: 3" in refusals and "cannot be read: 1" in refusals
    )
    for fault in ("line 13: `0.png` is named already", "line 14: `1.png`", "line 14, '1.png': expected labels"):
        assert fault in refusals
    assert "12 images: " in printed and "Nothing here" not in printed


def test_where_no_image_can_be_read_the_report_is_short_and_true(tmp_path, capsys):
    rows = [{"file_name": f"images/{i}.png", "labels": ["ab"[i % 2]]} for i in range(40)]
    real = tmp_path / "elsewhere" / "images"
    real.mkdir(parents=True)
    write_set(tmp_path / "set", [])
    for row in rows:
        Image.new("RGB", (4, 4)).save(real.parent / row["file_name"])
    (tmp_path / "set" / "images").symlink_to(real)
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SystemExit):
        main([str(tmp_path / "set"), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert printed.count("links to a place outside") == 10 and "and 30 more, in inspection.json" in printed
    for untrue in ("Sizes:", "Files:", "channel"):
        assert untrue not in printed
    assert len(json.loads((tmp_path / "out" / "inspection.json").read_text())["broken"]) == 40


def test_ten_faults_of_each_kind_are_shown(photos):
    for i in range(12):
        (photos / f"{i}.png").write_bytes(b"rubbish")
    (photos / "11.png").unlink()
    report = format_inspection(inspect(photos))
    assert report.count("not a readable") == 10 and "and 1 more, in" in report and "there is no file" in report


@pytest.mark.parametrize(
    ("cells", "separator", "expected"),
    [
        (["red;blue", "red", "blue"], None, ";"),
        (["red|blue", "red| big", "big |blue"], None, "|"),
        (["red/blue", "red", "blue"], None, "/"),
        (["red,blue", "red", "blue"], ";", ","),
        (["red,blue", "and/or", "blue; x"], None, None),
        ([["red;blue"], ["red"], ["blue"]], None, None),
    ],
)
def test_labels_made_of_others_tell_what_separates_them(tmp_path, cells, separator, expected):
    write_set(tmp_path / "set", [{"file_name": f"{i}.png", "labels": cell} for i, cell in enumerate(cells)])
    settings = "images: set\n" + ("" if separator is None else f"label_separator: '{separator}'\n")
    (tmp_path / "set.yaml").write_text(settings)
    warnings = "\n".join(inspect(tmp_path / "set.yaml")["warnings"])
    assert ("did you mean label_separator" in warnings) == (expected is not None)
    assert expected is None or f'did you mean label_separator: "{expected}"?' in warnings


def test_an_image_without_labels_is_named_with_its_line(photos):
    warnings = inspect(photos)["warnings"]
    assert any(f"without a label: 1\n  `{photos}/metadata.jsonl`, line 12, '11.png'" in line for line in warnings)


def test_it_warns_of_labels_that_a_split_lacks_and_of_captions(photos):
    warnings = "\n".join(inspect(photos)["warnings"])
    assert "Labels without a held-out image, on which a judge cannot be tested: b." in warnings
    assert "Labels without a validation image" not in warnings and "occur once" not in warnings
    rows = [{"file_name": f"{i}.png", "labels": f"a photo of thing {i}"} for i in range(12)]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    warnings = "\n".join(inspect(photos)["warnings"])
    assert "Labels that occur once: 12 of 12 ('a photo of thing 0', " in warnings and "`label_column`" in warnings


def test_a_set_without_a_training_image_is_refused(tmp_path, capsys):
    folder = write_set(tmp_path / "set", [{"file_name": "0.png", "labels": ["a"], "split": "test"}])
    with pytest.raises(SystemExit) as end:
        main([str(folder)])
    assert end.value.code == 1 and "There is no training image" in capsys.readouterr().out


def test_the_command_writes_what_it_found_and_a_sheet(photos, tmp_path, capsys):
    main([str(photos), "--resolution", "16", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "labels in the column `labels` (lists)" in printed and "Nothing here keeps a training" in printed
    assert json.loads((tmp_path / "out" / "inspection.json").read_text()) == inspect(photos)
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.width == 8 * (128 + 4)  # twelve images in two rows of eight


def test_a_sheet_shows_every_label_in_turn(photos):
    source = open_source(photos)
    found = inspect(photos)
    one, two = (make_sheet(source, found, num_images=n) for n in (1, 2))
    for sheet, names in ((one, ["7.png"]), (two, ["7.png", "0.png"])):  # the first of `b`, the rarer, then of `a`
        for k, name in enumerate(names):
            with Image.open(photos / name) as image:
                enlarged = np.asarray(image.resize((128, 128), Image.Resampling.NEAREST))
            np.testing.assert_array_equal(np.asarray(sheet)[2:130, 132 * k + 2 : 132 * k + 130], enlarged)


def test_a_folder_in_the_layout_of_the_course_is_inspected_too(tiny_dataset, capsys):
    main([str(tiny_dataset), "--resolution", "16"])
    counts = json.loads((tiny_dataset / "train.json").read_text())
    assert f"{len(counts)} images: " in capsys.readouterr().out
    found = inspect(tiny_dataset)
    assert sum(found["splits"][split] for split in SPLITS) == len(counts) and found["formats"] == {
        "PNG RGB": len(counts)
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["nowhere"], "is not a folder"), (["photos", "--resolution", "0"], "`resolution` must be a number of pixels")],
)
def test_what_cannot_be_inspected_ends_it_with_the_reason(photos, monkeypatch, arguments, expected):
    monkeypatch.chdir(photos.parent)
    with pytest.raises(SystemExit, match=f"iclevr-inspect: .*{expected}"):
        main(arguments)


def test_labels_that_the_terminal_cannot_show_are_written_as_escapes(photos, tmp_path):
    (photos / "metadata.jsonl").write_text(
        "".join(
            json.dumps({"file_name": path.name, "labels": ["\u732b"]}) + "\n" for path in sorted(photos.glob("*.png"))
        ),
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "iclevr_diffusion.inspect_data", str(photos), "--out", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert b"\\u732b" in done.stdout and b"codec" not in done.stderr
    assert "\u732b" in (tmp_path / "out" / "inspection.json").read_text(encoding="utf-8")
