"""The teacher and the student of a run, with the teacher signal that connects them.

Chooses the signal, places the teacher on a device, and loads it when it is needed.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from app.contracts.batch_plan import DEVICE_BATCH_TOKENS, batch_tokens_of
from app.contracts.distillation import Auto, HiddenTerm, Objective, TeacherPrecision
from app.contracts.memory.step_parts import planned_parts
from worker.cpu import prepare_for_inference
from worker.distill.data.dataset import Reader, Rows
from worker.distill.forward.shared_prefix import shared_prefix
from worker.distill.losses.lm_head import Head, is_head_of, load_head
from worker.distill.losses.uld import DEFAULT_CE_WEIGHT, Aligned, align_rows
from worker.distill.students.fresh import fresh_config
from worker.distill.students.recipe import StudentRecipe, load_model, plan_student
from worker.distill.teachers.cached_teacher import (
    CachedTeacher,
    LiveTeacher,
    Teacher,
    cached_teacher,
)
from worker.distill.teachers.identity import outputs_identity, teacher_identity
from worker.distill.teachers.masked_lm import MaskedTeacher
from worker.distill.teachers.quantized import check_precision, load_quantized
from worker.distill.teachers.signals import Signal, choose_signal
from worker.distill.training.devices import (
    CPU,
    Device,
    Needs,
    Placement,
    needs_by_tokens,
    on_cpu,
    place,
    place_alone,
    place_largest,
    teacher_dtypes,
)
from worker.distill.training.feature_losses import FeaturePlan
from worker.distill.training.rollouts import LONGEST_BATCH, sources_of
from worker.distill.training.teacher_adaptation import Adaptation, adapt
from worker.errors import TokenizerMismatch, UnsupportedModel
from worker.models.architectures import kind_of, read_config
from worker.protocol.run_spec import RunSpec


@dataclass(frozen=True)
class ModelPair:
    """The models of a run. They are read on first use."""

    spec: RunSpec
    device: str
    adapted_dir: Path | None = None
    card: Device = CPU

    @property
    def teacher_dir(self) -> Path:
        """The folder of the teacher's weights: the original, or a copy adapted to the rows."""
        return self.adapted_dir or self.spec.teacher_dir

    @cached_property
    def teacher(self) -> Reader:
        return Reader(read_config(self.spec.teacher_dir), _tokenizer(self.spec.teacher_dir))

    @cached_property
    def student(self) -> Reader:
        fresh = self.spec.distillation.student.config
        if fresh is not None:
            tokenizer = self.teacher.tokenizer
            return Reader(fresh_config(fresh, tokenizer), tokenizer)
        return Reader(read_config(self.spec.start_dir), _tokenizer(self.spec.start_dir))

    @property
    def student_dir(self) -> Path:
        """The folder of the student's tokenizer."""
        is_fresh = self.spec.distillation.student.config is not None
        return self.spec.teacher_dir if is_fresh else self.spec.start_dir

    @cached_property
    def has_one_tokenizer(self) -> bool:
        """True if both vocabularies are equal. Equal vocabulary sizes would not prove it."""
        return bool(self.teacher.tokenizer.get_vocab() == self.student.tokenizer.get_vocab())

    @cached_property
    def signal(self) -> Signal:
        """The teacher signal of the pair.

        Raises UnsupportedModel or TokenizerMismatch if the pair cannot use the requested signal.
        """
        return choose_signal(
            self.spec.distillation.objective.teacher_signal,
            kind_of(self.teacher.config),
            kind_of(self.student.config),
            has_one_tokenizer=self.has_one_tokenizer,
        )

    @cached_property
    def objective(self) -> Objective:
        """The requested objective, with its open choices filled in."""
        asked = self.spec.distillation.objective
        settled: dict[str, object] = {"teacher_signal": self.signal.name}
        if self.signal.has_ranks and not asked.ce_weight:
            settled["ce_weight"] = DEFAULT_CE_WEIGHT
        return asked.model_copy(update=settled)

    @cached_property
    def identity(self) -> str:
        """Hash of the teacher's weights and tokenizer."""
        return teacher_identity(self.teacher_dir, self.teacher.tokenizer)

    @cached_property
    def outputs_identity(self) -> str:
        """Hash of the teacher as it runs. Caches of its outputs depend on it."""
        return outputs_identity(self.identity, self.precision)

    @property
    def precision(self) -> TeacherPrecision | Auto:
        """The precision of the teacher's linear layers."""
        return self.spec.distillation.teacher_precision

    @property
    def answers_path(self) -> Path:
        """The file of the teacher's answers, shared by all jobs with this teacher and precision."""
        name = hashlib.sha256(self.outputs_identity.encode()).hexdigest()[:32]
        return self.spec.cache_dir / "answers" / f"{name}.jsonl"

    def load_teacher(self) -> PreTrainedModel:
        """Loads the teacher. If feature losses are used, one copy stays loaded and is shared."""
        if self.has_features:  # the feature losses keep it loaded
            return self._resident_teacher
        return self._load(self.card.matmul_dtype)

    def load_answering_teacher(self) -> PreTrainedModel:
        """Loads the teacher to generate answers. If feature losses are used, it is the shared copy."""
        if self.has_features:
            return self._resident_teacher
        return self._load(self.card.decoding_dtype)

    @cached_property
    def _resident_teacher(self) -> PreTrainedModel:
        return self._load(self.card.matmul_dtype)

    @cached_property
    def placement(self) -> Placement:
        """The placement of the teacher, assuming that the row cache can hold all of its rows."""
        return self._place(can_cache=self.spec.cache_bytes > 0)

    def _place(self, *, can_cache: bool) -> Placement:
        """Chooses a device and a dtype for the teacher.

        Feature losses run the teacher at every step, so they keep it on the student's device even if
        it may not fit.

        Raises UnsupportedPrecision if the teacher cannot be quantised as requested.
        """
        if self.precision != "auto":
            check_precision(self.precision, self.teacher.config, device=self.card.name)
        if self.card.name == "cpu":
            return on_cpu(Placement(self.card), self.precision)
        h = self.spec.distillation.hyperparameters

        def placed_with(micro_tokens: int) -> Placement:
            """Returns the placement for micro-batches of this size."""
            needs = self.needs(micro_tokens, can_cache=can_cache)
            if not self.spec.has_teacher:
                return place_alone(self.card, needs)
            placed = place(self.card, needs)
            if self.has_features and (placed.teacher_device == "cpu" or placed.is_teacher_first):
                dtype = teacher_dtypes(self.card, self.precision)[0]
                forced = Placement(self.card, "cuda", dtype, is_tight=True, has_checkpointing=True)
                return replace(forced, teacher_precision=self.precision, has_room_for_start=False)
            return placed

        most_tokens = DEVICE_BATCH_TOKENS if h.batch_tokens == "auto" else h.batch_tokens
        return place_largest(placed_with, most_tokens)

    def needs(self, micro_tokens: int, *, can_cache: bool) -> Needs:
        """Returns the estimated GPU memory with micro-batches of this size."""
        block = self.spec.distillation
        h, has_rollouts = block.hyperparameters, bool(sources_of(block))
        tokens = max(micro_tokens * (LONGEST_BATCH if has_rollouts else 1), h.max_sequence_tokens)
        is_divided = h.batch_tokens == "auto" or h.batch_rows is not None or has_rollouts
        needs = self._needs_of(tokens, is_divided or micro_tokens < batch_tokens_of(h))
        # rollouts are never in the row cache
        return replace(needs, can_cache=can_cache and not has_rollouts)

    @cached_property
    def _needs_of(self) -> Callable[[int, bool], Needs]:
        """See `needs_by_tokens`. The estimate is for the largest student of a ladder."""
        block = self.spec.distillation
        num_layers = max(block.student.ladder) if block.student.ladder else None
        recipe = plan_student(self.spec.teacher_dir, self.spec.start_dir, block.student, num_layers)
        return needs_by_tokens(
            self.card,
            recipe,
            self.student.config,
            self.teacher.config,
            row_tokens=block.hyperparameters.max_sequence_tokens,
            parts=planned_parts(block, signal=self.signal.name),
            teacher_precision=self.precision,
        )

    @property
    def micro_tokens(self) -> int:
        """Most tokens of a forward pass, including padding, unless a row is longer."""
        h = self.spec.distillation.hyperparameters
        return self.placement.micro_tokens or batch_tokens_of(h)

    def load_evaluated_teacher(self) -> PreTrainedModel:
        """Returns the teacher for the evaluation, on the placement's device and in its dtype.

        On a CPU it is loaded again, because the evaluation packs the weights of its models.
        """
        if self.card.name != "cpu":
            return self._load(self.card.matmul_dtype)
        return self._read(self.spec.teacher_dir)

    def _read(self, folder: Path) -> PreTrainedModel:
        """Reads a teacher's weights to the placement's device, in its precision and dtype."""
        device, dtype = self.placement.teacher_device, self.placement.teacher_dtype
        if self.precision != "auto":
            return load_quantized(folder, self.precision, device=device, dtype=dtype)
        teacher: PreTrainedModel = load_model(folder, dtype)
        return teacher.to(device)

    @cached_property
    def _loaded(self) -> WeakValueDictionary[str, PreTrainedModel]:
        """Weak reference to the loaded teacher, so that it is shared while it is in use."""
        return WeakValueDictionary()

    def _load(self, matmul_dtype: torch.dtype) -> PreTrainedModel:
        loaded = self._loaded.get("teacher")
        if loaded is not None and self.card.name != "cpu":  # two copies may not fit in GPU memory
            return loaded
        teacher = self._read(self.teacher_dir)
        prepare_for_inference(teacher, dtype=matmul_dtype, exact=teacher.get_output_embeddings())
        self._loaded["teacher"] = teacher
        return teacher.requires_grad_(False)

    @property
    def has_features(self) -> bool:
        """True if the objective compares hidden states or attention relations."""
        objective = self.spec.distillation.objective
        asked = objective.hidden is not None or objective.attention is not None
        return asked or self.signal.name == "hidden"

    def features(self, rows: Rows) -> FeaturePlan | None:
        """Returns the plan of the feature losses, or None if there are none.

        Raises TokenizerMismatch if the tokenizers differ.
        """
        objective = self.spec.distillation.objective
        if not self.has_features:
            return None
        if not self.has_one_tokenizer:
            raise TokenizerMismatch(
                "student and teacher have different tokenizers, so their hidden states belong to different tokens; leave "
                "objective.hidden and objective.attention out, or use a pair that shares a tokenizer"
            )
        hidden = objective.hidden or (None if objective.attention else HiddenTerm())
        return FeaturePlan(
            hidden, objective.attention, self.load_teacher, rows.teacher, self.spec.seed
        )

    def adapted(
        self, rows: Rows, batch_tokens: int, on_step: Callable[[int, int], None]
    ) -> "ModelPair":
        """Returns the pair with its teacher adapted to the training rows.

        Returns the pair itself if the objective needs no adaptation. `on_step` receives the steps
        done and planned.

        Raises UnsupportedModel if steps are requested for a teacher that is not a masked language
        model.
        """
        steps = self.spec.distillation.objective.adaptation_steps
        if steps == 0 or (steps == "auto" and self.signal.name != "conditional_mlm"):
            return self
        if kind_of(self.teacher.config) != "masked":
            raise UnsupportedModel(
                f"adaptation_steps needs a masked teacher (bert, roberta), and {self.teacher.config.model_type} is not "
                "one; leave it out"
            )
        adaptation = Adaptation(
            teacher_dir=self.spec.teacher_dir,
            identity=self.identity,
            mask_id=self.teacher.tokenizer.mask_token_id,
            rows=rows.teacher[: len(rows.train)],
            steps=steps,
            batch_tokens=batch_tokens,
            seed=self.spec.seed,
            device=self.device,
            autocast=self.card.autocast,
        )
        return replace(
            self, adapted_dir=adapt(adaptation, self.spec.cache_dir / "adapted", on_step)
        )

    def live_teacher(self, prefix: tuple[int, ...] = ()) -> Teacher:
        """Loads the teacher, wrapped to compute rows. All rows begin with `prefix`."""
        model = self.load_teacher()
        if kind_of(model.config) == "masked":
            return MaskedTeacher(model, self.teacher.tokenizer.mask_token_id)
        return LiveTeacher(model, prefix)

    def _aligned(self, rows: Rows) -> Aligned | None:
        if not self.signal.has_ranks:
            return None
        return align_rows(
            rows, self.student, self.teacher, has_one_tokenizer=self.has_one_tokenizer
        )

    def cached_teacher(self, rows: Rows, recipe: StudentRecipe) -> CachedTeacher:
        """Returns the teacher with its row cache. It serves students of all sizes of `recipe`.

        Raises TokenizerMismatch if no token of the student begins where one of the teacher's does.
        """
        aligned = self._aligned(rows)
        head = load_head(self.teacher_dir, len(self.teacher.tokenizer))
        bias_V = None if head.bias_V is None else head.bias_V.to(self.device)
        head = replace(
            head,
            weight_VH=head.weight_VH.to(self.device),
            bias_V=bias_V,
            body_dtype=self.card.matmul_dtype,
        )
        placed = self.placement
        examples = rows.teacher if aligned is None else aligned.examples
        is_causal = kind_of(self.teacher.config) == "causal" and placed.teacher_device == "cpu"
        prefix = shared_prefix(examples) if is_causal else ()
        identity = f"{self.outputs_identity}:{self.signal.name}:{placed.teacher_device}:{placed.teacher_dtype}"
        if self.card.matmul_dtype != torch.float32:
            identity += f":{self.card.precision}"
        teacher = cached_teacher(
            partial(self.live_teacher, prefix),
            head,
            folder=self.spec.cache_dir / "teacher",
            budget_bytes=self.spec.cache_bytes,
            identity=f"{identity}:{len(prefix)}" if prefix else identity,
            examples=examples,
            keeps="expected" if self._is_expectation_enough(recipe, head) else "hidden",
            may_keep_top=self._are_top_tokens_enough,
            hidden_dtype=placed.teacher_dtype,
            masks=None if aligned is None else aligned.masks,
        )
        teacher.notes = [*self._notes(aligned), *teacher.notes]
        if placed.is_teacher_first and not teacher.is_cached:
            # rows are computed during the training, so the teacher must stay loaded
            vars(self)["placement"] = self._place(can_cache=False)
        return teacher

    def _notes(self, aligned: Aligned | None) -> list[str]:
        notes = []
        if aligned is not None:
            notes.append(
                f"{aligned.share:.0%} of the student's tokens begin at the same position as a token of the teacher: "
                "distributions are compared there, and the other tokens are learned from the text only"
            )
        if self.objective.ce_weight != self.spec.distillation.objective.ce_weight:
            notes.append(
                f"objective.ce_weight is {self.objective.ce_weight}, because uld compares probabilities by rank, without "
                "their tokens; set it to another number above 0 to change the weight of the text"
            )
        return notes

    @property
    def _are_top_tokens_enough(self) -> bool:
        objective = self.spec.distillation.objective
        divergences = {objective.divergence, objective.then.divergence if objective.then else None}
        # a divergence of probabilities can be taken between buckets; logit_mse compares raw logits
        return self.signal.name == "logits" and "logit_mse" not in divergences

    def _is_expectation_enough(self, recipe: StudentRecipe, head: Head) -> bool:
        objective = self.spec.distillation.objective
        if self.signal.name != "logits":
            return False
        is_kl = objective.divergence == "forward_kl" and objective.temperature == 1.0
        is_kl = is_kl and objective.temperature_end in (None, 1.0)
        is_kl = is_kl and (objective.then is None or objective.then.divergence == "forward_kl")
        is_copied = recipe.freeze_head and head.softcap is None
        return is_kl and is_copied and is_head_of(recipe.start_dir, head)


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    return loaded
