"""Accelerators by their vendors' data sheets; peaks are for dense bfloat16. Times on them: `sizing.roofline`."""

import dataclasses
from dataclasses import dataclass

from vlm_jax.core.errors import unknown


@dataclass(frozen=True)
class Chip:
    """One accelerator, by its vendor's data sheet."""

    name: str
    peak_flops: float  # bfloat16 FLOP/s
    bandwidth: float  # bytes/s of its memory
    memory_bytes: float
    interconnect: float = 0.0  # bytes/s sent over all links together
    torus: int = 0  # dimensions of a slice's network; 0: a switch, every pair at full speed
    devices: int = 1  # JAX devices per chip
    usable_bytes: float = 0.0  # memory of one device that XLA gives to programs
    clock: float = 0.0  # Hz, the unit of XLA:TPU's estimates: the peak over twice the multipliers


@dataclass(frozen=True)
class Efficiency:
    """Shares of the published peaks that a program reaches. The defaults are assumptions, typical of large dense
    products, streaming reads and ring collectives; `sizing.calibration` measures the first two."""

    compute: int | float = 0.6
    bandwidth: int | float = 0.8
    interconnect: int | float = 0.8


ASSUMED, IDEAL = Efficiency(), Efficiency(1.0, 1.0, 1.0)

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 2.75e14, 1.2e12, 32e9, 3.0e11, 3, 2, 15.25 * 2**30, 1.05e9),
        Chip("v5e", 1.97e14, 8.1e11, 16e9, 2.0e11, 2, 1, 15.75 * 2**30, 1.503e9),
        Chip("v5p", 4.59e14, 2.8e12, 96e9, 6.0e11, 3, 1, 95.74 * 2**30, 1.751e9),
        Chip("v6e", 9.2e14, 1.6e12, 32e9, 4.48e11, 2, 1, 31.25 * 2**30),
        Chip("v7x", 2.307e15, 7.4e12, 192e9, 1.2e12, 3, 2, 94.75 * 2**30),
        Chip("a100", 3.12e14, 2.04e12, 80e9, 3.0e11),
        Chip("h100", 9.89e14, 3.35e12, 80e9, 4.5e11),
        Chip("h200", 9.89e14, 4.8e12, 141e9, 4.5e11),
    )
}


def chip(name: str) -> Chip:
    """The chip of that name, in any case. Raises `UserError` with a suggestion."""
    if name.lower() not in CHIPS:
        raise unknown("chip", name, CHIPS)
    return CHIPS[name.lower()]


def device(name: str) -> Chip:
    """One JAX device of that chip: the chip, or half of it."""
    whole = chip(name)
    fields = ("peak_flops", "bandwidth", "memory_bytes", "interconnect")
    halved = {field: getattr(whole, field) / whole.devices for field in fields}
    return dataclasses.replace(whole, devices=1, usable_bytes=whole.usable_bytes or halved["memory_bytes"], **halved)


_DEVICE_KINDS = (
    ("v5 lite", "v5e"), ("v5e", "v5e"), ("v5p", "v5p"), ("v5", "v5p"), ("v6", "v6e"), ("v7", "v7x"), ("v4", "v4"),
    ("h100", "h100"), ("h200", "h200"), ("a100", "a100"),
)  # fmt: skip


def of_device(kind: str) -> Chip | None:
    """The chip of a JAX `device_kind` such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3"; None if unknown."""
    return next((CHIPS[name] for text, name in _DEVICE_KINDS if text in kind.lower()), None)
