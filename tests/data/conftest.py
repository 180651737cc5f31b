import pytest

from packflex.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """A tokenizer without a chat template, of a few words; <|bos|> is 0 and <|eos|> is 1."""
    words = ["Be brief.", "two plus two?", "four", "and two?", "six, I think"]
    return train_tokenizer(words * 4, 300, tmp_path_factory.mktemp("cache"))
