"""What rounding costs a family and what distillation wins back, over several seeds, on the model of the quickstart.

    make quickstart
    python tools/study_quantised.py [--out runs/quantised] [--seeds 3] [--tokens 6e6] [--text FILE]

The quickstart's parent is made elastic by more tokens than there (``--tokens``), so that 5 % of them are steps enough
to distil. Then, for each seed: FP8 by calibration, NVFP4 by calibration, NVFP4 distilled; and as a control the same
distillation without rounding, which tells what more training alone is worth. Calibration and distillation read plays
that the family was not trained on (``--text``): on text that it knows by heart, distillation learns the text, and the
rounding error on other text comes back. Everything resumes; an hour and a half on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from elastic_megatron.data.prepare import prepare
from elastic_megatron.errors import UserError
from elastic_megatron.recipe import dump, load
from elastic_megatron.runtime.launch import run_ranks

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from readme_block import table  # noqa: E402

RECIPES = HERE.parent / "recipes" / "tiny_cpu"
_HEADINGS = (
    "size", "", "unquantised", "FP8 PTQ", "NVFP4 PTQ", "NVFP4 QAD", "lost KL recovered", "control", "net of it",
    "on disk",
)  # fmt: skip
SHARE = 0.05  # of the tokens that made the family elastic
MORE = HERE.parent / "examples" / "data" / "shakespeare_more.txt"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quickstart", type=Path, default=Path("quickstart"), help="its folder")
    parser.add_argument("--out", type=Path, default=Path("runs/quantised"), help="folder of the study")
    parser.add_argument("--tokens", type=float, default=6e6, help="that make the family elastic")
    parser.add_argument("--text", type=Path, default=MORE, help="to calibrate and distil on")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: 2)")
    args = parser.parse_args()
    try:
        study = Study(args.quickstart.resolve(), args.out.resolve(), args.tokens, args.text, args.ranks)
        results = study.run(args.seeds)
        args.out.joinpath("results.json").write_text(json.dumps(results, indent=1) + "\n")
        print("\n".join(render(results)))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


class Study:
    """Runs of the recipes of ``recipes/tiny_cpu``, each in a folder of its own."""

    def __init__(self, quickstart: Path, out: Path, tokens: float, text: Path, ranks: int) -> None:
        self.out, self.tokens, self.text, self.ranks = out, tokens, text, ranks
        self.work = quickstart / "work"
        if not (self.work / "rank").is_dir():
            raise UserError(f"{self.work / 'rank'} is missing; run make quickstart, or give --quickstart")

    def run(self, seeds: int) -> dict[str, Any]:
        stages = load(RECIPES / "elastic.yaml").stages
        total = sum(stage.tokens for stage in stages)
        longer = [s.model_dump() | {"tokens": round(s.tokens * self.tokens / total)} for s in stages]
        family = self._do(
            "train",
            "elastic",
            "family",
            model=self.work / "rank",
            stages=longer,
            **{"router.loss_weight": 10},
        )
        more = self.out / "more"
        if not more.with_suffix(".idx").is_file():
            prepare([self.text], more, self.work / "data" / "tokenizer")
        distilled = load(RECIPES / "qad_nvfp4.yaml").stages[0].model_dump() | {
            "tokens": round(SHARE * self.tokens)
        }
        runs: dict[str, list[dict[str, Any]]] = {"fp8": [], "nvfp4": [], "control": []}
        for seed in range(1, seeds + 1):
            own = {
                "seed": seed, "model": family, "teacher.checkpoint": self.work / "rank",
                "data.train": [{"path": str(more), "weight": 1}], "data.cache": self.out / "cache",
            }  # fmt: skip
            # held-out windows have the length of the first pass over data: the same for all
            windows = {"quantize.seq_length": distilled["seq_length"]}
            fp8 = self._do("quantize", "ptq_fp8", f"fp8-{seed}", **windows, **own)
            nvfp4 = self._do("train", "qad_nvfp4", f"nvfp4-{seed}", stages=[distilled], **own)
            control = self._do(
                "train", "qad_nvfp4", f"control-{seed}", stages=[distilled], quantize=None,
                **{"router.frozen": True}, **own,
            )  # fmt: skip
            runs["fp8"].append(_evaluations(fp8))
            runs["nvfp4"].append(_evaluations(nvfp4))
            runs["control"].append(_evaluations(control))
        return {
            "tokens": round(self.tokens), "tokens_distilled": distilled["tokens"], "seeds": seeds,
            "submodels": _summary(runs), "bytes": _bytes(self.out / "nvfp4-1"),
        }  # fmt: skip

    def _do(self, command: str, recipe: str, name: str, *, model: Path, **settings: Any) -> Path:
        """Run a command on a recipe, in the run folder of this name."""
        folder = self.out / name
        data = self.work / "data"
        overrides = {
            "run_dir": folder, "model.checkpoint": model, "data.cache": data / "cache",
            "data.train": [{"path": str(data / "train"), "weight": 1}],
            "data.valid": [{"path": str(data / "valid"), "weight": 1}], **settings,
        }  # fmt: skip
        resolved = load(
            RECIPES / f"{recipe}.yaml",
            [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()],
        )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(dump(resolved))
        print(f"{command} {name}", file=sys.stderr)
        call = [sys.executable, "-m", "elastic_megatron.cli", command, str(folder / "recipe.yaml")]
        if status := run_ranks(call, self.ranks):
            raise UserError(
                f"{command} {folder / 'recipe.yaml'} ended with status {status}; its last lines say why"
            )
        return folder


def _evaluations(folder: Path) -> dict[str, Any]:
    """Losses and KLs by submodel: ``before``, at step 0 ``rounded``, and at the ``end``, where there are such."""
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    evals = [line["eval"] for line in lines if "eval" in line]
    start = [line["submodels"] for line in evals if line["step"] == 0]
    end = [line["submodels"] for line in evals if line["step"] > 0]
    return {
        "before": start[0] if start else None,
        "rounded": start[-1] if start else None,
        "end": end[-1] if end else None,
    }


def _summary(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """By submodel, every number as (mean, standard deviation) over seeds."""
    found: dict[str, Any] = {}
    for name in runs["nvfp4"][0]["before"]:
        pairs = list(_paired(runs, name))
        found[name] = {key: _spread([pair[key] for pair in pairs]) for key in pairs[0]}
    return found


def _paired(runs: Mapping[str, Sequence[Mapping[str, Any]]], name: str) -> Iterator[dict[str, float]]:
    for fp8, nvfp4, control in zip(runs["fp8"], runs["nvfp4"], runs["control"], strict=True):
        before, ptq, qad = (nvfp4[when][name] for when in ("before", "rounded", "end"))
        lost, won = ptq["kl"] - before["kl"], ptq["kl"] - qad["kl"]
        trained = before["kl"] - control["end"][name]["kl"]
        yield {
            "loss": before["loss"], "loss_fp8": fp8["rounded"][name]["loss"], "loss_ptq": ptq["loss"],
            "loss_qad": qad["loss"], "loss_control": control["end"][name]["loss"],
            "kl_control": control["end"][name]["kl"],
            "kl": before["kl"], "kl_fp8": fp8["rounded"][name]["kl"], "kl_ptq": ptq["kl"], "kl_qad": qad["kl"],
            "recovered": won / lost, "net": (won - trained) / lost,
        }  # fmt: skip


def _spread(values: Sequence[float]) -> list[float]:
    return [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0]


def _bytes(folder: Path) -> dict[str, dict[str, int]]:
    from elastic_megatron.report.quantized import read_stored

    return {name: dict(sizes) for name, sizes in read_stored(folder).sizes.items()}


def render(results: Mapping[str, Any]) -> Iterator[str]:
    """The table and the sentence above it, in Markdown."""
    yield (
        f"Losses and KL from the parent in nats per byte, mean ± standard deviation of {results['seeds']} seed(s); "
        f"made elastic with {results['tokens']:,} tokens, distilled with {results['tokens_distilled']:,}. "
        "*Control*: distilled as long, not rounded; *net of it*: what is recovered beyond what that gains."
    )
    yield ""
    yield from table(_HEADINGS, (":---", ":---", *["---:"] * 8), _rows(results))


def _rows(results: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    for name, s in results["submodels"].items():
        sizes = results["bytes"][name]
        disk = f"{sizes['unquantised'] / 1e6:.2f} → {sizes['quantised'] / 1e6:.2f} MB"
        losses = [_shown(s[key], 3) for key in ("loss", "loss_fp8", "loss_ptq", "loss_qad")]
        yield (name, "loss", *losses, "", _shown(s["loss_control"], 3), "", disk)
        kls = [_shown(s[key], 4) for key in ("kl", "kl_fp8", "kl_ptq", "kl_qad")]
        recovered, net = (
            f"{100 * mean:.0f} ± {100 * spread:.0f} %" for mean, spread in (s["recovered"], s["net"])
        )
        yield ("", "KL", *kls, recovered, _shown(s["kl_control"], 4), net, "")


def _shown(spread: Sequence[float], digits: int) -> str:
    mean, deviation = spread
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}" if round(deviation, digits) else f"{mean:.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
