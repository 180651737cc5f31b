"""`PackedStream`: packed batches from a stream of tokenised documents, packed online, equal on every rank, resumable.

The stream is cut into *lanes* once: shards of the source, or every n-th document of a shard where there are more lanes
than shards. A lane is read and packed by itself, so its state (place in the source and documents that wait) is all that
a resume needs; ranks and worker processes only share the lanes out. Lanes take turns batch by batch, whatever the
number of workers, so the order of batches depends on lanes and ranks alone.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from packflex.data.errors import DataError, mask_message, one_line
from packflex.data.ids import RepeatedIds
from packflex.data.labels import FILLER, IGNORED, MASK_COLUMNS
from packflex.data.loader import plain_signals
from packflex.data.supervision import cut_bare_message, supervised_in_pieces
from packflex.packing.strategies import OVERFLOWS
from packflex.packing.stream import StreamPacker

logger = logging.getLogger(__name__)

_SNAPSHOT_EVERY = 16  # batches of a lane between the states that a worker sends
_INT32_MAX = 2**31 - 1
_END: Any = object()  # of a source, which may hold anything
_KNOWN_BY = 16  # first documents by which a resume knows a lane's source again
_Piece = tuple[np.ndarray, np.ndarray]  # input_ids, labels, int32


class PackedStream:
    """Batches of packed rows from documents that come one by one.

    Documents wait in a pool of each lane and are packed by `packflex.packing.stream.StreamPacker`. No document is
    dropped or seen twice, also across a kill and a resume with other numbers of ranks or workers: the state holds each
    lane's place in the source and its waiting documents.

    A stream does not know its length. With `num_batches` an epoch is that many batches on every rank (a rank without
    documents gets batches that count for nothing), `len()` is exact, and Lightning resumes exactly. Without it an epoch
    is one pass over the source, which ranks end together by asking one another each step; use that outside Lightning,
    which fetches unsized loaders one batch ahead.

    Args:
        source: documents with `input_ids`, and `labels` or a mask as `pack_dataset` takes them: a `datasets`
            `IterableDataset`, or anything that gives the same documents each time it is iterated. Documents that come
            twice are packed twice: leave them out before.
        collate: list of rows to a batch, such as `PackedCollator`.
        batch_size: rows of a batch.
        seq_len: tokens of a row.
        num_batches: batches of an epoch on each rank; None for one pass over the source.
        pool: documents that wait in each lane; more fill rows better.
        lanes: parts of the stream; by default the source's shards, or one for each rank and worker if that is more.
        overflow: "split", "truncate", "drop" or "error" for documents longer than a row; counted in the log, as are
            documents whose supervised tokens are all cut off.
        repeat: with `num_batches`, begin again when the source ends; otherwise batches without tokens follow.
        rank, world_size: this process, and processes.
        num_workers: processes that read and pack; 0 for none.
        pin_memory: copy batches into page-locked memory.
        fingerprint: names the source in the state, which a stream of another name then refuses. Without it a source is
            known by its first documents.

    Raises:
        ValueError: arguments out of range.
        DataError: while it is iterated, a source without documents, or a document that cannot be packed, by name.

    Example:
        >>> stream = PackedStream(documents, PackedCollator(8192), batch_size=4, seq_len=8192, num_batches=1000)
        >>> trainer.fit(module, stream)
    """

    def __init__(
        self,
        source: Iterable[Mapping[str, Any]],
        collate: Callable[[Sequence[Mapping[str, Any]]], Any],
        batch_size: int = 1,
        *,
        seq_len: int,
        num_batches: int | None = None,
        pool: int = 1000,
        lanes: int | None = None,
        overflow: str = "split",
        repeat: bool = True,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        fingerprint: str | None = None,
    ) -> None:
        if overflow not in OVERFLOWS:
            raise ValueError(f"overflow must be one of {', '.join(OVERFLOWS)}; got {overflow!r}")
        if isinstance(source, Iterator):
            raise ValueError(
                f"source must give its documents each time it is iterated, and a {type(source).__name__} gives them "
                "once; give a list, a datasets.IterableDataset (from_generator makes one), or an object with __iter__"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to world_size - 1; got rank {rank} of {world_size}")
        for name, value in {"batch_size": batch_size, "num_batches": num_batches, "lanes": lanes}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        StreamPacker[None](seq_len, pool)  # checks both
        self.source, self.collate, self.batch_size = source, collate, batch_size
        self.seq_len, self.pool, self.overflow = seq_len, pool, overflow
        self.num_batches, self.repeat = num_batches, repeat
        self.rank, self.world_size = rank, world_size
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.fingerprint, self._asked_lanes = fingerprint, lanes
        self.num_shards = shards = int(getattr(source, "num_shards", 1))
        self.lanes = lanes or max(shards, world_size * max(1, num_workers))
        if self.lanes < world_size:
            raise ValueError(f"lanes must be at least world_size={world_size}, so that no rank goes empty; got {lanes}")
        self._states: dict[int, dict[str, Any]] = {}
        self._live: dict[int, _Lane] = {}  # lanes of this process, when there are no workers
        self._counted: dict[int, Mapping[str, Any]] = {}  # of each lane, in this pass, up to its last batch
        self._delivered = 0  # batches of this epoch
        self._resuming = False

    def __len__(self) -> int:
        """Batches of an epoch on each rank.

        Raises:
            TypeError: without `num_batches`.
        """
        if self.num_batches is None:
            raise TypeError("a stream without num_batches has no length")
        return self.num_batches

    def __iter__(self) -> Iterator[Any]:
        """Batches of one epoch, or of what is left of it after `load_state_dict`."""
        if not self._resuming:
            self._delivered = 0
        self._resuming = False
        if self.num_batches is None and self.world_size > 1 and not _is_distributed():
            raise ValueError(
                "ranks of a stream end together by num_batches, or by asking one another through torch.distributed, "
                "which is not initialised; give num_batches"
            )
        batches = self._batches()
        while self.num_batches is None or self._delivered < self.num_batches:
            batch = next(batches, None)
            if self.num_batches is None and not self._any_rank(batch is not None):
                break
            self._delivered += 1
            yield self.collate([FILLER] * self.batch_size) if batch is None else batch
        batches.close()

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the batches delivered so far: every rank must call this at the same step."""
        return {
            "lanes": self._of_all_ranks({number: self._state(number) for number in self._mine()}),
            "num_lanes": self.lanes,
            "delivered": self._delivered,
            **{name: getattr(self, name) for name in _SAME_ON_RESUME},
        }

    def report(self) -> dict[str, int]:
        """Rows so far, documents and tokens in them, and passes over the source, that under way included.

        Over all ranks and passes; pieces of a document count each, and a document counts in each pass. Every rank must
        call this at the same step.
        """
        lanes = {}
        for number in self._mine():
            state = self._state(number)
            counted = _together(state.get("before", {}), self._counted.get(number, state["report"]))
            lanes[number] = {"pass": state["pass"], **counted}
        counts = list(self._of_all_ranks(lanes).values())
        names = (("rows", "rows"), ("documents", "in rows"), ("tokens", "tokens in rows"))
        return {name: sum(count[key] for count in counts) for name, key in names} | {
            "passes": 1 + max(count["pass"] for count in counts)
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last batch delivered when the state was taken; any number of ranks and workers.

        Raises:
            ValueError: a state of other rows, another pool or other lanes, one with fewer lanes than ranks, or one that
                lacks lanes of this rank.
            DataError: a source whose first documents are others.
        """
        ours = {name: getattr(self, name) for name in _SAME_ON_RESUME}
        theirs = {name: state[name] for name in ours if name in state}
        if self.fingerprint is None or theirs.get("fingerprint") is None:
            theirs.pop("fingerprint", None)
        if self._asked_lanes is not None:
            ours["lanes"], theirs["lanes"] = self._asked_lanes, state["num_lanes"]
        for name, value in theirs.items():
            if value != ours[name]:
                raise ValueError(
                    f"the checkpoint's stream had {name}={value}, this one has {ours[name]}; resume with the same, or "
                    "start a new run from the weights"
                )
        lanes = int(state["num_lanes"])
        if lanes < self.world_size:
            raise ValueError(
                f"the checkpoint's stream has {lanes} lanes, fewer than world_size={self.world_size}, so that ranks "
                f"would go empty; resume on at most {lanes} ranks, or start a new run from the weights"
            )
        mine = list(range(self.rank, lanes, self.world_size))
        missing = [number for number in mine if number not in state["lanes"]]
        if missing:
            raise ValueError(
                f"the checkpoint lacks lanes {missing} of {lanes}: its state was taken on one rank alone; take it "
                "on every rank at the same step, with torch.distributed initialised"
            )
        known = next((number for number in mine if state["lanes"][number].get("first")), None)
        if known is not None:
            self._lane(known, lanes, state["lanes"][known]).require_same_source()
        self.lanes = lanes
        self._states = {number: state["lanes"][number] for number in mine}
        self._live, self._counted = {}, {}
        self._delivered = state["delivered"]
        self._resuming = self.num_batches is None or self._delivered < self.num_batches

    def _mine(self) -> list[int]:
        return list(range(self.rank, self.lanes, self.world_size))

    def _batches(self) -> Generator[Any, None, None]:
        """Batches of this rank's lanes in turn, without end if the stream repeats; keeps the lanes' states."""
        mine = self._mine()
        turn = {number: self._turn(number) for number in mine}
        while mine:
            feeds = self._feeds(mine)
            active = [number for number in mine if not turn[number][1]]
            is_whole_pass, gave_any = all(batches == 0 for batches, _ in turn.values()), False
            documents = 0
            while active:
                number = min(active, key=lambda n: (turn[n][0], n))
                lane, batch, state, report = next(feeds[number])
                if isinstance(batch, DataError):
                    raise batch
                assert lane == number, "a feed gives its lanes in the order in which they are asked for"
                turn[number] = (turn[number][0] + 1, batch is None)
                self._counted[number] = report
                if state is not None:
                    self._states[number] = state
                elif number in self._states:
                    self._states[number] = {**self._states[number], "replay": self._states[number]["replay"] + 1}
                if batch is None:
                    active.remove(number)
                    documents += report["documents"]
                    _log_pass(number, report, self.seq_len)
                else:
                    gave_any = True
                    yield batch
            if is_whole_pass and not gave_any:
                self._require_documents(documents)
            if self.num_batches is None:
                self._begin_next_pass(mine)
                return
            if not self.repeat or (is_whole_pass and not gave_any):  # a source without documents has no next pass
                return
            self._begin_next_pass(mine)
            turn = dict.fromkeys(mine, (0, False))

    def _require_documents(self, documents: int) -> None:
        """Say that a whole pass gave this rank nothing to train on, unless only other ranks' lanes have documents."""
        if documents and self.world_size == 1:
            raise DataError(
                f"all {documents:,} documents of the stream are longer than seq_len={self.seq_len}, and "
                'overflow="drop" leaves none; raise seq_len, or choose overflow="split"'
            )
        if not documents and next(iter(copy.copy(self.source)), _END) is _END:
            raise DataError("the stream's source gives no document; check its files, its split and its filters")
        logger.warning(
            "rank %d has no documents: its batches count for nothing; give the source more shards, or fewer ranks",
            self.rank,
        )

    def _begin_next_pass(self, mine: list[int]) -> None:
        done = {n: self._state(n) for n in mine}
        self._states = {
            n: {**_fresh_state(state["pass"] + 1), "before": _together(state.get("before", {}), state["report"])}
            for n, state in done.items()
        }
        self._live, self._counted = {}, {}

    def _state(self, number: int) -> dict[str, Any]:
        """Where a lane of this rank stands."""
        return self._live[number].state() if number in self._live else self._states.get(number, _fresh_state(0))

    def _of_all_ranks(self, lanes: dict[int, Any]) -> dict[int, Any]:
        """What every rank knows of its lanes."""
        if self.world_size == 1 or not _is_distributed():
            return lanes
        gathered: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(gathered, lanes)
        return {number: known for part in gathered for number, known in part.items()}

    def _turn(self, number: int) -> tuple[int, bool]:
        """Batches that a lane gave in this pass, and whether it is over."""
        if number in self._live:
            lane = self._live[number]
            return lane.batches, lane.over
        state = self._states.get(number)
        return (state["batches"] + state["replay"], state["over"]) if state else (0, False)

    def _feeds(self, mine: list[int]) -> dict[int, Iterator[Any]]:
        """For each lane the iterator that gives its batches; lanes of one worker share it."""
        make = {
            n: self._lane(n, self.lanes, self._states.get(n))
            for n in mine
            if n not in self._live and not self._turn(n)[1]
        }
        if not self.num_workers:
            for lane in make.values():
                lane.replay()
            self._live |= make
            live = [lane for lane in self._live.values() if not lane.over]
            feed = iter(_Feed(live, self.collate, self.batch_size, snapshots=False))
            return {lane.number: feed for lane in live}
        feeds: dict[int, Iterator[Any]] = {}
        lanes = list(make.values())
        for worker in range(min(self.num_workers, len(lanes))):
            part = lanes[worker :: self.num_workers]
            loader: DataLoader[Any] = DataLoader(
                _Feed(part, self.collate, self.batch_size, snapshots=True),
                batch_size=None,
                collate_fn=_as_it_is,
                num_workers=1,
                pin_memory=self.pin_memory,
                generator=torch.Generator().manual_seed(0),  # leaves the global one alone
                worker_init_fn=plain_signals,
            )
            feeds |= dict.fromkeys((lane.number for lane in part), iter(loader))
        return feeds

    def _lane(self, number: int, lanes: int, state: dict[str, Any] | None) -> _Lane:
        packer: StreamPacker[_Piece] = StreamPacker(self.seq_len, self.pool)
        return _Lane(number, lanes, self.source, packer, self.overflow, self.batch_size, state)

    def _any_rank(self, mine: bool) -> bool:
        if self.world_size == 1:
            return mine
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        flag = torch.tensor(int(mine), device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())


class _Lane:
    """One part of the stream: its documents, its pool, its place."""

    def __init__(
        self,
        number: int,
        lanes: int,
        source: Any,
        packer: StreamPacker[_Piece],
        overflow: str,
        batch_size: int,
        state: dict[str, Any] | None,
    ) -> None:
        self.number, self.packer, self.overflow, self.batch_size = number, packer, overflow, batch_size
        state = state or _fresh_state(0)
        shards = int(getattr(source, "num_shards", 1))
        parts, part = min(shards, lanes), number % min(shards, lanes)
        # Lanes of the same shard deal its documents out. Each lane needs an object of its own: it keeps its own place.
        self._deal = (number // parts, -(-(lanes - part) // parts))
        self.source = source.shard(parts, part) if hasattr(source, "shard") else copy.copy(source)
        self.epoch, self.batches, self.over = state["pass"], state["batches"], state["over"]
        self.report: dict[str, Any] = {**_NOTHING, **state["report"]}
        self.before: Mapping[str, int] = state.get("before", {})  # what earlier passes came to
        self._first: list[str] = list(state.get("first", ()))
        self._read = state["read"]
        self._start: dict[str, Any] | None = state["source"]
        self._read_since = 0
        self._replay = state["replay"]
        self._documents: Iterator[Mapping[str, Any]] | None = None
        self._exhausted = state["exhausted"]
        self._ids: RepeatedIds | None = None  # of this pass, or of what is left of it after a resume
        ends = np.cumsum(state["lengths"].numpy())[:-1]
        ids, labels = (np.split(state[name].numpy(), ends) for name in ("ids", "labels"))
        if len(state["lengths"]):
            packer.restore([((i, label), len(i)) for i, label in zip(ids, labels, strict=True)])

    def replay(self) -> None:
        """Pass over the batches that were delivered after the state was taken."""
        for _ in range(self._replay):
            self.next_rows()
        self._replay = 0

    def next_rows(self) -> list[dict[str, Any]]:
        """Rows of the next batch, the last one filled up; none when the lane is over."""
        rows: list[dict[str, Any]] = []
        while len(rows) < self.batch_size and (pieces := self._next_row()):
            rows.append(_row(pieces))
        self.batches += 1
        if not rows:
            self.over = True
            self.report["repeated ids"] = self._ids.found()[0] if self._ids is not None else 0
            return []
        self.report["rows"] += len(rows)
        self.report["in rows"] += sum(len(row["lengths"]) for row in rows)
        self.report["tokens in rows"] += sum(len(row["input_ids"]) for row in rows)
        return rows + [dict(FILLER)] * (self.batch_size - len(rows))

    def _next_row(self) -> list[_Piece]:
        if self._documents is None and not self._exhausted:
            self._documents = self._open()
        while not self._exhausted and not self.packer.is_full:
            document = next(self._documents, _END)  # type: ignore[arg-type]
            if document is _END:
                self._exhausted = True
                break
            self._read += 1
            self._read_since += 1
            if self._read <= _KNOWN_BY and len(self._first) < self._read:
                self._first.append(_digest(document))
            if (self._read - 1) % self._deal[1] == self._deal[0]:
                self._add(document)
        return self.packer.take_row()

    def _open(self) -> Iterator[Mapping[str, Any]]:
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(self.epoch)
        if self._start is not None:
            self.source.load_state_dict(self._start)
            return iter(self.source)
        documents = iter(self.source)
        for _ in range(self._read):  # no state to go on from: read and pass over
            next(documents, _END)
        return documents

    def require_same_source(self) -> None:
        """Compare the source's first documents with those that the state remembers.

        Raises:
            DataError: other documents.
        """
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(self.epoch)
        documents = iter(self.source)
        for at, known in enumerate(self._first):
            document = next(documents, _END)
            if document is _END or _digest(document) != known:
                raise DataError(
                    f"document {at} of lane {self.number} is not the one that the checkpoint's stream read: resume "
                    "with the same source, or start a new run from the weights"
                )

    def _add(self, document: Any) -> None:
        name = f"document {self._read - 1} of lane {self.number}"
        if not isinstance(document, Mapping):
            raise DataError(
                f"{name}: a {type(document).__name__}, and a document must be a mapping with 'input_ids'; give "
                '{"input_ids": [...]}'
            )
        name = document.get("source") or name
        ids, labels = _tokens(document, name)
        self.report["documents"] += 1
        if "id" in document:
            self._ids = self._ids or RepeatedIds()
            self._ids.add(document["id"])
        room = self.packer.seq_len
        if len(ids) > room:
            if self.overflow == "error":
                raise DataError(
                    f'{name}: {len(ids)} tokens, more than seq_len={room}; use overflow="split", "truncate" or '
                    '"drop", or longer rows'
                )
            self.report["longer than a row"] += 1
            if self.overflow == "drop":
                self.report["tokens lost"] += len(ids)
                return
            had_any = (labels[1:] != IGNORED).any()
            if self.overflow == "truncate":
                self.report["tokens lost"] += len(ids) - room
                ids, labels = ids[:room], labels[:room]
            sizes = np.diff([*range(0, len(ids), room), len(ids)])
            if had_any and not supervised_in_pieces(labels != IGNORED, sizes).any():
                if not self.report["cut bare"]:  # a stream may be long in coming to the end of its pass
                    logger.warning(
                        "lane %d: %s; more are counted till its end", self.number, cut_bare_message(name, 1, room)
                    )
                self.report["cut bare"] += 1
                self.report["first cut bare"] = self.report["first cut bare"] or name
        for start in range(0, len(ids), room):
            piece = ids[start : start + room], labels[start : start + room].copy()
            piece[1][0] = IGNORED
            self.packer.add(piece, len(piece[0]))
            self.report["tokens"] += len(piece[0])

    def state(self) -> dict[str, Any]:
        """Place and waiting documents, as tensors: Lightning's checkpoints load them with `weights_only`."""
        source = self._start
        keeps_place = hasattr(self.source, "state_dict") and not _has_shuffle_buffer(self.source)
        if keeps_place and self._read_since and not self._exhausted:
            source = self.source.state_dict()
        pending = [piece for piece, _ in self.packer.pending()]
        empty = np.zeros(0, dtype=np.int32)
        ids, labels = (np.concatenate([piece[i] for piece in pending] or [empty]) for i in (0, 1))
        return {
            "pass": self.epoch,
            "batches": self.batches,
            "replay": self._replay,
            "over": self.over,
            "exhausted": self._exhausted,
            "read": self._read,
            "source": source,
            "report": dict(self.report),
            "before": dict(self.before),
            "first": list(self._first),
            "ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "lengths": torch.tensor([len(piece[0]) for piece in pending], dtype=torch.int64),
        }


# What a stream must have in common with the one whose state it takes.
_SAME_ON_RESUME = ("seq_len", "batch_size", "pool", "overflow", "num_shards", "fingerprint")
_NOTHING: Mapping[str, Any] = {
    "documents": 0, "rows": 0, "tokens": 0, "longer than a row": 0, "tokens lost": 0, "cut bare": 0,
    "first cut bare": "", "repeated ids": 0, "in rows": 0, "tokens in rows": 0,
}  # fmt: skip


class _Feed(IterableDataset[Any]):
    """Batches of some lanes in turn: (lane, batch, state or None, report); a batch of None ends its lane."""

    def __init__(self, lanes: list[_Lane], collate: Callable[..., Any], batch_size: int, snapshots: bool) -> None:
        self.lanes, self.collate, self.batch_size, self.snapshots = lanes, collate, batch_size, snapshots

    def __iter__(self) -> Iterator[tuple[int, Any, dict[str, Any] | None, dict[str, Any]]]:
        _read_as_in_the_main_process()
        if self.snapshots:
            for lane in self.lanes:
                lane.replay()
        active = list(self.lanes)
        while active:
            lane = min(active, key=lambda lane: (lane.batches, lane.number))
            first = lane.batches % _SNAPSHOT_EVERY == 0
            try:
                rows = lane.next_rows()
            except DataError as error:
                if not self.snapshots:
                    raise
                yield (
                    lane.number,
                    error,
                    None,
                    dict(lane.report),
                )  # a worker's exceptions come with its traceback as text
                return
            if not rows:
                active.remove(lane)
            state = lane.state() if self.snapshots and (first or not rows) else None
            yield lane.number, (self.collate(rows) if rows else None), state, dict(lane.report)


def _read_as_in_the_main_process() -> None:
    """Hide from `datasets` that this is a worker: it would share a lane out again, and shuffle it in another order.

    Lanes are shared out already, and must give the same documents wherever they are read.
    """
    if torch.utils.data.get_worker_info() is None:
        return
    torch.utils.data._utils.worker._worker_info = None
    if "fsspec" in sys.modules:  # as `datasets` does in a worker: locks that a fork has copied are of the parent
        sys.modules["fsspec"].asyn.reset_lock()


def _fresh_state(number: int) -> dict[str, Any]:
    """The state of a lane at the beginning of a pass."""
    nothing = torch.zeros(0, dtype=torch.int32)
    return {
        "pass": number, "batches": 0, "replay": 0, "over": False, "exhausted": False, "read": 0, "source": None,
        "report": dict(_NOTHING), "first": [],
        "ids": nothing, "labels": nothing, "lengths": nothing.long(),
    }  # fmt: skip


def _together(before: Mapping[str, int], report: Mapping[str, Any]) -> dict[str, int]:
    """What a lane's rows come to over several passes."""
    return {key: before.get(key, 0) + report.get(key, 0) for key in ("rows", "in rows", "tokens in rows")}


def _tokens(document: Mapping[str, Any], name: str) -> _Piece:
    """Token ids and labels of a document, checked.

    Raises:
        DataError: no, no integer or too large ids, an empty document, labels or a mask of another length.
    """
    if "input_ids" not in document:
        raise DataError(f"{name}: no 'input_ids' (it has {', '.join(map(repr, document))}); tokenise the stream first")
    ids = _integers(document["input_ids"], name, "input_ids")
    if not len(ids):
        raise DataError(f"{name}: the document is empty; leave empty documents out of the stream")
    if "attention_mask" in document:
        shown = document["attention_mask"]
        if np.ndim(shown) == 0 or len(shown) != len(ids):
            raise DataError(
                f"{name}: 'attention_mask' must hold a number for each of the {len(ids)} tokens; tokenise again, or "
                "remove the column where nothing is padded"
            )
        shown = _integers(shown, name, "attention_mask", lowest=-(2**31))
        if (shown != 1).any():
            raise DataError(mask_message(name, int(shown[np.argmax(shown != 1)])))
    present = [column for column in ("labels", *MASK_COLUMNS) if column in document]
    given = [column for column in present if document[column] is not None]
    if len(given) > 1:
        raise DataError(f"{name}: has {' and '.join(given)}; keep the one that says what is supervised")
    if present and not given:
        raise DataError(f"{name}: {present[0]!r} is missing (null); remove the document or tokenise it again")
    if not given:
        return ids, ids
    lowest = 0 if given[0] == "labels" else -(2**31)
    marks = _integers(document[given[0]], name, given[0], lowest, but=IGNORED)
    if len(marks) != len(ids):
        raise DataError(f"{name}: input_ids has {len(ids)} tokens and {given[0]} {len(marks)}; they must be equal")
    return ids, (marks if given[0] == "labels" else np.where(marks != 0, ids, np.int32(IGNORED)))


def _integers(values: Any, name: str, column: str, lowest: int = 0, but: int = 0) -> np.ndarray:
    """Values as int32: from `lowest`, or `but`."""
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, OverflowError) as error:  # lists of several lengths, or of what is no number
        raise DataError(
            f"{name}: {column!r} must be a list of integers; got lists of several lengths or other objects "
            f"({one_line(error)}); tokenise again"
        ) from error
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iub"):
        at = next((at for at, value in enumerate(array) if not _is_whole(value)), 0) if array.ndim == 1 else None
        where = "" if at is None else f" with {array[at]} at place {at}"
        raise DataError(
            f"{name}: {column!r} must be a list of integers; got {array.dtype} of shape {array.shape}{where}; tokenise "
            "again"
        )
    if array.size and (array.min() < lowest or array.max() > _INT32_MAX):
        wrong = (array > _INT32_MAX) | ((array < lowest) & (array != but))
        if wrong.any():
            value = int(array[np.argmax(wrong)])
            why = (
                f"and tokens are from 0{f', or {but} where the loss passes over' if but else ''}"
                if -(2**31) <= value < 0
                else "which does not fit int32"
            )
            raise DataError(f"{name}: {column!r} holds {value}, {why}; tokenise again")
    return array.astype(np.int32)


def _is_whole(value: Any) -> bool:
    if isinstance(value, (float, np.floating)):
        return bool(value == value // 1)
    return isinstance(value, (int, np.integer)) and -(2**63) <= int(value) < 2**63


def _digest(document: Any) -> str:
    """What a document is known by: its tokens, or whatever is in their place."""
    values = document.get("input_ids") if isinstance(document, Mapping) else document
    try:
        content = np.asarray(values, dtype=np.int64).tobytes()
    except (ValueError, TypeError, OverflowError):  # it is refused when its turn comes
        content = repr(values).encode("utf-8", "replace")
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _row(pieces: list[_Piece]) -> dict[str, Any]:
    return {
        "input_ids": np.concatenate([ids for ids, _ in pieces]),
        "labels": np.concatenate([labels for _, labels in pieces]),
        "lengths": [len(ids) for ids, _ in pieces],
    }


def _log_pass(number: int, report: dict[str, Any], seq_len: int) -> None:
    full = report["tokens"] / max(1, report["rows"] * seq_len)
    logger.info(
        "lane %d: %d documents in %d rows, %.2f%% full", number, report["documents"], report["rows"], 100 * full
    )
    if report["tokens lost"]:
        logger.warning(
            "lane %d: %d documents longer than a row lost %d tokens",
            number, report["longer than a row"], report["tokens lost"],
        )  # fmt: skip
    if report["repeated ids"]:
        logger.warning(
            "lane %d: %d documents have an id that came before, and are packed all the same",
            number,
            report["repeated ids"],
        )
    if report["cut bare"]:
        said = cut_bare_message(report["first cut bare"], report["cut bare"], seq_len)
        logger.warning('lane %d: %s; raise seq_len, or choose overflow="split"', number, said)


def _has_shuffle_buffer(source: Any) -> bool:
    """Whether `datasets` shuffles the stream through a buffer, whose contents its own state forgets."""
    nodes = [getattr(source, "_ex_iterable", None)]
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        if hasattr(node, "buffer_size"):
            return True
        nodes += [getattr(node, "ex_iterable", None), *(getattr(node, "ex_iterables", None) or ())]
    return False


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _as_it_is(item: Any) -> Any:
    return item
