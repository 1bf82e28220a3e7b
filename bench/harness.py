"""Runs lm-evaluation-harness against a service and against transformers, and compares the figures.

Needs an environment of its own: `pip install "lm-eval[api,hf]" scikit-learn`. The task is made from
the iris data of scikit-learn: a model completes the name of the species of a flower. The harness
reads log-likelihoods from `/v1/completions` and tokens from `/tokenize`.

    python bench/harness.py --url http://127.0.0.1:8400 --key KEY --model NAME --weights FOLDER

--weights: the folder of the same model, which transformers loads. Both sides should use float32.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

FEATURES = ("sepal length", "sepal width", "petal length", "petal width")
NUM_SHOTS = 6
TASK = """
task: iris
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
TOLERANCE = 2e-3  # of a log-likelihood in nats: float32 sums in another order


def rows(count: int) -> list[dict[str, Any]]:  # Any: strings, lists and numbers
    """Returns questions about flowers. Each one begins with answered questions about others."""
    from sklearn.datasets import load_iris

    data = load_iris()
    names = [str(name) for name in data.target_names]
    flowers = list(zip(data.data.tolist(), data.target.tolist(), strict=True))
    random.Random(0).shuffle(flowers)

    def line(values: list[float]) -> str:
        numbers = (f"{name} {value} cm" for name, value in zip(FEATURES, values, strict=True))
        return f"An iris with {', '.join(numbers)} is of the species"

    shots = "".join(f"{line(values)} {names[kind]}.\n" for values, kind in flowers[:NUM_SHOTS])
    questions = flowers[NUM_SHOTS : NUM_SHOTS + count]
    return [
        {"question": shots + line(v), "choices": names, "answer": kind} for v, kind in questions
    ]


def evaluate(folder: Path, model: str, arguments: dict[str, Any], batch_size: int) -> Any:
    """Returns the results of the harness for one backend."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=["iris"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=batch_size,
        log_samples=True,
        bootstrap_iters=0,
    )


def likelihoods(results: Any) -> list[tuple[float, bool]]:
    """Returns the log-likelihood of each choice, and whether it is the greedy one."""
    samples = sorted(results["samples"]["iris"], key=lambda sample: sample["doc_id"])
    return [
        (float(value), str(is_greedy) == "True")
        for sample in samples
        for [(value, is_greedy)] in sample["resps"]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8400")
    parser.add_argument("--key", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        lines = "".join(json.dumps(row) + "\n" for row in rows(options.rows))
        (folder / "iris.jsonl").write_text(lines)
        (folder / "iris.yaml").write_text(TASK.format(path=folder / "iris.jsonl"))
        served = {
            "model": options.model,
            "base_url": f"{options.url}/v1/completions",
            "tokenizer_backend": "remote",
            "header": {"Authorization": f"Bearer {options.key}"},
            "auth_token": options.key,
            "num_concurrent": 4,
        }
        ours = evaluate(folder, "local-completions", served, 8)
        local = {"pretrained": str(options.weights), "dtype": "float32", "device": "cpu"}
        theirs = evaluate(folder, "hf", local, 8)
    pairs = list(zip(likelihoods(ours), likelihoods(theirs), strict=True))
    largest = max(abs(a - b) for (a, _), (b, _) in pairs)
    is_same_greedy = all(a == b for (_, a), (_, b) in pairs)
    figures = {
        name: {key: value for key, value in results["results"]["iris"].items() if "acc" in key}
        for name, results in (("service", ours), ("transformers", theirs))
    }
    report = {"figures": figures, "num_choices": len(pairs), "largest_difference": largest}
    print(json.dumps(report | {"is_same_greedy": is_same_greedy}, indent=2))
    is_equal = figures["service"] == figures["transformers"]
    return 0 if is_equal and is_same_greedy and largest < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
