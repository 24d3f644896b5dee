"""Between host and device without a wait of either for the other."""

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor`, on the host, on the device: on a GPU by way of pinned memory, from which copies do not hold the host up."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class OnItsWay:
    """A small tensor's copy to the host, begun now, behind what the device has been told to do so far; wait() later."""

    def __init__(self, tensor: torch.Tensor):
        self.host, self.event = tensor, None
        if tensor.device.type == "cuda":
            self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.host.copy_(tensor, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def wait(self) -> torch.Tensor:
        if self.event:
            self.event.synchronize()
        return self.host
