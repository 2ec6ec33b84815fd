"""The rules of what a layout is fed: sequences, batches, draws of widths and calibration samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import lcm

from ..space import replicas_per_draw
from .layout_rules import Problem, lower, near
from .parallel import Batch, Layout
from .setting import Change, Setting


def sequence_cut(parallel: Layout) -> int:
    """Parts of a sequence: 2 x context (for balanced causal masks), then one a tensor rank."""
    context = parallel.context
    return lcm(2 * context if context > 1 else 1, context * parallel.tensor if parallel.sequence else 1)


def _sequences(setting: Setting) -> Iterator[Problem]:
    cut = sequence_cut(setting.parallel)
    fed = [(f"stage {s.name}", f"stages.{i}", s.seq_length) for i, s in enumerate(setting.stages)]
    if setting.calibration is not None:
        fed.append((setting.section, setting.section, setting.calibration.seq_length))
    for what, key, length in fed:
        if length % cut:
            text = (
                f"{what}: seq_length={length} is not a multiple of {cut}, which context and sequence parallelism "
                "cut it into"
            )
            longer: list[Change] = [{f"{key}.seq_length": n} for n in near(length, cut)]
            yield Problem(text, (*longer, *lower(setting, "context")))


def replicas(setting: Setting) -> int:
    """Model replicas that the ranks are divided into; 0 where they cannot be."""
    parallel = setting.parallel
    whole, rest = divmod(parallel.world_size or 0, parallel.tensor * parallel.pipeline * parallel.context)
    return 0 if rest else whole


def _batches(setting: Setting) -> Iterator[Problem]:
    number, parallel = replicas(setting), setting.parallel
    for index, stage in enumerate(setting.stages if number else ()):
        per_pass, batch, key = stage.micro_batch_size * number, stage.global_batch_size, f"stages.{index}."
        count, left = divmod(batch, per_pass)
        if left:
            text = (
                f"stage {stage.name}: global_batch_size={batch} is not a multiple of micro_batch_size "
                f"{stage.micro_batch_size} x {number} data-parallel ranks"
            )
            step = lcm(per_pass, stage.draw_size)
            sizes: list[Change] = [{f"{key}global_batch_size": n} for n in near(batch, step)]
            yield Problem(
                text, (*sizes, *_smaller(key, stage.micro_batch_size), *_other_ranks(setting, stage))
            )
        elif parallel.virtual_pipeline is not None and count % parallel.pipeline:
            text = (
                f"stage {stage.name}: {count} micro-batches a step are not a multiple of parallel.pipeline="
                f"{parallel.pipeline}, as virtual_pipeline needs"
            )
            step = lcm(per_pass * parallel.pipeline, stage.draw_size)
            sizes = [{f"{key}global_batch_size": n} for n in near(batch, step)]
            yield Problem(text, (*sizes, {"parallel.virtual_pipeline": None}))


def _other_ranks(setting: Setting, stage: Batch) -> list[Change]:
    """Numbers of ranks that share a step's micro-batches evenly, the nearest first."""
    parallel, world = setting.parallel, setting.parallel.world_size or 0
    whole, node = parallel.tensor * parallel.pipeline * parallel.context, setting.ranks_per_node or 1
    passes = stage.global_batch_size // stage.micro_batch_size
    worlds = [whole * n for n in range(1, passes + 1) if passes % n == 0 and whole * n % node == 0]
    return [setting.nodes_or_ranks(n) for n in sorted(worlds, key=lambda n: abs(n - world))[:8]]


def _smaller(prefix: str, micro_batch: int) -> list[Change]:
    return [{f"{prefix}micro_batch_size": n} for n in range(micro_batch - 1, 0, -1) if micro_batch % n == 0]


def _draws(setting: Setting) -> Iterator[Problem]:
    """Ranks that share experts train one submodel at a time (``recipe.checks.draw_problem`` says why)."""
    parallel = setting.parallel
    together = replicas_per_draw(parallel.tensor, parallel.context, parallel.expert_tensor, parallel.expert)
    for index, stage in enumerate(setting.stages if setting.draws else ()):
        if stage.draw_size % (stage.micro_batch_size * together):
            text = (
                f"stage {stage.name}: {stage.draw_size} sequences share a draw of widths, but {together} data-parallel "
                f"ranks of micro_batch_size {stage.micro_batch_size} share experts"
            )
            yield Problem(text, ({f"stages.{index}.samples_per_draw": stage.micro_batch_size * together},))


def _calibration(setting: Setting) -> Iterator[Problem]:
    number, fed, section = replicas(setting), setting.calibration, setting.section
    if fed is None or number < 2 or fed.samples % (fed.micro_batch_size * number) == 0:
        return
    step = fed.micro_batch_size * number
    text = (
        f"{section}: samples={fed.samples} is not a multiple of micro_batch_size {fed.micro_batch_size} x {number} "
        "data-parallel ranks"
    )
    samples: list[Change] = [{f"{section}.samples": n} for n in near(fed.samples, step)]
    yield Problem(text, (*samples, *_smaller(f"{section}.", fed.micro_batch_size)))


BATCH_RULES: Sequence[Callable[[Setting], Iterator[Problem]]] = (_sequences, _batches, _draws, _calibration)
