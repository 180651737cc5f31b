from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from datasets import Dataset, disable_progress_bars

from packflex import cli
from packflex.data.tokenizer import load_tokenizer, train_tokenizer
from packflex.data.write import load_packed, write_packed
from packflex.layout import PackedLayout
from packflex.testing.families import FAMILIES

disable_progress_bars()

# Python 3.12 and later warn when a process with threads forks, as `datasets` does for its workers.
FORKS = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")

WORDS = ["two", "plus", "is", "four", "why", "not", "five"]
TEXTS = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    made = train_tokenizer(TEXTS, 300, folder / "cache")
    made.save_pretrained(folder / "tok")
    return folder / "tok"


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """Runs the command line as the console script does; gives exit code, stdout and stderr."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["packflex", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        captured = capfd.readouterr()
        return exit.value.code, captured.out, captured.err

    return call


def fails(result, message):
    """One clear line on stderr and exit code 2."""
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert re.search(message, err), err


@pytest.fixture
def packed(tmp_path, tokenizer):
    """Two rows of seq_len 12: [3, 4] and [6], made without the packer."""
    made = load_tokenizer(tokenizer)
    ids = {word: made(word, add_special_tokens=False)["input_ids"] for word in ("two", " plus", " four")}
    assert all(len(x) == 1 for x in ids.values())
    two, plus, four = (x[0] for x in ids.values())
    rows = [
        {
            "input_ids": [0, two, 1, 0, two, plus, four],
            "labels": [-100, two, 1, -100, -100, plus, four],
            "lengths": [3, 4],
        },
        {"input_ids": [0, two, plus, two, four, 1], "labels": [-100, -100, -100, -100, four, 1], "lengths": [6]},
    ]
    write_packed(
        Dataset.from_list(rows),
        tmp_path / "packed",
        tokenizer=made,
        seq_len=12,
        strategy="best_fit",
        overflow="split",
        seed=0,
        sources=["x.jsonl"],
        source_fingerprint="0" * 64,
        document_format="prompt",
        counts={"documents read": 3},
    )
    return tmp_path / "packed"


def test_inspect_shows_numbers_lengths_and_a_row(run, packed):
    code, out, err = run("inspect", packed)
    assert (code, err) == (0, "")
    for line in (
        r"rows +2 of 12 tokens",
        r"documents +3",
        r"tokens +13",
        r"supervised tokens +6 \(46.2%\)",
        r"efficiency +54.17%",
        r"padding +11 tokens",
        r"documents per row +1 / 2 / 1.5 / 2 ",
        r"documents read +3",
        r"4-7  2  █+",
        r"Row 0: 2 documents, 7 of 12 tokens \(58.3%\)",
        r"document 0: tokens 0-2 \(3\), 2 supervised",
        re.escape("<|bos|>⟦two<|eos|>⟧"),
        re.escape("<|bos|>two⟦ plus four⟧"),
        r"padding: 5 tokens",
    ):
        assert re.search(line, out), line
    assert "\x1b[" not in out  # no colour codes where there is no terminal


def test_inspect_another_row_and_cut_text(run, packed):
    code, out, _ = run("inspect", packed, "--row", 1, "--max-chars", 14)
    assert code == 0
    assert "<|bos|>two plu ... " in out
    _, out, _ = run("inspect", packed, "--max-documents", 1)
    assert "... 1 more documents" in out
    assert "document 1" not in out


def test_inspect_plots(run, packed, tmp_path):
    code, out, _ = run("inspect", packed, "--plot", tmp_path / "out.png")
    assert code == 0
    assert "out.png" in out
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    fails(run("inspect", packed, "--plot", tmp_path / "out.txt"), r"out\.txt: a picture's name must end in \.png")
    fails(run("inspect", packed, "--plot", tmp_path / "no" / "o.png"), r"the folder .*no does not exist")


def test_inspect_without_the_tokenizer_shows_ids(run, packed):
    manifest = json.loads((packed / "manifest.json").read_text())
    (packed / "manifest.json").write_text(json.dumps({**manifest, "tokenizer": "/gone/tok"}))
    code, out, _ = run("inspect", packed)
    assert code == 0
    assert "tokenizer /gone/tok is not on this machine: token ids are shown; give --tokenizer" in out
    assert re.search(r"0 ⟦\d+ 1 ⟧", out)


def test_inspect_errors(run, packed, tmp_path, tokenizer):
    fails(run("inspect", tmp_path / "nowhere"), r"nowhere: no such folder; give the output folder of `packflex pack`")
    fails(run("inspect", packed, "--row", 2), r"--row 2: .* has 2 rows, 0 to 1")
    fails(run("inspect", packed, "--row", "x"), r"--row.*integer.*\(see --help\)")
    fails(run("inspect", packed, "--tokenizer", tmp_path / "none"), r"none: tokenizer folder does not exist")
    other = train_tokenizer(["other"] * 3, 262, tmp_path / "other")
    fails(run("inspect", packed, "--tokenizer", other.name_or_path), r"packed with the tokenizer .*tok, and .*bpe-262")
    (packed / "manifest.json").unlink()
    fails(run("inspect", packed), r"no manifest\.json in it")


def test_doctor_checks_attention(run):
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    assert re.search(r"torch +2\.", out)
    assert re.search(r"attention +(reference|triton|hopper): ", out)
    assert re.search(r"float32 +\d\.\de-0[78] .*3e-06 +ok", out)
    assert re.search(r"gemma3_text +cpu +none", out)
    assert out.count("none") == len(FAMILIES)


def test_doctor_fails_when_documents_leak(run, monkeypatch):
    from packflex.integrations import transformers as integration

    real = integration.document_mask

    def across(layout, causal=True, window=None):
        return real(PackedLayout.from_lengths([[layout.seq_len]] * layout.batch_size), causal, window)

    monkeypatch.setattr(integration, "document_mask", across)
    code, out, err = run("doctor")
    assert code == 1
    assert re.search(r"llama +cpu +LEAKS", out)
    assert "attention is wrong on this machine" in err


def test_doctor_fails_when_attention_is_wrong(run, monkeypatch):
    from packflex import doctor

    wrong = doctor.NumericsCheck("triton", "cuda", "bfloat16", {"output": 1e-3, "d key": float("nan")}, 1e-2)
    monkeypatch.setattr(doctor, "check_numerics", lambda: [wrong])
    code, out, err = run("doctor")
    assert code == 1
    assert "WRONG" in out
    assert "attention is wrong on this machine" in err


@pytest.mark.parametrize(
    ("refusal", "backends"),
    [(None, ["hopper", "hopper", "triton", "triton"]), ("it needs a Hopper card", ["triton", "triton"])],
)
def test_doctor_checks_the_backend_that_it_names(monkeypatch, refusal, backends):
    import torch

    from packflex import doctor
    from packflex.attention.hopper import support

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(support, "card_refusal", lambda: refusal)
    monkeypatch.setattr(doctor, "_check", lambda backend, device, dtype: (backend, device))
    assert doctor.backend_and_reason()[0] == backends[0]
    assert doctor.check_numerics() == [*((backend, "cuda") for backend in backends), ("reference", "cpu")]


def test_doctor_names_the_backend_that_runs():
    import torch

    from packflex import doctor
    from packflex.attention import api
    from packflex.layout import PackedLayout
    from packflex.masks import document_mask

    device = "cuda" if torch.cuda.is_available() else "cpu"
    query = torch.zeros(1, 1, 4, 64, device=device, dtype=torch.bfloat16)
    mask = document_mask(PackedLayout.from_lengths([[4]]).to(device))
    chosen = api._choose_backend(None, query, query, query, mask, None, 0.25, None, None)
    assert doctor.backend_and_reason()[0] == chosen


def test_version_and_help(run):
    code, out, _ = run("--version")
    assert code == 0
    assert re.fullmatch(r"packflex \d+\.\d+\.\d+\n", out)
    assert "pack" in run()[1]
    code, out, _ = run("pack", "--help")
    assert code == 0
    assert "--overflow" in out


def test_usage_errors(run):
    fails(run("pack"), r"Missing argument 'INPUT")
    fails(run("pack", "a.jsonl", "--tokenizer", "t"), r"Missing option '--output' \(see --help\)")
    fails(run("unpack"), r"No such command 'unpack'")
    fails(
        run("pack", "a", "--tokenizer", "t", "--output", "o", "--strategy", "worst"),
        r"'worst' is not one of 'best_fit'",
    )
    fails(run("pack", "a", "--tokenizer", "t", "--output", "o", "--seq-len", 1), r"--seq-len")


def test_traceback_on_request(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["packflex", "--traceback", "inspect", str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="no such folder"):
        cli.main()


def test_start_imports_nothing_heavy():
    script = (
        "import sys; before = set(sys.modules); import packflex.cli;"
        "print([m for m in ('datasets', 'transformers', 'lightning', 'matplotlib', 'pyarrow') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def pack(run, source, tokenizer, output, *options):
    return run("pack", source, "--tokenizer", tokenizer, "--output", output, *options)


@pytest.mark.parametrize("file_format", ["parquet", "arrow"])
@FORKS
def test_pack_then_load_gives_every_document(run, tmp_path, tokenizer, file_format):
    pairs = [{"prompt": f"{a} plus", "completion": f" {a} is {b}"} for a in WORDS for b in WORDS]
    source = jsonl(tmp_path / "train.jsonl", pairs)
    options = ("--seq-len", 32, "--file-format", file_format, "--num-proc", 2, "--seed", 5)
    code, out, err = pack(run, source, tokenizer, tmp_path / "out", *options)
    assert (code, err) == (0, "")
    assert re.search(r"documents +49\n", out.replace(" \n", "\n").replace("  ", " ")) or re.search(
        r"documents +49", out
    )
    assert re.search(r"documents read +49", out)
    made = load_tokenizer(tokenizer)
    data = load_packed(tmp_path / "out", made)
    texts = []
    for row in data.dataset:
        assert sum(row["lengths"]) == len(row["input_ids"]) == len(row["labels"]) <= 32
        start = 0
        for length in row["lengths"]:
            ids, labels = row["input_ids"][start : start + length], row["labels"][start : start + length]
            said = [label for label in labels if label != -100]
            texts.append((made.decode(ids), made.decode(said)))
            start += length
    assert sorted(texts) == sorted(
        (f"<|bos|>{p['prompt']}{p['completion']}<|eos|>", f"{p['completion']}<|eos|>") for p in pairs
    )
    assert data.manifest.counts["documents read"] == data.manifest.documents == 49
    assert (data.manifest.seed, data.manifest.seq_len, data.manifest.document_format) == (5, 32, "prompt")
    assert data.manifest.sources == [str(source)]
    rooms = data.manifest.rows * 32
    assert data.manifest.efficiency == pytest.approx(sum(sum(row["lengths"]) for row in data.dataset) / rooms)
    code, out, _ = run("inspect", tmp_path / "out")
    assert code == 0
    assert "⟦" in out


def test_pack_conversations_with_a_template_file(run, tmp_path, tokenizer):
    talk = [{"role": "user", "content": "two plus two"}, {"role": "assistant", "content": "is four"}]
    source = jsonl(tmp_path / "chat.jsonl", [{"dialogue": talk}] * 3)
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    options = ("--messages-field", "dialogue", "--seq-len", 128)
    message = r"chat\.jsonl:1: tokenizer \S+ has no chat template.*--chat-template FILE"
    fails(pack(run, source, tokenizer, tmp_path / "out", *options), message)
    code, _, err = pack(run, source, tokenizer, tmp_path / "out", *options, "--chat-template", template)
    assert (code, err) == (0, "")
    data = load_packed(tmp_path / "out")
    said = [label for label in data.dataset[0]["labels"] if label != -100]
    assert load_tokenizer(tokenizer).decode(said) == "is four<|eos|>" * 3
    assert data.manifest.chat_template_fingerprint is not None


def test_pack_counts_what_is_cut_and_dropped(run, tmp_path, tokenizer):
    texts = ["two plus " * 20, "four", "two"]
    source = jsonl(tmp_path / "t.jsonl", [{"text": text} for text in texts])
    _, out, _ = pack(run, source, tokenizer, tmp_path / "drop", "--seq-len", 16, "--overflow", "drop")
    assert re.search(r"longer than a row, dropped +1", out)
    assert load_packed(tmp_path / "drop").manifest.documents == 2
    pack(run, source, tokenizer, tmp_path / "cut", "--seq-len", 16, "--overflow", "truncate")
    manifest = load_packed(tmp_path / "cut").manifest
    tokens = len(load_tokenizer(tokenizer)(texts[0])["input_ids"]) + 1
    assert manifest.counts["longer than a row, truncated"] == 1
    assert manifest.counts["tokens cut off"] == tokens - 16
    pack(run, source, tokenizer, tmp_path / "split", "--seq-len", 16)
    manifest = load_packed(tmp_path / "split").manifest
    assert manifest.counts["longer than a row, split"] == 1
    assert manifest.documents == 2 + -(-tokens // 16)
    jsonl(source, [{"text": ""}, *({"text": text} for text in [*texts[1:], *texts[:1] * 2])])
    options = ("--seq-len", 16, "--overflow", "error", "--on-unsupervised", "drop")
    fails(
        pack(run, source, tokenizer, tmp_path / "e", *options),
        rf"t\.jsonl:4: {tokens} tokens, more than seq_len=16 \(2 such documents\); choose another overflow",
    )
    jsonl(source, [{"text": text} for text in texts])
    fails(
        pack(run, source, tokenizer, tmp_path / "n", "--seq-len", 2, "--overflow", "drop"),
        "all 3 documents are longer than --seq-len 2",
    )


def test_pack_applies_on_unsupervised_to_what_rows_cut_off(run, tmp_path, tokenizer):
    lost, kept = ({"prompt": "two plus " * times, "completion": " four"} for times in (9, 1))
    source = jsonl(tmp_path / "p.jsonl", [{**kept, "completion": ""}, kept, lost, kept, lost])
    options = ("--seq-len", 16, "--overflow", "truncate", "--on-unsupervised")
    jsonl(tmp_path / "q.jsonl", [kept, kept, lost, kept, lost])
    fails(
        pack(run, tmp_path / "q.jsonl", tokenizer, tmp_path / "e", *options, "error"),
        r"q\.jsonl:3: rows of 16 tokens cut off every supervised token \(2 such documents\); raise --seq-len, choose "
        r"--overflow split, or leave such documents out .*--on-unsupervised drop",
    )
    assert not (tmp_path / "e").exists()
    code, out, err = pack(run, source, tokenizer, tmp_path / "out", *options, "drop")
    assert (code, err) == (0, "")
    assert re.search(r"supervision cut off, dropped +2", out)
    counts = load_packed(tmp_path / "out").manifest.counts
    assert (counts["without supervision, dropped"], counts["longer than a row, truncated"]) == (1, 0)
    jsonl(source, [kept, kept])  # the same documents in the same order
    pack(run, source, tokenizer, tmp_path / "alone", *options, "error")
    assert load_packed(tmp_path / "out").dataset.to_list() == load_packed(tmp_path / "alone").dataset.to_list()
    assert "supervision cut off, dropped" not in load_packed(tmp_path / "alone").manifest.counts
    jsonl(source, [lost, lost])
    fails(
        pack(run, source, tokenizer, tmp_path / "n", *options, "drop"),
        "overflow truncate cut off every supervised token; raise --seq-len",
    )


def test_pack_reports_ids_that_come_twice(run, tmp_path, tokenizer):
    source = jsonl(tmp_path / "t.jsonl", [{"id": 1, "text": "two plus"}, {"id": 1, "text": "four is"}])
    code, _, err = pack(run, source, tokenizer, tmp_path / "out")
    assert code == 0
    assert re.search(
        r"^packflex: warning: 1 records have an id that came before and are kept; the first is .*t\.jsonl:2: 'id' is 1",
        err,
    )
    fails(pack(run, source, tokenizer, tmp_path / "no", "--id-field", "idd"), "has the field 'idd'")
    fails(pack(run, source, tokenizer, tmp_path / "no", "--on-duplicate", "error"), r"t\.jsonl:2: 'id' is 1, as in")


def test_pack_errors_name_file_line_and_remedy(run, tmp_path, tokenizer):
    out = tmp_path / "out"
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    fails(pack(run, bad, tokenizer, out), r"bad\.jsonl:2: field 'completion' is missing.*--completion-field")
    bad.write_text('{"prompt": "a", "completion": ""}\n')
    fails(pack(run, bad, tokenizer, out), r"bad\.jsonl:1: no supervised token.*--on-unsupervised drop")
    bad.write_text("{")
    fails(pack(run, bad, tokenizer, out), r"bad\.jsonl:1: not valid JSON")
    bad.write_text("")
    fails(pack(run, bad, tokenizer, out), r"bad\.jsonl: the file is empty")
    fails(
        pack(run, tmp_path / "none.jsonl", tokenizer, out), r"none\.jsonl: no such file or folder; the folder holds bad"
    )
    fails(pack(run, "a.csv", tokenizer, out), r"a\.csv: no such file or folder")
    jsonl(bad, [{"text": "two"}])
    fails(pack(run, bad, tmp_path / "none", out), r"none: tokenizer folder does not exist")
    assert not out.exists()
    out.mkdir()
    fails(pack(run, bad, tokenizer, out), r"out: is there already; choose another output")
    fails(pack(run, bad, tokenizer, out, "--overwrite"), r"out: is there and is no packed data set")


def test_pack_refuses_empty_names(run, tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = jsonl(tmp_path / "a.jsonl", [{"text": "two plus two"}])
    fails(pack(run, "", tokenizer, "out"), "the name of an input is empty; give a file, a folder or a glob")
    for output in ("", " ", ".", "..", "/", "out/.."):
        for more in ([], ["--overwrite"]):
            fails(
                pack(run, source, tokenizer, output, *more), "the output '.*' is no name of a folder to make; give one"
            )
    fails(pack(run, source, "", "out"), "the tokenizer's name is empty; give a folder with tokenizer.json or a")
    assert {path.name for path in tmp_path.iterdir()} <= {"a.jsonl", "hf"}


def test_pack_is_deterministic_for_a_seed(run, tmp_path, tokenizer):
    source = jsonl(tmp_path / "t.jsonl", [{"text": text} for text in TEXTS])
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pack(run, source, tokenizer, tmp_path / name, "--seq-len", 32, "--seed", seed)
    a, b, c = (load_packed(tmp_path / name).dataset.to_list() for name in "abc")
    assert a == b
    assert a != c
