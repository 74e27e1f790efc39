"A program for torchrun: runs, one after the other, in float64, whose branch is cut by FSDP; on the CPU, where accelerate by itself only shares the batch."

import json
import os
import sys

os.environ.update(ACCELERATE_USE_CPU="true", ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from in_float64 import float64
from torch.distributed.fsdp import FSDPModule

from masked_ldm.train import TrainConfig, Trainer, train

begin, preflight = AcceleratorState.__init__, Trainer.preflight


def _cut(self, *args, fsdp_plugin=None, **kw):
    begin(self, *args, fsdp_plugin=fsdp_plugin, **kw)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = (
            DistributedType.FSDP
        )


def _seen(self):
    assert isinstance(self.branch, FSDPModule)
    return preflight(self)


if __name__ == "__main__":
    AcceleratorState.__init__, Trainer.preflight, Accelerator.end_training = (
        _cut,
        _seen,
        lambda self: None,
    )  # the next run needs the processes joined
    for given in json.loads(sys.argv[1]):
        with float64():
            train(TrainConfig.make(**given))
