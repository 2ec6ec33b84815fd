"""Recipes, a chain and a cluster file as a team would have them, and what people get wrong in them.

In the text of a slip `‸` marks the place that the complaint must name; it is taken out before the file is written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

FILES = {
    "chain.yaml": """\
name: team
cluster: site/cluster.yaml
run_dir: runs/team
jobs:
  rank: {recipe: rank.yaml}
  stage1: {recipe: stage1.yaml, after: [rank]}
  stage2: {recipe: stage2.yaml, after: [stage1]}
  export: {recipe: export.yaml, after: [stage2]}
""",
    "site/cluster.yaml": """\
extends: gpus.yaml
account: team
partition: batch
time: "4:00:00"
container:
  runtime: pyxis
  image: team/image:1
  mounts: [/data]
environment: [HF_TOKEN]
setup:
  - module load cuda
sbatch: {exclusive: true}
""",
    "site/gpus.yaml": """\
gpus_per_node: 8
gpu: h100-80gb
""",
    "base.yaml": """\
model:
  hf: models/parent
data:
  train:
    - {path: data/one, weight: 0.7}
    - {path: data/two, weight: 0.3}
space:
  choices:
    hidden_size: [64, 96]
    num_moe_experts: [8, 16]
  lanes: {num_moe_experts: 8}
parallel:
  expert: 8
slurm:
  cluster: site/cluster.yaml
  nodes: 2
""",
    "rank.yaml": """\
extends: base.yaml
name: team-rank
job: rank
run_dir: runs/rank
rank:
  samples: 1024
""",
    "stage1.yaml": """\
extends: base.yaml
name: team-elastic
run_dir: runs/elastic
budgets:
  large: {metric: active_params, target: 1.0}
  small: {metric: memory_bytes, target: 0.5, sequence_length: 8192}
optimizer:
  lr: 1e-4
  betas: [0.9, 0.95]
  warmup_steps: 60
stages:
  - name: short
    tokens: 100e9
    seq_length: 8192
    global_batch_size: 1536
    samples_per_draw: 8
  - name: long
    tokens: 60e9
    seq_length: 49152
    global_batch_size: 256
    samples_per_draw: 8
    budget_probs: {large: 0.7, small: 0.3}
stop_after: short
slurm:
  time: "2-00:00:00"
  continuation: {kind: requeue, lead: 600}
  sbatch: {comment: elastic}
""",
    "stage2.yaml": """\
extends: stage1.yaml
stop_after: null
slurm:
  continuation: {kind: chain, links: 3}
""",
    "export.yaml": """\
name: team-export
job: export
run_dir: runs/export
model: {checkpoint: runs/elastic}
export:
  slices: runs/slices
  submodels: [large, small]
slurm:
  cluster: site/cluster.yaml
""",
    # not in the chain
    "ptq.yaml": """\
extends: base.yaml
name: team-fp8
job: quantize
run_dir: runs/ptq
model: {hf: null, checkpoint: runs/elastic}
quantize:
  format: fp8
  preset: mamba_moe_aggressive
  keep_feeding_mamba: true
  keep: [lm_head]
  samples: 1024
""",
}


@dataclass(frozen=True)
class Slip:
    """One mistake: in `file`, `old` is written `new` instead; without `old`, `new` is the whole file.

    `says` stands in the complaint. `at` is its place where that is not marked in `new`: `FILE:LINE:COLUMN`, or the
    start of the line for others. `overrides` are further words of the command line, `target` the file that it names. What else
    is wrong then says `also`, a line each; nothing more. `commands` see it.
    """

    file: str = ""
    old: str | None = None
    new: str | bytes = ""
    says: str = ""
    at: str = ""
    overrides: tuple[str, ...] = ()
    target: str = "chain.yaml"
    also: tuple[str, ...] = ()
    commands: tuple[str, ...] = ("recipe show", "plan", "submit --dry-run")
    environment: dict[str, str] = field(default_factory=dict)

    def apply(self, folder: Path) -> str:
        """Make the mistake in `folder` and return the place to be complained about."""
        if not self.file:
            return self.at
        path = folder / self.file
        if isinstance(self.new, bytes):
            path.write_bytes(self.new)
            return self.at
        text = self.new
        if self.old is not None:
            before = path.read_text(encoding="utf-8")
            assert before.count(self.old) == 1, (self.file, self.old)
            text = before.replace(self.old, self.new)
        place = self.at or f"{self.file}:{_line_and_column(text)}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("‸", ""), encoding="utf-8", newline="")
        return place


def _line_and_column(text: str) -> str:
    head, mark, _ = text.partition("‸")
    assert mark, text
    return f"{head.count(chr(10)) + 1}:{len(head) - head.rfind(chr(10))}"


def write(folder: Path) -> None:
    """The files without a mistake."""
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (folder / "site/job.sbatch").write_text("#!/bin/bash\n@{directives}\n@{tasks}\n", encoding="utf-8")
