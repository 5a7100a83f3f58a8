"""The training loop: batches, the loss, the schedule, evaluation, checkpoints, the log.

    loop          `train`, and one optimizer step from top to bottom: read `update` first
    many          `many`: several LoRAs at once, each as if it were trained alone
    settings      its arguments, checked
    room          whether the model has the positions and the ids of the examples
    schedules     the learning rate over the steps
    groups        the learning rate of each group of parameters: by depth, by role, LoRA+
    finder        the learning-rate range test
    masters       float32 copies of parameters in half precision
    losses        the loss of a batch, and of held-out examples
    openings      what the functions `loss=` and `on_step=` may do
    distill       a loss: learn from a teacher's probabilities
    history       the log, its summary and its picture
    checkpoints   a file with all that a training changes, and how a training resumes from it
    state         what a training changes: tensors, and the options of patches
    disk          whether the disk has room for the outputs, checked before the training
    rescue        what is saved if the disk is full after all, or if the last write fails
    identity      the model, techniques and data that a checkpoint belongs to
    interrupt     Ctrl-C
    sharding      `shard`: the weights spread over several processes

- The loss of a step is the sum over all its micro-batches divided by the number of tokens
  that all of them learn. So `accumulate=k` is the same step as a batch k times as large.
  (A mean of means weighs short examples more; trl and torchtune both had to fix this.)
- An interrupted training resumes from its newest checkpoint, and every later loss is the
  same to the last bit.
- Under torchrun each process computes its share of every batch; the losses stay those of
  one process (see `minillm.distributed`).
- transformers' Trainer does this and far more behind callbacks and 100 arguments. Not
  included: mixed precision by autocast (a bfloat16 model needs none: its adapters are float32,
  or AdamW steps float32 copies of what learns, see `masters`).
"""

from minillm.train import distill, schedules
from minillm.train.checkpoints import clear, newest, restore, saved
from minillm.train.disk import check_disk, checkpoint_needs
from minillm.train.finder import Found, find_rate
from minillm.train.groups import by_role, groups, layerwise, times
from minillm.train.history import Summary, check_log, check_picture, picture, summary
from minillm.train.interrupt import Interrupted
from minillm.train.loop import train
from minillm.train.losses import held_out_loss, loss_sum
from minillm.train.many import Diverged, many
from minillm.train.room import check_room
from minillm.train.schedules import SCHEDULES, rate
from minillm.train.sharding import shard

__all__ = [
    "SCHEDULES", "Diverged", "Found", "Interrupted", "Summary", "by_role", "check_disk",
    "check_log", "check_picture", "check_room", "checkpoint_needs", "clear", "distill", "find_rate",
    "groups", "held_out_loss", "layerwise", "loss_sum", "many", "newest", "picture", "rate",
    "restore", "saved", "schedules", "shard", "summary", "times", "train",
]
