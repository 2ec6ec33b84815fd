"""Hugging Face directories carry every tensor, bit for bit, and cut as the fact table says."""

from __future__ import annotations

import itertools
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_files import hub_tensors, megatron_tensors, slice_hf, write_hf
from hf_models import manifest, parent, random_state, same, shapes, stored
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_megatron.checkpoint.hf_read import read_config, read_hf
from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.checkpoint.nested import nested_manifest
from elastic_megatron.checkpoint.slice import permute_state, slice_state
from elastic_megatron.checkpoint.stored import Memory, in_memory, model_tensors
from elastic_megatron.conversion import Request, to_hf
from elastic_megatron.data.tokenizer import byte_tokenizer
from elastic_megatron.errors import UserError
from elastic_megatron.files.writing import private_name
from elastic_megatron.ops.locate import locate
from elastic_megatron.space import ElasticSpace, ParentShape, SubmodelSpec, stored_order


@settings(max_examples=60, deadline=None)
@given(shapes())
def test_names_there_and_back_are_the_identity(shape: ParentShape) -> None:
    state = random_state(shape)
    hub = dict(pair for name, tensor in state.items() for pair in hub_tensors(shape, name, tensor))
    assert same(dict(megatron_tensors(shape, hub.__getitem__)), state)


@settings(max_examples=15, deadline=None)
@given(shapes(), st.integers(0, 3000), st.sampled_from([torch.float32, torch.bfloat16]))
def test_write_then_read_is_the_identity(shape: ParentShape, shard: int, dtype: torch.dtype) -> None:
    state = random_state(shape, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        write_hf(Path(folder, "m"), Manifest(shape=shape), state.items(), max_shard_bytes=shard)
        opened = read_hf(Path(folder, "m"))
        assert same(dict(opened.state()), state)
        again = opened.manifest.shape
    assert [(t.name, t.shape) for t in model_tensors(again)] == [
        (t.name, t.shape) for t in model_tensors(shape)
    ]


def test_qkv_is_one_block_of_queries_key_and_value_for_each_group() -> None:
    shape = parent(hybrid_layer_pattern="*")
    fused = random_state(shape)["decoder.layers.0.self_attention.linear_qkv.weight"]
    blocks = fused.view(2, 4 + 2, 4, 16)  # groups, (4 queries, key, value), channels, hidden
    q, k, v = (t for _, t in hub_tensors(shape, "decoder.layers.0.self_attention.linear_qkv.weight", fused))
    assert torch.equal(q, blocks[:, :4].reshape(32, 16))
    assert torch.equal(k, blocks[:, 4].reshape(8, 16))
    assert torch.equal(v, blocks[:, 5].reshape(8, 16))


def test_names_are_those_of_the_hub() -> None:
    shape = parent(hybrid_layer_pattern="M*E-")
    hub = {n for name, t in random_state(shape).items() for n, _ in hub_tensors(shape, name, t)}
    mixers = {
        0: "in_proj.weight conv1d.weight conv1d.bias A_log D dt_bias norm.weight out_proj.weight",
        1: "q_proj.weight k_proj.weight v_proj.weight o_proj.weight",
        2: "gate.weight gate.e_score_correction_bias shared_experts.up_proj.weight shared_experts.down_proj.weight "
        + " ".join(f"experts.{e}.{p}_proj.weight" for e in range(8) for p in ("up", "down")),
        3: "up_proj.weight down_proj.weight",
    }
    layers = {f"backbone.layers.{i}.mixer.{n}" for i, names in mixers.items() for n in names.split()}
    ends = {"backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight"}
    assert hub == layers | ends | {f"backbone.layers.{i}.norm.weight" for i in range(4)}


def test_names_of_transformer_engine_modules_are_understood() -> None:
    shape, state = parent(), random_state(parent())
    te = {}
    for name, tensor in state.items():
        layer, layout, expert = locate(shape, name)
        spelling = layout.aliases[-1].format(e=expert) if layout.aliases else layout.name.format(e=expert)
        te[spelling if layer is None else f"decoder.layers.{layer}.{spelling}"] = tensor
    assert te.keys() != state.keys()
    hub = [dict(pair for n, t in s.items() for pair in hub_tensors(shape, n, t)) for s in (state, te)]
    assert same(*hub)


def test_shards_stay_below_their_limit_and_are_indexed(tmp_path: Path) -> None:
    write_hf(tmp_path / "m", manifest(), random_state(parent()).items(), max_shard_bytes=4000)
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    tensors, files = stored(tmp_path / "m"), sorted(tmp_path.glob("m/*.safetensors"))
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert {f.name for f in files} == set(index["weight_map"].values())
    assert len(files) > 3 and files[-1].name.endswith(f"-of-{len(files):05d}.safetensors")
    for file in files:
        sizes = [tensors[n].nbytes for n, f in index["weight_map"].items() if f == file.name]
        assert sum(sizes) <= 4000 or len(sizes) == 1


def test_asked_dtype_leaves_the_sensitive_vectors_and_the_router_in_fp32(tmp_path: Path) -> None:
    write_hf(tmp_path / "m", manifest(), random_state(parent()).items(), dtype=torch.bfloat16)
    kept = {n.rsplit("mixer.")[-1] for n, t in stored(tmp_path / "m").items() if t.dtype is torch.float32}
    assert kept == {"A_log", "D", "dt_bias", "gate.weight", "gate.e_score_correction_bias"}
    assert json.loads((tmp_path / "m/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_config_is_the_parents_with_only_the_sliced_fields_changed(tmp_path: Path) -> None:
    base = {"model_type": "nemotron_h", "time_step_limit": [0.0, float("inf")], "rope_theta": 7, "expand": 2,
            "torch_dtype": "bfloat16", "time_step_min": 0.001, **parent().to_hf()}  # fmt: skip
    source = replace(manifest(), hf_config=base | {"auto_map": {"AutoConfig": "configuration_x.X"}})
    write_hf(tmp_path / "m", source, random_state(parent()).items(), submodel="middle", dtype=torch.bfloat16)
    config = json.loads((tmp_path / "m/config.json").read_text())
    changed = {k: v for k, v in config.items() if base.get(k) != v}
    assert changed == {
        "hidden_size": 12, "n_routed_experts": 6, "moe_intermediate_size": 8, "mamba_num_heads": 6,
        "mamba_head_dim": 3, "num_attention_heads": 6, "num_hidden_layers": 6,
        "mamba_n_groups": 2, "intermediate_size": 8,  # no dense layer is left: the experts' width
        "hybrid_override_pattern": "MEM*EM", "time_step_min": 1e-30, "architectures": ["NemotronHForCausalLM"],
        "time_step_limit": [0.0, 3.4028234663852886e38],  # JSON has no infinity
        "layers_block_type": [
            "linear_attention", "moe", "linear_attention", "full_attention", "moe", "linear_attention",
        ],
    }  # fmt: skip
    # 6 heads of 3 channels are no whole multiple of 12; auto_map went, as its files did not come along
    assert base.keys() - config.keys() == {"expand"}


def test_remote_code_comes_along_and_meets_no_property_without_setter(tmp_path: Path) -> None:
    base = {"model_type": "nemotron_h", "auto_map": {"AutoConfig": "configuration_x.X"}, **parent().to_hf()}
    del base["layers_block_type"]
    byte_tokenizer().save_pretrained(tmp_path / "t")
    (tmp_path / "t/configuration_x.py").touch()
    source = replace(manifest(), hf_config=base)
    write_hf(tmp_path / "m", source, random_state(parent()).items(), side_files=tmp_path / "t", elastic=True)
    slice_hf(tmp_path / "m", tmp_path / "s", "small")
    for folder in (tmp_path / "m", tmp_path / "s"):
        config = json.loads((folder / "config.json").read_text())
        assert "auto_map" in config and "layers_block_type" not in config
        assert (folder / "configuration_x.py").exists() and (folder / "tokenizer.json").exists()


@settings(max_examples=6, deadline=None)
@given(st.sampled_from(["large", "middle"]), st.integers(0, 99), st.sampled_from([1, 2]))
def test_slice_of_a_slice_is_the_slice(between: str, seed: int, lanes: int) -> None:
    source = manifest(lanes=lanes)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_hf(root / "p", source, random_state(parent(), seed).items(), elastic=True)
        slice_hf(root / "p", root / "b", between, elastic=True)
        slice_hf(root / "b", root / "ba", "small")
        slice_hf(root / "p", root / "a", "small")
        assert same(stored(root / "ba"), stored(root / "a"))
        configs = [json.loads((root / n / "config.json").read_text()) for n in ("ba", "a")]
    assert configs[0] == configs[1]


def _with(source: Manifest, name: str, like: str, **widths: object) -> Manifest:
    spec = SubmodelSpec.of(source.submodels[like].to_dict() | widths)  # type: ignore[operator]
    return replace(source, submodels={**source.submodels, name: spec})


def test_nested_manifest_holds_exactly_the_smaller_submodels_and_their_layers() -> None:
    source = _with(manifest(), "wide", "small", hidden_size=16)
    nested = nested_manifest(source, "middle")
    assert set(nested.submodels) == {"middle", "small"}
    assert nested.shape.hybrid_layer_pattern == "MEM*EM" and nested.space is not None
    assert nested.space.layer_order == (3, 1, 0, 5, 4, 2)
    assert Manifest.from_dict(json.loads(json.dumps(nested.to_dict()))) == nested


def test_slicing_states_twice_is_slicing_once_for_heterogeneous_submodels_too() -> None:
    source = _with(manifest(), "shallow", "middle", num_layers=4)  # drops the second MoE layer
    source = _with(source, "odd", "small", num_moe_experts=[4, 6])
    state, nested = random_state(parent()), nested_manifest(source, "shallow")
    assert source.space is not None and nested.space is not None
    assert nested.submodels["odd"]["num_moe_experts"] == (4,)
    shallow = slice_state(source.space, source.submodels["shallow"], state.items())
    twice = dict(slice_state(nested.space, nested.submodels["odd"], shallow))
    assert same(twice, dict(slice_state(source.space, source.submodels["odd"], state.items())))


def test_plain_order_is_the_ranking_again() -> None:
    source, shape = manifest(), parent()
    ranked = random_state(shape)
    ranked["decoder.layers.5.mlp.linear_fc1.weight"] = torch.arange(12.0)[:, None].expand(12, 16).clone()
    ranked["decoder.layers.1.mlp.router.expert_bias"] = torch.arange(8.0)
    for e in range(8):
        ranked[f"decoder.layers.1.mlp.experts.local_experts.{e}.linear_fc2.weight"].fill_(e)
    orders = {
        (5, "ffn_hidden_size"): stored_order(range(12), 2),
        (1, "num_moe_experts"): stored_order(range(8), 2),
    }
    dealt = dict(permute_state(shape, orders, ranked.items()))
    assert not torch.equal(dealt["decoder.layers.1.mlp.router.expert_bias"], torch.arange(8.0))
    with tempfile.TemporaryDirectory() as folder:
        write_hf(Path(folder, "a"), source, dealt.items(), submodel="middle", plain_order=True)
        middle = stored(Path(folder, "a"))
        write_hf(Path(folder, "b"), source, dealt.items(), plain_order=True)
        whole = stored(Path(folder, "b"))
    for tensors, experts in ((middle, 6), (whole, 8)):
        assert tensors["backbone.layers.1.mixer.gate.e_score_correction_bias"].tolist() == list(
            range(experts)
        )
        for e in range(experts):
            assert (tensors[f"backbone.layers.1.mixer.experts.{e}.down_proj.weight"] == e).all()
    assert whole["backbone.layers.5.mixer.up_proj.weight"][:, 0].tolist() == list(range(12))
    assert same(
        {n: t for n, t in whole.items() if "layers.3." in n},
        {n: t for name, x in ranked.items() if "layers.3." in name for n, t in hub_tensors(shape, name, x)},
    )


def test_several_submodels_get_a_directory_each(tmp_path: Path) -> None:
    write_hf(tmp_path / "p", manifest(), random_state(parent()).items(), elastic=True)
    assert slice_hf(tmp_path / "p", tmp_path / "s", ["middle", "small"]).written == [
        tmp_path / "s/middle",
        tmp_path / "s/small",
    ]
    assert [read_hf(tmp_path / "s" / n).manifest.shape.hidden_size for n in ("middle", "small")] == [12, 5]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError, UserError])
def test_an_interrupted_export_leaves_nothing(tmp_path: Path, stop: type[BaseException]) -> None:
    seen: list[Path] = []

    class Interrupted(Memory):
        def read(self, key: str, start: int, out: torch.Tensor) -> None:
            if "layers.5" in key:
                seen.extend(tmp_path.rglob("*"))
                raise stop
            super().read(key, start, out)

    source = in_memory(manifest(), random_state(parent()))
    source = replace(source, files=Interrupted(random_state(parent())))
    with pytest.raises(stop):
        to_hf(source, [Request(tmp_path / "m"), Request(tmp_path / "s", "small")], max_shard_bytes=4000)
    assert any(p.suffix == ".safetensors" for p in seen)
    assert not {tmp_path / "m", tmp_path / "s"} & set(seen) and not any(p.name == "config.json" for p in seen)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_is_swept_away(tmp_path: Path) -> None:
    left = private_name(tmp_path / "m")
    left.mkdir()
    (left / "old.safetensors").write_bytes(b"junk")
    (tmp_path / "m").mkdir()  # an empty destination is taken
    write_hf(tmp_path / "m", manifest(), random_state(parent()).items())
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_an_elastic_directory_without_submodel_has_the_stored_order(tmp_path: Path) -> None:
    state, source = random_state(parent()), manifest()
    write_hf(tmp_path / "m", source, state.items(), elastic=True)
    opened = read_hf(tmp_path / "m")
    assert same(dict(opened.state()), state)
    assert (opened.manifest.space, opened.manifest.submodels) == (source.space, source.submodels)
    assert opened.manifest.hf_config == read_config(tmp_path / "m")
    assert all(
        a <= b for a, b in itertools.pairwise([opened.manifest.submodels[n] for n in ("small", "middle")])
    )


def test_an_elastic_space_of_one_model_changes_nothing(tmp_path: Path) -> None:
    shape = parent()
    alone = Manifest(shape=shape, space=ElasticSpace(shape, ()), submodels={"all": SubmodelSpec()})
    state = random_state(shape)
    write_hf(tmp_path / "m", alone, state.items(), submodel="all")
    assert same(dict(read_hf(tmp_path / "m").state()), state)
