"""Count what a training step asks of a GPU, elastic beside stock, without a GPU: kernels, bytes, waits, collectives.

python tools/benchmarks/launches.py [--json FILE]
python tools/benchmarks/launches.py --table     # write the tables of README.md from results/launches.json

One rank of eight that share the experts of NVIDIA Nemotron 3 Nano, on tensors without data. Exits with 1 where a goal
is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from elastic_megatron.errors import UserError
from elastic_megatron.recipe import load
from elastic_megatron.space import ElasticSpace

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import counting  # noqa: E402
import machine  # noqa: E402
import paper_steps  # noqa: E402
import ratios  # noqa: E402
from readme_block import read_json, replace_block, table  # noqa: E402
from synthetic import RECIPE, nano  # noqa: E402

RESULTS = HERE / "results" / "launches.json"
BLOCK = "launch-table"
TOKENS = 8192
SMALL = {"hidden_size": 2048, "moe_ffn_hidden_size": 1024, "num_moe_experts": 112, "mamba_num_heads": 56}
# the most that the roofline time may be of stock's
GOALS = {"elastic, soft": 1.12, "sliced, full": 1.02}
_SMALL_MESSAGE = 1 << 20
# patterns whose counts differ by one layer from the first
_BASE, _KINDS = "M*E", {"M": "MM*E", "*": "M**E", "E": "M*EE"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write (with --table: read) the results here"
    )
    parser.add_argument(
        "--no-check", dest="check", action="store_false", help="exit with 0 where a goal is missed"
    )
    parser.add_argument(
        "--table",
        action="store_true",
        help=f"count nothing, write the tables of README.md from {RESULTS.name}",
    )
    args = parser.parse_args()
    try:
        if args.table:
            found = read_json(args.json or RESULTS, f"{parser.prog} --json {RESULTS}")
            text = ratios.README.read_text(encoding="utf-8")
            ratios.README.write_text(replace_block(text, BLOCK, "\n".join(render(found))), encoding="utf-8")
            return 0
        found = measure()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print("\n".join(render(found)))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    missed = misses(found)
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed and args.check else 0


def measure() -> dict[str, Any]:
    """Counts of every step: of the whole model, and of one layer of each kind and the ends, by differences."""
    paper_steps.start()
    recipe = load(RECIPE)
    setting = paper_steps.Setting(
        ElasticSpace.build(nano(), recipe.space.choices, recipe.space.lanes), SMALL, TOKENS
    )
    steps = {}
    for name in paper_steps.STEPS:
        ratios.say(name)
        base = paper_steps.count(name, setting.of(_BASE))
        layers = {
            kind: paper_steps.count(name, setting.of(pattern)) - base for kind, pattern in _KINDS.items()
        }
        ends = base
        for layer in layers.values():
            ends = ends - layer
        whole = paper_steps.count(name, setting)
        parts = {"whole": whole, **layers, "ends": ends}
        steps[name] = {part: counts.as_json() for part, counts in parts.items()}
    return {
        "versions": machine.versions(),
        "pattern": nano().hybrid_layer_pattern,
        "tokens": TOKENS,
        "small": SMALL,
        "ranks": paper_steps.EXPERT_RANKS,
        "gpu": {
            "name": "H100 SXM",
            "bandwidth": counting.BANDWIDTH,
            "bf16": counting.DENSE_BF16,
            "fp32": counting.FP32,
        },
        "steps": steps,
    }  # fmt: skip


def misses(results: Mapping[str, Any]) -> list[str]:
    """The goals that a run missed, a line each."""
    steps, found = results["steps"], []
    for name, other in paper_steps.AGAINST.items():
        ours, stock = steps[name]["whole"], steps[other]["whole"]
        ratio = ours["seconds"] / stock["seconds"]
        if name in GOALS and ratio > GOALS[name]:
            found.append(f"{name}: roofline time {ratio:.3f} of {other}'s, the goal is {GOALS[name]:.2f}")
        if ours["syncs"] > stock["syncs"]:
            found.append(
                f"{name}: the host waits {ours['syncs'] - stock['syncs']} times more than with {other}"
            )
        calls = ours["collectives"] - stock["collectives"]
        sent = ours["collective_bytes"] - stock["collective_bytes"]
        if calls > 1 or sent > _SMALL_MESSAGE:
            found.append(
                f"{name}: {calls} collectives of {sent:,} bytes beyond {other}'s, the goal is one small one"
            )
    return found


def render(results: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown. Raises ``UserError`` where ``results`` are not those of a run."""
    try:
        return [_lead(results), "", *_steps(results), "", *_layers(results)]
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise UserError(
            f"these are no results of the benchmark ({type(e).__name__}: {e}); run tools/benchmarks/launches.py"
        ) from None


def _lead(results: Mapping[str, Any]) -> str:
    gpu, versions = results["gpu"], ", ".join(f"{n} {v}" for n, v in results["versions"].items())
    widths = ", ".join(f"{a} {w:,}" for a, w in results["small"].items())
    return (
        f"{versions}. Layers `{results['pattern']}`, {results['tokens']:,} tokens, bf16, one rank of "
        f"{results['ranks']}; small: {widths}. Roofline of an {gpu['name']}: {gpu['bandwidth'] / 1e12:.2f} TB/s, "
        f"{gpu['bf16'] / 1e12:.0f} TFLOP/s in bf16, {gpu['fp32'] / 1e12:.0f} in fp32."
    )


def _steps(results: Mapping[str, Any]) -> list[str]:
    def row(name: str, parts: Mapping[str, Any]) -> Iterator[str]:
        c, other = parts["whole"], paper_steps.AGAINST.get(name)
        yield name
        yield f"{c['launches']:,}"
        yield f"{c['bytes'] / 1e9:,.1f}"
        yield f"{c['flops'] / 1e12:.1f}"
        yield f"{1000 * c['seconds']:.1f}"
        for field in ("bytes", "seconds"):
            yield "" if other is None else f"{c[field] / results['steps'][other]['whole'][field]:.3f}"
        yield f"{GOALS[name]:.2f}" if name in GOALS else ""
        yield str(c["syncs"])
        yield str(c["collectives"])
        yield f"{c['collective_bytes'] / 1e6:,.1f}"

    headings = ("step", "kernels", "GB moved", "TFLOP", "roofline, ms", "GB by stock's", "ms by stock's", "goal",
                "waits of the host", "collectives", "MB sent")  # fmt: skip
    rows = [tuple(row(name, parts)) for name, parts in results["steps"].items()]
    return table(headings, [":---"] + ["---:"] * (len(headings) - 1), rows)


def _layers(results: Mapping[str, Any]) -> list[str]:
    headings = ("ms by stock's, kernels more", *(f"`{kind}`" for kind in _KINDS), "ends and router")
    rows = []
    for name, other in paper_steps.AGAINST.items():
        pairs = [(results["steps"][name][p], results["steps"][other][p]) for p in (*_KINDS, "ends")]
        cells = (f"{a['seconds'] / b['seconds']:.3f}, {a['launches'] - b['launches']:+,}" for a, b in pairs)
        rows.append((f"{name} / {other}", *cells))
    return table(headings, [":---"] + ["---:"] * (len(headings) - 1), rows)


if __name__ == "__main__":
    sys.exit(main())
