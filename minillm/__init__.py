"""minillm: how a language model is fine-tuned and made small, one page for each technique.

Fine-tuning, wrapped in place with `minillm.NAME.wrap(model)`:

    freeze             trains the last blocks only
                       Howard & Ruder 2018, arXiv 1801.06146
    freeze.bitfit      trains the biases only
                       Ben Zaken et al. 2022, arXiv 2106.10199
    freeze.norms       trains the norms only
                       Zhao et al. 2023, arXiv 2312.11420
    prompts            learns vectors that come before the text
                       Lester et al. 2021, arXiv 2104.08691
    prompts.ptuning    a small network computes the vectors before the text
                       Liu et al. 2021, arXiv 2103.10385
    prompts.prefix     learns keys and values that come before the text, in each layer
                       Li & Liang 2021, arXiv 2101.00190
    lora               learns a low-rank change of each weight
                       Hu et al. 2021, arXiv 2106.09685
    lora.dora          LoRA for each weight's direction, and its length apart
                       Liu et al. 2024, arXiv 2402.09353
    lora.pissa         LoRA that starts with the principal part of each weight
                       Meng et al. 2024, arXiv 2404.02948
    lora.loftq         LoRA that starts with what rounding a weight will lose
                       Li et al. 2023, arXiv 2310.08659
    lora.adalora       LoRA whose ranks are allotted to the weights in training
                       Zhang et al. 2023, arXiv 2303.10512
    lora.vera          one random low-rank pair for all weights; scales of it learn
                       Kopiczko et al. 2024, arXiv 2310.11454
    lora.loha          multiplies two low-rank changes of each weight, entry by entry
                       Hyeon-Woo et al. 2022, arXiv 2108.06098
    lora.lokr          repeats a small matrix over each weight, with a learnt factor per copy
                       Yeh et al. 2024, arXiv 2309.14859
    adapters           puts a small network after each sublayer
                       Houlsby et al. 2019, arXiv 1902.00751
    adapters.compacter adapters whose matrices are sums of Kronecker products
                       Mahabadi et al. 2021, arXiv 2106.04647
    adapters.ia3       learns a factor for each key, value and inner activation
                       Liu et al. 2022, arXiv 2205.05638
    adapters.parallel  puts a small network beside each MLP, with the MLP's input
                       He et al. 2022, arXiv 2110.04366
    classify           puts a head of classes in the place of the head
                       Howard & Ruder 2018, arXiv 1801.06146

Making it small, wrapped in place with `minillm.NAME.wrap(model)`:

    quant              stores weights as integers of 2 to 8 bits; a row or group shares a scale
                       Dettmers et al. 2022, arXiv 2208.07339
    quant.gptq         rounds column by column; the remaining columns compensate
                       Frantar et al. 2022, arXiv 2210.17323
    quant.nf4          stores weights in 4 bits, as codes of 16 quantiles of a normal distribution
                       Dettmers et al. 2023, arXiv 2305.14314
    quant.fp4          stores weights in 4 bits, as floats of 4 bits
                       Dettmers et al. 2023, arXiv 2305.14314
    quant.fp8          stores weights as floats of 8 bits, with a scale for each row
                       Micikevicius et al. 2022, arXiv 2209.05433
    quant.qat          trains with rounded weights, to store them rounded
                       Jacob et al. 2018, arXiv 1712.05877
    prune              zeroes the smallest weights
                       Han et al. 2015, arXiv 1506.02626
    prune.wanda        zeroes small weights with small inputs
                       Sun et al. 2023, arXiv 2306.11695
    sparse             stores only the nonzero weights (CSR)
                       Saad 2003

Beneath them:

    registry       Layer, Patch and Format, and the verbs that all techniques share
    model          the transformer and its tokenizers
    data           tasks, files of records, batches
    distributed    training in several processes

Around them:

    augment        more training data from the data that is there; NEFTune's noise
    train          the training loop and its checkpoints
    measure        perplexity, accuracy, F1, BLEU, ROUGE; parameters and bytes
    checkpoints    Hugging Face directories and GGUF files, both ways
    zoo            the models that have a name
    compare        all techniques side by side
"""

# isort: skip_file  (the order is the order of the table)
from minillm.registry import (
    CannotMerge, Format, Layer, Patch, layers, prepare, rows, techniques, untie, use,
)
from minillm.model.transformer import Cache, Config, Transformer, compile
from minillm import freeze
import minillm.freeze.bitfit
import minillm.freeze.gradual
import minillm.freeze.norms
from minillm import prompts
import minillm.prompts.ptuning
import minillm.prompts.prefix
from minillm import lora
import minillm.lora.combine
import minillm.lora.dora
import minillm.lora.pissa
import minillm.lora.loftq
import minillm.lora.adalora
import minillm.lora.budget
import minillm.lora.orthogonal
import minillm.lora.vera
import minillm.lora.loha
import minillm.lora.lokr
import minillm.lora.many
from minillm import adapters
import minillm.adapters.compacter
import minillm.adapters.ia3
import minillm.adapters.parallel
from minillm import classify
from minillm import quant
import minillm.quant.gptq
import minillm.quant.nf4
import minillm.quant.fp4
import minillm.quant.fp8
import minillm.quant.qat
from minillm import prune
import minillm.prune.gradual
import minillm.prune.structured
import minillm.prune.wanda
from minillm import sparse
from minillm import augment
from minillm import data, distributed, train, measure, checkpoints, zoo, compare
from minillm.measure import report
from minillm.measure.show import show
import minillm.checkpoints.peft
from minillm.checkpoints import save
from minillm.checkpoints.together import load_all, save_all
from minillm.zoo import load

__all__ = [
    "Cache", "CannotMerge", "Config", "Format", "Layer", "Patch", "Transformer", "adapters",
    "augment", "classify", "compare", "compile", "data", "checkpoints", "distributed", "freeze",
    "layers", "load", "load_all", "lora", "measure", "prepare", "prompts", "prune", "quant",
    "report", "rows", "save", "save_all", "show", "sparse", "techniques", "train", "untie", "use",
    "zoo",
]
