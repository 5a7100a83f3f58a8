"""AdaLoRA in peft's files: only the ranks that were kept, and a list that says which they were.

    lora_A (k, in), lora_B (out, k), lora_E (k, 1)    of the k ranks of a module that were kept
    rank_pattern    {module + ".lora_E": [True, False, ...]}, one entry for each rank of birth

The scale is alpha / init_r, also after cuts.
"""

import torch

DEFAULTS = dict(init_r=12, lora_alpha=8)  # peft's


def holds(patch):
    """Which ranks go to the file (r,): the kept ones, and others whose λ is not 0 (any more)."""
    return patch.kept | (patch.E != 0)


def tensors(patch):
    kept = holds(patch)
    return {"lora_A": patch.Q[kept], "lora_B": patch.P[:, kept], "lora_E": patch.E[kept][:, None]}


def settings(config, found, places):
    """The settings of a file. ValueError for patches of several ranks or scales: peft has one."""
    first = found[0][1]
    for site, patch in found:
        if (patch.r, patch.alpha) != (first.r, first.alpha):
            raise ValueError(
                f"{site.name!r} has the rank {patch.r} at birth and alpha={patch.alpha}, and "
                f"{found[0][0].name!r} {first.r} and {first.alpha}: a file of peft has one number "
                "for all. Wrap with a smaller r, or only leaves that have this rank")
    kept = {f"{places[site.name]}.lora_E": holds(patch).tolist() for site, patch in found}
    cut = not all(map(all, kept.values()))
    average = round(sum(map(sum, kept.values())) / len(kept))
    # peft refuses a file without total_step; nothing else of it is used after the training
    return dict(config, init_r=first.r, target_r=max(1, average), lora_alpha=first.alpha,
                lora_dropout=first.dropout, rank_pattern=kept if cut else None, total_step=1,
                bias="none")


def options(config):
    return dict(r=config.get("init_r", DEFAULTS["init_r"]),
                alpha=config.get("lora_alpha", DEFAULTS["lora_alpha"]),
                dropout=config.get("lora_dropout", 0.0))


def whole(part, config, module, path):
    """Our tensors, of all ranks of birth; those that were cut are 0. part: P, Q and E of a file.

    ValueError if the file's lists and its tensors contradict each other.
    """
    r = options(config)["r"]
    lists = {key.removesuffix(".default"): value
             for key, value in (config.get("rank_pattern") or {}).items()}
    kept = lists.get(f"{module}.lora_E", [True] * r)
    fits = isinstance(kept, list) and len(kept) == r and all(type(one) is bool for one in kept)
    if not fits:
        raise ValueError(f"{path}: rank_pattern says of {module!r} {kept!r}, which is no list of "
                         f"init_r = {r} true or false")
    shapes = {key: t.shape for key, t in part.items()}
    if set(part) != {"P", "Q", "E"} or not (
            len(part["Q"]) == part["P"].shape[-1] == part["E"].numel() == sum(kept)):
        raise ValueError(f"{path}: {module!r} keeps {sum(kept)} ranks by rank_pattern, and has the "
                         f"tensors { {key: tuple(shape) for key, shape in shapes.items()} }")
    kept = torch.tensor(kept)
    found = dict(P=part["P"].new_zeros(len(part["P"]), r), E=part["E"].new_zeros(r),
                 Q=part["Q"].new_zeros(r, part["Q"].shape[1]), kept=kept)
    found["P"][:, kept], found["E"][kept] = part["P"], part["E"].flatten()
    found["Q"][kept] = part["Q"]
    return found
