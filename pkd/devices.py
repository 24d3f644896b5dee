"""What vendors' data sheets say of devices that may not be here, and how much of it networks get."""

from dataclasses import dataclass

from pkd.cost import NetworkCost
from pkd.errors import UserError, nearest

# Shares of the data sheet that convolutional networks of medium size reach, by experience; within a factor of two.
COMPUTE_SHARE, MEMORY_SHARE = 0.35, 0.6
BACKWARD = 2  # forwards that a backward pass costs (Kaplan et al. 2020, section 2.1)


@dataclass(frozen=True)
class Device:
    half: float  # FLOP/s, 16 bit, dense
    single: float  # FLOP/s, fp32 as torch's convolutions reckon by default: TF32 where there are tensor cores for it
    memory: float  # bytes; 0: the host's
    bandwidth: float  # bytes per second of its memory
    kernel: float  # seconds to start one kernel
    runtime: float  # bytes that libraries take before anything else
    link: float  # bytes per second of a rank in an all-reduce: a 200 Gbit/s card for each GPU, gloo for a CPU
    hop: float  # seconds of one message of it
    bf16: bool = True

    def forward(self, cost: NetworkCost, rows: int, half: bool) -> float:
        """Seconds of one forward of so many rows: the slower of arithmetic and memory by layer (Williams et al. 2009)."""
        rate, element = (self.half, 2) if half else (self.single, 4)
        return sum(self.kernel + max(rows * layer.flops / (rate * COMPUTE_SHARE),
                                     element * (rows * (layer.read + layer.written) + layer.weights)
                                     / (self.bandwidth * MEMORY_SHARE)) for layer in cost.layers)


# NVIDIA's data sheets, SXM where there are several. cpu: one core of a server, 3 GHz and AVX2.
DEVICES = {
    "a100": Device(312e12, 156e12, 80e9, 2.04e12, 5e-6, 1e9, 2e10, 1e-5),
    "h100": Device(989e12, 494e12, 80e9, 3.35e12, 5e-6, 1e9, 2e10, 1e-5),
    "h200": Device(989e12, 494e12, 141e9, 4.8e12, 5e-6, 1e9, 2e10, 1e-5),
    "l40s": Device(362e12, 181e12, 48e9, 0.864e12, 5e-6, 1e9, 2e10, 1e-5),
    "v100": Device(125e12, 15.7e12, 32e9, 0.9e12, 5e-6, 1e9, 2e10, 1e-5, bf16=False),
    "cpu": Device(96e9, 96e9, 0, 10e9, 1e-5, 0.5e9, 1e9, 1e-4),
}


def device_named(name: str) -> Device:
    """Raises UserError for one that the table lacks."""
    if name.lower() not in DEVICES:
        raise UserError(f"device {name!r} is not in the table{nearest(name.lower(), DEVICES)}: use one of "
                        f"{', '.join(DEVICES)}")
    return DEVICES[name.lower()]


def device_like(name: str) -> Device:
    """The entry for what torch calls a device, such as "NVIDIA H100 80GB HBM3"; an a100 for a GPU that is not known."""
    words = name.lower().replace("-", " ").split()
    return DEVICES[next((known for known in DEVICES if known in words), "a100")]
