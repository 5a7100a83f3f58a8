"""minillm: how a language model is fine-tuned and made small, a page a technique.

Fine-tuning, simplest first; every one is wrapped in place with `minillm.NAME.wrap(model)`:

    freeze      train the last blocks only                  Howard & Ruder 2018, arXiv 1801.06146
    prompts     learnt vectors before the text              Lester et al. 2021, arXiv 2104.08691
    lora        a low-rank change of each weight            Hu et al. 2021, arXiv 2106.09685
    adapters    a small network after each sublayer         Houlsby et al. 2019, arXiv 1902.00751

Making it small:

    quant       int8 weights, a scale for each row          Dettmers et al. 2022, arXiv 2208.07339
    prune       the smallest weights become zero            Han et al. 2015, arXiv 1506.02626
    sparse      store only what is not zero (CSR)           Saad 2003

What they stand on: `registry` (Layer, Patch, Format, targets), `transformer`, `hub` (checkpoints), `tokenizer`, `data`,
`train`, `distributed` (several processes), `evaluate`, `report`, and `compare`, which runs them all side by side.
"""

# isort: skip_file  (the order is the order of the table)
from minillm.registry import CannotMerge, Format, Layer, Patch, layers, prepare, techniques, untie
from minillm.transformer import Cache, Config, Transformer, compile
from minillm import freeze, prompts, lora, adapters
from minillm import quant, prune, sparse
from minillm import compare, data, distributed, evaluate, hub, report, train
from minillm.hub import load, save
from minillm.show import show

__all__ = [
    "Cache", "CannotMerge", "Config", "Format", "Layer", "Patch", "Transformer", "adapters", "compare", "compile", "data",
    "distributed", "evaluate", "freeze", "hub", "layers", "load", "lora", "prepare", "prompts", "prune", "quant", "report", "save", "show",
    "sparse", "techniques", "train", "untie",
]
