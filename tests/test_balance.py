"What the balance of gradients does beside its page: limits, what it drops, what a checkpoint gives back."

from types import SimpleNamespace

import pytest
import torch

from masked_ldm.training.balance import Balance
from masked_ldm.training.config import TrainConfig
from masked_ldm.training.timesteps import StepTimesteps

ONE = SimpleNamespace(reduce=lambda tensor, how: tensor)  # an accelerator of one process
LOW, HIGH = StepTimesteps(torch.tensor([5, 900])), StepTimesteps(torch.tensor([800, 900]))


def balance(**given):
    weight = torch.nn.Parameter(torch.tensor([2.0, 1.0]))
    settings = dict(T=1000, lambda1=0.2, lambda2=0.3, balance=1.0) | given
    return Balance(TrainConfig(**settings), [weight]), weight


def measure(made, weight, perceptual, diffusion):
    "A step with these two gradients, each along one axis."
    terms = SimpleNamespace(perceptual=lambda: perceptual * weight[0])
    made.add(terms, 1)
    weight.grad = torch.tensor([perceptual, diffusion])
    made.update(LOW, ONE)


def test_the_factor_goes_to_the_wanted_ratio():
    made, weight = balance(balance=0.5)
    measure(made, weight, 4.0, 1.0)
    assert made.ratio == pytest.approx(4.0) and made.scale == pytest.approx(0.125)
    assert made.measured() == dict(gradient_ratio=4.0, lambda_scale=0.125)


def test_lambdas_keep_their_limit():
    made, weight = balance()
    measure(made, weight, 0.01, 1.0)
    assert made.scale == pytest.approx(0.95 / 0.5)
    assert balance(lambda1=0.5, lambda2=0.5)[0].scale == pytest.approx(0.95)


@pytest.mark.parametrize("pair", [(0.0, 1.0), (1.0, 0.0), (1.0, 1e-7), (float("nan"), 1.0)])
def test_what_is_no_measurement_moves_nothing(pair):
    "Nobody in the pictures, nothing but rounding left, or a step that is going to be skipped."
    made, weight = balance()
    measure(made, weight, *pair)
    assert made.scale == 1.0 and made.measured() == {}


def test_a_step_without_decoding_is_neither_measured_nor_counted():
    made, _ = balance(T=100)
    assert made.is_due(LOW) and not made.is_due(HIGH)
    made.update(HIGH, ONE)
    assert made.decoding_steps == 0
    capped = StepTimesteps(LOW.t, decode_weights=torch.tensor([0.0, 1.0]))
    assert not made.is_due(capped)


def test_asking_counts_nothing():
    "A step that runs out of memory is asked for again after the resume."
    made, _ = balance()
    before = made.state()
    assert made.is_due(LOW) and made.is_due(LOW) and made.state() == before


def test_rare_steps_weigh_little():
    "One picture a step at T = 100: nine steps of ten have no perceptual gradient."
    alone, weight = balance(T=100, batch_size=1)
    measure(alone, weight, 1.0, 1.0)
    assert alone.ratio == pytest.approx(0.1)
    spread, weight = balance(T=100, batch_size=8, stratified_t=True)
    measure(spread, weight, 1.0, 1.0)
    assert spread.ratio == pytest.approx(1.0)


def test_a_run_without_balance_takes_nothing_from_a_checkpoint():
    made, weight = balance()
    measure(made, weight, 4.0, 1.0)
    fixed, _ = balance(balance=0.0)
    fixed.load_state(made.state())
    assert fixed.scale == 1.0 and not fixed.is_due(LOW)
    again, _ = balance()
    again.load_state(made.state())
    assert again.state() == made.state()
    larger, _ = balance(lambda1=0.5, lambda2=0.5)
    larger.load_state(made.state() | dict(scale=1.5))
    assert larger.scale == pytest.approx(0.95)
