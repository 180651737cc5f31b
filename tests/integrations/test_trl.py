"""transformers' Trainer and TRL's SFTTrainer, packed and padding-free: the losses of their own eager attention."""

import pytest
import torch
from datasets import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from packflex.integrations.trl import LayoutCollator, use_packflex

trl = pytest.importorskip("trl")
tokenizers = pytest.importorskip("tokenizers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
VOCAB = 64
LENGTHS = [5, 17, 1, 9, 30, 2, 12, 7, 21, 3, 14, 8]


def model_and_tokenizer(attention="eager"):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        attn_implementation=attention,
    )  # fmt: skip
    vocabulary = {f"w{i}": i for i in range(VOCAB)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w3"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="w0", bos_token="w1", eos_token="w2")
    return LlamaForCausalLM(config), tokenizer


def documents():
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def losses_of(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


SETTINGS = {"max_steps": 4, "logging_steps": 1, "report_to": [], "save_strategy": "no", "use_cpu": True, "seed": 3}


def sft(tmp_path, packed, **settings):
    model, tokenizer = model_and_tokenizer()
    args = trl.SFTConfig(str(tmp_path), **SETTINGS, learning_rate=1e-2, bf16=False, disable_tqdm=True, **settings)
    trainer = trl.SFTTrainer(model, args=args, train_dataset=documents(), processing_class=tokenizer)
    if packed:
        use_packflex(trainer)
    return trainer


@pytest.mark.parametrize(
    "settings",
    [
        {"packing": True, "packing_strategy": "bfd", "max_length": 40, "per_device_train_batch_size": 1},
        {"packing": True, "packing_strategy": "bfd", "max_length": 40, "per_device_train_batch_size": 2},
        {"padding_free": True, "max_length": None, "per_device_train_batch_size": 4, "pad_to_multiple_of": 16},
        {"per_device_train_batch_size": 4, "max_length": 40},
    ],
    ids=["packed", "two-packed-rows", "padding-free", "padded"],
)
def test_sft_trainer(tmp_path, settings):
    ours = losses_of(sft(tmp_path, True, **settings))
    own = losses_of(sft(tmp_path, False, **settings))
    assert len(ours) == 4, "losses after the first depend on the gradients before them"
    assert ours == pytest.approx(own, rel=2e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"packing": True, "packing_strategy": "bfd", "max_length": 40, "per_device_train_batch_size": 2},
        {"padding_free": True, "max_length": None, "per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 4, "max_length": 40},
    ],
    ids=["packed", "padding-free", "padded"],
)
def test_sft_trainer_counts_the_same_tokens(tmp_path, settings):
    counts = []
    for packed in (True, False):
        trainer = sft(tmp_path, packed, **settings)
        trainer.train()
        counts.append([entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry])
    assert counts[0] == counts[1]
    assert len(counts[0]) == 4
    if settings.get("max_length") == 40 and "packing" not in settings:
        assert counts[0][2] == sum(LENGTHS), "an epoch of all documents, without their padding"


@pytest.mark.parametrize("kind", ["all", "non_padding"])
def test_trainer_counts_the_same_tokens(tmp_path, kind):
    seen = []
    for packed in (True, False):
        model, tokenizer = model_and_tokenizer()
        args = TrainingArguments(
            str(tmp_path),
            **SETTINGS,
            disable_tqdm=True,
            per_device_train_batch_size=4,
            include_num_input_tokens_seen=kind,
        )
        padding = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        trainer = Trainer(model, args, data_collator=padding, train_dataset=documents().select_columns(["input_ids"]))
        if packed:
            use_packflex(trainer)
        trainer.train()
        seen.append([entry["num_input_tokens_seen"] for entry in trainer.state.log_history])
    assert seen[0] == seen[1]
    assert (seen[0][2] == sum(LENGTHS)) is (kind == "non_padding")


def test_packing_matters(tmp_path):
    """The same steps with documents that see each other have other losses: the test above can fail."""
    settings = {"packing": True, "packing_strategy": "bfd", "max_length": 40, "per_device_train_batch_size": 2}
    trainer = sft(tmp_path, True, **settings)
    collator = trainer.data_collator

    def leaking(examples):
        batch = collator(examples)
        del batch["packed"]
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

    trainer.data_collator = leaking
    assert losses_of(trainer)[0] != pytest.approx(losses_of(sft(tmp_path, False, **settings))[0], rel=1e-3)


def test_trainer_with_flattening_and_evaluation(tmp_path):
    results = []
    for packed in (True, False):
        model, _ = model_and_tokenizer()
        args = TrainingArguments(
            str(tmp_path), **SETTINGS, learning_rate=1e-2, disable_tqdm=True, per_device_train_batch_size=3
        )
        trainer = Trainer(
            model, args, data_collator=DataCollatorWithFlattening(), train_dataset=documents(), eval_dataset=documents()
        )
        if packed:
            use_packflex(trainer)
            use_packflex(trainer)
            assert isinstance(trainer.data_collator, LayoutCollator)
            assert not isinstance(trainer.data_collator.collator, LayoutCollator), "called twice, wrapped once"
        results.append([*losses_of(trainer), trainer.evaluate()["eval_loss"]])
    assert len(results[0]) == 5
    assert results[0] == pytest.approx(results[1], rel=2e-5)


def test_wrapped_packing_is_refused(tmp_path):
    with pytest.raises(ValueError, match='packing_strategy="wrapped" forgets where documents begin'):
        sft(tmp_path, True, packing=True, packing_strategy="wrapped", max_length=40)


def test_packed_evaluation_that_is_collated_as_single_documents_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"eval_packing=True with packing=False: .*documents would see each other"):
        sft(tmp_path, True, packing=False, eval_packing=True, max_length=40)
    with pytest.raises(ValueError, match='packing_strategy="wrapped" forgets'):
        sft(tmp_path, True, packing=False, eval_packing=True, packing_strategy="wrapped", max_length=40)
    trainer = sft(tmp_path, True, packing=False, padding_free=True, max_length=None)
    row = {"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, 4, 5], "seq_lengths": [2, 3]}
    assert trainer.data_collator([row, row])["packed"].lengths == ((2, 3, 2, 3),)


def test_packed_rows_without_position_ids_are_refused():
    def padding(examples):
        ids = torch.tensor([example["input_ids"] for example in examples])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    with pytest.raises(ValueError, match=r"example 1 of the batch is packed \(seq_lengths \[1, 1\]\)"):
        LayoutCollator(padding)([{"input_ids": [1, 2]}, {"input_ids": [3, 4], "seq_lengths": [1, 1]}])
    one = LayoutCollator(padding)([{"input_ids": [1, 2], "seq_lengths": [2]}])
    assert one["packed"].lengths == ((2,),)


def test_batches_that_tell_nothing():
    with pytest.raises(ValueError, match="gave neither position_ids nor attention_mask"):
        LayoutCollator(lambda examples: {"input_ids": torch.zeros(1, 4)})([])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    with pytest.raises(ValueError, match="row 1 of the batch is padded on the left"):
        LayoutCollator(lambda examples: {"input_ids": torch.zeros(2, 3), "attention_mask": mask})([])
    batch = LayoutCollator(lambda examples: {"input_ids": torch.zeros(2, 3), "attention_mask": mask.flip(1)[1:]})([])
    assert batch["packed"].lengths == ((2,),)
    assert batch["attention_mask"].tolist() == [[1, 1, 0]]
    assert batch["packed_from_mask"] is True
