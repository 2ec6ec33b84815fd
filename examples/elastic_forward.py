"""A Megatron model that runs at any of its sizes: build a space, build the model, run a submodel.

python examples/elastic_forward.py
"""

from __future__ import annotations

import torch

from elastic_megatron import (
    ElasticSpace,
    ParentShape,
    SubmodelMix,
    SubmodelSpec,
    account,
    build_elastic_model,
    running,
    runtime,
)


def main() -> None:
    device = runtime.start(seed=1).device  # process groups, seeds; without a GPU also the CPU adaptations
    parent = ParentShape(
        hybrid_layer_pattern="ME*E", hidden_size=64, vocab_size=256,
        mamba_num_heads=8, mamba_head_dim=16, mamba_state_dim=16, mamba_num_groups=2,
        num_attention_heads=4, num_query_groups=2, kv_channels=16,
        num_moe_experts=8, moe_router_topk=2, moe_ffn_hidden_size=48,
    )  # fmt: skip
    choices = {"hidden_size": [32, 48], "num_moe_experts": [4]}
    space = ElasticSpace.build(parent, choices, lanes={"num_moe_experts": 2})
    model = build_elastic_model(space)  # Megatron's HybridModel; parameter names are those of the stock model
    tokens = torch.randint(0, parent.vocab_size, (2, 33), device=device)
    inputs, positions = tokens[:, :-1], torch.arange(32, device=device).expand(2, -1)
    for spec in (space.full(), SubmodelSpec.of({"hidden_size": 32, "num_moe_experts": 4})):
        mix = SubmodelMix.one_hot(space, spec, device)
        with running(model, mix):  # the choice belongs to this micro-batch
            loss = model(inputs, positions, None, labels=tokens[:, 1:]).mean()
        loss.backward()  # gradients reach only the weights of this size
        print(f"{spec.to_dict()}: {account(space, spec).total_params:,} parameters, loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
