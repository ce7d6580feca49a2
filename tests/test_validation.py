import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from iclevr_diffusion import LabelVocabulary
from iclevr_diffusion.data import normalize
from iclevr_diffusion.models.classifier_small import SmallLabelClassifier
from iclevr_diffusion.validation import MAX_REAL, Validation

NAMES = ("red", "green", "blue")


class FakeRun:
    """What a `TrainingRun` is to a `Validation`."""

    def __init__(self, output_dir):
        self.accelerator, self.output_dir, self.step = Accelerator(cpu=True), output_dir, 7
        self.printed, self.logged = [], {}

    def print(self, *text):
        self.printed.append(" ".join(text))

    def log(self, **scalars):
        self.logged |= scalars

    def share_buffers(self, *networks):
        assert not networks


class FakePipeline:
    """Draws `spread` times uniform noise around gray, from the seeds alone."""

    config = {}
    components = {}

    def __init__(self, spread, names=NAMES):
        self.spread, self.vocabulary = spread, LabelVocabulary(names) if names else None

    def set_progress_bar_config(self, **options):
        pass

    def __call__(self, class_labels=None, num_images=None, *, seeds, output_type):
        assert (class_labels is None) == (self.vocabulary is None)
        assert len(seeds) == (num_images if class_labels is None else len(class_labels))
        noise = [torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        images = 0.5 + self.spread * (torch.stack(noise) - 0.5)
        if output_type == "pil":
            images = [Image.fromarray((255 * image.permute(1, 2, 0)).byte().numpy()) for image in images]
        return SimpleNamespace(images=images)


def make_data(rows, pixel_values=None):
    """Images of noise that show the labels of `rows`."""
    if pixel_values is None:
        pixel_values = np.random.default_rng(0).integers(0, 256, (len(rows), 3, 4, 4), dtype=np.uint8)
    store = SimpleNamespace(
        vocabulary=LabelVocabulary(NAMES), class_labels=np.array(rows, dtype=np.uint8), pixel_values=pixel_values
    )
    example = normalize(torch.from_numpy(pixel_values[:1]))
    return SimpleNamespace(store=store, indices=np.arange(len(rows)), example=example.to)


@pytest.fixture
def run(tmp_path):
    return FakeRun(tmp_path)


def test_images_that_differ_like_real_ones_have_a_diversity_of_one_and_raise_no_alarm(run):
    data = make_data([[1, 0, 0]] * 30)
    Validation(run, FakePipeline(spread=1.0), [["red"]], data=data).draw()
    assert run.logged["diversity"] == pytest.approx(1, abs=0.15)
    assert not any("alike" in text for text in run.printed)


def test_images_that_hardly_differ_raise_the_alarm_with_a_remedy(run):
    data = make_data([[1, 0, 0]] * 30)
    Validation(run, FakePipeline(spread=0.2), [["red"]], data=data).draw()
    assert run.logged["diversity"] == pytest.approx(0.2, abs=0.03)
    assert "images of one condition are alike" in run.printed[-1] and "`diff_augment`" in run.printed[-1]


def test_the_conditions_with_most_real_images_are_compared(run):
    data = make_data([[0, 1, 0]] * 2 + [[1, 0, 0]] + [[1, 0, 1]] * 3)
    validation = Validation(run, FakePipeline(1.0), [["red"], ["green"], ["red", "blue"]], data=data)
    assert validation.compared == [["red", "blue"], ["green"]]  # one image alone cannot be compared
    assert validation.real_numbers.tolist() == [0, 0, 0, 1, 1]
    assert validation.real_pixels.equal(torch.from_numpy(data.store.pixel_values[[3, 4, 5, 0, 1]]).flatten(1) / 255)


@pytest.mark.parametrize(
    "data",
    [None, make_data([[1, 0, 0]]), make_data([[1, 0, 0]] * 2, np.zeros((2, 3, 4, 4), dtype=np.uint8))],
    ids=["no data", "one image", "images all the same"],
)
def test_nothing_is_compared_where_there_is_nothing_to_compare_with(run, data):
    Validation(run, FakePipeline(0.0), [["red"]], data=data).draw()
    assert run.logged == {} and not any("alike" in text for text in run.printed)


def test_a_pipeline_without_labels_is_drawn_from_and_all_its_images_are_compared(run):
    data = make_data([[1, 0, 0]] * 8 + [[0, 1, 0]] * 8)
    Validation(run, FakePipeline(1.0, names=None), [["red"], ["green"]], data=data).draw()
    assert run.logged["diversity"] == pytest.approx(1, abs=0.2)
    (path,) = (run.output_dir / "samples").iterdir()
    assert json.loads(Image.open(path).text["labels"]) is None


def test_compared_images_come_from_all_over_the_data(run):
    data = make_data([[1, 0, 0]] * 100)
    validation = Validation(run, FakePipeline(1.0), [["red"]], data=data)
    shown = range(0, 100, 7)  # the least step with which no more are left
    assert len(shown) <= MAX_REAL < len(range(0, 100, 6))
    assert validation.real_pixels.equal(torch.from_numpy(data.store.pixel_values[list(shown)]).flatten(1) / 255)


def test_a_judge_of_images_of_another_size_is_refused_before_any_training(run, tmp_path):
    SmallLabelClassifier(3, 32, label_names=list(NAMES)).save_pretrained(tmp_path / "judge")
    with pytest.raises(ValueError, match=r"`judge`: `pixel_values` must have shape .*32"):
        Validation(run, FakePipeline(1.0), [["red"]], judge=tmp_path / "judge", data=make_data([[1, 0, 0]]))


def test_a_judge_cannot_score_a_pipeline_without_labels(run):
    with pytest.raises(ValueError, match="`judge` must be none for a pipeline without labels"):
        Validation(run, FakePipeline(1.0, names=None), [["red"]], judge="judge-small")
