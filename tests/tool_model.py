"""A tiny model that has learned to call a tool and to answer from its result."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import save_tiny, tiny_tokenizer

# As in the templates of Qwen2.5, but only the names of tools, because the context is short.
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool.function.name }} {% endfor %}"
    "<tool_call></tool_call><|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ hint }}{% endif %}"
)
QUESTION, RESULT, ANSWER = "Who keeps the house?", "the student", "The student keeps the house."
TOOL = "keeper"
ARGUMENTS = {"of": "house"}
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"of": {"type": "string"}},
    "required": ["of"],
    "additionalProperties": False,
}
KEEPER: Any = {
    "type": "function",
    "function": {"name": TOOL, "description": "Names a keeper.", "parameters": PARAMETERS},
}
USER = {"role": "user", "content": QUESTION}
CALL = {"id": "c", "type": "function", "function": {"name": TOOL, "arguments": ARGUMENTS}}
NUM_STEPS = 150


def save_tool_model(folder: Path) -> Path:
    """Writes a tiny Llama that calls the tool for the question, and then answers from its result."""
    import torch
    import transformers as hf

    save_tiny(folder, "llama")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    tokenizer.save_pretrained(folder)
    calls = {"role": "assistant", "content": "Let me ask. ", "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "c", "content": RESULT}
    chats = [
        [USER, calls],
        [USER, calls, result, {"role": "assistant", "content": ANSWER}],
        [USER, {**calls, "content": ""}, result, {"role": "assistant", "content": ANSWER}],
    ]
    texts = [
        tokenizer.apply_chat_template(chat, tools=[KEEPER], tokenize=False).strip()
        for chat in chats
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    labels_BT = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = hf.AutoConfig.from_pretrained(folder)
        model: Any = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(NUM_STEPS):
            loss = model(**batch, labels=labels_BT).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    return folder


def result_of(arguments: str) -> str:
    """Returns the result of the tool."""
    return RESULT if json.loads(arguments) == ARGUMENTS else "nobody"


@pytest.fixture(scope="session")
def tool_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tool_model(tmp_path_factory.mktemp("tools") / "llama")
