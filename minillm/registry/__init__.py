"""The one mechanism that all techniques share. Read `layer` first.

    leaf         a module with one weight matrix
    layer        Layer: a base and the patches around it
    kinds        Patch and Format, from which every technique is made
    shared       what the patches of one wrap share
    sites        the places of a model's tree
    targets      which sites a technique wraps
    table        all kinds and methods
    instead      what computes classes and not tokens
    batch        what techniques add to a batch
    learning     which of the model's own parameters learn
    names        which adapters take part
    attach       how a patch or a format is put into the model
    verbs        unwrap, unmerge; with `merging` and `probe`
    store        save, load; with `learned` and `fingerprint`
"""

from minillm.registry.batch import prepare, same_shape
from minillm.registry.kinds import CannotMerge, Format, Patch
from minillm.registry.layer import Below, Layer, dense, leaf
from minillm.registry.leaf import LEAVES, Leaf, kept
from minillm.registry.names import rows, use
from minillm.registry.sites import Site, layers, parameters, ties, untie, walk
from minillm.registry.table import (
    KINDS, METHODS, attached, formats_of, method, patches_of, register, techniques,
)
from minillm.registry.targets import computed, hidden_linears, hint, select

__all__ = [
    "Below", "CannotMerge", "Format", "KINDS", "LEAVES", "Layer", "Leaf", "METHODS", "Patch",
    "Site", "attached", "computed", "dense", "formats_of", "hidden_linears", "hint", "kept",
    "layers", "leaf", "method", "parameters", "patches_of", "prepare", "register", "rows",
    "same_shape", "select", "techniques", "ties", "untie", "use", "walk",
]
