import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from iclevr_diffusion import ICLEVR_LABELS, LabelVocabulary, evaluate, evaluation, hub
from iclevr_diffusion.evaluation import Evaluator, check_judge_labels, image_seed, load_judge, weights_sha256
from iclevr_diffusion.models.classifier import LabelClassifier
from iclevr_diffusion.models.classifier_small import SmallLabelClassifier
from iclevr_diffusion.scores import (
    Marks,
    bootstrap_estimate,
    exact_match,
    format_results,
    found_labels,
    mark_images,
    score_images,
    score_list,
    score_mean_of_lists,
    top_k_hits,
)

LISTS = {
    "first": [["red cube"], ["gray cube", "blue sphere"], ["cyan sphere", "red cylinder", "green cube"]],
    "second": [["gray cylinder"], ["gray cube", "blue sphere"]],
}
COUNTED_LOGITS = torch.tensor(
    [
        [3.0, 1.0, 2.0, -1.0],  # asked for 0: the highest
        [3.0, 1.0, 2.0, -1.0],  # asked for 0 and 1: only 0 is among the two highest
        [3.0, 1.0, 2.0, -1.0],  # asked for 1 and 3: neither is
        [3.0, 1.0, 2.0, -1.0],  # asked for 0, 1 and 2: all are
    ]
)
COUNTED_LABELS = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 1], [1, 1, 1, 0]])


def make_judge(names=ICLEVR_LABELS.names, image_size=16, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = SmallLabelClassifier(len(names), image_size, label_names=list(names), block_out_channels=(8, 8)).eval()
        judge.classifier.weight.data *= 100  # so that different images get different answers
        return judge


@pytest.fixture
def make_evaluator(tiny_pipeline, tmp_path):
    def make(judges=None, lists=LISTS, output_dir=tmp_path / "evaluation", **arguments):
        arguments = {"num_seeds": 2, "num_inference_steps": 2, "micro_batch_size": 4} | arguments
        return Evaluator(tiny_pipeline, judges or {"judge": make_judge()}, lists, output_dir, **arguments)

    return make


def scores_of(results):
    return results["scores"]["judge"]


# Hits and matches


def test_hits_are_the_labels_asked_for_among_the_k_highest_outputs():
    assert top_k_hits(COUNTED_LOGITS, COUNTED_LABELS).tolist() == [1, 1, 0, 3]
    assert found_labels(COUNTED_LOGITS, COUNTED_LABELS)[1].tolist() == [True, False, False, False]


def test_hits_are_the_same_for_logits_and_for_probabilities():
    logits = torch.randn(50, 24, generator=torch.Generator().manual_seed(0))
    class_labels = (torch.rand(50, 24, generator=torch.Generator().manual_seed(1)) < 0.1).float()
    assert top_k_hits(logits, class_labels).equal(top_k_hits(logits.sigmoid(), class_labels))


def test_an_image_asked_for_nothing_has_no_hit():
    assert top_k_hits(COUNTED_LOGITS, torch.zeros(4, 4)).tolist() == [0, 0, 0, 0]


def test_any_positive_entry_asks_for_its_label_once():
    assert top_k_hits(COUNTED_LOGITS, COUNTED_LABELS * 2.5).tolist() == [1, 1, 0, 3]


def test_an_exact_match_has_no_object_missing_and_none_too_many():
    class_labels = torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert exact_match(COUNTED_LOGITS, class_labels).tolist() == [True, False, False, False]
    assert exact_match(COUNTED_LOGITS, COUNTED_LABELS, threshold=2.5).tolist() == [True, False, False, False]


@pytest.mark.parametrize("metric", [top_k_hits, exact_match])
def test_shapes_that_differ_and_outputs_that_are_not_finite_are_refused(metric):
    with pytest.raises(ValueError, match=r"got \(4, 4\) and \(4, 3\)"):
        metric(COUNTED_LOGITS, COUNTED_LABELS[:, :3])
    with pytest.raises(ValueError, match="must be finite"):
        metric(COUNTED_LOGITS.clone().fill_(torch.nan), COUNTED_LABELS)


# Scores of lists


def counted_marks(num_seeds=1):
    return mark_images(COUNTED_LOGITS[:, None].expand(-1, num_seeds, -1), COUNTED_LABELS)


def test_the_score_is_pooled_over_labels_and_not_averaged_over_images():
    score = score_list(mark_images(COUNTED_LOGITS[:3, None], COUNTED_LABELS[:3]), "abcd")
    assert score["top_k"]["value"] == pytest.approx((1 + 1 + 0) / (1 + 2 + 2))  # the mean over images would be .5
    assert (score["num_conditions"], score["num_images"], score["num_labels"]) == (3, 3, 5)
    assert score["exact_match"]["value"] == 0


def test_scores_are_split_by_number_of_objects_and_by_label():
    score = score_list(counted_marks(num_seeds=3), "abcd")
    assert {k: part["top_k"]["value"] for k, part in score["by_num_objects"].items()} == pytest.approx(
        {"1": 1.0, "2": 1 / 4, "3": 1.0}
    )
    assert {k: part["num_images"] for k, part in score["by_num_objects"].items()} == {"1": 3, "2": 6, "3": 3}
    assert {name: part["top_k"]["value"] for name, part in score["by_label"].items()} == pytest.approx(
        {"a": 1.0, "b": 1 / 3, "c": 1.0, "d": 0.0}
    )
    assert score["by_label"]["b"]["num_images"] == 9


def test_a_label_that_is_not_asked_for_has_no_score():
    marks = mark_images(COUNTED_LOGITS[:2, None], COUNTED_LABELS[:2])
    assert list(score_list(marks, "abcd")["by_label"]) == ["a", "b"]


def test_the_spread_of_single_seeds_is_that_of_whole_lists():
    asked = np.ones((2, 1), dtype=bool)
    found = np.array([[1, 0, 1], [1, 0, 0]], dtype=bool)[:, :, None]
    score = score_list(Marks(asked, found, found[:, :, 0]), "a")
    assert score["one_seed_top_k"] == {"min": 0.0, "median": 0.5, "max": 1.0}
    assert score["top_k"]["value"] == pytest.approx(0.5)


def test_the_mean_of_lists_weighs_lists_alike_however_long_they_are():
    right, wrong = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    labels = torch.tensor([[1.0, 0.0]])
    long = mark_images(right.expand(3, 1, 2), labels.expand(3, 2))
    short = mark_images(wrong[:, None], labels)
    assert score_mean_of_lists([long, short])["top_k"]["value"] == pytest.approx(0.5)
    assert score_mean_of_lists([long, short])["exact_match"]["value"] == pytest.approx(0.5)


def test_the_ceiling_is_the_judges_own_score_for_the_same_numbers_of_objects():
    held_out = {"by_num_objects": {"1": {"top_k": 1.0}, "2": {"top_k": 0.9}, "3": {"top_k": 0.6}}}
    score = score_list(counted_marks(), "abcd", held_out)
    assert score["held_out_top_k_same_num_objects"] == pytest.approx((1 * 1.0 + 4 * 0.9 + 3 * 0.6) / 8)
    del held_out["by_num_objects"]["2"]
    assert "held_out_top_k_same_num_objects" not in score_list(counted_marks(), "abcd", held_out)


def test_images_of_known_labels_are_scored_in_all_and_by_number_of_objects():
    score = score_images(COUNTED_LOGITS, COUNTED_LABELS)
    assert score["top_k"] == pytest.approx(5 / 8)
    assert score["by_num_objects"]["2"] == {"num_images": 2, "top_k": 0.25, "exact_match": 0.0}
    assert score_images(COUNTED_LOGITS, torch.zeros(4, 4))["top_k"] is None


# Intervals


def test_the_interval_of_one_condition_is_that_of_the_binomial_distribution():
    estimate = bootstrap_estimate(np.array([[0, 1] * 50]))
    assert estimate["value"] == 0.5
    assert estimate["low"] == pytest.approx(0.40, abs=0.011)  # Binomial(100, .5) has the quantiles 40 and 60
    assert estimate["high"] == pytest.approx(0.60, abs=0.011)


def test_the_interval_is_that_of_resampling_replicates_within_each_condition():
    random = np.random.default_rng(0)
    hits, weights = random.integers(0, 4, (5, 12)), np.array([0.1, 0.2, 0.1, 0.3, 0.05])
    drawn = random.integers(0, 12, (20_000, 5, 12))
    by_hand = np.take_along_axis(hits[None], drawn, axis=2).mean(axis=2) @ weights
    estimate = bootstrap_estimate(hits, weights)
    assert estimate["value"] == pytest.approx(hits.mean(axis=1) @ weights)
    assert [estimate["low"], estimate["high"]] == pytest.approx(np.quantile(by_hand, [0.025, 0.975]), abs=0.02)


def test_conditions_that_differ_do_not_widen_the_interval_if_their_seeds_agree():
    assert bootstrap_estimate(np.array([[1] * 9, [0] * 9])) == {"value": 0.5, "low": 0.5, "high": 0.5}


def test_one_replicate_gives_a_value_and_no_interval():
    assert bootstrap_estimate(np.array([[1], [0]])) == {"value": 0.5, "low": None, "high": None}


# Judges


@pytest.mark.parametrize(
    "judge",
    [
        make_judge(),
        LabelClassifier(
            24, 16, label_names=list(ICLEVR_LABELS.names), embedding_size=8, hidden_sizes=(8, 8), depths=(1, 1)
        ),
    ],
    ids=["small", "resnet"],
)
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
    monkeypatch.setattr(hub, "shipped_folder", {"shipped": tmp_path}.__getitem__)
    assert weights_sha256(load_judge("shipped")) == weights_sha256(make_judge())


def test_the_courses_checkpoint_is_opened_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "convert_evaluator_checkpoint", {tmp_path / "a.pth": make_judge()}.__getitem__)
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
        (("a", *ICLEVR_LABELS.names[1:]), "'a', 'gray cube'"),
        ("ab", "2 names"),
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


# The evaluator


def test_the_seed_of_an_image_is_fixed_by_list_position_and_replicate():
    assert image_seed("test", 3, 1) == 676247916093528145
    seeds = {image_seed(name, i, r) for name in ("test", "new_test") for i in range(9) for r in range(9)}
    assert len(seeds) == 2 * 9 * 9 and max(seeds) < 2**63


def test_an_evaluation_writes_results_grids_strips_and_images(make_evaluator, tmp_path):
    results = make_evaluator(pipeline_name="tiny", judges_used_in_training=["judge"]).run()
    out = tmp_path / "evaluation"
    assert json.loads((out / "results.json").read_text()) == results
    assert results["quick"] and results["schema_version"] == 1 and results["num_seeds"] == 2
    assert scores_of(results)["lists"]["first"]["num_labels"] == 12
    assert scores_of(results)["all_lists"]["num_images"] == 10
    assert results["judges_used_in_training"] == ["judge"] and results["pipeline"] == "tiny"
    assert {file.name for file in out.glob("*.png")} == {f"{n}_{k}.png" for n in LISTS for k in ("grid", "strips")}
    image = Image.open(out / "images" / "first" / "0001_gray-cube_blue-sphere.png")
    assert image.size == (16, 16)
    assert image.text["labels"] == "gray cube, blue sphere" and image.text["seed"] == str(image_seed("first", 1, 0))
    strip = Image.open(out / "strips" / "first" / "0001_gray-cube_blue-sphere.png")
    assert strip.size == (16 * 3, 16)  # two steps and the result
    assert (np.asarray(strip)[:, -16:] == np.asarray(image)).all()


@pytest.mark.parametrize(
    "as_given",
    [
        lambda multi_hot: [[8, 1], [0]],
        lambda multi_hot: multi_hot,
        lambda multi_hot: multi_hot.numpy().astype(bool),
    ],
    ids=["indices", "tensor", "array"],
)
def test_labels_in_any_spelling_are_drawn_and_written_by_name(make_evaluator, tmp_path, as_given):
    names = [[ICLEVR_LABELS.names[index] for index in row] for row in ([8, 1], [0])]
    given = as_given(ICLEVR_LABELS.encode(names))
    results = make_evaluator(lists={"mine": given}, num_seeds=1).run()
    named = make_evaluator(lists={"mine": names}, num_seeds=1, output_dir=tmp_path / "named").run()
    order = names if isinstance(given, list) else [sorted(names[0], key=ICLEVR_LABELS.index), names[1]]
    assert results["settings"]["lists"] == {"mine": order}
    assert results["scores"] == named["scores"]


def test_results_are_written_before_the_pictures(make_evaluator, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "make_grid", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_evaluator(num_seeds=1).run()
    assert (tmp_path / "evaluation" / "results.json").is_file()
    assert not [*(tmp_path / "evaluation").glob("*.png")]


def test_no_image_file_is_open_while_the_grid_is_laid_out(make_evaluator, monkeypatch):
    opened, open_image, make_grid = [], Image.open, evaluation.make_grid

    def checked_grid(*arguments, **options):
        assert opened and all(image.fp is None for image in opened)
        return make_grid(*arguments, **options)

    monkeypatch.setattr(Image, "open", lambda file: opened.append(open_image(file)) or opened[-1])
    monkeypatch.setattr(evaluation, "make_grid", checked_grid)
    make_evaluator(num_seeds=1).run()


def test_the_environment_is_that_of_the_drawing_and_not_of_a_later_call(make_evaluator, monkeypatch):
    def on(machine, **arguments):
        monkeypatch.setattr(Evaluator, "_environment", {"machine": machine})
        return make_evaluator(**arguments).run()

    first = on("first", num_seeds=1)
    assert first["environment"] == {"machine": "first"} and "environments" not in first
    assert on("second", num_seeds=1)["environment"] == {"machine": "first"}
    both = on("third", num_seeds=2)
    assert both["environment"] == {"machine": "third"}
    assert both["environments"] == [{"machine": "first"}, {"machine": "third"}]
    assert "environments" not in on("fourth", num_seeds=1)


def test_the_environment_names_the_machine_and_the_commit(make_evaluator):
    environment = make_evaluator(num_seeds=1).run()["environment"]
    assert environment["machine"] and environment["versions"]["torch"] == torch.__version__
    assert environment["git_commit"] is None or re.fullmatch("[0-9a-f]{40}(-dirty)?", environment["git_commit"])
    models = re.findall("model name.*: (.+)", Path("/proc/cpuinfo").read_text())
    assert not models or environment["machine"] == models[0]


def test_a_saved_image_is_the_one_that_its_seed_draws_alone(make_evaluator, tiny_pipeline, tmp_path):
    make_evaluator().run()
    saved = Image.open(tmp_path / "evaluation" / "images" / "second" / "0000_gray-cylinder.png")
    (alone,) = tiny_pipeline(
        [["gray cylinder"]], seeds=[int(saved.text["seed"])], num_inference_steps=2, micro_batch_size=4
    ).images
    assert (np.asarray(saved) == np.asarray(alone)).all()


def test_results_do_not_depend_on_the_other_lists(make_evaluator, tmp_path):
    both = make_evaluator(output_dir=tmp_path / "both").run()
    alone = make_evaluator(lists={"second": LISTS["second"]}, output_dir=tmp_path / "alone").run()
    assert scores_of(alone)["lists"]["second"] == scores_of(both)["lists"]["second"]


def logits_of(evaluator):
    return torch.cat([rows.flatten(0, 1) for rows in evaluator._read_logits()[0]["judge"].values()])


def test_a_stopped_evaluation_goes_on_and_ends_like_an_unbroken_one(
    make_evaluator, tiny_pipeline, tmp_path, monkeypatch
):
    unbroken = make_evaluator(output_dir=tmp_path / "unbroken", num_seeds=3)
    expected = unbroken.run()
    stopped = make_evaluator(num_seeds=3)
    draw_batch, drawn = Evaluator._draw_batch, []

    def draw_and_stop(evaluator, batch):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        draw_batch(evaluator, batch)
        drawn.append(batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Evaluator, "_draw_batch", draw_and_stop)
        stopped.run()
    (record_file,) = (tmp_path / "evaluation" / "records").glob("*.jsonl")
    record_file.write_text(record_file.read_text()[:-20])  # the last line is cut off as well
    resumed, redrawn = make_evaluator(num_seeds=3), []
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "_draw_batch", lambda e, batch: (draw_batch(e, batch), redrawn.extend(batch)))
        results = resumed.run()
    assert len(redrawn) == 15 - 4  # of the two batches, the whole one was kept
    assert results["scores"] == expected["scores"]
    assert logits_of(resumed).equal(logits_of(unbroken))


def test_a_finished_evaluation_is_not_drawn_again_unless_an_image_is_gone(make_evaluator, tmp_path, monkeypatch):
    expected = make_evaluator().run()
    (tmp_path / "evaluation" / "images" / "first" / "0000_red-cube.png").unlink()
    draw_batch, redrawn = Evaluator._draw_batch, []
    monkeypatch.setattr(Evaluator, "_draw_batch", lambda e, batch: (draw_batch(e, batch), redrawn.extend(batch)))
    assert make_evaluator().run()["scores"] == expected["scores"]
    assert redrawn == [("first", 0, 0)]


def test_more_seeds_can_be_added_later_and_fewer_taken(make_evaluator, tmp_path):
    make_evaluator(num_seeds=1).run()
    expected = make_evaluator(num_seeds=3, output_dir=tmp_path / "at once").run()
    assert make_evaluator(num_seeds=3).run()["scores"] == expected["scores"]
    assert scores_of(make_evaluator(num_seeds=1).run())["all_lists"]["num_images"] == 5


def test_an_evaluation_of_ten_seeds_is_no_longer_quick(make_evaluator):
    assert not make_evaluator(lists={"one": [["red cube"]]}, num_seeds=10, micro_batch_size=10).run()["quick"]


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        ({"guidance_scale": 2.0}, "guidance_scale is 1.0 there and 2.0 here"),
        ({"num_inference_steps": 3}, "num_inference_steps is 2 there and 3 here"),
        ({"judges": {"judge": make_judge(seed=1)}}, "judges.judge.weights_sha256"),
        ({"lists": {"first": [["red cube"]]}}, r"lists.first, lists.second"),
    ],
)
def test_a_folder_of_other_settings_is_refused(make_evaluator, arguments, setting):
    make_evaluator(num_seeds=1).run()
    with pytest.raises(ValueError, match=setting):
        make_evaluator(**arguments)


def test_settings_of_an_evaluation_that_drew_nothing_do_not_bind_the_next(make_evaluator, tiny_pipeline, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(Evaluator, "_draw_batch", lambda *_: (_ for _ in ()).throw(RuntimeError))
        make_evaluator(guidance_scale=2.0).run()
    make_evaluator(num_seeds=1).run()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_seeds": 0}, "`num_seeds` must be at least 1, got 0"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be at least 1, got 0"),
        ({"micro_batch_size": 0}, "`micro_batch_size` must be at least 1, got 0"),
        ({"lists": {}}, "at least one list"),
        ({"lists": {"mine": []}}, r"`lists\['mine'\]` must hold at least one condition"),
        ({"lists": {"mine": [["red cube"], ["red cub"]]}}, r"`lists\['mine'\]`: .*\[1\].*'red cube'"),
        ({"lists": {"mine": [[]]}}, r"`lists\['mine'\]`: .*empty scene"),
        ({"lists": {"mine": torch.eye(24) / 2}}, r"`lists\['mine'\]` must hold zeros and ones, got 0.5"),
        ({"judges": {"other": make_judge("ab")}}, r"`judges\['other'\]` judges other labels"),
        ({"judges": {"large": make_judge(image_size=32)}}, r"`judges\['large'\]` must judge 16-pixel images"),
        ({"judges_used_in_training": ["nobody"]}, r"must name some of the judges \['judge'\], got \['nobody'\]"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_drawn(make_evaluator, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_evaluator(**arguments)
    assert not (tmp_path / "evaluation").exists()


def test_an_evaluation_without_a_judge_is_refused(tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match="at least one judge"):
        Evaluator(tiny_pipeline, {}, LISTS, tmp_path)


def test_images_that_are_not_finite_are_refused(make_evaluator, tiny_unet):
    tiny_unet.class_embedding.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        make_evaluator().run()


def make_store(vocabulary=ICLEVR_LABELS, num_images=7):
    random = np.random.default_rng(0)
    class_labels = np.zeros((num_images, len(vocabulary)), dtype=np.uint8)
    for row, labels in enumerate(class_labels):
        labels[: 1 + row % 2] = 1
    return SimpleNamespace(
        vocabulary=vocabulary,
        pixel_values=random.integers(0, 256, (num_images, 3, 16, 16), dtype=np.uint8),
        class_labels=class_labels,
        sha256="0" * 64,
        indices=lambda split: np.arange(1, num_images) if split == "held-out" else np.arange(num_images),
    )


def test_the_judges_own_score_on_held_out_images_stands_beside_the_pipelines(make_evaluator):
    store, judge = make_store(), make_judge()
    results = make_evaluator().run(store)
    with torch.no_grad():
        logits = judge(torch.from_numpy(store.pixel_values[1:]) / 127.5 - 1).logits
    expected = score_images(logits, torch.from_numpy(store.class_labels[1:]).float())
    assert results["held_out_images"] == {"data_sha256": "0" * 64, "judge": expected}
    assert "held_out_top_k_same_num_objects" in scores_of(results)["lists"]["second"]
    assert "held_out_top_k_same_num_objects" not in scores_of(results)["lists"]["first"]  # no image of 3 objects


def test_without_held_out_images_the_results_say_why(make_evaluator):
    results = make_evaluator(num_seeds=1).run(no_store_reason="none were given")
    assert results["held_out_images"] == {"missing": "none were given"}
    assert "none were given" in format_results(results)
    assert make_evaluator(num_seeds=1).run(make_store(num_images=1))["held_out_images"] == {
        "missing": "the data have no held-out scene"
    }


def test_held_out_images_of_other_labels_are_refused_before_anything_is_drawn(make_evaluator, tmp_path):
    with pytest.raises(ValueError, match="must have the labels of the pipeline"):
        make_evaluator().run(make_store(LabelVocabulary(["a", "b"])))
    assert not (tmp_path / "evaluation").exists()


def test_the_printed_table_holds_every_list_and_says_which_scores_are_not_to_be_trusted(make_evaluator):
    results = make_evaluator(num_seeds=1, judges_used_in_training=["judge"]).run(make_store())
    table = format_results(results)
    for words in (
        "judge judge (also taught the pipeline",
        "first",
        "second",
        "all_lists",
        "mean_of_lists",
        "Quick (num_seeds is 1)",
    ):
        assert words in table


# Several processes and real kills

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "ICLEVR_ROOT"} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def evaluate_arguments(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.delenv("ICLEVR_ROOT", raising=False)
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    make_judge().save_pretrained(tmp_path / "judge")
    return [
        *("--pipeline", str(tmp_path / "pipeline"), "--judges", str(tmp_path / "judge"), "--labels", "test"),
        *("--num_inference_steps", "2", "--micro_batch_size", "4", "--device", "cpu", "--seeds", "5", "--out"),
    ]


def read_scores(folder):
    return json.loads((folder / "results.json").read_text())["scores"]


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(evaluate_arguments, tmp_path):
    evaluate.main([*evaluate_arguments, str(tmp_path / "one")])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "iclevr_diffusion.evaluate", *evaluate_arguments, str(tmp_path / "two")]
    subprocess.run(command, env=ENVIRONMENT, check=True, timeout=300)
    assert len([*(tmp_path / "two" / "records").glob("*.jsonl")]) == 2
    assert read_scores(tmp_path / "two") == read_scores(tmp_path / "one")
    for name in ("test_grid.png", "test_strips.png"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_ends_like_an_unbroken_one(evaluate_arguments, tmp_path):
    evaluate.main([*evaluate_arguments, str(tmp_path / "unbroken")])
    command = [sys.executable, "-m", "iclevr_diffusion.evaluate", *evaluate_arguments, str(tmp_path / "killed")]
    record_file = tmp_path / "killed" / "records" / "process-00000.jsonl"
    process = subprocess.Popen(command, env=ENVIRONMENT)
    until = time.monotonic() + 300
    while not record_file.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert record_file.exists() and not (tmp_path / "killed" / "results.json").exists()
    evaluate.main(command[3:])
    assert read_scores(tmp_path / "killed") == read_scores(tmp_path / "unbroken")
