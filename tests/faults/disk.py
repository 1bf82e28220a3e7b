"""Faults of the disk under a checkpoint: killed while writing, changed afterwards, or full.

The trials run in a process of their own that has loaded torch once and forks for each of them. A full disk is a real
one: a small tmpfs in a mount namespace of that process.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from tests.faults.system import ROOT
from tests.faults.trial import Figures

SAYS: Final = {
    "checkpoint_kills": "a process is killed while it writes a checkpoint",
    "corruption": "a damaged checkpoint is detected",
    "disk_full": "the disk is full while a checkpoint is written",
}
TARGETS: Final = {"checkpoint_kills": 300, "corruption": 50, "disk_full": 50}
MINUTES: Final = {"checkpoint_kills": 4.0, "corruption": 1.0, "disk_full": 3.0}
SHORT: Final = {"checkpoint_kills": 30, "corruption": 15, "disk_full": 8}
DISK_MIB: Final = 24


def run(name: str, folder: Path, *, seed: int, is_short: bool) -> Figures:
    """Runs the trials in their process and gives their figures."""
    place = folder / name
    place.mkdir(exist_ok=True)
    words = [sys.executable, "-m", "tests.faults.disk", name, str(place), str(seed)]
    words.append(str(SHORT[name] if is_short else TARGETS[name]))
    if name == "disk_full":
        mount = f'mount -t tmpfs -o size={DISK_MIB}m tmpfs {place} && exec "$@"'
        words = ["unshare", "-Urm", "sh", "-c", mount, "sh", *words]
    began = time.monotonic()
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1800
    )
    if done.returncode:
        return Figures(name, target=TARGETS[name], wrongs=[f"it did not run: {done.stderr[-600:]}"])
    told = json.loads(done.stdout.splitlines()[-1])
    figures = Figures(name, **told, target=TARGETS[name], lost=len(told["wrongs"]))
    figures.seconds = time.monotonic() - began
    return figures


def kill_while_writing(folder: Path, rng: random.Random, count: int) -> dict[str, Any]:
    """Forks a writer of checkpoint after checkpoint and kills it. Every named folder must be whole.

    The delay before a kill follows the time of one write here, so that some writes are completed.
    """
    from transformers.utils import logging as transformers_logging

    from worker.distill.training.checkpoint import load_state, save_checkpoint
    from worker.errors import CorruptCheckpoint

    # As in the run process. The lock of the bars is shared with forked processes: a writer that is
    # killed while it holds the lock would block all that follow.
    transformers_logging.disable_progress_bar()
    make = _snapshots()
    save_checkpoint(folder, make(1))
    began = time.monotonic()
    if (child := os.fork()) == 0:  # as the writers below: a fork of a large process takes a while
        with contextlib.suppress(BaseException):
            save_checkpoint(folder, make(2))
        os._exit(0)
    os.waitpid(child, 0)
    save_seconds = time.monotonic() - began
    wrongs, first, newest, num_partial = [], 2, 2, 0
    for _ in range(count):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                for step in range(newest + 1, newest + 1000):
                    save_checkpoint(folder, make(step))
            os._exit(1)
        time.sleep(rng.uniform(0.0, 6 * save_seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        num_partial += any(folder.glob(".*.partial"))
        steps = sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))
        for step in steps:
            try:
                found = load_state(folder / f"step-{step}").step
            except CorruptCheckpoint as error:
                wrongs.append(str(error))
                continue
            if found != step:
                wrongs.append(f"step-{step} holds step {found}")
        if newest and newest not in steps:
            wrongs.append(f"step-{newest} is gone")
        newest = steps[-1] if steps else newest
        for step in steps[:-1]:
            shutil.rmtree(folder / f"step-{step}")
    if newest == first:
        wrongs.append("no writer completed a checkpoint before it was killed")
    return {
        "faults": count,
        "accepted": newest,
        "wrongs": wrongs,
        "notes": {"caught_half_written": num_partial},
    }


def corrupt(folder: Path, rng: random.Random, count: int) -> dict[str, Any]:
    """Changes one stored checkpoint in some way, and asks both guards: the store's and the trainer's."""
    from app.storage import Store
    from worker.distill.training.checkpoint import save_checkpoint, verify_checkpoint
    from worker.errors import CorruptCheckpoint

    store = Store(str(folder / "store"))
    good = save_checkpoint(folder, _snapshots()(1))
    wrongs, ways = [], {"flip": 0, "cut": 0, "append": 0, "remove": 0, "swap": 0}
    for number in range(count):
        key = f"checkpoints/job/{number}/step-1"
        ref = store.put_folder(good, key)
        if not store.verify_folder(key, ref.sha256):
            wrongs.append(f"{key} is refused though nothing was changed")
        stored = store.fetch_folder(ref, folder)
        files = sorted(path for path in stored.rglob("*") if path.is_file() and path.stat().st_size)
        path, way = rng.choice(files), rng.choice(list(ways))
        ways[way] += 1
        _damage(path, way, rng, files)
        with contextlib.suppress(CorruptCheckpoint):
            verify_checkpoint(stored)
            if path.name != "_manifest.json" and not (
                way == "swap" and path.name == "_manifest.json"
            ):
                wrongs.append(f"the trainer takes {path.relative_to(stored)} after {way}")
        if store.verify_folder(key, ref.sha256):
            wrongs.append(f"the store takes {path.relative_to(stored)} after {way}")
        store.delete(key)
    return {"faults": count, "accepted": count, "wrongs": wrongs, "notes": ways}


def _damage(path: Path, way: str, rng: random.Random, files: list[Path]) -> None:
    content = bytearray(path.read_bytes())
    if way == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif way == "cut":
        del content[rng.randrange(len(content)) :]
    elif way == "append":
        content.append(0)
    elif way == "swap":
        other = rng.choice([file for file in files if file.read_bytes() != bytes(content)])
        content = bytearray(other.read_bytes())
    path.unlink()
    if way != "remove":
        path.write_bytes(content)


def fill(folder: Path, rng: random.Random, count: int) -> dict[str, Any]:
    """Leaves a checkpoint too little room, at a random place of it; the one before must stay whole."""
    from worker.distill.training import checkpoint
    from worker.errors import DiskFull

    make = _snapshots()
    out, ballast = folder / "out", folder / "ballast"
    needed = shutil.disk_usage(folder).free
    checkpoint.SPARE_BYTES = 0  # so that the room gives out while it is written, not before
    before = checkpoint.save_checkpoint(out, make(1))
    needed -= shutil.disk_usage(folder).free
    wrongs, during = [], 0
    for number in range(count):
        free = shutil.disk_usage(folder).free
        is_early = number % 5 == 0  # the check before writing must notice; else the writing itself
        checkpoint._require_room = (lambda *_: None) if not is_early else _require_room  # type: ignore[assignment]
        ballast.write_bytes(bytes(free - rng.randrange(needed - 65536) // 4096 * 4096))
        try:
            checkpoint.save_checkpoint(out, make(2))
            wrongs.append("a checkpoint was written where there was no room for it")
            shutil.rmtree(out / "step-2", ignore_errors=True)
        except DiskFull:
            during += not is_early
        except Exception as error:  # noqa: BLE001  # any other error is what this looks for
            wrongs.append(f"a full disk shows as {type(error).__name__}: {error}")
        ballast.unlink(missing_ok=True)
        left = sorted(path.name for path in out.iterdir())
        if left != ["step-1"]:
            wrongs.append(f"left behind: {left}")
            shutil.rmtree(out / ".step-2.partial", ignore_errors=True)
        checkpoint.verify_checkpoint(before)
    return {"faults": count, "accepted": 1, "wrongs": wrongs, "notes": {"while_writing": during}}


def _require_room(*arguments: Any) -> None:
    _ORIGINAL["require_room"](*arguments)


_ORIGINAL: dict[str, Any] = {}  # Any: the function that `fill` switches off now and then


def _snapshots() -> Any:  # Any: a function of worker types, which must not be imported at the top
    """Gives a function that makes the snapshot of a step, of a tiny model with an optimizer that has moved."""
    import torch

    from tests.tiny import tiny_config, tiny_tokenizer
    from worker.distill.training import checkpoint

    _ORIGINAL["require_room"] = checkpoint._require_room
    import transformers

    torch.set_num_threads(1)
    tokenizer = tiny_tokenizer("chat")
    model = transformers.AutoModelForCausalLM.from_config(
        tiny_config("llama", tokenizer, 2), dtype=torch.float32
    )
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()

    def make(step: int) -> checkpoint.Snapshot:
        return checkpoint.Snapshot(checkpoint.TrainState(step=step), model, tokenizer, optimizer)

    return make


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.disk", description=__doc__)
    parser.add_argument("name", choices=SAYS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("seed", type=int)
    parser.add_argument("count", type=int)
    asked = parser.parse_args()
    trials = {"checkpoint_kills": kill_while_writing, "corruption": corrupt, "disk_full": fill}
    told = trials[asked.name](
        asked.folder, random.Random(f"{asked.seed}-{asked.name}"), asked.count
    )
    print(json.dumps(told))


if __name__ == "__main__":
    main()
