"Whatever goes wrong in a run is a failure that says so, and the earlier report stays whole. Each test is a process of its own."
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import CLI, tree, write_toy


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    (folder / "counts.txt").write_text("a\nb\n")
    subprocess.run([*CLI, "run", str(write_toy(folder)()), "-p", f"counts={folder / 'counts.txt'}", "--out", str(folder / "toy")], check=True)
    return folder / "toy"


@pytest.fixture
def report(finished, tmp_path):
    "A finished report of the toy analysis, and its bytes."
    out = tmp_path / "reports" / "toy"
    shutil.copytree(finished, out)
    return out, tree(out)


def leftovers(out: Path) -> list:
    return sorted(p.name for p in out.parent.iterdir() if p.name.startswith(f".{out.name}.") and p.suffix != ".lock")


def test_report_is_complete_and_checks(cli, report):
    out, files = report
    assert {"report.ipynb", "report.html", "results.json", "params.yaml", "timing.json", "SHA256SUMS"} <= set(files)
    done = cli("check", out)
    assert done.returncode == 0 and "all unchanged" in done.stdout
    assert leftovers(out) == []


def test_report_names_no_place_of_the_machine(report):
    out, files = report
    places = {tempfile.gettempdir() + "/", str(Path.home()) + "/", sys.prefix, str(Path(__file__).resolve().parents[1])}
    for name, content in files.items():
        for place in places: assert place.encode() not in content, (name, place)


def test_flipped_byte_is_named(report, fails):
    out, files = report
    page = bytearray(files["report.html"])
    page[len(page) // 2] ^= 1
    (out / "report.html").write_bytes(page)
    fails("check", out, words=["report.html", "SHA-256", "recorded"])


@pytest.mark.parametrize("work, words", [
    ("1 / 0", ["ZeroDivisionError"]),
    ("import sys; sys.exit(0)", ["ended early"]),
    ("import sys; sys.exit(3)", ["ended early"]),
    ("import os; os._exit(0)", ["kernel died"]),
    ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", ["kernel died"]),
    ("exit()", ["kernel died"]),
    ("from perturbnb.core import InputError\nraise InputError('row 3 has -5', 'a count', 'mend it')", ["row 3 has -5"]),
], ids=["error", "exit0", "exit3", "os-exit", "sigkill", "exit", "ours"])
def test_failing_cell(report, fails, toy, counts, work, words):
    out, files = report
    fails("run", toy("toy", work), "-p", f"counts={counts}", "--out", out, words=words)
    assert tree(out) == files
    assert (out.parent / "toy.failed" / "report.ipynb").is_file()
    assert leftovers(out) == []


def test_killed_at_any_moment(report, cli, toy, counts):
    out, files = report
    slow = toy("toy", "import time; time.sleep(1)")
    command = [*CLI, "run", str(slow), "-p", f"counts={counts}", "--out", str(out)]
    finished = 0
    for delay in (0.3, 0.8, 1.3, 1.8, 2.3, 2.8, 3.3, 4.0):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delay)
        process.kill()
        finished += process.wait() == 0
        now = tree(out)
        assert now["results.json"] == files["results.json"], delay
        assert cli("check", out).returncode == 0
    assert finished < 8  # some were killed in time, else this proves nothing
    assert cli("run", toy(), "-p", f"counts={counts}", "--out", out).returncode == 0
    assert leftovers(out) == []  # and what they left is swept by the next run


def test_terminated_run_clears_up(report, toy, counts):
    out, files = report
    process = subprocess.Popen([*CLI, "run", str(toy("toy", "import time; time.sleep(30)")), "-p", f"counts={counts}", "--out", str(out)], stderr=subprocess.PIPE)
    while not leftovers(out): time.sleep(0.1)
    time.sleep(1.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) != 0
    assert tree(out) == files and leftovers(out) == []


def test_two_runs_into_one_folder(report, toy, counts):
    out, files = report
    slow = toy("toy", "import time; time.sleep(2)")
    start = lambda: subprocess.Popen([*CLI, "run", str(slow), "-p", f"counts={counts}", "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    both = [start(), start()]
    readings = 0
    while any(p.poll() is None for p in both):
        json.loads((out / "results.json").read_text())  # a reader never sees a torn or a missing one
        readings += 1
    assert readings > 100
    codes, errors = [p.returncode for p in both], "".join(p.stderr.read() for p in both)
    assert sorted(codes) == [0, 1] and "being written by another run" in errors


def test_full_disk(report, fails, toy, counts, tmp_path, cli):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("skipped: mounting a small tmpfs is not allowed here")
    try:
        out = small / "toy"
        assert cli("run", toy(), "-p", f"counts={counts}", "--out", out).returncode == 0
        files = tree(out)
        fill = "from perturbnb.core import atomic_file\nimport os\nwith atomic_file(os.environ['PERTURBNB_REPORT_DIR'] + '/tables/big.csv') as f: f.write_bytes(bytes(2_000_000))"
        fails("run", toy("toy", fill), "-p", f"counts={counts}", "--out", out, words=["the disk is full"])
        fails("run", toy("toy", "print('x' * 900_000)"), "-p", f"counts={counts}", "--out", out, words=["the disk is full"])
        assert tree(out) == files and leftovers(out) == []
        assert not list(small.rglob("big.csv"))
    finally:
        subprocess.run(["umount", small], check=True)


def test_unwritable_output(fails, toy, counts, tmp_path):
    (tmp_path / "file").write_text("x")
    fails("run", toy(), "-p", f"counts={counts}", "--out", tmp_path / "file" / "report", words=["file, not a folder"])
    fails("run", toy(), "-p", f"counts={counts}", "--out", tmp_path / "file", words=["is not a folder"])
    fails("run", toy(), "-p", f"counts={counts}", "--out", "/proc/report", words=["cannot write"])


def test_folder_of_yours_is_never_replaced(fails, toy, counts, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("…")
    fails("run", toy(), "-p", f"counts={counts}", "--out", tmp_path / "thesis", words=["is not a report"])
    assert tree(tmp_path / "thesis") == {"chapter.tex": "…".encode()}


@pytest.mark.parametrize("given, words", [
    ("count=x", ["did you mean 'counts'?"]),
    ("seed=1.5", ["parameter seed='1.5'", "int"]),
    ("seed=-1", ["out of range", "[0, inf)"]),
    ("seed=__import__('os').system('touch pwned')", ["parameter seed"]),
    ("seed = 0\nopen('pwned', 'w')\nx=1", ["parameter seed="]),
    ("open('pwned', 'w'); x=1", ["a parameter of toy"]),
    ("counts=nowhere.csv", ["no file or folder 'nowhere.csv'"]),
    ("counts", ["key=value"]),
])
def test_parameter_is_refused_before_a_kernel_starts(fails, toy, tmp_path, given, words):
    fails("run", toy(), "-p", given, "--out", tmp_path / "out", words=words, cwd=tmp_path)
    assert not (tmp_path / "out").exists() and not (tmp_path / "pwned").exists()


def test_parameter_name_in_a_file_is_not_code(fails, toy, tmp_path):
    (tmp_path / "p.yaml").write_text(json.dumps({"seed = 0\nopen('pwned', 'w')\nx": 1}))
    fails("run", toy(), "-f", tmp_path / "p.yaml", "--out", tmp_path / "out", words=["a parameter of toy"], cwd=tmp_path)
    assert not (tmp_path / "out").exists() and not (tmp_path / "pwned").exists()


def test_values_are_data_not_code(cli, toy, counts, tmp_path):
    text = "'; open('pwned', 'w') #\n\"\"\"{braces}\\"
    path = toy("toy", "assert note == " + repr(text), parameters='counts: "Path" = ""\nseed: int = 0\nnote: str = ""')
    done = cli("run", path, "-p", f"counts={counts}", "-p", f"note={text}", "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "pwned").exists()


def test_seeds_fan_out(cli, toy, counts, tmp_path):
    done = cli("run", toy(), "-p", f"counts={counts}", "--seeds", "0:3", "--jobs", "2", "--out", tmp_path / "many")
    assert done.returncode == 0, done.stderr
    assert [json.loads((tmp_path / f"many/seed{s}/results.json").read_text())["seeds"] for s in range(3)] == [[0], [1], [2]]


def test_unknown_kernel_and_gpu(fails, toy, counts, tmp_path):
    fails("run", toy(), "-p", f"counts={counts}", "--kernel", "cppu", "--out", tmp_path / "out", words=["kernel 'cppu'", "did you mean 'cpu'?"])
    fails("run", toy(), "-p", f"counts={counts}", "--kernel", "gpu99", "--out", tmp_path / "out", words=["kernel 'gpu99'"])


def test_help_and_list_are_light():
    code = ("import sys; from typer.testing import CliRunner; from perturbnb.cli import app\n"
            "for a in (['--help'], ['list']): assert CliRunner().invoke(app, a).exit_code == 0\n"
            "print([m for m in ('numpy', 'pandas', 'papermill', 'torch', 'matplotlib', 'anndata', 'scipy', 'pyarrow') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}).stdout.strip() == "[]"


def test_dollars_and_braces_are_plain_characters(cli, toy, counts, tmp_path):
    text = "$HOME ${PATH} $$5 {seed} {{x}}"
    path = toy("toy", parameters='counts: "Path" = ""\nseed: int = 0\nnote: str = ""')
    odd = tmp_path / "a b:{seed} $HOME [x]"
    odd.mkdir()
    shutil.copy(path, odd / "toy.ipynb")
    done = cli("run", odd / "toy.ipynb", "-p", f"counts={counts}", "-p", f"note={text}", "--out", odd / "out.{nope}")
    assert done.returncode == 0, done.stderr
    assert json.loads((odd / "out.{nope}/results.json").read_text())["parameters"]["note"] == text
    assert sorted(p.name for p in odd.iterdir() if not p.name.endswith(".lock")) == ["out.{nope}", "toy.ipynb"]


def test_neighbours_do_not_disturb_each_other(toy, counts, tmp_path):
    slow, quick = toy("slow", "import time; time.sleep(12)"), toy("quick")
    first = subprocess.Popen([*CLI, "run", str(slow), "-p", f"counts={counts}", "--out", str(tmp_path / "c.v2")], stderr=subprocess.PIPE, text=True)
    while not leftovers(tmp_path / "c.v2"): time.sleep(0.1)
    subprocess.run([*CLI, "run", str(quick), "-p", f"counts={counts}", "--out", str(tmp_path / "c")], check=True, capture_output=True)
    assert first.poll() is None, "the slow run must still be running, else this proves nothing"
    assert first.wait() == 0, first.stderr.read()


def test_nothing_of_yours_is_removed(report, fails, toy, counts, tmp_path):
    out, _ = report
    shutil.copytree(out, out / "seed0")
    fails("run", toy(), "-p", f"counts={counts}", "--out", out, words=["seed0", "did not write"])
    fails("run", toy(), "-p", f"counts={counts}", "--out", out, "--seeds", "0:2", words=["is a report"])
    (tmp_path / "own.failed").mkdir(); (tmp_path / "own.failed/thesis.tex").write_text("…")
    fails("run", toy(), "-p", f"counts={counts}", "--out", tmp_path / "own", words=["own.failed", "not left by a failed run"])
    assert (tmp_path / "own.failed/thesis.tex").is_file()


def test_stopped_seeds_stop(toy, counts, tmp_path):
    slow = toy("toy", "import time; time.sleep(300)")
    process = subprocess.Popen([*CLI, "run", str(slow), "-p", f"counts={counts}", "--seeds", "0:4", "--jobs", "2", "--out", str(tmp_path / "many")], stderr=subprocess.PIPE)
    while not list(tmp_path.glob("many/.seed1.*.tmp/.work")): time.sleep(0.1)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=90) != 0
    assert not list(tmp_path.glob("many/seed?")) and not list(tmp_path.glob("many/.seed*.tmp"))


@pytest.mark.parametrize("change", ["SHA256SUMS emptied", "line taken out", "file added", "foreign line", "garbage line"])
def test_check_sees_a_tampered_record(report, fails, change):
    out, _ = report
    sums = out / "SHA256SUMS"
    lines = sums.read_text().splitlines(keepends=True)
    if change == "SHA256SUMS emptied": sums.write_text("")
    if change == "line taken out": sums.write_text("".join(l for l in lines if "report.html" not in l))
    if change == "file added": (out / "extra.txt").write_text("x")
    if change == "foreign line": sums.write_text("".join([*lines, f"{'0' * 64}  ../toy/report.html\n"]))
    if change == "garbage line": sums.write_text("".join([*lines, "garbage\n"]))
    fails("check", out)


@pytest.mark.parametrize("content", ["[]", "null", "{}", "{torn", "[" * 100_000, '{"cells": [1]}'], ids=range(6))
def test_notebook_that_is_none(fails, tmp_path, content):
    (tmp_path / "bad.ipynb").write_text(content)
    fails("run", tmp_path / "bad.ipynb", "--out", tmp_path / "out", words=["bad.ipynb"])


def test_usage_errors_are_one_line(cli):
    for args in (["nosuch"], ["run"], ["run", "imbalance", "--jobs", "x"], ["run", "imbalance", "-p"]):
        done = cli(*args)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("perturbnb: "), done.stderr
