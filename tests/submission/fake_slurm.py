"""Slurm's programs as a site may have wrapped them: small scripts over a queue in a file, whose answers a test chooses."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from elastic_megatron.recipe import JobChain, load_jobs
from elastic_megatron.slurm import scheduler

START = '#!/bin/bash\ncd "$FAKE"\necho "${0##*/} $*" >>calls\n'
# What the N-th sbatch says is the shell text answers/sbatch.N; `take` puts the job into the queue.
PROGRAMS = {
    "sbatch": """
[ "$1" = --test-only ] && { cat >/dev/null; [ ! -e answers/test-only ] || . answers/test-only; exit; }
script=${!#} n=$(grep -c '^sbatch --parsable' calls)
env >env.sbatch
name=$(sed -n 's/^#SBATCH --job-name=//p' "$script")
take() { id=$(($(cat next 2>/dev/null || echo 4100) + 1)); echo $id >next; echo "$id|PENDING|$name|$script" >>queue; }
[ -e answers/sbatch.$n ] && { . answers/sbatch.$n; exit; }
take; echo "$id"
""",
    "squeue": """
[ -e answers/squeue ] && { . answers/squeue; exit; }
while IFS='|' read -r id state name command; do echo "$id|$state|Priority|N/A|0:00||$name|$command"; done < <(cat queue 2>/dev/null)
""",
    "scancel": """
[ -e answers/scancel ] && { . answers/scancel; exit; }
for id in "$@"; do sed -i "/^$id|/d" queue; done
""",
    "scontrol": """
[ -e answers/scontrol ] && { . answers/scontrol; exit; }
echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1
""",
}
RECIPE = """\
name: {name}
run_dir: {run_dir}
model:
  sizes: {{hybrid_layer_pattern: "-", hidden_size: 8, vocab_size: 8, ffn_hidden_size: 8}}
loss: {{kind: cross_entropy}}
stages: [{{name: a, tokens: 100, seq_length: 10, global_batch_size: 4}}]
slurm: {{continuation: {continuation}}}
"""


@dataclass(frozen=True)
class Site:
    """A folder with a Slurm, and a chain of two jobs to submit to it."""

    folder: Path

    def answer(self, program: str, text: str) -> None:
        """What a program says from now on, or the N-th sbatch of all (``sbatch.N``)."""
        (self.folder / "answers" / program).write_text(text + "\n")

    def heal(self) -> None:
        for path in (self.folder / "answers").iterdir():
            path.unlink()

    def queue(self) -> dict[int, str]:
        """Id -> name of what is in the queue."""
        path = self.folder / "queue"
        fields = [line.split("|") for line in path.read_text().splitlines()] if path.exists() else []
        return {int(id): name for id, _, name, _ in fields}

    def calls(self, program: str) -> list[str]:
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.startswith(program)]

    def chain(self, run_dir: str = "run", work: str = "work", first: str = "{kind: requeue}") -> JobChain:
        """Jobs `one` and `two`, which needs it; ``work``: where they train; ``first``: continuation of `one`."""
        folder = self.folder
        (folder / "cluster.yaml").write_text(f"container: {{runtime: none, bin: {folder / 'bin'}}}\n")
        for name, continuation in (("one", first), ("two", "{kind: requeue}")):
            text = RECIPE.format(name=name, run_dir=folder / work / name, continuation=continuation)
            (folder / f"{name}.yaml").write_text(text)
        (folder / "chain.yaml").write_text(
            f"name: pair\ncluster: cluster.yaml\nrun_dir: {run_dir}\n"
            "jobs:\n  one: {recipe: one.yaml}\n  two: {recipe: two.yaml, after: [one]}\n"
        )
        return load_jobs(folder / "chain.yaml")


def make_site(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A fresh site, whose programs come first on the path; looks for a lost job follow quickly on each other."""
    for name in ("bin", "answers"):
        (folder / name).mkdir(parents=True)
    for name, text in PROGRAMS.items():
        (folder / "bin" / name).write_text(START + text)
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.setattr(scheduler, "LOOKS", (0.0, 0.1, 0.4, 1.0))
    return Site(folder)
