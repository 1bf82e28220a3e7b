"""The rules that keep the code easy to find and to change, as tests."""

import ast
import gc
import importlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.contracts.architectures import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("app", "worker")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_MODULES = 16  # in one folder
WORKER_MAY_IMPORT = {
    "app.artifact_cache",
    "app.contracts.architectures",
    "app.contracts.batch_plan",
    "app.contracts.control",
    "app.contracts.datasets",
    "app.contracts.distillation",
    "app.contracts.generation",
    "app.contracts.job_memory",
    "app.contracts.job_seconds",
    "app.contracts.memory.step_parts",
    "app.contracts.memory.teacher_weights",
    "app.contracts.messages",
    "app.contracts.model_files",
    "app.contracts.model_sizes",
    "app.contracts.planned_jobs",
    "app.contracts.run_limits",
    "app.contracts.train_workers",
    "app.crash_points",
    "app.db.checkpoints",
    "app.db.job_states",
    "app.db.jobs",
    "app.db.leases",
    "app.db.reconciliation",
    "app.db.registry.lineage",
    "app.db.schema.ids",
    "app.db.schema.retry_tables",
    "app.db.schema.tables",
    "app.db.schema.traffic_tables",
    "app.db.session",
    "app.db.traffic.completions",
    "app.db.traffic.datasets",
    "app.fast_imports",
    "app.local.process_manager",
    "app.local_copies",
    "app.log_config",
    "app.model_card",
    "app.parent_death",
    "app.settings",
    "app.storage",
    "app.tracing.generation",
    "app.tracing.spans",
}
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "base", "misc"}


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_no_file_is_longer_than_its_budget() -> None:
    lengths = {relative(p): len(p.read_text().splitlines()) for p in sources(*PACKAGES, "bench")}
    assert {name: n for name, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_no_function_is_longer_than_its_budget() -> None:
    long = [
        f"{relative(path)}:{node.lineno} {node.name}"
        for path in sources(*PACKAGES)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_no_folder_has_more_modules_than_its_budget() -> None:
    counts = Counter(relative(p.parent) for p in sources(*PACKAGES) if p.name != "__init__.py")
    assert {folder: n for folder, n in counts.items() if n > MAX_MODULES} == {}


def test_the_worker_takes_only_these_modules_from_app() -> None:
    taken = set()
    for node in (node for path in sources("worker") for node in ast.walk(tree(path))):
        if isinstance(node, ast.Import):
            taken |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = (ROOT / f"{full.replace('.', '/')}.py").exists()
                taken.add(full if is_module else node.module)
    assert {name for name in taken if name.split(".")[0] == "app"} - WORKER_MAY_IMPORT == set()


def test_only_the_cpu_package_knows_its_kernels() -> None:
    """The rest of the worker imports from `worker.cpu` itself, not from its modules."""
    inside = "worker/cpu/"
    allowed = {
        "worker/build_kernels.py": {"worker.cpu.kernels.build"},
        "worker/serve_worker.py": {"worker.cpu.thread_slices"},
    }
    found = {}
    for path in sources("worker"):
        modules = {
            node.module
            for node in ast.walk(tree(path))
            if isinstance(node, ast.ImportFrom) and node.module
        }
        inner = {name for name in modules if name.startswith("worker.cpu.")}
        if not relative(path).startswith(inside) and inner - allowed.get(relative(path), set()):
            found[relative(path)] = inner
    assert found == {}
    pattern = re.compile(r"import ctypes|torch\.ops\.(mkldnn|onednn)|num_parts|rounds_to")
    names = {relative(p) for p in sources("worker") if pattern.search(p.read_text())}
    assert {name for name in names if not name.startswith(inside)} == {
        "worker/build_kernels.py",
        "worker/fork_server.py",  # uses ctypes for another purpose
    }


def test_model_types_are_named_only_by_the_table_and_its_adapters() -> None:
    allowed = {
        "app/contracts/architectures.py",
        "app/contracts/distillation.py",  # families of fresh students, in these three as well
        "app/contracts/model_sizes.py",
        "app/services/fine_tuning/student_rules.py",
        "app/services/submission.py",
        "worker/cpu/llama_decoder.py",
        "worker/distill/losses/lm_head.py",
        "worker/distill/students/fresh.py",
        "worker/distill/students/layer_dropping.py",
        "worker/distill/students/width_pruning.py",
        "worker/models/architectures.py",
        "worker/models/gguf_reader.py",
        "worker/models/gguf_vocabulary.py",
        "worker/models/gguf_writer.py",
        "worker/serve/decoding/families.py",
    }
    types = ARCHITECTURES.keys() - {"encoder-decoder"}  # a kind of model rather than a family
    found = {
        relative(path)
        for path in sources(*PACKAGES)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in types
    }
    assert found - allowed == set()


def test_no_module_has_a_vague_name() -> None:
    assert [relative(p) for p in sources(*PACKAGES) if p.stem in VAGUE_NAMES] == []


def test_only_the_session_module_commits() -> None:
    allowed = {"app/db/session.py"}
    found = {relative(p) for p in sources(*PACKAGES) if re.search(r"\.commit\(\)", p.read_text())}
    assert found <= allowed


def test_sqlalchemy_is_imported_only_by_the_database_package() -> None:
    pattern = re.compile(r"^\s*(from|import) sqlalchemy", re.MULTILINE)
    found = [relative(p) for p in sources(*PACKAGES) if pattern.search(p.read_text())]
    assert [name for name in found if not name.startswith("app/db/")] == []


def test_the_environment_is_read_only_by_settings() -> None:
    # The others only pass an environment on to child processes.
    allowed = {
        "app/settings.py",
        "app/local/embedded_servers.py",
        "app/local/process_manager.py",
        "worker/fork_server.py",
    }
    pattern = re.compile(r"os\.(environ|getenv)")
    found = {relative(p) for p in sources(*PACKAGES) if pattern.search(p.read_text())}
    assert found <= allowed


def test_nothing_pickles_and_nothing_trusts_remote_code() -> None:
    pattern = re.compile(
        r"^\s*(import|from) (pickle|dill|joblib|cloudpickle)|torch\.(load|save)\(|trust_remote_code=True",
        re.MULTILINE,
    )
    assert [relative(p) for p in sources(*PACKAGES, "bench") if pattern.search(p.read_text())] == []


def test_the_schema_changes_only_in_migrations() -> None:
    pattern = re.compile(r"create_all|\b(CREATE|ALTER|DROP) TABLE", re.IGNORECASE)
    assert [relative(p) for p in sources(*PACKAGES) if pattern.search(p.read_text())] == []


def test_public_functions_are_annotated_and_modules_say_what_they_are() -> None:
    silent = [
        relative(p)
        for p in sources(*PACKAGES)
        if p.name != "__init__.py" and not ast.get_docstring(tree(p))
    ]
    assert silent == []


@pytest.mark.parametrize(
    "module",
    [
        "app.main",
        "app.commands.cli",
        "app.contracts.messages",
        "app.services.reconciler",
        "worker.jobs.lease_client",
    ],
)
def test_the_control_plane_leaves_torch_out(module: str) -> None:
    code = (
        f"import sys, {module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert run_python(code) == "[]"


def test_the_pure_libraries_leave_queue_and_database_out() -> None:
    code = (
        "import sys, worker.distill.training.trainer, worker.serve.engine;"
        "print([m for m in ('celery', 'redis', 'sqlalchemy', 'fastapi') if m in sys.modules])"
    )
    assert run_python(code) == "[]"


def test_import_contracts_are_kept() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command()",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_documentation_lists_every_setting() -> None:
    code = (
        "from app.settings import Settings\n"
        "for name, field in Settings.model_fields.items(): "
        "print(f'| `STILLHOUSE_{name.upper()}` |', field.description, sep='\\t')"
    )
    lines = (ROOT / "docs" / "settings.md").read_text().splitlines()
    fields = [line.split("\t") for line in run_python(code).splitlines()]
    missing = [
        name
        for name, meaning in fields
        if not any(line.startswith(name) and line.endswith(f"| {meaning} |") for line in lines)
    ]
    assert missing == []


def test_the_api_image_has_no_torch() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    app_stage = dockerfile.split("AS app", 1)[1].split("\nFROM", 1)[0]
    assert "worker]" not in app_stage
    assert "torch" not in app_stage


def test_the_garbage_collector_is_switched_on_again_after_imports() -> None:
    for path in sources(*PACKAGES):
        text = path.read_text()
        if "app.fast_imports import" in text:
            assert re.search(r"^ *imports_done\(\)$", text, re.MULTILINE), relative(path)
    importlib.import_module("worker.train")
    assert gc.isenabled()


def test_a_fixture_that_ends_with_its_folder_is_in_a_package() -> None:
    """Without `__init__.py`, pytest keeps a fixture of the scope "package" until the last test."""
    users = [p for p in sources("tests") if re.search(r'scope="package"\)', p.read_text("utf-8"))]
    assert users
    assert [p for p in users if not (p.parent / "__init__.py").exists()] == []
