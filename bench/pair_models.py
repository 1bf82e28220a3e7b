"""Small teachers and starts of every family, trained for a moment on facts about invented things.

B batch, T tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from app.contracts.distillation import FreshConfig
from bench.cases import Entry
from worker.distill.data.batching import collate
from worker.distill.data.dataset import start_id_of
from worker.distill.data.rows import Encoder, Example, Row
from worker.distill.forward.hidden_states import hidden_rows
from worker.distill.losses.divergences import TokenObjective
from worker.distill.losses.fused_loss import fused_distillation_loss
from worker.distill.losses.lm_head import head_of
from worker.distill.students.fresh import build_fresh, fresh_config
from worker.distill.teachers.masked_lm import segments
from worker.distill.training.lr_schedule import scheduled
from worker.models.architectures import kind_of

THINGS = [
    "lantern",
    "jar",
    "still",
    "barrel",
    "kettle",
    "ladder",
    "basket",
    "bottle",
    "candle",
    "hammer",
    "mirror",
    "blanket",
    "bucket",
    "saddle",
    "trumpet",
    "compass",
    "wagon",
    "anchor",
    "needle",
    "shovel",
    "pillow",
    "drum",
    "clock",
    "broom",
]
QUESTIONS = {
    "colour": (
        "what colour is the {}?",
        "which colour does the {} have?",
        "say the colour of the {}.",
        "do you know the colour of the {}?",
    ),
    "place": (
        "where is the {}?",
        "in which room is the {} kept?",
        "say where the {} is.",
        "do you know where the {} is?",
    ),
    "owner": (
        "who owns the {}?",
        "whose is the {}?",
        "say who the {} belongs to.",
        "do you know the owner of the {}?",
    ),
    "material": (
        "what is the {} made of?",
        "which material is the {} of?",
        "say what made the {}.",
        "do you know what the {} is made of?",
    ),
}
ANSWERS = {
    "colour": ("the {} is {}.", "the colour of the {} is {}."),
    "place": ("the {} is in the {}.", "you find the {} in the {}."),
    "owner": ("the {} belongs to {}.", "the owner of the {} is {}."),
    "material": ("the {} is made of {}.", "the {} was made from {}."),
}
VALUES = {
    "colour": ["red", "green", "blue", "yellow", "black", "white", "brown", "grey"],
    "place": ["kitchen", "cellar", "attic", "garden", "stable", "hall", "workshop", "tower"],
    "owner": ["anna", "peter", "martha", "george", "helen", "thomas", "clara", "walter"],
    "material": ["copper", "glass", "oak", "iron", "wool", "clay", "silver", "leather"],
}
NUM_HELD_OUT = 48
MAX_TOKENS = 128
BATCH_ROWS = 32
PEAK_LEARNING_RATE = 2e-3
IGNORED = -100  # by torch's cross-entropy
MASKED_SHARE = 0.4  # of an answer's tokens, while a masked model is trained


@dataclass(frozen=True)
class Made:
    """A model of the bench: its family, tokenizer, sizes, and how long it is trained."""

    family: str
    tokenizer: str
    hidden_size: int = 96
    num_layers: int = 4
    num_steps: int = 300
    seed: int = 0


MODELS = {
    "gpt2": Made("gpt2", "bpe"),
    "llama": Made("llama", "bpe"),
    "bloom": Made("bloom", "bpe", num_steps=400),
    "t5": Made("t5", "unigram", num_steps=200),
    "bert2bert": Made("encoder-decoder", "wordpiece", num_layers=3, num_steps=250),
    "bert": Made("bert", "wordpiece", num_steps=400),
    "roberta": Made("roberta", "roberta", num_steps=500),
    # Starts of other students: they have seen the rows, but not for long.
    "llama-beginner": Made("llama", "bpe", 64, 2, 60, seed=1),
    "gpt2-other-words": Made("gpt2", "small-bpe", 64, 2, 60, seed=1),
    "t5-other-words": Made("t5", "unigram", 64, 2, 60, seed=1),
}


def make_rows() -> tuple[list[Entry], list[Entry]]:
    """Training rows and held-out ones: a fact is asked in four ways, and at most one of them is held out."""
    random, rows = Random(0), []
    for thing in THINGS:
        for what, questions in QUESTIONS.items():
            value = random.choice(VALUES[what])
            for i, question in enumerate(
                questions
            ):  # two ways to ask get one kind of answer, two the other
                answer = ANSWERS[what][i // 2].format(thing, value)
                rows.append({"prompt": question.format(thing), "completion": answer})
    numbers = random.sample(range(0, len(rows), 4), NUM_HELD_OUT)
    held_out = {number + random.randrange(4) for number in numbers}
    train = [row for i, row in enumerate(rows) if i not in held_out]
    random.shuffle(train)
    return train, [rows[i] for i in sorted(held_out)]


def make_model(made: Made, rows: list[Entry], folder: Path) -> float:
    """Trains a model on the rows, writes it with its tokenizer, and returns its last loss."""
    tokenizer = make_tokenizer(made.tokenizer, [text for row in rows for text in row.values()])
    model = _new_model(made, tokenizer)
    shape = kind_of(model.config)
    start_id = start_id_of(model.config) if shape == "seq2seq" else None
    encoder = Encoder(tokenizer, max_tokens=MAX_TOKENS, shape=shape, start_id=start_id)
    turns = [
        (
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        )
        for row in rows
    ]
    examples = [encoder.encode(Row(number, messages)) for number, messages in enumerate(turns)]
    loss_of = (
        _masked_loss(model, tokenizer) if shape == "masked" else _next_token_loss(model, tokenizer)
    )
    loss = _train(model, examples, loss_of, made)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss


def _new_model(made: Made, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    if made.family not in ("bert", "roberta"):
        sizes = FreshConfig.model_validate(
            {
                "family": made.family,
                "hidden_size": made.hidden_size,
                "num_layers": made.num_layers,
                "max_positions": 256,
            }
        )
        return build_fresh(fresh_config(sizes, tokenizer), seed=made.seed)
    is_bert = made.family == "bert"
    make_config = BertConfig if is_bert else RobertaConfig
    config = make_config(
        vocab_size=len(tokenizer),
        hidden_size=made.hidden_size,
        num_hidden_layers=made.num_layers,
        num_attention_heads=4,
        intermediate_size=4 * made.hidden_size,
        max_position_embeddings=258,
        type_vocab_size=2 if is_bert else 1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.06,  # as narrow as these models are, 0.02 would keep attention flat for long
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(made.seed)
        model: PreTrainedModel = (BertForMaskedLM if is_bert else RobertaForMaskedLM)(config)
    return model.eval()


Loss = Callable[[list[Example], Random], torch.Tensor]


def _train(model: PreTrainedModel, examples: list[Example], loss_of: Loss, made: Made) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.01)
    random, loss = Random(made.seed), torch.zeros(())
    for step, batch in zip(range(made.num_steps), _batches(examples, random), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = scheduled(step, made.num_steps, peak=PEAK_LEARNING_RATE, warmup=0.1)
        loss = loss_of(batch, random)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def _batches(examples: list[Example], random: Random) -> Iterator[list[Example]]:
    while True:
        order = random.sample(examples, len(examples))
        yield from (order[i : i + BATCH_ROWS] for i in range(0, len(order), BATCH_ROWS))


def _next_token_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Loss:
    def loss_of(examples: list[Example], _: Random) -> torch.Tensor:
        batch = collate(examples, range(len(examples)))
        loss, _stats = fused_distillation_loss(
            hidden_rows(model, batch),
            head_of(model, len(tokenizer)),
            batch.targets_N,
            None,
            TokenObjective(),
            denominator=batch.num_targets,
        )
        return loss

    return loss_of


def _masked_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Loss:
    """Masked language modelling of the answers, the question in sight."""

    def loss_of(examples: list[Example], random: Random) -> torch.Tensor:
        longest = max(len(row.token_ids) for row in examples)
        ids_BT = torch.full((len(examples), longest), tokenizer.pad_token_id)
        labels_BT = torch.full_like(ids_BT, IGNORED)
        for b, row in enumerate(examples):
            ids_BT[b, : len(row.token_ids)] = torch.tensor(row.token_ids)
            for position in row.target_positions:
                if random.random() < MASKED_SHARE:
                    labels_BT[b, position] = row.token_ids[position]
                    ids_BT[b, position] = tokenizer.mask_token_id
        mask_BT = ids_BT != tokenizer.pad_token_id
        logits_BTV = model(
            input_ids=ids_BT, attention_mask=mask_BT, **segments(model, examples, longest)
        ).logits
        return functional.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())

    return loss_of


def make_tokenizer(kind: str, texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the texts: GPT-2's kind with many or few merges, RoBERTa's, BERT's or T5's."""
    makers: dict[str, Callable[[list[str]], PreTrainedTokenizerFast]] = {
        "bpe": lambda texts: _byte_level(texts, 600),
        "small-bpe": lambda texts: _byte_level(texts, 330),
        "roberta": lambda texts: _byte_level(texts, 600, is_roberta=True),
        "wordpiece": _wordpiece,
        "unigram": _unigram,
    }
    tokenizer = makers[kind](texts)
    tokenizer.model_max_length = 256
    return tokenizer


def _byte_level(
    texts: list[str], num_tokens: int, *, is_roberta: bool = False
) -> PreTrainedTokenizerFast:
    names = {"eos": "<|endoftext|>", "pad": "<|pad|>"}
    if is_roberta:
        names = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens,
        special_tokens=list(names.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if is_roberta:
        names |= {"cls": "<s>", "sep": "</s>"}
    return _wrapped(backend, names, "<s> $A </s>" if is_roberta else None)


def _wordpiece(texts: list[str]) -> PreTrainedTokenizerFast:
    names = {name: f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    backend = Tokenizer(models.WordPiece(unk_token=names["unk"]))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=500,
        special_tokens=list(names.values()),
        initial_alphabet=list(map(chr, range(33, 127))),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _wrapped(backend, names, "[CLS] $A [SEP]")


def _unigram(texts: list[str]) -> PreTrainedTokenizerFast:
    names = {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400,
        special_tokens=list(names.values()),
        unk_token=names["unk"],
        initial_alphabet=list(map(chr, range(33, 127))),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _wrapped(backend, names, "$A </s>")


def _wrapped(backend: Any, names: dict[str, str], around: str | None) -> PreTrainedTokenizerFast:
    """Any: the library's Tokenizer, whose attributes it types as read-only."""
    if around is not None:
        specials = [(token, backend.token_to_id(token)) for token in names.values()]
        backend.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=specials
        )
    tokens = {f"{name}_token": token for name, token in names.items()}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
