"""A program that tests start with torchrun: `training_child.py sharded|copied OPTIONS`.

It finetunes with the pickled options in the file OPTIONS. With "sharded", FSDP2 divides the weights. In
accelerate that needs GPUs, so its state is patched to accept CPUs; everything else is as on GPUs.
"""

import pickle
import sys
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from deepinsert.controller.finetuning import finetune

stock_init = AcceleratorState.__init__


def init_sharded(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    stock_init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


if __name__ == "__main__":
    if sys.argv[1] == "sharded":
        AcceleratorState.__init__ = init_sharded
    with open(sys.argv[-1], "rb") as file:
        options = pickle.load(file)
    finetune.run(options)
