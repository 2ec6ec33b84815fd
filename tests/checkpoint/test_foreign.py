"""What checkpoints of Megatron-LM and Megatron-Bridge say of themselves, and that it is true."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch import Tensor

from elastic_megatron.checkpoint.common_state import DistState
from elastic_megatron.checkpoint.dist_check import check_folder
from elastic_megatron.checkpoint.foreign import foreign_manifest
from elastic_megatron.checkpoint.manifest import FILE, Manifest
from elastic_megatron.checkpoint.named import foreign_folder
from elastic_megatron.checkpoint.stored import ModelTensor, model_tensors
from elastic_megatron.checkpoint.torch_dist import open_torch_dist
from elastic_megatron.checkpoint.torch_dist_names import dist_pieces
from elastic_megatron.errors import UserError
from elastic_megatron.space import ParentShape

INTEGRATIONS = Path(__file__).parents[1] / "integrations"
SHAPE = ParentShape(
    "ME*-", 24, 263, ffn_hidden_size=20, moe_ffn_hidden_size=10, moe_shared_expert_intermediate_size=12,
    num_moe_experts=6, moe_router_topk=2, moe_router_topk_scaling_factor=2.5, mamba_num_heads=4, mamba_head_dim=6,
    mamba_state_dim=5, mamba_num_groups=2, num_attention_heads=4, num_query_groups=2, kv_channels=6,
    max_position_embeddings=64,
)  # fmt: skip
# what a Megatron-Bridge provider of that model writes, as far as it counts
PROVIDER: dict[str, Any] = {
    "_target_": "megatron.bridge.models.hybrid.hybrid_provider.HybridModelProvider",
    **{n: v for n, v in SHAPE.to_dict().items() if n not in ("tie_embeddings", "max_position_embeddings")},
    "hybrid_layer_pattern": "ME|*-",
    "seq_length": 64,
    "share_embeddings_and_output_weights": False,
    "make_vocab_size_divisible_by": 8,
    "tensor_model_parallel_size": 2,
    "normalization": "RMSNorm",
    "activation_func": {"_target_": "megatron.core.activations.squared_relu", "_call_": False},
    "position_embedding_type": "none",
    "gated_linear_unit": False,
    "add_bias_linear": False,
    "hidden_dropout": 0.1,
    "mtp_num_layers": 0,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_num_groups": 1,
    "moe_router_group_topk": 1,
}
# the same as Megatron-LM's arguments
_RENAMED = ("hybrid_layer_pattern", "num_moe_experts", "activation_func", "gated_linear_unit", "seq_length")
ARGS: dict[str, Any] = {
    **{n: v for n, v in PROVIDER.items() if n not in _RENAMED},
    "hybrid_layer_pattern": "ME*-",
    "num_experts": 6,
    "group_query_attention": True,
    "max_position_embeddings": 64,
    "squared_relu": True,
    "swiglu": False,
    "quick_geglu": False,
    "untie_embeddings_and_output_weights": True,
}


def folder(path: Path, *, rows: int = 264, model: Any = None, args: Any = None) -> Path:
    """An ``iter_*`` folder with one tensor, and a description of either kind."""
    embedding = {"embedding.word_embeddings.weight": torch.zeros(rows, 2)}
    dcp.save(embedding, checkpoint_id=path, no_dist=True)
    (path / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    if model is not None:
        (path / "run_config.yaml").write_text(yaml.safe_dump({"model": model}))
    if args is not None:
        torch.save({"args": Namespace(**args), "iteration": 7}, path / "common.pt")
    return path


def hf_config(path: Path, shape: ParentShape = SHAPE, **changes: Any) -> Path:
    path.mkdir()
    config = {"model_type": "nemotron_h", **shape.to_hf(), **changes}
    (path / "config.json").write_text(json.dumps(config))
    return path


# --- checkpoints that Megatron-LM wrote ---


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``whole``: one rank, plain optimizer; ``parts``: two, tensor and expert parallel, distributed optimizer."""
    out = tmp_path_factory.mktemp("megatron_lm")
    common = [
        *_flags(), "--micro-batch-size", "2", "--global-batch-size", "4", "--seq-length", "16", "--train-iters", "2",
        "--lr", "1e-2", "--lr-decay-style", "constant", "--num-workers", "0", "--eval-iters", "0",
        "--eval-interval", "10", "--save-interval", "2", "--moe-router-topk-scaling-factor", "2.5",
    ]  # fmt: skip
    parts = [
        "--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-model-parallel-size", "2",
        "--expert-tensor-parallel-size", "1", "--use-distributed-optimizer",
    ]  # fmt: skip
    script = str(Path(__file__).with_name("pretrain_hybrid.py"))
    jobs = [
        {
            "script": script,
            "arguments": [*common, "--save", name, *more],
            "ranks": ranks,
            "log": f"{name}.log",
        }
        for name, ranks, more in (("whole", 1, []), ("parts", 2, parts))
    ]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("NVTE_")}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", str(INTEGRATIONS / "megatron_training_on_cpu.py")],
        input=json.dumps(jobs), capture_output=True, text=True, timeout=300, cwd=out,
        env=clean | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    statuses = json.loads(ran.stdout.splitlines()[-1])
    assert statuses == [[0], [0, 0]], "".join(log.read_text()[-2000:] for log in out.glob("*.log.*"))
    return out


def _flags() -> list[str]:
    """The model as Megatron-LM's arguments, its vocabulary one short of a multiple of 8."""
    sys.path.insert(0, str(INTEGRATIONS))
    try:
        from tiny_models import flags
    finally:
        sys.path.remove(str(INTEGRATIONS))
    changed = {"--vocab-size": "263", "--make-vocab-size-divisible-by": "8"}
    found = flags()
    for name, value in changed.items():
        found[found.index(name) + 1] = value
    return found


def _slow_truth(path: Path, tensor: ModelTensor, loaded: dict[str, Tensor]) -> Tensor:
    """A tensor put together from whole ones that torch loaded."""
    pieces = []
    for piece in dist_pieces(tensor):
        if piece.key not in loaded:
            entry = DistState(path).metadata.tensors[piece.key]
            state = {piece.key: torch.empty(entry.size, dtype=entry.properties.dtype)}
            dcp.load(state, checkpoint_id=path, no_dist=True)
            loaded |= state
        whole = loaded[piece.key]
        rows = whole.flatten(0, 1) if tensor.expert is not None else whole
        pieces.append(rows[piece.start : piece.start + piece.rows])
    return torch.cat(pieces)


@pytest.mark.parametrize("name", ["whole", "parts"])
def test_a_checkpoint_of_megatron_lm_names_the_shape_that_it_trained(written: Path, name: str) -> None:
    found = foreign_folder(written / name)
    assert found == written / name / "iter_0000002"
    assert foreign_manifest(found, None) == Manifest(shape=SHAPE)


@pytest.mark.parametrize("name", ["whole", "parts"])
def test_every_tensor_is_the_one_that_torch_loads(written: Path, name: str) -> None:
    path = written / name / "iter_0000002"
    stored = open_torch_dist(path, foreign_manifest(path, None), None)
    loaded: dict[str, Tensor] = {}
    expected = {t.name: _slow_truth(path, t, loaded) for t in model_tensors(SHAPE)}
    found = dict(stored.state())
    assert found.keys() == expected.keys() and len(found) == 35
    for tensor, value in found.items():
        assert torch.equal(value, expected[tensor]), tensor
    # the rows of padding are there, and are left out
    assert len(loaded["embedding.word_embeddings.weight"]) == {"whole": 264, "parts": 272}[name]
    assert found["embedding.word_embeddings.weight"].shape == (263, 24)


@pytest.mark.parametrize("name", ["whole", "parts"])
def test_arguments_are_read_as_megatron_itself_reads_them(written: Path, name: str) -> None:
    from megatron.core import dist_checkpointing

    path = written / name / "iter_0000002"
    ours = DistState(path).common()["args"].fields
    theirs = vars(dist_checkpointing.load_common_state_dict(str(path))["args"])
    assert ours.keys() == theirs.keys()
    plain = {k: v for k, v in theirs.items() if isinstance(v, (bool, int, float, str, type(None), list))}
    named = {k: v for k, v in plain.items() if type(v).__module__ == "builtins"}  # but no enum
    assert len(named) > 300
    assert {k: ours[k] for k in named} == named


@pytest.mark.parametrize("name", ["whole", "parts"])
def test_all_that_megatron_lm_writes_may_be_loaded(written: Path, name: str) -> None:
    """By torch and Megatron: optimizer, random states and arguments hold nothing that is refused."""
    path = written / name / "iter_0000002"
    said = check_folder(path)
    assert len(said.objects) > 3 and any("exp_avg" in key for key in said.tensors)


def test_a_config_is_believed_where_it_agrees(written: Path, tmp_path: Path) -> None:
    path = written / "whole" / "iter_0000002"
    config = hf_config(tmp_path / "hf", SHAPE.override(max_position_embeddings=4096, vocab_size=260))
    for given in (config, config / "config.json"):
        manifest = foreign_manifest(path, given)
        assert manifest.shape == SHAPE.override(max_position_embeddings=4096, vocab_size=260)
        assert manifest.hf_config == json.loads((config / "config.json").read_text())


# --- descriptions of both kinds ---


@pytest.mark.parametrize("kind", ["model", "args"])
def test_a_description_names_the_shape(tmp_path: Path, kind: str) -> None:
    path = folder(tmp_path / "iter_0000001", **{kind: PROVIDER if kind == "model" else ARGS})
    assert foreign_manifest(path, None) == Manifest(shape=SHAPE)


def test_a_config_that_keeps_its_transformer_apart_names_the_same(tmp_path: Path) -> None:
    own = ("_target_", "hybrid_layer_pattern", "vocab_size", "seq_length", "position_embedding_type")
    model = {n: PROVIDER[n] for n in own} | {
        "make_vocab_size_divisible_by": 8,
        "transformer": {n: v for n, v in PROVIDER.items() if n not in own},
    }
    assert foreign_manifest(folder(tmp_path / "one", model=model), None).shape == SHAPE
    # functions are left out by megatron.training's own configs
    del model["transformer"]["activation_func"]
    path = folder(tmp_path / "two", model=model)
    with pytest.raises(UserError, match="says nothing about activation_func; give --config HF_DIR"):
        foreign_manifest(path, None)
    assert foreign_manifest(path, hf_config(tmp_path / "hf")).shape == SHAPE


def test_older_names_and_absent_numbers_mean_what_megatron_makes_of_them(tmp_path: Path) -> None:
    older = ARGS | {"norm_epsilon": 1e-6, "hybrid_override_pattern": "ME*-", "num_query_groups": 1,
                    "group_query_attention": False, "mamba_num_heads": None, "mamba_head_dim": 8,
                    "moe_router_topk_scaling_factor": None,
                    "moe_shared_expert_intermediate_size": None}  # fmt: skip
    del older["layernorm_epsilon"], older["hybrid_layer_pattern"]
    assert foreign_manifest(folder(tmp_path / "iter_0000001", args=older), None).shape == replace(
        SHAPE, layernorm_epsilon=1e-6, num_query_groups=4, mamba_num_heads=6, mamba_head_dim=8,
        moe_router_topk_scaling_factor=1.0, moe_shared_expert_intermediate_size=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "stated", "meant"),
    [(264, 263, 263), (264, 264, 264), (272, 257, 257), (272, 256, 272), (264, None, 264), (264, 300, 264)],
)
def test_the_vocabulary_is_the_stated_one_where_padding_explains_the_rest(
    tmp_path: Path, rows: int, stated: int | None, meant: int
) -> None:
    path = folder(tmp_path / "iter_0000001", rows=rows, model=PROVIDER | {"vocab_size": stated})
    assert foreign_manifest(path, None).shape.vocab_size == meant


def test_sizes_of_layers_that_the_model_lacks_say_nothing(tmp_path: Path) -> None:
    model = PROVIDER | {"hybrid_layer_pattern": "M", "moe_router_score_function": "softmax"}
    path = folder(tmp_path / "iter_0000001", model=model)
    mamba = {n: v for n, v in SHAPE.to_dict().items() if n.startswith(("mamba_", "max_", "hidden"))}
    assert foreign_manifest(path, None).shape == ParentShape("M", vocab_size=263, **mamba)


REFUSED: dict[str, Any] = {
    "normalization": "LayerNorm",
    "position_embedding_type": "rope",
    "add_bias_linear": True,
    "add_qkv_bias": True,
    "layernorm_zero_centered_gamma": True,
    "apply_residual_connection_post_layernorm": True,
    "activation_func_clamp_value": 7.0,
    "qk_layernorm": True,
    "qk_l2_norm": True,
    "softmax_type": "learnable",
    "softmax_scale": 0.2,
    "window_size": [128, 0],
    "attention_output_gate": True,
    "multi_latent_attention": True,
    "experimental_attention_variant": "dsa",
    "heterogeneous_block_specs": True,
    "use_mup": True,
    "mtp_num_layers": 1,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_router_num_groups": 2,
    "moe_router_topk_limited_devices": 2,
    "moe_latent_size": 8,
    "moe_shared_expert_gate": True,
    "moe_apply_probs_on_input": True,
    "moe_expert_capacity_factor": 1.5,
}


@pytest.mark.parametrize("kind", ["model", "args"])
@pytest.mark.parametrize("field", REFUSED)
def test_other_numerics_are_refused_by_name_with_a_config_and_without(
    tmp_path: Path, field: str, kind: str
) -> None:
    described = (PROVIDER if kind == "model" else ARGS) | {field: REFUSED[field]}
    path = folder(tmp_path / "iter_0000001", **{kind: described})
    for config in (None, hf_config(tmp_path / "hf")):
        with pytest.raises(UserError, match=rf"{field} is .*, but models of the Nemotron-H family have"):
            foreign_manifest(path, config)


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"swiglu": True, "squared_relu": False}, "activation_func", "silu"),
        ({"squared_relu": False}, "activation_func", "gelu"),
        ({"quick_geglu": True, "squared_relu": False}, "activation_func", "quick_gelu"),
        ({"quick_geglu": True}, "gated_linear_unit", True),
        ({"apply_layernorm_1p": True}, "layernorm_zero_centered_gamma", True),
    ],
)
def test_flags_that_make_other_numerics_are_refused_by_what_they_make(
    tmp_path: Path, change: dict[str, bool], field: str, value: object
) -> None:
    path = folder(tmp_path / "iter_0000001", args=ARGS | change)
    with pytest.raises(UserError, match=f"{field} is {value!r}, but models"):
        foreign_manifest(path, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("moe_router_topk", 3),
        ("moe_router_topk_scaling_factor", 1.0),
        ("layernorm_epsilon", 1e-6),
        ("tie_embeddings", True),
        ("mamba_num_groups", 4),
        ("hybrid_layer_pattern", "ME*-M"),
    ],
)
def test_a_config_that_contradicts_the_checkpoint_is_refused(
    tmp_path: Path, field: str, value: object
) -> None:
    path = folder(tmp_path / "iter_0000001", args=ARGS)
    config = hf_config(tmp_path / "hf", SHAPE.override(**{field: value}))
    with pytest.raises(UserError, match=f"{field} is .*, but {config} says .*; give the config that"):
        foreign_manifest(path, config)


def test_a_scaling_factor_that_is_none_is_one_and_contradicts_another(tmp_path: Path) -> None:
    path = folder(tmp_path / "iter_0000001", args=ARGS | {"moe_router_topk_scaling_factor": None})
    with pytest.raises(UserError, match="moe_router_topk_scaling_factor is 1.0, but .* says 2.5"):
        foreign_manifest(path, hf_config(tmp_path / "hf"))


# --- what cannot be read ---


def test_a_checkpoint_that_says_nothing_needs_a_config(tmp_path: Path) -> None:
    path = folder(tmp_path / "iter_0000001")
    with pytest.raises(UserError, match="says nothing about the model's sizes; give --config HF_DIR"):
        foreign_manifest(path, None)
    assert foreign_manifest(path, hf_config(tmp_path / "hf")).shape == SHAPE


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({n: v for n, v in PROVIDER.items() if n != "hybrid_layer_pattern"}, "so this is no hybrid model"),
        (PROVIDER | {"hybrid_layer_pattern": "ME*-/ME"}, "run_config.yaml: .* has unknown layer symbols '/'"),
        (PROVIDER | {"mamba_num_groups": 3}, "mamba_num_heads=4 is not a multiple of mamba_num_groups=3"),
        (PROVIDER | {"hidden_size": None}, "hidden_size.*; correct it, or give --config"),
        (PROVIDER | {"hidden_size": "24", "mamba_num_groups": "x"}, "correct it, or give --config"),
        ("nothing", r"run_config.yaml is damaged \(\w+: .*; copy it again, or give --config"),
    ],
)
def test_a_damaged_run_config_is_named(tmp_path: Path, model: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as e:
        foreign_manifest(folder(tmp_path / "iter_0000001", model=model), None)
    assert "\n" not in str(e.value)


def test_a_run_config_that_is_no_yaml_is_named_unless_a_config_says_all(tmp_path: Path) -> None:
    path = folder(tmp_path / "iter_0000001")
    (path / "run_config.yaml").write_text("model: [\n")
    with pytest.raises(UserError, match="run_config.yaml is damaged") as e:
        foreign_manifest(path, None)
    assert "\n" not in str(e.value)
    assert foreign_manifest(path, hf_config(tmp_path / "hf")).shape == SHAPE


def test_damaged_arguments_are_named_unless_a_config_says_all(tmp_path: Path) -> None:
    path = folder(tmp_path / "iter_0000001", args=ARGS)
    whole = (path / "common.pt").read_bytes()
    (path / "common.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="common.pt is damaged") as e:
        foreign_manifest(path, None)
    assert "\n" not in str(e.value)
    assert foreign_manifest(path, hf_config(tmp_path / "hf")).shape == SHAPE


# a document, and what is said of it
YAML_BOMBS = {
    "merged": ("a: &a {k: 1}\nb: &b {<<: [*a, *a]}\nmodel: {<<: [*b, *b]}\n", "it merges mappings"),
    "deep": ("model: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    "base 60": ("model: {hidden_size: 1" + ":59" * 150_000 + "}", "too long for a number"),
    "large": ("model: {a: " + "x" * (2 << 20) + "}", "is larger than"),
    "python": ("model: !!python/object/apply:os.system [touch ran]", "ConstructorError"),
    "billion laughs": (
        "l0: &l0 [lol]\n"
        + "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 40))
        + "model: {hybrid_layer_pattern: *l39}\n",
        "hybrid_layer_pattern is not set",
    ),
}


@pytest.mark.parametrize("bomb", YAML_BOMBS)
def test_yaml_that_would_grow_or_run_ends_in_one_line(
    bomb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = folder(tmp_path / "iter_0000001")
    document, words = YAML_BOMBS[bomb]
    (path / "run_config.yaml").write_text(document)
    with pytest.raises(UserError, match="run_config.yaml") as e:
        foreign_manifest(path, None)
    assert words in str(e.value)
    assert "\n" not in str(e.value) and len(str(e.value)) < 1000
    assert not (tmp_path / "ran").exists()


def test_damaged_metadata_and_missing_embeddings_are_named(tmp_path: Path) -> None:
    path = folder(tmp_path / "iter_0000001", args=ARGS)
    (path / ".metadata").write_bytes(b"\x80\x04nothing")
    with pytest.raises(UserError, match=r"iter_0000001/.metadata is damaged \(\w+: .*\); copy it again"):
        foreign_manifest(path, None)
    (path / ".metadata").unlink()
    dcp.save({"other": torch.zeros(2)}, checkpoint_id=path, no_dist=True)
    with pytest.raises(UserError, match="tensor 'embedding.word_embeddings.weight' is missing"):
        foreign_manifest(path, None)


class _Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.write_text, (self.file, "ran")


def test_nothing_runs_when_arguments_are_read(tmp_path: Path) -> None:
    strange = {"callback": _Hostile(tmp_path / "ran"), "dtype": torch.bfloat16, "tensor": torch.ones(3)}
    path = folder(tmp_path / "iter_0000001", args=ARGS | strange)
    assert foreign_manifest(path, None).shape == SHAPE
    assert not (tmp_path / "ran").exists()
    torch.load(path / "common.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json is missing"),
        ("{", "config.json is no valid JSON"),
        ("[]", "config.json holds a list, not an object"),
        (json.dumps({"model_type": "llama"}), "model_type is 'llama'"),
        (json.dumps({"quantization_config": {}}), "config.json is that of a quantised model"),
    ],
)
def test_a_damaged_config_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path, given = folder(tmp_path / "iter_0000001", args=ARGS), tmp_path / "hf"
    given.mkdir()
    if content is not None:
        (given / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        foreign_manifest(path, given)


# --- which folder is meant ---


def test_a_path_means_the_folder_that_its_tracker_names(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    for name in ("iter_0000002", "iter_0000010", "release"):
        folder(root / name)
    tracker = root / "latest_checkpointed_iteration.txt"
    for text, name in (("10", "iter_0000010"), ("2\n", "iter_0000002"), ("release", "release")):
        tracker.write_text(text)
        assert foreign_folder(root) == foreign_folder(tmp_path / "run") == root / name
    assert foreign_folder(root / "iter_0000002") == root / "iter_0000002"


def test_ours_and_nothing_are_no_folders_of_others(tmp_path: Path) -> None:
    path = folder(tmp_path / "iter_0000001")
    assert foreign_folder(tmp_path) is None and foreign_folder(tmp_path / "absent") is None
    (path / FILE).write_text("{}")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    assert foreign_folder(tmp_path) is None and foreign_folder(path) is None


@pytest.mark.parametrize("text", ["soon", "3", "1"])
def test_a_root_of_ours_is_left_to_our_tracker_whatever_state_it_is_in(tmp_path: Path, text: str) -> None:
    """As between the two renamings of a save, where the named folder is hidden."""
    path = folder(tmp_path / "iter_0000001")
    (path / FILE).write_text("{}")
    path.rename(tmp_path / ".iter_0000001.replaced")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    assert foreign_folder(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("soon", "says 'soon'; write the number of an iteration, or 'release'"),
        ("3", "says '3', but .*iter_0000003 is not there"),
        ("1", "iter_0000001 has no metadata.json, so its format is not torch_dist; convert it"),
    ],
)
def test_a_tracker_that_names_nothing_readable_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "iter_0000001" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        foreign_folder(tmp_path)
