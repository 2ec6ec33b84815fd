"""Merging files and overrides, relative paths, and the way back to YAML."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastic_megatron.errors import UserError
from elastic_megatron.recipe import Recipe, describe, dump, load, load_jobs

Write = Callable[[str, str], str]

MINIMAL = "name: test\nrun_dir: run\nmodel: {hf: parent}\n"
FULL = """\
name: full
seed: 7
run_dir: run
model: {hf: parent, dtype: fp32, tokenizer: tok}
data: {train: [{path: a, weight: 0.7}, {path: b, weight: 3e-1}], valid: [{path: v, weight: 1}], cache: c}
space:
  choices: {hidden_size: [4, 8], mamba_num_heads: [2, 4], num_layers: [3, 4]}
  lanes: {mamba_num_heads: 2}
  granule: {hidden_size: 4}
  per_layer: [mamba_num_heads]
budgets:
  large: {metric: active_params, target: 1}
  12: {metric: total_params, target: 2e9, unit: absolute}
  true: {metric: memory_bytes, target: 0.5, format: nvfp4, sequence_length: 4096, batch_size: 8}
  fast: {metric: latency, target: 0.4, table: table.json}
optimizer: {eps: 1e-8, betas: [0.8, 0.9], schedule: wsd}
stages:
- {name: one, tokens: 100e9, seq_length: 8192, global_batch_size: 1536}
- {name: two, tokens: 1_000, seq_length: 100, global_batch_size: 3, budget_probs: {large: 0.7, fast: 0.3}, lr: 1e-5}
teacher: {checkpoint: t}
parallel: {tensor: 2, sequence: true, expert_tensor: 1, world_size: 4, context: 2}
"""


def test_defaults_are_the_documented_ones(write: Write) -> None:
    recipe = load(write("r.yaml", MINIMAL))
    assert (recipe.seed, recipe.rank.samples, recipe.router.tau.end, recipe.optimizer.betas) == (
        1234,
        1024,
        0.05,
        (0.9, 0.95),
    )
    assert (recipe.budgets, recipe.stages, recipe.model.sizes, recipe.loss.kind) == (
        {},
        (),
        None,
        "forward_kl",
    )


def test_files_merge_key_by_key_and_the_last_one_wins(write: Write) -> None:
    write("deep/a.yaml", MINIMAL + "rank: {samples: 1, seq_length: 11}\noptimizer: {betas: [0.1, 0.2]}\n")
    write("deep/b.yaml", "rank: {samples: 2, micro_batch_size: 2}\n")
    write(
        "r.yaml",
        "extends: [deep/a.yaml, deep/b.yaml]\nrank: {micro_batch_size: 3}\noptimizer: {betas: [0.3, 0.4]}\n",
    )
    recipe = load("r.yaml", ["rank.depth=true"])
    assert recipe.rank.model_dump() == {"samples": 2, "seq_length": 11, "micro_batch_size": 3, "depth": True}
    assert recipe.optimizer.betas == (0.3, 0.4)


def test_extends_chains_and_one_file_may_be_reached_twice(write: Write) -> None:
    write("base.yaml", MINIMAL + "seed: 1\n")
    write("left.yaml", "extends: base.yaml\nseed: 2\n")
    write("right.yaml", "extends: base.yaml\n")
    assert load(write("r.yaml", "extends: [left.yaml]\n")).seed == 2
    assert load(write("r.yaml", "extends: [left.yaml, right.yaml]\n")).seed == 1


def test_null_removes_what_was_inherited(write: Write) -> None:
    write(
        "base.yaml",
        MINIMAL
        + "rank: {samples: 3}\nspace: {choices: {hidden_size: [4, 8]}}\nbudgets: {a: {metric: total_params, target: 1}, b: {metric: total_params, target: 1}}\n",
    )
    write("r.yaml", "extends: base.yaml\nmodel: {hf: null, checkpoint: c}\nbudgets: {a: null}\n")
    recipe = load("r.yaml", ["rank="])
    assert (recipe.model.hf, list(recipe.budgets), recipe.rank.samples) == (None, ["b"], 1024)


REQUEUE = "slurm: {continuation: {kind: requeue, lead: 60, max_failures: 7}}\n"


@pytest.mark.parametrize(
    ("files", "overrides", "continuation"),
    [
        ({"r": "extends: base.yaml\nslurm: {continuation: {kind: none}}"}, [], {"kind": "none"}),
        ({"r": "extends: base.yaml"}, ["slurm.continuation.kind=none"], {"kind": "none"}),
        # what the variants share stays
        (
            {"r": "extends: base.yaml\nslurm: {continuation: {kind: chain, links: 3}}"},
            [],
            {"kind": "chain", "links": 3, "lead": 60, "max_failures": 7},
        ),
        # over two files, and back again
        (
            {
                "mid": "extends: base.yaml\nslurm: {continuation: {kind: chain, links: 3}}",
                "r": "extends: mid.yaml\nslurm: {continuation: {kind: requeue}}",
            },
            ["slurm.continuation.lead=9"],
            {"kind": "requeue", "lead": 9, "max_failures": 7},
        ),
        # of several parents the later one is the higher layer
        (
            {"b": "slurm: {continuation: {kind: none}}", "r": "extends: [base.yaml, b.yaml]"},
            [],
            {"kind": "none"},
        ),
    ],
)
def test_another_variant_leaves_inherited_keys_behind(
    write: Write, files: dict[str, str], overrides: list[str], continuation: dict[str, object]
) -> None:
    write("base.yaml", MINIMAL + REQUEUE)
    for name, text in files.items():
        write(f"{name}.yaml", text)
    assert load("r.yaml", overrides).slurm.continuation.model_dump() == continuation


def test_other_unions_do_so_too(write: Write) -> None:
    budgets = "budgets: {a: {metric: memory_bytes, target: 0.5, sequence_length: 8, format: fp8}}\n"
    write("base.yaml", MINIMAL + "space: {choices: {hidden_size: [4]}}\n" + budgets)
    write("r.yaml", "extends: base.yaml\nbudgets: {a: {metric: total_params}}\n")
    assert load("r.yaml").budgets["a"].model_dump() == {
        "metric": "total_params",
        "target": 0.5,
        "unit": "ratio",
    }
    write("site.yaml", "container: {runtime: pyxis, image: a, mounts: [/data], mount_home: true}\n")
    write("own.yaml", "extends: site.yaml\ncontainer: {runtime: none}\n")
    write("other.yaml", "extends: site.yaml\ncontainer: {runtime: apptainer}\n")
    write("chain.yaml", "name: c\nrun_dir: c\ncluster: own.yaml\njobs: {a: {recipe: r.yaml}}\n")
    assert load_jobs("chain.yaml").cluster.container.runtime == "none"
    assert load_jobs("chain.yaml", ["cluster=other.yaml"]).cluster.container.image == "a"


@pytest.mark.parametrize(
    ("text", "overrides", "line"),
    [
        # beside the choice, or after it, a key of another variant is a mistake
        (
            "extends: base.yaml\nslurm: {continuation: {kind: none, lead: 3}}",
            [],
            "r.yaml:2:36: slurm.continuation: unknown key 'lead'",
        ),
        (
            "extends: none.yaml\nslurm: {continuation: {lead: 3}}",
            [],
            "r.yaml:2:24: slurm.continuation: unknown",
        ),
        (
            "extends: base.yaml",
            ["slurm.continuation.lead=3", "slurm.continuation.kind=none"],
            "command line `slurm.continuation.lead=3`: slurm.continuation: unknown key 'lead'",
        ),
        (
            "extends: none.yaml",
            ["slurm.continuation.lead=3"],
            "command line `slurm.continuation.lead=3`: slurm",
        ),
        # and one of no variant always
        (
            "extends: typo.yaml\nslurm: {continuation: {kind: none}}",
            [],
            "typo.yaml:2:24: slurm.continuation: unknown key 'leed'",
        ),
    ],
)
def test_a_key_of_another_variant_beside_or_above_the_choice_is_a_mistake(
    write: Write, text: str, overrides: list[str], line: str
) -> None:
    write("base.yaml", MINIMAL + REQUEUE)
    write("none.yaml", "extends: base.yaml\nslurm: {continuation: {kind: none}}")
    write("typo.yaml", "extends: base.yaml\nslurm: {continuation: {leed: 3}}")
    with pytest.raises(UserError) as caught:
        load(write("r.yaml", text), overrides)
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_a_typo_with_null_is_still_a_typo(write: Write) -> None:
    with pytest.raises(UserError, match="r.yaml:4:1: unknown key 'bugets', did you mean 'budgets'"):
        load(write("r.yaml", MINIMAL + "bugets: null\n"))


def test_a_problem_names_the_file_that_wrote_it(write: Write) -> None:
    write("deep/base.yaml", "\nrank:\n  samples: -1\n  seq_length: -1\nstages: [{name: x}]\n")
    write("deep/mid.yaml", "extends: ./base.yaml\nrank: {seq_length: -2}\n")
    write("r.yaml", "extends: deep/../deep/mid.yaml\nstages: []\n" + MINIMAL)
    with pytest.raises(UserError) as caught:
        load("r.yaml", ["rank.micro_batch_size=0"])
    assert [line.rpartition(": must")[0] for line in str(caught.value).splitlines()] == [
        "deep/base.yaml:3:3: rank.samples",
        "deep/mid.yaml:2:8: rank.seq_length",
        "command line `rank.micro_batch_size=0`: rank.micro_batch_size",
    ]


def test_a_circle_of_extends_is_refused(write: Write) -> None:
    write("a.yaml", "extends: sub/b.yaml\n")
    write("sub/b.yaml", "seed: 3\nextends:\n  - ../a.yaml\n")
    with pytest.raises(UserError) as caught:
        load("a.yaml")
    assert (
        str(caught.value) == "sub/b.yaml:3:5: extends: goes round in a circle: a.yaml -> sub/b.yaml -> a.yaml"
    )


def test_all_unreadable_parents_are_listed(write: Write) -> None:
    write("bad.yaml", "- 1\n")
    with pytest.raises(UserError) as caught:
        load(write("r.yaml", "extends: [gone.yaml, bad.yaml]\n" + MINIMAL))
    assert str(caught.value).splitlines() == [
        "r.yaml:1:11: extends: gone.yaml: no such file",
        "bad.yaml:1:1: a recipe is a mapping of keys to values, but it holds a list",
    ]


@pytest.mark.parametrize("value", ["3", "[a.yaml, 3]", "{a: b}", "", "''"])
def test_extends_holds_paths(write: Write, value: str) -> None:
    with pytest.raises(UserError, match=r"^r.yaml:1:1: extends: must be a path or a list of paths"):
        load(write("r.yaml", f"extends: {value}\n" + MINIMAL))


def test_paths_start_from_the_file_that_wrote_them(write: Write, tmp_path: Path) -> None:
    write(
        "one/two/base.yaml",
        "data: {cache: ../c, valid: [{path: /abs/v, weight: 1}], train: [{path: d/x, weight: 1}]}\nrun_dir: r\nname: a\n",
    )
    write("three/r.yaml", "extends: ../one/two/base.yaml\nmodel: {hf: ./m, tokenizer: ~/tok}\n")
    recipe = load("three/r.yaml", ["teacher.checkpoint=t/../u"])
    assert recipe.run_dir == tmp_path / "one/two/r"
    assert recipe.data.cache == tmp_path / "one/c"
    assert recipe.data.valid[0].path == Path("/abs/v")
    assert recipe.data.train[0].path == tmp_path / "one/two/d/x"
    assert recipe.model.hf == tmp_path / "three/m"
    assert recipe.model.tokenizer == Path.home() / "tok"
    assert recipe.teacher.checkpoint == tmp_path / "u"


def test_dump_loads_back_equal_from_anywhere(write: Write) -> None:
    recipe = load(write("r.yaml", FULL))
    assert load(write("far/away/r.yaml", dump(recipe))) == recipe
    assert load(write("far/away/r.yaml", describe(recipe))) == recipe
    assert list(recipe.budgets) == ["large", "12", "true", "fast"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.text(
        st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/$\x85\u2028\u2029"), min_size=1
    ).filter(str.strip)
    | st.sampled_from(
        ["on", "1e4", "010", "1:30", "2020-01-01", "~", "null", "#a", "a: b", "0x1F", ".5", "<<", "="]
    ),
    lr=st.floats(1e-300, 1e300),
    key=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,9}", fullmatch=True)
    | st.sampled_from(["1e4", "010", "1_0", "0x1F", "true", "Null", "on", "2020-01-01"]),
)
def test_dump_keeps_awkward_text_and_numbers(write: Write, path: str, lr: float, key: str) -> None:
    text = {"name": key, "run_dir": path, "model": {"hf": "x"}, "optimizer": {"lr": lr}}
    text |= {
        "space": {"choices": {"hidden_size": [1]}},
        "budgets": {key: {"metric": "total_params", "target": 1.0}},
    }
    recipe = Recipe.model_validate(text)
    assert load(write("r.yaml", dump(recipe))) == recipe


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("optimizer.lr=3e-4", lambda r: r.optimizer.lr, 3e-4),
        ("optimizer.lr=1", lambda r: r.optimizer.lr, 1.0),
        ("stages.0.tokens=1e3", lambda r: r.stages[0].tokens, 1000),
        ("stages.1.lr=", lambda r: r.stages[1].lr, None),
        ("stages.1.budget_probs=uniform", lambda r: r.stages[1].budget_probs, "uniform"),
        ("stages.1.budget_probs={fast: 1}", lambda r: r.stages[1].budget_probs, {"fast": 1.0}),
        ("optimizer.betas=[0.5, 0.6]", lambda r: r.optimizer.betas, (0.5, 0.6)),
        ("optimizer.betas.1=0.6", lambda r: r.optimizer.betas, (0.8, 0.6)),
        ("parallel.sequence=false", lambda r: r.parallel.sequence, False),
        ("name='123'", lambda r: r.name, "123"),
        ("budgets.12.target=5e9", lambda r: r.budgets["12"].target, 5e9),
        ("budgets.new={metric: total_params, target: 0.1}", lambda r: r.budgets["new"].target, 0.1),
        ("checkpoint.keep_last=3", lambda r: r.checkpoint.keep_last, 3),
        (" seed = 010", lambda r: r.seed, 10),
        ("data.train=[]", lambda r: r.data.train, ()),
    ],
)
def test_override_is_typed_yaml(
    write: Write, override: str, read: Callable[[Recipe], object], value: object
) -> None:
    write("r.yaml", FULL)
    before, after = load("r.yaml"), load("r.yaml", [override])
    assert read(after) == value and type(read(after)) is type(value)
    assert before != after


def test_later_overrides_win(write: Write) -> None:
    assert (
        load(write("r.yaml", MINIMAL), ["seed=1", "rank={samples: 5}", "seed=2", "rank.seq_length=6"]).seed
        == 2
    )


def test_recipe_is_immutable(write: Write) -> None:
    recipe = load(write("r.yaml", FULL))
    for section, key in ((recipe, "seed"), (recipe.optimizer, "lr"), (recipe.stages[0], "tokens")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(section, key, 3)


def test_derived_numbers(write: Write) -> None:
    recipe = load(write("r.yaml", FULL), ["optimizer.warmup_steps=60"])
    assert [stage.steps for stage in recipe.stages] == [7948, 4]  # ceil(100e9 / 12582912), ceil(1000 / 300)
    assert recipe.total_steps == 7952
    assert recipe.budget_probabilities(recipe.stages[0]) == {
        "large": 0.25,
        "12": 0.25,
        "true": 0.25,
        "fast": 0.25,
    }
    assert recipe.budget_probabilities(recipe.stages[1]) == {"large": 0.7, "12": 0, "true": 0, "fast": 0.3}
    shown = describe(recipe)
    for expected in (
        "7,948 steps of 12,582,912 tokens = 100,008,984,576",
        "peak learning rate 0.0001 after 60 warm-up steps = 754,974,720 tokens; budgets large 0.25",
        "stages[1] two: 4 steps of 300 tokens = 1,200; peak learning rate 1e-05 after 60 warm-up steps",
        "budgets large 0.7, 12 0, true 0, fast 0.3",
        "all stages: 7,952 steps, 100,008,985,776 tokens",
    ):
        assert expected in shown
    assert "4 steps of 300 tokens = 1,200; learning-rate schedule goes on" in describe(
        load("r.yaml", ["stages.1.lr="])
    )


def test_plain_training_and_foreign_teacher_need_no_budgets(write: Write) -> None:
    stages = "stages: [{name: a, tokens: 10, seq_length: 1, global_batch_size: 1}]\n"
    for extra in ("loss: {kind: cross_entropy}\n", "teacher: {checkpoint: t}\n"):
        recipe = load(write("r.yaml", MINIMAL + stages + extra))
        assert recipe.budget_probabilities(recipe.stages[0]) == {}


def test_loading_needs_no_torch_and_is_fast(write: Write) -> None:
    write("r.yaml", FULL)
    code = (
        "import sys, time; start = time.process_time(); from elastic_megatron.recipe import load, json_schema; "
        "load('r.yaml'); json_schema(); spent = time.process_time() - start; "
        "print([name for name in ('torch', 'megatron', 'transformers', 'numpy') if name in sys.modules], spent)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    modules, _, seconds = done.stdout.strip().rpartition(" ")
    assert modules == "[]"
    assert float(seconds) < 2
