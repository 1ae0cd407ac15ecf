"""The study behind the report f_p, on a simulated screen with few genes and a network that trains for two epochs."""
import warnings

import numpy as np
import pandas as pd
import pytest

from perturbnb.core import InputError
from perturbnb.data.demo import demo_data
from perturbnb.interpret import forward_study as forward
from perturbnb.interpret import response_study as study
from perturbnb.report import f_p_words as words
from perturbnb.report.results import Result, problems, read_result

QUICK = dict(epochs=2, width=16, heads=2, n_tokens=6)
RULES = ("pair", "unseen_drug")


@pytest.fixture(scope="module")
def screen():
    bulk, truth = forward.demo_bulk_with_halves()
    table = forward.study_table(bulk, n_genes=150, truth=truth)
    return bulk, table, forward.study_controls(bulk, table.var_names)


@pytest.fixture(scope="module")
def finished(screen, tmp_path_factory):
    _, table, controls = screen
    folder = tmp_path_factory.mktemp("study")
    tasks = study.response_tasks(RULES, [0, 1, 2], changes=QUICK, two_tower=("pair",))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        place = study.response_runs(tasks, folder, forward.write_study(table, controls, folder), progress=False)
    return place, study.response_measured(place, table, RULES, n_boot=200)


def test_a_query_and_training_share_no_control_cell(screen):
    bulk, table, _ = screen
    a, b = (forward.control_half(bulk, h) for h in "ab")
    control = bulk.obs_names[bulk.obs.pert_type == "control"]
    assert (a.obs.n_cells[control] + b.obs.n_cells[control] == bulk.obs.n_cells[control]).all()
    q, own = (study.queries_of(table, np.arange(table.n_obs), p) for p in study_protocols())
    treated = np.asarray(bulk[table.obs_names, table.var_names].X, float)
    for t, half in ((q, b), (own, a)):
        of = {(o.cell_line, o.batch): np.asarray(half[n, table.var_names].X, float).ravel() for n, o in half.obs[half.obs.pert_type == "control"].iterrows()}
        row = next(i for i, o in enumerate(table.obs.itertuples()) if o.control == table.obs.control.mode()[0])
        o = table.obs.iloc[row]
        np.testing.assert_allclose(t.X[row], treated[row] - of[o.cell_line, o.batch], atol=1e-5)


def study_protocols(): return "leak-free", "as measured"


def test_labels_of_a_query_say_nothing(screen):
    _, table, _ = screen
    q = study.queries_of(table, np.arange(60))

    class Peeks:
        def predict(self, t): return t.obs.dose_um.to_numpy(float)
        def rank_genes(self, t): return pd.DataFrame(t.X)

    with pytest.raises(AssertionError, match="changed with the labels"): study.check_labels(Peeks(), q, Peeks().predict(q), np.asarray(q.X))
    assert (study.blind(q).obs.pert.astype(str).to_numpy() != q.obs.pert.astype(str).to_numpy()).any()
    np.testing.assert_array_equal(study.blind(q).X, q.X)


def test_every_query_was_checked_and_scored(finished):
    _, found = finished
    f, rows = found["facts"], found["rows"]
    assert (f.n_blind == f.n_test).all() and len(f) == 6 and (f.n_val == 0).all()
    assert set(rows.protocol) == {"leak-free", "as measured"} and set(rows.task) == {"targets", "drug", "structure", "moa", "new_drug"}
    drugs = rows[(rows.task == "drug") & (rows.protocol == "leak-free")]
    assert {"f_p", "chance", "perfect", "repeat", "two_tower", *study.RIVALS["drugs"]} == set(drugs.model)
    assert np.isfinite(drugs[list(study.metric_ids()[1])].to_numpy()).all()


def test_a_look_up_knows_nothing_of_a_new_drug(finished):
    m = finished[1]["means"].query("rule == 'unseen_drug' and id == 'reciprocal_rank@1'").set_index(["task", "model"]).value
    for b in ("frequency", "nearest_profile", "mean_profile", "connectivity"):
        assert m["new_drug", b] == pytest.approx(m["new_drug", "chance"]) and m["drug", b] < m["drug", "chance"]


def test_the_best_possible_reader_is_best(finished):
    found = finished[1]
    t = found["means"].query("id == 'hit_at_1@1' and task == 'drug'")
    for _, g in t.groupby("rule"): assert g.set_index("model").value.drop("perfect").max() < g.set_index("model").value["perfect"]
    assert (found["ways"].query("reference == 'perfect'").share < 1).all()


def test_best_baseline_is_no_reference_and_not_chance(finished):
    d = words.deciding(finished[1])
    assert set(d.baseline) <= {m for v in study.RIVALS.values() for m in v} and len(d) == 4
    np.testing.assert_allclose(d.gain, d.f_p - d.best)
    np.testing.assert_allclose(d.over, d.f_p - d.chance)


def test_same_seed_same_bytes(screen, finished, tmp_path):
    _, table, controls = screen
    tasks = {("unseen_drug", 1): study.response_tasks(RULES, [0, 1], changes=QUICK)["unseen_drug", 1]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = study.response_runs(tasks, tmp_path, forward.write_study(table, controls, tmp_path), progress=False)
    files = sorted(p.name for p in again["unseen_drug", 1].iterdir())
    assert {"rows.parquet", "facts.parquet", "audit.parquet", "history.parquet"} <= set(files)
    for name in files: assert (again["unseen_drug", 1] / name).read_bytes() == (finished[0]["unseen_drug", 1] / name).read_bytes(), name


def test_the_record_is_whole(screen, finished, tmp_path):
    bulk, table, _ = screen
    found = finished[1]
    facts = words.facts_of(bulk, table, found, RULES, [0, 1, 2])
    result = Result("f_p", {}, seeds=[0, 1, 2], folder=tmp_path)
    result.data(demo_data(), table.n_obs, table.n_vars)
    words.record(result, found, facts, demo=True)
    result.write()
    read = read_result(tmp_path)
    assert not problems(read) and len(read["split"]) == 6 and read["facts"]["demo_data"]
    for r in [*read["metrics"], *read["comparisons"]]: assert r["ci95"] or r.get("note"), r
    assert "The response encoder" in read["verdict"][0]["answer"] and "*" not in read["verdict"][0]["answer"]
    assert {"f_p", "as published", "chance", "perfect"} <= {r["model"] for r in read["metrics"]}


def test_words_say_no_more_than_the_intervals(finished):
    found = finished[1]
    worse = {**found, "leads": found["leads"].assign(low=-.2, high=-.1)}
    assert "beats the best simple baseline nowhere; it is worse in every split" in words.headline(worse) and "it is below chance in every split" in words.headline(worse)
    none = {**found, "leads": found["leads"].assign(low=np.nan, high=np.nan)}
    assert "there is no interval in every split" in words.headline(none) and "nowhere" not in words.headline(none)
    bare = {k: t[~t.model.isin(["perfect"])] if "model" in t else t[~t.baseline.isin(["perfect"])] if "baseline" in t else t for k, t in found.items()}
    bare["ways"] = found["ways"].query("reference == 'repeat'")
    assert "best possible" not in words.answer_table(bare, "drug") and "measured twice" in words.way_sentence(bare) and "not a ceiling" in words.way_sentence(bare)


def test_the_saved_model_ranks_drugs(screen, finished):
    from perturbnb.models.base import load_model
    _, table, _ = screen
    place, _ = finished
    listed = load_model(place["pair", 0] / "model").rank_drugs(study.queries_of(table, np.arange(3)))
    assert listed.groupby("profile").drug.nunique().eq(table.obs.pert.nunique()).all()
    kept = pd.read_parquet(place["pair", 0] / "ranked.parquet")
    first = kept[(kept.kind == "drug") & (kept["rank"] == 1)]
    assert ((first.margin > 0) == first.right).all()


def test_errors_say_what_to_do(screen):
    table = screen[1]
    with pytest.raises(InputError, match="one of demo, base, large"): study.run_response(table, "pair", 0, size="huge")
    with pytest.raises(InputError, match="did you mean 'pair'"): study.run_response(table, "pairs", 0)


def scored(seed, gap, n_drugs=12, n_lines=8, n_seeds=3):
    "Encoder, chance and a look-up: errors of drugs, lines, rows and seeds; the encoder is above the look-up by the gap."
    r = np.random.default_rng(seed)
    obs = pd.DataFrame([(f"D{i}", f"L{k}") for i in range(n_drugs) for k in range(n_lines)], columns=["pert", "cell_line"])
    obs.index = obs.pert + "|" + obs.cell_line
    own = lambda s: r.normal(0, s, n_drugs)[:, None] + r.normal(0, s, n_lines)[None] + r.normal(0, s, (n_drugs, n_lines))
    base, lift, rows = own(.05) + .6, own(.08) + gap, []
    for s in range(n_seeds):
        fp = base + lift + r.normal(0, .05) + r.normal(0, .05, base.shape)
        for m, x in (("f_p", fp), ("chance", np.full(base.shape, .1)), ("repeat", base)):
            rows.append(pd.DataFrame({"name": obs.index, "model": m, "task": "drug", "protocol": "leak-free", "seed": s, study.DRUG: x.ravel()}))
    return pd.concat(rows, ignore_index=True), obs


@pytest.mark.parametrize("seed", range(8))
def test_a_share_says_no_more_than_the_difference(seed):
    rows, obs = scored(seed, .03)
    w = rows.pivot_table(index=["name", "seed"], columns="model", values=study.DRUG)
    d = forward.over_splits((w["f_p"] - w["repeat"]).rename("x").to_frame(), obs, n_boot=300).iloc[0]
    way = study.way_gone(rows, obs, "drug", study.DRUG, n_boot=300).iloc[0]
    assert way.share == pytest.approx((way.score - .1) / (way.top - .1))
    length = (way.high - way.low) * (way.top - way.chance)
    assert length > .9 * (d.high - d.low)  # in the unit of the metric, no narrower than the difference (up to the error of the reference)
    one = study.way_gone(rows[rows.seed == 0], obs, "drug", study.DRUG, n_boot=300).iloc[0]
    assert "1 seed(s)" in one.note


def test_a_look_up_that_is_beaten_is_no_ceiling(finished):
    found = finished[1]
    low = {**found, "ways": found["ways"].query("reference == 'repeat'").assign(top=.01)}
    assert "no share is given" in words.way_sentence(low) and "% of its way" not in words.way_sentence(low).replace("\xa0", " ")
    assert (words.way_table(low)["way to measured twice"] == "–").all()
    high = {**low, "ways": low["ways"].assign(top=1.1)}
    assert "no share is given" not in words.way_sentence(high) and "of its way from chance" in words.way_sentence(high)
    kinds = words.forest_rows(found, "pair", "drug").set_index("name").kind
    assert kinds["measured twice (reference)"] == "control" and kinds["best possible"] == "ceiling"


def test_sharing_says_what_the_numbers_say(finished):
    found = finished[1]
    with_numbers = lambda **k: words.sharing_sentence({**found, "worth": found["worth"].assign(**k)}, "pair")
    assert "would rise" in with_numbers(value=.1, low=.05, high=.2) and "flatters" in with_numbers(value=.1, low=.05, high=.2)
    assert "would fall" in with_numbers(value=-.1, low=-.2, high=-.05) and "every other drug of its plate" in with_numbers(value=-.1, low=-.2, high=-.05)
    same = with_numbers(value=0.0, low=-.1, high=.1)
    assert "can be told from none" in same and "would rise" not in same and "every other drug" not in same
    assert "no interval for these changes" in with_numbers(low=np.nan, high=np.nan)
    ahead = with_numbers(as_measured=lambda t: np.where(t.model == "f_p", .3, .5))
    assert "would then be behind it by 0.20" in ahead and "by -" not in ahead and "by −" not in ahead
