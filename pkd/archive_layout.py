"""Which row of which shard holds a teacher's soft target for a sample; pure.

Samples are ordered by label, then number, so that a block of them asks few specialists. So many of them in a row and one
view make a shard, which holds a matrix for each teacher: a row for each of the shard's samples that it is asked about.
A row's place then follows from the counts of labels alone; there is no table of samples by teachers.
"""

import numpy as np

from pkd.pyramid import Pyramid
from pkd.row_format import RowFormat
from pkd.schedule import BLOCK

# A view has FEW shards; up to MANY, for as many ranks to fill, where each still gets SMALL samples; more where one would get
# more than LARGEST.
FEW, MANY, SMALL, LARGEST = 16, 64, 1024, 8192
WHOLE = 128  # a shard of more samples has a multiple of it, lest teachers pad the last block of rows of each by much


class Layout:
    """samples: int64 ids of what students see; labels: int64 [samples of the data set]; formats: of the asked teachers,
    by index; own: a specialist is asked only about samples whose label it knows; views: how many of each sample.
    """

    def __init__(self, pyramid: Pyramid, samples: np.ndarray, labels: np.ndarray, formats: dict[int, RowFormat], own: bool,
                 views: int):
        self.labels, self.formats, self.views = labels, formats, views
        self.names = {index: pyramid.teachers[index].name for index in formats}
        self.order = samples[np.argsort(labels[samples], kind="stable")]
        self.place = np.full(len(labels), -1)
        self.place[self.order] = np.arange(len(samples))
        counts = np.bincount(labels[samples], minlength=len(pyramid.classes) + 1)  # the last: samples without a label
        self.start = np.cumsum(counts) - counts  # [classes + 1]: the place of a label's first sample
        self.known = pyramid.asked_about(own)
        rows = self.known * counts
        self.before = np.cumsum(rows, 1) - rows  # [teachers, classes + 1]: a teacher's rows of the labels before this one
        size = max(-(-len(samples) // MANY), min(-(-len(samples) // FEW), SMALL))
        whole = WHOLE if size > WHOLE else BLOCK
        self.per_shard = min(LARGEST, -(-size // whole) * whole)
        self.shards = -(-len(samples) // self.per_shard)  # of each view
        bounds = np.minimum(np.arange(self.shards + 1) * self.per_shard, len(samples))
        # [teachers, shards + 1]: a teacher's rows before each shard, of all labels
        self.first = self.known.astype(np.int64) @ np.clip(bounds - self.start[:, None], 0, counts[:, None])

    def locate(self, teacher: int, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row, int64 [ids], of a teacher's soft targets for samples that it is asked about."""
        place, label = self.place[ids], self.labels[ids]
        shard = place // self.per_shard
        return shard, self.before[teacher, label] + place - self.start[label] - self.first[teacher, shard]

    def asked(self, teacher: int) -> np.ndarray:
        """int64 ids of the samples that a teacher is asked about, in the order of its rows."""
        return self.order[self.known[teacher, self.labels[self.order]]]

    def samples(self, shard: int) -> np.ndarray:
        """int64 ids of a shard's samples, in order."""
        return self.order[shard * self.per_shard:(shard + 1) * self.per_shard]

    def shapes(self, shard: int) -> dict[str, tuple[int, int]]:
        """Teacher -> rows and columns of its matrix in a shard."""
        rows = self.first[:, shard + 1] - self.first[:, shard]
        return {self.names[index]: (int(rows[index]), form.columns) for index, form in self.formats.items()}

    @property
    def bytes(self) -> int:
        """Of all soft targets of all views."""
        return self.views * sum(int(self.first[index, -1]) * form.row_bytes for index, form in self.formats.items())

    def file(self, index: int) -> tuple[str, int, int]:
        """Name, view and shard of the index-th file, views in order."""
        view, shard = divmod(index, self.shards)
        return f"view-{view}-shard-{shard}.safetensors", view, shard

    @property
    def files(self) -> int:
        return self.views * self.shards
