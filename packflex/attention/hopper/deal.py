"""How programs come to their tiles: dealt out beforehand, or from a counter, each when it is nearly free.

Where there are as many programs as tiles, each is dealt one.

From a counter in global memory the producer takes a tile when the last of its loads for this one are left to issue: a
tile taken sooner would wait behind a long one while others are idle. It tells the consumers through shared memory,
ITEM_S [2, 1] int32 with a barrier for each, one for even turns and one for odd ones. No barrier says that a number has
been read: before the producer writes the next one but one it has waited for a buffer (of queries forward, of keys
backward) that the consumers release after they have read it. A number past the last tile ends the program.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def _dealt(turn):
    """Work item of a program's turn: programs are dealt items there and back, so that none always gets the longer."""
    programs = gl.num_programs(0)
    i = gl.program_id(0)
    return turn * programs + gl.where(turn % 2 == 1, programs - 1 - i, i)


@gluon.jit
def take_next(COUNTER, item_s, full, turn, COUNTED: gl.constexpr):
    """The producer's: the tile of the turn after `turn`."""
    if COUNTED:
        lane: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        item = gl.num_programs(0) + gl.atomic_add(COUNTER, 1, sem="relaxed")
        item_s.index(turn & 1).store(gl.zeros([1], gl.int32, lane) + item)
        mbarrier.arrive(full.index(turn & 1), count=1)
    else:
        item = _dealt(turn + 1)
    return item


@gluon.jit
def told_next(item_s, full, turn, COUNTED: gl.constexpr):
    """A consumer's: the tile of the turn after `turn`."""
    if COUNTED:
        lane: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        mbarrier.wait(full.index(turn & 1), (turn >> 1) & 1)
        item = gl.max(item_s.index(turn & 1).load(lane), 0)
    else:
        item = _dealt(turn + 1)
    return item
