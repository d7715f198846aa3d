"""Where a source's k-th sample lies. An epoch has every crop once, and may tile the windows anew. Imports no torch.

Nothing is replayed: the tiling of an epoch is a function of (seed, source, epoch), and the number of crops in each
earlier epoch tells in which epoch a sample lies.
"""

from abc import ABC, abstractmethod

import numpy as np

from caduceus.data.crops import CropTable
from caduceus.data.order import EpochOrder, Purpose, key


class Epochs(ABC):
    """The crops of every source's own samples.

    Attributes: `bases_seen` (S,): bases in crops of the first epoch; `differ`: whether epochs hold different bases.
    """

    bases_seen: np.ndarray
    differ = False

    def __init__(self, crops: CropTable, seed: int, shuffle_block: int) -> None:
        self._crops, self._seed, self._shuffle_block = crops, seed, shuffle_block
        self._order = EpochOrder(crops.crops_of_shard, crops.shards_of_source, seed, shuffle_block)

    @abstractmethod
    def locate(self, source: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each source's own sample k -> window (n,) and `begin` (n,), as `CropTable.locate` has them."""

    def draw(self, source: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A random crop of each source (n,), chosen by the keys (n,) alone; returns what `locate` returns."""
        return self._crops.locate(self._order.draw(source, keys))

    @abstractmethod
    def passed(self, drawn: np.ndarray) -> np.ndarray:
        """Epochs (S,) float64 that the first `drawn` (S,) samples of each source make."""


class EqualEpochs(Epochs):
    """Every epoch has the same crops."""

    def __init__(self, crops: CropTable, seed: int, shuffle_block: int) -> None:
        super().__init__(crops, seed, shuffle_block)
        self.bases_seen = crops.bases_of_source

    def locate(self, source: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._crops.locate(self._order.locate(source, k))

    def passed(self, drawn: np.ndarray) -> np.ndarray:
        return drawn / self._order.sizes


class ShiftedEpochs(Epochs):
    """Every epoch of a source shifts the tiling of its windows, so that borders move."""

    differ = True

    def __init__(self, crops: CropTable, seed: int, shuffle_block: int) -> None:
        super().__init__(crops, seed, shuffle_block)
        sources = range(len(crops.tables))
        self._offsets: list[list[int]] = [[] for _ in sources]
        self._before = [[0] for _ in sources]  # crops before each epoch
        widths = np.cumsum([0] + [len(table.rows) for table in crops.tables])
        self.bases_seen = np.concatenate(
            [
                crops.shifted(source, self._offset(source, 0)).bases(widths[source : source + 2] - widths[source])
                for source in sources
            ]
        )

    def locate(self, source: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        window, begin, epoch, position = (np.empty_like(k) for _ in range(4))
        for one in np.unique(source).tolist():
            here = source == one
            epoch[here], position[here] = self._epochs(one, k[here])
        for one, number in {*zip(source.tolist(), epoch.tolist(), strict=True)}:
            here = (source == one) & (epoch == number)
            offset = self._offset(one, number)
            tiling = self._crops.shifted(one, offset)
            seed = int(key(self._seed, Purpose.OFFSET, one, number)[0])
            order = EpochOrder(tiling.crops_of_shard, [len(tiling.crops_of_shard)], seed, self._shuffle_block)
            crops = order.locate(np.zeros(int(here.sum()), np.int64), position[here])
            window[here], begin[here] = self._crops.locate_shifted(one, offset, crops)
        return window, begin

    def passed(self, drawn: np.ndarray) -> np.ndarray:
        found = []
        for source, k in enumerate(drawn.tolist()):
            (epoch,), (position,) = self._epochs(source, np.array([k]))
            found.append(epoch + position / (self._before[source][epoch + 1] - self._before[source][epoch]))
        return np.array(found)

    def _epochs(self, source: int, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epoch and place in it of samples k (n,) of a source."""
        before = self._before[source]
        while before[-1] <= k.max(initial=0):
            offset = self._offset(source, len(before) - 1)
            before.append(before[-1] + self._crops.shifted(source, offset).size)
        edges = np.array(before)
        epoch = np.searchsorted(edges, k, side="right") - 1
        return epoch, k - edges[epoch]

    def _offset(self, source: int, epoch: int) -> int:
        """The base at which the tiles of an epoch begin; 0 where the shifted tiles would have no crop with
        enough ACGT.
        """
        offsets = self._offsets[source]
        while len(offsets) <= epoch:
            draw = key(self._seed, Purpose.OFFSET, source, len(offsets), 0)
            offset = int(draw[0] % np.uint64(self._crops.seq_len))
            offsets.append(offset if self._crops.shifted(source, offset).size else 0)
        return offsets[epoch]
