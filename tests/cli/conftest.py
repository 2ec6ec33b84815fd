"""The whole story of a tiny family, played once a session through the command line's own ``main``."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_story import SUBMODELS, Story

from elastic_megatron.quantization.formats import FORMATS

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Data, parent, ranking, family, exports, slices, evaluations and report."""
    story = Story(tmp_path_factory.mktemp("story"))
    root = story.root
    shutil.copytree(HERE / "recipes", root / "recipes")
    lines = [f"{i} times {i} is {i * i}, and {i} plus 7 is {i + 7}.\n" for i in range(1200)]
    (root / "train.txt").write_text("".join(lines))
    story.text.write_text("".join(lines[::13]))
    story.play(
        "prepare",
        "prepare-data",
        root / "train.txt",
        "--output",
        root / "data/train",
        "--tokenizer",
        "bytes",
        "--json",
    )
    (root / "data/train_tokenizer").rename(root / "data/tokenizer")
    tokenizer = root / "data/tokenizer"
    story.play(
        "prepare valid", "prepare-data", story.text, "--output", root / "data/valid", "--tokenizer", tokenizer
    )
    story.play("show", "recipe", "show", story.recipe("elastic"))
    story.play("plan", "plan", story.recipe("parent"), "--json")
    story.play("parent", "train", story.recipe("parent"), "--json")
    story.play("rank", "rank", story.recipe("rank"), "--json")
    story.play("train", "train", story.recipe("elastic"), "--json")
    story.play("export", "export", story.elastic, root / "elastic_hf", "--elastic", "--json")
    story.play("plan family", "plan", root / "elastic_hf", "--json")
    for name in SUBMODELS:
        story.play(f"slice {name}", "slice", root / "elastic_hf", story.slice(name), "--submodel", name)
        story.play(f"eval {name}", "eval", story.slice(name), "--text", story.text, "--json")
    story.play("eval checkpoint", "eval", story.elastic, "--text", story.text, "--json")
    story.play(
        "eval family", "eval", root / "elastic_hf", "--text", story.text, "--submodel", "all", "--json"
    )
    story.play("report", "report", story.elastic, "--json")
    return story  # fmt: skip


@pytest.fixture(scope="session")
def quantised(story: Story) -> Path:
    """Folder of quantised runs, one a format, which read the tokens of the story."""
    from quantised_checkpoints import train
    from quantised_dirs import SHAPE, family

    whole = family(SHAPE.override(vocab_size=264))
    manifest = replace(whole, submodels={n: whole.submodels[n] for n in ("whole", "middle", "smallest")})
    root, tokenizer = story.root / "quantised", story.root / "data/tokenizer"
    for form in FORMATS.values():
        train(root / form.name, form, manifest=manifest, dtype=torch.float32, hf_files=tokenizer)
    return root


@pytest.fixture
def copy(story: Story, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one folder of the story that a test may damage."""

    def make(name: str) -> Path:
        target = tmp_path / name
        shutil.copytree(story.root / name, target)
        return target

    return make
