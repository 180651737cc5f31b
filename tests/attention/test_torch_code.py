"""Code written for torch's flex_attention runs with packflex's import in its place, and gives the same."""

import pytest
import torch
from torch.nn.attention import flex_attention as torch_api

import packflex
from packflex.mods.errors import ModError
from packflex.testing.tolerances import RELATIVE, relative_error

LENGTH, TILE = 70, 32
APIS = {"torch": torch_api, "packflex": packflex}
FIELDS = [
    f"{full}{axis}_{what}" for full in ("", "full_") for axis in ("kv", "q") for what in ("num_blocks", "indices")
]
pytestmark = pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile:UserWarning", "ignore:return_lse is deprecated:FutureWarning"
)


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def every_third(b, h, q_idx, kv_idx):
    return (q_idx - kv_idx) % 3 == h % 2


def mods(api):
    return {
        "causal": causal,
        "everything": api.noop_mask,
        "both": api.and_masks(causal, every_third, api.noop_mask),
        "either": api.or_masks(every_third, lambda b, h, q_idx, kv_idx: kv_idx < 40),
    }


def made(api, name, **options):
    return api.create_block_mask(mods(api)[name], 1, 4, LENGTH, LENGTH, BLOCK_SIZE=TILE, **options)


def inputs(device):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, LENGTH, 16, generator=generator).to(device) for heads in (4, 2, 2)]


def decoded(api, name, backend=None):
    """Positions one by one, each under the tile of queries that it is in: torch's recipe for decoding."""
    whole, results = made(api, name), []
    q, k, v = inputs(whole.kv_num_blocks.device)
    for position in (0, 31, 50, 69):
        mask = whole[:, :, position // TILE : position // TILE + 1]
        mask.mask_mod = lambda b, h, q_idx, kv_idx, at=position: whole.mask_mod(b, h, q_idx + at, kv_idx)
        mask.seq_lengths = (1, LENGTH)
        options = {} if backend is None else {"backend": backend}
        out, aux = api.flex_attention(
            q[:, :, position : position + 1], k, v, block_mask=mask, enable_gqa=True,
            return_aux=api.AuxRequest(lse=True), **options,
        )  # fmt: skip
        assert isinstance(aux, api.AuxOutput)
        results += [out, aux.lse[..., None].nan_to_num(neginf=0)]
    return torch.cat(results, -1)


@pytest.mark.parametrize("backend", [None, "triton"])
@pytest.mark.parametrize("name", mods(packflex))
def test_decoding(name, backend):
    assert relative_error(decoded(packflex, name, backend), decoded(torch_api, name)) < RELATIVE[torch.float32]


@pytest.mark.parametrize("name", mods(packflex))
def test_attention(name):
    results = []
    for api in APIS.values():
        mask = made(api, name)
        qkv = inputs(mask.kv_num_blocks.device)
        out, lse = api.flex_attention(*qkv, block_mask=mask, enable_gqa=True, return_lse=True)
        _, aux = api.flex_attention(*qkv, block_mask=mask, enable_gqa=True, return_aux=api.AuxRequest(lse=True))
        assert torch.equal(aux.lse, lse)
        assert aux.max_scores is None
        results.append([out, lse])
    for theirs, ours in zip(*results, strict=True):
        seen = theirs.isfinite()
        assert relative_error(ours[seen], theirs[seen]) < RELATIVE[torch.float32]


@pytest.mark.parametrize("index", [0, -1, (0, 2), (slice(None), slice(1, 3)), (0, slice(None), torch.tensor([2, 0]))])
@pytest.mark.parametrize("name", mods(packflex))
def test_masks(name, index):
    theirs, ours = made(torch_api, name), made(packflex, name)
    assert ours.device == theirs.kv_num_blocks.device
    assert ours.numel() == theirs.numel()
    for flatten in (True, False):
        for one, other in zip(ours.as_tuple(flatten)[:-1], theirs.as_tuple(flatten)[:-1], strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    theirs, ours = theirs[index], ours[index]
    assert ours.shape == theirs.shape
    for field in FIELDS:
        if "q_" not in field:  # torch makes those of a slice as wide as the whole
            assert torch.equal(getattr(ours, field), getattr(theirs, field)), field
    back = packflex.BlockMask.from_torch(ours.to_torch()) if ours.listed_rows == 3 else ours
    assert torch.equal(back.to_dense(), theirs.to_dense())


@pytest.mark.parametrize("name", mods(packflex))
def test_full_blocks_may_be_listed_with_the_others(name):
    theirs, ours = (made(api, name, separate_full_blocks=False) for api in APIS.values())
    for field in FIELDS[:4]:
        assert torch.equal(getattr(ours, field), getattr(theirs, field)), field
    assert theirs.full_kv_num_blocks is None
    assert not ours.full_kv_num_blocks.any()
    q, k, v = inputs(ours.device)
    together, apart = (
        packflex.flex_attention(q, k, v, block_mask=mask, enable_gqa=True) for mask in (ours, made(packflex, name))
    )
    torch.testing.assert_close(together, apart)


def test_block_lists_alone():
    """Of torch's two paths its compiled one honours them."""
    counts = torch.tensor([[[1, 2]]], dtype=torch.int32)
    tiles = torch.tensor([[[[1, 0], [0, 1]]]], dtype=torch.int32)
    theirs, mask = (api.BlockMask.from_kv_blocks(counts, tiles, BLOCK_SIZE=TILE) for api in APIS.values())
    assert mask.shape == theirs.shape == (1, 1, 64, 64)
    assert torch.equal(mask.to_dense(), theirs.to_dense())
    q, k, v = (x[:, :, :64] for x in inputs("cpu"))
    out = packflex.flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    alone = packflex.flex_attention(q[:, :, :32], k[:, :, 32:], v[:, :, 32:], enable_gqa=True)
    torch.testing.assert_close(out[:, :, :32], alone)


@pytest.mark.parametrize("api", APIS.values(), ids=APIS)
def test_what_both_refuse(api):
    mask = made(api, "both")
    q, k, v = inputs(mask.kv_num_blocks.device)
    with pytest.raises(ValueError, match="return_lse and return_aux"):
        api.flex_attention(q, k, v, enable_gqa=True, return_lse=True, return_aux=api.AuxRequest())
    part = mask[:, :, 0:1]
    with pytest.raises(RuntimeError, match="sliced BlockMask"):
        part.mask_mod(*(torch.zeros((), dtype=torch.int32),) * 4)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_slice_is_told_what_it_lacks(backend):
    mask = made(packflex, "both")
    q, k, v = inputs(mask.device)
    part = mask[:, :, 0:1]
    part.mask_mod = mask.mask_mod
    with pytest.raises(ValueError, match=r"lists 1 tiles of queries where 70 .* need 3: of a sliced mask set seq_len"):
        packflex.flex_attention(q, k, v, block_mask=part, enable_gqa=True, backend=backend)
    part = mask[:, :, 0:1]
    part.seq_lengths = (TILE, LENGTH)
    with pytest.raises(ModError, match="set it from the whole mask's"):
        packflex.flex_attention(q[:, :, :TILE], k, v, block_mask=part, enable_gqa=True, backend=backend)
    with pytest.raises(IndexError, match="got 4 indices"):
        mask[0, 0, 0, 0]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_mask_mod_set_later_holds_in_partly_visible_tiles(backend):
    mask = made(packflex, "both")
    mask.mask_mod = every_third
    q, k, v = inputs(mask.device)
    theirs = made(torch_api, "both")
    theirs.mask_mod = every_third
    out = packflex.flex_attention(q, k, v, block_mask=mask, enable_gqa=True, backend=backend)
    given = packflex.flex_attention(q, k, v, block_mask=theirs, enable_gqa=True, backend=backend)
    other = packflex.flex_attention(q, k, v, block_mask=theirs, enable_gqa=True, backend="triton")
    torch.testing.assert_close(out, given)
    torch.testing.assert_close(out, other)


# Given lists, and what may be set on a block mask


def checkered(b, h, q_idx, kv_idx):
    return (q_idx // 16 + kv_idx // 16) % 2 == 0


def listed_masks():
    whole = packflex.create_block_mask(checkered, None, None, 64, 64, "cpu", 16)
    changed = packflex.create_block_mask(checkered, None, None, 64, 64, "cpu", 16)
    changed.mask_mod = lambda b, h, q_idx, kv_idx: q_idx >= kv_idx
    part = whole[:, :, 1:3]
    part.mask_mod, part.seq_lengths = (lambda b, h, q_idx, kv_idx: checkered(b, h, q_idx + 16, kv_idx)), (32, 64)
    theirs = torch_api.create_block_mask(lambda b, h, q, kv: q >= kv, None, None, 64, 64, "cpu", 16)
    given = packflex.BlockMask.from_kv_blocks(whole.kv_num_blocks, whole.kv_indices, BLOCK_SIZE=16)
    return {"torch's": theirs, "given": given, "changed": changed, "slice": part}


@pytest.mark.parametrize("name", ["torch's", "given", "changed", "slice"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_given_lists_compile_into_one_graph(name, compiler):
    mask = listed_masks()[name]
    k, v = torch.randn(2, 1, 2, 64, 16)
    q = torch.randn(1, 2, mask.seq_lengths[0], 16)

    def attend(q, k, v):
        return packflex.flex_attention(q, k, v, block_mask=mask)

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=compiler, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))


def test_a_mask_mod_under_given_lists_is_refused_by_its_own_line():
    lists = listed_masks()["given"]
    q = torch.randn(1, 2, 64, 16)
    for mod, error, text in [
        (lambda b, h, q: q > 1, TypeError, "takes .b, h, q., and is called with 4"),
        (lambda b, h, q, kv: (q >= kv).float(), TypeError, "bool"),
    ]:
        mask = packflex.BlockMask.from_kv_blocks(lists.kv_num_blocks, lists.kv_indices, None, None, 16, mod)
        with pytest.raises(error, match=rf"(?s)test_torch_code\.py.*{text}|{text}.*test_torch_code\.py") as found:
            packflex.flex_attention(q, q, q, block_mask=mask)
        assert "block_mask.py" not in str(found.value)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_shorter_lengths_hide_what_lies_past_them(backend):
    whole = packflex.create_block_mask(checkered, None, None, 64, 48, "cpu", 16)
    whole.seq_lengths = (60, 45)
    q, k, v = torch.randn(1, 2, 60, 16), torch.randn(1, 2, 45, 16), torch.randn(1, 2, 45, 16)
    seen = checkered(0, 0, torch.arange(60)[:, None], torch.arange(45))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    found = packflex.flex_attention(q, k, v, block_mask=whole, backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_mask_of_intervals_is_not_changed_unnoticed():
    mask = packflex.create_block_mask(packflex.masks.causal, None, None, 64, 64, "cpu", 16)
    assert mask.kv_intervals is not None
    mask.mask_mod, mask.seq_lengths = mask.mask_mod, (64, 64)
    with pytest.raises(ValueError, match=r"holds intervals, which its mask_mod does not change.*create_block_mask"):
        mask.mask_mod = checkered
    with pytest.raises(ValueError, match=r"intervals of \(64, 64\) queries and keys, not of \(1, 64\)"):
        mask.seq_lengths = (1, 64)


def test_lengths_forgotten_on_a_slice():
    part = packflex.create_block_mask(checkered, None, None, 64, 64, "cpu", 16)[:, :, 0]
    part.mask_mod = checkered
    q = torch.randn(1, 1, 64, 16)
    with pytest.raises(ValueError, match=r"lists 1 tiles of queries where 64 .* need 4: of a sliced mask set seq_len"):
        packflex.flex_attention(q[:, :, :16], q, q, block_mask=part)
    with pytest.raises(IndexError, match="keeps its rows, heads and tiles"):
        packflex.create_block_mask(checkered, None, None, 64, 64, "cpu", 16)[None]
