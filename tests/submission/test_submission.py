"""Submitting through sites' wrappers: whatever sbatch answers, a job is in the queue once and recorded, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_slurm import Site, make_site

from elastic_megatron.cli import main
from elastic_megatron.errors import UserError
from elastic_megatron.files import lock
from elastic_megatron.slurm import facts, record, scheduler
from elastic_megatron.slurm.record import Record
from elastic_megatron.slurm.state import states
from elastic_megatron.slurm.submission import cancel, resume, submit


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(facts, "collect", lambda *_: {})
    return make_site(tmp_path, monkeypatch)


def known(site: Site, run_dir: str = "run") -> dict[int, str]:
    """Id -> job of the record, () without one."""
    found = record.read(site.folder / run_dir)
    return {} if found is None else {i: name for name, job in found.jobs.items() for i in job.ids}


def once(site: Site) -> None:
    """Each job is in the queue once, under a name of its own, and the record knows it."""
    names = {id: name.split(".")[1] for id, name in site.queue().items()}
    assert sorted(names.values()) == ["one", "two"]
    assert names.items() <= known(site).items()
    assert {s.name: s.state for s in states(record.find(site.folder / "run"))} == dict.fromkeys(
        ("one", "two"), "waiting"
    )


TAKEN = {
    "banner": 'take; echo "*** Welcome ***"; echo "$id"; echo "Cost: 12 of 300 hours"',
    "sentence": 'take; echo "Submitted batch job $id on cluster north"',
    "cluster": 'take; echo "$id;north"',
    "on standard error": 'take; echo "Submitted batch job $id" >&2',
    "colours": r'take; printf "\e[32mSubmitted batch job \e[1m$id\e[0m\r\n"',
    "plug-in speaks first": 'take; echo "sbatch: lua: 2 nodes requested" >&2; echo "Submitted batch job $id"',
    "bytes": r'take; printf "\xff\xfe caf\xe9\n%s\n" $id',
    "a question": 'read -p "sure? " x || take; echo "$id"',
    "no number": 'take; echo "your job is on its way"',
    "nothing": "take",
    "two numbers": 'take; echo 17; echo "$id"',
    "json": 'take; echo "{\\"job_id\\": $id}"',
    "failed after all was done": 'take; echo "Submitted batch job $id"; exit 1',
    "failed without a word": "take; exit 1",
    "time-out": 'take; echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv" >&2; exit 1',
    "time-out, taken later": 'sleep 0.3 && take >/dev/null & echo "Socket timed out" >&2; exit 1',
    "hangs": "take; sleep 30",
    "refusing words beside success": 'take; echo "sbatch: error: Batch job submission failed: retrying" >&2; echo $id',
}  # fmt: skip


@pytest.mark.parametrize("words", TAKEN)
def test_a_job_that_was_taken_is_recorded_whatever_the_answer(
    site: Site, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    if words == "hangs":
        monkeypatch.setattr(scheduler, "TIMEOUT", 1.5)
    site.answer("sbatch.2", TAKEN[words])
    assert {name: len(ids) for name, ids in submit(site.chain()).items()} == {"one": 1, "two": 1}
    once(site)
    with pytest.raises(UserError, match="is queued; cancel it"):
        submit(site.chain())
    assert cancel(record.find(site.folder / "run")) == sorted(known(site)) and not site.queue()


REFUSED = {
    "plug-in": (r'printf "sbatch: error: 2 ERRORS:\nsbatch: error: no account\nsbatch: error: too long\n" >&2; exit 1',
                ["2 ERRORS:", "no account", "too long"]),
    "on standard output": ('echo "ask the help desk"; echo "sbatch: fatal: no" >&2; exit 1', ["ask the help desk", "no"]),
    "without a failure": ('echo "sbatch: error: Batch job submission failed: Invalid account" >&2', ["Invalid account"]),
    "without a word": ("exit 3", ["no reason given (status 3)"]),
    "colours and bytes": (r'printf "\e[31msbatch: error: caf\xe9\e[0m\n" >&2; exit 1', ["caf"]),
    "lost, and not taken": ("echo 'Unable to contact slurm controller' >&2; exit 1", ["Unable to contact", "submit"]),
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_a_refusal_is_told_whole_and_nothing_stays_in_the_queue(site: Site, words: str) -> None:
    text, parts = REFUSED[words]
    site.answer("sbatch.2", text)
    with pytest.raises(UserError) as error:
        submit(site.chain())
    said = str(error.value)
    assert [
        part for part in [*parts, "two", "cancelled what was queued before it: 4101"] if part not in said
    ] == []
    assert not site.queue()
    assert words.startswith("lost") or record.read(site.folder / "run") is None
    site.heal()
    submit(site.chain())
    once(site)


def test_a_job_that_appears_after_all_is_neither_doubled_nor_lost(site: Site) -> None:
    """sbatch loses its answer, the queue is silent, and the job is there when the user tries again."""
    site.answer("sbatch.2", "take; echo 'Socket timed out' >&2; touch silent; exit 1")
    site.answer(
        "squeue", "[ -e silent ] || { cat queue 2>/dev/null; exit 0; }; echo 'Unable to contact' >&2; exit 1"
    )
    with pytest.raises(UserError, match="cannot be known now"):
        submit(site.chain())
    assert list(site.queue().values()) == [site.chain().name + ".two." + name_end(site)]
    site.heal()
    assert [s.state for s in states(record.find(site.folder / "run"))][1] == "waiting"
    submit(site.chain())
    once(site)


def name_end(site: Site) -> str:
    return next(iter(site.queue().values())).rpartition(".")[2]


def test_a_link_whose_answer_is_lost_is_told_from_those_of_the_same_name(site: Site) -> None:
    site.answer("sbatch.2", TAKEN["failed without a word"])
    assert submit(site.chain(first="{kind: chain, links: 3}")) == {"one": (4101, 4102, 4103), "two": (4104,)}
    assert known(site) == {4101: "one", 4102: "one", 4103: "one", 4104: "two"}


class Killed(BaseException):
    """What no handler sees, as SIGKILL."""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("write", range(5))
def test_a_submit_that_is_killed_at_any_moment_is_finished_by_the_next(
    site: Site, monkeypatch: pytest.MonkeyPatch, write: int, when: str
) -> None:
    """Before and after each time that the record is written: start, `one` (two links), `two`, end."""
    count, save = iter(range(100)), Record.save

    def dies(self: Record) -> None:
        n = next(count)
        if n == write and when == "before":
            raise Killed
        save(self)
        if n == write:
            raise Killed

    links = "{kind: chain, links: 2}"
    chain = site.chain(first=links)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Record, "save", dies)
        submit(chain)
    if (write, when) == (4, "after"):  # nothing was left to do
        with pytest.raises(UserError, match="is queued"):
            submit(chain)
    else:
        submit(chain)
    names = [name.split(".")[1] for name in site.queue().values()]
    assert sorted(names) == ["one", "one", "two"]
    assert {*site.queue()} <= {*known(site)}
    assert site.calls("sbatch")[-1].endswith("two/job.sbatch") and "afterok:4102" in site.calls("sbatch")[-1]
    assert not json.loads((site.folder / "run/chain.json").read_text()).get("unfinished")


def test_a_submit_that_was_cut_off_does_not_go_on_as_another(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = site.chain()
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Record, "save", dying_at(1))
        submit(chain)
    chain = site.chain(work="elsewhere")
    with pytest.raises(
        UserError, match=r"recipe\.yaml would now be another; `elastic-megatron cancel` it first"
    ):
        submit(chain)
    cancel(record.find(site.folder / "run"))
    submit(chain)
    once(site)


def dying_at(write: int) -> Any:
    count, save = iter(range(100)), Record.save

    def dies(self: Record) -> None:
        if next(count) == write:
            raise Killed
        save(self)

    return dies


def test_what_cannot_be_cancelled_is_named_and_kept_in_mind(site: Site) -> None:
    site.answer("sbatch.2", "echo 'sbatch: error: no' >&2; exit 1")
    site.answer("scancel", "echo 'scancel: error: Kill job error on job id 4101: Access denied' >&2; exit 1")
    with pytest.raises(
        UserError, match="what was queued before it could not be cancelled: .*Access denied.*`scancel 4101`"
    ):
        submit(site.chain())
    assert list(site.queue()) == [4101] and list(known(site)) == [4101]
    with pytest.raises(UserError, match="Access denied"):
        cancel(record.find(site.folder / "run"))
    site.heal()
    submit(site.chain())
    once(site)


def test_jobs_that_are_gone_already_are_no_failure_of_cancel_but_others_are(site: Site) -> None:
    submit(site.chain())
    gone = "echo 'scancel: error: Kill job error on job id 4101: Invalid job id specified' >&2"
    site.answer("scancel", f"{gone}; exit 1")
    assert cancel(record.find(site.folder / "run")) == [4101, 4102]
    site.answer("scancel", f"{gone}; echo 'scancel: error: 4102: Access denied' >&2; exit 1")
    with pytest.raises(UserError, match="Access denied"):
        cancel(record.find(site.folder / "run"))


def test_a_cluster_that_sbatch_names_is_asked_from_then_on(site: Site) -> None:
    """Unless it is the one that answers anyway: a site without a database cannot name its own."""
    for number in (1, 2):
        site.answer(f"sbatch.{number}", 'take; echo "$id;north"')
    submit(site.chain())
    found = record.find(site.folder / "run")
    assert [job.cluster for job in found.jobs.values()] == ["north", "north"]
    assert states(found) and cancel(found)
    assert {"--clusters=north" in call for call in site.calls("squeue")[-2:] + site.calls("scancel")} == {
        True
    }
    site.answer("scontrol", "echo 'ClusterName             = north'")
    (site.folder / "calls").unlink()
    submit(site.chain("other", "otherwise"))
    assert [job.cluster for job in record.find(site.folder / "other").jobs.values()] == ["", ""]


SILENT = {
    "squeue": "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1",
    "squeue, without a failure": "echo 'squeue: error: Unable to contact slurm controller'",
    "scontrol": "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1",
}


@pytest.mark.parametrize("program", SILENT)
def test_where_slurm_does_not_answer_the_state_is_unknown(site: Site, program: str) -> None:
    """Not lost, nor failed; and nothing is submitted beside what may be there."""
    submit(site.chain())
    if program == "scontrol":
        (site.folder / "queue").unlink()
    site.answer(program.partition(",")[0], SILENT[program])
    found = states(record.find(site.folder / "run"))
    assert [(s.state, "Unable to contact" in s.detail) for s in found] == [("unknown", True)] * 2
    assert main(["status", str(site.folder / "run")]) == 0
    if program != "scontrol":
        with pytest.raises(UserError, match="squeue failed"):
            submit(site.chain(), again=True)
        assert cancel(record.find(site.folder / "run")) == [4101, 4102] and not site.queue()


def test_an_empty_queue_with_a_banner_is_an_empty_queue(site: Site) -> None:
    submit(site.chain())
    site.answer("squeue", "echo '*** maintenance on Monday ***'")
    assert [s.state for s in states(record.find(site.folder / "run"))] == ["lost", "lost"]


def test_resume_finds_what_it_did_not_record(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    submit(site.chain())
    (site.folder / "queue").unlink()
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Record, "save", dying_at(1))
        resume(record.find(site.folder / "run"))
    assert list(site.queue()) == [4103]
    assert resume(record.find(site.folder / "run")) == {"two": (4104,)}
    once(site)


def test_a_run_folder_in_use_by_another_chain_is_refused(site: Site) -> None:
    """Of jobs in the queue by their scripts; of whoever runs by its lock."""
    submit(site.chain())
    other = site.chain("other")
    with pytest.raises(
        UserError, match=r"work/one, the run_dir of one, belongs to job 4101 in the queue \(pair\.one"
    ):
        submit(other)
    assert record.read(site.folder / "other") is None and len(site.queue()) == 2
    cancel(record.find(site.folder / "run"))
    submit(other)
    with pytest.raises(UserError, match="work/one, the run_dir of one, belongs to job 4103"):
        resume(record.find(site.folder / "run"))
    cancel(record.find(site.folder / "other"))
    folder = site.folder / "work/two"
    with (
        lock.locked(lock.within(folder), "train"),
        pytest.raises(UserError, match="run_dir of two, is in use by train"),
    ):
        submit(other, again=True)
    submit(other, again=True)


DAMAGES: list[dict[str, Any]] = [
    {"after": [[0]]}, {"after": ["../one"]}, {"ids": ["x"]}, {"ids": None}, {"links": 10**9}, {"links": 0}, {"links": []},
    {"ids": [float("inf")]}, {"links": float("inf")},
]  # fmt: skip


def test_a_damaged_record_is_named_and_does_nothing(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever stands in it: no traceback, no path out of the folder, no job."""
    submit(site.chain())
    file = site.folder / "run/chain.json"
    good, calls = json.loads(file.read_text()), len(site.calls("s"))
    whole = [{**good, "jobs": {"../out": good["jobs"]["one"]}}, {**good, "jobs": []}, []]
    no_json = {**good, "packages": float("inf")}
    for damage in [*({**good, "jobs": {"one": good["jobs"]["one"] | d}} for d in DAMAGES), *whole, no_json]:
        file.write_text(json.dumps(damage))
        for verb in ("status", "resume", "cancel"):
            assert main([verb, str(site.folder / "run")]) == 2, damage
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"error: {file}") and "squeue shows" in line
    assert len(site.calls("s")) == calls


def test_two_submits_at_once_are_one(site: Site) -> None:
    file = lock.beside(site.folder / "run" / record.FILE)
    with (
        lock.locked(file, "elastic-megatron submit"),
        pytest.raises(UserError, match="held by elastic-megatron submit"),
    ):
        submit(site.chain())
    assert not site.calls("sbatch")


def test_sbatch_gets_a_clean_environment(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SBATCH_TIMELIMIT", "SLURM_JOB_ID", "SLURM_MEM_PER_NODE", "SBATCH_ACCOUNT", "HF_TOKEN"):
        monkeypatch.setenv(name, "1")
    submit(site.chain())
    given = (site.folder / "env.sbatch").read_text()
    names = [line.partition("=")[0] for line in given.splitlines()]
    assert sorted({"SBATCH_TIMELIMIT", "SLURM_JOB_ID", "SLURM_MEM_PER_NODE", "SBATCH_ACCOUNT", "HF_TOKEN"} & {*names}) == [
        "HF_TOKEN", "SBATCH_ACCOUNT",
    ]  # fmt: skip


def test_a_dry_run_ends_with_its_verdict(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """What the same call without --dry-run would come to: also where the chain was submitted before."""
    chain = str(site.chain(first="{kind: chain, links: 2}").source)
    assert main(["submit", chain, "--force", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "would submit 3 jobs"
    assert main(["submit", chain, "--force", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "would submit 3 jobs"
    site.answer("test-only", r"printf 'sbatch: error: no account\nsbatch: error: too long\n' >&2; exit 1")
    assert main(["submit", chain, "--force", "--dry-run"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "error: 2 problems; nothing was submitted" and "error: too long" in said
    site.heal()
    assert not site.queue() and main(["submit", chain, "--force"]) == 0 and len(site.queue()) == 3
    capsys.readouterr()
    assert main(["submit", chain, "--force", "--dry-run"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "is queued; cancel it" in said[-2] and said[-1] == "error: 1 problem; nothing was submitted"
