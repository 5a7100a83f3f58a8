"""Structured pruning: remove whole neurons, heads or layers, so that the matrices are smaller.

    neurons    of each MLP          the rows of W_gate and W_up, the columns of W_down
    heads      of each attention    the rows of W_q, W_k and W_v, the columns of W_o
    layers     whole blocks

A mask leaves the matrices as large as they were. Here their shapes change, and so does the
configuration: what is left is an ordinary smaller model, which is saved, exported and tuned as any
other. It computes what the whole model computes with the removed parts at zero. There is no
`unwrap`, because nothing keeps the old weights.

Every block loses the same number of parts, because one number of the configuration stands for all
blocks. A technique that is attached knows the old shapes: so `remove` comes before every `wrap`, or
after a `merge`.

>>> import torch, minillm
>>> model = minillm.Transformer(minillm.Config(vocab_size=50, width=8, layers=3, heads=4, ffn=16))
>>> model = minillm.prune.structured.neurons.remove(model, share=0.25)
>>> model = minillm.prune.structured.heads.remove(model, share=0.5)
>>> model = minillm.prune.structured.layers.remove(model, which=[1])
>>> c = model.config
>>> c.ffn, c.heads, c.layers, model.layers[0].mlp.down_proj.weight.shape
(12, 2, 2, torch.Size([8, 12]))
"""

from minillm.prune.structured import heads, layers, neurons

__all__ = ["heads", "layers", "neurons"]
