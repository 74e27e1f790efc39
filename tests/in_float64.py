"""A run in float64, where only the order of sums is left to differ: in float32 a value near a kink of a loss network (ReLU, max-pooling) falls to its other side.

Also a program that torchrun can start: `in_float64.py '{"T": 400, ...}'` trains, without pictures and judgement, and writes what it would have written."""

import contextlib
import json
import sys
from unittest import mock

import torch

from masked_ldm import train as module
from masked_ldm.train import TrainConfig, Trainer


def _doubled(networks):
    for n in networks:
        for m in (n.unet, n.vae, n.text_encoder) if hasattr(n, "vae") else (n,):
            m is None or m.double()
    return networks


def _batch(samples):
    b = collate(samples)
    for k, v in vars(b).items():
        if torch.is_tensor(v) and v.is_floating_point():
            setattr(b, k, v.double())
    return b


load_networks, collate = module.load_networks, module.collate


@contextlib.contextmanager
def float64():
    "Inside, trainers are built and step in float64."
    with (
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        mock.patch.object(module, "load_networks", lambda *a: _doubled(load_networks(*a))),
        mock.patch.object(module, "collate", _batch),
        mock.patch.object(Trainer, "grid", lambda self: None),
    ):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


if __name__ == "__main__":
    with float64():
        module.train(TrainConfig.make(**json.loads(sys.argv[1])))
