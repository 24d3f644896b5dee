import zlib
import torch
class Views:
    def __init__(self, data, recipe, seed): self.data = data
    def batch(self, ids, epoch): return self.data.images[ids]
    def plain(self, ids): return self.data.images[ids]
    def checksum(self, ids, epoch): return zlib.crc32(self.batch(ids, epoch).numpy().tobytes())
