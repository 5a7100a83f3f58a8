"""Sharding: each process holds 1/world of every weight, and gets the rest when a block needs it.

FSDP2, after ZeRO-3, Rajbhandari et al. 2020, arXiv 1910.02054. The forward and the backward of a
block gather its weights from all processes and drop them again. So a process holds its share of
the weights, gradients and optimizer states, and the whole of one block.

    minillm.distributed.start()
    minillm.lora.wrap(model)
    minillm.train.shard(model)
    minillm.train.train(model, examples, ...)

The registry says which modules the blocks are. What is not in a block (the embedding, the last
norm, the head) is gathered at the start and kept to the end of the pass. `train` does the rest,
and what `save` and the checkpoints write is whole again.

Not included: mixed precision inside FSDP (choose the dtypes yourself, as on one device), and
wrapping or merging a sharded model, whose new parameters FSDP would not know.
"""

import torch.distributed as dist
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from minillm.registry import roles


def shard(model):
    """Spread every weight of the model over the processes, block by block; in place, returns it.

    Wrap the model with techniques before: theirs are spread as well. RuntimeError if there are
    no other processes. ValueError if it is not clear which modules the blocks are.
    """
    if not dist.is_initialized():
        raise RuntimeError("shard needs several processes: start the program with torchrun, and "
                           "call minillm.distributed.start()")
    for site in roles.blocks(model):
        fully_shard(site.layer or site.module)
    fully_shard(model)
    if callable(getattr(model, "loss", None)):
        register_fsdp_forward_method(model, "loss")
    return model
