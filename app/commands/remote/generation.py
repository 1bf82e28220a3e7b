"""`stillhouse generate` and `stillhouse chat`: answers of a model, streamed over HTTP."""

import sys
from typing import TYPE_CHECKING, Annotated, Final

import typer

from app.commands.remote.connection import over_http
from app.commands.remote.output import show_json
from app.commands.shell import Json, console, fail, messages

if TYPE_CHECKING:
    from app.commands.remote_service import RemoteService

COMPLETIONS: Final = "/v1/completions"
CHATS: Final = "/v1/chat/completions"

Model = Annotated[str, typer.Argument(help="Id, alias or checkpoint of the model.")]
Prompt = Annotated[
    str | None, typer.Argument(help="The prompt; - or nothing reads standard input.")
]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Greatest number of tokens of the answer.")
]
Temperature = Annotated[
    float | None, typer.Option(min=0.0, max=2.0, help="0 always takes the likeliest token.")
]
TopP = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Nucleus of the sampling.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the sampling.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the answer; repeatable.")]
IsJson = Annotated[bool, typer.Option("--json", help="Print the response as JSON, not streamed.")]


@over_http
def generate(
    service: "RemoteService",
    model: Model,
    prompt: Prompt = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Stop = None,
    is_json: IsJson = False,
) -> None:
    """Continues a text. The answer is printed while it is generated."""
    from app.commands.remote.answers import print_answer

    body = {"model": model, "prompt": read_prompt(prompt)}
    body |= sampling(max_tokens, temperature, top_p, seed, stop)
    if is_json:
        show_json(service.post(COMPLETIONS, body, is_long=True))
    else:
        print_answer(service, COMPLETIONS, body)


@over_http
def chat(
    service: "RemoteService",
    model: Model,
    prompt: Prompt = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Stop = None,
    is_json: IsJson = False,
) -> None:
    """Sends one chat message, or starts a conversation if there is no prompt on a terminal.

    In a conversation, Ctrl-C stops an answer, /clear forgets the messages, and Ctrl-D ends it.
    """
    from app.commands.remote.answers import converse, print_answer
    from app.commands.remote_service import model_path

    body: Json = {"model": model, **sampling(max_tokens, temperature, top_p, seed, stop)}
    first = [{"role": "system", "content": system}] if system is not None else []
    if prompt is None and sys.stdin.isatty() and console.is_terminal:
        if is_json:
            fail("--json prints one response; give a prompt")
        service.get(model_path(model))  # a wrong id or key ends the command here
        converse(service, body, first)
        return
    body["messages"] = [*first, {"role": "user", "content": read_prompt(prompt)}]
    if is_json:
        show_json(service.post(CHATS, body, is_long=True))
    else:
        print_answer(service, CHATS, body)


def sampling(
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    stop: list[str] | None,
) -> Json:
    """Returns the fields of the request for the options that were given."""
    fields = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": stop or None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def read_prompt(prompt: str | None) -> str:
    """Returns the prompt, from standard input if it is "-" or missing.

    Raises typer.BadParameter if standard input is a terminal or empty.
    """
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise typer.BadParameter("give a prompt, or send one to standard input")
    if sys.stdin.isatty() and messages.is_terminal:
        messages.print("Type the prompt, and end it with Ctrl-D:", style="dim")
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise typer.BadParameter("standard input is not UTF-8 text") from error
    if not text.strip():
        raise typer.BadParameter("standard input is empty; give a prompt")
    return text.removesuffix("\n")
