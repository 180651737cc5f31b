from __future__ import annotations

import hashlib
import json
import os

import pytest

from packflex.data.encoding import TextEncoder
from packflex.data.errors import DataError
from packflex.data.tokenizer import (
    chat_template_fingerprint,
    load_tokenizer,
    tokenizer_fingerprint,
    tokenizer_name,
    train_tokenizer,
)

TEXTS = [f"def function_{i}(self, value):\n    return self.values[value] + {i}\n" for i in range(50)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tokenizer(cache):
    return train_tokenizer(TEXTS, 290, cache)


def test_every_string_comes_back_and_frequent_words_are_one_token(tokenizer):
    for text in ["", " leading", "tab\t\nnewline\r\n", "naïve 漢字 🙂 \x00", "<|eo s|>"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert len(tokenizer("self", add_special_tokens=False)["input_ids"]) == 1
    assert len(tokenizer) == 290


def test_special_tokens_have_their_places(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert tokenizer("self")["input_ids"][0] == 0
    assert tokenizer("<|eos|>", add_special_tokens=False)["input_ids"] == [1]


def test_training_is_deterministic_and_cached(tmp_path, tokenizer, cache):
    again = train_tokenizer(iter(TEXTS), 290, tmp_path)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    (entry,) = tmp_path.iterdir()
    before = os.stat(entry / "tokenizer.json").st_mtime_ns
    cached = train_tokenizer(TEXTS, 290, tmp_path)
    assert os.stat(entry / "tokenizer.json").st_mtime_ns == before
    assert tokenizer_name(cached) == str(entry)
    train_tokenizer(TEXTS[:-1], 290, tmp_path)
    train_tokenizer(TEXTS, 280, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_an_entry_written_by_another_process_meanwhile_is_used(tmp_path, monkeypatch, tokenizer):
    real_rename = os.rename

    def lose_the_race(source, target):
        tokenizer.save_pretrained(target)
        real_rename(source, target)

    monkeypatch.setattr(os, "rename", lose_the_race)
    found = train_tokenizer(TEXTS, 290, tmp_path)
    assert tokenizer_fingerprint(found) == tokenizer_fingerprint(tokenizer)
    assert len(list(tmp_path.iterdir())) == 1  # nothing half-written is left beside it


def test_a_failed_write_leaves_no_entry(tmp_path, monkeypatch):
    def full_disk(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full_disk)
    with pytest.raises(OSError, match="No space left"):
        train_tokenizer(TEXTS, 290, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_fingerprint_changes_with_vocabulary_and_special_tokens_only(tokenizer, cache):
    same = train_tokenizer(TEXTS, 290, cache)
    print_of = tokenizer_fingerprint(same)
    same(["a", "bb"], padding=True, truncation=True, max_length=4)  # leaves its settings in the backend
    same.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(same) == print_of == tokenizer_fingerprint(tokenizer)
    same.add_special_tokens({"eos_token": "<|end|>"})
    assert tokenizer_fingerprint(same) != print_of
    assert tokenizer_fingerprint(train_tokenizer(TEXTS, 280, cache)) != print_of


def test_a_tokenizer_that_splits_special_tokens_is_another(tmp_path, tokenizer):
    """The library's file does not say it, and it gives other ids for the same text."""
    tokenizer.save_pretrained(tmp_path)
    same = load_tokenizer(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "split_special_tokens": True}))
    splitting = load_tokenizer(tmp_path)
    assert same("a<|eos|>")["input_ids"] != splitting("a<|eos|>")["input_ids"]
    assert tokenizer_fingerprint(same) == tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(splitting)
    content = json.loads(same.backend_tokenizer.to_str()) | {"special_tokens": same.special_tokens_map}
    content = {name: value for name, value in content.items() if name not in ("truncation", "padding")}
    as_before = hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    assert tokenizer_fingerprint(same) == as_before, "packed data sets of other tokenizers would not load any more"


def test_chat_template_fingerprint(tokenizer, cache):
    other = train_tokenizer(TEXTS, 290, cache)
    assert chat_template_fingerprint(other) is None
    other.chat_template = "a"
    first = chat_template_fingerprint(other)
    other.chat_template = "b"
    assert first is not None
    assert len(first) == 64
    assert chat_template_fingerprint(other) != first


def test_load_replaces_the_chat_template(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tok")
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages[0].content }}")
    loaded = load_tokenizer(tmp_path / "tok", chat_template=template)
    assert loaded.chat_template == "{{ messages[0].content }}"
    with pytest.raises(DataError, match=r"none\.jinja: no such chat template file"):
        load_tokenizer(tmp_path / "tok", chat_template=tmp_path / "none.jinja")


def test_load_names_the_folder_and_the_remedy(tmp_path):
    with pytest.raises(
        DataError, match=r"/missing: tokenizer folder does not exist; give a folder with tokenizer.json"
    ):
        load_tokenizer(tmp_path / "missing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="tokenizer folder is a file"):
        load_tokenizer(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"/empty: no tokenizer could be read from this folder") as caught:
        load_tokenizer(tmp_path / "empty")
    assert "\n" not in str(caught.value)


def test_training_refuses_nothing_and_too_small(tmp_path):
    with pytest.raises(DataError, match="got 2 texts, all empty"):
        train_tokenizer(["", ""], 300, tmp_path)
    with pytest.raises(ValueError, match=r"at least 259 .* got 100"):
        train_tokenizer(TEXTS, 100, tmp_path)


# The encoder: beginning, end, and pieces that can be joined


def metaspace_tokenizer():
    """As Llama 2 and Mistral have it: a blank is put before every text, and shown as a token of its own."""
    import tokenizers
    import transformers

    model = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    model.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=200, special_tokens=["</s>", *(f"<0x{i:02X}>" for i in range(256))], show_progress=False
    )
    model.train_from_iterator(TEXTS, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>")


def test_encoder_finds_what_the_tokenizer_puts_around_a_text(tokenizer):
    encoder = TextEncoder(tokenizer)
    assert (encoder.beginning, encoder.end) == ((0,), (1,))
    assert encoder.head([5, 6]) == [0]
    assert encoder.head([0, 5]) == []  # no second BOS
    assert encoder.tail([5, 1]) == []  # no second EOS
    assert encoder.tail([5]) == [1]


def test_encoder_of_a_tokenizer_that_puts_nothing_around(tokenizer, cache):
    import tokenizers

    bare = train_tokenizer(TEXTS, 290, cache)
    bare.backend_tokenizer.post_processor = tokenizers.processors.ByteLevel()
    encoder = TextEncoder(bare)
    assert (encoder.beginning, encoder.end) == ((), (1,))
    assert encoder.head([5]) == []


def test_encoder_of_a_tokenizer_that_ends_texts_itself(tokenizer, cache):
    import tokenizers

    ending = train_tokenizer(TEXTS, 290, cache)
    ending.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", 0), ("<|eos|>", 1)]
    )
    assert TextEncoder(ending).end == (1,)  # and not twice


def test_encoder_wants_an_end(tokenizer, cache):
    endless = train_tokenizer(TEXTS, 290, cache)
    endless.eos_token = None
    with pytest.raises(DataError, match=r"no end-of-sequence token.*set tokenizer.eos_token"):
        TextEncoder(endless)


@pytest.mark.parametrize("text", ["value", " value", "\nvalue", "\n", "return self.values"])
def test_continuations_add_no_blank_where_the_tokenizer_marks_starts(text):
    metaspace = metaspace_tokenizer()
    encoder = TextEncoder(metaspace)
    (plain,) = encoder.encode([text])
    (continued,) = encoder.encode_continuations([text])
    (before,) = encoder.encode(["self."])
    assert metaspace.decode(before + continued) == "self." + text
    if not text.startswith((" ", "\n")):
        assert metaspace.decode(before + plain) == "self. " + text  # what it is there for


def test_saved_form_is_what_is_loaded(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["type"] == "BPE"
    loaded = load_tokenizer(tmp_path)
    assert loaded(TEXTS[0])["input_ids"] == tokenizer(TEXTS[0])["input_ids"]
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)


def test_slow_tokenizers_with_other_merges_differ(tmp_path):
    """CTRL's is a tokenizer in Python, of a vocabulary and merges."""
    import json

    from transformers import CTRLTokenizer

    vocabulary = tmp_path / "vocab.json"
    vocabulary.write_text(json.dumps({"<unk>": 0, "a@@": 1, "b@@": 2, "a": 3, "b": 4, "ab": 5, "c": 6}))

    def made(name, merges):
        (tmp_path / name).write_text("#version: 0.2\n" + merges)
        return CTRLTokenizer(str(vocabulary), str(tmp_path / name))

    one, two, again = made("one.txt", "a b</w>\n"), made("two.txt", "b c</w>\n"), made("three.txt", "a b</w>\n")
    assert one("ab")["input_ids"] != two("ab")["input_ids"]
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(again)
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(two)
