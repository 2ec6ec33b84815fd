"""A Dockerfile parser and the rules of hadolint (by its codes) that concern ours, without a container engine."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass

# read by programs, not by the file itself
READ_BY_TOOLS = re.compile(r"PIP_\w+|PATH|LD_LIBRARY_PATH|DEBIAN_FRONTEND")
SECRET = re.compile(r"(?i)(token|secret|passw|credential|(api|access|private|ssh)_?key)")
# a word of a pip command that fixes what is installed: a version, a commit, a local folder
PINNED = re.compile(r"[\w.\[\],-]+==\S+|([\w-]+ @ )?git\+\S+@\S+|\.{0,2}/\S*|\.")
PIP_VALUES = {
    "-r",
    "-c",
    "--requirement",
    "--constraint",
    "-i",
    "--index-url",
    "--extra-index-url",
    "--target",
}


@dataclass(frozen=True)
class Instruction:
    """One instruction: its name in capitals, the text after it, and the here-documents that it carries."""

    line: int
    name: str
    text: str
    heredocs: tuple[str, ...] = ()

    def shell(self) -> str:
        """What a shell runs: the text, and a here-document that is a script of the shell itself."""
        text = re.sub(r"^(--\w+=\S+\s+)+", "", self.text)
        if re.match(r"<<|(/\S+/)?(ba)?sh\b[^\n]*<<", text):
            return "\n".join([re.sub(r"<<-?\S+", "", text), *self.heredocs])
        return re.sub(r"<<-?(['\"]?)\w+\1", "", text)


def parse(source: str) -> list[Instruction]:
    """The instructions of a Dockerfile: continued lines joined, comments dropped, here-documents attached."""
    lines, out = iter(enumerate(source.splitlines(), 1)), []
    for number, line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        text = line.strip()
        while text.endswith("\\"):
            _, following = next(lines)
            if not following.lstrip().startswith("#"):
                text = f"{text[:-1].rstrip()} {following.strip()}"
        name, _, rest = text.partition(" ")
        marks = re.findall(r"<<-?(['\"]?)(\w+)\1", rest) if name.upper() in ("RUN", "COPY") else []
        heredocs = tuple(_until(lines, mark) for _, mark in marks)
        out.append(Instruction(number, name.upper(), rest.strip(), heredocs))
    return out


def _until(lines: Iterator[tuple[int, str]], mark: str) -> str:
    body = []
    for _, line in lines:
        if line.strip() == mark:
            return "\n".join(body) + "\n"
        body.append(line)
    raise ValueError(f"here-document {mark} has no end")


def _words(run: Instruction) -> Iterator[str]:
    """The words and operators of a RUN; a line break is an operator."""
    for line in run.shell().splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split, lexer.commenters = True, "#"
        yield from lexer
        yield ";"


def commands(run: Instruction) -> list[list[str]]:
    """The simple commands of a RUN as lists of words, without leading assignments."""
    out: list[list[str]] = [[]]
    for word in _words(run):
        out.append([]) if word in ("&&", "||", ";", "|", "|&") else out[-1].append(word)
    return [c for c in (_without_assignments(c) for c in out) if c]


def _without_assignments(words: list[str]) -> list[str]:
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    return words


def _runs(file: list[Instruction]) -> Iterator[tuple[Instruction, list[str]]]:
    return ((run, command) for run in file if run.name == "RUN" for command in commands(run))


def _installs(file: list[Instruction]) -> Iterator[tuple[Instruction, list[str]]]:
    """The words after ``pip install``."""
    for run, words in _runs(file):
        if (m := re.match(r"((python3? -m )?pip3?) install\b", " ".join(words))) is not None:
            yield run, words[len(m[0].split()) :]


def _positional(words: list[str]) -> list[str]:
    return [
        word
        for before, word in zip(["", *words], words, strict=False)
        if not word.startswith("-") and before not in PIP_VALUES and word not in (">", "<")
    ]


def _apt(file: list[Instruction], verb: str) -> Iterator[tuple[Instruction, list[str]]]:
    return ((run, c) for run, c in _runs(file) if c[0] in ("apt-get", "apt") and verb in c)


def _image(file: list[Instruction]) -> Iterator[tuple[Instruction, str]]:
    """Each FROM's image with the defaults of the ARGs before it filled in; later stages of one file are skipped."""
    defaults, stages = {}, set()
    for instruction in file:
        if instruction.name == "ARG" and "=" in instruction.text:
            name, _, value = instruction.text.partition("=")
            defaults[name] = value.strip('"')
        if instruction.name == "FROM":
            words = [w for w in instruction.text.split() if not w.startswith("--")]
            if words[0] not in stages:
                yield instruction, re.sub(r"\$\{?(\w+)\}?", lambda m: defaults.get(m[1], ""), words[0])
            stages |= {words[2]} if len(words) == 3 else set()


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), list)
    except ValueError:
        return False


def _without_pipefail(file: list[Instruction]) -> Iterator[Instruction]:
    pipefail = False
    for instruction in file:
        if instruction.name in ("FROM", "SHELL"):
            pipefail = instruction.name == "SHELL" and "pipefail" in instruction.text
        if instruction.name == "RUN" and not pipefail and {"|", "|&"} & set(_words(instruction)):
            yield instruction


def _declared(file: list[Instruction]) -> Iterator[tuple[Instruction, str]]:
    for instruction in file:
        if instruction.name in ("ARG", "ENV"):
            words = shlex.split(instruction.text)
            for word in [w for w in words if "=" in w] or words[:1]:
                yield instruction, word.partition("=")[0]


def _unused(file: list[Instruction]) -> Iterator[Instruction]:
    for instruction, name in _declared(file):
        later = [i.text + "".join(i.heredocs) for i in file if i.line > instruction.line]
        if not READ_BY_TOOLS.fullmatch(name) and not any(re.search(rf"\$\{{?{name}\b", t) for t in later):
            yield instruction


def _each(found: Iterator[tuple[Instruction, object]]) -> Iterator[Instruction]:
    return (instruction for instruction, _ in found)


File = list[Instruction]
RULES: dict[str, tuple[str, Callable[[File], Iterator[Instruction]]]] = {
    "DL3000": (
        "WORKDIR is absolute",
        lambda f: (i for i in f if i.name == "WORKDIR" and i.text[0] not in "/$"),
    ),
    "DL3002": (
        "the last user is not made root",
        lambda f: (
            i for i in [i for i in f if i.name == "USER"][-1:] if i.text.split(":")[0] in ("root", "0")
        ),
    ),
    "DL3003": ("WORKDIR instead of cd", lambda f: _each((i, c) for i, c in _runs(f) if c[0] == "cd")),
    "DL3004": ("no sudo", lambda f: _each((i, c) for i, c in _runs(f) if c[0] == "sudo")),
    "DL3006": (
        "the base image has a tag",
        lambda f: _each((i, t) for i, t in _image(f) if not re.search(r":[^/:]+$|@sha256:\w+$", t)),
    ),
    "DL3007": (
        "the tag is not latest",
        lambda f: _each((i, t) for i, t in _image(f) if t.endswith(":latest")),
    ),
    "DL3008": (
        "apt-get install names versions",
        lambda f: _each(
            (i, c) for i, c in _apt(f, "install") if any("=" not in w for w in c[2:] if w[0] != "-")
        ),
    ),
    "DL3009": (
        "apt-get update's lists are removed",
        lambda f: _each((i, c) for i, c in _apt(f, "update") if "rm -rf /var/lib/apt/lists" not in i.shell()),
    ),
    "DL3013": (
        "pip install names versions",
        lambda f: _each(
            (i, w) for i, w in _installs(f) if any(not PINNED.fullmatch(p) for p in _positional(w))
        ),
    ),
    "DL3015": (
        "apt-get installs without recommendations",
        lambda f: _each((i, c) for i, c in _apt(f, "install") if "--no-install-recommends" not in c),
    ),
    "DL3020": ("COPY instead of ADD", lambda f: (i for i in f if i.name == "ADD")),
    "DL3025": (
        "CMD and ENTRYPOINT are JSON lists",
        lambda f: (i for i in f if i.name in ("CMD", "ENTRYPOINT") and not _is_json(i.text)),
    ),
    "DL3042": (
        "pip keeps no cache",
        lambda f: _each((i, w) for i, w in _installs(f) if "--no-cache-dir" not in w),
    ),
    "DL4006": ("pipefail is set before a pipe", _without_pipefail),
    "every-name-is-used": ("each ARG and ENV has a reader", _unused),
    "no-secrets": (
        "no ARG or ENV for a secret",
        lambda f: _each((i, n) for i, n in _declared(f) if SECRET.search(n)),
    ),
}


def lint(source: str) -> dict[str, list[int]]:
    """Broken rules and the lines that break them."""
    file = parse(source)
    found = {code: [i.line for i in rule(file)] for code, (_, rule) in RULES.items()}
    return {code: lines for code, lines in found.items() if lines}
