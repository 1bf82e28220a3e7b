"""The block `method.distillation` of a job: the API validates it, the trainer obeys it.

Four axes that do not know of each other: where the student comes from, where its tokens come from, what is minimised,
and how it is judged.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator


class Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Auto = Literal["auto"]
Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0, le=1000.0)]
NumLayers = Annotated[int, Field(ge=1, le=1024)]
LayerNumber = Annotated[int, Field(ge=0, le=1023)]
Size = Annotated[int, Field(ge=8, le=65_536)]

NO_NUL = r"^[^\x00]*$"  # Postgres holds no NUL in text
FileId = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=NO_NUL)]

Precision = Literal["float32", "bfloat16"]
DivergenceName = Literal[
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "tvd",
    "alpha_beta",
    "logit_mse",
]
FreshFamily = Literal["gpt2", "llama", "bloom", "t5", "encoder-decoder"]
TeacherSignal = Literal["logits", "conditional_mlm", "hidden", "text", "uld"]


class FreshConfig(Block):
    """A student built from sizes alone, with random weights; the vocabulary is the teacher's unless said.

    encoder-decoder is a BERT-like pair with cross-attention; t5 and encoder-decoder have both kinds of layers.
    """

    family: FreshFamily
    hidden_size: Size = 256
    num_layers: NumLayers = 4
    num_encoder_layers: NumLayers | None = None
    num_decoder_layers: NumLayers | None = None
    num_heads: Annotated[int, Field(ge=1, le=256)] = 4
    intermediate_size: Size | None = None
    vocab_size: Annotated[int, Field(ge=16, le=2**22)] | None = None
    max_positions: Annotated[int, Field(ge=16, le=2**17)] = 1024

    @model_validator(mode="after")
    def _divides(self) -> "FreshConfig":
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_heads {self.num_heads}; choose one that is"
            )
        return self

    @property
    def has_encoder(self) -> bool:
        return self.family in ("t5", "encoder-decoder")


class Lora(Block):
    """Low-rank adapters on a checkpoint's linear layers, merged into it at the end."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    alpha: Annotated[float, Field(gt=0.0, le=4096.0)] = 32.0


class Student(Block):
    """Where the student comes from.

    layers: copies of some of the start's layers; width: its layers made narrower, the least used parts left out;
    checkpoint: the start as it is; lora: adapters on it; fresh: a new model of the sizes in `config`.
    A list for `num_layers` asks for a ladder of students, one a number. An encoder-decoder start takes
    `num_encoder_layers` and `num_decoder_layers`; there `num_layers` speaks of the decoder.
    `fit_rows`: before the training the layers kept are fitted in closed form, on so many training rows, to make good
    what the dropped ones did (0: they are not).
    """

    init: Literal["layers", "width", "checkpoint", "lora", "fresh"] = "layers"
    num_layers: (
        NumLayers | Annotated[tuple[NumLayers, ...], Field(min_length=1, max_length=8)] | None
    ) = None
    layers: tuple[LayerNumber, ...] | None = None
    num_encoder_layers: NumLayers | None = None
    num_decoder_layers: NumLayers | None = None
    hidden_size: Size | None = None
    num_heads: Annotated[int, Field(ge=1, le=256)] | None = None
    intermediate_size: Size | None = None
    config: FreshConfig | None = None
    lora: Lora | None = None
    freeze_head: bool = True
    freeze_encoder: bool = True
    fit_rows: Annotated[int, Field(ge=0, le=100_000)] | Auto = "auto"

    @property
    def ladder(self) -> tuple[int, ...]:
        """The sizes of a ladder, smallest first; empty for a single student."""
        return tuple(sorted(set(self.num_layers))) if isinstance(self.num_layers, tuple) else ()

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> "Student":
        chooses_layers = self.num_layers is not None or self.layers is not None
        chooses_layers |= self.num_encoder_layers is not None or self.num_decoder_layers is not None
        chooses_width = any(
            s is not None for s in (self.hidden_size, self.num_heads, self.intermediate_size)
        )
        if self.init not in ("layers", "width") and chooses_layers:
            raise ValueError(
                f"numbers of layers belong to init=layers; with init={self.init} "
                + ("they are in config" if self.init == "fresh" else "the checkpoint keeps its own")
            )
        if self.init != "width" and chooses_width:
            raise ValueError(
                "hidden_size, num_heads and intermediate_size belong to init=width (or to config)"
            )
        if (self.init == "fresh") != (self.config is not None):
            raise ValueError("init=fresh and config belong together: give both or neither")
        if self.init != "layers" and self.fit_rows not in ("auto", 0):
            raise ValueError(
                "fit_rows belongs to init=layers: other students have no dropped layers to stand in for"
            )
        if self.init != "lora" and self.lora is not None:
            raise ValueError("lora belongs to init=lora")
        if self.init == "width" and not chooses_width:
            raise ValueError("init=width needs hidden_size, num_heads or intermediate_size")
        if self.layers is not None:
            if isinstance(self.num_layers, tuple):
                raise ValueError("a ladder takes num_layers alone, without layers")
            if self.num_layers is not None and self.num_layers != len(self.layers):
                raise ValueError("give num_layers or layers, not two different counts")
            if not self.layers or list(self.layers) != sorted(set(self.layers)):
                raise ValueError(
                    "layers must be a rising list of distinct teacher layer numbers, counted from 0"
                )
        return self


class Reject(Block):
    """Which of the teacher's answers are left out of the training rows."""

    unfinished: bool = False  # those cut off by max_new_tokens
    min_tokens: Annotated[int, Field(ge=1, le=4096)] = 1
    max_repeated_share: Share | None = None  # of an answer's 4-grams that occurred before in it


CompletionSource = Literal["dataset", "teacher", "student", "replay"]


class Data(Block):
    """Where completions come from; null means: from the file if it has them, else from the teacher.

    A student that learns from text alone (teacher_signal text) takes the teacher's, unless dataset is asked for.
    student: a share `student_share` of the batches is answered by the student as it is then (GKD, arXiv:2306.13649).
    replay: that share grows when the held-out loss does not fall, and old answers are used again from a buffer of
    `replay_capacity` (DistiLLM, arXiv:2402.03898). Both take the other batches from the file or the teacher.
    """

    completions: CompletionSource | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = 128
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.7
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    student_share: Share = 0.5
    replay_capacity: Annotated[int, Field(ge=1, le=100_000)] = 1000
    reject: Reject = Reject()


class Phase(Block):
    """The divergence from a fraction `at` of the steps onwards, and where completions come from then."""

    divergence: DivergenceName
    alpha: Fraction | None = None
    beta: Fraction | None = None
    at: Fraction = 0.5
    completions: Literal["student", "replay"] | None = None


class HiddenTerm(Block):
    """Hidden states of the student's layers drawn to the teacher's, through projections thrown away afterwards.

    layer_map pairs [student layer, teacher layer], counted from 0 (-1 is the last); null spreads the student's layers
    evenly over the teacher's, the last on the last. `side` says whose layers: an encoder-decoder has two.
    """

    kind: Literal["mse", "cosine"] = "mse"
    weight: Weight = 1.0
    layer_map: (
        Annotated[tuple[tuple[int, int], ...], Field(min_length=1, max_length=1024)] | None
    ) = None
    side: Literal["auto", "encoder", "decoder"] = "auto"


class AttentionTerm(Block):
    """Relations between the queries, keys and values of one layer each (MiniLMv2, arXiv:2012.15828)."""

    weight: Weight = 1.0
    num_relation_heads: Annotated[int, Field(ge=1, le=256)] | None = None
    student_layer: int = -1
    teacher_layer: int = -1


class Objective(Block):
    """divergence, mixed with cross-entropy by ce_weight, plus the feature terms.

    teacher_signal: what of the teacher is used. logits: its next-token distributions; conditional_mlm: those of a
    masked model at masked target positions (arXiv:1911.03829); hidden: hidden states alone; text: its answers alone;
    uld: distributions over another vocabulary (arXiv:2402.12030). auto takes what the pair of models allows.
    adaptation_steps: a masked teacher's own steps on the training rows before it teaches; auto: one pass over them, at
    most 300 steps, for conditional_mlm and none otherwise.
    """

    divergence: DivergenceName = "forward_kl"
    alpha: Fraction | None = None  # 0.1 for the skew divergences, 0.2 for alpha_beta
    beta: Fraction | None = None  # 0.5 for jsd, 0.7 for alpha_beta
    temperature: Annotated[float, Field(ge=0.1, le=20.0)] = 1.0
    temperature_end: Annotated[float, Field(ge=0.1, le=20.0)] | None = None
    temperature_schedule: Literal["linear", "cosine"] = "linear"
    ce_weight: Share = 0.0
    hidden: HiddenTerm | None = None
    attention: AttentionTerm | None = None
    teacher_signal: TeacherSignal | Auto = "auto"
    adaptation_steps: Annotated[int, Field(ge=0, le=100_000)] | Auto = "auto"
    then: Phase | None = None


class EarlyStopping(Block):
    """Stop when `metric` has not improved for `patience` evaluations."""

    patience: Annotated[int, Field(ge=1, le=1000)] = 3
    metric: Literal["kl", "perplexity", "agreement"] = "kl"


class Hyperparameters(Block):
    """precision: what the bodies of student and teacher multiply in; weights, gradients, moments and the loss are float32
    whatever it is. auto is bfloat16 where the processor or card multiplies that itself.
    """

    n_epochs: Annotated[int, Field(ge=1, le=1000)] = 3
    batch_tokens: Annotated[int, Field(ge=16, le=1_000_000)] | Auto = "auto"
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] | Auto = "auto"
    weight_decay: Share = 0.0
    warmup_ratio: Annotated[float, Field(ge=0.0, le=0.9)] = 0.03
    max_grad_norm: Annotated[float, Field(gt=0.0, le=1000.0)] = 1.0
    precision: Precision | Auto = "auto"
    max_sequence_tokens: Annotated[int, Field(ge=8, le=131_072)] = 512
    max_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    checkpoint_steps: Annotated[int, Field(ge=1, le=1_000_000)] | Auto = "auto"
    eval_steps: Annotated[int, Field(ge=1, le=1_000_000)] | Auto = "auto"
    early_stopping: EarlyStopping | None = None


Metric = Literal[
    "perplexity", "agreement", "rouge_l", "exact_match", "accuracy", "macro_f1", "speed"
]
GateMetric = Literal[
    "kl", "perplexity", "agreement", "rouge_l", "exact_match", "accuracy", "macro_f1"
]


class Gate(Block):
    """A student passes when its held-out metric is at least (or at most) so much."""

    metric: GateMetric
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> "Gate":
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("a gate takes exactly one of at_least and at_most")
        return self


class Evaluation(Block):
    """Held-out KL and loss are always measured; `metrics` names what is measured beside them.

    Without a gate every student passes. A single student that fails its gate fails the job; of a ladder, `choose` says
    which is registered.

    Checkpoints, gates and ladders are decided on the held-out rows. `test_file` is an uploaded file of rows that decide
    nothing: they are judged once, at the end, and the result's figures are then those of the test rows.
    """

    metrics: tuple[Metric, ...] = ("perplexity", "agreement", "rouge_l", "exact_match", "speed")
    num_samples: Annotated[int, Field(ge=0, le=64)] = 4
    ce_baseline: bool = False  # also train the same student on the text alone, to compare
    gate: Gate | None = None
    choose: Literal["smallest_passing", "best"] = "smallest_passing"
    # left out of the JSON where there is none, so that requests of before keep their fingerprints
    test_file: Annotated[FileId | None, Field(exclude_if=lambda value: value is None)] = None


ExportFormat = Literal["gguf_f16", "gguf_q8_0"]
LOSS_NAMES = {"fkl": "forward_kl", "rkl": "reverse_kl", "skew_fkl": "skew_forward_kl"}


class Distillation(Block):
    """The block `method.distillation` of a job; safetensors are always written, `export` names what else is."""

    teacher: Annotated[str, Field(min_length=1, max_length=200)]
    student: Student = Student()
    data: Data = Data()
    objective: Objective = Objective()
    hyperparameters: Hyperparameters = Hyperparameters()
    evaluation: Evaluation = Evaluation()
    export: tuple[ExportFormat, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _read_loss(cls, block: Any) -> Any:  # Any: the JSON as it came
        """`"loss": {"type": "fkl", "temperature": 2}` is the short way to write the objective."""
        if not isinstance(block, dict) or not isinstance(block.get("loss"), dict):
            return block
        if "objective" in block:
            raise ValueError(
                "give objective or loss, not both: loss is the short way to write the objective"
            )
        objective = dict(block["loss"])
        if "type" in objective:
            kind = objective.pop("type")
            objective["divergence"] = LOSS_NAMES.get(kind, kind) if isinstance(kind, str) else kind
        return {**{name: block[name] for name in block if name != "loss"}, "objective": objective}
