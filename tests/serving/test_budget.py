"""One submodel thinks, another answers: where the switch happens, and what either of them reads."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from elastic_megatron.data.tokenizer import byte_tokenizer
from elastic_megatron.serving.budget import Watch, answered, thought_and_answered
from elastic_megatron.serving.decode import Written
from elastic_megatron.serving.prompt import Marks, encode_prompt, end_tokens

MARK, EOS = 90, 91
MARKS = Marks("<think>\n", MARK, [70, 71, MARK])
TOKENS = st.lists(st.integers(0, 60), max_size=12)


@dataclass
class Fixed:
    """A submodel that writes given tokens, and keeps what it was asked to continue."""

    tokens: list[int]
    prompts: list[list[int]] = field(default_factory=list)

    def __call__(self, prompt: Sequence[int], limit: int, stops: Container[int], watch: Watch) -> Written:
        self.prompts.append(list(prompt))
        out: list[int] = []
        for token in self.tokens[:limit]:
            if token in stops:
                return Written(out, token)
            out.append(token)
            watch(token)
        assert len(out) == limit, "these tokens are too few for the test"
        return Written(out, None)


@given(TOKENS, st.integers(0, 15), st.sampled_from([MARK, EOS]), st.booleans())
def test_a_thought_ends_at_its_mark_at_the_end_or_at_the_budget(
    thought: list[int], budget: int, last: int, marked: bool
) -> None:
    """It never has more tokens than the budget, and the answer begins behind exactly one closing mark."""
    marks = MARKS if marked else None
    think, answer, seen = Fixed([*thought, last, *[5] * 20]), Fixed([7, 8, EOS]), []
    found = thought_and_answered(think, answer, [1, 2], budget, 9, {EOS}, marks, seen.append)
    ends = marked or last == EOS
    written = thought[:budget] if ends else [*thought, MARK, *[5] * 20][:budget]
    assert found.thought == written and think.prompts == [[1, 2]]
    stopped = ends and len(thought) < budget
    assert found.closed == (("mark" if last == MARK else "end") if stopped else "budget")
    closing = [] if marks is None else [MARK] if found.closed == "mark" else [70, 71, MARK]
    assert answer.prompts == [[1, 2, *written, *closing]]
    assert found.answer == [7, 8] and found.finished
    assert seen == [*written, *closing, 7, 8]


def test_an_answer_that_reaches_its_limit_is_not_finished() -> None:
    assert not answered(Fixed([7, 8, 9, EOS]), [1], 3, {EOS}, lambda token: None).finished
    found = answered(Fixed([7, 8, 9, EOS]), [1], 4, {EOS}, lambda token: None)
    assert found.finished and found.answer == [7, 8, 9] and found.thought is None and found.closed is None


def test_marks_and_ends_are_looked_up_in_the_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.convert_ids_to_tokens([3, 4]) == ["<think>", "</think>"]
    marks = Marks.of(tokenizer)
    assert marks is not None and marks.end == 4 and marks.cut == [5 + ord("\n"), 5 + ord("\n"), 4]
    assert end_tokens(tokenizer, {}) == {2}
    assert end_tokens(tokenizer, {"eos_token_id": 11}) == {2, 11}
    assert end_tokens(tokenizer, {"eos_token_id": [11, 12]}) == {2, 11, 12}
    tokenizer.eos_token = None
    assert end_tokens(tokenizer, {"eos_token_id": None}) == set()


def test_a_tokenizer_without_both_marks_has_none() -> None:
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    described = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    described["model"]["vocab"].pop("</think>")
    described["added_tokens"] = [t for t in described["added_tokens"] if t["content"] != "</think>"]
    backend = Tokenizer.from_str(json.dumps(described))
    assert Marks.of(PreTrainedTokenizerFast(tokenizer_object=backend)) is None


def test_prompts_take_the_template_and_open_the_thought_once() -> None:
    tokenizer = byte_tokenizer()
    marks = Marks.of(tokenizer)

    def text(**options: object) -> str:
        return tokenizer.decode(encode_prompt(tokenizer, "Why?", 261, **options))  # type: ignore[arg-type]

    turn = "<s>user\nWhy?</s><s>assistant\n"
    assert text() == turn and text(plain=True) == "Why?"
    assert text(thinking=marks) == f"{turn}<think>\n"
    assert text(plain=True, thinking=marks) == "Why?<think>\n"
    tokenizer.chat_template = f"{tokenizer.chat_template}{{{{ '<think>\\n' }}}}"
    assert text(thinking=marks) == f"{turn}<think>\n", "Nemotron 3 Nano's template opens it"
    tokenizer.chat_template = None
    assert text() == "Why?"
