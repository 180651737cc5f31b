"""Real text that every machine has: the functions of the interpreter's own standard library.

Each function that has a docstring becomes a prompt (decorators, signature, docstring) and an answer (its body). On
CPython 3.11 that is 6,717 documents of 44 to 12,956 characters (median 376), read in about 4 seconds.
The text is read from the installed interpreter when the function is called; none of it ships with packflex.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import io
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packflex.data.errors import DataError

Split = Literal["train", "heldout", "all"]

# Third-party code and test suites are no part of the library's own prose; idlelib calls its tests idle_test.
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
# Bodies at least this long (without white space) that are equal are copies of one function, whatever its name.
_COPIED_BODY_CHARS = 80
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class StdlibCorpus:
    """Documents read from the standard library, with what was seen on the way.

    Attributes:
        prompts: decorators, signature and docstring of each function, ending in a newline.
        completions: the body that follows, ending in a newline.
        sources: "module:qualified.name" of each function. A property and its setter share a name, as do functions
            that are defined once per platform.
        files: Python files read.
        unreadable_files: files skipped because they are not readable or not valid Python for this interpreter.
        functions: functions seen, before any was left out.
        without_docstring: functions left out for having no docstring (0 when they were asked for).
        without_body: functions left out for having nothing after the docstring, or sharing its line.
        duplicates: functions left out as copies of an earlier one.
    """

    prompts: tuple[str, ...]
    completions: tuple[str, ...]
    sources: tuple[str, ...]
    files: int
    unreadable_files: int
    functions: int
    without_docstring: int
    without_body: int
    duplicates: int

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, split: Split, heldout_percent: int = 5) -> tuple[int, ...]:
        """Indices of the documents of a split, in order.

        The split hangs on a hash of the module and its top-level class or function, so the methods of a class and a
        function with the functions nested in it always land on the same side, on every machine.

        Args:
            split: "train", "heldout" or "all".
            heldout_percent: share of held-out groups, 0 to 100.

        Raises:
            ValueError: an unknown split or a share outside 0 to 100.
        """
        if split not in ("train", "heldout", "all"):
            raise ValueError(f"split must be 'train', 'heldout' or 'all'; got {split!r}")
        if not 0 <= heldout_percent <= 100:
            raise ValueError(f"heldout_percent must be 0 to 100; got {heldout_percent}")
        if split == "all":
            return tuple(range(len(self)))
        wanted = split == "heldout"
        return tuple(i for i, s in enumerate(self.sources) if (_percentile(s) < heldout_percent) == wanted)


def read_stdlib(root: str | Path | None = None, require_docstring: bool = True) -> StdlibCorpus:
    """Read the functions of the standard library as prompt and completion pairs, in a fixed order, without copies.

    Methods and nested functions are included, brought to the left margin. Files that cannot be read or parsed are
    counted and skipped. Order: path, then line.

    Args:
        root: folder to read; the running interpreter's standard library by default.
        require_docstring: leave out functions without a docstring. With False their prompt is the signature alone;
            on CPython 3.11 that more than doubles the documents.

    Raises:
        DataError: a folder that is missing or holds no function that can be used.

    Example:
        >>> corpus = read_stdlib()
        >>> corpus.sources[:1]
        ('__future__:_Feature.getOptionalRelease',)
    """
    folder = Path(sysconfig.get_path("stdlib")) if root is None else Path(root)
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; the standard library's source files are needed here: use an interpreter that "
            "has them (python.org, conda, uv and Linux packages do), or another data set such as data=jsonl"
        )
    with _no_garbage_collection():
        return _read(folder, require_docstring)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Half of the time goes into collections that find nothing: syntax trees are large and have no cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _read(folder: Path, require_docstring: bool) -> StdlibCorpus:
    prompts: list[str] = []
    completions: list[str] = []
    sources: list[str] = []
    seen: set[bytes] = set()
    files = unreadable = functions = without_docstring = without_body = duplicates = 0
    for path in _module_files(folder):
        parsed = _parse(path)
        if parsed is None:
            unreadable += 1
            continue
        files += 1
        lines, tree = parsed
        module = _module_name(path.relative_to(folder))
        for name, node in _walk(tree, ""):
            functions += 1
            if require_docstring and ast.get_docstring(node, clean=False) is None:
                without_docstring += 1
                continue
            parts = _prompt_and_body(node, lines)
            if parts is None:
                without_body += 1
                continue
            prompt, body = parts
            marks = _fingerprints(prompt, body)
            if not seen.isdisjoint(marks):
                duplicates += 1
                continue
            seen.update(marks)
            prompts.append(prompt)
            completions.append(body)
            sources.append(f"{module}:{name}")
    if not prompts:
        raise DataError(
            f"{folder}: no function {'with a docstring ' if require_docstring else ''}in {files} Python files "
            f"({unreadable} unreadable); use an interpreter with its library's sources, or another data set"
        )
    return StdlibCorpus(
        tuple(prompts),
        tuple(completions),
        tuple(sources),
        files,
        unreadable,
        functions,
        without_docstring,
        without_body,
        duplicates,
    )


def _module_files(folder: Path) -> list[Path]:
    files = ((path.relative_to(folder), path) for path in folder.rglob("*.py"))
    return [path for relative, path in sorted(files) if _SKIPPED_FOLDERS.isdisjoint(relative.parts)]


def _parse(path: Path) -> tuple[list[str], ast.Module] | None:
    try:
        raw = path.read_bytes()
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        text = raw.decode(encoding).replace("\r\n", "\n")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in someone else's source are no concern of the reader
            tree = ast.parse(text)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None  # counted by the caller: templates for other versions, broken links, deliberately bad files
    # ast counts lines by "\n" alone; str.splitlines would also break at form feeds.
    return text.split("\n"), tree


def _module_name(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, _Function]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = f"{prefix}{child.name}"
            if not isinstance(child, ast.ClassDef):
                yield name, child
            yield from _walk(child, f"{name}.")
        elif isinstance(child, (ast.stmt, ast.excepthandler)):  # under `if`, `try`, `with`, ...; no expressions
            yield from _walk(child, prefix)


def _prompt_and_body(node: _Function, lines: list[str]) -> tuple[str, str] | None:
    """Source of a function up to and after its docstring (or signature), moved to the left margin."""
    has_docstring = ast.get_docstring(node, clean=False) is not None
    body = node.body[1:] if has_docstring else node.body
    if not body:
        return None
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    # Comments between the docstring and the first statement belong to the body; without a docstring, the signature
    # ends before the first statement, and comments stay with the signature.
    last_of_prompt = (node.body[0].end_lineno or 0) if has_docstring else _first_line(body[0]) - 1
    if last_of_prompt < node.lineno or _first_line(body[0]) <= last_of_prompt:
        return None  # everything on one line: `def f(): return 1`
    prompt = _dedent(lines[first - 1 : last_of_prompt], node.col_offset)
    answer = _dedent(lines[last_of_prompt : node.end_lineno], node.col_offset)
    while answer and not answer[0].strip():
        answer.pop(0)
    return "\n".join(prompt) + "\n", "\n".join(answer) + "\n"


def _first_line(statement: ast.stmt) -> int:
    decorators = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *(decorator.lineno for decorator in decorators)])


def _dedent(lines: list[str], columns: int) -> list[str]:
    """Take up to `columns` leading blanks from each line; a string that starts further left keeps its text."""
    return [line[columns:] if not line[:columns].strip() else line for line in lines]


def _fingerprints(prompt: str, body: str) -> list[bytes]:
    """Hashes that make a copy: the whole text, and the body alone when it is long enough to be no coincidence."""
    squeezed = "".join(body.split())
    texts = ["".join(prompt.split()) + "\0" + squeezed]
    if len(squeezed) >= _COPIED_BODY_CHARS:
        texts.append(squeezed)
    return [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts]


def _percentile(source: str) -> int:
    module, name = source.split(":", 1)
    group = f"{module}:{name.split('.', 1)[0]}"
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") % 100
