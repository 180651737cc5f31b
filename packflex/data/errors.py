"""`DataError`: what is wrong with a data set, where, and what to do about it, in one line."""

from __future__ import annotations


class DataError(ValueError):
    """Input data that cannot be used: a wrong path, an invalid line, a missing field, a document without supervision.

    The message is one line that names the file (and line or row), what was found and the remedy, so a command line can
    print it as it is. It is a `ValueError`, and it survives pickling, so it crosses worker processes unchanged.

    Example:
        >>> raise DataError("train.jsonl:7: not valid JSON; fix or remove the line")
        Traceback (most recent call last):
        packflex.data.errors.DataError: train.jsonl:7: not valid JSON; fix or remove the line
    """


def one_line(error: BaseException) -> str:
    """What a library says in an exception, on one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def too_long_message(first: str, length: int, count: int, seq_len: int) -> str:
    """What to say of `count` documents that are longer than a row, the first of them `first` with `length` tokens."""
    return (
        f"{first}: {length:,} tokens, more than seq_len={seq_len} ({count:,} such documents); choose another overflow "
        "(split, truncate or drop), or longer rows"
    )


def mask_message(name: str, value: int) -> str:
    """What to say of a document whose attention mask holds `value`, and not 1."""
    if value == 0:
        return f"{name} is padded (its attention_mask has zeros): tokenise without padding, packing needs none"
    return (
        f"{name}: 'attention_mask' holds {value}, and says 1 of a token and 0 of padding; where it numbers the "
        "documents of a record, split that into one record for each"
    )
