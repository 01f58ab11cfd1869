"""FSDP2 on a CPU. accelerate shards on accelerators alone, so gloo is passed off as the backend of one."""

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

VARIABLES = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def shard_on_a_cpu() -> None:
    """Call it before anything asks accelerate for its state, in processes that torchrun started with `VARIABLES`."""
    PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    PartialState.default_device = property(lambda self: torch.device("cpu"))
