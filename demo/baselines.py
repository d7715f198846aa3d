"""Baselines for the demo's model, scored on exactly the labelled bases of its validation."""

from collections.abc import Iterator

import numpy as np

from caduceus.alphabet import CADUCEUS, IGNORE_LABEL
from caduceus.config import Config
from caduceus.data import ShardedGenome
from caduceus.data.loader import build_validation
from demo import kmer
from demo.report import Row

COMPOSITION = "base composition"
NO_CONTEXT = "k-mer context (k = 0)"
MAX_K = 4
ALPHA = 64.0
"""Pseudo-counts of the smoothing: the best of 1, 4, 16, 64 and 256 on the validation species itself, which favours the
k-mer models; they differ by 0.002 nats.
"""


def training_sequences(directory: str) -> Iterator[np.ndarray]:
    """Codes of every window of the training split, forward strand."""
    genome = ShardedGenome(directory)
    for species in genome.species:
        table = genome.table(species, "train")
        for window in table.windows:
            start, contig = int(window["start"]), table.contigs[window["contig"]]
            bases = genome.read(species, contig, start, start + int(window["length"]))
            yield kmer.codes_of_tokens(CADUCEUS.encode(bases))


def validation_set(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels of all validation crops, (crops, seq_len) token ids each, the same as for the model."""
    batches = [(batch.input_ids.numpy(), batch.labels.numpy()) for _, batch in build_validation(config)]
    inputs, labels = zip(*batches, strict=True)
    return np.concatenate(inputs), np.concatenate(labels)


def score_baselines(config: Config) -> tuple[list[Row], int]:
    """Losses of guessing, base composition and the k-mer context models, and the number of labelled bases."""
    probabilities = kmer.smoothed_probabilities(kmer.count_contexts(training_sequences(config.data.path), MAX_K), ALPHA)
    inputs, labels = validation_set(config)
    labelled = labels != IGNORE_LABEL
    truth = kmer.codes_of_tokens(labels[labelled])
    shown = kmer.codes_of_tokens(inputs)
    random_prob = config.data.random_token_prob
    keep_prob = 1 - config.data.mask_token_prob - random_prob

    def predict(k: int) -> np.ndarray:
        return kmer.predict(probabilities, kmer.contexts(shown, k, MAX_K)[labelled])

    rows = [Row("guessing", "nothing", float(np.log(4))), Row(COMPOSITION, "nothing", kmer.loss(predict(0), truth))]
    for k in range(MAX_K + 1):
        predicted = kmer.given_shown_base(predict(k), shown[labelled], keep_prob, random_prob)
        name, sees = (f"k-mer context (k = {k})", f"{k} on either side") if k else (NO_CONTEXT, "the place itself")
        rows.append(Row(name, sees, kmer.loss(predicted, truth)))
    return rows, len(truth)
