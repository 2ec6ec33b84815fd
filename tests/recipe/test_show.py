"""What `recipe show` says follows from a recipe is what a run does."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_megatron.commands import recipe as command
from elastic_megatron.errors import UserError
from elastic_megatron.recipe import Cluster, JobChain, PlannedJob, Recipe, describe, describe_chain, load_jobs
from elastic_megatron.recipe.load import KINDS, json_schema
from elastic_megatron.recipe.training import Checkpoint, Optimizer, Stage, tokens_after

RECIPES = Path(__file__).parents[2] / "recipes"
Write = Callable[[str, str], str]


def stage(name: str, steps: int, length: int = 8, batch: int = 2, **more: Any) -> dict[str, Any]:
    size = {"seq_length": length, "global_batch_size": batch}
    return {"name": name, "tokens": steps * length * batch, **size, **more}


def recipe(**sections: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "r",
        "run_dir": "/run",
        "model": {"hf": "/hf"},
        "loss": {"kind": "cross_entropy"},
        "data": {"valid": [{"path": "/valid", "weight": 1.0}]},
    }
    return Recipe.model_validate(values | sections)


def planned(name: str, what: Recipe, nodes: int = 1, per_node: int = 1) -> PlannedJob:
    return PlannedJob(name, Path(f"/{name}.yaml"), what, (), nodes, per_node, "1:00:00")


def lines(text: str) -> list[str]:
    """The comments, without their signs and indents."""
    return [line[1:].strip() for line in text.splitlines() if line.startswith("#")]


def number(text: str, word: str) -> int:
    [found] = [line for line in lines(text) if line.startswith(f"{word}: ")]
    match = re.match(rf"{word}: ([0-9,]+)", found)
    assert match, found
    return int(match[1].replace(",", ""))


STAGES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None)
@given(STAGES, st.integers(0, 9), st.none() | st.integers(1, 80), st.integers(0, 5), st.data())
def test_saves_and_evaluations_are_counted_as_they_come(
    sizes: list[tuple[int, int, int]], interval: int, tokens: int | None, evals: int, data: st.DataObject
) -> None:
    """For two jobs in one run folder, against a walk through the steps of each."""
    stages = [stage(f"s{i}", steps, 4 * length, batch) for i, (steps, length, batch) in enumerate(sizes)]
    when = {"interval": interval} if tokens is None else {"interval_tokens": tokens}
    sections: dict[str, Any] = {"stages": stages, "checkpoint": when, "log": {"eval_interval": evals}}
    stop = data.draw(st.sampled_from([s["name"] for s in stages]))
    jobs = (planned("a", recipe(**sections, stop_after=stop)), planned("b", recipe(**sections)))
    shown = describe_chain(JobChain("c", Path("/c"), Path("/c.yaml"), None, Cluster(), jobs))
    first = 0
    for job, text in zip(jobs, shown.split("# b (train):"), strict=True):
        last = job.recipe.last_step
        steps = range(first + 1, last + 1)
        saves = [n for n in steps if n == last or job.recipe.checkpoint.due(n, job.recipe.stages)]
        evaluated = [n for n in steps if n == last or (evals and n % evals == 0)]
        assert (number(text, "saves"), number(text, "evaluations")) == (len(saves), len(evaluated))
        first = last


@settings(max_examples=100, deadline=None)
@given(STAGES, st.integers(1, 80))
def test_a_save_by_tokens_comes_with_the_step_that_completes_them(
    sizes: list[tuple[int, int, int]], tokens: int
) -> None:
    """By its definition, token after token: whichever job does the step."""
    stages = [Stage(**stage(f"s{i}", *size)) for i, size in enumerate(sizes)]
    seen, due = 0, set[int]()
    for step, each in enumerate((s for s in stages for _ in range(s.steps)), start=1):
        for _ in range(each.tokens_per_step):
            seen += 1
            if seen % tokens == 0:
                due.add(step)
        assert tokens_after(step, stages) == seen
    saves = Checkpoint(interval_tokens=tokens)
    total = sum(s.steps for s in stages)
    assert {n for n in range(1, total + 1) if saves.due(n, stages)} == due


@given(st.integers(0, 1000), st.integers(1, 100))
def test_warm_up_by_tokens_takes_the_steps_that_see_them(tokens: int, per_step: int) -> None:
    steps = Optimizer(warmup_tokens=tokens).warmup(per_step)
    assert (steps - 1) * per_step < tokens <= steps * per_step


def test_a_number_is_given_in_steps_or_in_tokens(complaints: Callable[..., list[str]]) -> None:
    text = (
        "optimizer: {warmup_steps: 5, warmup_tokens: 5e3}\ncheckpoint: {interval: 7, interval_tokens: 7e3}\n"
    )
    assert complaints(text) == [
        "r.yaml:4:30: optimizer.warmup_tokens: says what warmup_steps = 5 says; keep one: null removes an inherited key",
        "r.yaml:5:27: checkpoint.interval_tokens: says what interval = 7 says; keep one: null removes an inherited key",
    ]
    assert "must be greater than 0" in complaints("checkpoint: {interval_tokens: 0}\n")[0]


def test_warm_up_is_shown_for_every_schedule_that_begins() -> None:
    what = recipe(
        optimizer={"lr": 1e-3, "warmup_tokens": 100},
        stages=[stage("a", 20), stage("b", 9, lr=2e-3, batch=4), stage("c", 9)],
    )
    shown = lines(describe(what))
    assert (
        "stages[0] a: 20 steps of 16 tokens = 320; peak learning rate 0.001 after 7 warm-up steps = 112 tokens"
        in shown
    )
    assert (
        "stages[1] b: 9 steps of 32 tokens = 288; peak learning rate 0.002 after 4 warm-up steps = 128 tokens"
        in shown
    )
    assert "stages[2] c: 9 steps of 16 tokens = 144; learning-rate schedule goes on" in shown


@pytest.mark.parametrize(
    ("parallel", "ranks", "line"),
    [
        ({}, (1, 2), "3 micro-batches of 2 x 8 tokens a step on 2 data-parallel ranks"),
        ({"tensor": 2, "sequence": True}, (3, 4), "1 micro-batch of 2 x 8 tokens a step on 6 data-parallel ranks"),
        ({"pipeline": 2, "context": 3}, (2, 3), "6 micro-batches of 2 x 8 tokens a step on 1 data-parallel rank"),
        ({}, (1, 5), "12 sequences do not divide among 5 data-parallel ranks"),
    ],
)  # fmt: skip
def test_micro_batches_of_a_rank(parallel: dict[str, Any], ranks: tuple[int, int], line: str) -> None:
    what = recipe(parallel=parallel, stages=[stage("a", 1, 8, 12, micro_batch_size=2)])
    shown = lines(describe(what, planned("train", what, *ranks)))
    assert line in shown
    nodes, each = ranks
    place = next(text for text in shown if "time limit" in text)
    assert place.endswith(f"= {nodes * each} ranks; time limit 1:00:00") and place.startswith(f"{nodes} node")


def test_ranks_that_are_not_known_are_not_invented() -> None:
    assert not [line for line in lines(describe(recipe(stages=[stage("a", 1)]))) if "rank" in line]
    known = recipe(stages=[stage("a", 1)], parallel={"world_size": 2})
    assert "1 micro-batch of 1 x 8 tokens a step on 2 data-parallel ranks" in lines(describe(known))


def test_other_jobs_show_what_they_do() -> None:
    calibration = {"samples": 10, "seq_length": 8, "micro_batch_size": 2}
    rank = recipe(job="rank", rank=calibration, stages=[stage("a", 1)])
    assert lines(describe(rank))[2:] == ["rank: 80 calibration tokens"]
    on_four = "rank: 80 calibration tokens: 2 passes of 2 sequences on 4 data-parallel ranks"
    assert on_four in lines(describe(rank, planned("rank", rank, 1, 4)))
    quantize = recipe(
        job="quantize",
        quantize={"format": "fp8", **calibration},
        data={"train": [{"path": "/train", "weight": 1.0}]},
    )
    assert lines(describe(quantize))[2:] == ["quantize to fp8, through every submodel: 80 calibration tokens"]
    qad = recipe(quantize={"format": "nvfp4", **calibration}, stages=[stage("a", 3)])
    shown = lines(describe(qad))
    assert {"quantize to nvfp4, through every submodel: 80 calibration tokens", "saves: 1"} <= set(shown)
    assert not [line for line in shown if "frozen" in line], "there is no router"
    export = recipe(
        job="export",
        model={"checkpoint": "/c"},
        export={"elastic": "/e", "slices": "/s", "submodels": ["b", "a"]},
    )
    assert lines(describe(export))[2:] == ["writes /e", "writes /s/b", "writes /s/a"]


@pytest.mark.parametrize(
    ("section", "frozen"), [({}, False), ({"quantize": {"format": "fp8"}}, True), ({"router": {"frozen": True}}, True),
                            ({"quantize": {"format": "fp8"}, "router": {"frozen": False}}, False)],
)  # fmt: skip
def test_a_frozen_router_is_told(section: dict[str, Any], frozen: bool) -> None:
    budgets = {"a": {"metric": "active_params", "target": 1.0}}
    found = recipe(
        stages=[stage("a", 1)], budgets=budgets, space={"choices": {"hidden_size": [8]}}, **section
    )
    told = "the router is frozen: submodels keep the widths that model.checkpoint has for them"
    assert found.router_frozen is frozen and (told in lines(describe(found))) is frozen


def test_evaluation_is_that_of_the_trainer() -> None:
    budgets = {
        "budgets": {"a": {"metric": "active_params", "target": 1.0}},
        "space": {"choices": {"hidden_size": [8]}},
    }
    what = recipe(stages=[stage("a", 4, length=10)], log={"eval_tokens": 35, "eval_interval": 3}, **budgets)
    assert "evaluations: 2, each of 1 submodel on 3 x 10 tokens" in lines(describe(what))
    without = recipe(stages=[stage("a", 4)], data={})
    assert "evaluations: none, for want of data.valid" in lines(describe(without))


def show(*arguments: object) -> Any:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["recipe", *map(str, arguments)])
    return args.handler(args)


def test_a_chain_is_shown_resolved_and_job_by_job(capsys: pytest.CaptureFixture[str]) -> None:
    path = RECIPES / "tiny_cpu/chain.yaml"
    show("show", path, "stage1.stages.0.tokens=4096", "rank.rank.samples=64")
    out = capsys.readouterr().out
    assert yaml.safe_load(out)["jobs"]["stage1"] == {
        "recipe": str(RECIPES / "tiny_cpu/stage1.yaml"),
        "after": ["rank"],
    }
    shown = lines(out)
    assert [line for line in shown if line.endswith("):")] == [
        "parent (train):", "rank (rank):", "stage1 (train):", "stage2 (train):", "qad (train):", "export (export):",
        "pack (export):",
    ]  # fmt: skip
    assert "this job: steps 1 to 2" in shown
    assert "rank: 16,384 calibration tokens: 1 pass of 16 sequences on 4 data-parallel ranks" in shown


def test_a_job_continues_where_the_jobs_of_its_run_folder_end(capsys: pytest.CaptureFixture[str]) -> None:
    show("show", RECIPES / "tiny_cpu/chain.yaml")
    shown = lines(capsys.readouterr().out)
    first, second = [line for line in shown if line.startswith("this job")]
    assert (first, second) == ("this job: steps 1 to 342", "this job: steps 343 to 587")
    assert sum("stages[0] uniform" in line for line in shown) == 1  # not among what stage2 does


def test_a_resolved_chain_is_one_json_object() -> None:
    path = RECIPES / "tiny_cpu/chain.yaml"
    shown = json.loads(json.dumps(show("show", path, "cluster.account=mine", "--json")))
    chain = load_jobs(path)
    assert shown["name"] == "tiny" and shown["cluster"]["account"] == "mine"
    for job in chain.jobs:
        assert Recipe.model_validate(shown["jobs"][job.name]["recipe"]) == job.recipe
        assert shown["jobs"][job.name]["ranks"] == job.ranks


def test_a_recipe_is_shown_as_train_reads_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Where it would run is a comment: the number of ranks is not written into what a person may run elsewhere."""
    show("show", RECIPES / "tiny_cpu/stage1.yaml", "slurm.nodes=1", "cluster.time=0:10:00", "slurm.time=")
    out = capsys.readouterr().out
    assert "world_size" not in yaml.safe_load(out)["parallel"]
    assert "1 node x 2 ranks = 2 ranks; time limit 0:10:00" in lines(out)


def test_a_cluster_file_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    path = RECIPES / "clusters/example.yaml"
    show("show", path, "account=mine")
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["account"] == "mine" and shown["container"]["runtime"] == "pyxis"
    assert show("show", path, "--json")["gpus_per_node"] == 8
    with pytest.raises(UserError, match="unknown key 'acount', did you mean 'account'"):
        show("show", path, "acount=mine")


@pytest.mark.parametrize("kind", KINDS)
def test_schemas_of_all_kinds_are_printed(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    show("schema", kind)
    assert json.loads(capsys.readouterr().out) == json_schema(KINDS[kind])


def test_the_schema_is_that_of_recipes_unless_another_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    show("schema")
    assert json.loads(capsys.readouterr().out) == json_schema(Recipe)
