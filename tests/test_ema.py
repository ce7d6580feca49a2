import pytest
import torch
from torch import nn

from iclevr_diffusion.ema import ExponentialMovingAverage


def make_model(value):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(value)
    return model


def test_the_decay_rises_from_the_warm_up_to_its_limit():
    ema = ExponentialMovingAverage(make_model(0), decay=0.3)
    expected = 0.0
    for step in range(1, 8):
        ema.step(make_model(1))
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + 1 - decay
        for parameter in ema.model.parameters():
            torch.testing.assert_close(parameter, torch.full_like(parameter, expected))


def test_running_statistics_are_averaged_and_counters_copied():
    ema = ExponentialMovingAverage(make_model(0), decay=0.9)
    ema.step(make_model(11))
    norm = ema.model[1]
    torch.testing.assert_close(norm.running_mean, torch.full((2,), 9.0))  # decay 2 / 11
    torch.testing.assert_close(norm.running_var, torch.full((2,), 9.0))
    assert norm.num_batches_tracked == 11


def test_constants_such_as_data_statistics_stay_exact():
    model = make_model(0.1)
    ema = ExponentialMovingAverage(model, decay=0.9)
    for _ in range(50):
        ema.step(model)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(ema.model.buffers(), model.buffers(), strict=True))


def test_the_average_is_a_copy_without_gradients_in_evaluation_mode():
    model = make_model(0)
    ema = ExponentialMovingAverage(model)
    model[0].weight.data.fill_(5)
    assert (ema.model[0].weight == 0).all()
    assert not ema.model.training and not any(parameter.requires_grad for parameter in ema.model.parameters())
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())


def test_a_wrapped_model_is_followed_like_the_model_itself():
    ema = ExponentialMovingAverage(make_model(0), decay=0)
    ema.step(nn.Sequential(make_model(3)))  # as a data-parallel wrapper does, it puts a prefix before all names
    assert all((parameter == 3).all() for parameter in ema.model.parameters())


def test_a_restored_average_goes_on_as_the_first_would_have():
    first = ExponentialMovingAverage(make_model(0), decay=0.99)
    first.step(make_model(1))
    second = ExponentialMovingAverage(make_model(7), decay=0.99)
    second.load_state_dict(first.state_dict())
    for ema in (first, second):
        ema.step(make_model(2))
    assert torch.equal(first.model[0].weight, second.model[0].weight)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"`decay` must lie in \[0, 1\)"):
        ExponentialMovingAverage(make_model(0), decay)


def test_the_singular_vectors_of_a_spectral_norm_keep_their_length():
    model = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(5, 4))
    ema = ExponentialMovingAverage(model, 0.9)
    for _ in range(3):
        model.parametrizations.weight.original.data.normal_()
        model(torch.zeros(1, 5))  # moves the vectors
        ema.step(model)
    for name, buffer in ema.model.named_buffers():
        assert buffer.norm().item() == pytest.approx(1, abs=1e-5), name
        assert buffer.equal(dict(model.named_buffers())[name])
