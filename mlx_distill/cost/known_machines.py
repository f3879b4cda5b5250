"""Machines that one does not sit at, by name: what their makers state of them.

In: a name, as `h100-80gb` or `m4-max-64gb`. Out: a `KnownMachine`. Decided here: nothing is measured
and nothing is guessed; what a maker does not state is None. Rates of matrix products are dense ones
(half of what NVIDIA states "with sparsity") that sum in float32.
"""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from mlx_distill.errors import DistillError
from mlx_distill.machine import Machine
from mlx_distill.words import amount

NVIDIA = "https://www.nvidia.com/en-us/data-center"
APPLE = "https://www.apple.com/newsroom"
GB, TERA = 10**9, 1e12
# What Metal lets a GPU work on, of a Mac's memory: llama.cpp and MLX users see two thirds up to 36
# GB and three quarters above; from macOS 26 on the largest may have more.
WORKING_SET = ((36, 2 / 3), (1024, 3 / 4))


@dataclass(frozen=True)
class KnownMachine:
    """A card or a Mac. `rates`: FLOP/s of large products by format; `bandwidth`: bytes a second
    from memory; `source`: where its maker says so.
    """

    name: str
    machine: Machine
    rates: dict[str, float]
    bandwidth: float | None
    source: str

    @property
    def rate(self) -> float | None:
        """Of products in the format that it computes in."""
        return self.rates.get(self.machine.dtype)

    def stated(self) -> str:
        """What its maker states, in a few words."""
        rate = f"{amount(self.rate)}FLOP/s in {self.machine.dtype}" if self.rate else "no rate"
        reads = f"{amount(self.bandwidth, 'B')}/s from memory" if self.bandwidth else ""
        return ", ".join(filter(None, [self.machine.limit, rate, reads]))


def _card(
    name: str, memory: int, bfloat16: float | None, float32: float, bandwidth: float, source: str
) -> KnownMachine:
    """GB, TFLOP/s (None: it has no bfloat16), GB/s."""
    rates = {"float32": float32 * TERA} | ({"bfloat16": bfloat16 * TERA} if bfloat16 else {})
    limit = f"{memory} GB of GPU memory, as NVIDIA states it"
    dtype = "bfloat16" if bfloat16 else "float32"
    machine = Machine("torch", "cuda", dtype, memory * GB, limit)
    return KnownMachine(name, machine, rates, bandwidth * GB, source)


def _macs(
    chip: str,
    sizes: tuple[int, ...],
    bandwidth: float | None,
    announced: str,
    float32: float | None = None,
) -> Iterator[KnownMachine]:
    """GB that it is sold with, GB/s and TFLOP/s as Apple announced it: one rate, for float32; M1 and
    M2 have no faster one.
    """
    rates = dict.fromkeys(("float32", "bfloat16"), float32 * TERA) if float32 else {}
    for size in sizes:
        share = next(share for most, share in WORKING_SET if size <= most)
        limit = f"a GPU's usual {share:.0%} of {size} GB"
        machine = Machine("mlx", "metal", "bfloat16", int(size * 2**30 * share), limit)
        reads = bandwidth * GB if bandwidth else None
        yield KnownMachine(f"{chip}-{size}gb", machine, rates, reads, f"{APPLE}/{announced}/")


CARDS = (
    _card("t4", 16, None, 8.1, 320, f"{NVIDIA}/tesla-t4/"),
    _card("v100-16gb", 16, None, 15.7, 900, f"{NVIDIA}/v100/"),
    _card("v100-32gb", 32, None, 15.7, 900, f"{NVIDIA}/v100/"),
    _card("a10", 24, 125, 31.2, 600, f"{NVIDIA}/products/a10-gpu/"),
    _card("a100-40gb", 40, 312, 19.5, 1555, f"{NVIDIA}/a100/"),
    _card("a100-80gb", 80, 312, 19.5, 2039, f"{NVIDIA}/a100/"),
    _card("l4", 24, 121, 30.3, 300, f"{NVIDIA}/l4/"),
    _card("l40s", 48, 362.05, 91.6, 864, f"{NVIDIA}/l40s/"),
    _card("h100-80gb", 80, 989.4, 66.9, 3350, f"{NVIDIA}/h100/"),
    _card("h200", 141, 989.4, 66.9, 4800, f"{NVIDIA}/h200/"),
    _card("rtx-3090", 24, 71, 35.6, 936, "NVIDIA Ampere GA102 GPU Architecture, appendix A"),
    _card("rtx-4090", 24, 165.2, 82.6, 1008, "NVIDIA Ada GPU Architecture, appendix A"),
    _card("rtx-5090", 32, 209.5, 104.8, 1792, "NVIDIA RTX Blackwell GPU Architecture, appendix A"),
)


M1_ULTRA = "2022/03/apple-unveils-m1-ultra-the-worlds-most-powerful-chip-for-a-personal-computer"
M2_ALONE = "2022/06/apple-unveils-m2-with-breakthrough-performance-and-capabilities"
M3_ULTRA = "2025/03/apple-reveals-m3-ultra-taking-apple-silicon-to-a-new-extreme"
M5 = "2025/10/apple-unleashes-m5-the-next-big-leap-in-ai-performance-for-apple-silicon"
M1 = "2021/10/introducing-m1-pro-and-m1-max-the-most-powerful-chips-apple-has-ever-built"
M2 = "2023/01/apple-unveils-m2-pro-and-m2-max-next-generation-chips-for-next-level-workflows"
M3 = "2023/10/apple-unveils-m3-m3-pro-and-m3-max-the-most-advanced-chips-for-a-personal-computer"
M4 = "2024/10/apple-introduces-m4-pro-and-m4-max"
MACS = (
    *_macs("m1", (8, 16), None, "2020/11/apple-unleashes-m1", 2.6),
    *_macs("m1-pro", (16, 32), 200, M1),
    *_macs("m1-max", (32, 64), 400, M1),
    *_macs("m1-ultra", (64, 128), 800, M1_ULTRA),
    *_macs("m2", (8, 16, 24), 100, M2_ALONE, 3.6),
    *_macs("m2-pro", (16, 32), 200, M2),
    *_macs("m2-max", (32, 64, 96), 400, M2),
    *_macs("m2-ultra", (64, 128, 192), 800, "2023/06/apple-introduces-m2-ultra"),
    *_macs("m3", (8, 16, 24), 100, M3),
    *_macs("m3-pro", (18, 36), 150, M3),
    *_macs("m3-max", (36, 48, 64, 96, 128), 400, M3),
    *_macs("m3-ultra", (96, 256, 512), 819, M3_ULTRA),
    *_macs("m4", (16, 24, 32), 120, M4),
    *_macs("m4-pro", (24, 48, 64), 273, M4),
    *_macs("m4-max", (36, 48, 64, 128), 546, M4),
    *_macs("m5", (16, 24, 32), 153, M5),
)


def known_machine(name: str) -> KnownMachine:
    """The machine of this name, whatever its case and its spaces.

    Raises `DistillError`, with the nearest names, for one that is not known.
    """
    asked = re.sub(r"[\s_-]+", "-", name.strip().lower())
    known = {one.name: one for one in CARDS + MACS}
    if asked in known:
        return known[asked]
    near = [one for one in known if one.startswith(f"{asked}-")]
    near = near or difflib.get_close_matches(asked, known, 4, 0.5) or ["h100-80gb", "m4-max-64gb"]
    raise DistillError(
        f"--for {name}: no machine of that name is known: try {', '.join(near)}; "
        "docs/backends.md lists all of them"
    )


def documented() -> str:
    """The table of docs/backends.md."""
    head = "| name | memory that is planned for | computes in | products | from memory | source |"
    return "\n".join([head, "|---|---:|---|---:|---:|---|", *map(_row, CARDS + MACS)])


def _row(one: KnownMachine) -> str:
    rate = f"{amount(one.rate)}FLOP/s" if one.rate else "not stated"
    reads = f"{amount(one.bandwidth, 'B')}/s" if one.bandwidth else "not stated"
    memory = amount(one.machine.memory_bytes, "B")
    return f"| `{one.name}` | {memory} | {one.machine.dtype} | {rate} | {reads} | {one.source} |"
