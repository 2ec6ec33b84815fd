"""What mlx-lm computes, in its own environment: a list of jobs as JSON on stdin, one answer each on stdout.

A job is ``{"directory": ..., "prompts": [[token, ...], ...], "new": n}``, an answer ``{"log_p": [...], "greedy": [...]}`` by
prompt: log-probabilities [tokens, vocabulary], and n tokens decoded one by one, each the most probable. Of a directory that
mlx-lm cannot build it is ``{"error": its words}``.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import load_model


def answered(job: dict[str, Any]) -> dict[str, Any]:
    try:
        model, _ = load_model(Path(job["directory"]))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    found: dict[str, Any] = {"log_p": [], "greedy": []}
    for prompt in job["prompts"]:
        logits = model(mx.array([prompt])).astype(mx.float32)[0]
        found["log_p"].append((logits - mx.logsumexp(logits, axis=-1, keepdims=True)).tolist())
        cache, tokens, following = model.make_cache(), [], mx.array([prompt])
        for _ in range(job["new"]):
            tokens.append(int(mx.argmax(model(following, cache=cache)[0, -1])))
            following = mx.array([tokens[-1:]])
        found["greedy"].append(tokens)
    return found


mx.set_default_device(mx.cpu)
answers = [answered(job) for job in json.load(sys.stdin)]
json.dump({"version": importlib.metadata.version("mlx-lm"), "answers": answers}, sys.stdout)
