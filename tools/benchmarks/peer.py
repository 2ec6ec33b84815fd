"""Measure NVIDIA's megatron/elastification beside this package: its masks, router and budget loss on the same tensors.

OMP_NUM_THREADS=1 python tools/benchmarks/peer.py --checkout MEGATRON_LM [--rounds 7] [--json FILE]
python tools/benchmarks/peer.py --table     # write the table of README.md from results/peer_cpu.json

The checkout is yours: its files are loaded from there and nothing of it is kept. Its hooks look for Transformer
Engine's grouped experts by the name of the class, so that without it they leave the experts' widths alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from elastic_megatron.blocks import build_model
from elastic_megatron.blocks.widths import layer_widths
from elastic_megatron.errors import UserError
from elastic_megatron.ops import SubmodelMix
from elastic_megatron.router import BudgetRouter, budget_loss
from elastic_megatron.space import Budget

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import interleave  # noqa: E402
import machine  # noqa: E402
import ratios  # noqa: E402
from step_models import SMALL, Setting, Steps  # noqa: E402

RESULTS = HERE / "results" / "peer_cpu.json"
BLOCK = "peer-table"
# what they call the choices of an axis and the probabilities over them
NAMES = {
    "hidden_size": ("emb_int_list", "router_emb"),
    "mamba_num_heads": ("mamba_int_list", "router_mamba"),
    "moe_ffn_hidden_size": ("mlp_int_list", "router_mlp"),
    "num_moe_experts": ("moe_expert_int_list", "router_moe_expert"),
}
# small functions run this often in a round
OFTEN = 20
BUDGET = Budget("small", "active_params", 0.45)


def main() -> int:
    parser = ratios.arguments(__doc__, RESULTS)
    parser.add_argument(
        "--checkout", type=Path, metavar="MEGATRON_LM", help="a folder with megatron/elastification"
    )
    return ratios.main(parser, measure, RESULTS, BLOCK)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, as ``ratios`` describes results."""
    if args.checkout is None:
        raise UserError("this comparison needs NVIDIA's code; name a checkout of Megatron-LM with --checkout")
    load = loader(args.checkout)
    device = interleave.start()
    # layers of the kinds that they count
    steps = Steps(Setting(SMALL.override(hybrid_layer_pattern="ME*EMEM"), 2, 512, device))
    runs = contenders(load, steps)
    times = interleave.race(runs, args.rounds, ratios.say)
    rows = [
        ratios.row("masked step, theirs / stock", interleave.ratio(times, ["step, theirs"], ["step, stock"])),
        ratios.row("masked step, ours / stock", interleave.ratio(times, ["step, ours"], ["step, stock"])),
    ]
    for what in ("masks of all layers", "sample of the router, with gradient", "budget loss, with gradient"):
        rows.append(
            ratios.row(
                f"{what}, theirs / ours", interleave.ratio(times, [f"{what}, theirs"], [f"{what}, ours"])
            )
        )
    parent = steps.setting.parent
    return {
        "machine": machine.facts(HERE),
        "versions": machine.versions() | {"Megatron-LM": _commit(args.checkout)},
        **interleave.describe(device),
        "rounds": args.rounds,
        "model": (
            f"Layers `{parent.hybrid_layer_pattern}`, hidden size {parent.hidden_size}, {parent.num_moe_experts} "
            f"experts; {steps.setting.tokens:,} tokens; soft choices."
        ),
        "rows": rows,
        "growth": [],
    }


def loader(checkout: Path) -> Callable[[str], ModuleType]:
    """Imports files of theirs. Raises ``UserError`` where there are none, or where they cannot be imported."""
    folder = checkout / "megatron" / "elastification"
    if not (folder / "flextron_elasticity_hooks.py").is_file():
        raise UserError(f"{checkout} has no megatron/elastification; name a newer checkout with --checkout")

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"peer_{Path(name).stem}", folder / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (ImportError, OSError) as e:
            raise UserError(f"{folder / name}.py does not run beside this Megatron-Core: {e}") from None
        return module

    return load


def contenders(load: Callable[[str], ModuleType], steps: Steps) -> dict[str, interleave.Step]:
    """Ours and theirs by name, from the same choices and probabilities."""
    space, device = steps.space, steps.setting.device
    leaves = {
        a: torch.full(
            (len(space.choices_of(a)),), 1 / len(space.choices_of(a)), device=device
        ).requires_grad_()
        for a in space.axes
    }
    mix = SubmodelMix(space, leaves)
    model = build_model(steps.setting.parent, dtype=interleave.dtype_of(device)).to(device).train()
    hooks = load("flextron_elasticity_hooks")
    managers = hooks.apply_flextron_elasticity_to_model(model, _configured(load, model.config, steps))
    probabilities = {theirs: (leaves[a], 0) for a, (_, theirs) in NAMES.items()}
    for manager in managers:
        manager.set_elasticity_params(**probabilities)
    builders = [
        getattr(manager, name)
        for manager in managers
        for name in dir(manager)
        if name.startswith("_init_") and name.endswith("_masks")
    ]
    return {
        "step, stock": steps.plain(),
        "step, theirs": lambda: steps.backward(model),
        "step, ours": lambda: steps.backward(steps.elastic, mix),
        "masks of all layers, theirs": _often(lambda: [build() for build in builders]),
        "masks of all layers, ours": _often(
            lambda: [layer_widths(mix, i) for i in range(space.parent.num_layers)]
        ),
        "sample of the router, with gradient, theirs": _often(_their_router(load, model.config, device)),
        "sample of the router, with gradient, ours": _often(_our_router(steps)),
        "budget loss, with gradient, theirs": _often(_their_loss(load, steps, leaves)),
        "budget loss, with gradient, ours": _often(lambda: budget_loss(mix, BUDGET)[0].backward()),
    }


def _configured(load: Callable[[str], ModuleType], config: Any, steps: Steps) -> Any:
    """Megatron's config with their fields beside its own."""
    for field in dataclasses.fields(load("flextron_config").FlextronConfig):
        setattr(config, field.name, field.default)
    config.flextron = config.soft_mask = True
    config.hybrid_layer_pattern = steps.setting.parent.hybrid_layer_pattern
    # they read the experts' width here
    config.ffn_hidden_size = config.moe_ffn_hidden_size
    for axis, (choices, _) in NAMES.items():
        setattr(config, choices, list(steps.space.choices_of(axis)))
    config.budget_list, config.router_inter_dim = [1.0, 0.7, 0.45], 256
    config.linear_scaler_start, config.linear_scaler_end = 1.0, 10.0
    return config


def _their_router(load: Callable[[str], ModuleType], config: Any, device: torch.device) -> interleave.Step:
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.training.global_vars import set_args

    init_num_microbatches_calculator(0, None, 8, 1, 1)
    set_args(SimpleNamespace(curr_iteration=0, train_iters=10))
    theirs: Any = load("router/hybrid_flex_router")
    if not HAVE_TE:
        # Megatron's names for absent classes import without an error, so they miss their own fallback
        theirs.HAVE_TE = False
        theirs.ColumnParallelLinear, theirs.RowParallelLinear = ColumnParallelLinear, RowParallelLinear
    router = theirs.FlextronRouter(config).to(device)

    def sample() -> None:
        found = [value for value, _ in filter(None, router(0.45))]
        torch.cat([value.flatten() for value in found]).square().sum().backward()

    return sample


def _our_router(steps: Steps) -> interleave.Step:
    targets = {"full": 1.0, "middle": 0.7, "small": 0.45}
    budgets = [Budget(name, "active_params", target) for name, target in targets.items()]
    router = BudgetRouter(steps.space, budgets, list(targets.values())).to(steps.setting.device)

    def sample() -> None:
        mix = router("small", key=(1, 2, 3), tau=1.0, logit_scale=1.0, hard=False)
        torch.cat([p.flatten() for p in mix.tensors()]).square().sum().backward()

    return sample


def _their_loss(
    load: Callable[[str], ModuleType], steps: Steps, leaves: Mapping[str, Tensor]
) -> interleave.Step:
    parent, space = steps.setting.parent, steps.space
    count = load("router/flex_budget_utils").get_num_parameters
    fixed: dict[str, Any] = {
        "hybrid_pattern": parent.hybrid_layer_pattern,
        "mamba_d_head": parent.mamba_head_dim,
        "mamba_d_state": parent.mamba_state_dim,
        "num_attention_heads": parent.num_attention_heads,
        "num_query_groups": parent.num_query_groups,
        "kv_channels": parent.kv_channels,
        "vocab_size": parent.vocab_size,
        "shared_expert_intermediate_size": parent.moe_shared_expert_intermediate_size,
        "moe_router_topk": parent.moe_router_topk,
    }
    theirs = {"hidden_size": "hidden_size", "mamba_num_heads": "mamba_num_heads",
              "moe_ffn_hidden_size": "ffn_hidden_size", "num_moe_experts": "num_experts"}  # fmt: skip
    whole = count(**fixed, **{name: parent.size(a) for a, name in theirs.items()})[1]

    def loss() -> None:
        sizes = {
            name: (leaves[a] @ leaves[a].new_tensor(space.choices_of(a))).unsqueeze(-1)
            for a, name in theirs.items()
        }
        active = count(**fixed, **sizes)[1]
        abs(active / (BUDGET.target * whole) - 1).sum().backward()

    return loss


def _often(run: interleave.Step) -> interleave.Step:
    def times() -> None:
        for _ in range(OFTEN):
            run()

    return times


def _commit(checkout: Path) -> str:
    """Of the checkout, where it is one of git."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
