"""``fot`` under FSDP on the CPU, where accelerate has to be told that it shards.

accelerate launch --multi_gpu --num_processes 2 tests/sharded_run.py train RECIPE --out OUT
"""

import os
from typing import Any

from accelerate import state
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from fot.cli import program


def shard_on_cpu() -> None:
    """accelerate takes FSDP for GPUs alone; torch's ``fully_shard`` works over gloo as well."""
    plain = state.AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        fresh = "fsdp_plugin" not in self._shared_state
        plain(self, *args, **kwargs)
        if fresh:
            self.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            )
            self.distributed_type = DistributedType.FSDP
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    state.AcceleratorState.__init__ = init  # type: ignore[method-assign]


if __name__ == "__main__":
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    shard_on_cpu()
    program()
