"""The section of the model. Imports no torch."""

import math
from dataclasses import dataclass

from caduceus.alphabet import VOCABULARIES, Vocabulary
from caduceus.config.keys import check_section, key
from caduceus.errors import UserError

CHUNK = 64
"""Positions of a chunk of Mamba-2's scan. With longer chunks the products within them grow, and the states between them
take less.

It is not a key, as it changes only the order of sums.
"""
MOST_IN_KERNELS = 64
"""Channels of a head, and states, up to which Mamba-2's scan has kernels on a GPU: a program's tiles then fit in its
registers."""


@dataclass
class CaduceusConfig:
    """The model. Keys and defaults are the published ones (Schiff et al. 2024, arXiv:2403.03234)."""

    d_model: int = key(256, "Width of one strand's hidden state.", fixes="numbers", least=1)
    n_layer: int = key(4, "Blocks of the model.", fixes="numbers", least=1)
    vocab_size: int = key(
        12,
        "Number of tokens, which decides the vocabulary: 12 is that of Caduceus, 8 that of PlantCAD. Each has its own "
        "ids and complement. Inputs, masks and labels follow it; shards serve both.",
        fixes="numbers",
        choices=tuple(VOCABULARIES),
    )
    pad_vocab_size_multiple: int = key(
        8, "The vocabulary is padded up to a multiple of this.", fixes="numbers", least=1
    )
    mixer: str = key(
        "mamba",
        "What lets the bases of a sequence see each other. mamba2 has one decay for each head of inner channels, and "
        "the same B and C for all heads, so that its scan is a matrix product. PlantCAD2 uses it, with d_state 64.",
        fixes="numbers",
        choices=("mamba", "mamba2"),
    )
    d_state: int = key(16, "States per inner channel of the scan.", fixes="numbers", least=1)
    headdim: int = key(
        64, "mamba2: inner channels of a head. It has to divide expand times d_model.", fixes="numbers", least=1
    )
    d_conv: int = key(4, "Width of the causal convolution, in bases.", fixes="numbers", least=1)
    expand: int = key(2, "Inner channels per model channel.", fixes="numbers", least=1)
    rcps: bool = key(
        False,
        "true is Caduceus-PS: both strands share parameters, and the model is reverse-complement equivariant. false "
        "is Caduceus-Ph.",
        fixes="numbers",
    )
    bidirectional: bool = key(True, "Scan every sequence in both directions.", fixes="numbers")
    bidirectional_strategy: str = key(
        "add", "How the outputs of the two directions are joined.", fixes="numbers", choices=("add", "ew_multiply")
    )
    bidirectional_weight_tie: bool = key(
        True, "Share the in and out projections between the directions.", fixes="numbers"
    )
    rms_norm: bool = key(True, "true is RMSNorm, false is LayerNorm.", fixes="numbers")
    norm_epsilon: float = key(1e-5, "Added to the variance in a norm.", fixes="numbers", above=0)
    residual_in_fp32: bool = key(
        True,
        "true sums the blocks' outputs in fp32. false sums them in the type of products (bf16 with `train.precision: "
        "bf16`), which takes less memory and rounds every sum. (Published training was in fp32 with both values, "
        "because its embeddings are fp32.)",
        fixes="numbers",
    )
    fused_add_norm: bool = key(
        True,
        "With rcps, the form of the block: true swaps the strands in every block, as the published checkpoints were "
        "trained; false is the paper's equation. Without rcps both are the same function.",
        fixes="numbers",
    )

    @property
    def d_inner(self) -> int:
        """Inner channels E of the scan."""
        return self.expand * self.d_model

    @property
    def heads(self) -> int:
        """Heads H of a Mamba-2."""
        return self.d_inner // self.headdim

    @property
    def dt_rank(self) -> int:
        """Rank of the projection that makes the step sizes."""
        return math.ceil(self.d_model / 16)

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokens of inputs and labels."""
        return VOCABULARIES[self.vocab_size]

    @property
    def padded_vocab_size(self) -> int:
        multiple = self.pad_vocab_size_multiple
        return math.ceil(self.vocab_size / multiple) * multiple

    def __post_init__(self) -> None:
        check_section("model", self)
        if self.mixer == "mamba2" and self.d_inner % self.headdim:
            raise UserError(
                f"model.headdim: {self.headdim} does not divide the {self.d_inner} inner channels "
                f"(model.expand {self.expand} times model.d_model {self.d_model})"
            )
