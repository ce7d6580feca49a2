import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from iclevr_diffusion import checkpoint
from iclevr_diffusion.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint


class Holder:
    """Any object with a state."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state_dict):
        self.state = state_dict


def trained(seed=0):
    """A model with BatchNorm, its optimizer after two steps and a learning rate schedule."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    for _ in range(2):
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def assert_same(first, second):
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second) and first.dtype == second.dtype
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert type(first) is type(second) and len(first) == len(second)
        for ours, theirs in zip(first, second, strict=True):
            assert_same(ours, theirs)
    else:
        assert first == second and type(first) is type(second)


def test_states_come_back_bit_equal(tmp_path):
    objects, others = trained(0), trained(1)
    folder = save_checkpoint(tmp_path, 2, objects, {"seed": 7})
    assert load_checkpoint(folder, others) == {"seed": 7}
    for name, value in objects.items():
        assert_same(value.state_dict(), others[name].state_dict())


def test_numbers_texts_and_containers_keep_their_types(tmp_path):
    state = {0: {"t": torch.tensor(3)}, "betas": (0.1, 1e-8), "list": [None, True, 2, float("inf"), "x", {}], 5: ()}
    folder = save_checkpoint(tmp_path, 1, {"a": Holder(state)}, {})
    restored = Holder(None)
    load_checkpoint(folder, {"a": restored})
    assert_same(state, restored.state)


def test_tied_and_transposed_tensors_are_saved_as_they_are(tmp_path):
    weight = torch.arange(6.0).view(2, 3)
    folder = save_checkpoint(tmp_path, 1, {"a": Holder({"one": weight, "two": weight, "turned": weight.T})}, {})
    restored = Holder(None)
    load_checkpoint(folder, {"a": restored})
    assert torch.equal(restored.state["two"], weight) and torch.equal(restored.state["turned"], weight.T)


def test_a_state_that_cannot_be_saved_without_pickle_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match="extra/0 is a object"):
        save_checkpoint(tmp_path, 1, {"a": Holder({"extra": [object()]})}, {})
    assert newest_checkpoint(tmp_path) is None


def test_a_checkpoint_holds_safetensors_and_json_alone(tmp_path):
    folder = save_checkpoint(tmp_path, 2, trained(), {})
    for path in folder.iterdir():
        content = path.read_bytes()
        if path.suffix == ".json":
            json.loads(content)
        else:
            assert path.suffix == ".safetensors"
            length = int.from_bytes(content[:8], "little")  # the format: the length of a JSON header, then numbers
            json.loads(content[8 : 8 + length])


def test_older_checkpoints_go_once_the_new_one_is_in_place(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"a": Holder({"step": step})}, {}, num_kept=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("function", ["save_file", "_digest", "_sync"])
def test_a_save_that_breaks_off_leaves_the_older_one_and_no_half_one(tmp_path, monkeypatch, function):
    objects = trained()
    first = save_checkpoint(tmp_path, 1, objects, {}, num_kept=1)
    calls = []

    def break_off(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("No space left on device")
        return original(*arguments)

    original = getattr(checkpoint, function)
    monkeypatch.setattr(checkpoint, function, break_off)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 2, objects, {}, num_kept=1)
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path) == first
    save_checkpoint(tmp_path, 3, objects, {}, num_kept=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_everything_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    events = []
    sync, replace = checkpoint._sync, os.replace
    monkeypatch.setattr(checkpoint, "_sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), replace(*paths)))
    folder = save_checkpoint(tmp_path, 1, trained(), {})
    assert events.index("rename") == len(events) - 2 and events[-1] == tmp_path.name
    assert {path.name for path in folder.iterdir()} <= set(events)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_broken_newest_checkpoint_is_passed_over_with_a_warning_that_names_it(tmp_path, name, damage):
    older = save_checkpoint(tmp_path, 1, trained(), {})
    path = save_checkpoint(tmp_path, 2, trained(), {}) / name
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    with pytest.warns(UserWarning, match=rf"step-00000002 is broken \({name}"):
        assert newest_checkpoint(tmp_path) == older


def test_a_renamed_checkpoint_is_not_taken_for_a_later_step(tmp_path):
    save_checkpoint(tmp_path, 1, trained(), {}).rename(tmp_path / "step-00000009")
    with pytest.warns(UserWarning, match="manifest.json is of step 1"):
        assert newest_checkpoint(tmp_path) is None


def test_a_broken_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    broken = save_checkpoint(tmp_path, 2, trained(), {})
    (broken / "model.safetensors").unlink()
    assert save_checkpoint(tmp_path, 2, trained(), {}) == broken == newest_checkpoint(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_without_checkpoints_there_is_no_newest(tmp_path):
    (tmp_path / "step-by-step").mkdir()
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(Path("/does/not/exist")) is None


def test_a_checkpoint_of_other_objects_is_refused(tmp_path):
    folder = save_checkpoint(tmp_path, 1, {"model_0": Holder({})}, {})
    with pytest.raises(ValueError, match=r"\['model_0'\], got \['model_0', 'model_1'\]"):
        load_checkpoint(folder, {"model_0": Holder({}), "model_1": Holder({})})


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="nothing tells which files are mapped")
def test_a_checkpoint_that_was_loaded_does_not_stay_mapped(tmp_path):
    folder = save_checkpoint(tmp_path, 2, trained(0), {})
    others = trained(1)
    load_checkpoint(folder, others)
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert others["optimizer"].state_dict()["state"]  # which keeps what it is given
