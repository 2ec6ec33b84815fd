"""A recipe or a chain for people: what it says in full, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from elastic_megatron.recipe.document import to_yaml
from elastic_megatron.recipe.jobs import JobChain, PlannedJob
from elastic_megatron.recipe.load import dump
from elastic_megatron.recipe.schema import Recipe
from elastic_megatron.recipe.training import Stage, tokens_after


def describe(recipe: Recipe, job: PlannedJob | None = None) -> str:
    """The resolved recipe as YAML, followed by derived numbers as comments; it loads back as it is.

    `job` says where it is to run; otherwise ranks are known from `parallel.world_size` alone.
    """
    ranks = recipe.parallel.world_size if job is None else job.ranks
    lines = [*(_place(job) if job is not None else ()), *_Derived(recipe, ranks).lines()]
    return dump(recipe) + _comments(["", "Derived:", *_indented(lines)])


def describe_chain(chain: JobChain) -> str:
    """The resolved chain as YAML, followed by what follows for each job as comments."""
    jobs = {job.name: {"recipe": str(job.source), "after": list(job.after)} for job in chain.jobs}
    resolved = {"name": chain.name, "cluster": str(chain.cluster_file), "run_dir": str(chain.run_dir)}
    lines: list[str] = []
    for job in chain.jobs:
        own = [*_place(job), *_Derived(job.recipe, job.ranks, first_step(chain, job)).lines()]
        lines += ["", f"{job.name} ({job.recipe.job}):", *_indented(own)]
    return to_yaml(resolved | {"jobs": jobs}) + _comments(lines)


def first_step(chain: JobChain, job: PlannedJob) -> int:
    """Steps that jobs above this one will have trained in its run folder."""
    names = [other.name for other in chain.jobs]
    before = chain.jobs[: names.index(job.name)]
    same = [o for o in before if o.recipe.job == "train" and o.recipe.run_dir == job.recipe.run_dir]
    return max((other.recipe.last_step for other in same), default=0)


def _comments(lines: list[str]) -> str:
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _place(job: PlannedJob) -> Iterator[str]:
    if job.recipe.job == "export":
        yield f"one process; time limit {job.time}"
        return
    nodes, each = _number(job.nodes, "node"), _number(job.ranks_per_node, "rank")
    yield f"{nodes} x {each} = {_number(job.ranks, 'rank')}; time limit {job.time}"


def _number(n: int, one: str, several: str = "") -> str:
    return f"{n:,} {one if n == 1 else several or one + 's'}"


@dataclass(frozen=True)
class _Derived:
    """Args:
    ranks: of the job, where they are known.
    first: steps that are done before the job begins.
    """

    recipe: Recipe
    ranks: int | None
    first: int = 0

    def lines(self) -> list[str]:
        recipe = self.recipe
        if recipe.job == "export":
            return list(self._directories())
        lines: list[str] = []
        if recipe.job == "rank" or not (recipe.stages or recipe.quantize):
            r = recipe.rank
            lines.append(self._calibration("rank", r.samples, r.seq_length, r.micro_batch_size))
        elif (q := recipe.quantize) is not None:
            what = f"quantize to {q.format}, through every submodel"
            lines.append(self._calibration(what, q.samples, q.seq_length, q.micro_batch_size))
        if recipe.job == "train" and recipe.stages:
            lines += self._training()
        return lines

    @property
    def replicas(self) -> int | None:
        """Data-parallel ranks."""
        parallel = self.recipe.parallel
        replicas, rest = divmod(self.ranks or 0, parallel.tensor * parallel.pipeline * parallel.context)
        return None if rest or not replicas else replicas

    def _directories(self) -> Iterator[str]:
        export = self.recipe.export
        assert export is not None, "the recipe checks that an export job has one"
        if export.elastic is not None:
            yield f"writes {export.elastic}"
        for name in export.submodels:
            yield f"writes {export.slices}/{name}"

    def _calibration(self, what: str, samples: int, seq_length: int, micro_batch_size: int) -> str:
        line = f"{what}: {samples * seq_length:,} calibration tokens"
        passes = -(-samples // (micro_batch_size * (self.replicas or 1)))
        if self.replicas is None:
            return line
        of = _number(micro_batch_size, "sequence")
        return f"{line}: {_number(passes, 'pass', 'passes')} of {of} on {self._data_parallel()}"

    def _data_parallel(self) -> str:
        return _number(self.replicas or 0, "data-parallel rank")

    def _training(self) -> Iterator[str]:
        recipe, done = self.recipe, 0
        for index, stage in enumerate(recipe.stages):
            done += stage.steps
            if self.first < done and done - stage.steps < recipe.last_step:
                parts = (_length(stage), _schedule(recipe, index), _odds(recipe, stage))
                yield f"stages[{index}] {stage.name}: {'; '.join(part for part in parts if part)}"
                yield from _indented(
                    [line for line in (self._batches(stage), self._intervals(stage)) if line]
                )
        if recipe.router_frozen:
            yield "the router is frozen: submodels keep the widths that model.checkpoint has for them"
        tokens = sum(stage.steps * stage.tokens_per_step for stage in recipe.stages)
        yield f"all stages: {recipe.total_steps:,} steps, {tokens:,} tokens"
        if self.first or recipe.stop_after is not None:
            done = self.first >= recipe.last_step
            yield (
                "this job: none are left"
                if done
                else f"this job: steps {self.first + 1:,} to {recipe.last_step:,}"
            )
        saves, kept = self._saves(), recipe.checkpoint.keep_last
        yield f"saves: {saves:,}" + (f", the last {kept:,} are kept" if saves > kept else "")
        yield f"evaluations: {self._evaluations()}"

    def _batches(self, stage: Stage) -> str:
        """A step on one rank."""
        if self.replicas is None:
            return ""
        count, rest = divmod(stage.global_batch_size, stage.micro_batch_size * self.replicas)
        of = f"{stage.micro_batch_size:,} x {stage.seq_length:,} tokens"
        if rest:
            return f"{stage.global_batch_size:,} sequences do not divide among {self._data_parallel()}"
        return f"{_number(count, 'micro-batch', 'micro-batches')} of {of} a step on {self._data_parallel()}"

    def _intervals(self, stage: Stage) -> str:
        saved, evaluated, every = self.recipe.checkpoint, self.recipe.log.eval_interval, stage.tokens_per_step
        parts = []
        if saved.interval_tokens is not None:
            steps = saved.interval_tokens / every
            parts.append(f"saved every {saved.interval_tokens:,} tokens, or {steps:,.1f} steps")
        elif saved.interval:
            parts.append(f"saved every {_number(saved.interval, 'step')} = {saved.interval * every:,} tokens")
        if evaluated:
            parts.append(f"evaluated every {_number(evaluated, 'step')} = {evaluated * every:,} tokens")
        return "; ".join(parts)

    def _saves(self) -> int:
        """Checkpoints that this job writes, as `Checkpoint.due` says and at its end."""
        recipe, tokens = self.recipe, self.recipe.checkpoint.interval_tokens
        if tokens is None or self.first >= recipe.last_step:
            return self._times(recipe.checkpoint.interval)
        saves = end = 0
        for stage in recipe.stages:
            begin, end = end, end + stage.steps
            first, last = max(begin, self.first), min(end, recipe.last_step)
            if first < last:
                multiples = [tokens_after(n, recipe.stages) // tokens for n in (first, last)]
                saves += min(last - first, multiples[1] - multiples[0])
        return saves + (not recipe.checkpoint.due(recipe.last_step, recipe.stages))

    def _times(self, interval: int) -> int:
        """How often something happens every `interval` steps and after the last one, in the steps of this job."""
        first, last = self.first, self.recipe.last_step
        if first >= last:
            return 0
        return (last // interval - first // interval + (last % interval > 0)) if interval else 1

    def _evaluations(self) -> str:
        recipe = self.recipe
        if not recipe.data.valid:
            return "none, for want of data.valid"
        length = recipe.stages[0].seq_length
        windows = max(1, recipe.log.eval_tokens // length)
        models = _number(len(recipe.budgets), "submodel") if recipe.budgets else "the model"
        return (
            f"{self._times(recipe.log.eval_interval):,}, each of {models} on {windows:,} x {length:,} tokens"
        )


def _length(stage: Stage) -> str:
    tokens = stage.steps * stage.tokens_per_step
    return f"{stage.steps:,} steps of {stage.tokens_per_step:,} tokens = {tokens:,}"


def _schedule(recipe: Recipe, index: int) -> str:
    """Peak learning rate and warm-up, where a schedule begins: at the first stage, and where one names its lr."""
    stage = recipe.stages[index]
    warmup = recipe.optimizer.warmup(stage.tokens_per_step)
    if stage.lr is None and index:
        return "learning-rate schedule goes on"
    peak = f"peak learning rate {stage.lr or recipe.optimizer.lr:g}"
    tokens = warmup * stage.tokens_per_step
    return peak + (f" after {warmup:,} warm-up steps = {tokens:,} tokens" if warmup else "")


def _odds(recipe: Recipe, stage: Stage) -> str:
    odds = recipe.budget_probabilities(stage)
    return "budgets " + ", ".join(f"{name} {odd:.3g}" for name, odd in odds.items()) if odds else ""
