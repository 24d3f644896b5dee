"""Temporary."""
import hashlib
from dataclasses import dataclass
import numpy as np, torch
@dataclass(frozen=True)
class DataSet:
    images: object
    labels: torch.Tensor
    classes: tuple
    splits: dict
    fingerprint: str
    dropped: int
    @property
    def channels(self): return self.images.shape[1]
    @property
    def size(self): return tuple(self.images.shape[2:])
def load_data(r):
    if r.name == "digits":
        from sklearn.datasets import load_digits
        d = load_digits(); x = (d.images*255/16).astype(np.uint8); y = d.target
    else:
        f = np.load(r.path); x, y = f["x"], f["y"]
    x = torch.from_numpy(x)[:, None]; y = torch.from_numpy(y).long()
    p = torch.from_numpy(np.random.default_rng(r.seed).permutation(len(x)))
    n = len(x)//10
    s = {"test": p[:n].sort()[0], "validation": p[n:2*n].sort()[0], "train": p[2*n:].sort()[0]}
    return DataSet(x, y, tuple(map(str, range(10))), s, hashlib.sha256(x.numpy().tobytes()).hexdigest(), 0)
