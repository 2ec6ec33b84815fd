"""``generate``: what is written is what the exported submodel writes, from every kind of source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_files import slice_hf, write_hf
from parity import load, megatron_logits, randomise
from quantised_checkpoints import train
from quantised_dirs import CHOICES, LANES, SHAPE

from elastic_megatron import runtime
from elastic_megatron.blocks import build_elastic_model, running
from elastic_megatron.checkpoint import distributed
from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.checkpoint.source import open_source, open_stored
from elastic_megatron.cli import main
from elastic_megatron.conversion import Request, to_hf
from elastic_megatron.data.tokenizer import byte_tokenizer
from elastic_megatron.ops.locate import weights
from elastic_megatron.ops.mix import SubmodelMix
from elastic_megatron.quantization.formats import FP8, NVFP4
from elastic_megatron.serving.model import build_served
from elastic_megatron.space import ElasticSpace

PARENT = SHAPE.override(vocab_size=264)
NEW = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family as checkpoint, elastic directory and slices; others in NVFP4 and FP8."""
    root = tmp_path_factory.mktemp("family")
    runtime.start(seed=1)
    space = ElasticSpace.build(PARENT, CHOICES, LANES, layer_order=[3, 1, 0, 6, 4, 2, 5])
    model = build_elastic_model(space)
    randomise(model)
    submodels = {"whole": space.full(), "small": space.smallest()}
    manifest = Manifest(shape=PARENT, space=space, submodels=submodels)
    byte_tokenizer().save_pretrained(root / "tokenizer")
    distributed.save(root / "checkpoint", 1, [model], manifest, hf_files=root / "tokenizer")
    options: dict[str, Any] = {"side_files": root / "tokenizer", "dtype": torch.float32}
    write_hf(root / "elastic", manifest, weights(model.state_dict()).items(), elastic=True, **options)
    slice_hf(root / "elastic", root / "slices", list(submodels))
    for form in (NVFP4, FP8):
        run = root / f"{form.name}_run"
        train(run, form, manifest=manifest, dtype=torch.float32, hf_files=root / "tokenizer")
        slices = [Request(root / f"{form.name}_slices" / name, name) for name in submodels]
        to_hf(open_stored(run), [Request(root / form.name, elastic=True), *slices])
    return root


def generate(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    status = main(["generate", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert status == 0, err
    return json.loads(out)


def alone(capsys: pytest.CaptureFixture[str], source: Path, *more: object) -> list[int]:
    return generate(capsys, source, "--prompt", "Nested", "--plain", "--max-new-tokens", NEW, *more)["tokens"]


def masked(model: Any, manifest: Manifest, name: str) -> Any:
    """Runs the whole model with a submodel's masks: the truth beside what runs on its own widths."""
    assert manifest.space is not None
    return running(model, SubmodelMix.one_hot(manifest.space, manifest.submodel(name)))


def until_end(tokens: list[int]) -> list[int]:
    end = byte_tokenizer().eos_token_id
    return tokens[: tokens.index(end)] if end in tokens else tokens


@pytest.mark.parametrize("name", ["whole", "small"])
def test_a_submodel_writes_what_transformers_writes_from_its_directory(
    root: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    exported, complaints = load(root / "slices" / name)
    assert not complaints
    prompt = torch.tensor([list(byte_tokenizer()("Nested")["input_ids"])])
    wanted = exported.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False
    )[0, prompt.shape[1] :].tolist()
    assert len(set(wanted)) > 3 and len(wanted) == NEW, "the comparison is about nothing"
    for source in ("checkpoint", "elastic"):
        assert alone(capsys, root / source, "--submodel", name) == wanted
    assert alone(capsys, root / "slices" / name) == wanted


def test_without_a_name_the_whole_model_writes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert alone(capsys, root / "elastic") == alone(capsys, root / "elastic", "--submodel", "whole")
    assert alone(capsys, root / "elastic") != alone(capsys, root / "elastic", "--submodel", "small")


@pytest.mark.parametrize("form", ["nvfp4", "fp8"])
@pytest.mark.parametrize("name", ["whole", "small"])
def test_quantised_models_write_what_will_be_served(
    root: Path, capsys: pytest.CaptureFixture[str], form: str, name: str
) -> None:
    """With rounded inputs, over whole prefixes; the same from the checkpoint, its export and the slice."""
    opened = open_source(root / form)
    model, tokens = build_served(opened).model, byte_tokenizer()("Nested")["input_ids"]
    rounded, plain = list(tokens), list(tokens)
    with masked(model, opened.manifest, name):
        for _ in range(NEW):
            plain.append(int(megatron_logits(model, torch.tensor([plain]))[0, -1].argmax()))
            with opened.served([model]):
                rounded.append(int(megatron_logits(model, torch.tensor([rounded]))[0, -1].argmax()))
    wanted = until_end(rounded[len(tokens) :])
    for source in (root / f"{form}_run", root / form):
        assert alone(capsys, source, "--submodel", name) == wanted
    assert alone(capsys, root / f"{form}_slices" / name) == wanted
    if (form, name) == ("nvfp4", "whole"):
        assert rounded != plain, "rounded inputs change nothing, so nothing is tested"


def test_one_thinks_and_another_answers(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each as it writes alone, the answer from the prompt, the thought and the closing mark."""
    prompt = ["--prompt", "Why?", "--max-new-tokens", 8]
    found = generate(
        capsys, root / "elastic", "--think", "whole", "--answer", "small", "--budget", 5, *prompt
    )
    turn = "<s>user\nWhy?</s><s>assistant\n<think>\n"
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(found["prompt_tokens"]) == turn
    assert found["submodels"] == {"think": "whole", "answer": "small"}
    assert len(found["thought_tokens"]) == 5 and found["thought_closed_by"] == "budget"
    assert found["thought"] == tokenizer.decode(found["thought_tokens"])
    model = build_served(opened := open_source(root / "elastic")).model

    def continued(name: str, tokens: list[int], n: int) -> list[int]:
        with masked(model, opened.manifest, name):
            for _ in range(n):
                tokens = [*tokens, int(megatron_logits(model, torch.tensor([tokens]))[0, -1].argmax())]
        return tokens

    thought = continued("whole", found["prompt_tokens"], 5)
    assert found["thought_tokens"] == thought[-5:]
    closed = [*thought, *tokenizer("\n\n</think>")["input_ids"]]
    assert found["tokens"] == continued("small", closed, 8)[len(closed) :]
    assert found["text"] == tokenizer.decode(found["tokens"]) and not found["finished"]


def test_the_text_is_shown_as_it_is_written(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--think", "small", "--answer", "whole", "--budget", "3", "--prompt", "a b"]
    found = generate(capsys, root / "elastic", *arguments, "--max-new-tokens", "5")
    assert main(["generate", str(root / "elastic"), *arguments, "--max-new-tokens", "5"]) == 0
    shown = f"{found['thought']}\n\n</think>{found['text']}\n"
    assert capsys.readouterr().out == shown


def test_draws_follow_the_seed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--temperature", 1.5, "--top-p", 0.9]
    first, again, other = (
        alone(capsys, root / "slices/small", *options, "--seed", seed) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_prompt_may_be_a_file(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompt.txt").write_text("Nested", encoding="utf-8")
    found = generate(
        capsys,
        root / "slices/small",
        "--prompt-file",
        tmp_path / "prompt.txt",
        "--plain",
        "--max-new-tokens",
        NEW,
    )
    assert found["tokens"] == alone(capsys, root / "slices/small")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--think", "whole"], "--think alone; thinking needs --think NAME, --answer NAME and --budget N"),
        (["--think", "whole", "--budget", "3"], "--think and --budget alone"),
        (["--think", "whole", "--answer", "small", "--budget", "-1"], "--budget -1; give 0 or more"),
        (["--think", "a", "--answer", "b", "--budget", "1", "--submodel", "c"], "exclude each other"),
        (["--think", "whole", "--answer", "middle", "--budget", "1"], "unknown submodel 'middle'.* whole, small"),
        (["--submodel", "tiny"], "unknown submodel 'tiny'"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0; give 1 or more"),
        (["--temperature", "-1"], "--temperature -1.0; give 0 or more"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--top-p", "0"], "--top-p 0.0; give a number above 0"),
        (["--prompt-file", "x"], "not allowed with argument --prompt"),
    ],
)  # fmt: skip
def test_bad_options_are_one_line(
    root: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    refused(capsys, words, root / "elastic", "--prompt", "a", *arguments)


def refused(capsys: pytest.CaptureFixture[str], words: str, *arguments: object) -> None:
    capsys.readouterr()
    try:
        status = main(["generate", *map(str, arguments)])
    except SystemExit as e:
        status = e.code
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and len(err.splitlines()) == 1
    import re

    assert err.startswith("error: ") and re.search(words, err), err


def test_bad_sources_and_prompts_are_one_line(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latin").write_bytes(b"\xe9")
    for words, *arguments in (
        ("does not exist; give a run folder", tmp_path / "none", "--prompt", "a"),
        ("one of the arguments --prompt --prompt-file is required", root / "elastic"),
        ("none: no such file", root / "elastic", "--prompt-file", tmp_path / "none"),
        ("latin:1: not UTF-8", root / "elastic", "--prompt-file", tmp_path / "latin"),
        ("the prompt is empty", root / "elastic", "--prompt", "", "--plain"),
        (
            "has none: the checkpoint is not elastic",
            root / "slices/small",
            "--submodel",
            "small",
            "--prompt",
            "a",
        ),
    ):
        refused(capsys, words, *arguments)


def test_a_source_without_or_with_another_tokenizer_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runtime.start(seed=1)
    shape = PARENT.override(hybrid_layer_pattern="M", vocab_size=40)
    from elastic_megatron.blocks import build_model

    model = build_model(shape)
    distributed.save(tmp_path / "bare", 1, [model], Manifest(shape=shape))
    refused(capsys, "carries no tokenizer; export it", tmp_path / "bare", "--prompt", "a")
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    distributed.save(tmp_path / "odd", 1, [model], Manifest(shape=shape), hf_files=tmp_path / "tokenizer")
    refused(capsys, "gives token 122, but the model's vocabulary has 40", tmp_path / "odd", "--prompt", "u")
