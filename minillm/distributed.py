"""One training in several processes, started by torchrun: each computes its rows of every batch.

    gradient = sum over processes of (gradient of its summed loss) / (learnt tokens of the batch)

    data parallel   each process holds the whole model; the gradients are summed
    sharded         each holds 1/world of every weight: call `minillm.train.shard(model)` before
                    the training

Data parallel: DDP, Li et al. 2020, arXiv 2006.15704. Sharded: see `minillm.train.sharding`.

Every process draws the whole batch, which is only ids, and takes every world-th row. So the order
of the data does not depend on the number of processes, each process knows the number of learnt
tokens without communication, and the losses equal those of one process. (Both of torch's wrappers
take the mean over the processes: multiplying by their number makes it the sum.)

accelerate and the Trainer hide this behind a launcher's configuration; here it is two functions
that `train` calls. Not included: tensor and pipeline parallelism.
"""

import atexit
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel


def start():
    """Join the processes that torchrun started, if it did; returns the device of this process.

    The backend is NCCL with CUDA, else gloo.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)  # before init_process_group, which uses the current device
    if "RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
        atexit.register(dist.destroy_process_group)
    return device


def place():
    """(this process's rank, the number of processes): (0, 1) if there is only one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Loss(nn.Module):
    """loss(model, ids, labels, mask) as the forward of a module, because DDP wraps a module."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *batch):
        return self.loss(self.model, *batch)


def spread(model, loss):
    """`loss` as a function of a batch; its backward leaves the mean gradient in all processes."""
    if place()[1] == 1 or isinstance(model, FSDPModule):
        return Loss(model, loss)
    return DistributedDataParallel(Loss(model, loss))


def rows(batch):
    """This process's rows of a batch, a tuple of tensors (b, ...) or None."""
    rank, world = place()
    check_rows(len(batch[0]), len(batch[0]))
    return tuple(None if t is None else t[rank::world] for t in batch)


def check_rows(examples, batch_size):
    """ValueError if the last batch of an epoch has fewer rows than there are processes.

    examples: how many an epoch has.
    """
    world = place()[1]
    least = min(examples % batch_size or batch_size, examples)
    if least < world:
        raise ValueError(f"a batch of {least} rows cannot be shared by {world} processes: choose "
                         "batch_size, and the number of examples, so that the last batch of an "
                         "epoch has a row for each process")


def total(value, device):
    """The sum of a number over the processes."""
    if place()[1] == 1:
        return value
    value = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(value)
    return value.item()


def largest(number, device):
    """The largest of the processes' numbers."""
    if place()[1] == 1:
        return number
    value = torch.tensor(number, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def gathered(value):
    """The tensors of all processes, a list in the order of their ranks."""
    values = [None] * place()[1]
    if len(values) == 1:
        return [value]
    dist.all_gather_object(values, value)
    return values


def wait():
    """Wait for all processes. What the first has written before, the others can read after."""
    if place()[1] > 1:
        dist.barrier()


def sharded(model):
    """Whether the weights of the model are spread over several processes."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def whole(t):
    """The whole of a tensor that may be spread over the processes. Every process must call it."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def apart(tensors):
    """{name: tensor}, each whole, contiguous and in memory of its own, as safetensors needs them.

    Every process must call it.
    """
    seen, found = set(), {}
    for name, t in tensors.items():
        t = whole(t).contiguous()
        memory = t.device, t.untyped_storage().data_ptr()
        found[name] = t.clone() if memory in seen else t
        seen.add(memory)
    return found


def like(t, parameter):
    """A whole tensor, spread over the processes as the parameter is, and on its device."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(t, parameter.device_mesh, parameter.placements)
    return t.to(parameter.device)
