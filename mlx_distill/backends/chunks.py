"""How the losses cut their work: positions into chunks, the vocabulary into blocks.

Plain numbers, which the losses and the plan both read. Axes: `V` vocabulary, `C` positions of a
chunk.
"""

import math

# Positions whose logits exist at once, by backend and device. Measured on CPUs: MLX's walk gains
# nothing beyond 128, torch's products do up to 512. On a GPU a chunk's products become
# compute-bound above roughly 800 positions (H200: 206 FLOP/byte); estimated, not measured.
CHUNK_TOKENS = {("torch", "cpu"): 512, ("torch", "cuda"): 1024}
MLX_BLOCK_ELEMENTS = {"cpu": 2**20, "gpu": 2**23}  # logits: 4 MB stay in cache
# ids: BLAS may add one after the other, and a longer float32 sum of small numbers loses them
MLX_WIDEST_BLOCK = {"cpu": 2**14}
# arrays [C, V] that MLX's walk keeps of a chunk for a divergence that cannot do with two
MLX_ARRAYS_KEPT = {"mixed_kl": 3, "entropy_kl": 3}
# logits that a thread's elementwise part works on at once on a CPU: four buffers of them stay in a
# core's own cache from one pass to the next (benchmarks/bench_divergences.py)
TORCH_ELEMENTS_AT_ONCE = 2**17


def chunk_tokens(asked: int, backend: str, device: str) -> int:
    """Positions whose logits exist at once; 0 asks for what suits a backend's device (torch: cpu,
    cuda; MLX: all the same).
    """
    return asked or CHUNK_TOKENS.get((backend, device), 128)


def torch_rows(vocabulary: int, threads: int) -> int:
    """Positions that the elementwise part works on at once on a CPU."""
    return max(1, threads * TORCH_ELEMENTS_AT_ONCE // vocabulary)


def mlx_chunk(most: int, divergence: str) -> int:
    """Positions per chunk on MLX where a divergence that keeps two arrays has `most`: so that all
    divergences need the same memory.
    """
    return max(1, most * 2 // MLX_ARRAYS_KEPT.get(divergence, 2))


def even_chunk(positions: int, most: int) -> int:
    """Positions per chunk where 1 or more are cut into as few chunks of at most `most` as can be,
    all of one size but for the last.
    """
    return math.ceil(positions / math.ceil(positions / most))


def vocabulary_blocks(vocab: int, rows: int, elements: int, widest: int = 0) -> int:
    """Blocks that V ids are cut into so that logits [rows, block] hold at most `elements` and a
    block at most `widest` ids (0 = any number).
    """
    count = max(1, min(vocab, math.ceil(vocab * rows / elements)))
    return max(count, math.ceil(vocab / widest)) if widest else count
