from __future__ import annotations

import ast
import inspect
import textwrap

import pytest

from packflex.data.errors import DataError
from packflex.data.stdlib_corpus import StdlibCorpus, read_stdlib


@pytest.fixture(scope="module")
def corpus() -> StdlibCorpus:
    return read_stdlib()


def write(folder, files: dict[str, str | bytes]):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else textwrap.dedent(text).encode())
    return folder


def test_the_running_interpreter_gives_thousands_of_documents_with_a_long_tail(corpus):
    assert len(corpus) > 3000
    assert corpus.functions == len(corpus) + corpus.without_docstring + corpus.without_body + corpus.duplicates
    lengths = sorted(len(p) + len(c) for p, c in zip(corpus.prompts, corpus.completions, strict=True))
    assert lengths[len(lengths) // 2] < 1000 < 5000 < lengths[-1]


def test_a_document_is_the_source_of_the_function(corpus):
    at = corpus.sources.index("textwrap:wrap")
    whole = corpus.prompts[at] + corpus.completions[at]
    assert whole == inspect.getsource(textwrap.wrap)
    assert corpus.prompts[at].endswith('"""\n')


def test_every_document_parses_as_one_function_whose_prompt_ends_with_the_docstring(corpus):
    for prompt, completion in zip(corpus.prompts[::20], corpus.completions[::20], strict=True):
        (function,) = ast.parse(prompt + completion).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert function.body[0].end_lineno == prompt.count("\n")


def test_no_document_comes_twice(corpus):
    texts = ["".join((p + c).split()) for p, c in zip(corpus.prompts, corpus.completions, strict=True)]
    assert len(set(texts)) == len(texts)


def test_splits_are_disjoint_cover_all_and_keep_a_class_together(corpus):
    train, heldout = corpus.select("train"), corpus.select("heldout")
    assert sorted(train + heldout) == list(corpus.select("all")) == list(range(len(corpus)))
    assert 0.02 < len(heldout) / len(corpus) < 0.09
    top = {s: (s.split(":")[0], s.split(":")[1].split(".")[0]) for s in corpus.sources}
    assert not {top[corpus.sources[i]] for i in train} & {top[corpus.sources[i]] for i in heldout}
    bodies = {"".join(corpus.completions[i].split()) for i in train}
    copies = [i for i in heldout if len(body := "".join(corpus.completions[i].split())) >= 80 and body in bodies]
    assert copies == []
    assert corpus.select("heldout", 0) == ()
    assert corpus.select("train", 100) == ()


FILES = {
    "b.py": '''
        class Stack:
            """A stack."""

            @property
            def top(self):
                """The last item."""
                # comments after the docstring belong to the body
                return self.items[-1]

            def undocumented(self):
                return 1

            def only_docstring(self):
                """Nothing else."""

        async def wait(x):
            "One line."

            def inner():
                """Nested."""
                return """
        not indented"""
            return inner
    ''',
    "a/__init__.py": 'def first():\n    """First."""\n    pass\n',
    "a/copy.py": 'def first():\n    """First."""\n    pass\n',
    "a/latin.py": "# coding: latin-1\ndef umlaut():\n    '''\xe4'''\n    return '\xf6'\n".encode("latin-1"),
    "one_line.py": 'def f(): "doc"; return 1\n',
    "test/test_x.py": 'def t():\n    """Left out."""\n    pass\n',
    "site-packages/y.py": 'def t():\n    """Left out."""\n    pass\n',
    "broken.py": "def f(:\n",
    "null.py": b"x = '\0'\n",
    "bad_encoding.py": b"# coding: nonsense\n",
    "escape.py": b'X = "\\d"\n',  # warns in newer Pythons
}


def test_small_library_exactly(tmp_path):
    corpus = read_stdlib(write(tmp_path, FILES))
    assert dict(zip(corpus.sources, zip(corpus.prompts, corpus.completions, strict=True), strict=True)) == {
        "a:first": ('def first():\n    """First."""\n', "    pass\n"),
        "a.latin:umlaut": ("def umlaut():\n    '''ä'''\n", "    return 'ö'\n"),
        "b:Stack.top": (
            '@property\ndef top(self):\n    """The last item."""\n',
            "    # comments after the docstring belong to the body\n    return self.items[-1]\n",
        ),
        "b:wait": (
            'async def wait(x):\n    "One line."\n',
            '    def inner():\n        """Nested."""\n        return """\nnot indented"""\n    return inner\n',
        ),
        "b:wait.inner": ('def inner():\n    """Nested."""\n', '    return """\nnot indented"""\n'),
    }
    assert (corpus.files, corpus.unreadable_files) == (6, 3)
    assert (corpus.functions, corpus.without_docstring, corpus.without_body, corpus.duplicates) == (9, 1, 2, 1)


def test_without_docstrings_the_signature_is_the_prompt(tmp_path):
    corpus = read_stdlib(write(tmp_path, FILES), require_docstring=False)
    at = corpus.sources.index("b:Stack.undocumented")
    assert (corpus.prompts[at], corpus.completions[at]) == ("def undocumented(self):\n", "    return 1\n")


def test_copies_under_another_name_are_left_out(tmp_path):
    body = "    total = 0\n    for value in values:\n        total += value * value\n"
    body += "    return total ** 0.5 if total > 0 else float('nan')\n"
    write(tmp_path, {"a.py": f'def norm(values):\n    """One."""\n{body}'})
    write(tmp_path, {"b.py": f'def length(values):\n    """Two."""\n{body}'})
    corpus = read_stdlib(tmp_path)
    assert corpus.sources == ("a:norm",)
    assert corpus.duplicates == 1


def test_errors_say_where_and_what_to_do(tmp_path, corpus):
    with pytest.raises(DataError, match=r"nowhere: no such folder.*interpreter"):
        read_stdlib(tmp_path / "nowhere")
    write(tmp_path, {"a.py": "def f():\n    return 1\n", "b.py": "("})
    with pytest.raises(DataError, match=r"no function with a docstring in 1 Python files \(1 unreadable\)"):
        read_stdlib(tmp_path)
    with pytest.raises(ValueError, match="split must be 'train', 'heldout' or 'all'; got 'test'"):
        corpus.select("test")
    with pytest.raises(ValueError, match="heldout_percent must be 0 to 100; got 101"):
        corpus.select("train", 101)
