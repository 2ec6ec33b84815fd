"""``config.json`` states exactly the model that was written, in spellings that loaders accept side by side."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import manifest, parent
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_megatron.checkpoint.hf_config import code_files, hf_config
from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.checkpoint.nested import nested_manifest
from elastic_megatron.checkpoint.stored import model_tensors
from elastic_megatron.cost import account
from elastic_megatron.errors import UserError
from elastic_megatron.space import ElasticSpace, ParentShape, SubmodelSpec

transformers = pytest.importorskip("transformers")

SHAPE = parent()
NEW = SHAPE.to_hf()
OLD_NAMES = {"linear_attention": "mamba", "full_attention": "attention"}
OLD = [OLD_NAMES.get(t, t) for t in NEW["layers_block_type"]]
PATTERN = {k: v for k, v in NEW.items() if k != "layers_block_type"}
LIST = {k: v for k, v in NEW.items() if k not in ("hybrid_override_pattern", "num_hidden_layers")}
# fields of the public Nano v3 config.json that no size changes, as far as they are known
PUBLIC = {
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "attention_bias": False,
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "initializer_range": 0.02, "mamba_hidden_act": "silu",
    "mamba_proj_bias": False, "mamba_ssm_cache_dtype": "float32", "mlp_bias": False, "mlp_hidden_act": "relu2",
    "n_group": 1, "topk_group": 1, "norm_eps": 1e-5, "norm_topk_prob": True, "num_logits_to_keep": 1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "partial_rotary_factor": 1.0, "rope_theta": 10000,
    "rescale_prenorm_residual": True, "residual_in_fp32": False, "sliding_window": None, "time_step_floor": 1e-4,
    "time_step_max": 0.1, "time_step_min": 0.001, "torch_dtype": "bfloat16", "use_bias": False, "use_cache": True,
    "use_conv_bias": True, "use_mamba_kernels": True, "transformers_version": "4.55.4",
}  # fmt: skip
PARENTS: dict[str, dict[str, Any]] = {
    "none": {},
    "published with a pattern": PUBLIC | PATTERN,
    "published with a list": PUBLIC | LIST | {"layers_block_type": OLD},
    "saved by transformers": PUBLIC | LIST,
    "both, as of old": PUBLIC | NEW | {"layers_block_type": OLD},
    "second names": PUBLIC
    | PATTERN
    | {"mamba_expand": 2, "num_local_experts": 8, "layer_types": NEW["layers_block_type"]},
}


def _config(source: Manifest, name: str | None = None, code: Sequence[str] = ()) -> dict[str, Any]:
    """As the exporter asks for it."""
    if name is None:
        return hf_config(source, source.shape, code)
    space, spec = source.space, source.submodels[name]
    assert space is not None
    sizes = {new: space.layer_sizes(spec, old) for new, old in enumerate(space.kept_layers(spec))}
    return hf_config(source, space.widest_shape(spec), code, sizes)


def _directory(folder: Path, config: Mapping[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name, file in code_files(config).items():
        shutil.copy(file, folder / name)
    return folder


def _widths(**widths: Any) -> Manifest:
    """A family with one more submodel, ``odd``; every axis may differ between layers."""
    source = manifest()
    assert source.space is not None
    space = replace(source.space, per_layer=frozenset(source.space.axes) - {"hidden_size", "num_layers"})
    odd = SubmodelSpec.of(space.full().to_dict() | widths)
    return replace(source, space=space, submodels={**source.submodels, "odd": odd})


@pytest.mark.parametrize("name", [None, "large", "middle", "small"])
@pytest.mark.parametrize("given_parent", PARENTS)
def test_transformers_builds_a_model_of_exactly_the_counted_parameters(
    tmp_path: Path, given_parent: str, name: str | None
) -> None:
    source = replace(manifest(), hf_config=PARENTS[given_parent])
    assert source.space is not None
    spec = source.space.full() if name is None else source.submodels[name]
    assert not source.hf_config or ParentShape.from_hf(source.hf_config) == SHAPE
    config = transformers.AutoConfig.from_pretrained(_directory(tmp_path / "m", _config(source, name)))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    biases = (b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))
    counted = sum(t.numel() for t in (*model.parameters(), *biases))
    assert counted == account(source.space, spec).total_params
    assert config.hybrid_override_pattern == source.space.shape_of(spec).hybrid_layer_pattern


def test_only_what_a_size_decides_differs_from_the_parents_config() -> None:
    source = replace(manifest(), hf_config=PUBLIC | PATTERN)
    changed = {k for k, v in _config(source, "small").items() if source.hf_config.get(k) != v}
    assert changed == {
        "hidden_size", "num_hidden_layers", "hybrid_override_pattern", "n_routed_experts", "moe_intermediate_size",
        "mamba_num_heads", "mamba_head_dim", "num_attention_heads", "time_step_min",
        "mamba_n_groups", "intermediate_size",  # which other engines want, docs/engines.md; no dense layer is left
    }  # fmt: skip
    assert source.hf_config.keys() - _config(source, "small").keys() == {"expand"}
    whole = _config(source)
    assert {k: v for k, v in whole.items() if source.hf_config.get(k) != v} == {
        "time_step_min": 1e-30,
        "mamba_n_groups": source.shape.mamba_num_groups,
    }
    assert not source.hf_config.keys() - whole.keys()


@pytest.mark.parametrize(
    ("widths", "expand"), [({}, 2), ({"hidden_size": 5}, None), ({"mamba_head_dim": 2}, 1)]
)
@pytest.mark.parametrize("second", [{}, {"mamba_expand": 2}])
def test_expand_is_a_whole_number_or_absent(
    widths: dict[str, int], expand: int | None, second: dict[str, int]
) -> None:
    source = replace(_widths(**widths), hf_config=PUBLIC | PATTERN | second)
    found = _config(source, "odd")
    assert [found.get(k) for k in ("expand", *second)] == [expand] * (1 + len(second))
    assert all(isinstance(found.get(k, 0), int) for k in ("expand", "mamba_expand"))


def test_a_parents_untrue_expand_stays_with_the_parent_only() -> None:
    source = replace(manifest(parent(mamba_head_dim=5)), hf_config=PUBLIC | PATTERN | {"mamba_head_dim": 5})
    assert _config(source)["expand"] == 2
    assert "expand" not in _config(source, "small")


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(PARENTS)), st.sampled_from(["large", "middle"]), st.booleans())
def test_the_config_of_a_slice_of_a_slice_is_that_of_the_slice(
    given_parent: str, between: str, remote_code: bool
) -> None:
    source = replace(manifest(), hf_config=PARENTS[given_parent])
    code = ["configuration_nemotron_h.py"] if remote_code else []
    inner = replace(nested_manifest(source, between), hf_config=_config(source, between, code))
    assert _config(inner, "small", code) == _config(source, "small", code)


@pytest.mark.parametrize("given_parent", PARENTS)
def test_layer_types_stand_beside_the_pattern_only_where_the_parent_has_them_in_new_names(
    given_parent: str,
) -> None:
    source = replace(manifest(), hf_config=PARENTS[given_parent])
    config = _config(source, "middle")
    assert (config["hybrid_override_pattern"], config["num_hidden_layers"]) == ("MEM*EM", 6)
    listed = NEW["layers_block_type"][:5] + NEW["layers_block_type"][6:]
    assert config.get("layers_block_type") == (listed if given_parent == "saved by transformers" else None)


def test_remote_code_is_named_only_where_it_comes_along() -> None:
    """Code of a repository of the hub, or of a file that is not there, is not."""
    file, remote = "configuration_nemotron_h.py", "owner/name--configuration_nemotron_h.NemotronHConfig"
    code = {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"}
    more = {"AutoModel": remote, "AutoTokenizer": ["tokenization_x.Slow", None], "Odd": [], "Odder": {"a": 1}}
    source = replace(manifest(), hf_config=PUBLIC | PATTERN | {"auto_map": code | more})
    assert _config(source, "small", [file])["auto_map"] == code
    assert "auto_map" not in _config(source, "small")
    assert not code_files(_config(source, "small", [file]))


def test_an_elastic_directory_is_the_parent_to_transformers(tmp_path: Path) -> None:
    source = manifest()
    folder = _directory(tmp_path / "m", _config(source))
    plain = transformers.AutoConfig.from_pretrained(folder).to_dict()
    source.write(folder / "elastic_config.json")
    assert transformers.AutoConfig.from_pretrained(folder).to_dict() == plain
    assert Manifest.read(folder / "elastic_config.json") == source


UNEVEN = {
    "num_moe_experts": [8, 6], "moe_ffn_hidden_size": [4, 12], "moe_shared_expert_intermediate_size": [6, 3],
    "ffn_hidden_size": [4, 12, 8],
}  # fmt: skip


def _uneven() -> tuple[Manifest, ParentShape, dict[int, dict[str, int]]]:
    """Every axis that a loader can be told by layer differs; the second dense layer is left out."""
    shape = parent(hybrid_layer_pattern="ME-M-*E-")
    choices: dict[str, list[int]] = {a: sorted(set(w)) for a, w in UNEVEN.items()} | {"num_layers": [7]}
    space = ElasticSpace.build(shape, choices, per_layer=list(UNEVEN), layer_order=[0, 1, 2, 3, 5, 6, 7, 4])
    spec = SubmodelSpec.of(space.full().to_dict() | UNEVEN | {"num_layers": 7})
    sizes = {new: space.layer_sizes(spec, old) for new, old in enumerate(space.kept_layers(spec))}
    source = Manifest(
        shape=shape, space=space, submodels={"full": space.full(), "odd": spec}, hf_config=PUBLIC
    )
    return source, space.widest_shape(spec), sizes


def test_layers_that_differ_are_stated_one_by_one() -> None:
    source, shape, sizes = _uneven()
    config = hf_config(source, shape, True, sizes)
    moe = {"block_type": "moe", "num_experts_per_tok": 2}
    first = {"n_routed_experts": 8, "moe_intermediate_size": 4, "moe_shared_expert_intermediate_size": 6}
    last = {"n_routed_experts": 6, "moe_intermediate_size": 12, "moe_shared_expert_intermediate_size": 3}
    assert config["block_configs"] == [
        {"block_type": "mamba"}, moe | first, {"block_type": "mlp", "intermediate_size": 4},
        {"block_type": "mamba"}, {"block_type": "attention"}, moe | last, {"block_type": "mlp", "intermediate_size": 8},
    ]  # fmt: skip
    assert config["hybrid_override_pattern"] == "ME-M*E-" and "layers_block_type" not in config
    assert (config["model_type"], config["architectures"]) == (
        "nemotron_h_puzzle",
        ["NemotronHPuzzleForCausalLM"],
    )
    largest = [config[f] for f in ("n_routed_experts", "moe_intermediate_size", "intermediate_size")]
    assert largest == [8, 12, 8]


def test_modules_built_by_the_config_of_their_layer_have_the_shapes_of_its_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.nemotron_h import modeling_nemotron_h as modules

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    source, shape, sizes = _uneven()
    folder = _directory(tmp_path / "m", hf_config(source, shape, False, sizes))
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.hybrid_override_pattern == shape.hybrid_layer_pattern
    expected = {t.name: t.shape for t in model_tensors(shape, sizes)}
    for layer, symbol in enumerate(shape.hybrid_layer_pattern):
        own = config.get_nemotron_h_config_for_layer(layer)
        mlp = f"decoder.layers.{layer}.mlp."
        with torch.device("meta"):
            if symbol == "E":
                mixer = modules.NemotronHMoE(own)
                shared, experts = mixer.shared_experts, mixer.experts.up_proj
                assert expected[mlp + "shared_experts.linear_fc1.weight"] == shared.up_proj.weight.shape
                assert expected[mlp + "router.weight"] == mixer.gate.weight.shape
                assert expected[mlp + "experts.local_experts.0.linear_fc1.weight"] == experts.shape[1:]
                assert mlp + f"experts.local_experts.{len(experts)}.linear_fc1.weight" not in expected
            elif symbol == "-":
                assert expected[mlp + "linear_fc1.weight"] == modules.NemotronHMLP(own).up_proj.weight.shape
    assert (config.n_routed_experts, config.moe_intermediate_size, config.intermediate_size) == (8, 12, 8)
    config.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["block_configs"] == config.block_configs


def test_equal_layers_make_a_plain_model_however_they_are_listed() -> None:
    source = _widths(num_moe_experts=[6, 6], moe_ffn_hidden_size=[8, 8])
    assert _config(source, "odd")["model_type"] == "nemotron_h"
    assert not code_files(_config(source, "odd"))


@pytest.mark.parametrize(
    "widths",
    [
        {"mamba_num_heads": [8, 6, 2]},
        {"mamba_head_dim": [4, 4, 3]},
        {"mamba_num_heads": [8, 6, 2], "num_moe_experts": [8, 6]},
    ],
)
def test_an_axis_that_no_loader_reads_by_layer_is_refused(widths: dict[str, list[int]]) -> None:
    axis = next(iter(widths))
    with pytest.raises(UserError) as error:
        _config(_widths(**widths), "odd")
    assert str(error.value) == (
        f"{axis} differs between layers, which no loader of nemotron_h models can be told; choose a submodel with "
        f"equal widths (this family has: large, middle, small), or train without space.per_layer for {axis}"
    )


def test_query_heads_that_differ_are_refused() -> None:
    shape = parent(hybrid_layer_pattern="M**")
    space = ElasticSpace.build(shape, {"num_attention_heads": [4]}, per_layer=["num_attention_heads"])
    source = Manifest(
        shape=shape, space=space, submodels={"odd": SubmodelSpec.of({"num_attention_heads": [8, 4]})}
    )
    with pytest.raises(
        UserError, match=r"num_attention_heads differs between layers.*this family has none\)"
    ):
        _config(source, "odd")
