"""A run in float64, where only the order of sums is left to differ: in float32 a value near a kink of a loss network (ReLU, max-pooling) falls to its other side.

Also a program that torchrun can start: `in_float64.py '{"T": 400, ...}'` trains, without pictures and judgement, and writes what it would have written."""

import contextlib
import json
import sys
from unittest import mock

import torch

from masked_ldm import train as module
from masked_ldm.train import TrainConfig, Trainer
from masked_ldm.training import data

load_networks, collate = module.load_networks, data.collate


def _load_doubled(*args):
    networks = load_networks(*args)
    base = networks.base
    losses = (networks.lpips, networks.face, networks.pose)
    judges = (networks.judge_people, networks.judge_faces)
    for network in (base.unet, base.vae, base.text_encoder, *losses, *judges):
        if network is not None:
            network.double()
    return networks


def collate_doubled(samples):
    batch = collate(samples)
    for name, value in vars(batch).items():
        if torch.is_tensor(value) and value.is_floating_point():
            setattr(batch, name, value.double())
    return batch


@contextlib.contextmanager
def float64():
    "Inside, trainers are built and step in float64."
    with (
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        mock.patch.object(module, "load_networks", _load_doubled),
        mock.patch.object(data, "collate", collate_doubled),
        mock.patch.object(Trainer, "draw_grid", lambda self: None),
    ):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


if __name__ == "__main__":
    with float64():
        module.train(TrainConfig.make(**json.loads(sys.argv[1])))
