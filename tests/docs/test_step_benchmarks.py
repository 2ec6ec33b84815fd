"""The benchmarks of training compare what they say they compare, and their page says what was measured."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elastic_megatron.errors import UserError

TOOLS = Path(__file__).parents[2] / "tools"
README = TOOLS / "benchmarks" / "README.md"


@pytest.fixture(scope="module")
def tools() -> Iterator[Callable[[str], Any]]:
    """Import a module of the benchmarks: they stand beside each other, in no package."""
    before = list(sys.path)
    sys.path[:0] = [str(TOOLS / "benchmarks"), str(TOOLS)]
    yield importlib.import_module
    sys.path[:] = before


def result(**changes: Any) -> dict[str, Any]:
    """Of a run that meets every target."""
    machine = {
        "cpu": "A CPU",
        "cores": 2,
        "memory_bytes": 25e9,
        "virtual": True,
        "filesystem": "x",
        "kernel": "6",
    }
    row = {"title": "a / b", "ratio": {"median": 1.1, "min": 1.0, "max": 1.3}, "target": 1.12,
           "memory": 1.04, "memory_target": 1.05, "note": "FLOPs 0.45"}  # fmt: skip
    free = row | {"title": "c / b", "target": None, "memory": None, "memory_target": None, "note": None}
    return {
        "machine": machine, "versions": {"torch": "2"}, "device": "one CPU thread", "dtype": "float32",
        "clock": "CPU seconds", "rounds": 7, "model": "Small.", "rows": [row, free],
        "growth": [{"title": "by layers", "sizes": [1, 2, 4], "seconds": [1.0, 2.1, 4.0], "off": 0.05}],
        "peaks": [{"title": "dense", "tokens": [1, 2], "bytes": [1e6, 2e6]},
                  {"title": "chunked", "tokens": [2, 4], "bytes": [1e6, 1e6]}],
        "peak_tflops": 2.0,
        "contenders": {"a": {"seconds": {"median": 2.0}, "tokens": 10, "flops": 2e12}},
    } | changes  # fmt: skip


def row(**changes: Any) -> dict[str, Any]:
    return result()["rows"][0] | changes


BENCHMARKS = ("steps", "distillation", "ranking", "peer")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_page_says_what_was_measured_and_every_target_is_met(
    tools: Callable[[str], Any], name: str
) -> None:
    benchmark, ratios = tools(name), tools("ratios")
    measured = json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))
    begin, end = tools("readme_block").markers(benchmark.BLOCK)
    page = README.read_text(encoding="utf-8")
    assert page.split(f"{begin}\n")[1].split(f"\n{end}")[0] == "\n".join(ratios.render(measured))
    assert measured["rounds"] >= 7 and ratios.misses(measured) == []


def test_every_comparison_of_the_steps_is_in_the_results_with_its_targets(
    tools: Callable[[str], Any],
) -> None:
    steps = tools("steps")
    measured = json.loads(steps.RESULTS.read_text(encoding="utf-8"))
    assert [(r["title"], r["target"], r["memory_target"]) for r in measured["rows"]] == [
        (c.title, c.target, c.memory_target) for c in steps.COMPARISONS
    ]
    assert [g["title"] for g in measured["growth"]] == [
        f"step, by {n}" for n in ("tokens", "layers", "experts")
    ]
    assert all(g["sizes"][2] == 2 * g["sizes"][1] == 4 * g["sizes"][0] for g in measured["growth"])


def test_rounds_rotate_and_what_came_before_them_is_not_timed(
    tools: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    interleave, clock, order = tools("interleave"), [0.0], []

    def contender(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            # the first run of a contender is slow, and every later one slower by a tenth
            clock[0] += 100.0 if order.count(name) == 1 else seconds * (1 + order.count(name) / 10)

        return run

    monkeypatch.setattr(interleave, "seconds", lambda: clock[0])
    runs = {name: contender(name, cost) for name, cost in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    times = interleave.race(runs, 4)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert times["a"] == pytest.approx([1.2, 1.3, 1.4, 1.5])
    assert interleave.ratio(times, ["c"], ["a", "b"]) == pytest.approx(
        dict.fromkeys(("median", "min", "max"), 8 / 3)
    )


def test_a_ratio_is_taken_within_a_round(tools: Callable[[str], Any]) -> None:
    """A machine that is ten times slower in one round changes no ratio."""
    times = {"a": [1.0, 11.0, 1.2], "b": [1.0, 10.0, 1.0]}
    assert tools("interleave").ratio(times, ["a"], ["b"]) == pytest.approx(
        {"median": 1.1, "min": 1.0, "max": 1.2}
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, []),
        ({"rows": [row(ratio={"median": 1.13})]}, ["a / b: time 1.13, the target is 1.12"]),
        ({"rows": [row(memory=1.06)]}, ["a / b: peak memory 1.060, the target is 1.05"]),
        ({"rows": [row(ratio={"median": 9.0}, target=None)]}, []),
        ({"growth": [{"title": "by layers", "off": -0.11}]}, ["by layers: -11 % off the line, the target is 10 %"]),
    ],
)  # fmt: skip
def test_a_missed_target_has_a_line(
    tools: Callable[[str], Any], changes: Mapping[str, Any], says: list[str]
) -> None:
    assert tools("ratios").misses(result(**changes)) == says


def test_growth_is_the_distance_from_the_straight_line(tools: Callable[[str], Any]) -> None:
    ratios = tools("ratios")
    assert ratios.growth("x", [1, 2, 4], [3.0, 5.0, 9.0])["off"] == pytest.approx(0)
    assert ratios.growth("x", [1, 2, 4], [1.0, 4.0, 16.0])["off"] == pytest.approx(4 / 6 - 1)


def test_the_tables_have_a_cell_for_every_heading(tools: Callable[[str], Any]) -> None:
    lines = tools("ratios").render(result())
    assert lines[0] == "A CPU, 2 cores, 25 GB memory, virtual machine, Linux 6; torch 2."
    assert lines[1].endswith("CPU seconds; medians of 7 rounds. Small.")
    tables = "\n".join(lines[2:]).strip().split("\n\n")
    assert [len({line.count(" | ") for line in table.splitlines()}) for table in tables] == [1] * 4
    assert "| a / b | 1.10 | 1.00 to 1.30 | 1.12 | 1.04 | 1.05 | FLOPs 0.45 |" in tables[0]
    assert "| a | 2.000 | 5 | 1.000 | 50.0 % |" in tables[1]
    assert "| by layers | 1, 2, 4 | 1.00, 2.10, 4.00 | +5.0 % | 10 % |" in tables[2]
    assert "| dense | 1 MB | 2 MB |  |" in tables[3] and "| chunked |  | 1 MB | 1 MB |" in tables[3]


@pytest.mark.parametrize("data", [{}, [1], {"machine": 3}, result(rows=None)])
def test_what_is_no_result_is_refused_in_one_line_of_its_own(tools: Callable[[str], Any], data: Any) -> None:
    with pytest.raises(UserError, match=r"^these are no results of a benchmark .*; run it again$"):
        tools("ratios").render(data)


@pytest.mark.parametrize(
    ("found", "options", "status"),
    [(result(), [], 0), (result(rows=[row(memory=2.0)]), [], 1), (result(rows=[row(memory=2.0)]), ["--no-check"], 0),
     (UserError("no memory"), [], 2)],
)  # fmt: skip
def test_the_exit_status_tells_whether_targets_are_met(
    tools: Callable[[str], Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    found: Any,
    options: list[str],
    status: int,
) -> None:
    ratios, file = tools("ratios"), tmp_path / "found.json"

    def measure(_: Any) -> Any:
        if isinstance(found, UserError):
            raise found
        return found

    parser = ratios.arguments("x", file)
    assert ratios.main(parser, measure, file, "t", [*options, "--json", str(file)]) == status
    shown = capsys.readouterr()
    if status == 2:
        assert shown.err == "error: no memory\n" and not shown.out
    else:
        assert json.loads(file.read_text()) == found and shown.out == "\n".join(ratios.render(found)) + "\n"


def test_the_small_submodel_has_45_percent_of_the_flops(tools: Callable[[str], Any]) -> None:
    models = tools("step_models")
    space = models.space_of(models.SMALL)
    assert models.flops(space, "small", 512) == pytest.approx(0.45, abs=0.02)
    assert models.flops(space, "full", 512) == 1.0 and models.spec_of(space, "full") == space.full()
    large = models.space_of(models.LARGE)
    assert all(models.spec_of(large, budget) <= large.full() for budget in models.BUDGETS)


@pytest.fixture(scope="module")
def tiny(tools: Callable[[str], Any], megatron: Any) -> Any:
    """The contenders of a model with an eighth of the sizes."""
    models = tools("step_models")
    sizes = ("hidden_size", "vocab_size", "ffn_hidden_size", "moe_ffn_hidden_size",
             "moe_shared_expert_intermediate_size")  # fmt: skip
    parent = models.SMALL.override(
        hybrid_layer_pattern="ME*-", mamba_head_dim=8, **{s: getattr(models.SMALL, s) // 8 for s in sizes}
    )
    return models.Steps(models.Setting(parent, 2, 16, torch.device("cpu")))


def gradients(step: Callable[[], object], model: nn.Module) -> dict[str, Tensor]:
    """What a step leaves on the parameters of a model."""
    model.zero_grad()
    step()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_masked_and_sliced_steps_are_steps_of_one_submodel(tiny: Any) -> None:
    masked, sliced = (gradients(step("small"), tiny.elastic) for step in (tiny.masked, tiny.sliced))
    norm = torch.cat([g.flatten() for g in masked.values()]).norm()
    assert norm > 0
    for name, grad in masked.items():
        assert (sliced.get(name, torch.zeros_like(grad)) - grad).norm() <= 1e-5 * norm, name


def test_extracted_and_stock_models_have_the_weights_of_the_elastic_one(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their losses are those of its submodels."""
    losses: dict[str, list[float]] = {}

    def learn(name: str) -> Callable[..., None]:
        def keep(logits: Tensor, extra: Tensor | None = None) -> None:
            losses.setdefault(name, []).append(float(torch.logsumexp(logits.detach().double(), -1).sum()))

        return keep

    for way, step in (("small", tiny.extracted("small")), ("small", tiny.sliced("small")),
                      ("full", tiny.plain()), ("full", tiny.masked("full")), ("full", tiny.extracted("full"))):  # fmt: skip
        monkeypatch.setattr(tiny, "learn", learn(way))
        step()
    for name, found in losses.items():
        assert found == pytest.approx([found[0]] * len(found), rel=1e-6), name
    assert losses["small"][0] != pytest.approx(losses["full"][0], rel=1e-6)


@pytest.mark.parametrize("name", ["masked, soft", "masked, decided"])
def test_soft_steps_reach_every_weight(tools: Callable[[str], Any], tiny: Any, name: str) -> None:
    found = gradients(tools("step_models").CONTENDERS[name](tiny), tiny.elastic)
    assert all(g.isfinite().all() for g in found.values())
    assert found["decoder.layers.0.mixer.in_proj.weight"].norm() > 0


def test_the_weights_of_decided_choices_are_denormal(tools: Callable[[str], Any], tiny: Any) -> None:
    """Else the row shows nothing."""
    seen: list[Any] = []
    step = tools("step_models").CONTENDERS["masked, decided, denormal"](tiny)
    whole = tiny.backward
    try:
        tiny.backward = lambda model, mix: seen.append(mix.mask("hidden_size").detach())
        step()
    finally:
        tiny.backward = whole
        torch.set_flush_denormal(False)
    assert 0 < seen[0].min() < torch.finfo(torch.float32).tiny and seen[0].max() == 1


def test_peak_memory_is_that_of_the_fullest_moment(tools: Callable[[str], Any], tmp_path: Path) -> None:
    """Of 40 MB that are freed before 60 MB are taken: 60 MB, and no more for what was there before."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(TOOLS / 'benchmarks')!r})\nimport interleave, torch\n"
        "before = torch.ones(5_000_000)\npeak = interleave.Peak()\nx = torch.ones(10_000_000)\ndel x\n"
        "y = torch.ones(15_000_000)\nprint(sys.argv[1:])\nprint(peak.bytes())\n"
    )
    assert tools("interleave").peak_of(script, ["a"]) == pytest.approx(60e6, rel=0.05)
    script.write_text("raise SystemExit('no such thing')")
    with pytest.raises(UserError, match=r"^the memory of 'a b' was not measured: no such thing$"):
        tools("interleave").peak_of(script, ["a", "b"])


def test_losses_that_differ_are_not_compared_in_time(
    tools: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    distillation = tools("distillation")
    monkeypatch.setattr(distillation, "VOCABULARY", 512)
    distillation._agree(torch.device("cpu"))
    wrong = {"dense": distillation.dense, "chunked": lambda inputs: 1.001 * distillation.chunked(inputs)}
    monkeypatch.setattr(distillation, "LOSSES", wrong)
    with pytest.raises(UserError, match="differ by 1.0e-03"):
        distillation._agree(torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "says"),
    [([], "name a checkout of Megatron-LM with --checkout"),
     (["--checkout", "{}"], "has no megatron/elastification; name a newer checkout with --checkout")],
)  # fmt: skip
def test_the_peer_needs_a_checkout(
    tools: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    says: str,
) -> None:
    monkeypatch.setattr("sys.argv", ["peer.py", *(o.format(tmp_path) for o in options)])
    assert tools("peer").main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.endswith(f"{says}\n") and error.count("\n") == 1


def test_a_peer_that_cannot_be_imported_says_why(tools: Callable[[str], Any], tmp_path: Path) -> None:
    folder = tmp_path / "megatron" / "elastification"
    folder.mkdir(parents=True)
    (folder / "flextron_elasticity_hooks.py").write_text("from megatron.core import no_such_name\n")
    load = tools("peer").loader(tmp_path)
    with pytest.raises(
        UserError, match=r"^.*hooks.py does not run beside this Megatron-Core: .*no_such_name"
    ):
        load("flextron_elasticity_hooks")
    with pytest.raises(UserError, match="another.py does not run beside this Megatron-Core"):
        load("another")
