"""`ShardedLayout`: one rank's part of a packed batch, and what attention must fetch from the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from packflex.layout import PackedLayout
from packflex.masks.block_mask import BlockMask
from packflex.parallel.assign import Piece, assign_pieces

_ALIGN = 128  # tokens: rows and key buffers are whole tiles long, so that shapes repeat


@dataclass(frozen=True)
class Exchange:
    """Keys and values of one rank's attention: what it sends, receives, and how they lie.

    Attributes:
        send_index: int64 [sum(send_counts)], local tokens in the order of the ranks they go to.
        send_counts, receive_counts: tokens to and from each rank; the same on every rank's side, no tokens to itself.
        gather: int64 [KV_LEN], where each key of attention is in the rank's own tokens followed by the received ones.
        mask: over the rank's S queries and KV_LEN keys.
        moves: whether any rank sends anything, the same on all.
    """

    send_index: Tensor
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]
    gather: Tensor
    mask: BlockMask
    moves: bool


class ShardedLayout:
    """One rank's row of a packed batch that several ranks share.

    Every rank plans the whole batch from its lengths alone, so all know what each must send without asking. The row
    holds the rank's pieces in order of document and position, and ends with padding, one token at least.

    Args:
        lengths: tokens of each document of the batch.
        num_slots: B x S of the batch.
        ranks: how many share it.
        rank: which one this is.

    Attributes:
        pieces: of each rank.
        seq_len: S of the rank's row, the same on all ranks for batches of one shape.
        group: process group of the ranks; set before attention runs.
    """

    def __init__(self, lengths: Sequence[int], num_slots: int, ranks: int, rank: int) -> None:
        if not 0 <= rank < ranks:
            raise ValueError(f"rank must be from 0 to {ranks - 1}; got {rank}")
        self.lengths = tuple(lengths)
        self.ranks, self.rank = ranks, rank
        # one token of padding for labels, one for what does not divide
        self.seq_len = -(-(-(-num_slots // ranks) + 2) // _ALIGN) * _ALIGN
        self.pieces = assign_pieces(self.lengths, ranks, self.seq_len - 1)
        self.batch_size = 1
        self.device = torch.device("cpu")
        self.group: Any = None
        self._exchanges: dict[tuple[bool, int | None], Exchange] = {}

    @property
    def mine(self) -> list[Piece]:
        """This rank's pieces."""
        return self.pieces[self.rank]

    @property
    def num_tokens(self) -> int:
        """Tokens of documents on this rank."""
        return sum(piece.end - piece.start for piece in self.mine)

    @property
    def num_documents(self) -> int:
        """Documents that begin on this rank, so that the sum over the ranks is that of the batch."""
        return sum(piece.start == 0 for piece in self.mine)

    @property
    def efficiency(self) -> float:
        """Share of the row that is documents."""
        return self.num_tokens / self.seq_len

    def __repr__(self) -> str:
        split = len({p.document for p in self.mine if p.end - p.start < self.lengths[p.document]})
        return (
            f"ShardedLayout(rank {self.rank} of {self.ranks}, seq_len={self.seq_len}, {len(self.mine)} pieces, "
            f"{split} documents split, {self.efficiency:.1%} full)"
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ShardedLayout:
        """The same layout for tensors on `device`."""
        moved = ShardedLayout.__new__(ShardedLayout)
        moved.__dict__.update(self.__dict__)
        moved.device, moved._exchanges = torch.device(device), {}
        return moved

    def pin_memory(self) -> ShardedLayout:
        """Itself: it holds no tensors until it is used."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_exchanges": {}, "group": None}

    def attention_pairs(self, causal: bool = True, window: int | None = None) -> int:
        """Pairs of query and key that this rank's attention computes."""
        total = 0
        for piece in self.mine:
            lo, hi = _key_bounds(np.arange(piece.start, piece.end), self.lengths[piece.document], causal, window)
            total += int((hi - lo).sum())
        return total

    def exchange(self, causal: bool = True, window: int | None = None) -> Exchange:
        """What attention under a mask needs from the other ranks; remembered, so that only the first layer pays."""
        key = (causal, window)
        if key not in self._exchanges:
            self._exchanges[key] = self._plan(causal, window)
        return self._exchanges[key]

    def _plan(self, causal: bool, window: int | None) -> Exchange:
        starts = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        owner = np.empty(starts[-1], dtype=np.int64)
        local = np.empty(starts[-1], dtype=np.int64)
        for rank, pieces in enumerate(self.pieces):
            at = 0
            for piece in pieces:
                tokens = slice(starts[piece.document] + piece.start, starts[piece.document] + piece.end)
                owner[tokens] = rank
                local[tokens] = np.arange(at, at + piece.end - piece.start)
                at += piece.end - piece.start
        wanted = [self._keys_of(rank, starts, causal, window) for rank in range(self.ranks)]
        foreign = [[w[owner[w] == source] for source in range(self.ranks)] for w in wanted]
        for rank in range(self.ranks):
            foreign[rank][rank] = foreign[rank][rank][:0]
        keys = wanted[self.rank]
        received = foreign[self.rank]
        gather = local[keys].copy()
        offset = self.seq_len
        for source in range(self.ranks):
            from_there = (owner[keys] == source) & (source != self.rank)
            gather[from_there] = offset + np.arange(int(from_there.sum()))
            offset += len(received[source])
        sent = [foreign[rank][self.rank] for rank in range(self.ranks)]
        kv_len = max(_ALIGN, -(-len(keys) // _ALIGN) * _ALIGN)
        gather = np.concatenate([gather, np.zeros(kv_len - len(keys), dtype=np.int64)])
        return Exchange(
            torch.from_numpy(local[np.concatenate(sent)]).to(self.device),
            tuple(map(len, sent)),
            tuple(map(len, received)),
            torch.from_numpy(gather).to(self.device),
            self._mask(keys, starts, kv_len, causal, window),
            any(len(tokens) for part in foreign for tokens in part),
        )

    def _keys_of(self, rank: int, starts: np.ndarray, causal: bool, window: int | None) -> np.ndarray:
        """Tokens that a rank's queries see, each once, in order of document and position."""
        parts: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
        last = -1
        for piece in self.pieces[rank]:
            ends = np.array([piece.start, piece.end - 1])
            lo, hi = _key_bounds(ends, self.lengths[piece.document], causal, window)
            begin = max(int(lo[0]) + int(starts[piece.document]), last)
            end = int(hi[1]) + int(starts[piece.document])
            parts.append(np.arange(begin, end, dtype=np.int64))
            last = max(last, end)
        return np.concatenate(parts)

    def _mask(self, keys: np.ndarray, starts: np.ndarray, kv_len: int, causal: bool, window: int | None) -> BlockMask:
        bounds = np.full((2, self.seq_len), len(keys), dtype=np.int64)
        at = 0
        for piece in self.mine:
            lo, hi = _key_bounds(np.arange(piece.start, piece.end), self.lengths[piece.document], causal, window)
            rows = slice(at, at + piece.end - piece.start)
            # a key's place in the buffer: keys are sorted, and those of one query are all there
            bounds[0, rows] = np.searchsorted(keys, lo + starts[piece.document])
            bounds[1, rows] = np.searchsorted(keys, hi + starts[piece.document] - 1) + 1
            at = rows.stop
        key = np.arange(kv_len)
        # queries of the padded tail see nothing, and keys that nothing sees end where the last other query does
        first = np.minimum(np.searchsorted(bounds[1], key, side="right"), at)
        end = np.maximum(np.minimum(np.searchsorted(bounds[0], key, side="right"), at), first)
        pairs = int((bounds[1] - bounds[0]).sum())
        kv, q = (torch.from_numpy(np.ascontiguousarray(x)).to(torch.int32)[:, None] for x in (bounds, (first, end)))
        return BlockMask.from_intervals(
            kv.to(self.device), q.to(self.device), long_spans=pairs >= 1024 * max(self.num_tokens, 1)
        )


def _key_bounds(positions: np.ndarray, length: int, causal: bool, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """First key and end of the keys that each position of a document sees, within the document."""
    lo = np.zeros_like(positions) if window is None else np.maximum(positions - window + 1, 0)
    if causal:
        return lo, positions + 1
    hi = np.full_like(positions, length) if window is None else np.minimum(positions + window, length)
    return lo, hi


def shard_batch(batch: dict[str, Any], ranks: int, rank: int) -> dict[str, Any]:
    """One rank's part of a packed batch.

    Args:
        batch: of `PackedCollator`: input_ids, labels and position_ids int64 [B, S], packed.
        ranks: how many share it; every one must be given the same batch.
        rank: which one this is.

    Returns:
        input_ids, labels, position_ids int64 [1, S'] and packed, a `ShardedLayout`. Position i of the row predicts
        label i + 1, as ever, though the token after it may be another rank's.
    """
    layout: PackedLayout = batch["packed"]
    lengths = [length for row in layout.lengths for length in row]
    sharded = ShardedLayout(lengths, layout.batch_size * layout.seq_len, ranks, rank)
    nothing = np.zeros(0, dtype=np.int64)
    firsts = np.concatenate(
        [nothing, *(b * layout.seq_len + np.cumsum([0, *row[:-1]]) for b, row in enumerate(layout.lengths) if row)]
    ).astype(np.int64)
    tokens = np.concatenate([nothing, *(firsts[p.document] + np.arange(p.start, p.end) for p in sharded.mine)])
    is_last = np.concatenate(
        [nothing, *(np.arange(p.start, p.end) == lengths[p.document] - 1 for p in sharded.mine)]
    ).astype(bool)
    flat = {name: batch[name].reshape(-1).numpy() for name in ("input_ids", "labels", "position_ids")}
    following = np.minimum(tokens + 1, len(flat["labels"]) - 1)
    targets = np.where(is_last, -100, flat["labels"][following])
    row = {
        "input_ids": flat["input_ids"][tokens],
        "labels": np.concatenate([[-100], targets]),
        "position_ids": flat["position_ids"][tokens],
    }
    fill = {"input_ids": 0, "labels": -100, "position_ids": 0}
    out: dict[str, Any] = {}
    for name, values in row.items():
        whole = np.full(sharded.seq_len, fill[name], dtype=np.int64)
        whole[: len(values)] = values
        out[name] = torch.from_numpy(whole)[None]
    out["packed"] = sharded
    return out
