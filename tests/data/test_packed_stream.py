"""PackedStream: every document once, ranks equal, the same batches after a resume with other ranks and workers."""

import logging
from itertools import chain

import numpy as np
import pytest
from datasets import Dataset, interleave_datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from packflex.data.collate import PackedCollator
from packflex.data.errors import DataError
from packflex.data.stream import PackedStream

COUNT = 150
LENGTHS = np.random.default_rng(0).integers(1, 12, COUNT)
# Document i holds the id i + 1 and nothing else, so that a batch says which documents are in it.
DOCUMENTS = Dataset.from_dict({"input_ids": [[i + 1] * int(n) for i, n in enumerate(LENGTHS)]})
COLLATE = PackedCollator(16)


def source(shards=3):
    return DOCUMENTS.to_iterable_dataset(num_shards=shards)


def make(documents=None, batch_size=2, **options):
    documents = source() if documents is None else documents
    return PackedStream(documents, COLLATE, batch_size, seq_len=16, **{"pool": 8, **options})


def documents_of(batch):
    starts = (batch["position_ids"] == 0) & (batch["input_ids"] > 0)
    return batch["input_ids"][starts].tolist()


def one_pass(**options):
    return [documents_of(batch) for batch in make(**options)]


EVERY = list(range(1, COUNT + 1))


@pytest.mark.parametrize("lanes", [None, 1, 2, 3, 5])
def test_a_pass_is_every_document_once(lanes):
    stream = make(lanes=lanes)
    first, second = ([documents_of(b) for b in stream] for _ in range(2))
    assert sorted(chain.from_iterable(first)) == sorted(chain.from_iterable(second)) == EVERY
    batch = next(iter(make(lanes=lanes)))
    assert batch["labels"][batch["position_ids"] == 0].eq(-100).all(), "the first token of a document has no label"


def test_any_number_of_workers_gives_the_same_batches():
    alone = one_pass(lanes=4)
    assert sorted(chain.from_iterable(alone)) == EVERY
    for workers in (1, 3):
        assert one_pass(lanes=4, num_workers=workers) == alone


@pytest.mark.parametrize("shuffle_buffer", [0, 20])
def test_resume_at_every_batch_gives_what_would_have_come(shuffle_buffer):
    """Also behind a shuffle buffer of `datasets`, whose own state forgets what the buffer holds."""

    def fresh():
        documents = source().shuffle(seed=3, buffer_size=shuffle_buffer) if shuffle_buffer else source()
        return make(documents, lanes=4, num_batches=30)

    unbroken, batches, states = fresh(), [], []
    states.append(unbroken.state_dict())
    for _ in range(3):  # more than two passes over the source
        for batch in unbroken:
            batches.append(documents_of(batch))
            states.append(unbroken.state_dict())
    assert len(batches) == 90
    for step in (0, 1, 5, 17, 29, 30, 31, 47, 63):
        resumed = fresh()
        resumed.load_state_dict(states[step])
        rest = [documents_of(b) for b in resumed]
        while len(rest) < len(batches) - step:
            rest += [documents_of(b) for b in resumed]
        assert rest == batches[step:]


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (2, 1)])
def test_resume_with_other_workers_while_they_prefetch(before, after):
    unbroken = one_pass(lanes=4)
    stream = make(lanes=4, num_workers=before)
    iterator = iter(stream)
    first = [documents_of(next(iterator)) for _ in range(23)]
    state = stream.state_dict()
    assert first == unbroken[:23]
    resumed = make(lanes=4, num_workers=after)
    resumed.load_state_dict(state)
    assert [documents_of(b) for b in resumed] == unbroken[23:]


def state_of_all(streams):
    """What `state_dict` gathers over the ranks when they are processes."""
    states = [stream.state_dict() for stream in streams]
    return {**states[0], "lanes": {n: lane for state in states for n, lane in state["lanes"].items()}}


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 15), st.integers(1, 7))
def test_other_ranks_on_resume_see_every_document_once(before, after, steps, lanes):
    lanes = max(before, after, lanes)
    old = [make(lanes=lanes, num_batches=steps + 1, rank=r, world_size=before, repeat=False) for r in range(before)]
    seen = []
    for stream in old:
        iterator = iter(stream)
        seen += [n for _ in range(steps) for n in documents_of(next(iterator))]
    new = [make(lanes=lanes, num_batches=100, rank=r, world_size=after, repeat=False) for r in range(after)]
    counts = set()
    for stream in new:
        stream.load_state_dict(state_of_all(old))
        batches = [documents_of(b) for b in stream]
        counts.add(len(batches))
        seen += [n for batch in batches for n in batch]
    assert counts == {100 - steps}
    assert sorted(seen) == EVERY


def test_epochs_have_num_batches_on_every_rank_and_go_on_where_they_stopped():
    streams = [make(num_batches=11, rank=r, world_size=2, lanes=2, repeat=False) for r in range(2)]
    assert [len(stream) for stream in streams] == [11, 11]
    seen = []
    for _ in range(8):
        for stream in streams:
            batches = [documents_of(batch) for batch in stream]
            assert len(batches) == 11
            seen += list(chain.from_iterable(batches))
    assert sorted(seen) == EVERY, "the rest of the batches hold no token"
    with pytest.raises(TypeError, match="no length"):
        len(make())


def test_plain_iterables_and_masks():
    documents = [{"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}, {"input_ids": [8, 9], "labels": [-100, 9]}]
    (batch,) = make(documents, batch_size=1)
    assert batch["labels"][0, :5].tolist() == [-100, 6, 7, -100, 9]
    assert batch["packed"].lengths == ((3, 2),)


def test_documents_longer_than_a_row(caplog):
    long = [{"input_ids": [1] * 40}, {"input_ids": [2] * 3}]
    (batch,) = make(long, batch_size=4)
    assert sorted(sum(batch["packed"].lengths, ())) == [3, 8, 16, 16]
    with caplog.at_level(logging.INFO):
        (batch,) = make(long, batch_size=4, overflow="truncate")
    assert sorted(sum(batch["packed"].lengths, ())) == [3, 16]
    assert "1 documents longer than a row lost 24 tokens" in caplog.text
    assert "lane 0: 2 documents in 2 rows, 59.38% full" in caplog.text
    (batch,) = make(long, batch_size=4, overflow="drop")
    assert sum(batch["packed"].lengths, ()) == (3,)
    with pytest.raises(DataError, match="document 0 of lane 0: 40 tokens, more than seq_len=16"):
        list(make(long, overflow="error"))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"text": "a"}, "no 'input_ids' .it has 'text', 'source'.; tokenise the stream first"),
        ({"input_ids": []}, "the document is empty"),
        ({"input_ids": [1.0, float("nan")]}, "'input_ids' must be a list of integers; got float64"),
        ({"input_ids": [[1], [2]]}, r"list of integers; got int64 of shape \(2, 1\)"),
        ({"input_ids": [1, 2**31]}, "holds 2147483648, which does not fit int32"),
        ({"input_ids": [1, 2], "labels": [1]}, "input_ids has 2 tokens and labels 1"),
        ({"input_ids": [1], "labels": [1], "loss_mask": [1]}, "has labels and loss_mask; keep the one"),
        ({"input_ids": [[1], [2, 3]]}, r"'input_ids' must be a list of integers; got lists of several len.*; tokenise"),
        ({"input_ids": [1.0, 2.5]}, r"got float64 of shape \(2,\) with 2\.5 at place 1; tokenise again"),
        ({"input_ids": [1.0, float("nan")]}, "with nan at place 1; tokenise again"),
        ({"input_ids": [1, None]}, "got object .* with None at place 1; tokenise again"),
        ({"input_ids": [1, 2**70]}, "got object .* with 1180591620717411303424 at place 1"),
        ({"input_ids": ["a"]}, "with a at place 0; tokenise again"),
        ({"input_ids": None}, "'input_ids' must be a list of integers; got object"),
        ({"input_ids": [3, -1]}, "'input_ids' holds -1, and tokens are from 0; tokenise again"),
        ({"input_ids": [3, -(2**40)]}, "holds -1099511627776, which does not fit int32; tokenise again"),
        ({"input_ids": np.array([2**63 + 5], np.uint64)}, "holds 9223372036854775813, which does not fit int32"),
        (
            {"input_ids": [3, 4], "labels": [-100, -1]},
            "'labels' holds -1, .*from 0, or -100 where the loss passes over",
        ),
        ({"input_ids": [3, 4], "labels": [3, 2**31]}, "'labels' holds 2147483648, which does not fit int32"),
        ({"input_ids": [3, 4], "labels": None}, "'labels' is missing .null.; remove the document or tokenise it again"),
        ({"input_ids": [3, 0], "attention_mask": [1, 0]}, "is padded .its attention_mask has zeros.: tokenise without"),
        ({"input_ids": [3, 4], "attention_mask": [1]}, "'attention_mask' must hold a number for each of the 2 tokens"),
        ({"input_ids": [3, 4], "attention_mask": np.array(1)}, "'attention_mask' must hold a number for each of the 2"),
        ({"input_ids": [3, 4], "attention_mask": []}, "'attention_mask' must hold a number for each of the 2 tokens"),
        ({"input_ids": [3, 4], "attention_mask": None}, "'attention_mask' must hold a number for each of the 2 tokens"),
        ({"input_ids": [3, 4], "attention_mask": [1, 2]}, "'attention_mask' holds 2, and says 1 of a token and 0 of"),
        ({"input_ids": [3, 4], "attention_mask": ["1", "1"]}, "'attention_mask' must be a list of integers"),
    ],
)
def test_bad_documents_are_named(document, message):
    with pytest.raises(DataError, match=f"train:7:? .*{message}"):
        list(make([{"input_ids": [1]}, {**document, "source": "train:7"}]))


def test_bad_arguments_and_states():
    for options, message in [
        ({"overflow": "cut"}, "overflow must be one of"),
        ({"rank": 2, "world_size": 2}, "got rank 2 of 2"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"num_batches": 0}, "num_batches must be at least 1; got 0"),
        ({"pool": 0}, "pool must be at least 1"),
        ({"lanes": 1, "world_size": 2}, "lanes must be at least world_size=2"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(**options)
    with pytest.raises(ValueError, match=r"torch\.distributed, which is not initialised; give num_batches"):
        next(iter(make(world_size=2)))
    state = make(lanes=2).state_dict()
    with pytest.raises(ValueError, match="stream had batch_size=2, this one has 3"):
        make(batch_size=3).load_state_dict(state)
    alone = make(lanes=2, rank=0, world_size=2).state_dict()
    with pytest.raises(ValueError, match=r"lacks lanes \[1\] of 2: its state was taken on one rank alone"):
        make(lanes=2).load_state_dict(alone)


def test_the_state_survives_a_checkpoint_that_is_read_as_weights_only(tmp_path):
    import torch

    stream = make(num_batches=20)
    iterator = iter(stream)
    for _ in range(5):
        next(iterator)
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    rest = [documents_of(b) for b in iterator]
    resumed = make(num_batches=20)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [documents_of(b) for b in resumed] == rest


def test_a_whole_attention_mask_and_a_document_that_is_none():
    (batch,) = make([{"input_ids": [3, 4], "attention_mask": [1, 1]}], batch_size=1)
    assert batch["labels"][0, :2].tolist() == [-100, 4]
    with pytest.raises(
        DataError, match="document 1 of lane 0: a list, and a document must be a mapping with 'input_id"
    ):
        list(make([{"input_ids": [1]}, [1, 2]]))


def test_documents_whose_supervision_is_all_cut_are_reported(caplog):
    documents = [
        {"input_ids": [7] * 20, "labels": [-100] * 18 + [7, 7], "source": "a:1"},
        {"input_ids": [7] * 20, "labels": [-100] * 15 + [7] * 5, "source": "a:2"},
        {"input_ids": [7] * 20, "labels": [-100] * 16 + [7] + [-100] * 3, "source": "a:3"},
        {"input_ids": [7] * 20, "labels": [-100] * 20, "source": "a:4"},
    ]
    list(make(documents, overflow="truncate"))
    assert "lane 0: a:1: rows of 16 tokens cut off every supervised token (2 such documents); raise" in caplog.text
    caplog.clear()
    list(make(documents, overflow="split"))
    assert "lane 0: a:3: rows of 16 tokens cut off every supervised token (1 such documents)" in caplog.text
    caplog.clear()
    list(make(documents[:2], overflow="split"))
    list(make([*documents, {"input_ids": [1, 2]}], overflow="drop"))
    assert "supervised" not in caplog.text


class Empty:
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize("num_batches", [None, 3])
def test_a_source_without_documents_is_refused(num_batches, caplog):
    for options in ({}, {"lanes": 3}):
        with pytest.raises(DataError, match="source gives no document; check its files"):
            list(make(Empty(), num_batches=num_batches, **options))
    with pytest.raises(DataError, match=r'all 2 documents .* longer than seq_len=16, and overflow="drop" leaves none'):
        list(make([{"input_ids": [1] * 17}] * 2, num_batches=num_batches, overflow="drop"))
    if num_batches:
        one = make([{"input_ids": [1] * 3}], num_batches=3, rank=1, world_size=2)
        assert [documents_of(batch) for batch in one] == [[], [], []]
        assert "rank 1 has no documents: its batches count for nothing" in caplog.text


def test_a_state_is_refused_by_another_stream():
    def state(**options):
        stream = make(**options)
        iterator = iter(stream)
        for _ in range(4):
            next(iterator)
        return stream.state_dict()

    first = state(lanes=2, num_batches=9)
    for options, message in [
        ({"pool": 20}, "stream had pool=8, this one has 20; resume with the same, or start a new run"),
        ({"lanes": 3}, "stream had lanes=2, this one has 3"),
        ({"overflow": "drop"}, "stream had overflow=split, this one has drop"),
        ({"documents": source(shards=5)}, "stream had num_shards=3, this one has 5"),
        ({"world_size": 4}, "has 2 lanes, fewer than world_size=4, so that ranks would go empty; resume on at most 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(**{"num_batches": 9, **options}).load_state_dict(first)
    make(num_batches=9, num_workers=3).load_state_dict(first)  # the lanes that were, unless others are asked for

    other = Dataset.from_dict({"input_ids": [*DOCUMENTS["input_ids"][:3], *[[99]] * 147]})
    for documents, at in ((other.to_iterable_dataset(num_shards=3), 3), (source().shuffle(seed=1, buffer_size=50), 0)):
        with pytest.raises(
            DataError, match=f"document {at} of lane 0 is not the one that the checkpoint's stream read"
        ):
            make(documents, lanes=2, num_batches=9).load_state_dict(first)
    listed = DOCUMENTS.to_list()
    with pytest.raises(
        DataError, match="document 1 of lane 0 is not the one that the checkpoint's stream read: resume"
    ):
        make([listed[0], *listed[2:]]).load_state_dict(state(documents=listed))
    with pytest.raises(DataError, match="document 2 of lane 0 is not the one"):
        make(listed[:2]).load_state_dict(state(documents=listed, lanes=2))

    named = state(fingerprint="corpus 1")
    with pytest.raises(ValueError, match="stream had fingerprint=corpus 1, this one has corpus 2"):
        make(fingerprint="corpus 2").load_state_dict(named)
    make().load_state_dict(named)


def test_ids_that_came_before_and_lost_supervision_are_told_as_the_stream_goes(caplog):
    list(make([{"input_ids": [1], "id": i % 3} for i in range(5)]))
    assert "lane 0: 2 documents have an id that came before, and are packed all the same" in caplog.text
    late = {"input_ids": [7] * 20, "labels": [-100] * 16 + [7] * 4, "source": "a.jsonl:7"}
    stream = make([late, *({"input_ids": [1] * 9} for _ in range(40))], overflow="truncate", batch_size=1)
    next(iter(stream))
    assert "lane 0: a.jsonl:7: rows of 16 tokens cut off every supervised token" in caplog.text, "long before its end"


def test_a_source_that_gives_its_documents_once_is_refused():
    with pytest.raises(ValueError, match=r"each time it is iterated, and a generator gives them once; give a list"):
        make({"input_ids": [i]} for i in range(3))


def shuffled(kind):
    """Streams of datasets that keep documents back: their order is drawn, and the same each time."""
    if kind == "interleaved":
        halves = [DOCUMENTS.select(range(start, COUNT, 2)).to_iterable_dataset(num_shards=4) for start in range(2)]
        return interleave_datasets(halves, probabilities=[0.3, 0.7], seed=1, stopping_strategy="all_exhausted")
    return source(4).shuffle(seed=1, buffer_size=20)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shuffled", "interleaved"])
def test_shuffled_streams_are_the_same_in_workers_and_resume(kind):
    whole = [documents_of(batch) for batch in make(shuffled(kind), lanes=4)]
    if kind == "shuffled":
        assert sorted(chain(*whole)) == list(range(1, COUNT + 1))
    for before, after in ((0, 2), (2, 0), (2, 2), (0, 0)):
        first = make(shuffled(kind), lanes=4, num_workers=before)
        batches = iter(first)
        head = [documents_of(next(batches)) for _ in range(9)]
        state = first.state_dict()
        batches.close()
        second = make(shuffled(kind), lanes=4, num_workers=after)
        second.load_state_dict(state)
        assert head + [documents_of(batch) for batch in second] == whole, (before, after)


def test_a_document_of_none_is_refused_and_ends_nothing():
    documents = [{"input_ids": [1, 2]}, None, {"input_ids": [3]}]
    with pytest.raises(DataError, match="document 1 of lane 0: a NoneType, and a document must be a mapping"):
        list(make(documents))


def test_what_is_wrong_in_a_worker_is_said_in_one_line():
    documents = [{"input_ids": [1, 2]}] * 5 + [{"input_ids": [], "source": "late.jsonl:6"}]
    with pytest.raises(DataError) as error:
        list(make(documents, num_workers=1))
    assert str(error.value) == "late.jsonl:6: the document is empty; leave empty documents out of the stream"
