import numpy as np
import pytest
from datasets import load_dataset

from iclevr_diffusion.drawings import Drawings, Unit

UNITS = [Unit("test", 0, 0), Unit("test", 1, 0), Unit("all", 7, 3)]
LABELS = [["red cube"], ["blue sphere", "gray cube"], ["red cube"]]
PIXEL_VALUES = np.random.default_rng(0).integers(0, 256, (3, 3, 5, 4), dtype=np.uint8)


def add(drawings, rows, process_index=0, **record):
    drawings.add(
        [UNITS[row] for row in rows],
        PIXEL_VALUES[rows],
        labels=[LABELS[row] for row in rows],
        seeds=rows,
        record=record,
        process_index=process_index,
    )


def test_images_come_back_to_the_bit_with_their_units_and_record(tmp_path):
    drawings = Drawings(tmp_path / "drawings")
    add(drawings, [0, 2], seconds=1.5)
    add(drawings, [1], process_index=1, seconds=2.5)
    assert drawings.units() == set(UNITS)
    first, second = drawings.batches()
    assert first.units == [UNITS[0], UNITS[2]] and first.record == {"seconds": 1.5}
    np.testing.assert_array_equal(first.pixel_values, PIXEL_VALUES[[0, 2]])
    np.testing.assert_array_equal(second.pixel_values, PIXEL_VALUES[[1]])
    assert list(drawings.records()) == [(first.units, first.record), (second.units, second.record)]


def test_only_wanted_images_are_read(tmp_path):
    drawings = Drawings(tmp_path)
    add(drawings, [0, 1])
    add(drawings, [2])
    (batch,) = drawings.batches(lambda unit: unit.position == 1)
    assert batch.units == [UNITS[1]]
    np.testing.assert_array_equal(batch.pixel_values, PIXEL_VALUES[[1]])


def test_a_folder_that_is_not_there_holds_nothing(tmp_path):
    drawings = Drawings(tmp_path / "drawings")
    assert drawings.units() == set() and list(drawings.batches()) == []
    assert not drawings.folder.exists()


def test_a_batch_never_takes_the_place_of_another(tmp_path):
    drawings = Drawings(tmp_path)
    for row in range(3):
        add(drawings, [row])
    (tmp_path / "process-00000-000000.parquet").unlink()
    add(drawings, [0])
    assert drawings.units() == set(UNITS)


def test_a_batch_that_could_not_be_written_whole_is_not_there(tmp_path, monkeypatch):
    drawings = Drawings(tmp_path)
    add(drawings, [0])
    monkeypatch.setattr("iclevr_diffusion.drawings.os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        add(drawings, [1])
    assert drawings.units() == {UNITS[0]}
    assert len(list(drawings.batches())) == 1


def test_the_files_are_a_data_set_of_images(tmp_path):
    add(Drawings(tmp_path / "drawings"), [0, 1])
    files = str(tmp_path / "drawings" / "*.parquet")
    rows = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert rows[1]["labels"] == LABELS[1] and rows[1]["seed"] == 1
    assert set(rows[0]["image"]) == {"bytes", "path"}


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_transparent_images_keep_their_channels(tmp_path, channels):
    drawings = Drawings(tmp_path)
    pixel_values = np.random.default_rng(1).integers(0, 256, (2, channels, 5, 4), dtype=np.uint8)
    drawings.add(UNITS[:2], pixel_values, labels=LABELS[:2], seeds=[0, 1], record={})
    (batch,) = drawings.batches()
    np.testing.assert_array_equal(batch.pixel_values, pixel_values)
