"""Anyone's labelled images: where they may lie, how their columns are read, and what is refused with file and line."""

import csv
import io
import json
import os
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from iclevr_diffusion.data import LabelledImages, export_parquet, open_source, open_store
from iclevr_diffusion.data.image_file import fit, read_upright
from iclevr_diffusion.data.split import SPLITS, scene_in_splits, split_named, split_of_scene
from iclevr_diffusion.labels import LabelVocabulary
from iclevr_diffusion.training_data import open_images

LABELS = [["red", "big"], ["blue"], [], ["big", "blue"], ["red"], ["blue"]]
NAMES = [f"{i}.{('png', 'jpg', 'webp')[i % 3]}" for i in range(len(LABELS))]


def write_images(folder: Path, names: list[str] = NAMES, size: tuple[int, int] = (12, 8)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for name in names:
        pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def write_lines(folder: Path, rows: list) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def rows_of(cells: list, column: str = "labels", names: list[str] = NAMES) -> list[dict]:
    return [{"file_name": name, column: cell} for name, cell in zip(names, cells, strict=False)]


def png(mode: str = "RGB", size: tuple[int, int] = (8, 8), **options) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG", **options)
    return file.getvalue()


@pytest.fixture
def photos(tmp_path):
    folder = write_images(tmp_path / "photos")
    write_lines(folder, rows_of(LABELS))
    return folder


@pytest.fixture
def parquet(tmp_path):
    """The same images in two Parquet files of row groups of two, as `datasets` writes them."""
    images = write_images(tmp_path / "files")
    (tmp_path / "parquet").mkdir()
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    for part in (0, 1):
        rows = range(3 * part, 3 * part + 3)
        cells = [{"bytes": (images / NAMES[i]).read_bytes(), "path": None} for i in rows]
        table = pa.table({"image": pa.array(cells, kind), "labels": [LABELS[i] for i in rows]})
        pq.write_table(table, tmp_path / "parquet" / f"part-{part}.parquet", row_group_size=2)
    return tmp_path / "parquet"


@pytest.fixture
def open_own(tmp_path):
    return lambda source, resolution=8, **options: open_store(
        source, resolution=resolution, cache_dir=tmp_path / "cache", progress=False, **options
    )


def refusal(source, error: type[Exception] = ValueError) -> str:
    with pytest.raises(error) as refused:
        open_source(source)
    return str(refused.value)


def label_sets(source) -> list[list[str]]:
    return [[source.vocabulary.names[k] for k in np.flatnonzero(row)] for row in source.class_labels]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_each_kind_of_table_gives_the_same_images(photos, open_own, kind):
    first = open_own(photos)
    assert first.vocabulary == LabelVocabulary(["big", "blue", "red"]) and first.file_names[:] == NAMES
    (photos / "metadata.jsonl").unlink()
    if kind == "jsonl":
        rows = [json.dumps(row) for row in rows_of(LABELS)]
        (photos / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(rows).encode())
    elif kind == "csv":
        with open(photos / "metadata.csv", "w", newline="") as file:
            csv.writer(file).writerows([["file_name", "labels"], *zip(NAMES, map(", ".join, LABELS), strict=True)])
    else:
        pq.write_table(pa.table({"file_name": NAMES, "labels": LABELS}), photos / "metadata.parquet")
    second = open_own(photos)
    assert label_sets(second) == [sorted(labels) for labels in LABELS]
    assert second.sha256 == first.sha256


def test_images_are_those_of_the_files(photos, open_own):
    store = open_own(photos)
    for i, name in enumerate(NAMES):
        image = Image.open(photos / name).convert("RGB").resize((8, 8), Image.BILINEAR)
        np.testing.assert_array_equal(store.pixel_values[i], np.asarray(image).transpose(2, 0, 1))


def test_parquet_files_and_a_data_set_opened_by_its_id_give_the_same_images(photos, parquet, open_own):
    expected = open_own(photos)
    for source in (parquet, f"hub:{parquet}", f"hub:{photos}"):
        store = open_own(source)
        np.testing.assert_array_equal(store.pixel_values, expected.pixel_values)
        np.testing.assert_array_equal(store.class_labels, expected.class_labels)
        assert store.vocabulary == expected.vocabulary


def test_an_exported_set_keeps_its_scenes_and_splits(tmp_path, open_own):
    root = tmp_path / "iclevr"
    names = [f"CLEVR_train_{scene:06d}_{k}.png" for scene in range(30) for k in range(2)]
    write_images(root / "iclevr", names, (8, 8))
    (root / "objects.json").write_text('{"red": 0, "big": 1}')
    (root / "train.json").write_text(json.dumps({name: ["red"] for name in names}))
    original = open_own(root)
    export_parquet(root, tmp_path / "exported", resolution=8)
    copy = open_own(tmp_path / "exported")
    order = [list(copy.file_names).index(name) for name in original.file_names]
    np.testing.assert_array_equal(copy.pixel_values[order], original.pixel_values)
    np.testing.assert_array_equal(copy.scenes[order], original.scenes)
    assert copy.vocabulary.names == ("red", "big")  # as numbered, not sorted
    assert all(len(copy.indices(split)) for split in SPLITS)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["red; big", "blue", ""], [["red; big"], ["blue"], []]),
        (["red, big", " blue ", "big"], [["big", "red"], ["blue"], ["big"]]),
        (['["red", "big"]', '["blue"]', "[]"], [["big", "red"], ["blue"], []]),
        ([7, 3, 7], [["7"], ["3"], ["7"]]),
        ([[1, 2], [2], []], [["1", "2"], ["2"], []]),
    ],
)
def test_labels_may_be_lists_text_or_numbers(photos, cells, expected):
    write_lines(photos, rows_of(cells))
    assert label_sets(open_source(photos)) == expected


def test_class_numbers_have_the_names_that_the_set_gives_them(tmp_path):
    names = datasets.ClassLabel(names=["small", "red", "blue"])
    cells = [{"bytes": png(), "path": None}] * 2
    for several, labels, expected in [
        (False, [1, 2], [["red"], ["blue"]]),
        (True, [[1, 0], []], [["small", "red"], []]),
    ]:
        features = datasets.Features({"image": datasets.Image(), "label": datasets.List(names) if several else names})
        folder = tmp_path / str(several)
        folder.mkdir()
        datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features).to_parquet(
            folder / "set.parquet"
        )
        source = open_source(folder)
        assert source.vocabulary.names == ("small", "red", "blue")
        assert label_sets(source) == expected
        assert label_sets(open_source(f"hub:{folder}")) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"file_name": "1.jpg", "labels": ["red"]', "is not valid JSON"),
        ('{"file_name": "1.jpg", "file_name": "2.webp", "labels": []}', "'file_name' occurs twice"),
        ("[]", "expected an object"),
        ('{"labels": ["red"]}', "expected the name of an image file, got None"),
        ('{"file_name": "0.png", "labels": []}', "is named already in `{folder}/metadata.jsonl`, line 1"),
        ('{"file_name": "../1.jpg", "labels": []}', "inside"),
        ('{"file_name": "1.jpg"}', "or [] for an image without, got null"),
        ('{"file_name": "1.jpg", "labels": [" red"]}', "without spaces around them"),
        ('{"file_name": "1.jpg", "labels": [1.5]}', "expected labels"),
        ('{"file_name": "1.jpg", "labels": [true]}', "expected labels"),
        ('{"file_name": "1.jpg", "labels": ["red", "red"]}', "expected each label once"),
        ('{"file_name": "1.jpg", "labels": "red, , big"}', "expected labels"),
        ('{"file_name": "1.jpg", "labels": "[\'red\']"}', "write double quotes"),
    ],
)
def test_a_wrong_line_is_refused_by_its_number(photos, line, expected):
    write_lines(photos, [{"file_name": "0.png", "labels": ["red"]}, line, {"file_name": "2.webp", "labels": ["big"]}])
    message = refusal(photos)
    assert f"`{photos}/metadata.jsonl`, line 2" in message and expected.format(folder=photos) in message


def test_all_wrong_lines_are_named_at_once_the_first_ten_at_length(photos):
    write_lines(photos, rows_of([[""]] * 12, names=[f"{i}.png" for i in range(12)]))
    message = refusal(photos)
    assert [f"line {i}," in message for i in (1, 10, 11)] == [True, True, False] and "and 2 more" in message


def write_csv(folder: Path, content: str) -> None:
    (folder / "metadata.jsonl").unlink(missing_ok=True)
    (folder / "metadata.csv").write_text(content, encoding="utf-8")


def test_faults_of_all_kinds_are_named_at_once_in_the_order_of_the_lines(photos, tmp_path):
    write_csv(
        photos,
        "file_name,labels,split\n0.png,red,train\n1.jpg,grue; red,train\n2.webp,red\n0.png,blue,train\n../3.png,red,train\n"
        '4.jpg,"red,red,",train\n5.webp,"red,red,grue",trian\n3.png,blue,train\n',
    )
    (tmp_path / "labels.json").write_text('["red", "blue"]')
    (tmp_path / "set.yaml").write_text("images: photos\nvocabulary: labels.json\n")
    lines = refusal(tmp_path / "set.yaml").split("\n")
    expected = [
        (3, "Unknown label 'grue; red'"),
        (4, "expected 3 cells"),
        (5, "is named already in"),
        (6, "expected the path of an image inside"),
        (7, "an empty label; remove the last ','."),
        (8, "expected a split"),
        (8, "expected each label once"),
        (8, "Unknown label 'grue'"),
    ]
    assert len(lines) == len(expected)
    for line, (number, fault) in zip(lines, expected, strict=True):
        assert f"metadata.csv`, line {number}" in line and fault in line
    source = open_source(tmp_path / "set.yaml", skip_faults=True)
    assert source.file_names == ["0.png", "3.png"] and label_sets(source) == [["red"], ["blue"]]
    assert source.faults == lines and source.read_image("3.png", 4).size == (4, 4)
    with pytest.raises(ValueError, match="line 3"):
        source.fingerprint(8)


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_cells_may_be_separated_by_what_the_header_tells(photos, delimiter):
    rows = [["file_name", "tags"], ["0.png", "red,big"], ["1.jpg", "blue"]]
    write_csv(photos, "\n".join(map(delimiter.join, rows)))
    source = open_source(photos)
    assert label_sets(source) == [["big", "red"], ["blue"]]
    assert f"cells separated by {delimiter!r}" in source.describe()
    write_csv(photos, "\n".join(map(delimiter.join, [*rows, ["2.webp", "a", "b"]])))
    assert f"got 3; put quotes around a cell that holds {delimiter!r}" in refusal(photos)


def test_an_empty_label_is_called_so_with_the_separator_to_remove(photos, tmp_path):
    (tmp_path / "set.yaml").write_text('images: photos\nlabel_separator: ";"\n')
    write_lines(photos, rows_of(["red; big;", "red;;big", "red", ""]))
    first, second = refusal(tmp_path / "set.yaml").split("\n")
    assert "line 1" in first and "got 'red; big;' with an empty label; remove the last ';'." in first
    assert "line 2" in second and "remove each superfluous ';'." in second


def test_an_unknown_label_made_of_known_ones_tells_their_separator(photos):
    write_lines(photos, rows_of(["red|blue"]))
    with pytest.raises(ValueError, match=r'Unknown label .*label_separator: "\|"'):
        open_source(photos, LabelVocabulary(["red", "blue"]))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("file_name,labels\n0.png,red,big\n", "line 2: expected 2 cells"),
        ("file_name,file_name\n0.png,red\n", "line 1 must name each column, and once"),
        ('file_name,labels\n0.png,"red" x\n', "line 2 is not valid CSV"),
        ("file_name,labels\n", "holds no row"),
        (b"file_name,labels\n0.png,\xff\n", "must be text in UTF-8"),
        ("name,labels\n0.png,red\n", "must have a column `file_name`"),
    ],
)
def test_a_wrong_csv_file_is_refused(photos, content, expected):
    (photos / "metadata.jsonl").unlink()
    (photos / "metadata.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(photos)
    assert f"`{photos}/metadata.csv`" in message and expected in message


def test_two_tables_in_a_folder_are_refused(photos):
    (photos / "metadata.csv").write_text("file_name,labels\n")
    assert "metadata.jsonl and metadata.csv" in refusal(photos)


def test_missing_files_are_named_all_at_once_with_their_lines(photos, open_own):
    for name in (NAMES[1], NAMES[4]):
        (photos / name).unlink()
    with pytest.raises(FileNotFoundError) as refused:
        open_own(photos)
    assert "line 2" in str(refused.value) and "line 5" in str(refused.value)


def test_a_link_that_leaves_the_folder_is_refused(photos, open_own):
    (photos / NAMES[0]).rename(photos.parent / "outside.png")
    os.symlink(photos.parent / "outside.png", photos / NAMES[0])
    with pytest.raises(ValueError, match=r"line 1: .*outside of.*put the table beside the real folder"):
        open_own(photos)


def test_a_broken_image_is_refused_with_its_line(photos, parquet, open_own):
    content = (photos / NAMES[1]).read_bytes()
    (photos / NAMES[1]).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"metadata.jsonl`, line 2, '1.jpg': not a readable PNG, JPEG or WebP"):
        open_own(photos)
    table = pq.read_table(parquet / "part-1.parquet")
    cells = [{"bytes": b"rubbish", "path": None}, *table["image"].to_pylist()[1:]]
    images = pa.array(cells, table.schema.field("image").type)
    pq.write_table(table.set_column(0, "image", images), parquet / "part-1.parquet")
    with pytest.raises(ValueError, match=r"part-1.parquet`, row 1, 'part-1/0000000': not a readable"):
        open_own(parquet)


def test_parquet_without_the_images_inside_is_refused(tmp_path, open_own):
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"image": pa.array([{"bytes": None, "path": "0.png"}], kind), "label": ["red"]})
    pq.write_table(table, tmp_path / "set.parquet")
    with pytest.raises(ValueError, match=r"set.parquet`, row 1: expected the bytes of an image, got none"):
        open_own(tmp_path)


@pytest.mark.parametrize("damage", ["another file", "other columns", "no images"])
def test_parquet_files_that_do_not_fit_are_refused(parquet, damage):
    path = parquet / "part-1.parquet"
    if damage == "another file":
        path.write_bytes(b"rubbish")
    elif damage == "other columns":
        pq.write_table(pq.read_table(path).drop_columns("labels"), path)
    else:
        for part in parquet.iterdir():
            pq.write_table(pq.read_table(part).drop_columns("image"), part)
    expected = {"another file": "readable Parquet", "other columns": "image, labels", "no images": "`image_column`"}
    message = refusal(parquet)
    assert expected[damage] in message and str(path if damage != "no images" else parquet) in message


def test_columns_are_found_or_named_in_a_yaml_file(photos, tmp_path):
    write_lines(photos, [row | {"note": "x", "tags": "red|big"} for row in rows_of(["a b"] * 6, "caption")])
    message = refusal(photos)
    assert "caption, note, tags" in message and "label_column: tags" in message
    (tmp_path / "photos.yaml").write_text("images: photos\nlabel_column: tags\nlabel_separator: '|'\n")
    source = open_source(tmp_path / "photos.yaml")
    assert label_sets(source)[0] == ["big", "red"] and "column `tags` (separated by '|')" in source.describe()
    (tmp_path / "photos.yaml").write_text("images: photos\nlabel_column: tags\nlabel_separator: none\n")
    assert open_source(str(tmp_path / "photos.yaml")).vocabulary.names == ("red|big",)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("label_column: tags", "must hold the key `images`"),
        ("images: photos\nlabel_colum: tags", "Did you mean 'label_column'?"),
        ("images: photos\nchannels: 2", "`channels` must be 1, 3 or 4, got 2"),
        ("images: photos\nchannels: true", "`channels` must be 1, 3 or 4"),
        ("images: photos\ncenter_crop: 1", "`center_crop` must be true or false"),
        ("images: photos\nscene_column: 3", "`scene_column` must be text"),
        ("images: photos\nlabel_column: tags", "`label_column` must name a column of"),
        ("images: photos\nimage_column: picture", "must have a column `picture`"),
        ("images: photos\nconfig: main", "`config` must be left out for a folder"),
        ("images: [", "must be a YAML file"),
    ],
)
def test_wrong_settings_are_refused(photos, tmp_path, content, expected):
    (tmp_path / "photos.yaml").write_text(content)
    assert expected in refusal(tmp_path / "photos.yaml")


def test_what_is_no_set_is_refused_with_what_would_be_one(tmp_path, tiny_dataset):
    (tmp_path / "empty").mkdir()
    assert "metadata.jsonl" in refusal(tmp_path / "empty", FileNotFoundError)
    assert "is not a folder" in refusal(tmp_path / "nowhere", FileNotFoundError)
    assert "does not exist" in refusal(tmp_path / "nowhere.yaml", FileNotFoundError)
    assert "hub:user/name" in refusal(f"hub:{tmp_path / 'nowhere'}", FileNotFoundError)
    assert "needs a connection" in refusal("hub:nobody/nothing@main")
    (tmp_path / "set.yaml").write_text(f"images: {tiny_dataset}\ncenter_crop: true\n")
    assert "i-CLEVR's layout, which has no settings, got center_crop" in refusal(tmp_path / "set.yaml")
    with pytest.raises(FileNotFoundError, match="`data`: .*is not a folder"):
        open_images("data", tmp_path / "nowhere", 8)


def test_a_vocabulary_is_found_sorted_or_given(photos, tmp_path, open_own):
    (tmp_path / "set.yaml").write_text("images: photos\nvocabulary: labels.json\n")
    (tmp_path / "labels.json").write_text('["red", "blue", "big", "green"]')
    assert open_source(tmp_path / "set.yaml").vocabulary.names == ("red", "blue", "big", "green")
    (tmp_path / "labels.json").write_text('{"red": 1, "blue": 0, "big": 2}')
    assert open_source(tmp_path / "set.yaml").vocabulary.names == ("blue", "red", "big")
    (tmp_path / "labels.json").write_text('["red", "blue"]')
    message = refusal(tmp_path / "set.yaml")
    assert "line 1, '0.png': Unknown label 'big'" in message and "line 4" in message
    given = LabelVocabulary(["red", "blue", "big"])
    assert open_own(tmp_path / "set.yaml", vocabulary=given).vocabulary == given
    with pytest.raises(ValueError, match=r"line 1, .*Unknown label 'red'; did you mean 'reds'"):
        open_own(photos, vocabulary=LabelVocabulary(["reds", "blue", "big"]))
    (tmp_path / "labels.json").unlink()
    assert "labels.json" in refusal(tmp_path / "set.yaml", FileNotFoundError)


def test_a_set_without_any_label_is_refused(photos):
    write_lines(photos, rows_of([[]] * 6))
    assert "must have a label in its column `labels`" in refusal(photos)


def test_a_centre_crop_keeps_the_middle_and_has_a_store_of_its_own(tmp_path, open_own):
    folder = tmp_path / "set"
    folder.mkdir()
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, 4:12] = 200
    Image.fromarray(pixels).save(folder / "0.png")
    write_lines(folder, rows_of([["a"]]))
    (tmp_path / "set.yaml").write_text("images: set\ncenter_crop: true\n")
    assert (open_own(tmp_path / "set.yaml").pixel_values == 200).all()
    assert not (open_own(folder).pixel_values == 200).all()


@pytest.mark.parametrize(
    ("modes", "channels"),
    [(["L", "1"], 1), (["RGB", "L"], 3), (["RGBA", "LA"], 4), (["RGBA", "RGB"], 3), (["P"], 3)],
)
def test_channels_are_those_that_all_images_have(tmp_path, modes, channels, open_own):
    folder = tmp_path / "set"
    folder.mkdir()
    for i, mode in enumerate(modes):
        (folder / f"{i}.png").write_bytes(png(mode))
    write_lines(folder, rows_of([["a"]] * len(modes), names=[f"{i}.png" for i in range(len(modes))]))
    assert open_own(folder).pixel_values.shape == (len(modes), channels, 8, 8)
    for wanted in (1, 3, 4):
        (tmp_path / "set.yaml").write_text(f"images: set\nchannels: {wanted}\n")
        assert open_own(tmp_path / "set.yaml").pixel_values.shape[1] == wanted


def test_alpha_is_laid_on_white_or_kept():
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    image.putpixel((0, 0), (200, 0, 0, 255))
    assert fit(image, 4, 3).getpixel((0, 0)) == (200, 0, 0) and fit(image, 4, 3).getpixel((1, 1)) == (255, 255, 255)
    assert fit(image, 4, 1).getpixel((1, 1)) == 255
    assert fit(image, 4, 4).getpixel((1, 1)) == (200, 0, 0, 0)
    assert fit(Image.new("L", (4, 4), 7), 4, 4).getpixel((1, 1)) == (7, 7, 7, 255)


def test_a_transparent_colour_of_a_palette_is_alpha():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 9, 8, 7])
    file = io.BytesIO()
    image.save(file, "PNG", transparency=1)
    assert read_upright(file.getvalue(), "x").mode == "RGBA"


def test_a_photo_is_turned_as_its_exif_data_say():
    pixels = np.zeros((8, 16), dtype=np.uint8)
    pixels[:, :8] = 255  # white at the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right: white at the top
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", exif=exif)
    upright = np.asarray(read_upright(file.getvalue(), "x"))
    assert upright.shape == (16, 8) and upright[:6].min() > 200 and upright[10:].max() < 50


def frames(kind: str) -> bytes:
    file = io.BytesIO()
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    first.save(file, kind, save_all=True, append_images=[second])
    return file.getvalue()


def of_16_bits(colours: bool) -> bytes:
    if not colours:
        file = io.BytesIO()
        Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(file, "PNG")
        return file.getvalue()

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    data = zlib.compress(2 * (b"\0" + bytes(12)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (of_16_bits(False), "expected 8 bits a channel"),
        (of_16_bits(True), "got 16 bits a channel"),
        (frames("PNG"), "an animation of 2"),
        (frames("WEBP"), "an animation of 2"),
        (frames("GIF"), "another format"),
        (b"", "or empty"),
        (png()[:-20], "not a readable"),
    ],
)
def test_an_image_that_cannot_be_taken_as_it_is_is_refused(content, expected):
    with pytest.raises(ValueError, match="photos, line 3: .*" + expected):
        read_upright(content, "photos, line 3")


def test_a_jpeg_for_printers_is_made_rgb():
    file = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(file, "JPEG")
    assert read_upright(file.getvalue(), "x").getpixel((0, 0)) == (255, 255, 255)


def test_a_split_column_decides_and_what_it_leaves_out_comes_from_the_training_images(tmp_path, open_own):
    names = [f"{i}.png" for i in range(300)]
    folder = write_images(tmp_path / "set", names, (2, 2))
    splits = ["test" if i % 3 == 0 else "train" for i in range(300)]
    write_lines(
        folder, [row | {"split": s} for row, s in zip(rows_of([["a"]] * 300, names=names), splits, strict=True)]
    )
    store = open_own(folder, 2)
    assert store.indices("held-out").tolist() == list(range(0, 300, 3))
    assert 2 <= len(store.indices("validation")) <= 25  # 5 % of 200
    assert sum(len(store.indices(split)) for split in SPLITS) == 300


def test_folders_of_splits_are_read_as_such(tmp_path, open_own):
    for split, names in (("train", ["0.png", "1.png"]), ("validation", ["0.png"]), ("test", ["0.png"])):
        write_lines(write_images(tmp_path / "set" / split, names), rows_of([["a"]] * len(names), names=names))
    store = open_own(tmp_path / "set")
    assert {split: [store.file_names[i] for i in store.indices(split)] for split in SPLITS} == {
        "train": ["train/0.png", "train/1.png"],
        "validation": ["validation/0.png"],
        "held-out": ["test/0.png"],
    }


def test_parquet_files_in_folders_of_splits_are_read_as_such(parquet, open_own):
    for part, split in enumerate(("train", "test")):
        (parquet / "default" / split).mkdir(parents=True)
        (parquet / f"part-{part}.parquet").rename(parquet / "default" / split / "0000.parquet")  # as the Hub converts
    store = open_own(parquet)
    assert store.indices("held-out").tolist() == [0, 1, 2] and len(store.file_names) == 6  # `test` comes first
    (parquet / "default" / "test").rename(parquet / "default" / "others")
    assert "splits by chance" in open_source(parquet).describe()


def test_a_set_of_the_hub_opens_no_file_that_it_names_itself(tmp_path):
    (tmp_path / "private.png").write_bytes(png())
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    kind = features.arrow_schema.field("image").type
    cells = pa.array([{"bytes": None, "path": str(tmp_path / "private.png")}], kind)
    (tmp_path / "set").mkdir()
    table = pa.table({"image": cells, "label": ["a"]}).replace_schema_metadata(features.arrow_schema.metadata)
    pq.write_table(table, tmp_path / "set" / "train.parquet")
    source = open_source(f"hub:{tmp_path / 'set'}")
    with pytest.raises(ValueError, match="split train, row 1: expected the bytes of an image, got none"):
        source.read_image(source.file_names[0], 8)


def test_columns_that_nobody_asks_for_may_be_of_any_type(parquet):
    for path in parquet.iterdir():
        table = pq.read_table(path)
        pairs = pa.array([[("k", 1)]] * len(table), pa.map_(pa.string(), pa.int64()))
        pq.write_table(table.append_column("pairs", pairs), path)
    assert label_sets(open_source(parquet)) == [sorted(labels) for labels in LABELS]


def test_a_table_is_read_whatever_lies_beside_it(photos):
    (photos / "train.json").write_text("{}")
    (photos / "iclevr").mkdir()
    assert label_sets(open_source(photos)) == [sorted(labels) for labels in LABELS]


def test_a_name_that_no_file_can_have_is_refused_with_its_line(photos):
    write_lines(photos, rows_of(LABELS, names=["\ud800.png", *NAMES[1:]]))
    assert "line 1" in refusal(photos)


def test_blank_lines_before_the_header_are_skipped(photos):
    (photos / "metadata.jsonl").unlink()
    (photos / "metadata.csv").write_text(f"\n\nfile_name,labels\n{NAMES[0]},red\n")
    assert label_sets(open_source(photos)) == [["red"]]
    (photos / "metadata.csv").write_text("\nfile_name,file_name\n")
    assert "metadata.csv`, line 2 must name each column" in refusal(photos)


def test_a_scene_has_the_same_number_in_every_kind_of_table(photos):
    rows = zip(rows_of(LABELS), [7, "007", -3, "a"], strict=False)
    write_lines(photos, [row | {"scene": cell} for row, cell in rows])
    first = open_source(photos).scenes
    (photos / "metadata.jsonl").unlink()
    lines = [f"{name},a,{cell}\n" for name, cell in zip(NAMES, ["7", "007", "-3", "a"], strict=False)]
    (photos / "metadata.csv").write_text("".join(["file_name,labels,scene\n", *lines]))
    assert open_source(photos).scenes.tolist() == first.tolist() and first[0] == 7 != first[1] and first[2] == -3


def test_files_of_one_name_but_for_the_suffix_can_be_told_apart(photos):
    rows = [row | {"split": split} for row, split in zip(rows_of([["a"]] * 2), ("train", "test"), strict=False)]
    rows[1]["file_name"] = NAMES[0].replace("png", "jpg")
    write_lines(photos, rows)
    assert "line 2" in (message := refusal(photos)) and "a column `scene` with another value for each" in message
    write_lines(photos, [row | {"scene": i} for i, row in enumerate(rows)])
    assert len(set(open_source(photos).scenes.tolist())) == 2


def test_images_of_one_scene_stay_together(tmp_path):
    names = [f"{i}.png" for i in range(60)]
    folder = write_images(tmp_path / "set", names, (2, 2))
    rows = [row | {"scene": f"s{i // 3}"} for i, row in enumerate(rows_of([["a"]] * 60, names=names))]
    write_lines(folder, rows)
    source = open_source(folder)
    scenes = source.scenes.reshape(20, 3)
    assert (scenes == scenes[:, :1]).all() and len(set(scenes[:, 0].tolist())) == 20
    assert "images of one `scene` kept together" in source.describe()
    rows[1]["split"], rows[0]["split"] = "test", "train"
    write_lines(folder, [{"split": "train"} | row for row in rows])
    assert "line 2, '1.png': expected the split of its scene, which in `" in refusal(folder)
    write_lines(folder, [row | {"split": "trian"} for row in rows])
    assert "line 1, '0.png': expected a split, train, validation or held-out (or test), got 'trian'" in refusal(folder)
    write_lines(folder, [{key: row[key] for key in ("file_name", "labels")} | {"scene": None} for row in rows])
    assert "expected the scene's name or number, got None" in refusal(folder)


def test_a_scene_keeps_its_number_where_it_may():
    assert [scene_in_splits(scene, {split_of_scene(scene)}) for scene in range(50)] == list(range(50))
    for split in SPLITS:
        assert all(split_of_scene(scene_in_splits(scene, {split})) == split for scene in range(50))


def test_splits_are_known_by_the_names_that_others_give_them():
    names = ["train-00000-of-00002", "Training", "val", "dev", "test", "held_out", "held-out-1", "trainable", "0"]
    expected = ["train", "train", "validation", "validation", "held-out", "held-out", "held-out", None, None]
    assert [split_named(name) for name in names] == expected


def test_a_changed_label_scene_or_file_has_a_store_of_its_own(photos):
    first = open_source(photos).fingerprint(8)
    assert open_source(photos).fingerprint(8) == first != open_source(photos).fingerprint(9)
    os.utime(photos / NAMES[0], ns=(1, 1))
    second = open_source(photos).fingerprint(8)
    write_lines(photos, [row | {"scene": 1} for row in rows_of(LABELS)])
    third = open_source(photos).fingerprint(8)
    write_lines(photos, rows_of([*LABELS[:5], ["red"]]))
    assert len({first, second, third, open_source(photos).fingerprint(8)}) == 4


def test_a_new_store_says_how_the_set_was_read(photos, tmp_path, capsys):
    open_store(photos, resolution=8, cache_dir=tmp_path / "cache")
    printed = capsys.readouterr().err
    assert "6 images; labels in the column `labels` (lists); 3 labels, those found, sorted" in printed
    assert "resized directly; 3 channels (6 RGB)" in printed
    assert isinstance(open_source(photos), LabelledImages)
