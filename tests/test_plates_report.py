"""The report on anybody's plates: on simulated plates with known truth, on a real MAC-seq plate, and on real resting and activated T cells."""
import numpy as np
import pandas as pd
import pytest

from perturbnb.core import InputError, real_file, rng
from perturbnb.data.demo import demo_data
from perturbnb.data.plates import PAN_T, read_plate
from perturbnb.data.simulate_drugseq import read_activation
from perturbnb.interpret import plate_study as study
from perturbnb.interpret.activation import control_wells
from perturbnb.report import plates_words as words
from perturbnb.report.results import Result, problems, read_result

MAC, PAN = "drugseq_tcell/macseq_PMMSq033_counts.h5ad", "drugseq_tcell/pan_t_activation_counts.parquet"
QUICK = dict(n_thin=2, n_perm=2000, n_draws=20, n_boot=200)


def real(name):
    path = real_file(name)
    if not path: pytest.skip(f"the real file {name} is not here")
    return path


@pytest.fixture(scope="module")
def demo():
    plates = study.prepare(study.demo_wells())
    return plates, study.study(plates, true=read_activation(demo_data("drugseq")), **QUICK)


@pytest.fixture(scope="module")
def mac():
    plates = study.prepare(study.read_wells(real(MAC)))
    return plates, study.study(plates, n_boot=200, n_draws=50)


@pytest.fixture(scope="module")
def pan():
    path = real(PAN)
    return read_plate(path, path.with_name("pan_t_activation_metadata.csv"), **PAN_T)


def test_the_place_makes_inert_metabolites_look_odd(demo):
    t = demo[1]["truth"].query("id == 'inert_below_p05@1'").set_index("look")
    assert t.low["measured"] > .1 and t.high["place"] < .06 and t.n.eq(254).all()  # the test that takes the place out is on the careful side
    assert demo[1]["agree"]["measured"].low["difference"] < 0  # other treatments at the same place agree as well as copies


def test_the_words_of_the_demo_promise_nothing(demo):
    plates, found = demo
    said = words.headline(plates, found, True)
    assert "Simulated data" in said and "None of 364 conditions stands out" in said and "**Yes" not in said
    assert "the place of a well tells its distance" in words.trust_word(words.trust_table(plates, found))


def test_a_plate_of_noise_names_nothing():
    demo = study.demo_wells()
    wells = demo[demo.obs.batch.isin(["tc1_A1", "tc2_A1"])].copy()
    g = rng(3, "tests.plates")
    wells.layers["counts"] = g.poisson(g.lognormal(3, 1, wells.n_vars), wells.shape).astype(np.int32)
    looks, _ = study.three_looks(study.prepare(wells), n_thin=1, n_perm=999)
    for k, v in looks.items(): assert not v.table.farther.any() and (v.table.p <= .05).mean() < .2, k


def test_a_strong_treatment_is_found_wherever_it_stands():
    demo = study.demo_wells()
    hit = demo.obs.pert.isin(["Melatonin", "Uridine", "Kaempferol"]).to_numpy()
    demo.layers["counts"][np.ix_(hit, np.arange(60))] *= 6
    looks, _ = study.three_looks(study.prepare(demo, n_mad=50), n_thin=1, n_perm=2000)
    assert all(set(v.table.index[:3]) == {"Melatonin", "Uridine", "Kaempferol"} for k, v in looks.items() if k != "measured")


def test_depth_alone_does_not_survive_one_depth():
    demo = study.demo_wells()
    wells = demo[demo.obs.batch.isin(["tc1_A1", "tc2_A1"])].copy()
    g = rng(5, "tests.plates.depth")
    level = g.lognormal(0, 1, wells.n_vars)
    shallow = wells.obs.pert.isin(wells.obs.pert[wells.obs.pert != "DMSO"].unique()[:10]).to_numpy()
    wells.layers["counts"] = g.poisson(level[None] / level.sum() * np.where(shallow, 250, 2500)[:, None]).astype(np.int32)
    looks, about = study.three_looks(study.prepare(wells, unit="log1p_cp10k"), n_thin=3, n_perm=2000)
    names = wells.obs.pert[shallow].unique()
    assert looks["place"].table.effect[names].min() > looks["depth"].table.effect[names].max() > -10 and about["common_depth"] < 300
    assert (looks["depth"].table.p[names] <= .05).mean() < .4 < (looks["place"].table.p[names] <= .05).mean()


def test_the_record_is_whole(demo, tmp_path):
    plates, found = demo
    result = Result("plates", {}, seeds=[0], folder=tmp_path)
    result.data(demo_data("drugseq"), plates.raw.n_obs, plates.raw.n_vars)
    words.record(result, plates, found, True)
    result.write()
    read = read_result(tmp_path)
    assert not problems(read) and read["facts"]["n_conditions"] == 364 and read["facts"]["demo_data"]
    for r in [*read["metrics"], *read["comparisons"]]: assert r["ci95"] or r.get("note"), r
    assert len(read["comparisons"]) == 3 * 364 and read["verdict"][0]["question"] == "Can these plates be trusted?" and "*" not in read["verdict"][0]["answer"]


def test_same_seed_same_numbers(demo):
    plates, found = demo
    again = study.study(plates, true=read_activation(demo_data("drugseq")), **QUICK)
    pd.testing.assert_frame_equal(found["words"], again["words"])
    pd.testing.assert_frame_equal(found["held"]["depth"], again["held"]["depth"])


def test_errors_are_one_clear_line():
    demo = study.demo_wells()
    with pytest.raises(InputError, match="vst or log1p_cp10k"): study.prepare(demo, unit="tpm")
    with pytest.raises(InputError, match="plate tc1_B1 has 1 DMSO wells"): study.prepare(demo[~((demo.obs.batch == "tc1_B1") & (demo.obs.pert == "DMSO") & (demo.obs.row != "E"))].copy())
    with pytest.raises(InputError, match="no column 'donor'"): study.axis_by_donor(demo, "DMSO", "Uridine")


def test_real_macseq_plate_goes_from_h5ad_to_a_ranked_list(mac):
    "The issue says 29 treatments; the file holds 20 compounds at three doses, DMSO and medium: 62 conditions."
    plates, found = mac
    assert plates.raw.shape == (245, 500) and plates.wells.n_obs == 244 and plates.obs.pert.nunique() == 62 and len(found["words"]) == 61
    said = words.design_sentence(plates)
    assert "20 treatments, 19 DMSO wells, medium (46 wells)" in said and "62 conditions with the control, 61 tested" in said
    w = found["words"]
    assert w[["fdr_measured", "fdr_place", "fdr_depth", "lo_measured", "hi_measured"]].notna().all(axis=None)
    assert w.index[0] == "Camptothecin, 10 µM" and w.says.iloc[0] == "stands out" and 5 <= (w.says == "stands out").sum() <= 15
    assert (found["reach"].query("n == 3").p_floor < .001).all() and (found["reach"].query("n == 3").needed == 1).all()


def test_staurosporine_ranks_at_the_top_in_part_and_the_page_says_why(mac):
    plates, found = mac
    p = found["positives"].set_index("condition")
    assert p["rank"]["Staurosporine, 10 µM"] <= 3 and p["rank"].max() > 8  # the highest dose near the top, not all doses
    assert p.n_kept["Staurosporine, 10 µM"] == 2 and p.depth_left_out["Staurosporine, 10 µM"] == [65] and p.fdr["Staurosporine, 10 µM"] > .05
    said = words.positive_sentence(found)
    assert "only in part" in said and "65 counts" in said and "do not rank in the order of their doses" in said
    assert p.n_like_controls["Staurosporine, 10 µM"] == 1 and p.p["Staurosporine, 10 µM"] > 3 * p.p_floor["Staurosporine, 10 µM"]  # copies disagree: the floor is not the reason
    both = found["with_all"].set_index("wells").fdr
    assert both["left out"] > .05 > both["kept"] and "1 of its 2 wells is no farther out" in said and "the counts do not tell" in said


def test_medium_stays_in_and_depth_is_named(mac):
    plates, found = mac
    assert not found["looks"]["depth"].table.farther["medium"] and "does not stand out, as it should" in words.negative_sentence(plates, found)
    assert found["depth"]["measured"].high < -.85  # shallow conditions are the far ones
    assert words.trust_table(plates, found).set_index("check").verdict["Depth"] == words.CARE


def test_real_pan_t_axis_holds_for_each_donor_left_out(pan):
    a = study.axis_by_donor(pan, "ctr", "act", n_perm=2000, n_axes=20)
    d = a["donors"]
    assert len(d) == 3 and (d.auc == 1).all() and (d.accuracy == 1).all() and d.auc_low.between(.6, .7).all() and d.accuracy_low.between(.7, .75).all()
    assert d.margin.between(.9, 1.1).all() and (d.margin_low > .8).all() and (d.n_strata == 5).all()
    assert a["p"] == pytest.approx(1 / 2001) and a["worst_gap"] > .8 and len(a["strata"]) == 5 and (a["strata"].auc == 1).all()
    at_rest = a["wells"][a["wells"].label.isna()]
    assert len(at_rest) == 3 and at_rest.projection.abs().max() < .3  # 0 h, in no fit as either
    assert "separate completely in each of 3 held-out donors" in words.axis_sentence(a, "ctr", "act")


def test_labels_of_a_held_out_donor_do_not_matter(pan):
    out = (pan.obs.donor == "D3").to_numpy()
    label = study._labels(pan, "ctr", "act")
    fold = study.fit_fold(pan[~out].copy(), label[~out])
    v = study.project(study.place_wells(fold, pan[out]), study._fitted(fold, label[~out], .1))
    other = pan.copy()
    flip = {"act": "ctr", "ctr": "act"}
    other.obs.loc[out, "treatment"] = [flip.get(t, t) for t in other.obs.treatment[out]]
    a = study.axis_by_donor(other, "ctr", "act", n_perm=99, n_axes=0)
    np.testing.assert_allclose(a["wells"].query("donor == 'D3'").projection, v)
    assert a["donors"].set_index("donor").auc["D3"] == 0


def test_the_page_of_the_pan_t_samples_says_what_it_cannot(pan):
    plates = study.prepare(pan)
    found = study.study(plates, n_thin=1, n_perm=999, n_draws=20, n_boot=200)
    assert set(found["looks"]) == {"measured", "depth"} and "no row and column" in words.place_sentence(found)
    assert words.named(found, "depth") == "one depth" and (found["words"].says == "stands out").all()
    assert words.map_figures(plates, found) == {} and control_wells(plates.obs).sum() == 18
