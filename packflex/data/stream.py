"""`PackedStream`: packed batches from a stream of tokenised documents, packed online, equal on every rank, resumable.

The stream is cut into *lanes* once: shards of the source, or every n-th document of a shard where there are more lanes
than shards. A lane is read and packed by itself, so its state (place in the source and documents that wait) is all that
a resume needs; ranks and worker processes only share the lanes out. Lanes take turns batch by batch, whatever the
number of workers, so the order of batches depends on lanes and ranks alone.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from packflex.data.errors import DataError
from packflex.data.labels import FILLER, IGNORED, MASK_COLUMNS
from packflex.packing.strategies import OVERFLOWS
from packflex.packing.stream import StreamPacker

logger = logging.getLogger(__name__)

_SNAPSHOT_EVERY = 16  # batches of a lane between the states that a worker sends
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
            `IterableDataset`, or anything that gives the same documents each time it is iterated.
        collate: list of rows to a batch, such as `PackedCollator`.
        batch_size: rows of a batch.
        seq_len: tokens of a row.
        num_batches: batches of an epoch on each rank; None for one pass over the source.
        pool: documents that wait in each lane; more fill rows better.
        lanes: parts of the stream; by default the source's shards, or one for each rank and worker if that is more.
        overflow: "split", "truncate", "drop" or "error" for documents longer than a row; counted in the log.
        repeat: with `num_batches`, begin again when the source ends; otherwise batches without tokens follow.
        rank, world_size: this process, and processes.
        num_workers: processes that read and pack; 0 for none.
        pin_memory: copy batches into page-locked memory.

    Raises:
        ValueError: arguments out of range.

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
    ) -> None:
        if overflow not in OVERFLOWS:
            raise ValueError(f"overflow must be one of {', '.join(OVERFLOWS)}; got {overflow!r}")
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
        shards = int(getattr(source, "num_shards", 1))
        self.lanes = lanes or max(shards, world_size * max(1, num_workers))
        if self.lanes < world_size:
            raise ValueError(f"lanes must be at least world_size={world_size}, so that no rank goes empty; got {lanes}")
        self._states: dict[int, dict[str, Any]] = {}
        self._live: dict[int, _Lane] = {}  # lanes of this process, when there are no workers
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
        lanes = {
            number: self._live[number].state() if number in self._live else self._states.get(number, _fresh_state(0))
            for number in self._mine()
        }
        if self.world_size > 1 and _is_distributed():
            gathered: list[Any] = [None] * self.world_size
            torch.distributed.all_gather_object(gathered, lanes)
            lanes = {number: state for part in gathered for number, state in part.items()}
        return {
            "lanes": lanes,
            "num_lanes": self.lanes,
            "delivered": self._delivered,
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "pool": self.pool,
            "overflow": self.overflow,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last batch delivered when the state was taken; any number of ranks and workers.

        Raises:
            ValueError: a state of other rows, or one that lacks lanes of this rank.
        """
        for name in ("seq_len", "batch_size", "pool", "overflow"):
            if state.get(name, getattr(self, name)) != getattr(self, name):
                raise ValueError(
                    f"the checkpoint's stream had {name}={state[name]}, this one has {getattr(self, name)}; resume "
                    "with the same, or start a new run from the weights"
                )
        if state["num_lanes"] < self.world_size:
            raise ValueError(
                f"the checkpoint's stream has {state['num_lanes']} lanes, and {self.world_size} ranks would leave some "
                "without documents; resume on fewer ranks, or begin with lanes= as many as ranks will ever be"
            )
        self.lanes = state["num_lanes"]
        missing = [number for number in self._mine() if number not in state["lanes"]]
        if missing:
            raise ValueError(
                f"the checkpoint lacks lanes {missing} of {self.lanes}: its state was taken on one rank alone; take it "
                "on every rank at the same step, with torch.distributed initialised"
            )
        self._states = {number: state["lanes"][number] for number in self._mine()}
        self._live = {}
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
            while active:
                number = min(active, key=lambda n: (turn[n][0], n))
                lane, batch, state, report = next(feeds[number])
                assert lane == number, "a feed gives its lanes in the order in which they are asked for"
                turn[number] = (turn[number][0] + 1, batch is None)
                if state is not None:
                    self._states[number] = state
                elif number in self._states:
                    self._states[number] = {**self._states[number], "replay": self._states[number]["replay"] + 1}
                if batch is None:
                    active.remove(number)
                    _log_pass(number, report, self.seq_len)
                else:
                    gave_any = True
                    yield batch
            if self.num_batches is None:
                self._begin_next_pass(mine)
                return
            if is_whole_pass and not gave_any:  # a source without documents has no next pass
                if self.world_size == 1:
                    raise DataError("the stream gave no document in a whole pass; look at its files and filters")
                logger.warning("the lanes of rank %d gave no document in a whole pass", self.rank)
                return
            if not self.repeat:
                return
            self._begin_next_pass(mine)
            turn = dict.fromkeys(mine, (0, False))

    def _begin_next_pass(self, mine: list[int]) -> None:
        done = {n: self._live[n].epoch if n in self._live else self._states[n]["pass"] for n in mine}
        self._states = {n: _fresh_state(number + 1) for n, number in done.items()}
        self._live = {}

    def _turn(self, number: int) -> tuple[int, bool]:
        """Batches that a lane gave in this pass, and whether it is over."""
        if number in self._live:
            lane = self._live[number]
            return lane.batches, lane.over
        state = self._states.get(number)
        return (state["batches"] + state["replay"], state["over"]) if state else (0, False)

    def _feeds(self, mine: list[int]) -> dict[int, Iterator[Any]]:
        """For each lane the iterator that gives its batches; lanes of one worker share it."""
        make = {n: self._lane(n) for n in mine if n not in self._live and not self._turn(n)[1]}
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
            )
            feeds |= dict.fromkeys((lane.number for lane in part), iter(loader))
        return feeds

    def _lane(self, number: int) -> _Lane:
        return _Lane(
            number, self.lanes, self.source, StreamPacker(self.seq_len, self.pool), self.overflow, self.batch_size,
            self._states.get(number),
        )  # fmt: skip

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
        self.report: dict[str, int] = {"without supervision": 0, **state["report"]}
        self._read = state["read"]
        self._start: dict[str, Any] | None = state["source"]
        self._read_since = 0
        self._replay = state["replay"]
        self._documents: Iterator[Mapping[str, Any]] | None = None
        self._exhausted = state["exhausted"]
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
            return []
        self.report["rows"] += len(rows)
        return rows + [dict(FILLER)] * (self.batch_size - len(rows))

    def _next_row(self) -> list[_Piece]:
        if self._documents is None and not self._exhausted:
            self._documents = self._open()
        while not self._exhausted and not self.packer.is_full:
            document = next(self._documents, None)  # type: ignore[arg-type]
            if document is None:
                self._exhausted = True
                break
            self._read += 1
            self._read_since += 1
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
            next(documents, None)
        return documents

    def _add(self, document: Mapping[str, Any]) -> None:
        name = f"document {self._read - 1} of lane {self.number}"
        if not isinstance(document, Mapping):
            raise DataError(f"{name}: a document must be a mapping with 'input_ids'; got {type(document).__name__}")
        name = document.get("source") or name
        ids, labels = _tokens(document, name)
        self.report["documents"] += 1
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
            if self.overflow == "truncate":
                self.report["tokens lost"] += len(ids) - room
                ids, labels = ids[:room], labels[:room]
        for start in range(0, len(ids), room):
            piece = ids[start : start + room], labels[start : start + room].copy()
            piece[1][0] = IGNORED
            self.report["without supervision"] += not (piece[1] != IGNORED).any() and len(piece[1]) > 1
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
            "ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "lengths": torch.tensor([len(piece[0]) for piece in pending], dtype=torch.int64),
        }


class _Feed(IterableDataset[Any]):
    """Batches of some lanes in turn: (lane, batch, state or None, report); a batch of None ends its lane."""

    def __init__(self, lanes: list[_Lane], collate: Callable[..., Any], batch_size: int, snapshots: bool) -> None:
        self.lanes, self.collate, self.batch_size, self.snapshots = lanes, collate, batch_size, snapshots

    def __iter__(self) -> Iterator[tuple[int, Any, dict[str, Any] | None, dict[str, int]]]:
        if self.snapshots:
            for lane in self.lanes:
                lane.replay()
        active = list(self.lanes)
        while active:
            lane = min(active, key=lambda lane: (lane.batches, lane.number))
            first = lane.batches % _SNAPSHOT_EVERY == 0
            rows = lane.next_rows()
            if not rows:
                active.remove(lane)
            state = lane.state() if self.snapshots and (first or not rows) else None
            yield lane.number, (self.collate(rows) if rows else None), state, lane.report


def _fresh_state(number: int) -> dict[str, Any]:
    """The state of a lane at the beginning of a pass."""
    nothing = torch.zeros(0, dtype=torch.int32)
    return {
        "pass": number, "batches": 0, "replay": 0, "over": False, "exhausted": False, "read": 0, "source": None,
        "report": {"documents": 0, "rows": 0, "tokens": 0, "longer than a row": 0, "tokens lost": 0},
        "ids": nothing, "labels": nothing, "lengths": nothing.long(),
    }  # fmt: skip


def _tokens(document: Mapping[str, Any], name: str) -> _Piece:
    """Token ids and labels of a document, checked.

    Raises:
        DataError: no, no integer or too large ids, an empty document, labels or a mask of another length.
    """
    if "input_ids" not in document:
        raise DataError(f"{name}: no 'input_ids' (it has {', '.join(map(repr, document))}); tokenise the stream first")
    ids = _integers(document["input_ids"], name, "input_ids")
    if len(ids) and ids.min() < 0:
        raise DataError(f"{name}: 'input_ids' holds {ids.min()}; token ids are 0 or more: tokenise again")
    if document.get("attention_mask") is not None and not np.all(document["attention_mask"]):
        raise DataError(f"{name}: the document is padded (its attention_mask has zeros); tokenise without padding")
    if not len(ids):
        raise DataError(f"{name}: the document is empty; leave empty documents out of the stream")
    given = [column for column in ("labels", *MASK_COLUMNS) if document.get(column) is not None]
    if len(given) > 1:
        raise DataError(f"{name}: has {' and '.join(given)}; keep the one that says what is supervised")
    if not given:
        return ids, ids
    marks = _integers(document[given[0]], name, given[0])
    if len(marks) != len(ids):
        raise DataError(f"{name}: input_ids has {len(ids)} tokens and {given[0]} {len(marks)}; they must be equal")
    return ids, (marks if given[0] == "labels" else np.where(marks != 0, ids, np.int32(IGNORED)))


def _integers(values: Any, name: str, column: str) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError as error:  # lists of unlike lengths
        raise DataError(f"{name}: {column!r} must be a list of integers; got nested lists of unlike lengths") from error
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iub"):
        raise DataError(f"{name}: {column!r} must be a list of integers; got {array.dtype} of shape {array.shape}")
    if array.size and (array.max() > 2**31 - 1 or array.min() < -(2**31)):
        raise DataError(f"{name}: {column!r} holds {array.max()}, which does not fit int32; tokenise again")
    return array.astype(np.int32)


def _row(pieces: list[_Piece]) -> dict[str, Any]:
    return {
        "input_ids": np.concatenate([ids for ids, _ in pieces]),
        "labels": np.concatenate([labels for _, labels in pieces]),
        "lengths": [len(ids) for ids, _ in pieces],
    }


def _log_pass(number: int, report: dict[str, int], seq_len: int) -> None:
    full = report["tokens"] / max(1, report["rows"] * seq_len)
    logger.info(
        "lane %d: %d documents in %d rows, %.2f%% full", number, report["documents"], report["rows"], 100 * full
    )
    if report.get("without supervision"):
        logger.warning(
            "lane %d: %d documents, or pieces of them, have no supervised token: they take room and train nothing",
            number, report["without supervision"],
        )  # fmt: skip
    if report["tokens lost"]:
        logger.warning(
            "lane %d: %d documents longer than a row lost %d tokens",
            number, report["longer than a row"], report["tokens lost"],
        )  # fmt: skip


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
