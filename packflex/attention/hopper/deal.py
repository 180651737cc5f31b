"""How persistent programs come to their tiles: from a counter in global memory, each when it is nearly free.

The producer takes a tile when it has loaded all that the last one needs, and tells the consumers through shared memory:
ITEM_S [2, 1] int32 with a barrier for each, one for even turns and one for odd ones. No barrier says that a number has
been read: the next one but one is written after the consumers have released what they loaded for the turn between. A
number past the last tile ends the program. A tile taken sooner would wait behind a long one while others are idle.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def take_next(COUNTER, item_s, full, turn, total, PERSISTENT: gl.constexpr):
    """The producer's: the tile of the turn after `turn`."""
    if PERSISTENT:
        lane: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        item = gl.num_programs(0) + gl.atomic_add(COUNTER, 1, sem="relaxed")
        item_s.index(turn & 1).store(gl.zeros([1], gl.int32, lane) + item)
        mbarrier.arrive(full.index(turn & 1), count=1)
    else:
        item = total
    return item


@gluon.jit
def told_next(item_s, full, turn, total, PERSISTENT: gl.constexpr):
    """A consumer's: the tile of the turn after `turn`."""
    if PERSISTENT:
        lane: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        mbarrier.wait(full.index(turn & 1), (turn >> 1) & 1)
        item = gl.max(item_s.index(turn & 1).load(lane), 0)
    else:
        item = total
    return item
