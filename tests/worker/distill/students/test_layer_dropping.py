from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    BloomConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    SmolLM3Config,
    Starcoder2Config,
    T5Config,
)

from worker.distill.students.layer_dropping import (
    first_and_last,
    is_tied,
    keep_layers,
    layer_stacks,
)
from worker.distill.students.recipe import load_model
from worker.errors import StudentTooDeep, UnsupportedModel
from worker.models.architectures import layer_counts

IDS: dict[str, Any] = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = {
    **IDS,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA_LIKE: dict[str, Any] = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
BERT: dict[str, Any] = {**SIZES, "intermediate_size": 48}
CROSS: dict[str, Any] = {"is_decoder": True, "add_cross_attention": True}
T5: dict[str, Any] = {
    **IDS,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART: dict[str, Any] = {
    **IDS,
    "d_model": 32,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
}


def pair(encoder: Any, decoder: Any) -> Any:  # Any: transformers is untyped here
    return EncoderDecoderConfig.from_encoder_decoder_configs(
        encoder, decoder, decoder_start_token_id=1, eos_token_id=2, pad_token_id=0
    )


CAUSAL: dict[str, Callable[[], Any]] = {
    "bloom": lambda: BloomConfig(**IDS, hidden_size=32, n_layer=4, n_head=4),
    "gpt2": lambda: GPT2Config(**SIZES),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, intermediate_size=48),
    "granite": lambda: GraniteConfig(**LLAMA_LIKE, residual_multiplier=0.5),
    "llama": lambda: LlamaConfig(**LLAMA_LIKE),
    "llama-tied": lambda: LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**LLAMA_LIKE),
    "olmo2": lambda: Olmo2Config(**LLAMA_LIKE),
    "opt": lambda: OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32),
    "opt-post-norm": lambda: OPTConfig(
        **SIZES, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False
    ),
    "phi3": lambda: Phi3Config(**LLAMA_LIKE),
    "qwen2": lambda: Qwen2Config(**LLAMA_LIKE),
    "qwen3-sliding": lambda: Qwen3Config(
        **LLAMA_LIKE, head_dim=8, use_sliding_window=True, sliding_window=4, max_window_layers=2
    ),
    "smollm3": lambda: SmolLM3Config(**LLAMA_LIKE, no_rope_layer_interval=2),
    "starcoder2": lambda: Starcoder2Config(**LLAMA_LIKE, sliding_window=4),
}
SEQ2SEQ: dict[str, Callable[[], Any]] = {
    "bart": lambda: BartConfig(**BART),
    "bert2bert": lambda: pair(BertConfig(**BERT), BertConfig(**BERT, **CROSS)),
    "roberta2gpt2": lambda: pair(
        RobertaConfig(**{**BERT, "hidden_size": 16}), GPT2Config(**SIZES, add_cross_attention=True)
    ),
    "t5": lambda: T5Config(**T5),
    "t5-1.1": lambda: T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}
CONFIGS = CAUSAL | SEQ2SEQ
TOKENS_BT = torch.arange(3, 23).view(2, 10)


def random_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    if config.model_type == "encoder-decoder":
        model: PreTrainedModel = EncoderDecoderModel(config=config)
    else:
        auto = AutoModelForSeq2SeqLM if name in SEQ2SEQ else AutoModelForCausalLM
        model = auto.from_config(config, dtype=torch.float32)
    if name == "t5-1.1":
        head: Any = model.get_output_embeddings()
        head.weight = nn.Parameter(torch.empty_like(head.weight))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
        if name == "bart":  # a buffer that is saved
            model.final_logits_bias.normal_(0.0, 0.3)
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    inputs: dict[str, Any] = {"input_ids": TOKENS_BT, "use_cache": False}
    if layer_counts(model.config)[0]:
        inputs["decoder_input_ids"] = TOKENS_BT.flip(1)
        inputs["attention_mask"] = torch.ones_like(TOKENS_BT)
    found: Tensor = model(**inputs).logits
    return found


def run_only(model: PreTrainedModel, prefix: str, layers: Sequence[int]) -> None:
    """Takes layers out of the model by hand; what is left still does what it did."""
    parent_name, _, name = prefix.rpartition(".")
    parent: Any = model.get_submodule(parent_name)
    stack = getattr(parent, name)
    if model.config.model_type == "t5" and 0 not in layers:
        first = stack[layers[0]].layer[0].SelfAttention
        first.relative_attention_bias = stack[0].layer[0].SelfAttention.relative_attention_bias
        first.has_relative_attention_bias = True
    setattr(parent, name, nn.ModuleList([stack[i] for i in layers]))
    config = parent.config if hasattr(parent, "config") else model.config
    config.num_hidden_layers = len(layers)  # Llama-like bodies count by it
    for field in ("layer_types", "no_rope_layers"):
        if getattr(config, field, None):
            setattr(config, field, [getattr(config, field)[i] for i in layers])


@pytest.mark.parametrize(
    ("num_available", "num_kept", "layers"),
    [
        (30, 15, (*range(8), *range(23, 30))),
        (12, 4, (0, 1, 10, 11)),
        (4, 1, (0,)),
        (3, 3, (0, 1, 2)),
    ],
)
def test_the_first_and_last_halves_are_kept(
    num_available: int, num_kept: int, layers: tuple[int, ...]
) -> None:
    assert first_and_last(num_available, num_kept) == layers


def test_more_layers_than_there_are_are_refused() -> None:
    with pytest.raises(StudentTooDeep, match="ask for fewer"):
        first_and_last(4, 5)


@pytest.mark.parametrize("name", CONFIGS)
def test_keeping_every_layer_changes_nothing(name: str) -> None:
    model = random_model(name)
    torch.testing.assert_close(logits(keep_layers(model, range(4))), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_student_is_the_teacher_without_the_other_layers(name: str) -> None:
    model = random_model(name)
    student = keep_layers(model, (0, 3))
    run_only(model, layer_stacks(model)[-1], (0, 3))
    torch.testing.assert_close(logits(student), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_student_of_a_bfloat16_model_has_its_weights_in_float32(name: str) -> None:
    lowered = random_model(name).to(torch.bfloat16)
    student = keep_layers(lowered, [0, 3]).state_dict()
    expected = keep_layers(lowered.float(), [0, 3]).state_dict()
    assert student.keys() == expected.keys()
    for key, tensor in student.items():
        assert tensor.dtype == expected[key].dtype
        assert torch.equal(tensor, expected[key])


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_either_side_of_an_encoder_decoder_is_cut_apart(name: str) -> None:
    model = random_model(name)
    student = keep_layers(model, (1, 2, 3), (1, 3))
    assert layer_counts(student.config) == (2, 3)
    for prefix, layers in zip(layer_stacks(model), ((1, 3), (1, 2, 3)), strict=True):
        run_only(model, prefix, layers)
    torch.testing.assert_close(logits(student), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_student_loads_as_it_was(name: str, tmp_path: Path) -> None:
    student = keep_layers(random_model(name), (0, 1, 3))
    student.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert layer_counts(loaded.config) == (4 if name in SEQ2SEQ else 0, 3)
    assert is_tied(loaded) == is_tied(student)
    torch.testing.assert_close(logits(loaded), logits(student), rtol=0, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_student_generates_with_its_cache_what_it_computes_without(name: str) -> None:
    student = keep_layers(random_model(name), (0, 3))
    options: dict[str, Any] = {"attention_mask": torch.ones_like(TOKENS_BT), "do_sample": False}
    with_cache, without = (
        student.generate(TOKENS_BT, **options, max_new_tokens=8, use_cache=cached)
        for cached in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_a_head_of_its_own_is_no_copy_of_the_embedding() -> None:
    teacher = random_model("t5-1.1")
    student = keep_layers(teacher, (0, 3))
    assert not is_tied(student)
    assert torch.equal(
        student.get_output_embeddings().weight, teacher.get_output_embeddings().weight
    )
    assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    assert student.get_encoder().embed_tokens.weight is student.get_input_embeddings().weight


def test_layers_that_cannot_be_told_apart_are_refused() -> None:
    model: Any = random_model("llama")
    model.more = nn.ModuleList()
    with pytest.raises(UnsupportedModel, match="llama"):
        keep_layers(model, (0, 1))
