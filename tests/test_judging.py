import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from iclevr_diffusion import judging, loading
from iclevr_diffusion.data import normalize, open_store
from iclevr_diffusion.judging import (
    calibration_error,
    check_judge_labels,
    choose_threshold,
    draw_readings,
    load_judge,
    read_images,
    weights_sha256,
)
from iclevr_diffusion.labels import ICLEVR_LABELS
from iclevr_diffusion.models.classifier import LabelClassifier
from iclevr_diffusion.models.classifier_small import SmallLabelClassifier

REPOSITORY = Path(__file__).resolve().parents[1]


def make_judge(names=ICLEVR_LABELS.names, image_size=16, seed=0, **arguments):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        arguments = {"label_names": list(names), "block_out_channels": (8, 12)} | arguments
        judge = SmallLabelClassifier(len(names), image_size, **arguments).eval()
        judge.classifier.weight.data *= 100  # so that different images get different answers
        return judge


def make_resnet():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"embedding_size": 8, "hidden_sizes": (8, 12), "depths": (1, 1), "input_scale": 2}
        return LabelClassifier(24, 16, label_names=list(ICLEVR_LABELS.names), **sizes).eval()


def make_images(num_images, size=16):
    return np.random.default_rng(0).integers(0, 256, (num_images, 3, size, size), dtype=np.uint8)


# Opening


@pytest.mark.parametrize("judge", [make_judge(), make_resnet()], ids=["small", "resnet"])
def test_a_saved_judge_is_loaded_as_its_own_class_in_eval_mode(judge, tmp_path):
    judge.save_pretrained(tmp_path)
    loaded = load_judge(tmp_path, ICLEVR_LABELS.names)
    assert type(loaded) is type(judge) and not loaded.training
    assert weights_sha256(loaded) == weights_sha256(judge)


def test_a_folder_without_a_judge_is_refused(tmp_path, tiny_unet):
    with pytest.raises(ValueError, match="there is no folder .*nothing"):
        load_judge(tmp_path / "nothing")
    with pytest.raises(ValueError, match="must be a judge's folder with a config.json, and there is none"):
        load_judge(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json must hold a JSON object, got list"):
        load_judge(tmp_path)
    tiny_unet.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="asks for the class 'MultiLabelUNet2DModel'; this package builds Label"):
        load_judge(tmp_path)


def test_a_judge_that_comes_along_is_opened_by_its_name(tmp_path, monkeypatch):
    make_judge().save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "shipped_folder", {"shipped": tmp_path}.__getitem__)
    assert weights_sha256(load_judge("shipped")) == weights_sha256(make_judge())


def test_the_courses_checkpoint_is_opened_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "convert_evaluator_checkpoint", {tmp_path / "a.pth": make_judge()}.__getitem__)
    assert isinstance(load_judge(tmp_path / "a.pth", ICLEVR_LABELS.names), SmallLabelClassifier)


def test_a_judge_whose_weights_are_not_those_of_its_configuration_is_refused(tmp_path):
    make_judge().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({name: value for name, value in weights.items() if name != "classifier.bias"}, file)
    with pytest.raises(ValueError, match=r"1 tensors are missing or too many: classifier\.bias"):
        load_judge(tmp_path)
    save_file(weights | {"second_head": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="1 tensors are missing or too many: second_head"):
        load_judge(tmp_path)


def test_labels_that_are_not_known_are_not_compared():
    with pytest.raises(ValueError, match="The judge does not say which labels it judges"):
        check_judge_labels(SmallLabelClassifier(24, 16, block_out_channels=(8, 8)), ICLEVR_LABELS.names)
    with pytest.raises(ValueError, match="`label_names` must be the names that the judge must know"):
        check_judge_labels(make_judge(), None)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (ICLEVR_LABELS.names[::-1], "in another order"),
        (
            ("a", *ICLEVR_LABELS.names[1:]),
            r"knows 24 labels, 23 of the pipeline's 24 \(gray cube is missing\)\. Train one",
        ),
        (
            "ab",
            r"2 labels, none of the pipeline's 24 \(gray cube, .*, .*, .*, \.\.\. are missing\).* give FOLDER/judge",
        ),
    ],
)
def test_a_judge_of_other_labels_is_refused(names, message, tmp_path):
    make_judge(list(names)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_judge(tmp_path, ICLEVR_LABELS.names)


def test_the_hash_of_weights_changes_with_any_of_them():
    judge = make_judge()
    before = weights_sha256(judge)
    assert weights_sha256(make_judge()) == before
    judge.stem[1].running_mean[0] += 1e-6
    assert weights_sha256(judge) != before


@pytest.mark.parametrize("make", [make_judge, make_resnet])
def test_a_threshold_is_kept_with_the_judge_and_older_judges_have_zero(make, tmp_path):
    judge = make()
    judge.register_to_config(threshold=-0.25)
    judge.save_pretrained(tmp_path)
    assert load_judge(tmp_path).config.threshold == -0.25
    config = json.loads((tmp_path / "config.json").read_text())
    del config["threshold"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_judge(tmp_path).config.threshold == 0.0


# Reading


@pytest.mark.parametrize("make", [make_judge, make_resnet])
def test_a_reading_holds_what_the_judge_says_of_each_image(make):
    judge, pixel_values = make().train(), make_images(5)
    reading = read_images(judge, pixel_values, batch_size=2)
    assert not judge.training
    with torch.no_grad():
        images = normalize(torch.from_numpy(pixel_values))
        assert_close(reading.logits, judge(images).logits, atol=1e-4, rtol=1e-4)
        assert_close(reading.features, judge.extract_features(images), atol=1e-5, rtol=1e-4)
    assert reading.logits.dtype == reading.features.dtype == torch.float32
    assert_close(judge.classifier(reading.features), reading.logits, atol=1e-4, rtol=1e-4)


def test_an_image_is_read_alike_to_the_bit_whatever_it_is_read_with():
    judge, pixel_values = make_judge(), make_images(11)
    whole = read_images(judge, pixel_values, batch_size=4)
    alone = [read_images(judge, pixel_values[row : row + 1], batch_size=4) for row in range(11)]
    assert torch.equal(torch.cat([reading.logits for reading in alone]), whole.logits)
    assert torch.equal(torch.cat([reading.features for reading in alone]), whole.features)


def test_images_are_read_from_a_file_that_is_mapped(tmp_path):
    pixel_values = make_images(3)
    np.save(tmp_path / "images.npy", pixel_values)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    assert torch.equal(read_images(make_judge(), mapped).logits, read_images(make_judge(), pixel_values).logits)


def test_no_image_gives_an_empty_reading():
    reading = read_images(make_judge(), make_images(0))
    assert (reading.logits.shape, reading.features.shape) == ((0, 24), (0, 24))


def test_what_was_read_can_be_trained_on():
    features = read_images(make_judge(), make_images(2)).features
    assert torch.nn.Linear(24, 1)(features).sum().requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"pixel_values": make_images(2, size=8)}, r"must have shape \(batch, 3, 16, 16\), got \(4, 3, 8, 8\)"),
        ({"pixel_values": make_images(2).astype(np.float32)}, "must be uint8 in .*, got torch.float32"),
    ],
)
def test_images_that_a_judge_cannot_read_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        read_images(make_judge(), **({"pixel_values": make_images(2), "batch_size": 4} | change))


# Thresholds and calibration


def test_the_threshold_is_the_middle_of_those_of_most_exact_matches():
    # Exactly right between its highest absent and its lowest present label: [-2, 1), [-1, 3) and [0.5, 4).
    logits = torch.tensor([[1.0, -2], [3, -1], [4, 0.5]])
    class_labels = torch.tensor([[1, 0], [1, 0], [1, 0]])
    # All three at 0.50 to 0.99, as a logit must be above the threshold.
    assert choose_threshold(logits, class_labels) == pytest.approx((0.50 + 0.99) / 2)


@pytest.mark.parametrize(
    ("rows", "threshold"),
    [
        # Where ranges are equally good, the longest: -1.00 to -0.51 against 1.00 to 2.99.
        ([(-1, -0.5), (1, 3)], (1.00 + 2.99) / 2),
        # Of one length, the one nearest 0: -3.00 to -2.01 against 1.00 to 1.99.
        ([(-3, -2), (1, 2)], (1.00 + 1.99) / 2),
    ],
)
def test_of_equally_good_thresholds_the_longest_row_nearest_zero_is_taken(rows, threshold):
    logits = torch.tensor([[high, low] for low, high in rows])
    class_labels = torch.tensor([[1, 0] for _ in rows])
    assert choose_threshold(logits, class_labels) == pytest.approx(threshold)


def test_a_threshold_is_finite_where_no_image_bounds_it():
    assert choose_threshold(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)) == pytest.approx((2.00 + 5.00) / 2)
    wrong_order = torch.tensor([[-1.0, 1.0]])  # no threshold reads it rightly
    assert choose_threshold(wrong_order, torch.tensor([[1, 0]])) == 0.0


def test_a_threshold_needs_images_and_one_label_a_logit():
    with pytest.raises(ValueError, match="`logits` must be of at least one image, got none; keep the threshold 0"):
        choose_threshold(torch.empty(0, 24), torch.empty(0, 24))
    with pytest.raises(ValueError, match=r"got \(2, 24\) and \(2, 23\)"):
        choose_threshold(torch.zeros(2, 24), torch.zeros(2, 23))


def test_the_calibration_error_is_the_mean_gap_of_the_bins():
    probabilities = torch.tensor([[0.1, 0.2], [0.6, 0.9]])
    class_labels = torch.tensor([[0, 1], [1, 0]])
    # Two bins: |1/2 - 0.15| of the lower two and |1/2 - 0.75| of the upper two.
    assert calibration_error(probabilities.logit(), class_labels, num_bins=2) == pytest.approx((0.35 + 0.25) / 2)
    # In bins of their own gaps cannot cancel: 0.1, 0.8, 0.4 and 0.9.
    assert calibration_error(probabilities.logit(), class_labels, num_bins=20) == pytest.approx(2.2 / 4)


def test_probabilities_that_are_true_as_often_as_they_say_have_no_calibration_error():
    logits = torch.tensor([0.25]).logit().expand(4, 1)
    assert calibration_error(logits, torch.tensor([[1], [0], [0], [0]])) == pytest.approx(0, abs=1e-6)
    certain = torch.tensor([[100.0], [-100.0]])  # probability 1 belongs to the last bin
    assert calibration_error(certain, torch.tensor([[1], [0]])) == pytest.approx(0, abs=1e-6)


def test_the_calibration_error_of_no_image_is_refused():
    with pytest.raises(ValueError, match=r"at least one image, got \(0, 3\) and \(0, 3\)"):
        calibration_error(torch.empty(0, 3), torch.empty(0, 3))


# Sheets


def test_a_sheet_says_what_is_there_and_what_each_judge_sees_otherwise(monkeypatch):
    drawn = {}

    def note(images, captions, **arguments):
        drawn.update(images=images, captions=captions)
        return images[0]

    monkeypatch.setattr(judging, "make_grid", note)
    class_labels = torch.tensor([[1, 1, 0], [0, 0, 0]])
    seen = {
        "a": torch.tensor([[True, False, True], [False, False, False]]),
        "b": torch.tensor([[True, True, False], [False, True, False]]),
    }
    pixel_values = make_images(2)
    draw_readings(pixel_values, class_labels, seen, ["red cube", "blue cube", "green cube"])
    assert drawn["captions"] == [
        "red cube\nblue cube\na: - blue cube\na: + green cube",
        "nothing\nb: + blue cube",
    ]
    assert np.array_equal(np.asarray(drawn["images"][1]).transpose(2, 0, 1), pixel_values[1])
    drawn.clear()
    draw_readings(np.repeat(pixel_values, 50, axis=0), class_labels.repeat_interleave(50, 0), {}, "abc")
    assert [caption == "nothing" for caption in drawn["captions"]] == [False] * 32 + [True] * 32


# The comparison of judges


@pytest.fixture
def compare_judges(tmp_path, monkeypatch, capsys):
    def compare(*arguments):
        monkeypatch.setattr(sys, "argv", ["judges.py", *map(str, arguments), "--out", str(tmp_path / "out")])
        try:
            runpy.run_path(str(REPOSITORY / "benchmarks" / "judges.py"), run_name="__main__")
        except SystemExit as end:
            return end.code, capsys.readouterr().err
        return 0, json.loads((tmp_path / "out" / "judges.json").read_text())

    return compare


def test_judges_are_compared_on_held_out_images(tiny_dataset, compare_judges, tmp_path, monkeypatch):
    monkeypatch.setenv("ICLEVR_ROOT", str(tiny_dataset))
    judges = {"blind": make_judge(threshold=1e9), "guessing": make_judge(seed=1), "again": make_judge(seed=1)}
    for name, judge in judges.items():
        judge.save_pretrained(tmp_path / name / "judge")
    folders = {name: tmp_path / name / "judge" for name in judges}

    _, results = compare_judges("--judges", *folders.values(), "--data", f"tiny={tiny_dataset}", "real=ICLEVR_ROOT")
    assert list(results["judges"]) == list(judges)
    assert results["judges"]["blind"]["threshold"] == 1e9
    assert results["judges"]["again"]["weights_sha256"] == weights_sha256(judges["guessing"])
    assert results["judges"]["again"]["num_parameters"] == sum(p.numel() for p in judges["again"].parameters())
    assert all(judge["images_per_second"] > 0 for judge in results["judges"].values())
    tiny = results["data"]["tiny"]
    assert results["data"]["real"] == tiny
    store = open_store(tiny_dataset, resolution=16)
    assert tiny["num_images"] == len(store.indices("held-out")) > 0
    assert tiny["judges"]["again"] == tiny["judges"]["guessing"]
    assert (tiny["judges"]["blind"]["exact_match"], tiny["judges"]["blind"]["recall"]) == (0, 0)
    logits = read_images(judges["guessing"], store.pixel_values[store.indices("held-out")]).logits
    assert tiny["agreement"]["share_of_images"] == pytest.approx((logits <= 0).all(dim=1).float().mean().item())
    assert tiny["agreement"]["exact_match_where_they_disagree"]["blind"] == 0
    with Image.open(tmp_path / "out" / "tiny_disagreements.png") as sheet:
        assert json.loads(sheet.text["judges"]) == list(judges)


def test_judges_and_folders_that_cannot_be_compared_are_refused(tiny_dataset, compare_judges, tmp_path):
    make_judge().save_pretrained(tmp_path / "a")
    make_judge(image_size=32).save_pretrained(tmp_path / "larger")
    make_judge("abc").save_pretrained(tmp_path / "others")
    data = ["--data", f"tiny={tiny_dataset}"]
    for judges, message in [
        (["a", "a"], "`judges` must have distinct names, got a twice"),
        (["a", "larger"], "`judges` must read images of one size, got 16 and 32 pixels"),
        (["a", "others"], "judges other labels"),
    ]:
        status, error = compare_judges("--judges", *(tmp_path / name for name in judges), *data)
        assert status == 2
        assert message in error
    for entry in ["tiny", "=x", "tiny="]:
        status, error = compare_judges("--judges", tmp_path / "a", "--data", entry)
        assert f"`data` must be NAME=FOLDER, each name once, got '{entry}'" in error
