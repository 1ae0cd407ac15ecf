"""The search behind the report tune_f_r: killed and continued, blind to the test rows, refused in one line, and never said to have found more than it did."""
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pandas as pd
import pytest

from perturbnb.core import InputError
from perturbnb.data.demo import demo_data
from perturbnb.interpret import forward_study as study
from perturbnb.interpret import tune_study as tune
from perturbnb.report import tune_words as words
from perturbnb.report.results import Result, problems, read_result

QUICK = dict(epochs=3, rank=8, width=16, heads=2, hidden=16, tokens=16)
SPACE = "lr = log 0.002 to 0.05; drug_dropout = 0 to 0.6; lambda_rank = 0 | 0.1"
TRIALS = 8
CHILD = """
import sys
from perturbnb.interpret import forward_study as study, tune_study as tune
table, controls = study._study(sys.argv[1])
tune.search_settings(table, controls, tune.search_split(table, "pair"), tune.read_space(sys.argv[3]), int(sys.argv[4]), sys.argv[2], changes={changes}, data_hash=sys.argv[5])
"""


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    bulk, truth = study.demo_bulk_with_halves()
    table = study.study_table(bulk, n_genes=80, truth=truth)
    folder = tmp_path_factory.mktemp("study")
    data_hash = study.write_study(table, study.study_controls(bulk, table.var_names), folder)
    return *study._study(str(folder)), folder, data_hash


def searched(screen, folder, n=TRIALS, table=None, space=SPACE):
    whole, controls, _, data_hash = screen
    table = whole if table is None else table
    return tune.search_settings(table, controls, tune.search_split(whole, "pair"), tune.read_space(space), n, folder, changes=QUICK, data_hash=data_hash)


@pytest.fixture(scope="module")
def straight(screen, tmp_path_factory): return searched(screen, tmp_path_factory.mktemp("straight"))


def same(a, b): pd.testing.assert_frame_equal(a.trials.drop(columns="seconds"), b.trials.drop(columns="seconds"))


def begun(folder): return sorted(p.name for p in folder.glob("trials-*/trial-*"))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_killed_and_run_again_is_the_same_search(screen, straight, tmp_path, monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", CHILD.format(changes=QUICK), str(screen[2]), str(tmp_path), SPACE, str(TRIALS), screen[3]])
    until = time.monotonic() + 120
    while len(begun(tmp_path)) < 4 and child.poll() is None and time.monotonic() < until: time.sleep(.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "the search was over before it could be killed"
    left, ran, original = len(list(tmp_path.glob("trials-*/trial-*/model"))), [], tune.try_setting

    def counted(trial, *args):
        ran.append(trial.user_attrs["trial"])
        return original(trial, *args)

    monkeypatch.setattr(tune, "try_setting", counted)
    monkeypatch.setattr(tune, "run_key", lambda run, *args: study.run_key(original, *args))
    resumed = searched(screen, tmp_path)
    same(resumed, straight)
    assert 3 <= left and ran == list(range(ran[0], TRIALS)) and ran[0] in (left - 1, left)  # one model may have been written whose trial was not entered
    ran.clear()
    same(searched(screen, tmp_path), straight)
    assert ran == []
    longer = searched(screen, tmp_path, TRIALS + 1)
    assert ran == [TRIALS] and len(longer.trials) == TRIALS + 1
    pd.testing.assert_frame_equal(longer.trials[:TRIALS].drop(columns="seconds"), straight.trials.drop(columns="seconds"))


def test_the_search_is_blind_to_test_rows_and_to_half_b(screen, straight, tmp_path):
    table = screen[0].copy()
    hidden = straight.split.mask(screen[0], "test")
    table.X[hidden] = np.nan
    for k in table.layers: table.layers[k] = np.full(table.shape, np.nan)
    same(searched(screen, tmp_path, table=table), straight)


def test_the_first_trial_is_the_default(straight):
    own = {**QUICK, "lr": .01, "drug_dropout": .3, "lambda_rank": 0.0}
    assert all(straight.trials[k][0] == own[k] for k in straight.space)
    assert straight.trials[list(straight.space)].drop_duplicates().shape[0] == TRIALS


def test_no_training_of_the_comparison_has_the_seed_of_the_search():
    assert min(tune.training_seed(s) for s in range(100)) > 10 ** 6


@pytest.mark.parametrize("rule", study.RULES)
@pytest.mark.parametrize("seed", [0, 4])
def test_parts_share_nothing(screen, rule, seed):
    table = screen[0]
    s, column = tune.search_split(table, rule, seed), "cell_line" if rule == "unseen_cell_line" else "pert"
    names = {p: table.obs[s.mask(table, p)] for p in ("train", "val", "test")}
    key = lambda o: set(o.pert.astype(str) + "|" + o.cell_line.astype(str)) if rule == "pair" else set(o[column].astype(str))
    assert not any(key(names[a]) & key(names[b]) for a, b in (("train", "val"), ("train", "test"), ("val", "test")))
    assert all(len(o) for o in names.values())


@pytest.mark.parametrize("text, said", [("lr = 0.1 to 0.01", "the lower end first"), ("lr = log 0 to 1", "above 0 in a log range"), ("speed = 1", "setting 'speed'"), ("width = 17", "the heads divide"),
                                        ("drug_dropout = 0 to 3", "below 1"), ("seed = 1 | 2", "luck"), ("rank", "name = low to high"), ("rank = 0 | 8", "rank=0"), ("loss = l1", "mse, huber"), ("lr = nan", "lr = nan"),
                                        ("weight_decay = -1 to 1", "0 or more"), ("rank = 8 to eight", "low to high"), ("lr = 0.1; lr = 0.2", "twice"), ("epochs = 1 to 9", "epoch by epoch"),
                                        ("hidden = log 8 to 64", "whole numbers"), ("width = 16.0 to 64.0", "whole numbers"), ("rank = 1e9", "at most 16,384"), ("tokens = 16 | 99999", "at most 16,384"), ("batch = 32.5", "whole number")])
def test_a_space_without_sense_is_refused_in_one_line(text, said):
    with pytest.raises(InputError, match=said.replace("(", r"\(")) as e: tune.read_space(text)
    assert "\n" not in str(e.value)


def test_a_value_written_twice_counts_once():
    space = tune.read_space("rank = 16 | 8 | 16; drug_dropout = 0.1 | 0.2 | 0.10; signed = true | none | true")
    assert space == {"rank": [16, 8], "drug_dropout": [0.1, 0.2], "signed": [True, None]} and tune.n_settings(space) == 8


@pytest.mark.parametrize("size", ["demo", "base", "large"])
def test_the_default_is_in_the_space_of_every_size(size):
    space = tune.read_space("", size)
    assert tune.default_inside(space, size, {}) is not None
    assert tune.read_space("; ".join(f"{k} = {tune.said_space(s)}" for k, s in space.items()), size) == space


def test_more_trials_than_settings_is_refused(screen, tmp_path):
    with pytest.raises(InputError, match="a space with 2 settings"): searched(screen, tmp_path, 3, space="rank = 8 | 16")


def against(value, low, high, by_baseline=(.1, .05, .15)):
    leads = pd.DataFrame([dict(id="pearson_delta@1", protocol="leak-free", baseline=b, value=v, low=l, high=h, n=50, n_seeds=5, note="") for b, (v, l, h) in (("default", (value, low, high)), ("additive", by_baseline))])
    means = pd.DataFrame([dict(id="pearson_delta@1", protocol="leak-free", model=m, value=v) for m, v in (("searched", .5), ("default", .5 - value), ("additive", .4))])
    return dict(leads=leads, means=means, baseline="additive")


@pytest.mark.parametrize("ends, said", [((.05, .03, .07), "found something better than the default setting."), ((.01, .005, .015), "though by less than the 0.02"), ((.0, -.01, .01), "a gain of 0.02 is excluded"),
                                        ((-.05, -.07, -.03), "its best setting is worse"), ((.02, -.01, .05), "cannot be told: the interval holds both"), ((.05, np.nan, np.nan), "cannot be told: there is no interval"), ((0., 0., 0.), "that was its best trial")])
def test_the_headline_says_what_the_interval_allows(ends, said):
    assert said in words.headline(against(*ends))
    few = against(*ends)
    assert ends[0] == ends[1] or "cannot be told: there is no interval" in words.headline(dict(few, leads=few["leads"].assign(n_seeds=2)))
    line = words.answer(against(*ends), "pair").splitlines()[0]
    assert ("**better**" in line) == (ends[1] > 0) and ("**worse**" in line) == (ends[2] < 0)


def test_optimism_is_that_of_the_best_beyond_the_others():
    scores = pd.DataFrame({"trial": range(4), "validation": [.5, .5, .5, .7], "test": [.4, .4, .4, .4]})
    assert tune.optimism(scores) == pytest.approx(.3 - .15)
    assert tune.optimism(scores.assign(test=scores.validation - .2)) == pytest.approx(0)  # all lose alike: nothing is due to the choice
    ends = pd.DataFrame({"name": "searched", "seed": [0, 1], "validation": .6, "test": .4})
    assert "scored 0.700" in (text := words.optimism_sentence(scores, ends)) and "**0.400**" in text and "+0.150" in text


def test_the_record_is_whole(screen, straight, tmp_path):
    table, controls, folder, data_hash = screen
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        place = tune.finals({"searched": {**QUICK, **straight.settings}, "default": QUICK}, [0, 1, 2], folder, data_hash, rule="pair")
        found = tune.compared(place, table, straight.split, n_boot=200)
    assert (found["finals"].n_blind == straight.split.mask(table, "test").sum()).all()
    scores = tune.trials_on_test(straight, table)
    assert np.allclose(scores.validation, straight.trials.score.dropna()) and np.isfinite(scores.test).all()
    result = Result("tune_f_r", {}, seeds=[0], folder=tmp_path)
    result.data(demo_data(), table.n_obs, table.n_vars)
    words.record(result, straight, scores, found, {"demo_data": True}, "pair")
    result.write()
    read = read_result(tmp_path)
    assert not problems(read) and read["facts"]["n_trials"] == TRIALS and {m["part"] for m in read["metrics"]} == {"val", "test"}
    for r in [*read["metrics"], *read["comparisons"]]: assert r["ci95"] or r.get("note"), r
