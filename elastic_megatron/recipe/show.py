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
        parts = (_length(stage), _schedule(recipe, index), _odds(recipe, stage))
        lines.append(f"  stages[{index}] {stage.name}: {'; '.join(part for part in parts if part)}")
    if recipe.stages:
        tokens = sum(stage.steps * stage.tokens_per_step for stage in recipe.stages)
        lines.append(f"  all stages: {recipe.total_steps:,} steps, {tokens:,} tokens")
    return lines


def _length(stage: Stage) -> str:
    tokens = stage.steps * stage.tokens_per_step
    return f"{stage.steps:,} steps of {stage.tokens_per_step:,} tokens = {tokens:,}"


def _schedule(recipe: Recipe, index: int) -> str:
    """Peak learning rate and warm-up, where a schedule begins: at the first stage, and where one names its lr."""
    stage, warmup = recipe.stages[index], recipe.optimizer.warmup_steps
    if stage.lr is None and index:
        return "learning-rate schedule goes on"
    peak = f"peak learning rate {stage.lr or recipe.optimizer.lr:g}"
    tokens = warmup * stage.tokens_per_step
    return peak + (f" after {warmup:,} warm-up steps = {tokens:,} tokens" if warmup else "")


def _odds(recipe: Recipe, stage: Stage) -> str:
    odds = recipe.budget_probabilities(stage)
    return "budgets " + ", ".join(f"{name} {odd:.3g}" for name, odd in odds.items()) if odds else ""
