"""Model card: a README.md with the YAML front matter of the Hugging Face Hub.

It says how a model was made, from what, with which figures, and how to use it.
"""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import yaml

from app.contracts.messages import ModelFacts

CARD: Final = "README.md"
Json = dict[str, Any]  # Any: results and recipes are open-ended JSON
LIBRARIES: Final = ("stillhouse", "torch", "transformers", "tokenizers", "safetensors")
TASKS: Final = {
    "causal": "text-generation",
    "seq2seq": "text2text-generation",
    "masked": "fill-mask",
}
CLASSES: Final = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "masked": "AutoModelForMaskedLM",
}
# Parts of a job's specification that are no recipe: references to artifacts, and names.
REFERENCES: Final = frozenset(
    {"kind", "output_model", "teacher", "start", "training_file", "validation_file", "test_file"}
)
# Entries of a result. A supervised job has `before` and `after`.
MODELS: Final = ("teacher", "untrained", "ce_baseline", "student", "before", "after")
MAX_METRICS: Final = 12
UNKNOWN: Final = "unknown"


@dataclass(frozen=True)
class Ancestor:
    """An imported model that the model descends from, with its source and licence if known."""

    model_id: str
    source: str | None
    license: str | None


@dataclass(frozen=True)
class DataFile:
    """A file of rows that a job read. Its name is left out, because a card may become public."""

    role: str
    num_rows: int | None
    sha256: str


@dataclass(frozen=True)
class ModelCard:
    """Content of a card. `spec` is the specification of the job that made the model.

    `start` is the model that training started from. `result` is the public result of the job.
    """

    model_id: str
    facts: ModelFacts
    made_on: date
    teacher: str | None = None
    start: str | None = None
    result: Json = field(default_factory=dict)
    spec: Json = field(default_factory=dict)
    files: tuple[DataFile, ...] = ()
    ancestors: tuple[Ancestor, ...] = ()
    trained_tokens: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def render(self) -> str:
        """Returns the card as Markdown."""
        parts = [
            f"---\n{yaml.safe_dump(self._front_matter(), sort_keys=False, allow_unicode=True)}---",
            f"# {_inline(self.model_id)}",
            self._summary(),
            self._origin(),
            self._data(),
            self._figures(),
            self._recipe(),
            self._usage(),
            self._libraries(),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _front_matter(self) -> Json:
        licenses = sorted({ancestor.license or UNKNOWN for ancestor in self.ancestors})
        matter: Json = {"library_name": "transformers", "pipeline_tag": TASKS[self.facts.family]}
        if len(licenses) == 1 and licenses != [UNKNOWN]:
            matter["license"] = licenses[0]
        elif licenses and licenses != [UNKNOWN]:
            matter |= {"license": "other", "license_name": " and ".join(licenses)}
        bases = sorted(
            {
                ancestor.source.removeprefix("hf:").partition("@")[0]
                for ancestor in self.ancestors
                if ancestor.source is not None and ancestor.source.startswith("hf:")
            }
        )
        if bases:
            matter["base_model"] = bases
        matter["tags"] = ["stillhouse", "distillation"] if self.teacher else ["stillhouse"]
        return matter

    def _summary(self) -> str:
        facts = self.facts
        layers = f"{facts.num_layers} layers"
        if facts.num_encoder_layers is not None:
            layers = f"{facts.num_encoder_layers} encoder and {facts.num_layers} decoder layers"
        how = "imported into" if not self.start else "trained with"
        if self.teacher:
            how = "distilled with"
        return (
            f"A {facts.architecture} model with {facts.num_parameters / 1e6:,.1f} million parameters, {layers}, "
            f"a vocabulary of {facts.vocab_size:,} and a context of {facts.context_tokens:,} tokens. "
            f"It was {how} Stillhouse on {self.made_on.isoformat()}."
        )

    def _origin(self) -> str:
        rows = []
        if self.teacher:
            rows.append(f"- Teacher: `{_inline(self.teacher)}`")
        if self.start:
            rows.append(f"- Start model: `{_inline(self.start)}`")
        for ancestor in self.ancestors:
            source = f", from `{_inline(ancestor.source)}`" if ancestor.source else ""
            name = "" if ancestor.model_id == self.model_id else f" `{_inline(ancestor.model_id)}`"
            rows.append(
                f"- Imported model{name}{source}: licence {_inline(ancestor.license or UNKNOWN)}"
            )
        return "## Origin\n\n" + "\n".join(rows) if rows else ""

    def _data(self) -> str:
        if not self.files:
            return ""
        rows = [
            f"| {file.role} | {UNKNOWN if file.num_rows is None else f'{file.num_rows:,}'} | `{file.sha256}` |"
            for file in self.files
        ]
        table = "\n".join(["| file | rows | SHA-256 |", "|---|---|---|", *rows])
        tokens = self.trained_tokens
        trained = f"\n\nTrained on {tokens:,} tokens, repetitions included." if tokens else ""
        return f"## Data\n\n{table}{trained}"

    def _figures(self) -> str:
        entries = {
            name: entry for name in MODELS if isinstance(entry := self.result.get(name), dict)
        }
        own = entries.get("student") or entries.get("after", {})
        intervals = own.get("intervals")
        metrics = [name for name in own if isinstance(intervals, dict) and name in intervals]
        if not metrics:
            return ""
        names = list(entries)
        head = [f"| metric | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        rows = [
            f"| {_inline(metric)} | {' | '.join(_figure(entries[name], metric) for name in names)} |"
            for metric in metrics[:MAX_METRICS]
        ]
        note = "Measured on held-out rows, with 95% intervals."
        return "\n".join(["## Figures", "", note, "", *head, *rows])

    def _recipe(self) -> str:
        recipe = {name: value for name, value in self.spec.items() if name not in REFERENCES}
        block = recipe.get("distillation")
        if recipe.get("method") == "supervised" and isinstance(block, dict):
            recipe["distillation"] = {k: v for k, v in block.items() if k != "teacher"}
        if not self.start or not recipe:
            return ""
        text = yaml.safe_dump(_without_null(recipe), sort_keys=False, allow_unicode=True)
        return f"## Recipe\n\n```yaml\n{text.replace('```', '` ` `')}```"

    def _usage(self) -> str:
        kind = CLASSES[self.facts.family]
        load = "\n".join(
            [
                "```python",
                f"from transformers import AutoTokenizer, {kind}",
                "",
                'folder = "."  # the folder with this file',
                "tokenizer = AutoTokenizer.from_pretrained(folder)",
                f'model = {kind}.from_pretrained(folder, dtype="auto")',
                "```",
            ]
        )
        serve = "\n".join(
            [
                "```sh",
                "stillhouse models import . --name my-model   # in a terminal, beside `stillhouse up`",
                'curl http://127.0.0.1:8400/v1/completions -H "Authorization: Bearer $KEY" \\',
                '  -H \'content-type: application/json\' -d \'{"model": "my-model", "prompt": "Hello"}\'',
                "```",
            ]
        )
        served = f"\n\nTo serve it:\n\n{serve}" if self.facts.family != "masked" else ""
        return f"## Use\n\nTo load it:\n\n{load}{served}"

    def _libraries(self) -> str:
        if not self.versions:
            return ""
        named = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return f"## Versions\n\n{named}"


def library_versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that are installed here."""
    versions = {"Python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _figure(entry: Json, metric: str) -> str:
    value, intervals = entry.get(metric), entry.get("intervals")
    if not isinstance(value, int | float):
        return ""
    span = intervals.get(metric) if isinstance(intervals, dict) else None
    if isinstance(span, list) and len(span) == 2 and all(isinstance(x, int | float) for x in span):
        return f"{value:.4g} ({span[0]:.4g} to {span[1]:.4g})"
    return f"{value:.4g}"


def _inline(text: str) -> str:
    """Returns text that cannot end the Markdown line or the cell that it is in."""
    return "".join(c if c.isprintable() and c not in "|`<>" else " " for c in text)[:300]


def _without_null(value: Any) -> Any:  # Any: JSON in, JSON out
    if isinstance(value, dict):
        return {name: _without_null(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_null(item) for item in value]
    return value
