"""Sizes of the models, rows and batches of the GPU check: full, and toy sizes for a CPU."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama model whose head is tied to its embedding."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int

    @property
    def layer_parameters(self) -> int:
        """The parameters of all matmuls except the LM head."""
        key_value_size = self.hidden_size * self.num_key_value_heads // self.num_heads
        attention = 2 * self.hidden_size * (self.hidden_size + key_value_size)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)


@dataclass(frozen=True)
class Sizes:
    """Everything that differs between a check of a GPU and one at toy sizes.

    `kept_layers` are those of the student whose layers are fitted. It starts from `student`.
    """

    is_toy: bool
    teacher: Shape
    student: Shape
    vocab_size: int
    row_tokens: int
    batch_tokens: tuple[int, ...]
    num_warm: int
    num_timed: int
    kept_layers: int
    num_run_rows: int
    run_batch_tokens: int
    loss_rows: int
    callers: tuple[int, ...]
    new_tokens: int


FULL = Sizes(
    is_toy=False,
    teacher=Shape(4096, 11008, 32, 32, 32),  # 7B
    student=Shape(2048, 8192, 16, 32, 8),  # 1.24B
    vocab_size=128_256,
    row_tokens=512,
    batch_tokens=(4096, 16384),
    num_warm=4,
    num_timed=10,
    kept_layers=8,
    num_run_rows=256,
    run_batch_tokens=8192,
    loss_rows=4096,
    callers=(1, 32, 256),
    new_tokens=128,
)
TOY = Sizes(
    is_toy=True,
    teacher=Shape(64, 128, 4, 4, 2),
    student=Shape(32, 64, 4, 4, 2),
    vocab_size=512,
    row_tokens=48,
    batch_tokens=(96, 192),
    num_warm=4,
    num_timed=2,
    kept_layers=2,
    num_run_rows=16,
    run_batch_tokens=192,
    loss_rows=64,
    callers=(1, 4, 8),
    new_tokens=8,
)
