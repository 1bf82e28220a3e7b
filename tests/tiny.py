"""Tiny random models on disk, made once a session: real configs, real tokenizers, no downloads."""

import re
from pathlib import Path
from typing import Any

import pytest

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = [
    "What does a lantern mean? A lantern is a lamp with a case that keeps the wind out.",
    "The still is warm and the spirit runs clear into the jar.",
    "Who keeps the house when the master is away? The student keeps the house.",
    "Ask a short question and you may get a short answer.",
    "user assistant system\n0 1 2 3 4 5 6 7 8 9 naïve café ∑ 蒸馏",
]
ASCII = "".join(map(chr, range(33, 127)))
WIDTH, HEADS, CONTEXT = 64, 4, 256
TOKENIZERS = {
    "bert": "wordpiece",
    "encoder-decoder": "wordpiece",
    "t5": "unigram",
    "roberta": "roberta",
    "bart": "roberta",
}
LLAMA_ARGUMENTS = {
    "granite": "Granite",
    "llama": "Llama",
    "mistral": "Mistral",
    "olmo2": "Olmo2",
    "phi3": "Phi3",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
    "starcoder2": "Starcoder2",
}
# Settings that no other family has, with values other than their defaults.
PARTICULAR: dict[str, dict[str, Any]] = {
    "granite": {
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
        "logits_scaling": 1.5,
    },
    # The library adds a token to every tokenizer beside a Qwen2 model.
    "qwen2": {"vocab_size": 392},
    # as in Phi-4-mini, which rotates a part of a head
    "phi3": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.75,
        }
    },
    # StarCoder2-3B and 7B have a sliding window. The longest texts of test_schedules.py exceed this
    # one, and the rows that test_layer_fitting.py packs do not.
    "starcoder2": {"sliding_window": 40},
}
MASKED = ("bert", "roberta")
# Standard deviations of layers, attention, embeddings and positions with which greedy text does not repeat.
SCALES = {
    "bloom": (0.8, 0.1, 0.35, 0.35),
    "opt": (0.4, 0.05, 0.35, 1.0),
    "gpt_neox": (0.2, 0.1, 1.0, 1.0),
    "starcoder2": (0.4, 0.2, 0.35, 0.35),
    "bart": (0.8, 0.05, 0.35, 1.0),
    "encoder-decoder": (0.2, 0.1, 0.35, 1.0),
    "t5": (0.2, 0.1, 0.35, 0.35),
}


def tiny_tokenizer(kind: str = "chat") -> Any:  # Any: transformers is untyped here
    """A tokenizer of a few hundred tokens, of the words of a few sentences.

    chat: byte-level BPE with a chat template and no special tokens of its own around a text; roberta: the same
    between `<s>` and `</s>`; wordpiece: BERT's, between `[CLS]` and `[SEP]`; unigram: T5's, with `</s>` behind.
    """
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    # Their trainers break ties at random, so the vocabularies of two kinds are made by hand.
    words = sorted(set(re.findall(r"\w+", " ".join(SENTENCES))))
    if kind == "wordpiece":
        names, around = (
            {name: f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
            "[CLS] $A [SEP]",
        )
        pieces = dict.fromkeys(
            [*names.values(), *ASCII, *("##" + letter for letter in ASCII), *words]
        )
        backend = Tokenizer(
            models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token=names["unk"])
        )
        backend.normalizer = normalizers.BertNormalizer(lowercase=False)
        backend.pre_tokenizer, backend.decoder = (
            pre_tokenizers.BertPreTokenizer(),
            decoders.WordPiece(),
        )
    elif kind == "unigram":
        names, around = {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}, "$A </s>"
        pieces = dict.fromkeys(
            [*names.values(), "\u2581", *ASCII, *("\u2581" + word for word in words)]
        )
        scores = [(piece, -float(3 if len(piece) > 1 else 6)) for piece in pieces]
        backend = Tokenizer(models.Unigram(scores, unk_id=2))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        names, around = {"pad": "<|pad|>", "bos": "<|im_start|>", "eos": "<|im_end|>"}, ""
        if kind == "roberta":
            names, around = (
                {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"},
                "<s> $A </s>",
            )
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=384,
            special_tokens=list(names.values()),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(SENTENCES * 4, trainer)
        if kind == "roberta":
            names |= {"cls": "<s>", "sep": "</s>"}
        else:
            del names["bos"]
    if around:
        specials = [(token, backend.token_to_id(token)) for token in names.values()]
        backend.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=specials
        )
    tokens = {f"{name}_token": token for name, token in names.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=CONTEXT, **tokens
    )
    if kind == "chat":
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(
    family: str, tokenizer: Any, num_layers: int
) -> Any:  # Any: transformers is untyped here
    """The configuration of a model of the family, without dropout; encoder-decoders have as many layers each side."""
    import transformers as hf

    ids = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    sizes = {"vocab_size": len(tokenizer), "hidden_size": WIDTH, "num_hidden_layers": num_layers}
    sizes |= {"num_attention_heads": HEADS, "max_position_embeddings": CONTEXT, **ids}
    no_dropout = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    bert = {**sizes, **no_dropout, "intermediate_size": 2 * WIDTH}
    if family in LLAMA_ARGUMENTS:
        heads = {"num_key_value_heads": 2, "head_dim": WIDTH // HEADS, "tie_word_embeddings": True}
        own = PARTICULAR.get(family, {})
        return getattr(hf, f"{LLAMA_ARGUMENTS[family]}Config")(
            **{**sizes, **heads, **own}, intermediate_size=2 * WIDTH
        )
    if family == "bloom":
        return hf.BloomConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, n_layer=num_layers, n_head=HEADS, **ids
        )
    if family == "opt":
        return hf.OPTConfig(**sizes, ffn_dim=2 * WIDTH, word_embed_proj_dim=WIDTH, dropout=0.0)
    if family == "gpt_neox":
        return hf.GPTNeoXConfig(**sizes, intermediate_size=2 * WIDTH)
    if family == "t5":
        return hf.T5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=WIDTH // HEADS,
            d_ff=2 * WIDTH,
            num_layers=num_layers,
            num_heads=HEADS,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=tokenizer.pad_token_id,
            **ids,
        )
    if family == "bart":
        halves = {f"{half}_{name}": n for half in ("encoder", "decoder") for name, n in
                  (("layers", num_layers), ("attention_heads", HEADS), ("ffn_dim", 2 * WIDTH))}  # fmt: skip
        return hf.BartConfig(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            max_position_embeddings=CONTEXT,
            dropout=0.0,
            forced_eos_token_id=None,
            decoder_start_token_id=tokenizer.eos_token_id,
            **halves,
            **ids,
        )
    if family == "bert":
        return hf.BertConfig(**bert)
    if family == "roberta":  # two of its positions hold no tokens
        return hf.RobertaConfig(
            **{**bert, "max_position_embeddings": CONTEXT + 2, "type_vocab_size": 1}
        )
    if family == "encoder-decoder":
        return hf.EncoderDecoderConfig.from_encoder_decoder_configs(
            hf.BertConfig(**bert),
            hf.BertConfig(**bert, is_decoder=True, add_cross_attention=True),
            decoder_start_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    if family != "gpt2":
        raise ValueError(f"there is no tiny model of the family {family!r}")
    return hf.GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=WIDTH,
        n_layer=num_layers,
        n_head=HEADS,
        n_positions=CONTEXT,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **ids,
    )


def save_tiny(
    folder: Path, family: str, *, num_layers: int = 4, seed: int = 0, kind: str | None = None
) -> Path:
    """Writes a random model of the family with its tokenizer; wide weights keep greedy text from repeating.

    `kind` picks another tokenizer than the family's own.
    """
    import torch
    import transformers as hf

    tokenizer = tiny_tokenizer(kind or TOKENIZERS.get(family, "chat"))
    config = tiny_config(family, tokenizer, num_layers)
    scales = SCALES.get(family, (0.2, 0.2, 0.35, 0.35))
    start = getattr(config, "decoder_start_token_id", None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family == "encoder-decoder":
            model: Any = hf.EncoderDecoderModel(config=config)
        else:
            task = (
                "MaskedLM" if family in MASKED else "Seq2SeqLM" if start is not None else "CausalLM"
            )
            model = getattr(hf, f"AutoModelFor{task}").from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2:
                    is_embedding = any(part in name for part in ("emb", "wte", "shared"))
                    part = (
                        3
                        if "position" in name
                        else 2
                        if is_embedding
                        else 1
                        if "att" in name.lower()
                        else 0
                    )
                    parameter.normal_(0.0, scales[part])
    if family not in MASKED:
        end = tokenizer.eos_token_id
        model.generation_config.eos_token_id = tokenizer.sep_token_id if end is None else end
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.decoder_start_token_id = start
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _folder(name: str, family: str) -> Any:  # Any: pytest's own type of fixtures
    def make(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return save_tiny(tmp_path_factory.mktemp("tiny") / name, family)

    return pytest.fixture(scope="session", name=f"tiny_{name}_dir")(make)


tiny_llama_dir = _folder("llama", "llama")
tiny_gpt2_dir = _folder("gpt2", "gpt2")
tiny_bloom_dir = _folder("bloom", "bloom")
tiny_opt_dir = _folder("opt", "opt")
tiny_gpt_neox_dir = _folder("gpt_neox", "gpt_neox")
tiny_t5_dir = _folder("t5", "t5")
tiny_bart_dir = _folder("bart", "bart")
tiny_bert_dir = _folder("bert", "bert")
tiny_roberta_dir = _folder("roberta", "roberta")
tiny_bert2bert_dir = _folder("bert2bert", "encoder-decoder")
