"What a run says of its memory. No GPU is needed: what the card says is given."

from dataclasses import replace

import pytest
import torch

from masked_ldm.training import memory_plan
from masked_ldm.training.config import TrainConfig
from masked_ldm.training.memory_plan import advice, announced, is_out_of_memory, plan


@pytest.mark.parametrize(
    "gib, batch, said",
    [
        (12, 1, "on a card with 12.0 GiB free"),
        (0.3, 8, "that will not fit, but this would: "),
        (0.01, 1, "this would: a smaller size"),  # few remedies to plan
    ],
)
def test_a_run_on_a_gpu_announces_itself(gib, batch, said, monkeypatch):
    cuda = memory_plan.torch.cuda
    monkeypatch.setattr(cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(cuda, "mem_get_info", lambda device: (int(gib * 2**30), 0))
    text = announced(TrainConfig.make(T=1000, batch_size=batch, mixed_precision="bf16"), "cuda:0")
    assert text.startswith("planned: ") and said in text, text


def test_nothing_is_announced_on_a_cpu():
    assert not announced(TrainConfig.make(), "cpu")


@pytest.mark.parametrize(
    "given",
    [
        dict(per_person=True, cache_latents=True, max_decoded=1, stratified_t=True),
        dict(variant="as_published", lambda1=0.0),
        dict(channels_last=True, mixed_precision="bf16", use_ema=True),
    ],
    ids=str,
)
def test_every_kind_of_step_can_be_planned(given):
    planned = plan(TrainConfig.make(batch_size=4, **given), processes=2)
    assert 0 < planned.tflop < 0.1 and 0.1 < planned.gib < 1


def test_less_is_planned_with_what_saves_memory():
    config = TrainConfig.make(T=1000, batch_size=4)
    most = plan(config).gib
    for given in (dict(decode_batch=1), dict(gradient_checkpointing=True)):
        assert plan(replace(config, **given)).gib < most


def test_who_goes_on_may_not_change_the_curve(monkeypatch):
    config = TrainConfig.make(batch_size=1, decode_batch=1, gradient_checkpointing=True)
    assert "smaller size" in advice(config) and "bf16" not in advice(config)


@pytest.mark.parametrize(
    "error, is_memory",
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (torch.OutOfMemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("shapes"), False),
        (RuntimeError(), False),
    ],
    ids=repr,
)
def test_out_of_memory(error, is_memory):
    assert is_out_of_memory(error) == is_memory
