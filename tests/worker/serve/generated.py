"""What `generate()` answers to one prompt at a time, and the engine to the same prompts together."""

import random
from collections.abc import Callable, Sequence

import torch

from app.contracts.generation import Done, GenerateRequest, Reply
from worker.serve.engine import Engine
from worker.serve.loading import LoadedModel

Make = Callable[..., GenerateRequest]
TextOf = Callable[..., str]
Asked = dict[str, tuple[tuple[int, ...], int]]  # prompt and number of tokens of each request


def generated(loaded: LoadedModel, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What the model's own generate() gives greedily for one prompt, the end token included."""
    inputs = torch.tensor([list(prompt)])
    with torch.no_grad():
        output = loaded.model.generate(  # type: ignore[operator]  # a method, typed as a tensor
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=num_tokens,
            do_sample=False,
        )
    # an encoder-decoder repeats its start token, any other model the prompt
    begin = 1 if loaded.model.config.is_encoder_decoder else len(prompt)  # type: ignore[union-attr]
    tokens: list[int] = output[0, begin:].tolist()
    return tokens


def answer_all(engine: Engine, make_request: Make, asked: Asked) -> list[Reply]:
    """All replies, while requests arrive at random and another one is aborted now and then."""
    rng = random.Random(1)
    arrivals, replies = list(asked.items()), []
    while arrivals or engine.has_work():
        if arrivals and rng.random() < 0.4:
            name, (prompt, num_tokens) = arrivals.pop()
            engine.add(make_request(name, tokens=prompt, max_tokens=num_tokens))
        if rng.random() < 0.1:
            engine.add(make_request("leaver", tokens=(9, 8, 7), max_tokens=30))
            replies += engine.step()
            engine.abort("leaver")
        replies += engine.step()
    return replies


def demand_texts_of_generate(
    replies: list[Reply], loaded: LoadedModel, asked: Asked, text_of: TextOf
) -> None:
    for name, (prompt, num_tokens) in asked.items():
        expected = generated(loaded, prompt, num_tokens)
        shown = loaded.tokenizer.decode(
            expected, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert text_of(replies, name) == shown
        done = next(reply for reply in replies if isinstance(reply, Done) and reply.id == name)
        assert (done.prompt_tokens, done.completion_tokens) == (len(prompt), len(expected))
