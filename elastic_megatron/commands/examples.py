"""A line for each command that works as it stands, in a folder that ``init`` wrote; the end of its ``--help``."""

from __future__ import annotations

EXAMPLES = {
    "quickstart": "elastic-megatron quickstart --out quickstart",
    "init": "elastic-megatron init family --model tiny",
    "plan": "elastic-megatron plan recipes/tiny_cpu/chain.yaml",
    "recipe": "elastic-megatron recipe show recipes/tiny_cpu/elastic.yaml optimizer.lr=1e-4",
    "prepare-data": "elastic-megatron prepare-data corpus.jsonl.gz --output data/corpus --tokenizer bytes",
    "rank": "elastic-megatron rank recipes/tiny_cpu/rank.yaml",
    "train": "elastic-megatron train recipes/tiny_cpu/elastic.yaml seed=7",
    "quantize": "elastic-megatron quantize recipes/tiny_cpu/ptq_fp8.yaml",
    "submit": "elastic-megatron submit recipes/tiny_cpu/chain.yaml cluster=recipes/clusters/mine.yaml --dry-run",
    "status": "elastic-megatron status runs/tiny_cpu",
    "logs": "elastic-megatron logs runs/tiny_cpu -f",
    "cancel": "elastic-megatron cancel runs/tiny_cpu",
    "resume": "elastic-megatron resume runs/tiny_cpu",
    "import": "elastic-megatron import /models/parent /checkpoints/parent --verify",
    "export": "elastic-megatron export runs/tiny_cpu/elastic elastic_hf --elastic",
    "slice": "elastic-megatron slice elastic_hf sizes --submodel medium --submodel small",
    "eval": "elastic-megatron eval elastic_hf --text heldout.txt --submodel all",
    "generate": 'elastic-megatron generate elastic_hf --prompt "Who?" --think small --answer large --budget 64',
    "report": "elastic-megatron report runs/tiny_cpu/elastic",
}
