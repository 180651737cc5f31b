"""Lightning: token-exact loss over accumulation, the callback's checks and logs, exact resume, the README's example."""

import functools
import logging
from pathlib import Path

import lightning as L
import peft
import pytest
import torch
from datasets import Dataset
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from packflex import document_mask, flex_attention, pack_dataset
from packflex.data.collate import PackedCollator, PaddedCollator
from packflex.data.stream import PackedStream
from packflex.integrations.lightning import CausalLMModule, PackedDataModule, PackFlexCallback
from packflex.integrations.lightning import callback as callback_of
from packflex.integrations.lightning import module as module_of
from packflex.integrations.transformers import _BY_POSITIONS, enable_packflex
from packflex.losses import next_token_loss
from packflex.models import add_adapters
from packflex.testing.families import FAMILIES
from packflex.testing.families import tiny_model as family_model
from packflex.testing.leaks import LeakError

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated"),
    pytest.mark.filterwarnings("ignore:.*The number of training batches:UserWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*You are trying to `self.log.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty:UserWarning"),
]

SEQ_LEN = 48


def tiny_model(seed=0, **options):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **options,
    )
    return LlamaForCausalLM(config)


def packed_rows(count=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 30, (count,), generator=generator).tolist()
    documents = [torch.randint(1, 64, (n,), generator=generator).tolist() for n in lengths]
    labels = [[-100 if i < n // 3 else t for i, t in enumerate(d)] for n, d in zip(lengths, documents, strict=True)]
    return pack_dataset(Dataset.from_dict({"input_ids": documents, "labels": labels}), SEQ_LEN)


SGD = functools.partial(torch.optim.SGD, lr=0.1)


def trainer(tmp_path, callbacks=(), **options):
    defaults = {"max_steps": 3, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    defaults |= {"accelerator": "cpu", "devices": 1, "enable_model_summary": False, "default_root_dir": tmp_path}
    return L.Trainer(callbacks=list(callbacks), **(defaults | options))


class Recorder(L.Callback):
    """What was logged at each optimizer step, and the gradients just before it."""

    def __init__(self):
        self.losses, self.gradients, self.metrics = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.metrics.append(metrics)
        if "train/loss" in metrics:
            self.losses.append(metrics["train/loss"])

    def on_train_end(self, trainer, pl_module):
        self.gradients = [p.grad.clone() for p in pl_module.parameters() if p.requires_grad]


def exact_gradients(model, rows, power=0.0):
    """Gradients of the mean over supervised tokens of `rows`, each document alone, unpacked and unpadded.

    A document's tokens weigh 1 / n**power, n being how many of them are supervised.
    """
    reference = tiny_model()
    reference.load_state_dict(model.state_dict())
    reference.set_attn_implementation("eager")
    total, count = 0.0, 0
    for row in rows:
        start = 0
        for length in row["lengths"]:
            ids, labels = (torch.tensor(row[name][start : start + length])[None] for name in ("input_ids", "labels"))
            if length > 1:
                loss, supervised = next_token_loss(reference(ids, use_cache=False).logits, labels)
                weight = max(int(supervised), 1) ** -power
                total, count = total + loss * weight, count + int(supervised) * weight
            start += length
    (total / count).backward()
    return float(total.detach()) / count, [p.grad for p in reference.parameters()]


POWERS = {"token": 0.0, "sqrt": 0.5, "document": 1.0}


@pytest.mark.parametrize("loss", ["logits", "chunked"])
@pytest.mark.parametrize(
    ("batch_size", "accumulate", "weighting"),
    [(1, 4, "token"), (2, 2, "token"), (4, 1, "token"), (2, 2, "sqrt"), (1, 4, "document"), (4, 1, "document")],
)
def test_micro_batches_give_the_gradient_of_the_one_big_batch(tmp_path, batch_size, accumulate, weighting, loss):
    rows = packed_rows()
    model = tiny_model()
    expected_loss, expected = exact_gradients(model, rows.select(range(4)), POWERS[weighting])
    recorder = Recorder()
    data = PackedDataModule(rows, seq_len=SEQ_LEN, batch_size=batch_size, order="sequential")
    fit = trainer(tmp_path, [PackFlexCallback(), recorder], max_steps=1, accumulate_grad_batches=accumulate)
    fit.fit(CausalLMModule(model, SGD, loss_weighting=weighting, loss=loss), data)
    assert recorder.losses[-1] == pytest.approx(expected_loss, rel=1e-5)
    for ours, exact in zip(recorder.gradients, expected, strict=True):
        assert torch.allclose(ours, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", ["fit", "validate"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_that_does_not_read_the_layout_is_refused(tmp_path, stage, wrapped):
    """Its documents would see one another, and the loss would not tell."""
    model = tiny_model(attn_implementation="eager")
    module = CausalLMModule(Wrapper(model) if wrapped else model, SGD)
    data = PackedDataModule(packed_rows(), packed_rows(), seq_len=SEQ_LEN, batch_size=2)
    fit = trainer(tmp_path)
    with pytest.raises(
        ValueError, match=r"LlamaModel attends through 'eager', so .* may see .* PackFlexCallback\(\), or call"
    ):
        getattr(fit, stage)(module, data)


class Wrapper(torch.nn.Module):
    """Hands on what it gets."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *arguments, **options):
        return self.model(*arguments, **options)


class Unpacking(Wrapper):
    """Reads the layout itself: a mask of each row's documents."""

    def forward(self, input_ids, position_ids, packed):
        ids = packed.document_ids
        mask = ((ids[:, :, None] == ids[:, None]) & torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).tril())[:, None]
        return self.model(input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False)


def documents_attention(module, query, key, value, attention_mask, packed=None, scaling=None, **kwargs):
    out = flex_attention(
        query, key, value, block_mask=document_mask(packed, causal=True), scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


@pytest.mark.parametrize("own", ["module", "attention function"])
def test_models_that_read_the_layout_themselves_need_no_callback(tmp_path, own):
    if own == "module":
        model = Unpacking(tiny_model(attn_implementation="sdpa"))
    else:
        AttentionInterface.register("documents", documents_attention)
        model = tiny_model(attn_implementation="documents")
    rows, recorder = packed_rows(), Recorder()
    expected, _ = exact_gradients(tiny_model(), rows.select(range(2)))
    data = PackedDataModule(rows, seq_len=SEQ_LEN, batch_size=2, order="sequential")
    trainer(tmp_path, [recorder], max_steps=1).fit(CausalLMModule(model, SGD), data)
    assert recorder.losses[-1] == pytest.approx(expected, rel=1e-5)


def packed_batch():
    """Two rows of several documents, and the same with other tokens in the first of each."""
    batch = PackedCollator(SEQ_LEN)([dict(row) for row in packed_rows().select(range(2))])
    other = batch["input_ids"].clone()
    for row, lengths in enumerate(batch["packed"].lengths):
        assert len(lengths) > 1
        other[row, : lengths[0]] = 7
    return batch, batch | {"input_ids": other}


def sees_others(model, **options):
    """Whether anything after the first document of a row follows from its tokens."""
    batch, other = ({k: v for k, v in each.items() if k != "labels"} | options for each in packed_batch())
    with torch.no_grad():
        differences = (model(**batch).logits - model(**other).logits).abs().amax(-1)
    return any(bool(differences[row, n[0] : sum(n)].any()) for row, n in enumerate(batch["packed"].lengths))


def refuses(model, **options):
    try:
        CausalLMModule(model, SGD).batch_loss(packed_batch()[0] | options)
    except ValueError as error:
        return "so its documents may see one another" in str(error) or pytest.fail(str(error))
    return False


SMALL = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "sliding_window": 8, "pad_token_id": 0,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 2, "num_local_experts": 2,
    "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.mark.parametrize("family", sorted(_BY_POSITIONS))
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_families_that_go_by_positions_are_taken_without_a_cache(family, attention):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL), attn_implementation="eager").eval()
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip(f"transformers has no SDPA for {family}")
    model.set_attn_implementation(attention)
    assert sees_others(model), "what is refused is wrong"
    assert refuses(model)
    assert not sees_others(model, use_cache=False)
    assert not refuses(model, use_cache=False)
    model.config.use_cache = False
    assert not refuses(model)
    assert not refuses(torch.compile(model, backend="eager"))
    assert refuses(model, attention_mask=torch.ones(2, SEQ_LEN, dtype=torch.long))
    assert refuses(model, position_ids=torch.arange(SEQ_LEN).repeat(2, 1)), "they tell nothing"
    assert refuses(model, position_ids=None)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing_keeps_no_cache_in_training():
    model = tiny_model(attn_implementation="sdpa")
    model.gradient_checkpointing_enable()
    model.train()
    assert not sees_others(model)
    assert not refuses(model)
    model.eval()
    assert sees_others(model)
    assert refuses(model)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt_oss", {}),
        ("falcon", {}),
        ("llama", {"is_causal": False}),
    ],
    ids=["gpt-oss", "falcon", "bidirectional"],
)
def test_models_that_do_not_go_by_positions_are_refused(family, options):
    """The masks of some do not get positions, and those that look both ways never do."""
    torch.manual_seed(0)
    sizes = {k: v for k, v in SMALL.items() if (family, k) != ("falcon", "head_dim")}
    config = AutoConfig.for_model(family, **sizes, **options, use_cache=False)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    assert sees_others(model)
    assert refuses(model)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_adapters_around_models_that_go_by_positions(kind):
    model = tiny_model(attn_implementation="eager", use_cache=False)
    if kind == "lora":
        settings = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    else:
        settings = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    assert refuses(peft.get_peft_model(model, settings)) == (kind == "prefix")


def test_the_text_model_inside_a_larger_one_is_what_counts():
    """Llava's is switched alone, for the whole reads images; and switched back."""
    torch.manual_seed(0)
    eye = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    eye |= {"image_size": 8, "patch_size": 4, "projection_dim": 8}
    text = LlamaConfig(**{k: v for k, v in SMALL.items() if k != "sliding_window"})
    config = LlavaConfig(vision_config=CLIPVisionConfig(**eye), text_config=text, image_token_index=63)
    model = LlavaForConditionalGeneration(config).eval()
    assert sees_others(model)
    assert refuses(model)
    enable_packflex(model.model.language_model)
    assert not sees_others(model)
    assert not refuses(model)
    model.model.language_model.set_attn_implementation("sdpa")
    assert refuses(model)


class SaveGradients(L.Callback):
    """The first rank's gradients and loss at the end, in a file: the ranks are processes of their own."""

    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            loss = float(trainer.callback_metrics["train/loss"])
            torch.save({"loss": loss, "gradients": [p.grad for p in pl_module.parameters()]}, self.path)


@pytest.mark.slow
@pytest.mark.parametrize("weighting", POWERS)
def test_two_ranks_give_the_gradient_of_the_one_big_batch(tmp_path, weighting):
    """Two ranks, two accumulated batches each: the eight rows of the step hold other numbers of supervised tokens."""
    rows = packed_rows()
    expected_loss, expected = exact_gradients(tiny_model(), rows.select(range(8)), POWERS[weighting])
    path = tmp_path / "gradients.pt"
    data = PackedDataModule(rows, seq_len=SEQ_LEN, batch_size=2, order="sequential")
    fit = trainer(
        tmp_path,
        [PackFlexCallback(leak_check=False), SaveGradients(path)],
        devices=2,
        strategy="ddp_fork",
        max_steps=1,
        accumulate_grad_batches=2,
    )
    fit.fit(CausalLMModule(tiny_model(), SGD, loss_weighting=weighting), data)
    saved = torch.load(path)
    assert saved["loss"] == pytest.approx(expected_loss, rel=1e-5)
    for ours, exact in zip(saved["gradients"], expected, strict=True):
        assert torch.allclose(ours, exact, rtol=1e-4, atol=1e-6)


class PaddedByRank(L.LightningDataModule):
    """Batches of other shapes on each rank: packed rows all have one."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def train_dataloader(self):
        at = 2 * self.trainer.global_rank
        return torch.utils.data.DataLoader(self.rows[at : at + 2], batch_size=2, collate_fn=PaddedCollator())


@pytest.mark.slow
def test_ranks_with_batches_of_other_shapes_have_the_same_gradient(tmp_path):
    documents = [torch.arange(1, n + 1).tolist() for n in (40, 36, 9, 7)]
    rows = [{"input_ids": ids, "labels": ids, "lengths": [len(ids)]} for ids in documents]
    path = tmp_path / "gradients.pt"
    fit = trainer(
        tmp_path, [SaveGradients(path)], devices=2, strategy="ddp_fork", max_steps=1, use_distributed_sampler=False
    )
    fit.fit(CausalLMModule(tiny_model(), SGD), PaddedByRank(rows))
    expected_loss, expected = exact_gradients(tiny_model(), rows)
    saved = torch.load(path)
    assert saved["loss"] == pytest.approx(expected_loss, rel=1e-5)
    for ours, exact in zip(saved["gradients"], expected, strict=True):
        assert torch.allclose(ours, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_loss_equals_that_of_the_logits(family):
    """Every family's own head: output embedding, soft cap, nothing left out."""
    extra = {"final_logit_softcapping": 3.0} if family.startswith("gemma") else {}
    model = family_model(family, **extra)
    batch = PackedCollator(SEQ_LEN)([packed_rows()[0], packed_rows()[1]])
    modules = [CausalLMModule(model, SGD, loss=loss) for loss in ("logits", "chunked")]
    enable_packflex(model)
    results = [module.batch_loss(batch, "token") for module in modules]
    grads = [torch.autograd.grad(total, list(model.parameters()), allow_unused=True) for total, _ in results]
    assert results[1][0].item() == pytest.approx(results[0][0].item(), rel=1e-5)
    assert results[1][1] == results[0][1] > 0
    for ours, exact in zip(*grads, strict=True):
        assert (ours is None) == (exact is None)
        assert ours is None or torch.allclose(ours, exact, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")
def test_losses_that_cannot_be_had():
    with pytest.raises(ValueError, match="loss must be one of logits, chunked, liger; got 'fused'"):
        CausalLMModule(tiny_model(), SGD, loss="fused")
    with pytest.raises(ValueError, match="loss_weighting must be one of token, document, sqrt; got 'row'"):
        CausalLMModule(tiny_model(), SGD, loss_weighting="row")
    with pytest.raises(ValueError, match=r'loss="liger" weighs tokens alike.*use loss="chunked"'):
        CausalLMModule(tiny_model(), SGD, loss="liger", loss_weighting="sqrt")
    model = tiny_model()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(
        ValueError, match=r'cannot be had with this model: .* a Sequential, not a plain Linear.*"logits"'
    ):
        CausalLMModule(model, SGD, loss="chunked")
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        tiny_model(), peft.LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    )
    with pytest.raises(ValueError, match=r"its output embedding carries adapters \(peft\.tuners\.lora\.layer\), which"):
        CausalLMModule(adapted, SGD, loss="chunked")


@pytest.mark.parametrize("loss", ["logits", "chunked"])
def test_the_routers_auxiliary_loss_is_not_dropped_silently(loss):
    with pytest.raises(ValueError, match=r"not trained on; set model\.architecture\.output_router_logits=false"):
        CausalLMModule(family_model("gpt_oss", output_router_logits=True), SGD, loss=loss)
    CausalLMModule(family_model("gpt_oss", output_router_logits=True, router_aux_loss_coef=0.0), SGD, loss=loss)
    CausalLMModule(family_model("gpt_oss"), SGD, loss=loss)
    CausalLMModule(torch.nn.Linear(2, 2), SGD)


def test_a_switch_for_router_logits_that_adds_no_loss_is_taken():
    from transformers import AutoModelForCausalLM, Glm4MoeConfig

    config = Glm4MoeConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        first_k_dense_replace=0, output_router_logits=True,
    )  # fmt: skip
    CausalLMModule(AutoModelForCausalLM.from_config(config), SGD)
    CausalLMModule(family_model("llama", output_router_logits=True), SGD)


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_clipped_with_any_optimizer(tmp_path, precision, fused):
    """Fused ones too, which Lightning by itself refuses to clip in mixed precision."""
    recorder = Recorder()
    adamw = functools.partial(torch.optim.AdamW, lr=1e-3, fused=fused)
    module = CausalLMModule(tiny_model(), adamw)
    runner = trainer(tmp_path, [recorder, PackFlexCallback()], precision=precision, gradient_clip_val=0.01)
    runner.fit(module, PackedDataModule(packed_rows(), seq_len=SEQ_LEN, batch_size=2))
    norm = torch.cat([g.flatten() for g in recorder.gradients]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("value", [-1.0, 0, None])
def test_a_clip_value_of_nothing_leaves_the_gradients(tmp_path, value):
    """Below 0 too, where torch's own function would turn them round."""
    gradients = []
    for clip in (value, None):
        recorder = Recorder()
        fit = trainer(tmp_path, [recorder, PackFlexCallback()], gradient_clip_val=clip)
        fit.fit(CausalLMModule(tiny_model(), SGD), PackedDataModule(packed_rows(), seq_len=SEQ_LEN, batch_size=2))
        gradients.append(recorder.gradients)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_callback_logs_what_the_batch_holds(tmp_path):
    recorder = Recorder()
    rows = packed_rows()
    data = PackedDataModule(rows, rows, seq_len=SEQ_LEN, batch_size=2)
    module = CausalLMModule(tiny_model(), SGD)
    fit = trainer(tmp_path, [PackFlexCallback(), recorder], max_steps=4)
    fit.fit(module, data)
    assert module.model.config._attn_implementation == "packflex"
    last = recorder.metrics[-1]
    fit.validate(module, data, verbose=False)
    logged = set(last) | set(fit.callback_metrics)
    assert logged == {*module_of.LOGGED, *callback_of.LOGGED} - {"throughput/mfu"}, "what callbacks may monitor"
    assert 0.5 < last["packing/efficiency"] <= 1
    assert last["throughput/tokens_per_second"] > last["throughput/documents_per_second"] > 0
    assert "throughput/mfu" not in last, "no peak is known for a CPU"
    losses = [fit.validate(module, data, verbose=False)[0]["val/loss"] for _ in range(2)]
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(exact_gradients(module.model, rows)[0], rel=1e-5)


@pytest.mark.parametrize("adapters", [False, True])
def test_mfu_counts_no_gradient_of_frozen_weights(tmp_path, monkeypatch, adapters):
    """On a device whose peak is 1 FLOP a second, MFU over tokens a second is the FLOPs of a token."""
    monkeypatch.setattr("packflex.integrations.lightning.callback.peak_flops", lambda device: 1.0)
    model = tiny_model()
    if adapters:
        peft = pytest.importorskip("peft")
        model = add_adapters(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    recorder, rows = Recorder(), packed_rows().select([0])
    fit = trainer(tmp_path, [PackFlexCallback(), recorder], max_steps=1)
    fit.fit(CausalLMModule(model, SGD), PackedDataModule(rows, seq_len=SEQ_LEN, batch_size=1))
    counts = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            counts[parameter.requires_grad] += parameter.numel()
    assert (counts[False] > 0) is adapters
    lengths = rows[0]["lengths"]
    attention = 12 * 2 * 32 * sum(n * (n + 1) // 2 for n in lengths)
    measured = recorder.metrics[-1]["throughput/mfu"] / recorder.metrics[-1]["throughput/tokens_per_second"]
    assert measured == pytest.approx(6 * counts[True] + 4 * counts[False] + attention / sum(lengths), rel=1e-4)


def test_held_out_rows_have_no_workers():
    """They are forked in the middle of training, when other threads hold locks."""
    data = PackedDataModule(packed_rows(), packed_rows(), seq_len=SEQ_LEN, batch_size=2, num_workers=2)
    assert (data.train_dataloader().num_workers, data.val_dataloader().num_workers) == (2, 0)
    assert (data.train_dataloader().name, data.val_dataloader().name) == ("training", "held-out")


def test_callback_logs_what_the_accumulated_batches_of_a_step_hold(tmp_path):
    """Also where an epoch of 7 batches ends with a step of one."""
    rows = packed_rows().select(range(7))
    recorder = Recorder()
    data = PackedDataModule(rows, seq_len=SEQ_LEN, batch_size=1, order="sequential")
    options = {"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": 3}
    trainer(tmp_path, [PackFlexCallback(), recorder], **options).fit(CausalLMModule(tiny_model(), SGD), data)
    seen = [recorder.metrics[batch] for batch in (2, 5, 6, 9, 12, 13)]
    steps = 2 * [rows.select(range(3)), rows.select(range(3, 6)), rows.select([6])]
    assert [step["packing/documents"] for step in seen] == [sum(map(len, step["lengths"])) for step in steps]
    efficiencies = [sum(map(sum, step["lengths"])) / (len(step) * SEQ_LEN) for step in steps]
    assert [step["packing/efficiency"] for step in seen] == pytest.approx(efficiencies)


class LeakyAttention(torch.nn.Module):
    """A module of the user's own that forgets its block mask in the second half of training code."""

    def __init__(self, masked):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(64, 32), torch.nn.Linear(32, 64)
        self.masked = masked

    def forward(self, input_ids, packed, **_):
        x = self.embed(input_ids)
        q = x.unflatten(-1, (4, 8)).transpose(1, 2)
        mask = document_mask(packed) if self.masked else None
        return self.head(flex_attention(q, q, q, block_mask=mask).transpose(1, 2).flatten(2))


class OwnModule(L.LightningModule):
    def __init__(self, masked=True):
        super().__init__()
        self.net = LeakyAttention(masked)

    def forward(self, input_ids, packed, **_):
        return self.net(input_ids, packed)

    def training_step(self, batch, batch_idx):
        total, count = next_token_loss(self(**batch), batch["labels"])
        return total / count

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_any_module_that_calls_flex_attention(tmp_path):
    data = PackedDataModule(packed_rows(), seq_len=SEQ_LEN, batch_size=2)
    recorder = Recorder()
    trainer(tmp_path, [PackFlexCallback(), recorder]).fit(OwnModule(), data)
    assert recorder.metrics[-1]["throughput/tokens_per_second"] > 0
    with pytest.raises(ValueError, match="holds no transformers model"):
        trainer(tmp_path, [PackFlexCallback(backend="reference")]).fit(OwnModule(), data)


def test_a_leaking_module_is_stopped_before_the_first_step(tmp_path):
    data = PackedDataModule(packed_rows(), seq_len=SEQ_LEN, batch_size=2)
    module = OwnModule(masked=False)
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(LeakError, match="document"):
        trainer(tmp_path, [PackFlexCallback()]).fit(module, data)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    trainer(tmp_path, [PackFlexCallback(leak_check=False)]).fit(module, data)


def test_a_batch_without_layout_is_refused(tmp_path):
    loader = torch.utils.data.DataLoader([{"input_ids": torch.ones(4, dtype=torch.long)}] * 4, batch_size=2)
    with pytest.raises(ValueError, match=r"PackedLayout under 'packed'; this one has input_ids.*PackedCollator"):
        trainer(tmp_path, [PackFlexCallback()]).fit(OwnModule(), loader)


@pytest.mark.parametrize("stop", [2, 5, 7])
def test_resume_gives_the_losses_of_the_unbroken_run(tmp_path, stop):
    rows = packed_rows()

    def run(max_steps, ckpt_path=None):
        recorder = Recorder()
        checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path / str(stop), save_last=True, save_top_k=0)
        adam = functools.partial(torch.optim.AdamW, lr=1e-2)
        decay = functools.partial(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.1, total_iters=10)
        module = CausalLMModule(tiny_model(), adam, decay)
        data = PackedDataModule(rows, seq_len=SEQ_LEN, batch_size=3)
        fit = trainer(
            tmp_path, [PackFlexCallback(), recorder, checkpoint], max_steps=max_steps, enable_checkpointing=True
        )
        fit.fit(module, data, ckpt_path=ckpt_path, weights_only=False)
        fit.save_checkpoint(tmp_path / str(stop) / "stopped.ckpt")
        return recorder.losses, [p.detach().clone() for p in module.parameters()]

    losses, weights = run(10)
    run(stop)
    resumed_losses, resumed = run(10, tmp_path / str(stop) / "stopped.ckpt")
    assert resumed_losses == losses[stop:]
    assert all(torch.equal(a, b) for a, b in zip(weights, resumed, strict=True))


def test_readme_example_runs(tmp_path, monkeypatch):
    """The README's Lightning example, exactly as printed there."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    code = text.split("<!-- lightning-example -->")[1].split("```python\n")[1].split("```")[0]
    assert len(code.strip().splitlines()) < 25
    monkeypatch.chdir(tmp_path)
    namespace = {"model_path": tmp_path / "model", "documents": packed_documents()}
    tiny_model().save_pretrained(tmp_path / "model")
    exec(compile(code, "README.md", "exec"), namespace)
    assert namespace["trainer"].global_step == 5


def packed_documents():
    generator = torch.Generator().manual_seed(0)
    return Dataset.from_dict(
        {"input_ids": [torch.randint(1, 64, (n,), generator=generator).tolist() for n in range(2, 90)]}
    )


class CountSteps(L.Callback):
    """Optimizer steps and losses of each rank, in files: the ranks are processes of their own."""

    def __init__(self, folder):
        self.folder, self.losses = folder, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_train_end(self, trainer, pl_module):
        torch.save([trainer.global_step, self.losses], self.folder / f"rank{trainer.global_rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("order", ["balanced", "shuffle"])
def test_two_ranks_end_together_when_rows_do_not_divide(tmp_path, order):
    """Seven rows, two a rank: the second step has one filler, and no rank waits for a batch that never comes."""
    data = PackedDataModule(packed_rows().select(range(7)), seq_len=SEQ_LEN, batch_size=2, order=order)
    fit = trainer(
        tmp_path, [PackFlexCallback(leak_check=False), CountSteps(tmp_path)],
        devices=2, strategy="ddp_fork", max_steps=-1, max_epochs=3,
    )  # fmt: skip
    fit.fit(CausalLMModule(tiny_model(), SGD), data)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert ranks[0] == ranks[1]
    assert ranks[0][0] == 6
    assert all(0 < loss < 10 for loss in ranks[0][1])


@pytest.mark.slow
def test_a_rank_without_documents_looks_for_leaks_with_the_tokens_of_others(tmp_path):
    """One row on two ranks: the second has nothing but fillers, and neither waits for the other."""
    data = PackedDataModule(packed_rows().select(range(1)), seq_len=SEQ_LEN, batch_size=1)
    limits = {"devices": 2, "strategy": "ddp_fork", "max_steps": -1, "max_epochs": 2}
    trainer(tmp_path, [PackFlexCallback(), CountSteps(tmp_path)], **limits).fit(CausalLMModule(tiny_model(), SGD), data)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert ranks[0] == ranks[1]
    assert ranks[0][0] == 2
    assert all(0 < loss < 10 for loss in ranks[0][1])


@pytest.mark.slow
def test_one_and_two_ranks_have_the_same_losses_at_the_same_global_batch(tmp_path):
    """Six steps of four rows: one rank with batches of four, two ranks with batches of two."""
    curves = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        data = PackedDataModule(packed_rows(), seq_len=SEQ_LEN, batch_size=4 // ranks, seed=7)
        strategy = {"devices": 2, "strategy": "ddp_fork"} if ranks == 2 else {}
        callbacks = [PackFlexCallback(leak_check=False), CountSteps(folder)]
        trainer(folder, callbacks, max_steps=6, **strategy).fit(CausalLMModule(tiny_model(), SGD), data)
        curves.append(torch.load(folder / "rank0.pt")[1])
    assert len(curves[0]) == len(curves[1]) == 6
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[0][0] != pytest.approx(curves[0][-1], rel=1e-3), (
        "the weights move, so later losses depend on gradients"
    )


def test_a_stream_trains_and_resumes(tmp_path):
    """PackedStream under Lightning: exact length, and after a resume the losses that would have come."""
    documents = Dataset.from_dict({"input_ids": [[1 + i % 60] * (2 + i % 20) for i in range(90)]})

    def stream():
        source = documents.to_iterable_dataset(num_shards=3)
        return PackedStream(source, PackedCollator(SEQ_LEN), 2, seq_len=SEQ_LEN, num_batches=8, pool=16)

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "three.ckpt")

    whole, rest = Recorder(), Recorder()
    options = {"max_steps": -1, "max_epochs": 2}
    trainer(tmp_path, [whole, PackFlexCallback(), Save()], **options).fit(CausalLMModule(tiny_model(), SGD), stream())
    assert len(whole.losses) == 16
    resumed = trainer(tmp_path, [rest, PackFlexCallback()], **options)
    resumed.fit(CausalLMModule(tiny_model(1), SGD), stream(), ckpt_path=tmp_path / "three.ckpt", weights_only=True)
    assert rest.losses == whole.losses[3:]
