"""`merge(probe=ids)` computes the model's outputs before and after, and undoes a merge that lies.

A merge is wrong where the model reads what is merged in another way than by calling the leaf, where
a format rounds the change away, and where half precision adds up too many merges. `tolerance` looks
at each weight alone. A probe looks at what the model computes.

    error = ||after - before|| / ||before||            over all outputs

`ALLOWED` is its bound, by the dtype of a dense model: about ten times the error of a merge that
works. A LoRA that was trained on tiny gave 2e-7 in float32 and 3e-3 in bfloat16; over int8 0.0015,
over int4 and NF4 0.02 to 0.04, and over 3 bits 0.2, which is another model.
"""

import torch

from minillm.registry.kinds import Format
from minillm.registry.sites import bare

ALLOWED = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
ROUNDED = 0.1  # for a model with a format


@torch.no_grad()
def outputs(model, probe):
    """What the model computes of `probe` in eval mode, in float64; TypeError if it is no tensor."""
    modes = {module: module.training for module in model.modules()}
    try:
        found = model.eval()(probe)
    finally:
        for module, mode in modes.items():
            module.training = mode
    found = getattr(found, "logits", found)
    if not isinstance(found, torch.Tensor) or not found.is_floating_point():
        raise TypeError(f"probe: the model's forward returned {type(found).__name__}, which cannot "
                        "be compared: it has to return a tensor, or an object with .logits")
    return found.double()


def allowed_of(model):
    """The default bound for a model."""
    if any(isinstance(module, Format) for module in bare(model).modules()):
        return ROUNDED
    dtypes = [p.dtype for p in model.parameters() if p.dtype in ALLOWED]
    return max((ALLOWED[dtype] for dtype in dtypes), default=ALLOWED[torch.float32])


def check(before, after, allowed, called, plan):
    """ValueError if the outputs differ by more than `allowed`.

    plan: [(site, patch, new base, rounding error of its format as a share of the change)].
    """
    error = ((after - before).norm() / before.norm()).item()
    if error <= allowed or torch.equal(after, before):
        return error
    most = sorted(plan, key=lambda one: one[3], reverse=True)[:3]
    worst = ", ".join(f"{site.name!r} {rounding:.2g}" for site, _, _, rounding in most)
    raise ValueError(f"merging {called} changes what the model computes: its outputs for the probe "
                     f"differ by {error:.2g} of their size, more than allowed={allowed:.2g}. The "
                     f"largest rounding errors, as a share of the change: {worst}. Nothing is "
                     "merged")
