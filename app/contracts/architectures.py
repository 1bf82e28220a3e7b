"""The table of supported model architectures. Adding one begins with a row here.

An architecture is named as in `model_type` of a model's config.json. Many tests run over all rows.
They need a tiny model of the new architecture: in `tests/tiny.py`, and in the tables at the top of
`test_families.py`, `test_speculative_batch.py`, `test_layer_dropping.py` and, if its width can be
cut, `test_width_pruning.py`. `test_schedules.py` compares it with `generate()`. docs/jobs.md and
docs/pairs.md list the architectures for users.
A model that is called in a way of its own gets an adapter in `worker/serve/decoding/families.py`.
GGUF files are read and written by `worker/models/`.
"""

from dataclasses import dataclass
from typing import Final, Literal

from app.contracts.messages import ModelKind

Part = Literal["norms", "mlp", "attention"]


@dataclass(frozen=True)
class Architecture:
    """Capabilities of the service for models of one type.

    kind: Causal models and encoder-decoders write text. Masked models can only be teachers.
    layers: Layout of the tensors for width pruning. None if the width cannot be pruned.
    classes: Prefix of the class names in transformers, such as `Granite` for `GraniteMLP`. Needed
        only with `fused`.
    fused: Parts of a layer that compute what those of Llama do, and that fused operations replace
        in training. norms: `<classes>RMSNorm` is a plain RMS norm. mlp: `<classes>MLP` is
        `down(act(gate(x)) * up(x))`. attention: rotary embeddings over the full head width, no
        norms of queries and keys, no dropout after the output projection.
    has_llama_decoder: `LlamaDecoder` implements everything that the model computes.
    gguf: Name of the architecture in GGUF files, if a model can be exported to GGUF.
    is_distilled: It can be imported, and be a teacher and a student. Other models are known to the
        engine only.
    is_quantizable: Its layers are `nn.Linear`, so that a teacher can be quantised.
    """

    model_type: str
    kind: ModelKind
    layers: Literal["gpt2", "llama", "t5"] | None = None
    classes: str = ""
    fused: tuple[Part, ...] = ()
    has_llama_decoder: bool = False
    gguf: str | None = None
    is_distilled: bool = True
    is_quantizable: bool = True


def _llama_like(
    model_type: str, classes: str, *, gguf: str | None, has_llama_attention: bool = True
) -> Architecture:
    return Architecture(
        model_type,
        "causal",
        layers="llama",
        classes=classes,
        fused=("norms", "mlp", "attention") if has_llama_attention else ("norms", "mlp"),
        has_llama_decoder=True,
        gguf=gguf,
    )


_ROWS: Final = (
    Architecture("bart", "seq2seq"),
    Architecture("bert", "masked"),
    Architecture("bloom", "causal"),
    Architecture("encoder-decoder", "seq2seq"),
    Architecture("gemma3_text", "causal", is_distilled=False),
    Architecture("gpt2", "causal", layers="gpt2", gguf="gpt2", is_quantizable=False),
    Architecture("gpt_neox", "causal"),
    Architecture("granite", "causal", classes="Granite", fused=("norms", "mlp", "attention")),
    _llama_like("llama", "Llama", gguf="llama"),
    _llama_like("mistral", "Mistral", gguf="llama"),  # GGUF stores Mistral models as llama
    Architecture("olmo2", "causal", classes="Olmo2", fused=("norms", "mlp")),
    Architecture("opt", "causal"),
    Architecture("phi3", "causal", classes="Phi3", fused=("norms",)),  # Phi-3 and Phi-4
    _llama_like("qwen2", "Qwen2", gguf="qwen2"),
    _llama_like("qwen3", "Qwen3", gguf="qwen3", has_llama_attention=False),
    Architecture("roberta", "masked"),
    _llama_like("smollm3", "SmolLM3", gguf="smollm3", has_llama_attention=False),
    Architecture("starcoder2", "causal"),
    Architecture("t5", "seq2seq", layers="t5"),
)
ARCHITECTURES: Final = {row.model_type: row for row in _ROWS}
# Encoders and decoders of an EncoderDecoderModel.
HALVES: Final = ("bert", "gpt2", "roberta")
UNBOUNDED_CONTEXT: Final = 2048  # context limit of models without a maximum position (T5, BLOOM)


def distilled(kind: ModelKind) -> tuple[str, ...]:
    """Returns the architectures of a kind that can be teachers or students, in order."""
    return tuple(a.model_type for a in _ROWS if a.kind == kind and a.is_distilled)


def served(kind: ModelKind) -> frozenset[str]:
    """Returns the architectures of a kind that an engine can call."""
    return frozenset(a.model_type for a in _ROWS if a.kind == kind)
