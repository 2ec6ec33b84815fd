"""Every score is its definition, computed slowly from stored layer inputs and the model's weights alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from importance_models import PARENT, build, exact, logits, relative, tokens
from torch import Tensor, nn

from elastic_megatron.errors import UserError
from elastic_megatron.importance import Ranking, collect
from elastic_megatron.space import AXIS_NAMES

WIDTHS = tuple(a for a in AXIS_NAMES if a != "num_layers")
KEPT = 4


def ranked(model: nn.Module, batches: list[Tensor], axes: tuple[str, ...] = WIDTHS, **more) -> Ranking:
    with exact():
        return collect([model], PARENT, [{"tokens": b} for b in batches], axes=axes, **more)


def layer_inputs(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """[sequence, batch, hidden] entering each layer, and the final norm."""
    found: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, __, kw: found.append(kw["hidden_states"]), with_kwargs=True)
        for layer in model.decoder.layers
    ]
    handles.append(model.decoder.final_norm.register_forward_pre_hook(lambda _, args: found.append(args[0])))
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return found


def norm_of(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + PARENT.layernorm_epsilon).sqrt() * weight


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return tokens()


@pytest.fixture(scope="module")
def ranking(model: nn.Module, ids: Tensor) -> Ranking:
    return ranked(model, [ids[:1], ids[1:]], head_dim_kept=KEPT)


@pytest.fixture(scope="module")
def normed(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """Normalised inputs of every norm site, [tokens, hidden], sequences kept apart as [b, s, hidden]."""
    state = model.state_dict()
    names = ["input_layernorm" if s == "*" else "norm" if s == "M" else "pre_mlp_layernorm"
             for s in PARENT.hybrid_layer_pattern]  # fmt: skip
    keys = [f"decoder.layers.{i}.{n}.weight" for i, n in enumerate(names)] + ["decoder.final_norm.weight"]
    inputs = layer_inputs(model, ids)
    return [norm_of(x, state[k]).transpose(0, 1) for x, k in zip(inputs, keys, strict=True)]


def weight(model: nn.Module, layer: int, name: str) -> Tensor:
    return model.state_dict()[f"decoder.layers.{layer}.{name}"]


def test_hidden_channels_sum_absolute_norm_outputs_over_all_sites(ranking, normed):
    truth = sum(x.abs().sum((0, 1)) for x in normed)
    assert relative(ranking.scores["hidden_size"], truth) < 1e-12


def test_feed_forward_channels_sum_absolute_first_projections(model, ranking, normed):
    for i, key, name in (
        (5, "ffn_hidden_size", "mlp.linear_fc1.weight"),
        (1, "moe_shared_expert_intermediate_size", "mlp.shared_experts.linear_fc1.weight"),
    ):
        truth = (normed[i] @ weight(model, i, name).T).abs().sum((0, 1))
        assert relative(ranking.scores[f"layers.{i}.{key}"], truth) < 1e-12


def routed(model: nn.Module, layer: int, x: Tensor) -> list[tuple[int, float]]:
    """(expert, weight) of one token: top-k of sigmoid + bias, unbiased scores renormalised and scaled."""
    scores = torch.sigmoid(weight(model, layer, "mlp.router.weight").double() @ x)
    chosen = (scores + weight(model, layer, "mlp.router.expert_bias")).topk(PARENT.moe_router_topk).indices
    total = sum(float(scores[j]) for j in chosen) + 1e-20
    return [(int(j), float(scores[j]) / total * PARENT.moe_router_topk_scaling_factor) for j in chosen]


def test_law_11_reap_is_its_definition_token_by_token(model, ranking, normed):
    for layer in PARENT.layers_of("E"):
        sums, counts = [0.0] * PARENT.num_moe_experts, [0] * PARENT.num_moe_experts
        channels = torch.zeros(PARENT.num_moe_experts, PARENT.moe_ffn_hidden_size, dtype=torch.float64)
        for x in normed[layer].flatten(0, 1):
            for j, g in routed(model, layer, x):
                up = weight(model, layer, f"mlp.experts.local_experts.{j}.linear_fc1.weight") @ x
                down = weight(model, layer, f"mlp.experts.local_experts.{j}.linear_fc2.weight")
                f_j = down @ up.clamp_min(0).square()
                sums[j] += g * math.sqrt(float(f_j @ f_j))
                counts[j] += 1
                channels[j] += up.abs()
        truth = torch.tensor([s / n for s, n in zip(sums, counts, strict=True)], dtype=torch.float64)
        assert relative(ranking.scores[f"layers.{layer}.num_moe_experts"], truth) < 1e-12
        assert ranking.tokens[layer].tolist() == counts
        assert relative(ranking.scores[f"layers.{layer}.moe_ffn_hidden_size"], channels) < 1e-12


def test_mamba_channels_and_heads(model, ranking, normed):
    heads, dim = PARENT.mamba_num_heads, PARENT.mamba_head_dim
    for i in PARENT.layers_of("M"):
        x_rows = weight(model, i, "mixer.in_proj.weight")[heads * dim : 2 * heads * dim]
        s = (normed[i].flatten(0, 1) @ x_rows.T).view(-1, heads, dim)
        of_dim = torch.stack([s[:, :, d].norm() for d in range(dim)])
        best = sorted(range(dim), key=lambda d: -float(of_dim[d]))[:KEPT]
        of_head = torch.stack([s[:, h, best].norm() for h in range(heads)])
        assert relative(ranking.scores[f"layers.{i}.mamba_head_dim"], of_dim) < 1e-12
        assert relative(ranking.scores[f"layers.{i}.mamba_num_heads"], of_head) < 1e-12


def test_all_channels_count_for_mamba_heads_where_head_dim_is_not_cut(model, ids, normed):
    heads, inner = PARENT.mamba_num_heads, PARENT.mamba_num_heads * PARENT.mamba_head_dim
    s = normed[0].flatten(0, 1) @ weight(model, 0, "mixer.in_proj.weight")[inner : 2 * inner].T
    truth = s.view(len(s), heads, -1).norm(dim=(0, 2))
    assert (
        relative(ranked(model, [ids], ("mamba_num_heads",)).scores["layers.0.mamba_num_heads"], truth) < 1e-12
    )


def test_ssm_states_multiply_the_norms_of_b_and_c_after_the_convolution(model, ranking, normed):
    inner = PARENT.mamba_num_heads * PARENT.mamba_head_dim
    groups, states = PARENT.mamba_num_groups, PARENT.mamba_state_dim
    for i in PARENT.layers_of("M"):
        rows = normed[i] @ weight(model, i, "mixer.in_proj.weight").T
        xbc = rows[..., inner : 2 * inner + 2 * groups * states].transpose(1, 2)
        w, b = weight(model, i, "mixer.conv1d_weight"), weight(model, i, "mixer.conv1d_bias")
        assert b.abs().max() > 0.1
        out = F.silu(F.conv1d(xbc, w, b, padding=w.shape[-1] - 1, groups=w.shape[0])[..., : xbc.shape[-1]])
        _, big_b, big_c = out.split([inner, groups * states, groups * states], dim=1)
        truth = torch.zeros(states, dtype=torch.float64)
        for g in range(groups):
            for n in range(states):
                at = g * states + n
                truth[n] += big_b[:, at].norm() * big_c[:, at].norm()
        assert relative(ranking.scores[f"layers.{i}.mamba_state_dim"], truth) < 1e-12


def test_query_heads(model, ranking, normed):
    groups, heads, dim = PARENT.num_query_groups, PARENT.num_attention_heads, PARENT.kv_channels
    qkv = weight(model, 3, "self_attention.linear_qkv.weight").view(groups, heads // groups + 2, dim, -1)
    truth = [(normed[3] @ qkv[g, h].T).norm() for g in range(groups) for h in range(heads // groups)]
    assert relative(ranking.scores["layers.3.num_attention_heads"], torch.stack(truth)) < 1e-12


def test_results_do_not_depend_on_the_batch_split(model, ids, ranking):
    other = ranked(model, list(ids.split(1)), head_dim_kept=KEPT)
    for key, score in ranking.scores.items():
        assert relative(other.scores[key], score) < 1e-12, key
    assert (other.data_digest, other.token_count) == (ranking.data_digest, ids.numel())
    assert ranked(model, [tokens(seed=5)], ("hidden_size",)).data_digest != ranking.data_digest


def test_experts_without_tokens_and_dead_channels_are_reported(ids):
    model = build(seed=3)
    with torch.no_grad():
        model.decoder.layers[4].mlp.router.expert_bias[[2, 5]] = -50.0
        model.decoder.layers[5].mlp.linear_fc1.weight[7] = 0
        model.decoder.layers[4].mlp.experts.local_experts[1].linear_fc1.weight[9] = 0
    ranking = ranked(model, [ids])
    score, order = (getattr(ranking, x)["layers.4.num_moe_experts"] for x in ("scores", "orders"))
    assert (ranking.tokens[4] == 0).nonzero().flatten().tolist() == [2, 5]
    assert score[[2, 5]].isneginf().all() and order[-2:].tolist() == [2, 5]
    assert ranking.unseen() == {
        "layers.4.num_moe_experts": [2, 5],
        "layers.4.moe_ffn_hidden_size": {"1": [9]},
        "layers.5.ffn_hidden_size": [7],
    }


class _FusedNormLinear(nn.Module):
    """As Transformer Engine's: the norm's weight lives in the linear, and only the product comes out."""

    def __init__(self, norm: nn.Module, linear: nn.Module) -> None:
        super().__init__()
        self.layer_norm_weight, self.linear, self.norm = norm.weight, linear, norm

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.linear(self.norm(x))[0], None


class _GroupedLinear(nn.Module):
    def __init__(self, linears: list[nn.Module]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, x: Tensor, splits: list[int]) -> tuple[Tensor, None]:
        parts = zip(self.linears, x.split(splits), strict=True)
        return torch.cat([linear(rows)[0] for linear, rows in parts]), None


class _GroupedExperts(nn.Module):
    """As Transformer Engine's ``TEGroupedMLP``: one module for the same projection of all experts."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.linear_fc1 = _GroupedLinear([e.linear_fc1 for e in experts.local_experts])
        self.linear_fc2 = _GroupedLinear([e.linear_fc2 for e in experts.local_experts])

    def forward(self, x: Tensor, counts: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        splits = counts.tolist()
        inner = self.linear_fc1(x, splits)[0].clamp_min(0).square() * probs.unsqueeze(-1)
        return self.linear_fc2(inner, splits)[0], None


def test_fused_norms_and_grouped_experts_score_like_plain_modules(model, ids, ranking):
    from megatron.core.transformer.identity_op import IdentityOp

    fused = build()
    for layer, symbol in zip(fused.decoder.layers, PARENT.hybrid_layer_pattern, strict=True):
        if symbol == "M":
            layer.mixer.in_proj, layer.norm = _FusedNormLinear(layer.norm, layer.mixer.in_proj), IdentityOp()
        elif symbol == "*":
            attention = layer.self_attention
            attention.linear_qkv = _FusedNormLinear(layer.input_layernorm, attention.linear_qkv)
            layer.input_layernorm = IdentityOp()
        elif symbol == "-":
            layer.mlp.linear_fc1 = _FusedNormLinear(layer.pre_mlp_layernorm, layer.mlp.linear_fc1)
            layer.pre_mlp_layernorm = IdentityOp()
        else:
            layer.mlp.experts = _GroupedExperts(layer.mlp.experts)
    assert relative(logits(fused, ids), logits(model, ids)) < 1e-12
    other = ranked(fused, [ids], head_dim_kept=KEPT)
    for key, score in ranking.scores.items():
        assert relative(other.scores[key], score) < 1e-12, key


def test_the_model_is_left_as_it_was(model, ids):
    before = logits(model, ids)
    model.train()
    model.decoder.layers[0].eval()
    ranked(model, [ids], AXIS_NAMES, depth_iterative=False)
    assert model.training and not model.decoder.layers[0].training and model.decoder.layers[1].training
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.equal(logits(model, ids), before)


def test_bad_requests_are_user_errors(model, ids):
    with pytest.raises(UserError, match="known axes"):
        ranked(model, [ids], ("hidden",))
    dense = PARENT.override(hybrid_layer_pattern="M-")
    with pytest.raises(UserError, match="no such layer"):
        collect([model], dense, [{"tokens": ids}], axes=["num_moe_experts"])
    with pytest.raises(UserError, match="no calibration data"):
        ranked(model, [], ("hidden_size",))
    broken = build()
    with torch.no_grad():
        broken.decoder.layers[5].mlp.linear_fc1.weight[3] = float("nan")
    with pytest.raises(UserError, match=r"layers\.5\.ffn_hidden_size are not finite"):
        ranked(broken, [ids], ("ffn_hidden_size",))
