"""Unreadable files, wrong overrides, and values that nobody thought of."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastic_megatron.errors import UserError
from elastic_megatron.recipe import load

Complaints = Callable[..., list[str]]
Write = Callable[[str, str], str]

STAGE = "name: a, tokens: 100, seq_length: 10, global_batch_size: 4"
BUDGETS = """\
space: {choices: {hidden_size: [4, 8]}}
budgets:
  large: {metric: active_params, target: 1.0}
  small: {metric: active_params, target: 0.5}
"""

FILES = {
    "missing": (None, "r.yaml: no such file"),
    "empty": ("", "r.yaml:1:1: a recipe is a mapping of keys to values, but it is empty"),
    "list": ("- a\n", "r.yaml:1:1: a recipe is a mapping of keys to values, but it holds a list"),
    "text": ("hello", "r.yaml:1:1: a recipe is a mapping of keys to values, but it holds a text"),
    "syntax": ("a: 1\nb: [1, 2\nc: 3", "r.yaml:3:2: not valid YAML: "),
    "tab": ("a:\n\tb: 1", "r.yaml:2:1: not valid YAML: found character '\\t' that cannot start any token"),
    "control character": ("a: 1\nb: \x07", "r.yaml:2:4: not valid YAML: '\\x07' is not allowed"),
    "two documents": ("a: 1\n---\nb: 2", "r.yaml:2:1: not valid YAML: but found another document"),
    "unknown alias": ("a: *b", "r.yaml:1:4: not valid YAML: found undefined alias 'b'"),
    "python object": (
        "name: !!python/name:os.system x",
        "r.yaml:1:1: not valid YAML: tag 'tag:yaml.org,2002:python/name:os.system'",
    ),
    "alias in itself": ("rank: &a {samples: *a}", "r.yaml:1:11: an alias may not contain itself"),
    "list as a key": ("[a, b]: 1", "r.yaml:1:1: a key must be a plain word"),
}


@pytest.mark.parametrize(("text", "line"), FILES.values(), ids=FILES.keys())
def test_unreadable_file_is_one_clear_line(write: Write, text: str | None, line: str) -> None:
    write("other.yaml", "")
    if text is not None:
        write("r.yaml", text)
    with pytest.raises(UserError) as caught:
        load("r.yaml")
    assert str(caught.value).splitlines()[0].startswith(line)


def test_folder_and_binary_file_are_one_clear_line(write: Write, tmp_path: Path) -> None:
    write("folder/x.yaml", "")
    (tmp_path / "b.yaml").write_bytes(b"name: \xff")
    with pytest.raises(UserError, match=r"^folder: cannot be read: Is a directory$"):
        load("folder")
    with pytest.raises(UserError, match=r"^b.yaml: is not UTF-8 text \(byte 6\)$"):
        load(tmp_path.joinpath("b.yaml").relative_to(tmp_path))


OVERRIDES = {
    "no value": ("seed", "command line `seed`: write it as key=value"),
    "no key": ("=3", "command line `=3`: write it as key=value"),
    "empty step": ("rank..samples=3", "command line `rank..samples=3`: write it as key=value"),
    "unknown section": (
        "optimiser.lr=1",
        "command line `optimiser.lr=1`: unknown key 'optimiser', did you mean 'optimizer'?",
    ),
    "unknown key": (
        "rank.sample=1",
        "command line `rank.sample=1`: rank: unknown key 'sample', did you mean 'samples'?",
    ),
    "bad value": (
        "rank.samples=-1",
        "command line `rank.samples=-1`: rank.samples: must be greater than 0, got -1",
    ),
    "no such item": (
        "stages.1.tokens=1",
        "command line `stages.1.tokens=1`: stages is a list of 1 item, numbered from 0; it has no '1'",
    ),
    "not an index": (
        "stages.a.tokens=1",
        "command line `stages.a.tokens=1`: stages is a list of 1 item, numbered from 0; it has no 'a'",
    ),
    "inside a number": ("seed.x=1", "command line `seed.x=1`: seed is a number, so it has no 'x' inside"),
    "syntax": ("rank={", "command line `rank={`: not valid YAML: "),
    "twice in one value": (
        "rank={samples: 1, samples: 2}",
        "command line `rank={samples: 1, samples: 2}`: key 'samples' is given twice",
    ),
    "incomplete section": (
        "budgets.a={target: 1}",
        "command line `budgets.a={target: 1}`: budgets.a: required key 'metric' is missing",
    ),
    "required key removed": ("name=", "r.yaml:1:1: required key 'name' is missing"),
}


@pytest.mark.parametrize(("override", "line"), OVERRIDES.values(), ids=OVERRIDES.keys())
def test_wrong_override_is_attributed_to_the_command_line(
    complaints: Complaints, override: str, line: str
) -> None:
    text = f"seed: 1\nloss: {{kind: cross_entropy}}\nstages:\n- {{{STAGE}}}\n"
    found = complaints(text, override)
    assert len(found) == 1
    assert found[0].startswith(line)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(
    [
        "seed",
        "model.hf",
        "model.sizes",
        "model.sizes.hidden_size",
        "data.train",
        "data.train.0",
        "data.train.0.path",
        "space.choices",
        "space.choices.hidden_size",
        "space.per_layer",
        "budgets",
        "budgets.small",
        "budgets.small.metric",
        "budgets.small.target",
        "stages",
        "stages.0",
        "stages.0.budget_probs",
        "stages.0.budget_probs.small",
        "stages.0.tokens",
        "optimizer.betas",
        "router.tau",
        "parallel.world_size",
        "loss.kind",
        "run_dir",
        "name",
    ]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=KEYS, value=JUNK)
def test_no_value_anywhere_escapes_as_another_exception(write: Write, key: str, value: object) -> None:
    write(
        "r.yaml",
        f"name: a\nrun_dir: b\nmodel: {{hf: c}}\ndata: {{train: [{{path: a, weight: 1}}]}}\n{BUDGETS}stages:\n- {{{STAGE}}}\n",
    )
    override = f"{key}={yaml.safe_dump(value, default_flow_style=True)}"
    try:
        load("r.yaml", [override])
    except UserError as error:
        for line in str(error).split("\n"):
            assert line.startswith(("r.yaml:", "command line `"))
