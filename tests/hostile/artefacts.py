"""Strangers' model files, each made from a sound tiny model by one malicious change; none may run code or fill the memory."""

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Change = Callable[[Path], object]
Json = dict[str, Any]  # Any: JSON


class Payload:
    """What a pickle of it does when it is read: leaves a file behind."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.canary}",))


def canary_of(folder: Path) -> Path:
    return folder.parent / "canary"


def edited(name: str, **values: object) -> Change:
    """Sets keys of a JSON file."""

    def change(folder: Path) -> None:
        path = folder / name
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | values))

    return change


def replaced(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def pickled(name: str, protocol: int) -> Change:
    return lambda folder: (folder / name).write_bytes(
        pickle.dumps(Payload(canary_of(folder)), protocol)
    )


def archived(name: str) -> Change:
    """What torch.save writes: a zip with a pickle in it."""

    def change(folder: Path) -> None:
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Payload(canary_of(folder)), 2))

    return change


def zip_bomb(name: str) -> Change:
    def change(folder: Path) -> None:
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("config.json", bytes(50 * 2**20))

    return change


def reheaded(alter: Callable[[Json], object], *, tail: bytes = b"") -> Change:
    """Rewrites the header of the weights and leaves their data."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        (length,) = struct.unpack_from("<Q", content)
        header = json.loads(content[8 : 8 + length])
        altered = alter(header)
        new = altered if isinstance(altered, bytes) else json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :] + tail)

    return change


def first(header: Json) -> Json:
    entry: Json = header[min(name for name in header if name != "__metadata__")]
    return entry


def overlap(header: Json) -> None:
    names = sorted(name for name in header if name != "__metadata__")
    one, twin = next(
        (a, b) for a in names for b in names if a < b and header[a]["shape"] == header[b]["shape"]
    )
    header[twin]["data_offsets"] = header[one]["data_offsets"]


def doubled(header: Json) -> bytes:
    """The same tensor twice, the second one elsewhere."""
    name = min(name for name in header if name != "__metadata__")
    entry = {**header[name], "data_offsets": [0, 0], "shape": [0]}
    return (
        json.dumps(header).encode()[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}".encode()
    )


def sparse(name: str, size: int, begin: bytes) -> Change:
    """A file that is long and takes no disk."""

    def change(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.write(begin)
            file.truncate(size)

    return change


def shards_elsewhere(folder: Path) -> None:
    """An index whose shard lies outside the folder: another tenant's weights."""
    (folder / "model.safetensors").rename(folder.parent / "secret.safetensors")
    (folder / "model-00001-of-00001.safetensors").write_bytes(
        (folder.parent / "secret.safetensors").read_bytes()
    )
    content = (folder.parent / "secret.safetensors").read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    names = [name for name in json.loads(content[8 : 8 + length]) if name != "__metadata__"]
    index = {
        "metadata": {"total_size": 1},
        "weight_map": dict.fromkeys(names, "../../secret.safetensors"),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tokenizer(**parts: object) -> Change:
    return edited("tokenizer.json", **parts)


def vocabulary(**model: object) -> Change:
    def change(folder: Path) -> None:
        path = folder / "tokenizer.json"
        state = json.loads(path.read_text())
        state["model"] |= model
        path.write_text(json.dumps(state))

    return change


def template(text: str) -> Change:
    def change(folder: Path) -> None:
        (folder / "chat_template.jinja").write_text(text)

    return change


def linked(name: str, target: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


REPLACE_BOMB = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Replace", "pattern": {"String": "q"}, "content": "b" * 1000},
        {"type": "Replace", "pattern": {"String": "b"}, "content": "c" * 1000},
    ],
}
CATASTROPHE = {
    "type": "Split",
    "pattern": {"Regex": r"([A-Za-z .]+)+\x07"},
    "behavior": "Isolated",
    "invert": False,
}
ESCAPE = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
ESCAPES = (
    ESCAPE,
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ (messages|attr('__class__')) }}{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "{{ raise_exception.__globals__['__builtins__']['__import__']('os').system('touch CANARY') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ messages.append({'role': 'x'}) }}",
)
DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000

REFUSED: dict[str, Change] = {
    "pickle for weights, protocol 2": pickled("model.safetensors", 2),
    "pickle for weights, protocol 4": pickled("model.safetensors", 4),
    "pickle for weights, protocol 0": pickled("model.safetensors", 0),
    "torch archive for weights": archived("model.safetensors"),
    "pickle for config": pickled("config.json", 2),
    "pickle for tokenizer": pickled("tokenizer.json", 4),
    "pickle beside": pickled("pytorch_model.bin", 2),
    "script beside": replaced("modeling_llama.py", b"import os; os.system('touch canary')"),
    "zip bomb for config": zip_bomb("config.json"),
    "zip bomb for weights": zip_bomb("model.safetensors"),
    "auto_map": edited(
        "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    ),
    "auto_map below": edited(
        "tokenizer_config.json", extra=[{"auto_map": {"AutoTokenizer": ["evil.T", None]}}]
    ),
    "custom_code": edited("generation_config.json", custom_code=True),
    "header of 2^63 bytes": replaced("model.safetensors", struct.pack("<Q", 2**63) + b"{}"),
    "header of 2^40 bytes": replaced("model.safetensors", struct.pack("<Q", 2**40) + b"{}"),
    "header over the limit": sparse(
        "model.safetensors", 101 * 10**6 + 8, struct.pack("<Q", 101 * 10**6)
    ),
    "header empty": replaced("model.safetensors", struct.pack("<Q", 0)),
    "header nested deeply": reheaded(lambda header: DEEP),
    "header no UTF-8": reheaded(lambda header: b'{"\xff\xfe": 1}'),
    "weights cut short": lambda f: os.truncate(f / "model.safetensors", 5000),
    "weights with a tail": reheaded(lambda header: None, tail=b"PK\x03\x04"),
    "tensors overlap": reheaded(overlap),
    "tensors leave a gap": reheaded(lambda header: header.pop(max(header))),
    "tensor named twice": reheaded(doubled),
    "offsets negative": reheaded(lambda header: first(header).update(data_offsets=[-8, 8])),
    "offsets beyond": reheaded(lambda header: first(header).update(data_offsets=[0, 2**62])),
    "shape overflows": reheaded(lambda header: first(header).update(shape=[2**47] * 8)),
    "shape is too much for memory": reheaded(
        lambda header: first(header).update(shape=[2**40], data_offsets=[0, 2**42])
    ),
    "shape of text": reheaded(lambda header: first(header).update(shape=["1"])),
    "type unknown": reheaded(lambda header: first(header).update(dtype="OBJECT")),
    "shard outside the folder": shards_elsewhere,
    "config nested deeply": replaced("config.json", DEEP),
    "config no UTF-8": replaced("config.json", b'{"model_type": "\xff\xfe"}'),
    "config with a NUL": replaced("config.json", b'{"model_type": "llama\x00"}'),
    "config of a long number": replaced(
        "config.json", b'{"model_type": "llama", "vocab_size": ' + b"9" * 10_000 + b"}"
    ),
    "config of 1e999": replaced("config.json", b'{"model_type": "llama", "hidden_size": 1e999}'),
    "config of NaN": edited("config.json", hidden_size=float("nan")),
    "config over the limit": sparse("config.json", 200 * 2**20, b'{"model_type": "llama", "a": "'),
    "config of a million layers": edited("config.json", num_hidden_layers=10**6),
    "config of a thousand layers": edited("config.json", num_hidden_layers=1000, hidden_size=2**17),
    "config of a huge vocabulary": edited("config.json", vocab_size=2**40),
    "config of a large vocabulary": edited("config.json", vocab_size=2**22),
    "config of a large tied vocabulary": edited(
        "config.json", vocab_size=2**22, tie_word_embeddings=True
    ),
    "config of negative heads": edited("config.json", num_attention_heads=-4),
    "config of no heads": edited("config.json", num_attention_heads=0),
    "config with half a surrogate": replaced("config.json", b'{"model_type": "\\ud800"}'),
    "config is a list": replaced("config.json", b"[]"),
    "tokenizer that swells": tokenizer(normalizer=REPLACE_BOMB),
    "tokenizer with a huge post processor": tokenizer(
        post_processor={
            "type": "Sequence",
            "processors": [{"type": "ByteLevel", "pad": "a" * 10**6}],
        }
    ),
    "tokenizer nested deeply": replaced("tokenizer.json", DEEP),
    "tokenizer of an unknown model": vocabulary(type="Pickle"),
    "tokenizer of merges without tokens": vocabulary(merges=[["zz", "qq"]]),
    "tokenizer over the limit": sparse("tokenizer.json", 200 * 2**20, b"{"),
    "template over the limit": template("a" * 300_000),
    "template that never ends": template(
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    ),
    "template that fills the memory": template("{{ 'a' * 10000000000 }}"),
    "template that doubles": template(
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"
    ),
    "template that calls itself": template("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
    "template that reads a file": template("{% include '/etc/passwd' %}"),
    "template that imports": template("{% import 'os' as os %}{{ os.system('id') }}"),
    "template without end": template("{% for m in messages %}"),
    "link to a secret": linked("vocab.json", "/etc/passwd"),
    "link for weights": linked("model.safetensors", "../secret.safetensors"),
    "link to a device": linked("vocab.txt", "/dev/zero"),
    "pipe": lambda folder: os.mkfifo(folder / "vocab.json"),
    "folder inside": lambda folder: (folder / "more").mkdir(),
    "name with a line break": replaced("config\n.json", b"{}"),
} | {
    f"template that escapes, {number}": lambda folder, text=text: template(
        text.replace("CANARY", str(canary_of(folder)))
    )(folder)
    for number, text in enumerate(ESCAPES)
}

# What does no harm may come in, or not: it must only leave no trace.
HARMLESS: dict[str, Change] = {
    "config named twice": lambda folder: (folder / "config.json").write_bytes(
        (folder / "config.json").read_bytes().rstrip()[:-1] + b', "model_type": "llama"}'
    ),
    "tokenizer class of a stranger": edited("tokenizer_config.json", tokenizer_class="os.system"),
    "metadata of the weights": reheaded(
        lambda header: header.update(__metadata__={"format": "pt", "x": "y" * 10**6})
    ),
    "processor of a stranger": edited("tokenizer_config.json", processor_class="evil.Processor"),
    "tokenizer that never matches": tokenizer(pre_tokenizer=CATASTROPHE),
    "name with a backslash": replaced("..\\..\\evil.json", b"{}"),
    "template that formats what it must not see": template(
        "{% set f = '{0.__globals__}'.format %}{{ f(strftime_now) }}"  # comes out empty
    ),
    "token of a high number": tokenizer(added_tokens=[]),
}


def gguf(
    *, counts: tuple[int, int] = (0, 0), body: bytes = b"", version: int = 3, magic: bytes = b"GGUF"
) -> bytes:
    return magic + struct.pack("<IQQ", version, *counts) + body


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


ARCHITECTURE = entry(b"general.architecture", 8, text(b"llama"))
GGUFS: dict[str, bytes] = {
    "no GGUF": b"\x80\x04pickle",
    "empty": b"",
    "magic alone": b"GGUF",
    "of 2^63 tensors": gguf(counts=(2**63, 0)),
    "of 2^62 entries": gguf(counts=(0, 2**62)),
    "of a hundred thousand absent entries": gguf(counts=(0, 100_000)),
    "of a key of 2^63 bytes": gguf(counts=(0, 1), body=text(b"a", 2**63)),
    "of a text of 2^64-1 bytes": gguf(counts=(0, 1), body=entry(b"a", 8, text(b"b", 2**64 - 1))),
    "of an array of 2^60": gguf(counts=(0, 1), body=entry(b"a", 9, struct.pack("<IQ", 12, 2**60))),
    "of an array of texts": gguf(counts=(0, 1), body=entry(b"a", 9, struct.pack("<IQ", 8, 2**62))),
    "of arrays in arrays": gguf(counts=(0, 1), body=entry(b"a", 9, struct.pack("<IQ", 9, 2**20))),
    "of an unknown value": gguf(counts=(0, 1), body=entry(b"a", 77, b"")),
    "of 2^31 dimensions": gguf(
        counts=(1, 1), body=ARCHITECTURE + text(b"t") + struct.pack("<I", 2**31)
    ),
    "of a tensor that overflows": gguf(
        counts=(1, 1),
        body=ARCHITECTURE + text(b"t") + struct.pack("<IQQQQIQ", 4, *[2**63] * 4, 0, 0),
    ),
    "of a tensor far away": gguf(
        counts=(1, 1), body=ARCHITECTURE + text(b"t") + struct.pack("<IQIQ", 1, 4, 0, 2**64 - 8)
    ),
    "of alignment 0": gguf(
        counts=(0, 1), body=entry(b"general.alignment", 4, struct.pack("<I", 0))
    ),
    "of a text for its alignment": gguf(
        counts=(0, 1), body=entry(b"general.alignment", 8, text(b"32"))
    ),
    "big-endian": gguf(version=3 << 24),
    "no UTF-8": gguf(counts=(0, 1), body=entry(b"\xff\xfe", 8, text(b"\xff\xfe"))),
    "of a llama without anything": gguf(
        counts=(0, 2), body=ARCHITECTURE + entry(b"tokenizer.ggml.model", 8, text(b"llama"))
    ),
    "of a llama of a huge vocabulary": gguf(
        counts=(0, 3),
        body=ARCHITECTURE
        + entry(b"tokenizer.ggml.model", 8, text(b"llama"))
        + entry(b"llama.vocab_size", 4, struct.pack("<I", 2**31)),
    ),
}
