import pytest
import torch
from torch import nn

from iclevr_diffusion.ema import (
    ExponentialMovingAverage,
    PowerFunctionAverage,
    check_lengths,
    make_averages,
    power_function_exponent,
)


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


@pytest.mark.parametrize(("length", "exponent"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_exponents_are_those_that_the_paper_names(length, exponent):
    assert power_function_exponent(length) == pytest.approx(exponent, abs=0.005)
    gamma = power_function_exponent(length)
    assert (gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5 == pytest.approx(length)


def test_steps_have_shares_in_a_power_function_average_that_grow_by_the_power():
    average = PowerFunctionAverage(make_model(100), length=0.2)
    num_steps, gamma = 2000, power_function_exponent(0.2)
    expected, steps = 0.0, range(1, num_steps + 1)
    for step in steps:
        average.step(make_model(step))
        decay = (1 - 1 / step) ** (gamma + 1)  # eq. 2
        expected = decay * expected + (1 - decay) * step
    torch.testing.assert_close(average.model[0].weight, torch.full((2, 2), expected), rtol=1e-4, atol=0)
    # The integral that eq. 2 stands for, eq. 1: a share of s^gamma for step s.
    shares = [step**gamma for step in steps]
    mean = sum(step * share for step, share in zip(steps, shares, strict=True)) / sum(shares)
    assert expected == pytest.approx(mean, rel=1e-3)
    spread = sum((step - mean) ** 2 * share for step, share in zip(steps, shares, strict=True)) / sum(shares)
    assert spread**0.5 / num_steps == pytest.approx(0.2, rel=1e-2)  # the length that was asked for


def test_nothing_of_the_random_start_stays_in_a_power_function_average():
    average = PowerFunctionAverage(make_model(7), length=0.1)
    average.step(make_model(1))
    assert (average.model[0].weight == 1).all()


def test_a_restored_power_function_average_goes_on_as_the_first_would_have():
    first, second = PowerFunctionAverage(make_model(0), 0.1), PowerFunctionAverage(make_model(7), 0.1)
    first.step(make_model(1))
    second.load_state_dict(first.state_dict())
    for average in (first, second):
        average.step(make_model(2))
    assert torch.equal(first.model[0].weight, second.model[0].weight)


def test_averages_are_told_apart_by_their_lengths():
    averages = make_averages(make_model(0), 0.9, (0.05, 0.1))
    assert list(averages) == ["", "-0.05", "-0.1"]
    assert averages[""].decay == 0.9
    assert averages["-0.1"].exponent == power_function_exponent(0.1)


@pytest.mark.parametrize("length", [0.0, 0.289])
def test_a_length_outside_its_range_is_refused(length):
    with pytest.raises(ValueError, match=r"`length` must lie between 0 and 0\.289"):
        PowerFunctionAverage(make_model(0), length)


@pytest.mark.parametrize("lengths", [(0.3,), (0.1, 0.1), (0.1, 0.0)])
def test_lengths_that_cannot_be_are_refused_by_the_options_name(lengths):
    with pytest.raises(ValueError, match="`ema_lengths` must differ and lie between"):
        check_lengths("ema_lengths", lengths)
