"""``quantize`` and ``train`` on quantised leaves, killed at any moment: the same command finishes with the same result."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from cli_story import Story, metrics
from parity import randomise
from quantised_dirs import CHOICES, SHAPE, bits, family
from torch import Tensor

from elastic_megatron import runtime
from elastic_megatron.blocks import build_elastic_model
from elastic_megatron.checkpoint import distributed, integrity, tracker
from elastic_megatron.checkpoint.manifest import FILE, Manifest
from elastic_megatron.checkpoint.torch_dist import open_torch_dist

SECONDS = 240
NAMES = ("whole", "middle", "smallest")
STEPS = 4
RECIPE = """
name: qad
run_dir: run
model: {{checkpoint: {family}, dtype: fp32}}
data:
  train: [{{path: {data}/train, weight: 1}}]
  valid: [{{path: {data}/valid, weight: 1}}]
  cache: {data}/cache
space: {{choices: {choices}}}
budgets:
  whole: {{metric: active_params, target: 1.0}}
  middle: {{metric: active_params, target: 0.7}}
  smallest: {{metric: active_params, target: 0.5}}
quantize: {{format: nvfp4, samples: 4, seq_length: 32}}
optimizer: {{lr: 1e-3, warmup_steps: 1}}
checkpoint: {{interval: 2, keep_last: 3}}
log: {{eval_tokens: 128, eval_interval: 2, tensorboard: false}}
stages:
  - {{name: qad, tokens: 512, seq_length: 32, global_batch_size: 4, micro_batch_size: 2}}
"""


@dataclass(frozen=True)
class Moment:
    """The ``count``-th call of something: before it, or after.

    Args:
        owner: of the function, ``module`` or ``module:Class``.
    """

    owner: str
    name: str
    count: int = 1
    after: bool = False

    def kill_there(self) -> None:
        """This process and all that it has started, as by ``kill -9``."""
        module, _, inner = self.owner.partition(":")
        owner = reduce(getattr, inner.split(".") if inner else [], importlib.import_module(module))
        original, calls = getattr(owner, self.name), iter(range(self.count - 1))

        def call(*args: Any, **kwargs: Any) -> Any:
            last = next(calls, None) is None
            if last and not self.after:
                os.killpg(0, signal.SIGKILL)
            result = original(*args, **kwargs)
            if last:
                os.killpg(0, signal.SIGKILL)
            return result

        setattr(owner, self.name, call)


_QUANTIZE = "elastic_megatron.training.quantize"
_SAVED = "elastic_megatron.checkpoint.distributed"
CALIBRATING = (
    Moment(_QUANTIZE, "forward_only", 3),
    Moment("elastic_megatron.training.quantizers:QuantisedLinears", "freeze"),
    Moment("megatron.core.dist_checkpointing", "save", after=True),
    Moment(_SAVED, "write_amax", after=True),
    Moment("pathlib:Path", "rename"),
    Moment("elastic_megatron.checkpoint.tracker", "write_text"),
    Moment("elastic_megatron.checkpoint.tracker", "write_text", after=True),
)
TRAINING = (
    Moment(_QUANTIZE, "forward_only", 7),
    Moment("elastic_megatron.training.log:RunLog", "step"),
    Moment("elastic_megatron.training.log:RunLog", "step", 2, after=True),
    Moment(_SAVED, "write_amax"),
    Moment("elastic_megatron.checkpoint.tracker", "write_text"),
    Moment("elastic_megatron.training.log:RunLog", "step", 2, after=True),
    Moment("elastic_megatron.checkpoint.manifest:Manifest", "write"),
)


class Forge:
    """A process that has imported everything, and runs each command in a fork of itself."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-u", str(Path(__file__))],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def run(self, folder: Path, command: str, moment: Moment | None = None) -> int:
        """Exit status of the command, negative for a signal; ``moment``: when it kills itself."""
        assert self._process.stdin is not None and self._process.stdout is not None
        wanted = [str(folder), command, None if moment is None else vars(moment)]
        print(json.dumps(wanted), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=30)


def serve() -> None:
    """The far side of ``Forge``: a command a line in, its status a line out."""
    import modelopt.torch.quantization  # noqa: F401
    import torch

    import elastic_megatron.commands.quantize
    import elastic_megatron.training.train  # noqa: F401
    from elastic_megatron.cli import main

    torch.set_num_threads(1)
    answers = os.dup(1)
    os.dup2(2, 1)
    for line in sys.stdin:
        folder, command, moment = json.loads(line)
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            signal.alarm(SECONDS)
            os.chdir(folder)
            if moment is not None:
                Moment(**moment).kill_there()
            os._exit(main([command, "recipe.yaml"]))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(answers, f"{status}\n".encode())


@pytest.fixture(scope="module")
def forge() -> Iterator[Forge]:
    forge = Forge()
    yield forge
    forge.close()


@pytest.fixture(scope="module")
def saved_family(story: Story) -> Path:
    """Random weights, of the story's vocabulary."""
    runtime.start(seed=1)
    whole = family(SHAPE.override(vocab_size=264))
    assert whole.space is not None
    model = build_elastic_model(whole.space)
    randomise(model)
    manifest = replace(whole, submodels={name: whole.submodels[name] for name in NAMES})
    return distributed.save(story.root / "family", 1, [model], manifest)


@pytest.fixture(scope="module")
def write(story: Story, saved_family: Path) -> Callable[[Path], Path]:
    """Writes ``recipe.yaml`` into a folder; returns its run folder."""

    def recipe(folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        values = {"family": saved_family, "data": story.root / "data", "choices": json.dumps(CHOICES)}
        (folder / "recipe.yaml").write_text(RECIPE.format(**values))
        return folder / "run"

    return recipe


@pytest.fixture(scope="module")
def straight(
    forge: Forge, write: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """By command, a run folder that nothing interrupted."""
    found = {}
    for command in ("quantize", "train"):
        folder = tmp_path_factory.mktemp(command)
        found[command] = write(folder)
        assert forge.run(folder, command) == 0
    return found


def assert_whole(run: Path) -> None:
    """What bears the name of a checkpoint is one: sealed, complete, and the one that the tracker names is there."""
    for folder in run.glob("checkpoints/iter_*"):
        integrity.verify(folder)
        assert Manifest.read(folder / FILE).quantised is not None and (folder / "amax.safetensors").exists()
    named = tracker.newest(run / "checkpoints")
    assert named is None or named.name.startswith("iter_")


def assert_same(run: Path, straight: Path) -> None:
    """The same lines but for the clock, and the same checkpoints bit for bit."""

    def timeless(path: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if k != "step_ms"} for line in metrics(path)]

    assert timeless(run) == timeless(straight)
    root = run / "checkpoints"
    assert [p.name for p in tracker.complete(root)] == [
        p.name for p in tracker.complete(straight / root.name)
    ]
    assert tracker.newest(root) == tracker.complete(root)[-1]
    for mine in tracker.complete(root):
        theirs = straight / "checkpoints" / mine.name
        assert bits(weights_in(mine)) == bits(weights_in(theirs))
        for name in (FILE, "amax.safetensors"):
            assert (mine / name).read_bytes() == (theirs / name).read_bytes()


def weights_in(folder: Path) -> dict[str, Tensor]:
    plain = replace(Manifest.read(folder / FILE), quantised=None)
    return dict(open_torch_dist(folder, plain, None).state())


@pytest.mark.parametrize(("command", "moments"), [("quantize", CALIBRATING), ("train", TRAINING)])
def test_kill_9_at_any_moment_and_the_same_command_finishes(
    forge: Forge, write: Callable[[Path], Path], straight: dict[str, Path], tmp_path: Path, command: str,
    moments: Sequence[Moment],
) -> None:  # fmt: skip
    """One death after another in one run folder, each further on; the last call is left alone."""
    run = write(tmp_path)
    for moment in moments:
        assert forge.run(tmp_path, command, moment) == -signal.SIGKILL, moment
        assert_whole(run)
    assert forge.run(tmp_path, command) == 0
    assert_whole(run)
    assert_same(run, straight[command])


def test_runs_are_what_the_recipe_says(straight: dict[str, Path]) -> None:
    """The comparison is about something: three submodels judged before and after, and steps that change weights."""
    lines = metrics(straight["train"])
    assert lines[:3] == metrics(straight["quantize"])
    assert [line["eval"]["weights"] for line in lines if "eval" in line] == ["fp32", *["nvfp4"] * 3]
    assert [line["step"] for line in lines if "step" in line] == list(range(1, STEPS + 1))
    first, last = (straight["train"] / f"checkpoints/iter_{step:07d}" for step in (0, STEPS))
    assert bits(weights_in(first)) != bits(weights_in(last))


if __name__ == "__main__":
    serve()
