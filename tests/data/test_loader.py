"""PackedLoader: every row once, ranks equal, exact resume at every step, with workers and with other world sizes."""

import os
import signal

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from packflex.data.collate import PackedCollator
from packflex.data.loader import PackedLoader, _costs, rows_fingerprint
from packflex.data.stream import PackedStream
from packflex.packing.order import balanced_order


def rows_of(count):
    return Dataset.from_dict(
        {
            "input_ids": [[i + 1] * (1 + i % 4) for i in range(count)],
            "labels": [[i + 1] * (1 + i % 4) for i in range(count)],
            "lengths": [[1 + i % 4] for i in range(count)],
        }
    )


ROWS = rows_of(23)
COLLATE = PackedCollator(4)


def make(rows=ROWS, batch_size=2, **options):
    return PackedLoader(rows, COLLATE, batch_size, **options)


def ids(batch):
    """Row numbers of a batch, 0 for a filler row."""
    return batch["input_ids"][:, 0].tolist()


@pytest.mark.parametrize("order", ["shuffle", "balanced", "sequential"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_an_epoch_is_every_row_once_and_ranks_are_equal(order, world_size):
    loaders = [make(order=order, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(2):
        batches = [[ids(batch) for batch in loader] for loader in loaders]
        assert {len(b) for b in batches} == {len(loaders[0])}
        assert sorted(i for rank in batches for b in rank for i in b if i) == list(range(1, 24))


def test_epochs_differ_and_sequential_does_not():
    shuffled = make()
    assert [ids(b) for b in shuffled] != [ids(b) for b in shuffled]
    sequential = make(order="sequential")
    assert [ids(b) for b in sequential] == [ids(b) for b in sequential]


@pytest.mark.parametrize("order", ["shuffle", "balanced"])
def test_resume_at_every_step_equals_the_unbroken_run(order):
    unbroken = make(order=order)
    batches, states = [], [unbroken.state_dict()]
    for _ in range(2):
        for batch in unbroken:
            batches.append(ids(batch))
            states.append(unbroken.state_dict())
    for step, state in enumerate(states):
        resumed = make(order=order)
        resumed.load_state_dict(state)
        rest = [ids(b) for b in resumed]
        while len(rest) < len(batches) - step:
            rest += [ids(b) for b in resumed]
        assert rest[: len(batches) - step] == batches[step:]


def test_state_counts_what_was_delivered_not_what_workers_prefetched():
    loader = make(num_workers=2)
    iterator = iter(loader)
    first = [ids(next(iterator)) for _ in range(3)]
    state = loader.state_dict()
    rest = [ids(b) for b in iterator]
    resumed = make(num_workers=0)
    resumed.load_state_dict(state)
    assert len(resumed) == len(loader) == 12
    assert [ids(b) for b in resumed] == rest
    assert len(first) + len(rest) == 12


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 5), st.sampled_from(["shuffle", "balanced"]))
def test_resume_on_another_number_of_ranks_sees_every_row_once(before, after, steps, order):
    old = [make(order=order, rank=r, world_size=before) for r in range(before)]
    seen = []
    for loader in old:
        iterator = iter(loader)
        seen += [i for _ in range(min(steps, len(loader) - 1)) for i in ids(next(iterator))]
    state = old[0].state_dict()
    new = [make(order=order, rank=r, world_size=after) for r in range(after)]
    for loader in new:
        loader.load_state_dict(state)
        length = len(loader)
        batches = [ids(b) for b in loader]
        delivered = state["delivered"] if state["started"] else 0
        assert len(batches) == length - delivered
        seen += [i for b in batches for i in b]
    assert sorted(i for i in seen if i) == list(range(1, 24))


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_any_kills_resumes_ranks_batch_sizes_and_seeds_see_every_row_once(data):
    """Two kills in one epoch, each followed by another number of ranks and another batch size; then a whole epoch."""
    rows = rows_of(data.draw(st.integers(1, 40), "rows"))
    order = data.draw(st.sampled_from(["shuffle", "balanced", "sequential"]), "order")
    options = {"order": order, "seed": data.draw(st.integers(0, 5), "seed")}
    state, seen = None, []
    for kill in (True, True, False):
        world, batch_size = data.draw(st.integers(1, 4), "ranks"), data.draw(st.integers(1, 3), "batch size")
        loaders = [make(rows, batch_size, rank=r, world_size=world, **options) for r in range(world)]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
        left = len(loaders[0]) - (state["delivered"] if state else 0)
        steps = data.draw(st.integers(0, left - 1), "steps") if kill else left
        iterators = [iter(loader) for loader in loaders]
        seen += [i for _ in range(steps) for iterator in iterators for i in ids(next(iterator)) if i]
        if kill:
            state = loaders[0].state_dict()
            assert all(loader.state_dict() == state for loader in loaders)
        else:
            assert all(next(iterator, None) is None for iterator in iterators)
    assert sorted(seen) == list(range(1, len(rows) + 1))
    again = [i for loader in loaders for batch in loader for i in ids(batch) if i]
    assert sorted(again) == list(range(1, len(rows) + 1))


@settings(deadline=None, max_examples=3)
@given(st.integers(0, 5), st.integers(0, 7), st.sampled_from([(0, 2), (2, 0), (1, 2)]))
def test_workers_and_seeds_change_nothing_of_a_resume(seed, steps, workers):
    whole = [ids(batch) for batch in make(seed=seed)]
    loader = make(seed=seed, num_workers=workers[0])
    iterator = iter(loader)
    assert [ids(next(iterator)) for _ in range(steps)] == whole[:steps]
    resumed = make(seed=seed, num_workers=workers[1])
    resumed.load_state_dict(loader.state_dict())
    assert [ids(batch) for batch in resumed] == whole[steps:]


def test_an_older_balanced_state_goes_on_in_its_own_order():
    """Before ranks were in it, the rows of a step were dealt out at random."""
    loaders = [make(order="balanced", rank=r, world_size=2) for r in range(2)]
    for loader in loaders:
        loader.load_state_dict({**STATE_OF_BEFORE, "order": "balanced"})
    rest = [i for loader in loaders for batch in loader for i in ids(batch) if i]
    order = balanced_order(_costs(ROWS, 0.0), 4, 0, 0)
    assert sorted(rest) == sorted((order[8:] + 1).tolist())


STATE_OF_BEFORE = {
    "epoch": 0, "consumed": 8, "delivered": 2, "group": 4, "num_rows": 23, "order": "shuffle", "seed": 0,
    "started": True,
}  # fmt: skip


def other_rows():
    """As many rows of the same lengths; one document, of a row in the middle, says something else."""
    rows = ROWS.to_list()
    rows[11]["input_ids"] = [99] * len(rows[11]["input_ids"])
    return Dataset.from_list(rows)


@pytest.mark.parametrize("order", ["shuffle", "sequential"])
def test_a_state_of_other_rows_is_refused(order):
    state = make(order=order).state_dict()
    with pytest.raises(ValueError, match=r"loader had rows='\w{16}', this one has '\w{16}'; resume with the same data"):
        make(other_rows(), order=order).load_state_dict(state)
    with pytest.raises(ValueError, match="loader had rows="):
        make(ROWS.select([*range(1, 23), 0]), order=order).load_state_dict(state)
    assert rows_fingerprint(ROWS) == rows_fingerprint(Dataset.from_list(ROWS.to_list())), "of what they hold alone"
    make(order=order).load_state_dict({name: value for name, value in state.items() if name != "rows"})  # an older one


def test_bad_arguments_and_states():
    with pytest.raises(ValueError, match="at least one row"):
        make(rows_of(0))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        make(batch_size=0)
    with pytest.raises(ValueError, match="got rank 2 of 2"):
        make(rank=2, world_size=2)
    with pytest.raises(ValueError, match="order must be one of shuffle, balanced, sequential; got 'random'"):
        make(order="random")
    state = make().state_dict()
    with pytest.raises(ValueError, match="loader had num_rows=23, this one has 5"):
        make(rows_of(5)).load_state_dict(state)
    with pytest.raises(ValueError, match="loader had seed=0, this one has 1"):
        make(seed=1).load_state_dict(state)


def test_rows_that_fill_the_last_step_are_told(caplog):
    with caplog.at_level("INFO", logger="packflex.data.loader"):
        list(make(rows_of(10), 4))
        assert "10 rows, 4 a step over 1 ranks: the last step of epoch 0 has 2 rows without tokens" in caplog.text
        list(make(rows_of(10), 4, name="held-out"))
        assert "10 held-out rows, 4 a step over 1 ranks: the last step of epoch 0 has 2 rows" in caplog.text
        caplog.clear()
        list(make(rows_of(12), 4))
        assert not caplog.text


def who_and_signals(rows):
    """A collate that tells the process it runs in, and what that does about signals."""
    return os.getpid(), [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)]


@pytest.fixture
def caught():
    """Signals that handlers of Python's caught, which a fork takes along."""
    caught, numbers = [], (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
    before = [signal.signal(n, lambda number, frame: caught.append(number)) for n in numbers]
    yield caught
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def stream_of(rows, collate, batch_size, **options):
    documents = [{"input_ids": row["input_ids"]} for row in rows]
    return PackedStream(documents, collate, batch_size, seq_len=4, num_batches=20, **options)


@pytest.mark.parametrize("loader_of", [PackedLoader, stream_of])
def test_workers_end_at_sigterm_and_leave_ctrl_c_to_the_run(caught, loader_of):
    batches = iter(loader_of(ROWS, who_and_signals, 1, num_workers=1))
    worker, signals = next(batches)
    assert worker != os.getpid()
    assert signals == [signal.SIG_DFL, signal.SIG_IGN, signal.SIG_IGN]
    os.kill(worker, signal.SIGINT)
    next(batches)

    def rest():
        os.kill(worker, signal.SIGTERM)
        return list(batches)

    with pytest.raises(RuntimeError, match=r"killed by signal: Terminated|exited unexpectedly"):
        rest()
    assert not caught


def test_a_state_of_other_rows_or_costs_is_refused():
    state = make(order="balanced", token_cost=10.0).state_dict()
    make(order="balanced", token_cost=10.0).load_state_dict(state)
    with pytest.raises(ValueError, match=r"loader had token_cost=10\.0, this one has 20\.0; resume with the same data"):
        make(order="balanced", token_cost=20.0).load_state_dict(state)
    other = Dataset.from_dict(ROWS.to_dict() | {"lengths": [[1 + i % 3] for i in range(23)]})
    with pytest.raises(ValueError, match="loader had rows="):
        make(other).load_state_dict(make().state_dict())
    before = {name: value for name, value in make().state_dict().items() if name != "rows"}
    make().load_state_dict(before)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 40),
    seed=st.integers(0, 5),
    order=st.sampled_from(["shuffle", "balanced", "sequential"]),
    before=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    after=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    share=st.floats(0, 1),
)
def test_any_kill_point_any_ranks_every_row_once(count, seed, order, before, after, share):
    """Rows, seed, order, ranks, batch sizes and the step of the kill drawn together."""
    rows = rows_of(count)

    def loaders(ranks, batch_size):
        return [make(rows, batch_size, order=order, seed=seed, rank=rank, world_size=ranks) for rank in range(ranks)]

    first = loaders(*before)
    steps = int(share * len(first[0]))
    seen = []
    for loader in first:
        batches = iter(loader)
        seen += [i for _ in range(steps) for i in ids(next(batches)) if i]
    states = [loader.state_dict() for loader in first]
    assert all(state == states[0] for state in states)
    for loader in loaders(*after):
        loader.load_state_dict(states[0])
        seen += [i for batch in loader for i in ids(batch) if i]
    over = sorted(list(range(1, count + 1)) * (2 if 0 < steps == len(first[0]) else 1))
    assert sorted(seen) == over, "an epoch that was over is followed by the next one"
