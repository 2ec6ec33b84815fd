"""A recipe for people: what it says in full, and what follows from it."""

from elastic_megatron.recipe.load import dump
from elastic_megatron.recipe.schema import Recipe
from elastic_megatron.recipe.training import Stage


def describe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, followed by derived numbers as comments; it loads back as it is."""
    return dump(recipe) + "".join(f"# {line}".rstrip() + "\n" for line in _derived(recipe))


def _derived(recipe: Recipe) -> list[str]:
    calibration = recipe.rank.samples * recipe.rank.seq_length
    lines = ["", "Derived:", f"  rank: {calibration:,} calibration tokens"]
    for index, stage in enumerate(recipe.stages):
        lines.append(f"  stages[{index}] {stage.name}: {_stage(recipe, stage)}")
    if recipe.stages:
        tokens = sum(stage.steps * stage.tokens_per_step for stage in recipe.stages)
        lines.append(f"  all stages: {recipe.total_steps:,} steps, {tokens:,} tokens")
        warmup = recipe.optimizer.warmup_steps
        share = warmup / recipe.stages[0].steps
        seen = warmup * recipe.stages[0].tokens_per_step
        lines.append(f"  warm-up: {warmup:,} steps, {seen:,} tokens, {share:.2%} of stages[0]")
    return lines


def _stage(recipe: Recipe, stage: Stage) -> str:
    peak = recipe.optimizer.lr if stage.lr is None else stage.lr
    parts = [
        f"{stage.steps:,} steps of {stage.tokens_per_step:,} tokens = {stage.steps * stage.tokens_per_step:,}",
        f"peak learning rate {peak:g}",
    ]
    probabilities = recipe.budget_probabilities(stage)
    if probabilities:
        odds = ", ".join(f"{name} {probability:.3g}" for name, probability in probabilities.items())
        parts.append(f"budgets {odds}")
    return "; ".join(parts)
