"""Load a tokenizer, or train a small byte-level one where nothing can be downloaded; tell tokenizers apart.

Only `packflex.integrations` imports transformers at import time; the functions here import it when they are called,
because a tokenizer is a transformers object and `import packflex.data` must stay quick for those who bring token ids.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packflex.data.errors import DataError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
# Part of the cache key: raise it when training changes what it makes of the same texts.
_TRAINING_VERSION = 1


def default_cache_dir() -> Path:
    """Where trained tokenizers are kept: `~/.cache/packflex/tokenizers`."""
    return Path.home() / ".cache" / "packflex" / "tokenizers"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 4096, cache_dir: str | Path | None = None
) -> PreTrainedTokenizerBase:
    """Byte-level BPE tokenizer trained on `texts`, from the cache when the same was trained before.

    The same texts in the same order give the same tokenizer, whatever the machine. Every string can be encoded and
    comes back exactly (bytes are the alphabet). `<|bos|>` is put before a text, `<|eos|>` ends a document, `<|pad|>`
    fills a row. 4.5 million characters at 4096 entries take about 2 seconds on two cores.

    Args:
        texts: what to learn from; read once.
        vocab_size: most entries, including 256 bytes and 3 special tokens; fewer when the texts have no more pairs
            that come twice.
        cache_dir: `default_cache_dir()` by default. An entry is a folder named by a hash of the texts, the size and
            the versions; it is written aside and renamed, so a killed run leaves no half entry.

    Raises:
        DataError: no text at all.
        ValueError: a vocabulary too small for the bytes and the special tokens.

    Example:
        >>> tokenizer = train_tokenizer(["def f():\\n    return 1\\n"] * 10, vocab_size=300)
        >>> tokenizer.decode(tokenizer("return")["input_ids"], skip_special_tokens=True)
        'return'
    """
    import tokenizers  # here and not above: token ids can be packed without it

    smallest = 256 + len((BOS, EOS, PAD))
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest} (256 bytes and 3 special tokens); got {vocab_size}")
    texts = list(texts)
    if not any(texts):
        raise DataError(f"no text to train a tokenizer on: got {len(texts)} texts, all empty")
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir)
    entry = cache / _training_key(texts, vocab_size, tokenizers.__version__)
    if not entry.is_dir():
        _write_entry(_train(texts, vocab_size), entry)
    return load_tokenizer(entry)


def load_tokenizer(
    path_or_id: str | Path,
    chat_template: str | Path | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> PreTrainedTokenizerBase:
    """Tokenizer from a local folder or the Hugging Face hub, with its chat template replaced when one is given.

    Args:
        path_or_id: a folder made by `save_pretrained`, or a hub id such as "Qwen/Qwen3-0.6B".
        chat_template: a Jinja file that replaces the tokenizer's own template.
        revision: branch, tag or commit on the hub.
        local_files_only: never ask the network, use what was downloaded before.

    Raises:
        DataError: a folder or file that is missing or holds no tokenizer, or a hub id that cannot be reached.
    """
    import transformers

    name = str(path_or_id)
    if not name.strip():
        raise DataError("the tokenizer's name is empty; give a folder with tokenizer.json or a Hugging Face id")
    if _looks_local(name) and not Path(name).is_dir():
        kind = "is a file" if Path(name).is_file() else "does not exist"
        raise DataError(
            f"{name}: tokenizer folder {kind}; give a folder with tokenizer.json (made by save_pretrained) or a "
            "Hugging Face id such as Qwen/Qwen3-0.6B"
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, revision=revision or "main", local_files_only=local_files_only
        )
    except (OSError, ValueError, KeyError, ImportError) as error:  # what from_pretrained raises for bad input
        if Path(name).is_dir():
            raise DataError(
                f"{name}: no tokenizer could be read from this folder ({one_line(error)}); "
                "it needs tokenizer.json and tokenizer_config.json as save_pretrained writes them"
            ) from error
        raise DataError(
            f"{name}: neither a local folder nor a tokenizer that the Hugging Face hub gave us ({one_line(error)}); "
            "check the name and the network, or give a local folder"
        ) from error
    if chat_template is not None:
        path = Path(chat_template)
        if not path.is_file():
            raise DataError(f"{path}: no such chat template file; give a file with a Jinja template")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what decides token ids: vocabulary, merges, normalisation and special tokens; not the chat template.

    Two tokenizers with the same fingerprint give the same ids for the same text: whether special tokens in it are split
    counts too. The name and folder are not in it, nor are padding and truncation, which calls change on the fly.

    Returns:
        64 hexadecimal digits (SHA-256).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content: dict[str, Any] = json.loads(backend.to_str())
        content.pop("truncation", None)
        content.pop("padding", None)
        if tokenizer.split_special_tokens:  # added where it is true, so that the fingerprints of others stay
            content["split_special_tokens"] = True
    else:
        content = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab(), **_slow_content(tokenizer)}
    content["special_tokens"] = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return _sha256(json.dumps(content, sort_keys=True, ensure_ascii=False))


def _slow_content(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a tokenizer in Python splits text by: its vocabulary files (merges among them) and its switches."""
    numbers = {key: value for key, value in tokenizer.init_kwargs.items() if isinstance(value, bool | int | float)}
    switches = {key: value for key, value in numbers.items() if key != "model_max_length"}
    with tempfile.TemporaryDirectory() as folder:
        try:
            written = tokenizer.save_vocabulary(folder)
        except NotImplementedError:  # it has none, as one of bytes
            written = ()
        files = {Path(name).name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in written}
    return {"switches": switches, "files": files}


def chat_template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Hash of the chat template (SHA-256 in hexadecimal), None when the tokenizer has none."""
    template = tokenizer.chat_template
    if not template:
        return None
    return _sha256(template if isinstance(template, str) else json.dumps(template, sort_keys=True))


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """What to call a tokenizer in a message: its hub id or folder, else its class."""
    return tokenizer.name_or_path or type(tokenizer).__name__


def tokenizer_reference(tokenizer: PreTrainedTokenizerBase) -> str:
    """Where a tokenizer can be loaded from again, from whatever folder: the hub's id, or the whole path of a folder."""
    name = tokenizer_name(tokenizer)
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _train(texts: list[str], vocab_size: int) -> PreTrainedTokenizerBase:
    import tokenizers
    import transformers

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer, length=len(texts))
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, model.token_to_id(BOS))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def _write_entry(tokenizer: PreTrainedTokenizerBase, entry: Path) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".writing-", dir=entry.parent))
    try:
        tokenizer.save_pretrained(aside)
        os.rename(aside, entry)
    except OSError:
        # Another process may have put the same tokenizer there first; its content is equal by construction.
        if not entry.is_dir():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _training_key(texts: list[str], vocab_size: int, library_version: str) -> str:
    digest = hashlib.sha256(f"{_TRAINING_VERSION}|{library_version}|{vocab_size}|{BOS}{EOS}{PAD}".encode())
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return f"bpe-{vocab_size}-{digest.hexdigest()[:24]}"


def _looks_local(name: str) -> bool:
    """A path by its form: hub ids have at most one slash and start with neither a dot, a slash nor a tilde."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
