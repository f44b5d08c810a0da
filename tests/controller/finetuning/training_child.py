"""Started by torchrun in tests: `training_child.py [sharded] OPTIONS` finetunes with the pickled options.

With "sharded" the weights are divided by FSDP2, which accelerate offers on GPUs alone: its state is told that
the processes' CPUs do it too, and everything else is as it is on GPUs.
"""

import pickle
import sys

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from deepinsert.controller.finetuning import finetune

stock = AcceleratorState.__init__


def shard(self, *args, fsdp_plugin=None, **kwargs):
    stock(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


if __name__ == "__main__":
    if sys.argv[1] == "sharded":
        AcceleratorState.__init__ = shard
    with open(sys.argv[-1], "rb") as file:
        options = pickle.load(file)
    finetune.run(options)
