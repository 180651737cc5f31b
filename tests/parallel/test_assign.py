"""Which rank gets which piece: every token once, room respected, work shared."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packflex.layout import PackedLayout
from packflex.masks import document_mask
from packflex.parallel.assign import Piece, assign_pieces
from packflex.parallel.layout import ShardedLayout


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=30), st.integers(1, 5), st.integers(0, 40))
def test_every_token_once_and_room_respected(lengths, ranks, spare):
    capacity = -(-sum(lengths) // ranks) + spare + 1
    pieces = assign_pieces(lengths, ranks, capacity)
    seen = [np.zeros(n, dtype=int) for n in lengths]
    for part in pieces:
        assert part == sorted(part)
        assert sum(p.end - p.start for p in part) <= capacity
        for p in part:
            assert p.start < p.end
            seen[p.document][p.start : p.end] += 1
    assert all((s == 1).all() for s in seen)


def test_long_documents_share_their_work_and_short_ones_stay_whole():
    pieces = assign_pieces([4000, 100, 100, 60, 80], 2, 3000)
    work = [sum(p.end**2 - p.start**2 for p in part) for part in pieces]
    assert max(work) < 1.03 * np.mean(work)
    assert [len([p for part in pieces for p in part if p.document == d]) for d in range(5)] == [4, 1, 1, 1, 1]
    assert assign_pieces([16, 3, 4], 1, 23) == [[Piece(0, 0, 16), Piece(1, 0, 3), Piece(2, 0, 4)]]
    with pytest.raises(ValueError, match="30 tokens do not fit 2 ranks of 14"):
        assign_pieces([30], 2, 14)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=12),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from([None, 1, 7, 100]),
)
def test_the_ranks_masks_are_that_of_the_whole_batch(lengths, ranks, causal, window):
    """Through send, receive and gather: every query sees the keys that it sees in one piece, on whichever rank."""
    total = sum(lengths)
    layouts = [ShardedLayout(lengths, total, ranks, rank) for rank in range(ranks)]
    plans = [layout.exchange(causal, window) for layout in layouts]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = []  # the batch's token at each place of each rank's row, -1 in padding
    for layout in layouts:
        row = np.full(layout.seq_len, -1)
        real = np.concatenate([starts[p.document] + np.arange(p.start, p.end) for p in layout.mine] or [[]])
        row[: len(real)] = real
        ids.append(row)
    assert sorted(np.concatenate(ids)[np.concatenate(ids) >= 0].tolist()) == list(range(total))
    outboxes = [
        np.split(ids[r][plans[r].send_index.numpy()], np.cumsum(plans[r].send_counts)[:-1]) for r in range(ranks)
    ]
    whole = document_mask(PackedLayout.from_lengths([lengths]), causal, window).kv_intervals[:, 0].numpy()
    sent = 0
    for rank, (layout, plan) in enumerate(zip(layouts, plans, strict=True)):
        inbox = [outboxes[source][rank] for source in range(ranks)]
        assert tuple(map(len, inbox)) == plan.receive_counts
        assert plan.receive_counts[rank] == 0
        sent += sum(plan.receive_counts)
        keys = np.concatenate([ids[rank], *inbox])[plan.gather.numpy()]
        lo, hi = plan.mask.kv_intervals[:, 0].numpy()
        assert (np.diff(lo) >= 0).all()
        assert (np.diff(hi) >= 0).all()
        for place, token in enumerate(ids[rank]):
            expected = [] if token < 0 else list(range(whole[0, token], whole[1, token]))
            assert keys[lo[place] : hi[place]].tolist() == expected
        first, end = plan.mask.q_intervals[:, 0].numpy()
        for key in range(len(keys)):
            seeing = np.flatnonzero((lo <= key) & (key < hi))
            assert list(range(first[key], end[key])) == seeing.tolist()
        assert layout.attention_pairs(causal, window) == int((hi - lo).sum())
    assert all(plan.moves == (sent > 0) for plan in plans)


def test_only_what_a_window_sees_is_sent():
    layouts = [ShardedLayout([4000], 4000, 2, rank) for rank in range(2)]
    full, window = (sum(sum(x.exchange(True, w).receive_counts) for x in layouts) for w in (None, 50))
    assert full == 2000 + 1000, "the rank of the first and last quarter needs the middle, the other the first quarter"
    assert window == 2 * 49, "49 tokens before the second and before the last quarter"
