"""Schema of `method.distillation`, the options of a distillation job.

The API validates the options and the trainer reads them. docs/jobs.md lists them for users.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator


class Block(BaseModel):
    """Base class of all parts of the options: immutable, and unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Auto = Literal["auto"]
Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0, le=1000.0)]
NumLayers = Annotated[int, Field(ge=1, le=1024)]
Ladder = Annotated[tuple[NumLayers, ...], Field(min_length=1, max_length=8)]
LayerMap = Annotated[tuple[tuple[int, int], ...], Field(min_length=1, max_length=1024)]
LayerChoice = Literal["auto", "measured", "first_and_last"]
LayerNumber = Annotated[int, Field(ge=0, le=1023)]
Size = Annotated[int, Field(ge=8, le=65_536)]

NO_NUL = r"^[^\x00]*$"  # Postgres cannot store NUL characters in text
FileId = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=NO_NUL)]

Precision = Literal["float32", "bfloat16"]
TeacherPrecision = Literal["int8", "int4", "fp8"]
DivergenceName = Literal[
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "tvd",
    "hellinger",
    "alpha_beta",
    "logit_mse",
]
FreshFamily = Literal["gpt2", "llama", "bloom", "t5", "encoder-decoder"]
TeacherSignal = Literal["logits", "conditional_mlm", "hidden", "text", "uld"]


class FreshConfig(Block):
    """Sizes of a new student with random weights.

    `vocab_size` null means the vocabulary of the teacher. The family `encoder-decoder` is a pair of
    BERT-like models with cross-attention. Only `t5` and `encoder-decoder` have encoder layers.
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
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}; choose a multiple"
            )
        return self

    @property
    def has_encoder(self) -> bool:
        return self.family in ("t5", "encoder-decoder")


class Lora(Block):
    """Low-rank adapters on the linear layers of a checkpoint, merged into it after training."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    alpha: Annotated[float, Field(gt=0.0, le=4096.0)] = 32.0


class Student(Block):
    """Initialisation of the student from the start model, which is the `model` of the job.

    init:
        layers: Copies some layers of the start model.
        width: Keeps all layers and makes them narrower by removing the least used parts.
        checkpoint: The start model unchanged.
        lora: Low-rank adapters on the start model.
        fresh: A new model with the sizes in `config`.
    num_layers: A list requests a ladder: one student per number. For an encoder-decoder, the number
        of decoder layers, like `num_decoder_layers`.
    layer_choice: measured drops the layers that together turn the states least. See docs/jobs.md.
    fit_rows: Number of training rows on which the kept layers are fitted in closed form before
        training, to compensate for the dropped layers. 0 disables the fit.
    vocabulary: rows removes the tokens that the rows do not use, after training. Causal models only.
    """

    init: Literal["layers", "width", "checkpoint", "lora", "fresh"] = "layers"
    num_layers: NumLayers | Ladder | None = None
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
    layer_choice: Annotated[LayerChoice, Field(exclude_if=lambda value: value == "auto")] = "auto"
    fit_rows: Annotated[int, Field(ge=0, le=100_000)] | Auto = "auto"
    vocabulary: Annotated[
        Literal["all", "rows"], Field(exclude_if=lambda value: value == "all")
    ] = "all"

    @property
    def ladder(self) -> tuple[int, ...]:
        """Numbers of layers in a ladder, smallest first. Empty for a single student."""
        return tuple(sorted(set(self.num_layers))) if isinstance(self.num_layers, tuple) else ()

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> "Student":
        chooses_layers = self.num_layers is not None or self.layers is not None
        chooses_layers |= self.num_encoder_layers is not None or self.num_decoder_layers is not None
        widths = (self.hidden_size, self.num_heads, self.intermediate_size)
        chooses_width = any(width is not None for width in widths)
        if self.init not in ("layers", "width") and chooses_layers:
            raise ValueError(
                f"layers can only be chosen with init=layers or width; with init={self.init}, "
                + ("set them in config" if self.init == "fresh" else "all layers are kept")
            )
        if self.init != "width" and chooses_width:
            raise ValueError("hidden_size, num_heads and intermediate_size need init=width")
        if (self.init == "fresh") != (self.config is not None):
            raise ValueError("init=fresh and config must be given together: give both or neither")
        if self.init != "layers" and self.fit_rows not in ("auto", 0):
            raise ValueError("fit_rows needs init=layers, because other students drop no layers")
        if self.layer_choice != "auto" and (self.init != "layers" or self.layers is not None):
            raise ValueError("layer_choice needs init=layers, and no list of layers")
        if self.init != "lora" and self.lora is not None:
            raise ValueError("lora needs init=lora; set it, or leave lora out")
        if self.init == "width" and not chooses_width:
            raise ValueError("init=width needs hidden_size, num_heads or intermediate_size")
        if self.layers is not None:
            if isinstance(self.num_layers, tuple):
                raise ValueError("a ladder is given by num_layers alone; leave layers out")
            if self.num_layers is not None and self.num_layers != len(self.layers):
                raise ValueError("give num_layers or layers, not two different counts")
            if not self.layers or list(self.layers) != sorted(set(self.layers)):
                raise ValueError("layers must be ascending, distinct numbers, counted from 0")
        return self


class Reject(Block):
    """Conditions under which an answer of the teacher is left out of the training rows."""

    unfinished: bool = False  # rejects answers that max_new_tokens cut off
    min_tokens: Annotated[int, Field(ge=1, le=4096)] = 1
    max_repeated_share: Share | None = None  # of 4-grams that occur earlier in the same answer


CompletionSource = Literal["dataset", "teacher", "student", "replay"]


class Data(Block):
    """Source of the completions that the student is trained on, and how they are sampled.

    completions:
        null: The file's completions if it has them, else the teacher's. With the teacher signal
            `text`, the teacher's completions in both cases.
        dataset: The file's completions.
        teacher: Completions that the teacher generates.
        student: The current student generates a share `student_share` of the batches. Source: GKD,
            arXiv:2306.13649.
        replay: The share starts at 0 and grows by 0.1 when the held-out loss stops falling.
            `student_share` has no effect. Old completions are reused from a buffer of
            `replay_capacity`. Source: DistiLLM, arXiv:2402.03898.

    With `student` and `replay`, the other batches come from the file or the teacher.
    """

    completions: CompletionSource | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = 128
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.7
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    student_share: Share = 0.5
    replay_capacity: Annotated[int, Field(ge=1, le=100_000)] = 1000
    reject: Reject = Reject()


class Phase(Block):
    """Second phase of training, which begins after the fraction `at` of the steps.

    It has its own divergence. `completions` null keeps the source of completions unchanged.
    """

    divergence: DivergenceName
    alpha: Fraction | None = None
    beta: Fraction | None = None
    at: Fraction = 0.5
    completions: Literal["student", "replay"] | None = None


class HiddenTerm(Block):
    """Loss between hidden states of the student and of the teacher.

    Learned projections map the student's hidden states. They are discarded after training.

    layer_map: Pairs [student layer, teacher layer], counted from 0; -1 is the last layer. null
        spreads the student's layers evenly over the teacher's and pairs the last with the last.
    side: Compares encoder layers or decoder layers. auto: the encoders if both models have one and
        the student's is trained, else the decoders.
    """

    kind: Literal["mse", "cosine"] = "mse"
    weight: Weight = 1.0
    layer_map: LayerMap | None = None
    side: Literal["auto", "encoder", "decoder"] = "auto"


class AttentionTerm(Block):
    """Loss between the attention relations of one student layer and one teacher layer.

    Relations are the scaled dot products among queries, among keys and among values.

    Source: MiniLMv2, arXiv:2012.15828.
    """

    weight: Weight = 1.0
    num_relation_heads: Annotated[int, Field(ge=1, le=256)] | None = None
    student_layer: int = -1
    teacher_layer: int = -1


class Objective(Block):
    """Training loss: a divergence mixed with cross-entropy by `ce_weight`, plus feature losses.

    teacher_signal:
        logits: The teacher's next-token distributions.
        conditional_mlm: The distributions of a masked teacher at masked target positions. Source:
            arXiv:1911.03829.
        hidden: The teacher's hidden states, and cross-entropy with the text.
        text: Only the text of the teacher's answers.
        uld: Distributions over another vocabulary. Source: arXiv:2402.12030.
        auto: The signal that the pair of models supports.
    adaptation_steps: Number of steps that fine-tune a masked teacher on the training rows before
        the distillation. auto: one pass over the rows and at most 300 steps for `conditional_mlm`,
        else none.
    """

    divergence: DivergenceName = "forward_kl"
    alpha: Fraction | None = None  # null: 0.1 for the skew divergences, 0.2 for alpha_beta
    beta: Fraction | None = None  # null: 0.5 for jsd, 0.7 for alpha_beta
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
    """Ends training when `metric` has not improved for `patience` evaluations."""

    patience: Annotated[int, Field(ge=1, le=1000)] = 3
    metric: Literal["kl", "perplexity", "agreement"] = "kl"


class Hyperparameters(Block):
    """Hyperparameters of the training.

    precision: The dtype of the matmuls in the bodies of student and teacher. Weights, gradients,
        optimizer moments and the loss are always float32. auto: bfloat16 if the CPU or GPU
        multiplies it faster, else float32.
    learning_rate_multiplier: Factor of the automatic learning rate.
    batch_rows: Rows per step. A step with more than `batch_tokens` is computed in micro-batches.
    num_devices: Number of CUDA devices, with one process on each. Ignored on a CPU.
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
    # Excluded from the JSON if not set, so that jobs without them keep their fingerprints.
    learning_rate_multiplier: Annotated[
        float | None, Field(gt=0.0, le=1000.0, exclude_if=lambda value: value is None)
    ] = None
    batch_rows: Annotated[
        int | None, Field(ge=1, le=256, exclude_if=lambda value: value is None)
    ] = None
    num_devices: Annotated[int, Field(ge=1, le=64, exclude_if=lambda value: value == 1)] = 1

    @model_validator(mode="after")
    def _one_learning_rate(self) -> "Hyperparameters":
        if self.learning_rate != "auto" and self.learning_rate_multiplier is not None:
            raise ValueError(
                "learning_rate_multiplier is a factor of the automatic learning rate; leave it or learning_rate out"
            )
        return self


Metric = Literal[
    "perplexity", "agreement", "rouge_l", "exact_match", "accuracy", "macro_f1", "speed"
]
GateMetric = Literal[
    "kl", "perplexity", "agreement", "rouge_l", "exact_match", "accuracy", "macro_f1"
]


class Gate(Block):
    """Condition that a student passes: a bound on one of its held-out metrics."""

    metric: GateMetric
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> "Gate":
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("a gate takes exactly one of at_least and at_most")
        return self


class Evaluation(Block):
    """Evaluation of the student.

    The held-out KL divergence and loss are always measured. `metrics` names further metrics.

    Without a gate every student passes. A job with a single student fails if the student does not
    pass. For a ladder, `choose` selects the student that is registered.

    The best checkpoint, the gate and the choice from a ladder are decided on the held-out rows.
    `test_file` is an uploaded file whose rows influence no choice. They are evaluated once, after
    training, and the metrics in the result are then those of the test rows.
    """

    metrics: tuple[Metric, ...] = ("perplexity", "agreement", "rouge_l", "exact_match", "speed")
    num_samples: Annotated[int, Field(ge=0, le=64)] = 4
    ce_baseline: bool = False  # also trains the same student on the text alone, for comparison
    gate: Gate | None = None
    choose: Literal["smallest_passing", "best"] = "smallest_passing"
    # Excluded from the JSON if null, so that requests without it keep their fingerprints.
    test_file: Annotated[FileId | None, Field(exclude_if=lambda value: value is None)] = None


ExportFormat = Literal["gguf_f16", "gguf_q8_0"]
LOSS_NAMES = {"fkl": "forward_kl", "rkl": "reverse_kl", "skew_fkl": "skew_forward_kl"}


class Distillation(Block):
    """Options of a distillation job, `method.distillation` in the request.

    The student is always saved as safetensors. `export` names additional formats.

    teacher_precision: Format of the teacher's linear layers, which need less memory in 8 or 4 bits.
        auto: They are not quantised.
    """

    teacher: Annotated[str, Field(min_length=1, max_length=200)]
    teacher_precision: Annotated[
        TeacherPrecision | Auto, Field(exclude_if=lambda value: value == "auto")
    ] = "auto"
    student: Student = Student()
    data: Data = Data()
    objective: Objective = Objective()
    hyperparameters: Hyperparameters = Hyperparameters()
    evaluation: Evaluation = Evaluation()
    export: tuple[ExportFormat, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _read_loss(cls, block: Any) -> Any:  # Any: unvalidated JSON
        """Expands `loss`, the short form of the objective.

        Example: `"loss": {"type": "fkl", "temperature": 2}`.
        """
        if not isinstance(block, dict) or not isinstance(block.get("loss"), dict):
            return block
        if "objective" in block:
            raise ValueError("give objective or loss, not both: loss is a short form of objective")
        objective = dict(block["loss"])
        if "type" in objective:
            kind = objective.pop("type")
            objective["divergence"] = LOSS_NAMES.get(kind, kind) if isinstance(kind, str) else kind
        return {**{name: block[name] for name in block if name != "loss"}, "objective": objective}
