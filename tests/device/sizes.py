"""Sizes that cases and their tests share. Without torch, which the tests need not import."""

NUM_ANSWER_TOKENS = 6  # of a rollout
