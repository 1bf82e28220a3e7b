"""Plans and builds the student of a run.

A student starts from a model (the start): with some of its layers, with less width, unchanged, or
with LoRA adapters. A fresh student has random weights instead.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from app.contracts.distillation import Lora, Student
from worker.cpu import prepare_for_training
from worker.distill.losses.lm_head import load_head
from worker.distill.students.activation_checkpointing import checkpoint_activations
from worker.distill.students.fresh import build_fresh, fresh_config
from worker.distill.students.layer_dropping import first_and_last, keep_layers
from worker.distill.students.lora import add_lora, load_lora_tensors, read_saved_adapters
from worker.distill.students.width_pruning import narrow_config, sizes_of, slice_width
from worker.errors import InvalidStudent, StudentTooDeep, UnsupportedModel
from worker.models.architectures import kind_of, layer_counts, model_class, read_config
from worker.models.artifact_checks import read_safetensors_header

# Of fewer layers, and of a T5's decoder, the first and the last ones are better (bench/LOG.md).
LEAST_MEASURED_SHARE = 0.2
# Names in safetensors files.
FLOAT_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class StudentRecipe:
    """Everything that is needed to build the student of a run from model folders.

    `layers` are the kept layers out of `num_available`, or None if all are kept. For an
    encoder-decoder they are the decoder's; `encoder_layers` is None if all encoder layers are kept.

    `calibration` holds token sequences that determine which parts stay when the width is pruned.
    Without them the norms of the weights decide. With `fits_layers`, training begins with layer
    fitting (worker.distill.training.layer_fitting); `build` returns the student before that.
    """

    student: Student
    start_dir: Path
    tokenizer_dir: Path
    num_available: int
    layers: tuple[int, ...] | None = None
    encoder_layers: tuple[int, ...] | None = None
    freeze_head: bool = False
    freeze_encoder: bool = False
    fits_layers: bool = False
    is_causal: bool = False  # the start model has one stack, and generates text
    seed: int = 0
    calibration: tuple[tuple[int, ...], ...] = ()

    @property
    def lora(self) -> Lora | None:
        """Settings of the adapters that `load_student` adds, or None.

        `build` does not add them: untrained adapters change no output.
        """
        return (self.student.lora or Lora()) if self.student.init == "lora" else None

    @property
    def measures_layers(self) -> bool:
        """True if the kept layers are chosen by measurement. Until then, `layers` are a guess."""
        if not self._has_choice:
            return False
        choice = self.student.layer_choice
        return choice == "measured" or (choice == "auto" and self._why_not_measured is None)

    @property
    def reason_for_layers(self) -> str | None:
        """The reason for the kept layers, or None if they follow from what the job asks for."""
        if self.measures_layers:
            return "the others together turn the states of the rows by the smallest angle"
        is_open = self._has_choice and self.student.layer_choice == "auto"
        return self._why_not_measured if is_open else None

    @property
    def _has_choice(self) -> bool:
        """True if the student loses layers, and the job does not list those to keep."""
        if self.student.init != "layers" or self.student.layers is not None or self.layers is None:
            return False
        return len(self.layers) < self.num_available or self.encoder_layers is not None

    @property
    def _why_not_measured(self) -> str | None:
        """The reason why measured layers would be the worse choice, if they are (bench/LOG.md)."""
        if not self.is_causal:
            return "an encoder-decoder learns more from the first and last layers"
        if not self.fits_layers:
            return "layers are chosen by measurement only if they are fitted"
        if len(self.layers or ()) < LEAST_MEASURED_SHARE * self.num_available:
            return "the first and last layers are the better start if few are kept"
        return None

    def build(self) -> PreTrainedModel:
        """Returns the untrained student in float32, without dropout. Weights are reproducible."""
        if self.student.config is not None:
            return build_fresh(
                fresh_config(self.student.config, _tokenizer(self.tokenizer_dir)), seed=self.seed
            )
        is_narrower = self.student.init == "width"
        if self.layers is None and not is_narrower:
            return load_model(self.start_dir)
        # weights in the dtype of their files are mapped: only what is kept takes memory
        dtype = stored_dtype(self.start_dir) or torch.float32
        model = load_model(self.start_dir, dtype)
        if self.layers is not None:
            kept_dtype = dtype if is_narrower else torch.float32
            model = keep_layers(model, self.layers, self.encoder_layers, dtype=kept_dtype)
        if is_narrower:
            return slice_width(model, sizes_of(self.student, model.config), self.calibration)
        return model


def plan_student(
    teacher_dir: Path,
    start_dir: Path,
    student: Student,
    num_layers: int | None = None,
    *,
    seed: int = 0,
    calibration: tuple[tuple[int, ...], ...] = (),
) -> StudentRecipe:
    """Returns the recipe for a student, after checking it against the model that it starts from.

    `num_layers` is one size of a ladder. Copied parts are frozen only if they are the teacher's or
    were copied unchanged: an encoder that lost layers or width has to be trained.

    Raises:
        UnsupportedModel: The start's family does not allow this kind of student.
        StudentTooDeep: The student needs more layers than the start has.
        InvalidStudent: The student's settings contradict each other or the start.
    """
    if student.config is not None:
        # called only for its errors, which would otherwise occur late in the job
        fresh_config(student.config, _tokenizer(teacher_dir))
        num_fresh = student.config.num_decoder_layers or student.config.num_layers
        return StudentRecipe(student, start_dir, teacher_dir, num_fresh, seed=seed)
    config = read_config(start_dir)
    if kind_of(config) == "masked":
        raise InvalidStudent(
            f"a {config.model_type} model does not generate text, so a student cannot start from it; use student.init=fresh "
            "(the closest family is encoder-decoder), or start from a causal or encoder-decoder model"
        )
    _, num_available = layer_counts(config)
    layers, encoder_layers = (None, None)
    if student.init == "layers" or (
        student.init == "width" and (num_layers or _names_layers(student))
    ):
        layers, encoder_layers = _choose_layers(student, config, num_layers)
    if student.init == "width":
        # called only for its errors, which would otherwise occur late in the job
        narrow_config(config, sizes_of(student, config))
    return StudentRecipe(
        student=student,
        start_dir=start_dir,
        tokenizer_dir=start_dir,
        num_available=num_available,
        layers=layers,
        encoder_layers=encoder_layers,
        freeze_head=_freezes_head(student, config, teacher_dir, start_dir),
        freeze_encoder=_freezes_encoder(student, config, encoder_layers, teacher_dir, start_dir),
        fits_layers=student.init == "layers" and student.fit_rows != 0,
        is_causal=kind_of(config) == "causal",
        seed=seed,
        calibration=calibration,
    )


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Loads a model of any supported family in eval mode.

    Training does not change the mode, so dropout stays off.
    """
    model: PreTrainedModel = model_class(read_config(folder)).from_pretrained(
        folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True
    )
    return model.eval()


def stored_dtype(folder: Path) -> torch.dtype | None:
    """Returns the dtype of all weights in a folder, or None if they have several or another kind."""
    names = {
        tensor.dtype
        for path in folder.glob("*.safetensors")
        for tensor in read_safetensors_header(path).values()
    }
    return FLOAT_DTYPES.get(names.pop()) if len(names) == 1 else None


def load_student(
    recipe: StudentRecipe,
    resume_dir: Path | None,
    *,
    seed: int,
    matmul_dtype: torch.dtype = torch.float32,
    has_checkpointing: bool = False,
    frozen_dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Returns the student ready for training: untrained, or from the checkpoint in `resume_dir`.

    Adapters are added and parts that are not trained are frozen. `matmul_dtype` is the dtype in which
    linear layers other than the head multiply on a CPU. `has_checkpointing` switches activation
    checkpointing on. `frozen_dtype` is the dtype of weights with adapters.
    """
    # A checkpoint of a LoRA student has no weights, so the student is built anew.
    if recipe.lora is not None and stored_dtype(recipe.start_dir) == frozen_dtype:
        model = load_model(recipe.start_dir, frozen_dtype)
    elif resume_dir is None or recipe.lora is not None:
        model = recipe.build()
    else:
        model = load_model(resume_dir / "model")
    prepare_for_training(model, dtype=matmul_dtype, exact=model.get_output_embeddings())
    if recipe.lora is not None:
        add_lora(model, recipe.lora, seed=seed, base_dtype=frozen_dtype)
        if resume_dir is not None:
            load_lora_tensors(model, read_saved_adapters(resume_dir))
    if recipe.freeze_head:
        freeze_head(model)
    if recipe.freeze_encoder:
        freeze_encoder(model)
    if has_checkpointing:
        checkpoint_activations(model)
    return model


def freeze_head(model: PreTrainedModel) -> None:
    """Excludes the head, and an embedding tied to it, from training."""
    model.get_output_embeddings().requires_grad_(False)


def freeze_encoder(model: PreTrainedModel) -> None:
    """Excludes the encoder from training, so that its outputs stay the same.

    That includes an embedding that the decoder shares with it.
    """
    model.get_encoder().requires_grad_(False)


def num_parameters(model: PreTrainedModel) -> int:
    """Returns the number of parameters. Shared ones count once."""
    return sum(p.numel() for p in model.parameters())


def _names_layers(student: Student) -> bool:
    named = (
        student.num_layers,
        student.layers,
        student.num_encoder_layers,
        student.num_decoder_layers,
    )
    return any(value is not None for value in named)


def _choose_layers(
    student: Student, config: PretrainedConfig, num_layers: int | None
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Returns the kept layers of the decoder (or of the only stack), and those of the encoder.

    The latter are None if all layers of the encoder are kept.
    """
    num_encoder, num_decoder = layer_counts(config)
    if num_encoder == 0 and (student.num_encoder_layers or student.num_decoder_layers):
        raise InvalidStudent(
            f"a {config.model_type} model has no separate encoder and decoder layers: give student.num_layers, not "
            "num_encoder_layers or num_decoder_layers"
        )
    asked = num_layers or (student.num_layers if isinstance(student.num_layers, int) else None)
    counts = {
        asked,
        student.num_decoder_layers,
        len(student.layers) if student.layers else None,
    } - {None}
    if len(counts) > 1:
        raise InvalidStudent(
            "student.num_layers, num_decoder_layers and layers all set the decoder's layers: give one"
        )
    count = next(iter(counts), None) or max(1, num_decoder // 2)
    layers = student.layers or first_and_last(num_decoder, count)
    if max(layers) >= num_decoder:
        raise StudentTooDeep(
            f"student.layers asks for layer number {max(layers)}, but the model it starts from has {num_decoder} "
            f"(0 to {num_decoder - 1}); ask for fewer"
        )
    if student.num_encoder_layers is None or student.num_encoder_layers == num_encoder:
        return tuple(layers), None
    return tuple(layers), first_and_last(num_encoder, student.num_encoder_layers)


def _freezes_head(
    student: Student, config: PretrainedConfig, teacher_dir: Path, start_dir: Path
) -> bool:
    if student.init == "lora":
        return True  # the head has no adapters
    if student.init == "width" and sizes_of(student, config).hidden_size != config.hidden_size:
        return False
    if student.init == "checkpoint" and student.freeze_head:
        return start_dir.resolve() == teacher_dir.resolve() or _have_one_head(
            teacher_dir, start_dir
        )
    return student.freeze_head


def _freezes_encoder(
    student: Student,
    config: PretrainedConfig,
    encoder_layers: tuple[int, ...] | None,
    teacher_dir: Path,
    start_dir: Path,
) -> bool:
    if kind_of(config) != "seq2seq" or not student.freeze_encoder or encoder_layers is not None:
        return False
    is_whole = student.init == "layers"
    return is_whole or (
        student.init == "checkpoint" and start_dir.resolve() == teacher_dir.resolve()
    )


def _have_one_head(one: Path, other: Path) -> bool:
    try:
        weights = [load_head(folder).weight_VH for folder in (one, other)]
    except UnsupportedModel:  # at least one model has no head that could be compared
        return False
    return torch.equal(*weights)


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    return tokenizer
