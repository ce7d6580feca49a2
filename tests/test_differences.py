import importlib.util
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from iclevr_diffusion.scores import score_conditions, score_difference

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "differences.py"
SPEC = importlib.util.spec_from_file_location("differences", FILE)
differences = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(differences)

NAMES = ["a", "b", "c"]


def draw_logits(seed, num_conditions=40, num_replicates=10):
    class_labels = torch.eye(3)[torch.arange(num_conditions) % 3]
    noise = torch.randn(num_conditions, num_replicates, 3, generator=torch.Generator().manual_seed(seed))
    return 2 * class_labels[:, None] - 1 + noise, class_labels


@pytest.mark.parametrize("resampled", ["replicates", "conditions"])
def test_a_difference_is_that_of_the_two_scores_and_its_interval_lies_around_it(resampled):
    logits, class_labels = draw_logits(0)
    others = draw_logits(1)[0] - 1.5 * class_labels[:, None]
    settings = {"label_names": NAMES, "resampled": resampled}
    scores = [score_conditions(part, class_labels, **settings)["all"] for part in (logits, others)]
    result = score_difference(logits, others, class_labels, resampled=resampled)
    for name in ("top_k", "exact_match", "precision", "recall", "count_accuracy"):
        assert result[name]["value"] == pytest.approx(scores[0][name]["value"] - scores[1][name]["value"])
        assert result[name]["low"] < result[name]["value"] < result[name]["high"]
    assert result["top_k"]["low"] > 0.1
    assert "mean_average_precision" not in result


def test_what_is_hard_for_both_drops_out_of_the_interval():
    logits, class_labels = draw_logits(0)
    changed = logits.clone()
    changed[0, 0] = -changed[0, 0]  # one image of four hundred is read otherwise
    paired = score_difference(logits, changed, class_labels, resampled="replicates")["top_k"]
    apart = score_difference(logits, draw_logits(1)[0], class_labels, resampled="replicates")["top_k"]
    assert paired["high"] - paired["low"] < 0.3 * (apart["high"] - apart["low"])
    same = score_difference(logits, logits, class_labels, resampled="replicates")["exact_match"]
    assert (same["value"], same["low"], same["high"]) == (0.0, 0.0, 0.0)


def test_a_list_drawn_too_few_times_has_a_difference_without_an_interval():
    logits, class_labels = draw_logits(0, num_replicates=9)
    others = draw_logits(1, num_replicates=9)[0]
    difference = score_difference(logits, others, class_labels, resampled="replicates")["top_k"]
    assert difference["value"] is not None and difference["low"] is None and difference["high"] is None


def test_images_that_are_no_pairs_are_refused():
    logits, class_labels = draw_logits(0)
    with pytest.raises(ValueError, match="`resampled` must be 'replicates' or 'conditions', got 'images'"):
        score_difference(logits, logits, class_labels, resampled="images")
    with pytest.raises(ValueError, match="`other_logits` must have the shape of `logits`"):
        score_difference(logits, logits[:, :5], class_labels, resampled="replicates")


def write_evaluation(folder, logits, class_labels, *, names=NAMES, first_seed=0, threshold=0.0, diversity=1.0):
    folder.mkdir()
    replicates = logits.shape[1]
    labels = [[NAMES[row.argmax()]] for row in class_labels for _ in range(replicates)]
    judge = {"weights_sha256": "1", "threshold": threshold}
    results = {
        "pipeline": {"name": folder.name, "weights_sha256": "2", "label_names": names},
        "settings": {"options": {"num_inference_steps": 4}, "judges": {"judge": judge}},
        "protocols": {
            "mine": {
                "sha256": "3",
                "num_images": len(labels),
                "num_replicates": replicates,
                "resampled": "replicates",
            }
        },
        "cost": {"network_calls_per_image": 4},
        "distribution": {"data_sha256": "4", "diversity": {"pixels": {"value": diversity, "num_real": 20}}},
    }
    (folder / "results.json").write_text(json.dumps(results))
    columns = {
        "protocol": ["mine"] * len(labels),
        "labels": labels,
        "seed": list(range(first_seed, first_seed + len(labels))),
        "logits judge": logits.flatten(0, 1).tolist(),
    }
    pq.write_table(pa.table(columns), folder / "records.parquet")
    return folder


def test_two_evaluations_are_compared_image_by_image(tmp_path):
    (logits, class_labels), (others, _) = draw_logits(0), draw_logits(1)
    first = write_evaluation(tmp_path / "first", logits, class_labels, diversity=0.9)
    second = write_evaluation(tmp_path / "second", others, class_labels)
    result = differences.compare(first, second)
    expected = score_difference(logits, others, class_labels, resampled="replicates")
    of = result["differences"]["mine"]
    assert of["num_images"] == 400
    for name, difference in of["judges"]["judge"].items():
        assert difference == pytest.approx(expected[name])
    assert result["quotient_of_diversity"] == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"names": ["x", "y", "z"]}, "must be of pipelines with the same labels"),
        ({"first_seed": 1}, "must have drawn mine from the same seeds"),
        ({"threshold": 0.5}, "must share a judge"),
    ],
)
def test_evaluations_that_are_no_pairs_are_refused(tmp_path, changed, message):
    logits, class_labels = draw_logits(0)
    first = write_evaluation(tmp_path / "first", logits, class_labels)
    with pytest.raises(ValueError, match=message):
        differences.compare(first, write_evaluation(tmp_path / "second", logits, class_labels, **changed))


def test_a_list_drawn_more_often_and_a_folder_without_an_evaluation_are_refused(tmp_path):
    logits, class_labels = draw_logits(0)
    first = write_evaluation(tmp_path / "first", logits, class_labels)
    second = write_evaluation(tmp_path / "second", logits[:, :5], class_labels)
    with pytest.raises(ValueError, match="must share a judge and a list that both have drawn equally often"):
        differences.compare(first, second)
    with pytest.raises(ValueError, match="must hold results.json and records.parquet of iclevr-evaluate"):
        differences.compare(first, tmp_path)


@pytest.mark.parametrize(
    "distribution",
    [
        {"missing": "the protocol 'matched' was not drawn"},
        {"data_sha256": "4", "diversity": {"pixels": {"value": None, "num_real": 20}}},
        {"data_sha256": "4", "diversity": {"pixels": {"value": 1.0, "num_real": 30}}},
        {"data_sha256": "5", "diversity": {"pixels": {"value": 1.0, "num_real": 20}}},
    ],
)
def test_diversity_that_was_not_measured_alike_is_not_compared(tmp_path, distribution):
    logits, class_labels = draw_logits(0)
    folders = [write_evaluation(tmp_path / name, logits, class_labels) for name in ("first", "second")]
    results = json.loads((folders[1] / "results.json").read_text())
    (folders[1] / "results.json").write_text(json.dumps(results | {"distribution": distribution}))
    assert differences.compare(*folders)["quotient_of_diversity"] is None


def test_the_command_prints_and_writes_what_it_found(tmp_path, monkeypatch, capsys):
    logits, class_labels = draw_logits(0)
    folders = [write_evaluation(tmp_path / name, logits, class_labels) for name in ("first", "second")]
    monkeypatch.setattr(sys, "argv", ["differences.py", *map(str, folders), "--out", str(tmp_path / "out.json")])
    differences.main()
    printed = capsys.readouterr().out
    assert "mine, judge, 400 images: top-k +0.000 [+0.000, +0.000]" in printed
    assert "diversity: 1.000 times the second's" in printed
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["quotient_of_diversity"] == 1
    assert result["first"]["network_calls_per_image"] == 4 and result["environment"]["device"] == "cpu"
