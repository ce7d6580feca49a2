import json

import numpy as np
import pytest
from PIL import Image

from iclevr_diffusion.images import file_stem, make_grid, make_strip, make_table, save_gif, save_png, to_image


def plain(color, size=(16, 16)):
    return Image.new("RGB", size, color)


def test_a_grid_lays_images_out_in_rows_and_ends_in_white():
    grid = make_grid([plain("red"), plain("lime"), plain("blue")], columns=2, min_width=16)
    cell_width, cell_height = grid.width // 2, grid.height // 2

    def middle(column, row):
        return grid.getpixel((column * cell_width + cell_width // 2, row * cell_height + cell_height // 2))

    assert [middle(0, 0), middle(1, 0), middle(0, 1)] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert middle(1, 1) == (255, 255, 255)


def test_a_grid_has_eight_columns_unless_told_otherwise():
    image = plain("red", (128, 128))
    assert make_grid([image] * 32).width == 2 * make_grid([image] * 32, columns=4).width
    assert make_grid([image] * 3).width < make_grid([image] * 8).width


def test_small_images_are_enlarged_by_a_whole_factor_without_blur():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    grid = np.asarray(make_grid([Image.fromarray(pixels)], min_width=60))
    assert (grid[2:66, 2:66] == pixels.repeat(4, axis=0).repeat(4, axis=1)).all()


def test_a_caption_is_written_below_its_image_only():
    images = [plain("red"), plain("red")]
    with_captions = np.asarray(make_grid(images, ["red cube\nblue sphere", ""]))
    half, below = with_captions.shape[1] // 2, 128 + 2 * 2
    assert (with_captions[below:, :half] < 128).any()
    assert (with_captions[below:, half:] == 255).all()
    assert with_captions.shape[0] > np.asarray(make_grid(images)).shape[0]


def test_a_long_caption_stays_within_its_cell():
    grid = np.asarray(make_grid([plain("red")], ["a large purple cylinder"]))
    caption = grid[128 + 2 * 2 :]
    assert (caption < 128).any()
    assert (caption[:, 0] == 255).all() and (caption[:, -1] == 255).all()


@pytest.mark.parametrize(
    ("images", "captions", "columns", "message"),
    [
        ([], None, 8, "at least one image"),
        ([plain("red"), plain("red", (8, 8))], None, 8, "all of one size"),
        ([plain("red")], ["a", "b"], 8, "got 2 for 1"),
        ([plain("red")], None, 0, "`columns` must be at least 1"),
    ],
)
def test_a_grid_that_cannot_be_laid_out_is_refused(images, captions, columns, message):
    with pytest.raises(ValueError, match=message):
        make_grid(images, captions, columns=columns)


def test_a_table_has_its_captions_at_the_left_and_above_and_nowhere_else():
    rows = [[plain("red"), plain("lime")], [plain("blue"), plain("white")]]
    bare = np.asarray(make_table(rows))
    assert bare.shape == (4 + 2 * 68, 4 + 2 * 68, 3)  # cells of 64 pixels, and margins
    assert [bare[y, x].tolist() for y, x in ((4, 4), (67, 67), (4, 72), (72, 4))] == [
        [255, 0, 0],
        [255, 0, 0],
        [0, 255, 0],
        [0, 0, 255],
    ]
    table = np.asarray(make_table(rows, ["red cube\nblue sphere", ""], ["", "w = 2"]))
    top, left = table.shape[0] - 2 * 68, table.shape[1] - 2 * 68
    assert (table[top:, left:] == bare[4:, 4:]).all()
    assert (table[top : top + 64, :left] < 128).any() and (table[top + 68 :, :left] == 255).all()
    assert (table[:top, left + 68 :] < 128).any() and (table[:top, : left + 64] == 255).all()


@pytest.mark.parametrize(
    ("rows", "captions", "message"),
    [
        ([], {}, "same number of images"),
        ([[plain("red")], [plain("red")] * 2], {}, r"rows of \[1, 2\] images"),
        ([[plain("red"), plain("red", (8, 8))]], {}, r"sizes \[\(8, 8\), \(16, 16\)\]"),
        ([[plain("red")]], {"row_captions": ["a", "b"]}, "`row_captions` must hold 1 captions, one a row, got 2"),
        ([[plain("red")] * 2], {"column_captions": ["a"]}, "`column_captions` must hold 2 captions"),
    ],
)
def test_a_table_that_cannot_be_laid_out_is_refused(rows, captions, message):
    with pytest.raises(ValueError, match=message):
        make_table(rows, **captions)


def test_a_strip_reads_from_left_to_right():
    strip = make_strip([plain("red"), plain("lime"), plain("blue")])
    assert strip.size == (48, 16)
    assert [strip.getpixel((x, 8)) for x in (8, 24, 40)] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_a_strip_of_nothing_is_refused():
    with pytest.raises(ValueError, match="num_states"):
        make_strip([])


def test_a_saved_image_carries_its_metadata_and_keeps_its_pixels(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    save_png(
        image, tmp_path / "new" / "a.png", {"labels": "red cube, grüner Würfel", "seed": 2**62, "guidance_scale": 1.5}
    )
    saved = Image.open(tmp_path / "new" / "a.png")
    assert (np.asarray(saved) == np.asarray(image)).all()
    assert saved.text["labels"] == "red cube, grüner Würfel"
    assert json.loads(saved.text["seed"]) == 2**62
    assert json.loads(saved.text["guidance_scale"]) == 1.5


def test_an_image_that_cannot_be_saved_leaves_the_old_file_as_it_was(tmp_path):
    save_png(plain("red"), tmp_path / "a.png", {})
    with pytest.raises(OSError, match="cannot write mode"):
        save_png(Image.new("F", (16, 16)), tmp_path / "a.png", {})
    assert Image.open(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_a_moving_picture_shows_its_frames_over_and_over(tmp_path):
    save_gif([plain("red"), plain("lime"), plain("blue")], tmp_path / "new" / "a.gif", {"seeds": [1]}, duration=50)
    saved = Image.open(tmp_path / "new" / "a.gif")
    assert (saved.n_frames, saved.info["loop"], saved.info["duration"]) == (3, 0, 50)
    assert json.loads(saved.info["comment"]) == {"seeds": [1]}
    colors = []
    for frame in range(3):
        saved.seek(frame)
        colors.append(saved.convert("RGB").getpixel((0, 0)))
    assert colors == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    with pytest.raises(ValueError, match="`frames` must hold at least one image"):
        save_gif([], tmp_path / "a.gif", {}, duration=50)


def test_a_file_is_named_by_position_and_labels():
    assert file_stem(7, ["red cube", "blue sphere"]) == "0007_red-cube_blue-sphere"
    assert file_stem(12, ["../a/b"]) == "0012_-a-b"
    assert file_stem(3, ["é" * 300]) == "0003_" + "é" * 97  # file systems count bytes
    assert len(file_stem(0, ["cube"] * 100)) <= 200


def test_what_is_transparent_is_white_in_a_grid():
    half = Image.fromarray(np.array([[[255, 0, 0, 255], [255, 0, 0, 0]]], dtype=np.uint8))
    grid = make_grid([half], min_width=2)
    assert grid.mode == "RGB" and grid.getpixel((2, 2)) == (255, 0, 0) and grid.getpixel((3, 2)) == (255, 255, 255)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_pixels_become_an_image_of_as_many_channels(channels, mode):
    pixel_values = np.arange(channels * 6, dtype=np.uint8).reshape(channels, 2, 3)
    image = to_image(pixel_values)
    assert image.mode == mode and image.size == (3, 2)
    np.testing.assert_array_equal(np.asarray(image).reshape(2, 3, channels).transpose(2, 0, 1), pixel_values)
