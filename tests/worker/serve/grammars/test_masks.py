"""Masks allow exactly the tokens that the matcher accepts when they are tried one by one."""

import copy
import json
import random
from typing import Any

import pytest
import torch

from app.contracts.generation import Grammar
from worker.serve.engine import end_ids
from worker.serve.grammars.compiler import GrammarCompiler
from worker.serve.grammars.constraint import Constraint
from worker.serve.grammars.masks import compute_ahead, mask_logits
from worker.serve.loading import LoadedModel
from worker.serve.text.detokenizer import TokenText

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "kind": {"enum": ["jar", "蒸馏"]}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}
GRAMMARS = (
    Grammar(kind="json_schema", text=json.dumps(SCHEMA)),
    Grammar(kind="regex", text="(lamp|jar) ?[a-z]{0,3}"),
)


def tried(constraint: Constraint, num_tokens: int) -> set[int]:
    """Tokens that a copy of the matcher accepts, each tried alone."""
    ends = constraint.vocabulary.end_ids
    if constraint.matcher.is_stopped():
        return set(ends)
    offset = constraint.vocabulary.first_offset if constraint.is_first else 0
    accepted = {
        token
        for token in set(range(num_tokens)) - ends
        if constraint.matcher.deep_copy().consume_token(offset + token)
    }
    return accepted | (set(ends) if constraint.matcher.is_accepting() else set())


@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda grammar: grammar.kind)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert2bert"])
def test_a_mask_allows_the_tokens_that_the_matcher_accepts(
    family: str, grammar: Grammar, request: pytest.FixtureRequest
) -> None:
    loaded: LoadedModel = request.getfixturevalue(family)
    config: Any = loaded.model.config  # transformers is untyped here
    num_logits = config.get_text_config(decoder=True).vocab_size
    compiler = GrammarCompiler(
        TokenText(loaded.tokenizer), num_logits=num_logits, end_ids=end_ids(loaded.model)
    )
    compiler.compile(grammar)
    constraint = compiler.constraint(grammar, ())
    ends, rng = constraint.vocabulary.end_ids, random.Random(1)
    for step in range(100):
        expected = tried(constraint, num_logits)
        if step % 2:
            compute_ahead([constraint])
        logits_3V = torch.zeros(3, num_logits)
        mask_logits(logits_3V, [constraint, None, copy.deepcopy(constraint)], keeps_logits=False)
        allowed, free, allowed_to_copy = (
            set(row.isfinite().nonzero()[:, 0].tolist()) for row in logits_3V
        )
        assert allowed == allowed_to_copy == expected, step
        assert free == set(range(num_logits))
        assert constraint.fault is None
        if step % 3 == 0:
            compute_ahead([constraint])  # a mask that is never asked for
        if allowed <= ends:
            return
        constraint.record(rng.choice(sorted(allowed - ends)))
    pytest.fail("the answer did not end")
