"""Models by folder, by hub id or at random, and what is said when there is none."""

import pytest
import torch

from packflex.data.tokenizer import train_tokenizer
from packflex.models import SetupError, add_adapters, build_model, checked_name, is_pretrained, merge_adapters

TINY = {
    "model_type": "llama",
    "vocab_size": None,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(["one two three four"] * 9, 300, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_model(architecture=TINY, tokenizer=tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("path", "init", "expected"),
    [
        (None, "auto", False),
        ("x", "auto", True),
        ("x", "random", False),
        (None, "random", False),
        ("x", "pretrained", True),
    ],
)
def test_is_pretrained(path, init, expected):
    assert is_pretrained(path, init) is expected


def test_random_model_follows_the_tokenizer_and_the_seed(tokenizer):
    random_state = torch.get_rng_state()
    one, same, other = (build_model(architecture=TINY, tokenizer=tokenizer, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert one.get_input_embeddings().num_embeddings == len(tokenizer)
    assert one.config.eos_token_id == tokenizer.eos_token_id
    assert one.training
    assert all(p.dtype == torch.float32 for p in one.parameters())
    weights = [model.lm_head.weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_pretrained_model_comes_back(folder, tokenizer):
    saved = build_model(architecture=TINY, tokenizer=tokenizer)
    loaded = build_model(folder, tokenizer=tokenizer)
    for (name, a), (_, b) in zip(saved.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_random_weights_of_a_folder_that_is_not_the_architecture(folder):
    written = TINY | {"of": "somebody/else", "num_hidden_layers": 7}
    model = build_model(folder, "random", architecture=written)
    assert model.config.num_hidden_layers == 2


def test_random_weights_of_the_architecture_need_no_download():
    written = TINY | {"of": "somebody/model", "vocab_size": 64}
    assert build_model("somebody/model", "random", architecture=written).config.vocab_size == 64


def test_gradient_checkpointing(folder):
    model = build_model(folder, gradient_checkpointing=True)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    assert not any(layer.gradient_checkpointing for layer in build_model(folder).model.layers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": "rendom"}, "model.init must be one of auto, random, pretrained; got 'rendom'"),
        ({"init": "pretrained"}, "model.init=pretrained needs model.path"),
        ({}, "set model.path, or model.architecture"),
        ({"architecture": TINY}, "vocab_size is not set"),
        ({"architecture": {"model_type": "lama"}}, "model_type='lama' is not known"),
        ({"architecture": TINY | {"vocab_size": 64, "num_attention_heads": 5}}, "can be built from this configuration"),
    ],
)
def test_what_cannot_be_built(arguments, message):
    with pytest.raises(SetupError, match=message):
        build_model(**arguments)


def test_paths_without_a_model(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    with pytest.raises(SetupError, match="is a file; give the folder"):
        checked_name(tmp_path / "file")
    with pytest.raises(SetupError, match=r"holds no config\.json"):
        checked_name(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(SetupError, match=f"the folder holds adapters, .* beside them: {tmp_path}/model$"):
        checked_name(tmp_path / "adapter")
    with pytest.raises(SetupError, match="nowhere: no such folder"):
        checked_name("./nowhere")
    assert checked_name("owner/name") == "owner/name"
    for init in ("pretrained", "random"):
        with pytest.raises(SetupError, match="could be read from this folder"):
            build_model(tmp_path / "broken", init)


def test_a_vocabulary_smaller_than_the_tokenizers(tokenizer):
    with pytest.raises(SetupError, match=rf"knows 10 token ids and the tokenizer gives {len(tokenizer)}"):
        build_model(architecture=TINY | {"vocab_size": 10}, tokenizer=tokenizer)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("settings", "apart"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, True),
        ({"target_modules": ["embed_tokens"]}, True),
        ({"target_modules": ["embed_tokens", "lm_head"]}, True),
        ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, False),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}, False),
        ({"target_modules": "all-linear"}, False),
    ],
)
def test_merged_adapters_compute_the_same_whatever_weights_are_shared(settings, apart):
    peft = pytest.importorskip("peft")
    model = build_model(architecture=TINY | {"vocab_size": 64, "tie_word_embeddings": True})
    adapted = add_adapters(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    ids = torch.arange(20)[None]
    expected = adapted(ids).logits
    merged, differing = merge_adapters(adapted)
    assert torch.allclose(merged(ids).logits, expected, atol=1e-4)
    assert differing is apart
    assert merged.config.tie_word_embeddings is not apart
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is not apart
