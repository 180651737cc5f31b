"""Packing to disk: the same whatever the engine, restartable after a kill, and never half of a data set."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from datasets import disable_progress_bars

from packflex.data import build, files
from packflex.data.build import TokenizeOptions, build_packed
from packflex.data.engines import LocalEngine, RayEngine
from packflex.data.errors import DataError
from packflex.data.sources import load_documents, read_documents
from packflex.data.tokenize import tokenize_documents
from packflex.data.tokenizer import train_tokenizer
from packflex.data.write import documents_fingerprint, load_packed, read_manifest, read_tables
from packflex.inspect import summarise_tables
from packflex.packing import plan_rows
from packflex.render import save_plot

disable_progress_bars()

ROOT = Path(__file__).resolve().parents[2]
RECORDS = [{"id": i, "prompt": f"What is {i}?\n", "completion": f"It is {i % 7} " * (1 + i % 9)} for i in range(300)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    made = train_tokenizer([r["prompt"] + r["completion"] for r in RECORDS], 300, folder / "cache")
    made.save_pretrained(folder / "tok")
    made.name_or_path = str(folder / "tok")
    return made


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(build, "_CHUNK_DOCUMENTS", 32)
    monkeypatch.setattr(build, "_SHARD_TOKENS", 1500)
    monkeypatch.setattr(build, "_BLOCK_TOKENS", 400)


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "train.jsonl", RECORDS)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def pack(source, output, tokenizer, **options):
    return build_packed(read_documents("jsonl", str(source)), output, tokenizer, **{"seq_len": 96, **options})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_are_those_of_packing_in_memory(source, tmp_path, tokenizer):
    from packflex import pack_dataset

    manifest = pack(source, tmp_path / "out", tokenizer, seed=4)
    documents = load_documents("jsonl", str(source))
    tokens = tokenize_documents(documents, tokenizer)
    expected = pack_dataset(tokens.dataset, 96, seed=4)
    found = load_packed(tmp_path / "out", tokenizer)
    assert found.dataset.to_list() == expected.to_list()
    assert len(manifest.files) > 3, "more shards than one"
    assert found.manifest == manifest
    assert manifest.documents >= len(RECORDS)
    supervised = sum(label != -100 for row in expected["labels"] for label in row)
    assert (manifest.tokens, manifest.supervised_tokens) == (tokens.tokens, supervised)
    assert 0 < supervised < manifest.tokens
    assert manifest.source_fingerprint == documents_fingerprint(documents)
    assert manifest.counts["documents read"] == 300
    assert not list(tmp_path.glob(".out*")), "the work folder is gone"


def test_any_engine_gives_the_same_bytes(source, tmp_path, tokenizer):
    one = pack(source, tmp_path / "one", tokenizer)
    two = pack(source, tmp_path / "two", tokenizer, engine=LocalEngine(2))
    assert one == two
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_ray_cluster_gives_the_same_bytes(source, tmp_path, tokenizer):
    pytest.importorskip("ray.data")
    local = pack(source, tmp_path / "local", tokenizer)
    assert local == pack(source, tmp_path / "ray", tokenizer, engine=RayEngine(2))
    assert contents(tmp_path / "local") == contents(tmp_path / "ray")


def test_ray_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DataError, match=r"needs Ray Data .* pip install 'packflex\[ray\]'"):
        RayEngine()


def test_what_changes_the_fingerprint(source, tmp_path, tokenizer):
    prints = [pack(source, tmp_path / "a", tokenizer).fingerprint]
    other = write(tmp_path / "other.jsonl", [*RECORDS[:-1], {**RECORDS[-1], "completion": "Nobody knows."}])
    prints.append(pack(other, tmp_path / "b", tokenizer).fingerprint)
    prints.append(pack(source, tmp_path / "c", tokenizer, seed=1).fingerprint)
    prints.append(pack(source, tmp_path / "d", tokenizer, seq_len=128).fingerprint)
    options = TokenizeOptions(train_on_prompt=True)
    prints.append(pack(source, tmp_path / "e", tokenizer, tokenize=options).fingerprint)
    assert len(set(prints)) == 5
    moved = write(tmp_path / "moved.jsonl", RECORDS)
    assert pack(moved, tmp_path / "f", tokenizer).fingerprint == prints[0], "where it lies is not what it says"


class StopError(Exception):
    pass


@pytest.mark.parametrize("step", ["reading", "tokenising", "planning", "writing"])
def test_a_run_that_is_cut_short_goes_on(source, tmp_path, tokenizer, step):
    pack(source, tmp_path / "whole", tokenizer)
    seen = []

    def stop(name, done, total):
        seen.append(name)
        if name == step and (step == "planning" or seen.count(step) > 2):
            assert total is None or step == "planning" or 0 < done < total
            raise StopError

    with pytest.raises(StopError):
        pack(source, tmp_path / "out", tokenizer, progress=stop)
    assert not (tmp_path / "out").exists()
    work = tmp_path / ".out.packing"
    kept = sorted(path.name for path in work.glob("tokens-*.arrow")) if work.exists() else []
    assert bool(kept) is (step != "reading")
    times = {name: (work / name).stat().st_mtime_ns for name in kept}

    shown = []
    pack(source, tmp_path / "out", tokenizer, progress=lambda *report: shown.append(report))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    first = next(done for name, done, _ in shown if name == "tokenising")
    assert (first > 0) is bool(times), "chunks of before are kept"
    assert not work.exists()


def test_a_changed_input_is_not_taken_for_the_old(source, tmp_path, tokenizer):
    def stop(name, done, total):
        if name == "writing":
            raise StopError

    with pytest.raises(StopError):
        pack(source, tmp_path / "out", tokenizer, progress=stop)
    changed = [{**r, "completion": "No."} if r["id"] == 40 else r for r in RECORDS]
    write(source, changed)
    pack(source, tmp_path / "out", tokenizer)
    other = write(tmp_path / "other.jsonl", changed)
    pack(other, tmp_path / "fresh", tokenizer)
    ours, fresh = contents(tmp_path / "out"), contents(tmp_path / "fresh")
    assert ours.keys() == fresh.keys()
    assert all(ours[name] == fresh[name] for name in ours if name != "manifest.json")


@pytest.mark.slow
@pytest.mark.parametrize("step", ["tokenising", "writing"])
def test_kill_9_and_the_same_command_again(source, tmp_path, tokenizer, step):
    """A real kill of the real command, in the middle of a step; the data set is that of a run never killed."""
    code = (
        "import time\n"
        "from packflex.data import build, engines\n"
        "build._CHUNK_DOCUMENTS, build._SHARD_TOKENS, build._BLOCK_TOKENS = 32, 1500, 400\n"
        "run = engines.LocalEngine.run\n"
        "def slow(self, *arguments):\n"
        "    for result in run(self, *arguments):\n"
        "        time.sleep(PAUSE)\n"
        "        yield result\n"
        "engines.LocalEngine.run = slow\n"
        "from packflex.cli import main\n"
        "main()\n"
    )
    arguments = ["pack", str(source), "--tokenizer", tokenizer.name_or_path, "--seq-len", "96"]

    def start(output, pause):
        command = [sys.executable, "-c", code.replace("PAUSE", str(pause)), *arguments, "--output", str(output)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)

    whole = start(tmp_path / "whole", 0)
    _, errors = whole.communicate(timeout=120)
    assert whole.returncode == 0, errors
    out, work = tmp_path / "out", tmp_path / ".out.packing"
    killed = start(out, 0.3)
    sign = "tokens-000001.arrow" if step == "tokenising" else "rows-00000.json"
    deadline = time.monotonic() + 120
    while not (work / sign).exists():
        assert killed.poll() is None, killed.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(DataError, match=r"so it is not a packed data set|no such folder"):
        read_manifest(out)

    again = start(out, 0)
    printed, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert contents(out) == contents(tmp_path / "whole")
    assert not work.exists()
    assert "packed into" in printed


def test_two_at_once_are_kept_apart(source, tmp_path, tokenizer):
    with files.only_writer(tmp_path / ".out.packing"), pytest.raises(DataError, match="another `packflex pack`"):
        pack(source, tmp_path / "out", tokenizer)


@pytest.mark.parametrize("name", ["tokens-000002.arrow", "data-00001-of"])
def test_a_full_disk(source, tmp_path, tokenizer, monkeypatch, name):
    pack(source, tmp_path / "whole", tokenizer)
    real = os.fsync

    def fsync(descriptor):
        if name in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DataError, match=r"the disk is full .* what is finished is kept"):
        pack(source, tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / ".out.packing").rglob("*.partial"))
    monkeypatch.setattr(os, "fsync", real)
    pack(source, tmp_path / "out", tokenizer)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("call", ["rows", "out"])
def test_a_full_disk_where_folders_are_made_and_named(source, tmp_path, tokenizer, monkeypatch, call):
    """A file system without a free inode, or without room for a longer folder."""
    whole = pack(source, tmp_path / "whole", tokenizer)

    def full(path, *rest, **options):
        if Path(rest[0] if call == "out" else path).name == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *rest, **options)

    owner, name = (os, "rename") if call == "out" else (Path, "mkdir")
    real = getattr(owner, name)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(DataError, match=rf"/{call}: the disk is full \(.*\); free some space and run the same"):
            pack(source, tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()
    assert pack(source, tmp_path / "out", tokenizer) == whole


def test_a_truncated_shard_is_refused(source, tmp_path, tokenizer):
    manifest = pack(source, tmp_path / "out", tokenizer)
    shard = tmp_path / "out" / list(manifest.files)[1]
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(DataError, match=r"data-00001-of-\d+.parquet: has [\d,]+ bytes, and the manifest says"):
        load_packed(tmp_path / "out")


def test_duplicate_ids(tmp_path):
    source = write(tmp_path / "train.jsonl", [*RECORDS[:5], {**RECORDS[2], "completion": "again"}])
    with pytest.raises(DataError, match=r"train.jsonl:6: 'id' is 2, as in .*train.jsonl:3; remove one"):
        list(read_documents("jsonl", str(source), on_duplicate="error"))
    assert len(list(read_documents("jsonl", str(source), on_duplicate="drop"))) == 5
    assert len(list(read_documents("jsonl", str(source)))) == 6


def test_nothing_left(source, tmp_path, tokenizer):
    with pytest.raises(DataError, match="longer than --seq-len 4 and --overflow drop leaves none"):
        pack(source, tmp_path / "out", tokenizer, seq_len=4, overflow="drop")
    empty = write(tmp_path / "empty.jsonl", [{"prompt": "a", "completion": ""}])
    options = TokenizeOptions(on_unsupervised="drop")
    with pytest.raises(DataError, match="none of 1 documents has a supervised token"):
        pack(empty, tmp_path / "out", tokenizer, tokenize=options)
    with pytest.raises(DataError, match=r"empty.jsonl:1: no supervised token: the completion is empty"):
        pack(empty, tmp_path / "other", tokenizer)
    assert not (tmp_path / ".other.packing").exists(), "nothing was worth keeping"
    with pytest.raises(DataError, match="overflow truncate cut off every supervised token; raise --seq-len"):
        pack(source, tmp_path / "cut", tokenizer, seq_len=4, overflow="truncate")
    assert not (tmp_path / "cut").exists()
    with pytest.raises(ValueError, match="strategy"):
        plan_rows([1], 8, "worst_fit")


def test_a_kept_shard_that_was_damaged_is_written_again(source, tmp_path, tokenizer, monkeypatch):
    whole = pack(source, tmp_path / "whole", tokenizer)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "move_into_place", stop)
        with pytest.raises(KeyboardInterrupt):
            pack(source, tmp_path / "out", tokenizer)
    shard = sorted((tmp_path / ".out.packing" / "rows").glob("*.parquet"))[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(data)
    assert pack(source, tmp_path / "out", tokenizer) == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_manifest_names_a_tokenizer_that_is_found_from_anywhere(source, tmp_path, tokenizer, monkeypatch):
    from packflex.data.tokenizer import load_tokenizer

    folder = Path(tokenizer.name_or_path)
    monkeypatch.chdir(folder.parent)
    manifest = pack(source, tmp_path / "out", load_tokenizer(folder.name))
    assert manifest.tokenizer == str(folder.resolve())


@contextmanager
def largest_file(size):
    """The kernel refuses to let any file of this process grow beyond `size`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["text-000000", "tokens-000000", "plan-document_indices", "data-00000-of-00001"])
def test_a_file_that_may_not_grow_is_a_full_disk(tmp_path, tokenizer, monkeypatch, name):
    """Rows of two tokens: the plan is larger than the tokens, and the shard than the plan."""
    monkeypatch.setattr(build, "_SHARD_TOKENS", 1 << 20)
    source = write(tmp_path / "x.jsonl", [{"text": "What is it? " * 4}] * 200)
    sizes, real = {}, os.fsync

    def note(descriptor):
        sizes[Path(os.readlink(f"/proc/self/fd/{descriptor}")).name] = os.fstat(descriptor).st_size
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    pack(source, tmp_path / "whole", tokenizer, seq_len=2, file_format="arrow")
    monkeypatch.setattr(os, "fsync", real)
    names = list(sizes)
    at = next(i for i, file in enumerate(names) if name in file)
    assert all(sizes[file] < sizes[names[at]] for file in names[:at]), "the first to be too large"
    with (
        largest_file(sizes[names[at]] - 1),
        pytest.raises(DataError, match=rf"\.out\.packing/.*{name}\S*: the disk is full .* run the same command again"),
    ):
        pack(source, tmp_path / "out", tokenizer, seq_len=2, file_format="arrow")
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / ".out.packing").rglob("*.partial"))
    pack(source, tmp_path / "out", tokenizer, seq_len=2, file_format="arrow")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_full_disk_under_the_cache_of_datasets(source, tmp_path, tokenizer):
    """Parquet shards are unpacked there; Arrow ones are read in place."""
    out = tmp_path / "out"
    pack(source, out, tokenizer)
    whole = load_packed(out).dataset.to_list()
    shutil.rmtree(tmp_path / "hf")
    with largest_file(2_000), pytest.raises(DataError) as error:
        load_packed(out)
    said = rf"{tmp_path}/hf: the disk is full .*; the Parquet shards of {out} are unpacked there: free some space"
    assert re.match(said, str(error.value)), error.value
    assert load_packed(out).dataset.to_list() == whole


def test_a_full_disk_under_a_picture(source, tmp_path, tokenizer):
    manifest = pack(source, tmp_path / "out", tokenizer)
    report = summarise_tables(read_tables(tmp_path / "out", ("labels", "lengths")), manifest.seq_len)
    with largest_file(1_000), pytest.raises(DataError, match=r"full\.png: the disk is full .*; free some space"):
        save_plot(tmp_path / "full.png", report, [3, 4], 0)


@pytest.mark.slow
def test_memory_grows_by_the_plan_alone(tmp_path, tokenizer):
    """Some 85 bytes a document, whatever is read, tokenised and written; the tokens here are made up, to be quick."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from packflex.data import build\n"
        "from packflex.data.tokenizer import load_tokenizer\n"
        "build._BLOCK_TOKENS = 50_000  # full from the first run on\n"
        "def encode(self, batch, indices):\n"
        "    n = len(indices)\n"
        "    out = {'input_ids': [[1, 2, 3, 4]] * n, 'labels': [[-100, 2, 3, 4]] * n}\n"
        "    return {**out, 'source': batch['source'], 'cut': [0] * n}\n"
        "build.DocumentEncoder.__call__ = encode\n"
        "documents = ({'text': str(i), 'source': f'x.jsonl:{i}'} for i in range(int(sys.argv[2])))\n"
        "build.build_packed(documents, sys.argv[3], load_tokenizer(sys.argv[1]), seq_len=64)\n"
        # not getrusage: a child's maximum begins at its parent's
        "status = Path('/proc/self/status').read_text()\n"
        "print(status.split('VmHWM:')[1].split()[0])\n"
    )

    def peak(count):
        """Bytes."""
        command = [sys.executable, "-c", code, tokenizer.name_or_path, str(count), str(tmp_path / str(count))]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        return 1024 * int(done.stdout)

    assert peak(130_000) - peak(30_000) < 130 * 100_000


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_place_that_nothing_may_be_written_to(source, tmp_path, tokenizer, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(
        DataError, match=r"\.out\.packing: cannot be written \(.*\); choose another output, or make its"
    ):
        pack(source, tmp_path / "out", tokenizer)


def test_a_link_to_nowhere_is_refused_before_the_work(tmp_path, tokenizer):
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"out: is a link to \S+/gone, which is not there; remove the link"):
        build_packed(iter([]), tmp_path / "out", tokenizer)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/\.out\.packing: cannot be written .*; choose another output"):
        build_packed(iter([]), tmp_path / "file" / "out", tokenizer)


def stopped(source, out, tokenizer, step):
    """A run that ends at the beginning of a step; its work folder is left."""

    def stop(now, done, total):
        if now == step and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source, out, tokenizer, progress=stop)
    return out.with_name(f".{out.name}.packing")


def test_a_folder_that_comes_there_meanwhile_is_left_alone(source, tmp_path, tokenizer):
    whole, out = tmp_path / "whole", tmp_path / "out"
    pack(source, whole, tokenizer)

    def interfere(step, done, total):
        if step == "writing" and not out.exists():
            out.mkdir()
            (out / "thesis.txt").write_text("years of work")

    for overwrite in (False, True):
        with pytest.raises(DataError, match=f"{out}: is there"):
            pack(source, out, tokenizer, progress=interfere, overwrite=overwrite)
        assert contents(out) == {"thesis.txt": b"years of work"}
        out.rename(tmp_path / f"mine-{overwrite}")
    pack(source, out, tokenizer)
    assert contents(out) == contents(whole)


def test_kept_tokens_that_were_damaged_are_made_again(source, tmp_path, tokenizer):
    whole, out = tmp_path / "whole", tmp_path / "out"
    pack(source, whole, tokenizer)
    work = stopped(source, out, tokenizer, "writing")
    path = work / "tokens-000001.arrow"
    content = bytearray(path.read_bytes())
    values = build._open_arrow(path).column("tokens").chunk(0).flatten().to_numpy()[:8].tobytes()
    at = content.index(values)
    content[at] ^= 1
    path.write_bytes(content)
    pack(source, out, tokenizer)
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"fingerprint": 1, "bytes": 2, "sha256": 3, "counts": {}}'])
def test_what_is_noted_of_a_shard_may_be_damaged(source, tmp_path, tokenizer, content):
    whole, out = tmp_path / "whole", tmp_path / "out"
    pack(source, whole, tokenizer)
    work = stopped(source, out, tokenizer, "writing")
    notes = sorted(work.glob("rows-*.json"))
    assert notes
    for note in notes:
        note.write_text(content)
    pack(source, out, tokenizer)
    assert contents(out) == contents(whole)


@pytest.mark.parametrize(("at", "linked"), [(1, False), (2, False), (2, True), (3, False)])
def test_a_kill_while_a_data_set_is_replaced_loses_neither(source, tmp_path, tokenizer, monkeypatch, at, linked):
    out = tmp_path / "out"
    if linked:
        (tmp_path / "link").symlink_to(out)
        out, named = tmp_path / "out", tmp_path / "link"
    else:
        named = out
    pack(source, out, tokenizer)
    first = contents(out)
    calls = []

    class KilledError(BaseException):
        pass

    def counted(old, new, real=os.rename):
        calls.append((old, new))
        if len(calls) >= at:  # a process that is killed puts nothing back
            raise KilledError
        return real(old, new)

    with monkeypatch.context() as patch:
        patch.setattr("packflex.data.write.os.rename", counted)
        with pytest.raises(KilledError):
            pack(source, named, tokenizer, seq_len=64, overwrite=True)
    pack(source, tmp_path / "fresh", tokenizer, seq_len=64)
    with pytest.raises(DataError, match="is there already"):
        pack(source, named, tokenizer, seq_len=64)
    assert contents(out) == (first if at < 3 else contents(tmp_path / "fresh"))
    pack(source, named, tokenizer, seq_len=64, overwrite=True)
    assert contents(out) == contents(tmp_path / "fresh")
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} <= {"out", "link", "fresh", "hf"}


def test_a_link_to_a_data_set_stays_a_link_when_that_is_replaced(source, tmp_path, tokenizer):
    out, link = tmp_path / "disk" / "out", tmp_path / "link"
    pack(source, out, tokenizer)
    link.symlink_to(out)
    pack(source, link, tokenizer, seq_len=64, overwrite=True)
    pack(source, tmp_path / "fresh", tokenizer, seq_len=64)
    assert link.is_symlink()
    assert contents(out) == contents(tmp_path / "fresh")
    with pytest.raises(DataError, match="is there already"):
        pack(source, link, tokenizer)
    assert {path.name for path in tmp_path.iterdir()} <= {"disk", "link", "fresh", "hf", source.name}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_what_cannot_be_removed_stops_no_run(source, tmp_path, tokenizer, monkeypatch, caplog):
    """Such as a file of the replaced set that a training run still maps over NFS."""
    out = tmp_path / "out"
    pack(source, out, tokenizer)

    def stuck(path, *arguments, real=shutil.rmtree, **options):
        if "discarded" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr("packflex.data.write.shutil.rmtree", stuck)
    for length in (64, 128):
        pack(source, out, tokenizer, seq_len=length, overwrite=True)
        assert json.loads((out / "manifest.json").read_text())["seq_len"] == length
    assert "could not be removed whole" in caplog.text


def test_folders_of_like_names_are_nobody_else_s_business(source, tmp_path, tokenizer):
    out = tmp_path / "out"
    for name in (".out.old", ".out.old-x", "out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
    pack(source, out, tokenizer)
    with pytest.raises(DataError, match="is there already"):
        pack(source, out, tokenizer)
    pack(source, out, tokenizer, overwrite=True)
    for name in (".out.old", ".out.old-x", "out.old"):
        assert contents(tmp_path / name) == {"thesis.txt": b"years of work"}
