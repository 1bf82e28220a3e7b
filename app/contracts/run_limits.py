"""Numbers of a run that estimates depend on: how much it fits, answers, times and keeps."""

from typing import Final

# Layer fitting. More rows improve the fit, but cost more time than they save (bench/LOG.md).
FIT_ROWS: Final = 192
FIT_BYTES: Final = 2**30  # most memory of the recorded residual streams of the start model
# The choice of layers: their about 2,000 positions give the same choice as more.
CHOICE_ROWS: Final = 24
# Epochs whose batches are planned to count steps. Further epochs have as many on average.
MAX_PLANNED_EPOCHS: Final = 3
MAX_RUNNING: Final = 64  # sequences that are decoded together
NUM_ANSWERED: Final = 48  # held-out prompts that are answered, for ROUGE-L and the samples
# Held-out prompts that are answered if answers are labels: they are short, so more are needed.
NUM_CLASSIFIED: Final = 200
TOKENS_BEYOND_A_LABEL: Final = 8  # a longer answer is no label
MAX_LABELS: Final = 20
MAX_LABEL_TOKENS: Final = 8
ROWS_PER_LABEL: Final = 2  # minimum, on average
NUM_TIMED: Final = 8  # size of the batch whose decoding speed is measured
TIMED_TOKENS: Final = 96
WARM_UP_TOKENS: Final = 2
MAX_VALIDATION_ROWS: Final = 200
# Size of a chunk of logits in the loss. Smaller chunks make the matmul inefficient, larger ones
# only use memory.
CPU_CHUNK_BYTES: Final = 2**27
DEVICE_CHUNK_BYTES: Final = 2**28  # the same on a GPU
# Chunks that exist at the same time: the logits of both models, and intermediate results.
LOSS_CHUNKS: Final = 8
