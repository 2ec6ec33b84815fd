"""What the story found out: every size before and after training, checked by transformers, told to a person."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from .. import runtime
from ..blocks import SlicedModel, build_elastic_model, running
from ..checkpoint.source import open_source
from ..cost import account
from ..data.blend import windows
from ..data.tokenizer import encode, load_tokenizer
from ..files.writing import write_text
from ..ops.mix import SubmodelMix
from ..report import write_report
from ..report.console import family_table
from ..router.loss import relative_cost, relative_target
from ..space import ElasticSpace, SubmodelSpec
from ..training.distill import DistilledChunk
from ..training.evaluate import evaluate
from ..training.versions import versions

if TYPE_CHECKING:
    from .story import Story

PROMPT = "\n\nTIMON.\n"
SAMPLE_TOKENS = 160


def evaluate_family(story: Story) -> None:
    """Losses of every chosen size: cut from the raw parent, from the sorted parent, and after training.

    Also loads every slice with plain transformers, compares its logits with the masked Megatron model's and
    lets it write. Results go to ``work/measured.json``.
    """
    runtime.start()
    trained = open_source(story.run)
    space, submodels = trained.manifest.space, dict(trained.manifest.submodels)
    assert space is not None
    tokenizer = load_tokenizer(story.tokenizer)
    length = story.elastic.stages[-1].seq_length
    ids = list(windows(encode(tokenizer, story.heldout.read_text()), length))
    model = build_elastic_model(space)
    chunk = DistilledChunk(model, submodels=SlicedModel(model))
    losses = {}
    for kind, source in (
        ("loss_unsorted_slice", open_source(story.parent.run_dir)),
        ("loss_sorted_slice", open_source(story.rank.run_dir)),
        ("loss_trained", trained),
    ):
        source.fill([model])
        losses[kind] = evaluate([chunk], space, submodels, ids)
        if kind == "loss_unsorted_slice":
            parent = evaluate([chunk], space, {"parent": space.full()}, ids)["parent"]
    measured = {
        "parent": parent,
        "losses": losses,
        "transformers": {
            n: _check_slice(story.out / "slices" / n, model, space, s, ids[0], tokenizer)
            for n, s in submodels.items()
        },
    }
    write_text(story.work / "measured.json", json.dumps(measured, indent=1) + "\n")


@torch.no_grad()
def _check_slice(
    directory: Path, model: Any, space: ElasticSpace, spec: SubmodelSpec, ids: torch.Tensor, tokenizer: Any
) -> dict[str, Any]:
    """Relative logit difference between the slice in transformers and the masked parent; a sample of its text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hf = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    batch = ids[None]
    with running(model.eval(), SubmodelMix.one_hot(space, spec)):
        ours = model(batch, torch.arange(batch.shape[1])[None], None)
    theirs = hf(batch, use_cache=False).logits
    own_tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt = torch.tensor(encode(own_tokenizer, PROMPT), dtype=torch.long)[None]
    torch.manual_seed(0)
    written = hf.generate(
        prompt, max_new_tokens=SAMPLE_TOKENS, do_sample=True, top_k=20, temperature=0.8, pad_token_id=0,
        attention_mask=torch.ones_like(prompt),
    )  # fmt: skip
    return {
        "logits_error": float((theirs - ours).norm() / ours.norm()),
        "sample": own_tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True),
    }


def report(story: Story, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Assemble ``report.json`` and ``report.html`` from the run's files; returns the former's content."""
    measured = json.loads((story.work / "measured.json").read_text())
    manifest = open_source(story.run).manifest
    space = manifest.space
    assert space is not None
    cost, parent = account(space.parent), measured["parent"]
    budgets = {b.name: b for b in manifest.budgets}
    submodels = {}
    for name, spec in manifest.submodels.items():
        losses = {kind: by_name[name]["loss"] for kind, by_name in measured["losses"].items()}
        gap = losses["loss_sorted_slice"] - parent["loss"]
        over_target = relative_cost(space, budgets[name], spec)
        target = relative_target(space, budgets[name])
        submodels[name] = {
            "budget": budgets[name].to_dict(),
            "widths": spec.to_dict(),
            **account(space, spec).to_dict(),
            **losses,
            "gap_closed": (losses["loss_sorted_slice"] - losses["loss_trained"]) / gap
            if spec != space.full()
            else None,
            "target_cost": target,
            "realised_cost": over_target * target,
            "cost_error": over_target - 1,
            **measured["transformers"][name],
        }
    out = {
        "name": story.elastic.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["elastic-megatron", *sys.argv[1:]]),
        "seed": story.elastic.seed,
        "versions": versions(),
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "parent": {
            **account(space.parent).to_dict(),
            **space.parent.to_dict(),
            "loss": parent["loss"],
            "pattern": space.parent.hybrid_layer_pattern,
        },
        "submodels": submodels,
        "phases": [{"name": n, "seconds": s} for n, s in seconds.items()],
        "data": {
            "train_tokens": story.elastic.stages[0].tokens,
            "eval_tokens": parent["tokens"],
            "unit": "nats per byte",
        },
    }
    assert cost.total_params == out["parent"]["total_params"]
    text = json.dumps(out, indent=1) + "\n"
    write_text(story.out / "report.json", text)
    write_text(story.run / "report.json", text)
    write_report(story.run, report_json=story.out / "report.json", out=story.out / "report.html")
    write_report(story.run)
    return out


def tell(story: Story, result: dict[str, Any], console: Console) -> None:
    """The result for a person: what each size costs and loses, where it is, and what to do next."""
    console.print(family_table(result))
    worst = max(m["logits_error"] for m in result["submodels"].values())
    total = sum(p["seconds"] for p in result["phases"])
    smallest = min(result["submodels"], key=lambda n: result["submodels"][n]["active_params"])
    out = os.path.relpath(story.out)
    console.print(
        f"Every slice was loaded by plain transformers; largest logit difference {worst:.1e}. {total:.0f} s in all.\n"
        f"\n  {out}/report.html        curves, router choices, what each size costs and loses"
        f"\n  {out}/elastic_hf         the family: one directory, sliced without training"
        f"\n  {out}/slices/NAME        each size as an ordinary nemotron_h directory"
        f"\n\nNext:\n  .venv/bin/elastic-megatron eval {out}/elastic_hf --text examples/data/shakespeare_valid.txt"
        f"\n  .venv/bin/elastic-megatron slice {out}/elastic_hf my-model --submodel {smallest}"
        "\n  .venv/bin/elastic-megatron plan recipes/nemotron3_nano_30b/plan.yaml",
        highlight=False,
    )


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []  # fmt: skip
    return names[0] if names else platform.processor() or platform.machine()
