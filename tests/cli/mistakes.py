"""Plain mistakes: what is typed, in a folder with a model, a family and texts, and what the one line says."""

from __future__ import annotations

import json
from pathlib import Path

from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.space import Budget, ElasticSpace, ParentShape, SubmodelSpec

SUBMODELS = ("large", "medium", "small")
_SIZES = {
    "vocab_size": 64, "hybrid_layer_pattern": "M*E", "hidden_size": 32, "ffn_hidden_size": 32, "mamba_num_heads": 4,
    "mamba_head_dim": 8, "mamba_state_dim": 8, "mamba_num_groups": 2, "num_attention_heads": 4, "num_query_groups": 2,
    "kv_channels": 8, "num_moe_experts": 4, "moe_ffn_hidden_size": 16, "moe_router_topk": 2,
    "moe_shared_expert_intermediate_size": 16,
}  # fmt: skip


def write_folder(root: Path) -> None:
    """No weights: whoever looks for them has gone too far."""
    shape = ParentShape.from_dict(_SIZES)
    config = {"model_type": "nemotron_h", **shape.to_hf()}
    space = ElasticSpace.build(shape, {"hidden_size": [16, 24, 32]})
    widths = dict(zip(SUBMODELS, (32, 24, 16), strict=True))
    family = Manifest(
        shape=shape,
        space=space,
        budgets=tuple(
            Budget(name=name, metric="total_params", target=0.5, unit="ratio") for name in SUBMODELS
        ),
        submodels={name: SubmodelSpec.of({"hidden_size": width}) for name, width in widths.items()},
        hf_config=config,
    )
    for name, manifest in (("plain", None), ("family", family)):
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
        (root / name / "tokenizer.json").write_text("{}")
        if manifest is not None:
            manifest.write(root / name / "elastic_config.json")
    newest = root / "run/checkpoints/iter_0000007"
    (newest / "hf").mkdir(parents=True)
    family.write(newest / "elastic.json")
    (root / "run/checkpoints/latest_checkpointed_iteration.txt").write_text("7\n")
    (root / "bare").mkdir()
    family.write(root / "bare/elastic.json")
    (root / "other").mkdir()
    (root / "empty").mkdir()
    (root / "text.txt").write_text("A text.\n")
    (root / "rows.jsonl").write_text('{"text": "A text."}\n')
    (root / "latin.txt").write_bytes(b"caf\xe9\n")
    (root / "broken.yaml").write_text("stages: [")
    (root / "recipe.yaml").write_text(
        "name: tiny\nmodel: {checkpoint: run}\nspace: {choices: {hidden_size: [16, 32]}}\n"
        "data: {train: [{path: nothing, weight: 1}]}\nrun_dir: new\n"
    )
    (root / "export.yaml").write_text(
        "name: out\njob: export\nmodel: {checkpoint: run}\nexport: {slices: out, submodels: [smal]}\nrun_dir: new\n"
    )


_NOWHERE = "nowhere does not exist; give a run folder"
_SMALL = "unknown submodel 'smal', did you mean 'small'\\? this checkpoint has large, medium, small"
_TAKEN = "already exists and is not empty; choose another"
_UNWRITABLE = r"cannot be written \(.*text\.txt: Not a directory\)"
_DATA = "--output out/data --tokenizer bytes"

MISTAKES: dict[str, str] = {
    "init text.txt/mine": r"text\.txt/mine.*: Not a directory; choose another path",
    "init mine --model nano30": "'nano30'.*nano30b",
    # what is not there, or is something else
    "eval nowhere --text text.txt": _NOWHERE,
    "eval empty --text text.txt": "empty is neither a Megatron checkpoint nor a Hugging Face directory",
    "eval text.txt --text text.txt": "text.txt is neither a Megatron checkpoint nor",
    "eval family --text nowhere.txt": "nowhere.txt: no such file",
    "eval family --text empty": "empty: is a directory",
    "eval family --text latin.txt": "latin.txt:1: not UTF-8",
    "eval family --text rows.jsonl": "rows.jsonl holds JSON lines, not text",
    "eval bare --text text.txt": "bare carries no tokenizer",
    "eval other --text text.txt": "other is neither",
    "generate nowhere --prompt x": _NOWHERE,
    "generate family --prompt-file nowhere.txt": "nowhere.txt: no such file",
    "generate bare --prompt x": "bare carries no tokenizer",
    "import nowhere out": _NOWHERE,
    "export nowhere out": _NOWHERE,
    "export nowhere.yaml": "nowhere.yaml: no such file",
    "export run out --config empty": "empty has no config.json",
    "slice nowhere out --submodel small": _NOWHERE,
    "plan nowhere": "nowhere: no such file",
    "plan empty": "empty/config.json",
    "report nowhere": "run folder nowhere does not exist",
    "report empty": "empty has no metrics.jsonl",
    "status nowhere": "nowhere: no such file",
    "logs nowhere": "nowhere: no such file",
    "status empty": "empty holds no submitted chain",
    "submit nowhere.yaml --dry-run": "nowhere.yaml: no such file",
    "quickstart --out new --text nowhere --heldout text.txt": "nowhere is no file",
    "quickstart --out text.txt": _UNWRITABLE,
    "prepare-data nowhere.txt " + _DATA: "nowhere.txt: no such file",
    "prepare-data empty " + _DATA: "empty: is a directory",
    "prepare-data text.txt --output out/data --tokenizer nowhere": "tokenizer nowhere: no such directory",
    "prepare-data text.txt --output out/data --tokenizer empty": "tokenizer empty: holds no tokenizer",
    # recipes
    "train nowhere.yaml": "nowhere.yaml: no such file",
    "rank nowhere.yaml": "nowhere.yaml: no such file",
    "quantize broken.yaml": "broken.yaml:1",
    "rank recipe.yaml rank.sample=3": "rank: unknown key 'sample', did you mean 'samples'",
    "rank recipe.yaml": "data set .*nothing: .*nothing.bin is missing",
    "train recipe.yaml": "the recipe has no stages",
    "quantize recipe.yaml": "the recipe has no section quantize",
    "export export.yaml": _SMALL,
    "export export.yaml model.checkpoint=nowhere": "nowhere does not exist",
    # names
    "eval family --text text.txt --submodel smal": _SMALL,
    "eval run --text text.txt --submodel smal": _SMALL,
    "eval plain --text text.txt --submodel tiny": "'tiny'; this checkpoint has none",
    "generate run --prompt x --submodel smal": _SMALL,
    "generate run --prompt x --think smal --answer large --budget 3": _SMALL,
    "generate run --prompt x --think small --answer smal --budget 3": _SMALL,
    "slice family out --submodel smal": _SMALL,
    "slice run out --submodel small --submodel smal": _SMALL,
    "slice plain out --submodel small": "plain is not elastic and has no submodels",
    "export run out --submodel smal": _SMALL,
    "export plain out --elastic": "plain is not elastic",
    "tarin recipe.yaml": "invalid choice: 'tarin'.*, did you mean 'train'",
    "slice family out --submodle small": "required: --submodel",
    "eval family --text text.txt --seq-len 8 --jsno": "unrecognized arguments: --jsno, did you mean '--json'",
    "recipe shwo recipe.yaml": "invalid choice: 'shwo'.*, did you mean 'show'",
    "export run out --dtype bf61": "invalid choice: 'bf61'.*, did you mean 'bf16'",
    # places
    "import family run": "run holds a checkpoint already",
    "import family text.txt": _UNWRITABLE,
    "import family family/megatron": "family/megatron lies in family",
    "export run plain": f"plain {_TAKEN}",
    "export run text.txt/out": _UNWRITABLE,
    "export run text.txt": f"text.txt {_TAKEN}",
    "export run run/checkpoints/iter_0000007/out": "lies in run/checkpoints/iter_0000007",
    "slice family family --submodel small": "family lies in family",
    "slice family plain --submodel small": f"plain {_TAKEN}",
    "slice run run/checkpoints --submodel large --submodel iter": "unknown submodel 'iter'",
    "prepare-data text.txt --output text.txt/data --tokenizer bytes": _UNWRITABLE,
    "prepare-data text.txt --output / --tokenizer bytes": "names no files",
    # numbers and what does not go together
    "eval family --text text.txt --seq-length 0": "--seq-length 0: a window needs 2 tokens",
    "eval family --text text.txt --seq-length -4": "--seq-length -4",
    "generate run --prompt x --max-new-tokens 0": "--max-new-tokens 0; give 1 or more",
    "generate run --prompt x --think small --answer large --budget -1": "--budget -1; give 0 or more",
    "generate run --prompt x --temperature nan": "--temperature nan; give 0 or more",
    "generate run --prompt x --think small": "--think alone",
    "export run out --elastic --plain-order": "--elastic keeps the stored order",
    "plan plain --context 0": "--context 0 must be at least 1",
    "slice family out --submodel small --max-shard-size 0": "'0' is no size",
    "prepare-data text.txt --valid-fraction 1 " + _DATA: "--valid-fraction 1.0: must lie between 0 and 1",
    "prepare-data rows.jsonl --as-text --json-key text " + _DATA: "exclude each other",
}
