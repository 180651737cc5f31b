"""Tiles of the Hopper kernels: frozen records chosen by pure functions of head dim, group and the layout's statistics.

No tile of the tables serialises wgmma, and none spills in a loop over unmasked blocks but the backward's at head dim
128, by 7 to 15 reloads (`scripts/aot_check_hopper.py`). They are the fastest over the attention workloads on an H200
(`scripts/tune_tiles.py --backend hopper`, Triton 3.6.0, 2026-11-23, and docs/log.md, 2026-11-26); those of a softcap
have not been timed. K and V in registers (`held`) leave none for dK and dV at head dim 128.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

ROWS = 64  # of a consumer: one wgmma's


@dataclass(frozen=True)
class ForwardTile:
    """Tile of the forward kernel: `consumers` warpgroups of 64 (position, query head) rows, against blocks of keys.

    Attributes:
        consumers: 1 to 3.
        block_n: keys of a block, 64 or 128.
        stages: blocks of K and V in flight.
        q_stages: buffers of queries; 2 load the queries of the next tile beside the work on this one.
        per_sm: programs on a multiprocessor; more than one only with one consumer.
        max_heads: most query heads of a KV group in a tile's rows.
        persistent: 0 for one tile a program; as many programs as fit, 1 with tiles dealt out beforehand, 2 taking one
            from a counter whenever they are free.
        section_mib: K and V of the heads that are worked on side by side, in MiB of L2.
        ping_pong: 1 to let two consumers take turns in issuing their products (two consumers only).
    """

    consumers: int = 2
    block_n: int = 64
    stages: int = 4
    q_stages: int = 2
    per_sm: int = 1
    max_heads: int = 4
    persistent: int = 2
    section_mib: int = 16
    ping_pong: int = 0

    @property
    def max_registers(self) -> int | None:
        """Registers of a thread at launch (`maxnreg`), where more than one program shares a multiprocessor."""
        return {(1, 2): 128, (1, 3): 80, (1, 4): 64}.get((self.consumers, self.per_sm))

    @property
    def consumer_registers(self) -> int:
        """Registers of a consumer's thread, as `setmaxnreg` deals them out."""
        return 160 if self.consumers == 3 else 240

    def heads(self, group: int) -> int:
        """Query heads in a tile's rows: the largest power of two that divides the group and is at most `max_heads`."""
        heads = 1
        while heads * 2 <= min(self.max_heads, 8) and group % (heads * 2) == 0:
            heads *= 2
        return heads

    def positions(self, group: int) -> int:
        """Queries of a tile."""
        return self.consumers * ROWS // self.heads(group)


@dataclass(frozen=True)
class BackwardTile:
    """Tile of the backward kernel: `consumers` warpgroups of 64 keys, against blocks of 64 (position, head) rows.

    Attributes:
        consumers: 1 or 2. Two share the sums over keys of dQ, which halves what is added to memory.
        stages: blocks of Q and dO in flight.
        per_sm: programs on a multiprocessor; more than one only with one consumer.
        max_heads: most query heads of a KV group in a block's rows; the others follow one after the other.
        persistent: 0 for one tile a program; as many programs as fit, 1 with tiles dealt out beforehand, 2 taking one
            from a counter whenever they are free.
        section_mib: Q, dO and dQ of the heads that are worked on side by side, in MiB of L2.
        ahead: 1 to start the scores of the next block beside the last products of this one.
        held: 1 to hold K and V in registers, as operands of the products that make scores and dP.
    """

    consumers: int = 2
    stages: int = 2
    per_sm: int = 1
    max_heads: int = 4
    persistent: int = 0
    section_mib: int = 32
    ahead: int = 1
    held: int = 0

    @property
    def max_registers(self) -> int | None:
        """Registers of a thread at launch (`maxnreg`), where more than one program shares a multiprocessor."""
        return {(1, 2): 128}.get((self.consumers, self.per_sm))

    def heads(self, group: int) -> int:
        """Query heads in a block's rows: the largest power of two that divides the group and is at most `max_heads`."""
        return ForwardTile(max_heads=self.max_heads).heads(group)

    def columns(self, head_dim: int) -> int:
        """Columns of dQ that a consumer makes at a time."""
        return min(head_dim // self.consumers, 64)


# fmt: off
_SHORT = {  # short documents: many query heads in a narrow tile
    64:  ForwardTile(consumers=1, block_n=64, stages=3, q_stages=2, per_sm=3),
    128: ForwardTile(consumers=3, block_n=64, stages=3, q_stages=2, persistent=1),
}
_SHORT_MHA = _SHORT | {
    64:  ForwardTile(consumers=1, block_n=64, stages=3, q_stages=1, per_sm=3),
}
_LONG = {  # queries that see a thousand keys or more
    64:  ForwardTile(consumers=3, block_n=64, stages=3, q_stages=2, max_heads=1),
    128: ForwardTile(consumers=2, block_n=128, stages=2, q_stages=2, max_heads=1, section_mib=32),
}
_SOFTCAP = {  # the tanh takes registers that other tiles cannot spare
    128: ForwardTile(consumers=2, block_n=64, stages=4, q_stages=2),
}
# fmt: on


def default_forward_tile(head_dim: int, group: int, long: bool, softcap: bool = False) -> ForwardTile:
    """The table's tile for a head dim of 64 or 128 and `group` query heads on a KV head; `long` as `BlockMask`'s."""
    if softcap and head_dim in _SOFTCAP:
        return _SOFTCAP[head_dim]
    return (_LONG if long else _SHORT_MHA if group == 1 else _SHORT)[head_dim]


_BACKWARD = {
    64: BackwardTile(consumers=1, stages=3, per_sm=2, persistent=2, held=1),
    128: BackwardTile(consumers=2, max_heads=2, ahead=0),
}
_BACKWARD_LONG = {
    64: BackwardTile(consumers=2, stages=3, persistent=2, held=1),
    128: BackwardTile(consumers=2, max_heads=1, ahead=0),
}
_BACKWARD_SOFTCAP = {128: BackwardTile(consumers=1, ahead=0)}


def default_backward_tile(head_dim: int, long: bool, softcap: bool = False) -> BackwardTile:
    """The table's tile for a head dim of 64 or 128; `long` as `BlockMask.long_spans`."""
    if softcap and head_dim in _BACKWARD_SOFTCAP:
        return _BACKWARD_SOFTCAP[head_dim]
    return (_BACKWARD_LONG if long else _BACKWARD)[head_dim]


_FORWARD_OPTIONS = tuple(f"forward_{f.name}" for f in dataclasses.fields(ForwardTile))
OPTIONS = (*_FORWARD_OPTIONS, *(f"backward_{f.name}" for f in dataclasses.fields(BackwardTile)))


def tile_list(kernel_options: dict[str, int] | None) -> list[int]:
    """`kernel_options` as the op's list of integers: empty for the table, else every one of `OPTIONS`, -1 if not given.

    Raises:
        ValueError: an option that is not in `OPTIONS`, or a value that is no integer of 0 or more.
    """
    if not kernel_options:
        return []
    for name, value in kernel_options.items():
        if name not in OPTIONS:
            raise ValueError(f'kernel_options has no {name!r}; the tiles of backend="hopper" are {", ".join(OPTIONS)}')
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"kernel_options[{name!r}] must be an integer, 0 or more; got {value!r}")
        if name.endswith("_persistent") and value > 2:
            raise ValueError(f"kernel_options[{name!r}] must be 0, 1 or 2; got {value!r}")
    return [kernel_options.get(name, -1) for name in OPTIONS]


def resolve_forward_tile(tiles: list[int], head_dim: int, group: int, long: bool, softcap: bool = False) -> ForwardTile:
    """The table's tile with the given entries of an op's tile list in their place."""
    chosen = default_forward_tile(head_dim, group, long, softcap)
    return ForwardTile(*_overlaid(tiles[: len(_FORWARD_OPTIONS)], dataclasses.astuple(chosen))) if tiles else chosen


def resolve_backward_tile(tiles: list[int], head_dim: int, long: bool, softcap: bool = False) -> BackwardTile:
    """As `resolve_forward_tile`."""
    chosen = default_backward_tile(head_dim, long, softcap)
    return BackwardTile(*_overlaid(tiles[len(_FORWARD_OPTIONS) :], dataclasses.astuple(chosen))) if tiles else chosen


def _overlaid(tiles: list[int], chosen: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(default if given < 0 else given for given, default in zip(tiles, chosen, strict=True))
