"""Start a script with FSDP2 on a CPU too: python tests/spread_on_cpu.py train.py --fsdp full_shard …

accelerate knows FSDP on accelerators alone and would take DDP instead; FSDP2 itself computes on any device.
"""

import runpy
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.argv = sys.argv[1:]

from utils import trainer  # noqa: E402 (found from here on)

make = AcceleratorState.__init__


def spread(self, *args, fsdp_plugin=None, **kwargs) -> None:
    make(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def told(block, fully_shard=trainer.fully_shard, **settings):
    print(f"FSDP2 spreads a {type(block).__name__}")
    return fully_shard(block, **settings)


AcceleratorState.__init__, trainer.fully_shard = spread, told
trainer.NOT_SPREAD = ()
runpy.run_path(sys.argv[0], run_name="__main__")
