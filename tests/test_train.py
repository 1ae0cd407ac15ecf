"A training that is killed and called again: the same bytes as one that was not, with a real process and a real SIGKILL."
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TASK = """
import json, os, sys, time
from pathlib import Path
import numpy as np, torch
from perturbnb.core import rng
from perturbnb.models.fit import Task, fit
from perturbnb.train.tune import search, stop_by, trial_dir
from perturbnb.models.losses import Mix, Ramp, info_nce, mse, ranknet
torch.set_num_threads(1)

class Example(Task):
    batch_size = 8
    def __init__(self, noise=.1, pause=0.0):
        draw = rng(0, "test.train")
        x = draw.normal(size=(72, 6)); y = np.tanh(x @ draw.normal(size=(6, 9))) + noise * draw.normal(size=(72, 9))
        self.x, self.y, self.n, self._pause = torch.tensor(x).float(), torch.tensor(y).float(), 56, pause
        self.mix = Mix(mse=1.0, rank=Ramp(.2, 1, 2), align=.1)
        torch.manual_seed(0)
        self.module = torch.nn.ModuleDict({"net": torch.nn.Sequential(torch.nn.Linear(6, 64), torch.nn.BatchNorm1d(64), torch.nn.GELU(), torch.nn.Dropout(.2), torch.nn.Linear(64, 9)),
                                           "drug": torch.nn.Embedding(72, 9)})
        self.module.log_tau = torch.nn.Parameter(torch.tensor(-2.))
    def loss(self, rows, epoch):
        time.sleep(self._pause)
        s, y = self.module["net"](self.x[rows]), self.y[rows]
        align = info_nce(s, self.module["drug"](torch.as_tensor(rows)), self.module.log_tau, rows // 2)
        return self.mix(epoch, mse=mse(s, y), rank=lambda: ranknet(s, y, pairs=50, signed=False), align=align)
    def validate(self):
        return {"val_loss": mse(self.module["net"](self.x[self.n:]), self.y[self.n:]).item()}

def run(dir, said):
    task = Example(said.pop("noise", .1), said.pop("pause", 0.0))
    h = fit(task, dir=dir, epochs=6, lr=.01, seed=3, device="cpu", progress=False, **said)
    torch.save([(k, v) for k, v in task.module.state_dict().items()], dir / "final.pt")
    (dir / "resumed.json").write_text(json.dumps(h.resumed))

def tune(dir, said):
    def objective(trial):
        p = trial.params
        with (dir / "calls.txt").open("a") as f: f.write(f"{trial.user_attrs['trial']}\\n")
        task = Example(.1, said["pause"])
        h = fit(task, epochs=4, lr=p["lr"], clip=p["clip"], device="cpu", progress=False, dir=trial_dir(dir, trial), every_steps=1, on_epoch=stop_by(trial))
        return h.table.val_loss.min()
    dir.mkdir(parents=True, exist_ok=True)
    found = search(objective, {"lr": ("log", 1e-4, 1e-1), "clip": [0.5, 5.0]}, 5, dir / "search.db", progress=False)
    found.table.to_csv(dir / "table.csv", index=False)

from lightning.fabric import Fabric  # the slow imports, once
import optuna
print("ready", flush=True)
for line in sys.stdin:  # each order is a process of its own: {"dir": …, settings} starts one, a number waits for it
    order = json.loads(line)
    if isinstance(order, int): print(os.waitstatus_to_exitcode(os.waitpid(order, 0)[1]), flush=True); continue
    if pid := os.fork(): print(pid, flush=True); continue
    dir = Path(order.pop("dir"))
    try: (tune if order.pop("tune", False) else run)(dir, order)
    except BaseException as e: dir.with_suffix(".err").write_text(f"{type(e).__name__}: {e}"); os._exit(1)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    "ask(order) -> the answer of a process that has imported everything and forks one process for each training."
    script = tmp_path_factory.mktemp("train") / "example.py"
    script.write_text(TASK)
    p = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert p.stdout.readline() == "ready\n"
    def order(what):
        p.stdin.write(json.dumps(what) + "\n"); p.stdin.flush()
        return int(p.stdout.readline())
    yield order
    p.stdin.close(); p.wait()


@pytest.fixture
def train(ask):
    "train(folder, **settings) -> number of the process."
    return lambda folder, **said: ask({"dir": str(folder), **said})


def written(path: Path, seconds=60) -> None:
    "Wait for a file."
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"no {path}"
        time.sleep(.002)


def test_killed_and_resumed_gives_the_same_bytes(ask, train, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert ask(train(straight)) == 0
    moments, waits, cut = random.Random(), [], 0  # truly at random: no seed
    for _ in range(4):
        pid = train(killed, every_steps=moments.choice([1, 2, 5]), pause=.02)
        written(killed / "checkpoint.pt")
        waits.append(moments.uniform(0, .4))
        time.sleep(waits[-1])
        os.kill(pid, signal.SIGKILL)
        cut += ask(pid) == -signal.SIGKILL
    assert cut >= 1, waits
    assert ask(train(killed)) == 0
    for name in ("final.pt", "metrics.csv"): assert (straight / name).read_bytes() == (killed / name).read_bytes(), (name, waits)
    assert json.loads((straight / "resumed.json").read_text()) is None and json.loads((killed / "resumed.json").read_text()), waits
    assert [p.name for p in killed.iterdir() if ".tmp" in p.name] == []  # what a killed run was writing is gone


def test_a_second_run_in_the_same_folder_is_refused(ask, train, tmp_path):
    first = train(tmp_path / "run", pause=.5, every_steps=1)
    written(tmp_path / "run" / "checkpoint.pt")
    assert ask(train(tmp_path / "run")) == 1
    assert "is being written by another run" in (tmp_path / "run.err").read_text()
    os.kill(first, signal.SIGKILL); ask(first)


def test_another_setting_or_other_data_are_refused(ask, train, tmp_path):
    assert ask(train(tmp_path / "run")) == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    for said, word in (({"noise": .2}, "the data or the settings of the task are others"), ({"clip": 0.5}, "clip is 0.5")):
        assert ask(train(tmp_path / "run", **said)) == 1
        assert word in (tmp_path / "run.err").read_text()
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_a_killed_search_goes_on_and_repeats_no_finished_trial(ask, train, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert ask(train(straight, tune=True, pause=0.0)) == 0, (tmp_path / "straight.err").read_text()
    cut = random.Random().randint(1, 3)  # killed while this trial trains
    pid = train(killed, tune=True, pause=.02)
    written(killed / f"trial-{cut:04d}" / "checkpoint.pt")
    os.kill(pid, signal.SIGKILL)
    assert ask(pid) == -signal.SIGKILL
    assert ask(train(killed, tune=True, pause=0.0)) == 0
    assert (killed / "table.csv").read_bytes() == (straight / "table.csv").read_bytes(), cut
    calls = [int(k) for k in (killed / "calls.txt").read_text().split()]
    assert calls == [*range(cut + 1), *range(cut, 5)]  # only the trial that was cut was begun again
