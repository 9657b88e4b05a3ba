"""What the kernels are launched with: a pure function of the sizes of a call and of the device, with its cost in bytes.

A sequence is cut into segments that run side by side where there are fewer programs than the device runs at once, or
where one program would walk through too many chunks. With one segment for each sequence, no states travel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

__all__ = [
    "CHUNKS",
    "FEWEST_CHUNKS",
    "MOST_CHUNKS",
    "MOST_KEYS",
    "MOST_VALUES",
    "Launch",
    "Plan",
    "Sizes",
    "backward_plan",
    "forward_plan",
    "parallel_plan",
    "power",
]

CHUNKS = (16, 32, 64)
MOST_KEYS, MOST_VALUES = 256, 512
_ONE_PASS_KEYS = 128  # with more, scores and state do not fit the registers of one program
_SIDE_BY_SIDE = 2  # programs for each multiprocessor
MOST_CHUNKS, FEWEST_CHUNKS = 64, 4  # of a segment: more take too long one by one, fewer cost more bytes than they save


class Sizes(NamedTuple):
    """The sizes that a plan depends on.

    Attributes:
        sequences: rows, or segments of a packed row.
        length: tokens of the longest sequence; for a packed row that of the row.
        packed: whether all sequences are in one row.
        item: bytes of a number of q, k and v.
        multiprocessors: of the device.
        capability: of the device, 90 for Hopper.
        masked: whether tokens are found by an index.
        mixed: whether products with a state are in another dtype than the others, as in a call in float16.
    """

    sequences: int
    heads: int
    length: int
    key_dim: int
    value_dim: int
    item: int
    multiprocessors: int
    capability: int = 90
    packed: bool = False
    masked: bool = False
    mixed: bool = False
    chunk_size: int | None = None
    has_state: bool = False
    return_state: bool = False
    has_grad: bool = False
    decay_grad: bool = False


class Launch(NamedTuple):
    """One kernel: its programs, block sizes, warps and pipeline stages, and the bytes that it moves."""

    kernel: str
    programs: int
    blocks: dict[str, int]
    warps: int
    stages: int
    bytes: int


class Plan(NamedTuple):
    """The launches of a call in their order.

    Attributes:
        chunk: tokens of a chunk.
        segments: number of segments of all sequences together; an upper bound for a packed row.
        per_sequence: segments of each sequence; of no use for a packed row.
        tokens: of a segment, but for the last of a sequence.
        split: whether a sequence may have more than one segment.
        launches: kernels.
    """

    chunk: int
    segments: int
    per_sequence: int
    tokens: int
    split: bool
    launches: tuple[Launch, ...]

    @property
    def chunks(self) -> int:
        """The number of chunks of a segment."""
        return -(-self.tokens // self.chunk)

    @property
    def bytes(self) -> int:
        return sum(launch.bytes for launch in self.launches)


def forward_plan(sizes: Sizes) -> Plan:
    """Return the plan of the output and of the state after the last token."""
    one_pass = sizes.key_dim <= _ONE_PASS_KEYS
    chunk, config = _core(sizes, backward=False) if not one_pass else _one_pass(sizes)
    plan = _cut(sizes, chunk, -(-sizes.value_dim // config[0]["BN"]))
    return plan._replace(launches=tuple(_forward(sizes, plan, one_pass, config)))


def backward_plan(sizes: Sizes) -> Plan:
    """Return the plan of the gradients."""
    chunk, config = _core(sizes, backward=True)
    blocks = 2 * -(-sizes.key_dim // config[0]["BN"]) + -(-sizes.value_dim // config[0]["BN"])
    plan = _cut(sizes, chunk, blocks)
    return plan._replace(launches=tuple(_backward(sizes, plan, config, blocks)))


def parallel_plan(sizes: Sizes, backward: bool) -> Plan:
    """Return the plan of the parallel form: one launch, in which programs read tokens that others read too."""
    chunk, config = _pairs(sizes)
    blocks, warps, stages = config
    chunks = -(-sizes.length // chunk)
    keys, values = (-(-dim // blocks["BN"]) for dim in (sizes.key_dim, sizes.value_dim))
    programs = sizes.sequences * sizes.heads * chunks * (values + (2 * keys if backward else 0))
    value = sizes.value_dim * _tokens(sizes) * sizes.heads * sizes.item
    moved = 2 * _inputs(sizes) + 2 * value if backward else _inputs(sizes) + value
    launch = Launch("parallel", programs, blocks, warps, stages, moved)
    return Plan(chunk, sizes.sequences, 1, sizes.length, False, (launch,))


_Config = tuple[dict[str, int], int, int]  # block sizes, warps, stages


def power(n: int) -> int:
    """Return the least power of 2 that is at least n and 16, the smallest side of a matrix product."""
    return max(16, 1 << (n - 1).bit_length())


def _cut(sizes: Sizes, chunk: int, blocks: int) -> Plan:
    """Choose the number of segments, for kernels with so many programs a head."""
    chunks = max(1, -(-sizes.length // chunk))
    programs = (1 if sizes.packed else sizes.sequences) * sizes.heads * blocks
    wanted = max(-(-_SIDE_BY_SIDE * sizes.multiprocessors // programs), -(-chunks // MOST_CHUNKS))
    each = max(1, chunks // wanted, min(chunks, FEWEST_CHUNKS))
    if sizes.packed:  # as long as its sequences are, so that there is little room for chunks that do not exist
        each = min(each, max(2, chunks // max(1, sizes.sequences)))
    per = -(-chunks // each)
    segments = sizes.sequences * per
    if sizes.packed and per > 1:
        segments = per + sizes.sequences  # each sequence ends in a segment that may be shorter
    return Plan(chunk, segments, per, each * chunk, per > 1, ())


def _forward(sizes: Sizes, plan: Plan, one_pass: bool, config: _Config) -> Iterator[Launch]:
    read, wrote = _inputs(sizes), sizes.value_dim * _tokens(sizes) * sizes.heads * sizes.item
    matrices = _matrices(sizes, plan)
    places = plan.segments * sizes.heads
    outer = _outer(sizes, plan)
    if plan.split or not one_pass:
        blocks, warps, stages = _square(sizes)
        parts = (plan.chunks if not one_pass else 0) + (_count(sizes, blocks) if plan.split else 0)
        keys_too = 1 if one_pass else 2  # the scores need q as well
        moved = (keys_too * sizes.key_dim + (sizes.value_dim if plan.split else 0)) * _tokens(sizes) * sizes.heads
        moved = moved * sizes.item + (0 if one_pass else matrices) + (_states(sizes, plan) if plan.split else 0)
        yield Launch("prepare", places * parts, blocks, warps, stages, moved)
    if plan.split:
        yield _join(sizes, plan, 1, outer)
    blocks, warps, stages = config
    parts = -(-sizes.value_dim // blocks["BN"])
    moved = read + wrote + (0 if one_pass else matrices) + (_states(sizes, plan) if plan.split else outer)
    yield Launch("one_pass" if one_pass else "core", places * parts, blocks, warps, stages, moved)


def _backward(sizes: Sizes, plan: Plan, config: _Config, parts: int) -> Iterator[Launch]:
    tokens = _tokens(sizes) * sizes.heads * sizes.item
    read = _inputs(sizes) + sizes.value_dim * tokens
    wrote, matrices = (2 * sizes.key_dim + sizes.value_dim) * tokens, 3 * _matrices(sizes, plan)
    places, states, outer = plan.segments * sizes.heads, 2 * _states(sizes, plan), _outer(sizes, plan)
    blocks, warps, stages = _square(sizes)
    yield Launch(
        "prepare",
        places * (plan.chunks + (_count(sizes, blocks) if plan.split else 0)),
        blocks,
        warps,
        stages,
        read + matrices + (states if plan.split else 0),
    )
    if plan.split:
        yield _join(sizes, plan, 2, outer)
    if sizes.decay_grad:
        blocks, warps, stages = _square(sizes)
        moved = read + (states if plan.split else outer)
        yield Launch("slope", places * _count(sizes, blocks), blocks, warps, stages, moved)
    blocks, warps, stages = config
    moved = read + matrices + wrote + (states if plan.split else outer)
    yield Launch("core", places * parts, blocks, warps, stages, moved)


def _join(sizes: Sizes, plan: Plan, directions: int, outer: int) -> Launch:
    block = min(1024, power(sizes.key_dim * sizes.value_dim))
    programs = sizes.sequences * sizes.heads * -(-sizes.key_dim * sizes.value_dim // block) * directions
    return Launch("join", programs, {"BLOCK": block}, 4, 1, 2 * directions * _states(sizes, plan) + outer)


def _tokens(sizes: Sizes) -> int:
    return sizes.length * (1 if sizes.packed else sizes.sequences)


def _inputs(sizes: Sizes) -> int:
    """Bytes of q, k and v, where k and v are read once for each query head that they serve."""
    return (2 * sizes.key_dim + sizes.value_dim) * _tokens(sizes) * sizes.heads * sizes.item


def _matrices(sizes: Sizes, plan: Plan) -> int:
    """Bytes of the scores of all chunks."""
    return plan.chunk * _tokens(sizes) * sizes.heads * sizes.item


def _states(sizes: Sizes, plan: Plan) -> int:
    """Bytes of the states of all segments."""
    return plan.segments * sizes.heads * sizes.key_dim * sizes.value_dim * sizes.item


def _outer(sizes: Sizes, plan: Plan) -> int:
    """Bytes of the states before and after the sequences."""
    given = sizes.has_state + sizes.return_state + sizes.has_grad
    return given * sizes.sequences * sizes.heads * sizes.key_dim * sizes.value_dim * 4


def _count(sizes: Sizes, blocks: dict[str, int]) -> int:
    return -(-sizes.key_dim // blocks["BK"]) * -(-sizes.value_dim // blocks["BV"])


# --- configurations: `python -m benchmarks gpu-compile` shows what each compiles to -----------------------------------

# By the largest head dim: tokens of a chunk, block sizes, warps, stages. "exact" is float32, "mixed" float16, and "old"
# both half precisions on chips before Hopper.
_ONE_PASS: dict[str, dict[int, tuple[int, _Config]]] = {
    "new": {64: (64, ({"BK": 64, "BN": 64}, 4, 2)), 128: (64, ({"BK": 128, "BN": 64}, 8, 2))},
    "mixed": {64: (64, ({"BK": 64, "BN": 32}, 4, 2)), 128: (64, ({"BK": 128, "BN": 32}, 8, 2))},
    "old": {64: (64, ({"BK": 64, "BN": 64}, 8, 2)), 128: (64, ({"BK": 128, "BN": 32}, 8, 2))},
    "exact": {64: (16, ({"BK": 64, "BN": 32}, 8, 1)), 128: (16, ({"BK": 128, "BN": 32}, 8, 1))},
}
_CORE: dict[str, dict[int, tuple[int, _Config]]] = {
    "new": {
        64: (64, ({"BM": 64, "BN": 64}, 4, 2)),
        128: (64, ({"BM": 128, "BN": 64}, 8, 2)),
        256: (64, ({"BM": 128, "BN": 64}, 8, 2)),
        512: (64, ({"BM": 128, "BN": 32}, 8, 1)),
    },
    "mixed": {
        64: (64, ({"BM": 64, "BN": 64}, 4, 2)),
        128: (64, ({"BM": 128, "BN": 64}, 8, 2)),
        256: (64, ({"BM": 128, "BN": 64}, 8, 1)),
        512: (64, ({"BM": 128, "BN": 32}, 8, 1)),
    },
    "old": {
        64: (64, ({"BM": 64, "BN": 32}, 4, 2)),
        128: (64, ({"BM": 128, "BN": 64}, 8, 1)),
        256: (64, ({"BM": 128, "BN": 32}, 8, 1)),
        512: (64, ({"BM": 128, "BN": 32}, 8, 1)),
    },
    "exact": {
        64: (32, ({"BM": 64, "BN": 32}, 8, 1)),
        128: (16, ({"BM": 64, "BN": 32}, 8, 1)),
        256: (16, ({"BM": 64, "BN": 32}, 8, 1)),
        512: (16, ({"BM": 128, "BN": 16}, 8, 1)),
    },
}


def _one_pass(sizes: Sizes) -> tuple[int, _Config]:
    chunk, (blocks, warps, stages) = _fitted(
        sizes, _ONE_PASS, sizes.key_dim, {"BK": sizes.key_dim, "BN": sizes.value_dim}
    )
    return chunk, (blocks, 8 if _ragged(sizes) else warps, stages)


def _core(sizes: Sizes, backward: bool) -> tuple[int, _Config]:
    widest = max(sizes.key_dim, sizes.value_dim)
    rows, columns = (widest, widest) if backward else (sizes.key_dim, sizes.value_dim)
    return _fitted(sizes, _CORE, rows, {"BM": rows, "BN": columns})


def _fitted(
    sizes: Sizes, table: dict[str, dict[int, tuple[int, _Config]]], width: int, dims: dict[str, int]
) -> tuple[int, _Config]:
    """Return the entry of a table, with a chunk of at most the tokens asked for and blocks of at most the head dims."""
    chunk, (blocks, warps, stages) = table[_kind(sizes)][max(64, power(width))]
    asked = chunk if sizes.chunk_size is None else max(size for size in CHUNKS if size <= sizes.chunk_size)
    return min(chunk, asked), ({name: min(n, power(dims[name])) for name, n in blocks.items()}, warps, stages)


def _pairs(sizes: Sizes) -> tuple[int, _Config]:
    chunk, side, warps, stages = {"exact": (16, 32, 4, 1), "old": (64, 64, 8, 1)}.get(_kind(sizes), (64, 64, 4, 2))
    chunk = min(chunk, power(sizes.length))
    widest = power(max(sizes.key_dim, sizes.value_dim))
    warps = 8 if _ragged(sizes) or sizes.key_dim != sizes.value_dim else warps
    return chunk, ({"BM": min(widest, side), "BN": min(widest, side)}, warps, stages)


def _square(sizes: Sizes) -> _Config:
    """Return the configuration of `prepare` and `slope`, which take the state in blocks."""
    keys, values, warps, stages = {"exact": (32, 32, 4, 1), "old": (64, 32, 8, 2)}.get(_kind(sizes), (64, 64, 4, 2))
    warps = 8 if _ragged(sizes) else warps
    return {"BK": min(power(sizes.key_dim), keys), "BV": min(power(sizes.value_dim), values)}, warps, stages


def _ragged(sizes: Sizes) -> bool:
    """Return whether masks and places of tokens take registers of their own, so that more threads must share them."""
    return sizes.masked or sizes.key_dim != power(sizes.key_dim) or sizes.value_dim != power(sizes.value_dim)


def _kind(sizes: Sizes) -> str:
    """Return the name of a table of configurations."""
    if sizes.item == 4:
        return "exact"
    if sizes.capability < 90:
        return "old"
    return "mixed" if sizes.mixed else "new"
