"""`packflex.explain`: what it prints ties kernels to the user's lines, and is what runs."""

import io
import re
from pathlib import Path

import pytest
import torch

import packflex
from packflex import PackedLayout, flex_attention, masks, score_mods
from packflex.mods import source

TABLE = torch.zeros(4, 10, requires_grad=True)
LINE = "return cap * torch.tanh((score + near) / cap)"


def capped_bias(score, b, h, q_idx, kv_idx):
    cap = 30.0
    near = TABLE[h, (q_idx - kv_idx).abs().clamp(max=9)]
    return cap * torch.tanh((score + near) / cap)


def explained(*args, **kwargs):
    stream = io.StringIO()
    packflex.explain(*args, file=stream, **kwargs)
    return stream.getvalue()


def line_of(text):
    return 1 + next(i for i, line in enumerate(Path(__file__).read_text().splitlines()) if line.strip() == text)


def test_it_says_what_a_score_mod_computes_and_where():
    text = explained(capped_bias)
    assert text.startswith("score_mod capped_bias (")
    assert "captures c0: float32 [4, 10] on cpu, gets a gradient" in text
    assert re.search(rf"tanh\(v\d+\)  # per h q_idx kv_idx score; test_explain.py:{line_of(LINE)}", text)
    assert re.search(r"d\(c0\[h, v\d+\]\) \+= v\d+, added atomically", text)
    for name in ("mod_forward", "mod_dkdv", "mod_dq"):
        assert f"def {name}(" in text
    assert f"# tanh at test_explain.py:{line_of(LINE)}" in text, "a line of the kernel names the user's"


def test_the_files_are_kept_where_it_says_and_are_what_runs():
    text = explained(capped_bias, masks.strided(4))
    paths = [Path(path) for path in re.findall(r"^# (/.*\.py)$", text, re.M)]
    assert len(paths) == 4, "the tiles of the mask, forward, dK/dV, dQ"
    assert all(path.parent == source.source_folder() and path.read_text().strip() in text for path in paths)

    mask = packflex.create_block_mask(masks.strided(4), None, None, 32, 32, "cpu", 16)
    q = torch.randn(1, 4, 32, 16, requires_grad=True)
    before = source.load.cache_info().misses
    flex_attention(q, q, q, score_mod=capped_bias, block_mask=mask, backend="triton").sum().backward()
    assert source.load.cache_info().misses == before, "running printed other kernels than explain did"


def test_it_tells_intervals_from_masks_that_are_evaluated():
    layout = PackedLayout.from_lengths([[3, 4]], 8)
    closed = explained(mask_mod=masks.and_masks(masks.document(layout), masks.causal))
    assert "Each query sees one interval of keys" in closed
    assert "def " not in closed
    evaluated = explained(mask_mod=masks.natten_2d(8, 8, 3))
    assert "`mask_tiles` classifies each tile" in evaluated
    assert "def mask_tiles(" in evaluated


def test_it_prints_to_standard_output(capsys):
    assert packflex.explain(score_mods.softcap(2.0)) is None
    assert "def mod_forward(" in capsys.readouterr().out


def test_bad_arguments():
    with pytest.raises(ValueError, match="a mask_mod, or both; got neither"):
        packflex.explain()
    with pytest.raises(ValueError, match=r"torch\.where"):
        packflex.explain(lambda score, b, h, q_idx, kv_idx: score if q_idx > 3 else -score, file=io.StringIO())
