"""Missing runs are run by the real command; failures are told; a run in progress is left alone; SLURM's command."""

import fcntl
import json
import sys

import pytest
from table_cases import Tiny

from gcahng.errors import ConfigError, InputError
from gcahng.tables.collect import collect
from gcahng.tables.found_runs import log_file
from gcahng.tables.run_local import missing_runs, run_missing
from gcahng.tables.submit import submit
from gcahng.tables.timing import time_runs
from launch import tables


def test_seeds_come_one_after_the_other_and_shared_runs_once(tiny: Tiny) -> None:
    nothing = collect(tiny.plan(out=tiny.folder / "new"), [])
    runs = missing_runs([nothing, nothing])
    assert [(entry.run.seed, entry.titles) for entry in runs] == [
        (0, ("Baseline on folder",)),
        (0, ("Baseline + GNN on folder",)),
        (1, ("Baseline on folder",)),
        (1, ("Baseline + GNN on folder",)),
    ]
    assert missing_runs([collect(tiny.plan(rows=["Baseline"]), [tiny.runs])]) == []
    # Seed 0 of any row comes first, also where the first row has it already.
    elsewhere, graph = tiny.runs / "elsewhere", tiny.planned("Baseline + GNN", 0).folder
    (elsewhere / "results.json").unlink()
    (graph / "results.json").unlink()
    assert [entry.run.seed for entry in missing_runs([collect(tiny.plan(), [tiny.runs])])] == [0, 1, 1]


def test_a_failure_keeps_no_other_from_running(tiny: Tiny) -> None:
    runs = missing_runs([collect(tiny.plan(out=tiny.folder / "new", seeds=[0]), [])])
    said: list[str] = []
    launcher = "import sys; print('error: no graph'); raise SystemExit(3 * ('graph.enabled=false' in sys.argv))"
    failed = run_missing(runs, [sys.executable, "-c", launcher], said.append)
    assert [entry.titles for entry in failed] == [("Baseline on folder",)]
    log = log_file(runs[0].run.folder)
    assert said[1] == f"  FAILED with status 3; the end of {log}:\n    error: no graph"
    assert said[3].startswith("  done in 0 s: ") and "cannot be read" in said[3], "a launcher that runs nothing"


@pytest.mark.parametrize(("status", "marked"), [(75, False), (1, True)])
def test_an_interrupted_run_is_no_failure(tiny: Tiny, status: int, marked: bool) -> None:
    """Launchers make 1 of its status; its marker says it then, if it is not an older one."""
    (run,) = missing_runs([collect(tiny.plan(out=tiny.folder / "new", seeds=[0], rows=["Baseline"]), [])])
    folder, said = run.run.folder, list[str]()
    folder.mkdir(parents=True)
    mark = f"open({str(folder / 'PREEMPTED')!r}, 'w').close()" if marked else ""
    assert run_missing([run], [sys.executable, "-c", f"{mark}\nraise SystemExit({status})"], said.append) == [run]
    assert said[1] == "  INTERRUPTED by a signal: the next start goes on with it"
    run_missing([run], [sys.executable, "-c", "raise SystemExit(1)"], said.append)
    assert said[3].startswith("  FAILED with status 1")


def test_a_log_that_is_a_folder_is_one_error(tiny: Tiny) -> None:
    (run,) = missing_runs([collect(tiny.plan(out=tiny.folder / "new", seeds=[0], rows=["Baseline"]), [])])
    log_file(run.run.folder).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"goes to .*\.log, which cannot be written \(Is a directory\).* --out"):
        run_missing([run], [sys.executable, "-c", "raise SystemExit(0)"], lambda _: None)


def test_a_run_that_another_process_holds_is_left_to_it(tiny: Tiny) -> None:
    runs = missing_runs([collect(tiny.plan(), [tiny.runs])])
    said: list[str] = []
    with open(log_file(runs[0].run.folder), "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run_missing(runs, [sys.executable, "-c", "raise SystemExit(1)"], said.append) == []
    assert said[1] == "  another process runs it: left to that one"
    with pytest.raises(ConfigError, match="--launcher cannot be started: `no-such-launcher`"):
        run_missing(runs, ["no-such-launcher"], said.append)


def test_inference_is_timed_and_collected(tiny: Tiny) -> None:
    text = tiny.spec.read_text().replace("train_seconds]", "inference_seconds]")
    tiny.spec.write_text(text)
    collected = collect(tiny.plan(rows=["Baseline + GNN"]), [tiny.runs])
    assert collected.cells[0].mean("inference_seconds") is None
    said: list[str] = []
    time_runs([collected], 3, said.append)
    (folder,) = [result.folder for result in collected.cells[0].results]
    row = json.loads((folder / "timing.json").read_text())
    assert (row["batch_size"], row["batches"]) == (8, 3) and row["device"].startswith("CPU")
    assert said == [f"{folder}: {row['seconds_per_batch']:.4f} s per batch of 8 on {row['device']}"]
    again = collect(tiny.plan(rows=["Baseline + GNN"]), [tiny.runs]).cells[0]
    assert again.mean("inference_seconds") == row["seconds_per_batch"] > 0
    with pytest.raises(ConfigError, match="No run of these tables is finished"):
        time_runs([collect(tiny.plan(out=tiny.folder / "new"), [])], 3, said.append)


def test_a_dry_run_prints_the_array_and_writes_nothing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = missing_runs([collect(tiny.plan(out=tiny.folder / "new"), [])])
    out = tiny.folder / "new"
    text = submit(runs, out, ["--time=1:00"], at_once=2, dry_run=True)
    assert text.splitlines()[1].startswith(f"sbatch --array=0-3%2 --time=1:00 slurm/tables.sh {out}/submitted/")
    assert len(text.splitlines()) == 2 + 4 and not out.exists()
    monkeypatch.chdir(tiny.folder)
    with pytest.raises(InputError, match="There is no slurm/tables.sh here: expected the project's folder"):
        submit(runs, out, [], at_once=None, dry_run=False)


def test_the_command_goes_on_with_an_interrupted_run_and_collects(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line in this process; the run is the real training command in one of its own."""
    begun = tiny.planned("Baseline + GNN", 0).folder
    (begun / "results.json").unlink()
    checkpoint = (begun / "last").resolve()

    def command(verb: str, *options: object) -> tuple[int, str]:
        own = [verb, tiny.spec, "--runs", tiny.runs, "--out", tiny.runs / "tables", *options]
        monkeypatch.setattr(sys, "argv", ["tables.py", *map(str, own)])
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        status = tables.main()
        return status, capsys.readouterr().out

    status, printed = command("run", "--seeds", 0)
    assert status == 0, printed
    assert printed.startswith(f"[1/1] Baseline + GNN on folder, seed 0 -> {begun}\n  done in ")
    assert "R@1 " in printed and printed.endswith("1 missing runs, 0 failed or interrupted\n")
    assert (begun / "last").resolve() == checkpoint and "Resumed from" in log_file(begun).read_text()
    assert command("run", "--seeds", 0) == (0, "nothing is missing\n")
    files = ["--json", tiny.folder / "t.json", "--markdown", tiny.folder / "t.md"]
    status, printed = command("collect", "--against", "Baseline", *files)
    assert status == 0 and "1 of 2" in printed and "row minus Baseline" in printed
    cell = json.loads((tiny.folder / "t.json").read_text())["spec"]["cells"][1]
    assert [run["seed"] for run in cell["runs"]] == [0] and cell["difference"]["R@1"]["seeds"] == [0]
    markdown = (tiny.folder / "t.md").read_text()
    assert markdown.startswith("## Tiny\n") and "`python launch/tables.py collect " in markdown.splitlines()[-1]
    status, printed = command("submit", "--sbatch", "--time=5", "--dry-run")
    assert status == 0 and "sbatch --array=0-0 --time=5 slurm/tables.sh" in printed
    with pytest.raises(ConfigError, match="--runs: there is no folder .*/nowhere. Give the folders"):
        command("show", "--runs", tiny.folder / "nowhere")
    with pytest.raises(InputError, match="t.json/t.json cannot be written: "):
        command("collect", "--json", tiny.folder / "t.json" / "t.json")
    for options in (("run", "--limit", 0), ("submit", "--limit", -1), ("submit", "--at-once", "x")):
        with pytest.raises(SystemExit):
            command(*options)
        assert "must be a whole number from 1 on: got " in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--data takes NAME=DIR: got `data/x`"):
        command("show", "--data", "data/x")
