"""Files that nobody thought of: whatever stands in them, a command succeeds or complains line by line."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from corpus import FILES, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastic_megatron.cli import main

SIZES = {
    "hybrid_layer_pattern": "ME*-", "hidden_size": 96, "vocab_size": 128, "ffn_hidden_size": 64,
    "moe_ffn_hidden_size": 32, "num_moe_experts": 16, "moe_router_topk": 2, "mamba_num_heads": 8, "mamba_head_dim": 8,
    "mamba_state_dim": 8, "mamba_num_groups": 8, "num_attention_heads": 8, "num_query_groups": 8, "kv_channels": 8,
}  # fmt: skip
DOCUMENTS: dict[str, Any] = {name: yaml.safe_load(text) for name, text in FILES.items()}
# known sizes, so that estimates are made too
DOCUMENTS["base.yaml"]["model"] = {"sizes": SIZES}
DOCUMENTS["stage1.yaml"] |= {"teacher": {"checkpoint": "runs/rank"}, "rank": {"depth": True}}
COMMANDS = ("recipe show", "plan", "submit --dry-run")
KEYS = sorted(
    set(re.findall(r"\w+(?=:)", "\n".join(FILES.values()))) | set(SIZES) | {"extends", "", "1", "a b", "é"}
)

Path_ = tuple[str | int, ...]


def paths(node: Any, at: Path_ = ()) -> list[Path_]:
    """Every place below `node`."""
    if not isinstance(node, dict | list):
        return []
    entries = node.items() if isinstance(node, dict) else enumerate(node)
    return [place for key, child in entries for place in [(*at, key), *paths(child, (*at, key))]]


JUNK = st.recursive(
    st.sampled_from(
        [None, True, False, 0, 1, -1, 3, 2**62, 2**64, 1.5, 1e-300, 1e308, float("inf"), float("nan"), "", "~", "${HOME}",
         "$(id)", "a\nb", "\u2028", "0:30:00", "requeue", "none", "base.yaml", ".", "/dev/null", "x" * 300]
    )
    | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn) -> dict[str, Any]:
    """The documents with one to four places dropped, renamed, retyped, moved inside, copied or exchanged."""
    documents = yaml.safe_load(yaml.safe_dump(DOCUMENTS))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.sampled_from(paths(documents)).filter(lambda p: len(p) > 1))
        holder = documents
        for key in place[:-1]:
            holder = holder[key]
        key, value = place[-1], holder[place[-1]]
        match draw(st.sampled_from(["drop", "rename", "retype", "nest", "copy", "exchange"])):
            case "drop":
                del holder[key]
            case "rename" if isinstance(holder, dict):
                holder[draw(st.sampled_from(KEYS) | st.text(max_size=3))] = holder.pop(key)
            case "nest":
                holder[key] = draw(st.sampled_from([[value], {draw(st.sampled_from(KEYS)): value}]))
            case "copy" if isinstance(holder, list):
                holder.append(value)
            case "exchange":
                other = draw(st.sampled_from(paths(documents)))
                for part in (found := [documents]) and other:
                    found.append(found[-1][part])
                holder[key] = yaml.safe_load(yaml.safe_dump(found[-1]))
            case _:
                holder[key] = draw(JUNK)
    return documents


def check(command: str, target: str = "chain.yaml") -> None:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([*command.split(), target])
    assert status in (0, 2), err.getvalue()
    for line in err.getvalue().splitlines():
        assert line.startswith(("error: ", "warning: ")) and "Traceback" not in line, err.getvalue()
    assert status == 0 or "error: " in err.getvalue()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    write(tmp_path)
    return tmp_path


def put(folder: Path, documents: dict[str, Any]) -> None:
    for name, document in documents.items():
        (folder / name).write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_documents_are_right_without_damage(folder: Path, command: str) -> None:
    put(folder, DOCUMENTS)
    check(command)


@pytest.mark.parametrize("command", COMMANDS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=damaged())
def test_no_document_escapes_as_a_traceback(folder: Path, command: str, documents: dict[str, Any]) -> None:
    put(folder, {name: documents.get(name) for name in FILES})
    check(command)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(FILES)),
    cut=st.tuples(st.floats(0, 1), st.integers(0, 30)),
    put_in=st.text(st.sampled_from("{}[]:,-#&*!|>'\"%@` \n\t\r\\\0\u2028\ufeff?=<~0e.") | st.characters(), max_size=4),
    command=st.sampled_from(COMMANDS),
)  # fmt: skip
def test_no_text_escapes_as_a_traceback(
    folder: Path, name: str, cut: tuple[float, int], put_in: str, command: str
) -> None:
    """A few characters of one file are taken out, and a few put in."""
    put(folder, DOCUMENTS)
    text = FILES[name]
    at = int(cut[0] * len(text))
    damaged_text = text[:at] + put_in + text[at + cut[1] :]
    (folder / name).write_bytes(damaged_text.encode("utf-8", "surrogatepass"))
    check(command)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from(
        [".".join(map(str, (job, *path))) for job, file in (("rank", "rank.yaml"), ("stage1", "stage1.yaml"))
         for path in paths(DOCUMENTS[file]) if path[0] != "extends"]
        + [".".join(map(str, ("cluster", *path))) for path in paths(DOCUMENTS["site/cluster.yaml"])]
        + ["name", "run_dir", "cluster", "jobs", "jobs.rank", "jobs.stage1.after", "rank", "", "x.y"]
    ),
    value=JUNK,
    command=st.sampled_from(COMMANDS),
)  # fmt: skip
def test_no_override_escapes_as_a_traceback(folder: Path, key: str, value: Any, command: str) -> None:
    put(folder, DOCUMENTS)
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([*command.split(), "chain.yaml", f"{key}={text}"])
    assert status in (0, 2), err.getvalue()
    assert all(line.startswith(("error: ", "warning: ")) for line in err.getvalue().splitlines()), (
        err.getvalue()
    )
