"""What ``tools/gpu_check_8.sh`` runs on the ranks of one node.

python tools/gpu/eight.py prepare FOLDER [--rehearse]        # a 6-layer Nano, its data, and the recipes of RUNS
torchrun ... tools/gpu/eight.py train FOLDER RUN             # one of them; its last line is JSON
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

from elastic_megatron.recipe import load  # noqa: E402
from elastic_megatron.training.signals import exit_status  # noqa: E402
from gpu.bench import Bench  # noqa: E402
from gpu.models import ROOT, losses, parent, recipe, scale  # noqa: E402

RECIPES = ROOT / "recipes" / "nemotron3_nano_30b"
PATTERN = "MEMEM*"
TINY = {"stage1": {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 1, "recompute": "full"},
        "stage2": {"context": 2, "expert": 2, "recompute": "full"}}  # fmt: skip
TINY["qad_nvfp4"] = TINY["stage2"]
NVFP4 = {"format": "nvfp4", "preset": "mamba_moe_aggressive", "samples": 8}
# run -> (recipe whose layout it has, whether sequences are long, its own sections)
RUNS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "stage1": ("stage1", False, {}),
    "stage1_no_overlap": ("stage1", False, {"parallel": {"overlap": False}}),
    "stage2": ("stage2", True, {}),
    "qad": ("qad_nvfp4", True, {"quantize": NVFP4}),
    "requeue": ("stage1", False, {"checkpoint": {"interval": 10, "keep_last": 1}}),
    "killed": ("stage1", False, {"checkpoint": {"interval": 10, "keep_last": 1, "async_save": True}}),
}
STEPS = {"requeue": 40, "killed": 40}


def prepare(bench: Bench) -> None:
    """The parent, and a recipe for each run with the layout of Nano's."""
    bench.scratch.mkdir(parents=True, exist_ok=True)
    sizes = scale(bench)
    shape = sizes.parent.override(hybrid_layer_pattern=PATTERN, max_position_embeddings=1 << 16)
    print(f"{parent(bench, shape)}: layers {PATTERN} of the widths of Nano" + " made tiny" * bench.rehearse)
    for name, (of, long, sections) in RUNS.items():
        length = sizes.length if not long else 2 * sizes.length if bench.rehearse else 49152
        parallel = TINY[of] if bench.rehearse else load(RECIPES / f"{of}.yaml").parallel.model_dump()
        parallel |= {"world_size": None, "overlap": True} | sections.get("parallel", {})
        own = {k: v | {"seq_length": length} if k == "quantize" else v for k, v in sections.items()}
        steps, batch = STEPS.get(name, 6), 4
        stage = {"name": "all", "tokens": steps * batch * length, "seq_length": length, "global_batch_size": batch,
                 "micro_batch_size": 1, "samples_per_draw": batch}  # fmt: skip
        recipe(bench, name, steps=steps, **{**own, "parallel": parallel, "stages": [stage],
                                            "space": sizes.section(shape)})  # fmt: skip


def train_measured(folder: Path, name: str) -> int:
    """Train a run; its times, and its memory on the fullest rank beside what ``plan`` says."""
    from elastic_megatron.training.train import train

    run, rank = load(folder / f"{name}.yaml"), os.environ["RANK"]
    (folder / f"{name}.{rank}.pid").write_text(str(os.getpid()))
    outcome = train(run)
    if outcome.interrupted is not None:
        return exit_status(outcome.interrupted)
    most = 0.0
    if torch.accelerator.is_available():
        used = torch.tensor(
            torch.accelerator.max_memory_allocated(), device=torch.accelerator.current_accelerator()
        )
        torch.distributed.all_reduce(used, torch.distributed.ReduceOp.MAX)
        most = float(used)
    if outcome.main:
        times = [line["step_ms"] for line in losses(run)[2:]]
        found = {"run": name, "steps": outcome.step, "step_ms": statistics.median(times),
                 "peak_gib": most / 2**30 or None, "plan_gib": _planned(folder / f"{name}.yaml") / 2**30}  # fmt: skip
        print(json.dumps(found), flush=True)
    return 0


def _planned(file: Path) -> float:
    """Bytes of the fullest rank, by ``plan``."""
    code = "import sys; from elastic_megatron.cli import main; sys.exit(main())"
    world = f"parallel.world_size={os.environ['WORLD_SIZE']}"
    done = subprocess.run([sys.executable, "-c", code, "plan", str(file), world, "--json"], capture_output=True,
                          text=True, timeout=120, check=True)  # fmt: skip
    return json.loads(done.stdout)["memory_per_rank"]["total"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("prepare", "train"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("run", nargs="?", choices=RUNS)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    if args.what == "train":
        return train_measured(args.folder, args.run)
    prepare(Bench(args.folder / "findings.jsonl", args.folder, args.rehearse))
    return 0


if __name__ == "__main__":
    sys.exit(main())
