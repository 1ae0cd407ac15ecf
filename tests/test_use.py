"Predicting the effect of a compound and ranking drugs for a signature: what comes out, and a long list of bad input."
import json
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from perturbnb.core import PerturbError, file_hash, rng
from perturbnb.data.audit import LeakError
from perturbnb.data.schema import write
from perturbnb.data.split import split
from perturbnb.interpret.domain import Domain, attach, domain_of, left_out_errors, line_distance, measures, outside, training_domain
from perturbnb.interpret.forward_study import usable
from perturbnb.interpret.use import (_close, _errors, _half, _largest, _widths, as_signature, calibrate, hierarchical_width, predict_command, predict_effect, rank_command,
                                     rank_drugs)
from perturbnb.models.base import example_table, load_model
from perturbnb.models.baselines import baseline
from perturbnb.models.f_r import ForwardModel
from perturbnb.models.rank import Library, by_drug, candidate_effects, candidates, inverse_baselines, inverse_evaluation, rank_candidates

SMILES = {"aspirin": "CC(=O)Oc1ccccc1C(=O)O", "ibuprofen": "CC(C)Cc1ccc(cc1)C(C)C(=O)O", "naproxen": "COc1ccc2cc(ccc2c1)C(C)C(=O)O",
          "caffeine": "Cn1cnc2c1c(=O)n(C)c(=O)n2C", "theophylline": "Cn1c(=O)c2[nH]cnc2n(C)c1=O", "ethanol": "CCO", "phenol": "Oc1ccccc1",
          "glucose": "OCC1OC(O)C(O)C(O)C1O", "nicotine": "CN1CCCC1c1cccnc1", "paracetamol": "CC(=O)Nc1ccc(O)cc1", "benzoic": "OC(=O)c1ccccc1",
          "nameless": None}
LINES, GENES, SALT = ["L1", "L2", "L3"], 120, "CC(=O)Oc1ccccc1C(=O)[O-].[Na+]"


@pytest.fixture(scope="module")
def screen():
    "Twelve drugs in three lines at two doses: an effect of the drug, scaled by line and dose, and noise."
    gen, names = rng(0, "tests.use"), list(SMILES)
    own = gen.standard_normal((len(names), GENES))
    rows = [(i, l, d) for i in range(len(names)) for l in range(3) for d in (0.1, 1.0)]
    x = np.array([own[i] * (0.7 + 0.3 * l) * (0.5 + d / 2) for i, l, d in rows]) / 2 + 0.1 * gen.standard_normal((len(rows), GENES))
    table = example_table([names[i] for i, _, _ in rows], x, [LINES[l] for _, l, _ in rows], genes=[f"ENSG{j:011d}" for j in range(GENES)])
    table.obs["dose_um"] = [d for *_, d in rows]
    table.obs["smiles"] = [SMILES[names[i]] for i, *_ in rows]
    table.obs["moa"] = ["acid" if "OC(=O)" in str(s) or "C(=O)O" in str(s) else "unclear" for s in table.obs.smiles]
    table.obs_names = table.obs.pert + "|" + table.obs.cell_line + "|" + table.obs.dose_um.astype(str)
    table.obs = table.obs.drop(columns="replicate", errors="ignore")
    table.var["symbol"] = [f"SYM{j}" for j in range(GENES)]
    return table


@pytest.fixture(scope="module")
def controls():
    gen = rng(1, "tests.use")
    obs = pd.DataFrame({"pert": "DMSO", "pert_type": "control", "cell_line": [*LINES, "L9"], "dose_um": 0.0, "time_h": 24.0, "batch": "b1", "n_cells": 100},
                       index=[f"c{i}" for i in range(4)])
    x = np.abs(gen.standard_normal((4, GENES)) * 0.2 + 3)
    x[3] = np.abs(x[3] + gen.standard_normal(GENES) * 2)
    var = pd.DataFrame({"symbol": [f"SYM{j}" for j in range(GENES)]}, [f"ENSG{j:011d}" for j in range(GENES)])
    return ad.AnnData(x, obs, var, uns={"perturbnb": {"scale": "log1p_cp10k", "reference": "none", "source": "test", "hash": "1" * 64}})


@pytest.fixture(scope="module")
def model(screen, controls):
    make = lambda: baseline("ridge_morgan", dose=True)
    return attach(make().fit(screen), training_domain(screen, controls=controls, errors=left_out_errors(make, screen)))


@pytest.fixture(scope="module")
def place(tmp_path_factory, model, screen, controls):
    "A folder with a saved model, a library, controls, and some files that are none of these."
    folder = tmp_path_factory.mktemp("use")
    model.save(folder / "model")
    baseline("drug_mean").fit(screen).save(folder / "mean")
    baseline("knn_pca", label="moa").fit(screen).save(folder / "profile")
    (folder / "empty").mkdir()
    write(screen, folder / "library.h5ad")
    write(controls, folder / "controls.h5ad")
    pd.Series(np.asarray(screen.X)[0], screen.var.symbol, name="log2fc").rename_axis("symbol").to_csv(folder / "sig.csv")
    (folder / "few.csv").write_text("symbol,log2fc\nSYM1,1\nSYM2,-1\n")
    (folder / "other.csv").write_text("symbol,log2fc\n" + "".join(f"XYZ{i},{i}\n" for i in range(200)))
    (folder / "words.csv").write_text("symbol,log2fc\n" + "".join(f"SYM{i},high\n" for i in range(120)))
    (folder / "flat.csv").write_text("symbol,log2fc\n" + "".join(f"SYM{i},2\n" for i in range(120)))
    (folder / "nothing.csv").write_text("")
    (folder / "up.gmt").write_text("MINE_UP\tx\t" + "\t".join(f"SYM{i}" for i in range(20)) + "\nMINE_DN\tx\t" + "\t".join(f"SYM{i}" for i in range(50, 70)) + "\n")
    return folder


ASK = dict(smiles=SMILES["caffeine"], cell_line="L1", dose_um=1.0)

BAD_PREDICT = {
    "no SMILES that can be read": (dict(smiles="C1CC("), "cannot be read"),
    "words for a SMILES": (dict(smiles="not a smiles"), "cannot be read"),
    "an empty SMILES": (dict(smiles=" "), "smiles=' '"),
    "NaN for a SMILES": (dict(smiles=np.nan), "smiles=nan"),
    "a number for a SMILES": (dict(smiles=5), "smiles=5"),
    "neither drug nor structure": (dict(smiles=None), "neither a structure nor a drug"),
    "an unknown drug": (dict(smiles=None, drug="cafeine"), "did you mean 'caffeine'"),
    "another drug's structure": (dict(drug="aspirin"), "not its own"),
    "an unknown line": (dict(cell_line="L4"), "no controls"),
    "an empty line": (dict(cell_line=""), "cell_line=''"),
    "no line": (dict(cell_line=None), "no cell line"),
    "a number for a line": (dict(cell_line=3), "cell_line=3"),
    "dose 0": (dict(dose_um=0), "dose_um=0"),
    "a negative dose": (dict(dose_um=-1), "dose_um=-1"),
    "NaN for a dose": (dict(dose_um=np.nan), "dose_um=nan"),
    "an infinite dose": (dict(dose_um=np.inf), "dose_um=inf"),
    "a dose in words": (dict(dose_um="1 uM"), "dose_um='1 uM'"),
    "True for a dose": (dict(dose_um=True), "dose_um=True"),
    "None for a dose": (dict(dose_um=None), "dose_um=None"),
    "a list of doses": (dict(dose_um=[1, 2]), "dose_um=[1, 2]"),
    "a dose beyond one mole in a litre": (dict(dose_um=1e9), "dose_um=1000000000.0"),
    "level 2": (dict(level=2), "level=2"),
    "level in words": (dict(level="95%"), "level='95%'"),
    "an unknown interval": (dict(interval="ensembel"), "did you mean 'ensemble'"),
    "an ensemble of one": (dict(interval="ensemble"), "two members or more"),
    "dropout without a network": (dict(interval="dropout"), "sample()"),
    "no calibration": (dict(interval="calibrated"), "run calibrate"),
    "controls that are no file": (dict(controls="nowhere.h5ad"), "no file nowhere.h5ad"),
    "controls of another type": (dict(controls=[1]), "an AnnData of control rows"),
}


@pytest.mark.parametrize("name", BAD_PREDICT)
def test_bad_questions(model, name):
    change, words = BAD_PREDICT[name]
    with pytest.raises(PerturbError) as e: predict_effect(model, **{**ASK, **change})
    assert words in str(e.value) and "\n" not in str(e.value)


def test_bad_models(place, screen):
    for bad, words in (("nowhere", "no nowhere"), (place / "empty", "holds no model"), (place / "profile", "profile model"), (place / "sig.csv", "no "),
                       (None, "NoneType"), ([], "no model"), (baseline("mean"), "is not fitted"), ([place / "model", baseline("mean").fit(screen[:, :100].copy())], "the same genes")):
        with pytest.raises(PerturbError, match=words): predict_effect(bad, **ASK)


BAD_RANK = {
    "no file": (dict(signature="nowhere.csv"), "no file nowhere.csv"),
    "an empty file": (dict(signature="nothing.csv"), ""),
    "two genes": (dict(signature="few.csv"), "at least 100"),
    "other genes": (dict(signature="other.csv"), "0 of 200 names found"),
    "words for values": (dict(signature="words.csv"), "'high'"),
    "one value": (dict(signature="flat.csv"), "values that differ"),
    "an unknown line": (dict(cell_line="L4"), "did you mean"),
    "an unknown similarity": (dict(similarity="cosin"), "did you mean 'cosine'"),
    "correlation of lists": (dict(signature="up.gmt", similarity="pearson"), "no values to correlate"),
    "an unknown by": (dict(by="drugs"), "did you mean 'drug'"),
    "top 0": (dict(top=0), "top=0"),
    "few random signatures": (dict(n_random=5), "n_random=5"),
    "reverse in words": (dict(reverse="yes"), "reverse='yes'"),
    "a file that is no library": (dict(source="sig.csv"), "a model folder or a library"),
    "no source": (dict(source="nowhere"), "no "),
    "a profile model": (dict(source="profile"), "profile model"),
    "a model without a domain": (dict(source="mean", cell_line="L1"), "keeps no list of drugs"),
    "levels as a library": (dict(source="controls.h5ad"), "holds levels"),
    "candidates with a library": (dict(source="library.h5ad", candidates=pd.DataFrame({"pert": ["a"], "dose_um": [1.0]})), "candidates with a library"),
    "candidates without doses": (dict(candidates=pd.DataFrame({"pert": ["a"], "smiles": ["CCO"]})), "no column 'dose_um'"),
    "no candidates file": (dict(candidates="nowhere.csv"), "no file nowhere.csv"),
    "a wrong file name": (dict(out="x.xlsx"), "ends in .csv"),
}


@pytest.mark.parametrize("name", BAD_RANK)
def test_bad_rankings(place, name):
    change, words = BAD_RANK[name]
    given = {"source": "model", "signature": "sig.csv", **change}
    source, signature = (place / given.pop(k) if given[k] != f"nowhere{s}" else given.pop(k) for k, s in (("source", ""), ("signature", ".csv")))
    with pytest.raises(PerturbError) as e: rank_command(source, signature, **given)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_bad_signatures_in_memory(model):
    x = pd.Series(np.arange(GENES, dtype=float), model.genes)
    for bad, words in ((x.replace(3.0, np.inf), "inf"), ((["SYM1"], ["SYM2"]), "1 recognised up genes"), (([], []), "two empty lists"), (5, "type int"),
                       ("SYM1", "no file"), (("SYM1", "SYM2"), "type tuple"), (x[:50], "at least 100"), (x * 0, "every value is 0")):
        with pytest.raises(PerturbError, match=words): as_signature(bad, model.var)


def test_effect_and_its_files(place, model, controls, tmp_path):
    e = predict_effect(place / "model", **ASK)
    want = model.predict(pd.DataFrame({"pert": ["x"], "cell_line": ["L1"], "dose_um": [1.0], "smiles": [SMILES["caffeine"]]}))[0]
    np.testing.assert_allclose(e.table.delta, want)
    assert e.question.drug == "caffeine" and e.table.control.notna().all() and e.table.low.isna().all() and e.interval.startswith("none")
    assert e.warnings == ()
    out = e.save(tmp_path / "e.csv")
    account = json.loads((tmp_path / "e.csv.json").read_text())
    assert account["csv_sha256"] == file_hash(out) and account["question"]["drug"] == "caffeine" and account["unit"] == e.unit
    np.testing.assert_allclose(pd.read_csv(out).delta, want, rtol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.csv", "e.csv.json"]
    printed = predict_command(place / "model", **ASK, out=tmp_path / "e.csv", top=5)
    assert printed.startswith("caffeine at 1 µM in L1") and "5 of 120 genes" in printed


def test_a_failed_write_leaves_nothing(model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PerturbError): predict_effect(model, **ASK).save(tmp_path / "file" / "e.csv")
    (tmp_path / "x.csv.json").write_text("{}")
    with pytest.raises(PerturbError, match="not ours"): predict_effect(model, **ASK).save(tmp_path / "x.csv")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "x.csv.json"]


def test_what_is_said(place, model, controls):
    salt = predict_effect(model, smiles=SALT, cell_line="L1", dose_um=1)
    plain = predict_effect(model, smiles=SMILES["aspirin"], cell_line="L1", dose_um=1)
    pd.testing.assert_frame_equal(salt.table, plain.table)
    assert any("without salt" in n for n in salt.question.notes)
    far = predict_effect(model, smiles=SMILES["caffeine"], cell_line="L9", dose_um=50, controls=place / "controls.h5ad")
    assert len(far.warnings) == 3 and "50 times above" in " ".join(far.warnings)
    assert "does not read control states" in " ".join(far.question.notes) and np.isfinite(far.table.control).all()
    assert "carries no training domain" in predict_effect(place / "mean", **ASK).warnings[-1]


def test_members_and_calibration(screen, model):
    members = [baseline("ridge_morgan", dose=True, alpha=a).fit(screen) for a in (0.1, 1, 10)]
    e = predict_effect(members, **ASK)
    y = np.array([predict_effect(m, **ASK).table.delta for m in members])
    np.testing.assert_allclose((e.table.high - e.table.low) / 2, 4.302653 * y.std(0, ddof=1) / np.sqrt(3), rtol=1e-5)
    held = split("pair", screen, test=0.6, val=0)
    part = lambda p: screen[held.mask(screen, p)].copy()
    m = calibrate(baseline("ridge_morgan", dose=True).fit(part("train")), part("test"))
    assert set(m.names["residuals"]["half"]) == {"0.8", "0.9", "0.95"}
    inside = predict_effect(m, **ASK)
    np.testing.assert_allclose(inside.table.high - inside.table.delta, _half(m.names["residuals"], inside.table.delta.to_numpy(), 0.95), rtol=1e-4)
    assert hierarchical_width(np.ones((5, 2)), range(5), 0.95) is None
    np.testing.assert_array_equal(hierarchical_width(np.arange(1, 20.0)[:, None], range(19), 0.95), [19])


def test_a_signature_finds_its_drug(place, screen, model):
    sig = pd.Series(np.asarray(screen.X)[-1], screen.var.symbol)  # nameless, measured
    lib = rank_drugs(screen, sig)
    assert lib.table.pert[0] == "nameless" and lib.table.score[0] == pytest.approx(1) and lib.table.p_any[0] == 1 / 201
    assert "120 of 120 measured genes" in lib.overlap
    ids = rank_drugs(place / "library.h5ad", pd.Series(sig.to_numpy(), screen.var_names))
    pd.testing.assert_frame_equal(ids.table, lib.table)
    undone = rank_drugs(screen, -sig, reverse=True)
    np.testing.assert_allclose(undone.table.score, lib.table.score)
    by_condition = rank_drugs(screen, sig, by="condition", cell_line="L3")
    assert len(by_condition.table) == 24 and by_condition.table.n.max() == 1
    lists = rank_drugs(screen, (sig.nlargest(15).index, sig.nsmallest(15).index))
    assert lists.table.pert[0] == "nameless" and lists.settings["similarity"] == "wtcs"
    own = rank_drugs(model, pd.Series(np.asarray(screen.X)[0], screen.var.symbol), cell_line="L1")
    assert own.table.pert[0] == "aspirin" and "moa" in own.table
    twice = [rank_drugs(model, sig, seed=3).table for _ in range(2)]
    pd.testing.assert_frame_equal(*twice)


def test_noise_is_no_hit(model, screen):
    noise = pd.Series(rng(5, "tests.use.noise").standard_normal(GENES), screen.var.symbol)
    found = rank_drugs(screen, noise)
    assert found.table.p_any[0] > 0.05 and any("a random signature reaches too" in w for w in found.warnings)


def test_rank_command_writes(place, tmp_path):
    text = rank_command(place / "model", place / "sig.csv", cell_line="L1", out=tmp_path / "r.csv", top=3)
    assert "a random signature of these genes reaches" in text and text.count("\n") < 30
    table = pd.read_csv(tmp_path / "r.csv")
    assert len(table) == 12 and json.loads((tmp_path / "r.csv.json").read_text())["null"]["n_random"] == 200
    more = rank_command(place / "model", place / "sig.csv", cell_line="L1", candidates=pd.DataFrame({"pert": ["new"], "smiles": ["CCN"], "dose_um": [1.0]}))
    assert "new" in more
    assert rank_command(place / "library.h5ad", place / "up.gmt").startswith("Drugs that resemble")


def test_domain(model, screen, controls, tmp_path):
    d = domain_of(model)
    assert isinstance(d, Domain) and outside(d, drug="aspirin", cell_line="L1", dose_um=1.0) == []
    table = measures(d, smiles="c1ccc2ccccc2c1", cell_line="L9", dose_um=0.01)
    assert list(table.part) == ["drug", "line", "dose"] and table.text.str.len().min() > 20
    assert table.set_index("part").outside[["line", "dose"]].all()
    again = domain_of(load_model(model.save(tmp_path / "m")))
    assert measures(again, smiles="c1ccc2ccccc2c1", dose_um=0.01).text.tolist() == measures(d, smiles="c1ccc2ccccc2c1", dose_um=0.01).text.tolist()
    assert line_distance(d.controls, d.controls.loc["L2"]) == (pytest.approx(0, abs=1e-6), "L2")
    assert "not known" in outside(d, drug="nameless")[0]


def test_inverse_has_no_leak(screen):
    held = split("pair", screen, test=0.3, val=0)
    train = screen[held.mask(screen, "train")].copy()
    found = inverse_evaluation({"ridge": baseline("ridge_morgan", dose=True).fit(train), "library": Library(train)}, screen, held, baselines=["library"], lines=["all"])
    best = found.summary[(found.summary.id == "ap_at_10@1") & (found.summary.relevance == "drug")].set_index("method")
    assert best.value["library"] > 0.9 > best.chance["library"] and found.facts["n_candidates"] == 24
    assert found.audit and (found.differences.baseline == "library").all()
    with pytest.raises(LeakError, match="not in train"): inverse_evaluation({"all": Library(screen)}, screen, held)
    noisy = screen.copy()
    noisy.X[held.mask(noisy, "test")] = 0.5
    for name, source in inverse_baselines(noisy[held.mask(noisy, "train")].copy()).items():
        np.testing.assert_array_equal(candidate_effects(source, candidates(noisy.obs)), candidate_effects(inverse_baselines(train)[name], candidates(screen.obs)))


def test_ranked_table_agrees_with_the_evaluation(screen):
    held = split("pair", screen, test=0.3, val=0)
    train, test = (screen[held.mask(screen, p)].copy() for p in ("train", "test"))
    ridge = baseline("ridge_morgan", dose=True).fit(train)
    table = rank_candidates(ridge, test, candidates(screen.obs))
    first = by_drug(table).groupby("query").first().pert
    hit = (first[test.obs_names].to_numpy() == test.obs.pert.to_numpy())
    values = inverse_evaluation({"ridge": ridge}, screen, held, lines=["same"], relevances=["drug"]).values.set_index("query")["hit_at_1@1"]
    np.testing.assert_allclose(hit, values[test.obs_names], atol=1e-9)


# ---- a trained network, from the saved folder: what `perturbnb predict` and `perturbnb rank` do ----

@pytest.fixture(scope="module")
def network(tmp_path_factory):
    "Two seeds of a tiny forward model, made usable as the study does and saved; a signature; the controls of all lines."
    r, names = rng(0, "tests.use.network"), [d for d in SMILES if SMILES[d]]
    lines, genes = ["L1", "L2", "L3", "L4", "L5"], [f"ENSG{j:011d}" for j in range(GENES)]
    own, gain, level = r.standard_normal((len(names), GENES)), r.uniform(0.6, 1.4, 6), r.uniform(0, 3, (6, GENES))
    rows = [(i, l, d) for i in range(len(names)) for l in range(5) for d in (0.5, 5.0)]
    x = np.array([own[i] * gain[l] * d / (d + 1) for i, l, d in rows]) + 0.1 * r.standard_normal((len(rows), GENES))
    table = example_table([names[i] for i, *_ in rows], x, [lines[l] for _, l, _ in rows], smiles=[SMILES[names[i]] for i, *_ in rows], genes=genes)
    table.obs["dose_um"], table.obs["batch"], table.obs["n_cells"] = [d for *_, d in rows], [f"p{d}" for *_, d in rows], 100
    table.obs_names = [f"{names[i]}|{lines[l]}|{d}" for i, l, d in rows]
    table.var["symbol"] = [f"SYM{j}" for j in range(GENES)]
    table.layers["other"] = table.X + 0.02 * r.standard_normal(table.shape)
    at = [(l, d) for l in range(6) for d in (0.5, 5.0)]
    obs = pd.DataFrame({"pert": "DMSO", "pert_type": "control", "cell_line": [[*lines, "NEW"][l] for l, _ in at], "dose_um": 0.0, "time_h": 24.0, "batch": [f"p{d}" for _, d in at],
                        "n_cells": 50}, [f"c{l}{d}" for l, d in at])
    both = ad.AnnData(np.maximum(level[[l for l, _ in at]] + 0.1 * r.standard_normal((len(at), GENES)), 0), obs, table.var.copy(),
                      uns={"perturbnb": {"scale": "log1p_cp10k", "reference": "none", "source": "test", "hash": "2" * 64}})
    ours = both[both.obs.cell_line != "NEW"].copy()
    held, folder = split("pair", table, 0, test=0.1, val=0.4), tmp_path_factory.mktemp("network")
    for seed in (0, 1):
        m = ForwardModel(ours, size="demo", rank=6, width=16, heads=2, tokens=6, hidden=8, batch=32, epochs=12, seed=seed).fit(table[held.mask(table, "train")], table[held.mask(table, "val")])
        usable(m, table, ours, held)
        m.save(folder / "models" / f"seed{seed}", split=held)
    pd.Series(own[0], table.var.symbol, name="log2fc").rename_axis("symbol").to_csv(folder / "sig.csv")
    pd.Series(-own[0], table.var.symbol, name="log2fc").rename_axis("symbol").to_csv(folder / "turned.csv")
    write(both, folder / "bulk.h5ad")
    write(both[both.obs.cell_line == "NEW"].copy(), folder / "new.h5ad")
    return folder, names[0]


def test_a_saved_network_answers_predict(network, tmp_path):
    folder, drug = network
    asked = dict(drug=drug, cell_line="L2", dose_um=5.0)
    text = predict_command(folder / "models" / "seed0", **asked, out=tmp_path / "e.csv")
    assert text.startswith(f"{drug} at 5 µM in L2") and "95% interval" in text and "SYM" in text and "no plate" not in text
    table = pd.read_csv(tmp_path / "e.csv")
    m = load_model(folder / "models" / "seed0")
    row = pd.DataFrame({"pert": [drug], "cell_line": "L2", "dose_um": 5.0, "smiles": SMILES[drug], "batch": None}).astype({"batch": object})
    np.testing.assert_allclose(table.delta, m.predict(row)[0], rtol=1e-4, atol=1e-6)
    assert (table.high > table.delta).all() and table.control.notna().all()
    one = predict_effect(folder / "models" / "seed0", **asked)
    assert any("was in training" in t for t in one.domain.text) and not one.domain.outside.any() and not one.warnings
    two = predict_effect(folder / "models", **asked)  # the folder of both: an ensemble
    alone = [predict_effect(folder / "models" / f"seed{s}", **asked).table.delta for s in (0, 1)]
    np.testing.assert_allclose(two.table.delta, np.mean(alone, axis=0), atol=1e-6)
    assert len(two.settings["models"]) == 2 and "2 member(s)" in predict_command([folder / "models" / "seed0", folder / "models" / "seed1"], **asked)


def test_a_saved_network_answers_rank(network, tmp_path):
    folder, drug = network
    for source in (folder / "models" / "seed0", folder / "models"):
        ranked = rank_drugs(source, folder / "sig.csv", n_random=50)
        assert ranked.table.pert[0] == drug and "120 of 120" in ranked.overlap and ranked.table.best_line.isin(["L1", "L2", "L3", "L4", "L5"]).all()
    here = rank_drugs(folder / "models" / "seed0", folder / "sig.csv", cell_line="L3", n_random=50)
    assert here.table.pert[0] == drug and (here.table.best_line == "L3").all()
    undone = rank_drugs(folder / "models", folder / "turned.csv", reverse=True, n_random=50)
    np.testing.assert_allclose(undone.table.score, rank_drugs(folder / "models", folder / "sig.csv", n_random=50).table.score)
    text = rank_command(folder / "models", folder / "turned.csv", reverse=True, cell_line="L3", n_random=50, progress=False, out=tmp_path / "r.csv")
    assert text.startswith("Drugs that reverse the signature") and "2 member(s)" in text and pd.read_csv(tmp_path / "r.csv").pert[0] == drug


def test_controls_of_known_and_of_new_lines(network):
    folder, drug = network
    asked = dict(drug=drug, dose_um=5.0)
    model, bulk = folder / "models" / "seed0", folder / "bulk.h5ad"  # the bulk file holds the model's own lines as well
    new = predict_effect(model, **asked, cell_line="NEW", controls=bulk)
    only = predict_effect(model, **asked, cell_line="NEW", controls=folder / "new.h5ad")
    pd.testing.assert_frame_equal(new.table, only.table)
    assert new.table.control.notna().all() and any(t.startswith("line: NEW was not in training") for t in new.domain.text)
    known, plain = predict_effect(model, **asked, cell_line="L2", controls=bulk), predict_effect(model, **asked, cell_line="L2")
    pd.testing.assert_frame_equal(known.table, plain.table)
    assert any("control states of L2: they are used" in n for n in known.question.notes) and not any("control states" in n for n in plain.question.notes)
    with pytest.raises(PerturbError, match="no controls"): predict_effect(model, **asked, cell_line="NEW")
    with pytest.raises(PerturbError, match="no control of the line 'NEVER'"): predict_effect(model, **asked, cell_line="NEVER", controls=bulk)
    there = rank_drugs(folder / "models", folder / "sig.csv", cell_line="NEW", controls=bulk, n_random=50)
    assert there.table.pert[0] == drug and (there.table.best_line == "NEW").all() and not any("is not given" in w for w in there.warnings)
    assert any("they are used" in w for w in rank_drugs(folder / "models", folder / "sig.csv", cell_line="L2", controls=bulk, n_random=50).warnings)


def test_a_line_that_was_held_out_is_known_by_its_controls(network, tmp_path):
    folder, drug = network
    m = load_model(folder / "models" / "seed0")
    d = domain_of(m)
    attach(m, replace(d, lines=tuple(l for l in d.lines if l != "L5"), controls=d.controls.drop("L5")))
    e = predict_effect(m, drug=drug, cell_line="L5", dose_um=5.0)
    assert e.table.control.notna().all() and any("L5 was not in training; its control state is" in t for t in e.domain.text)


def growing(n, seed):
    "Screen whose effects no drug mean can tell, the more the larger: errors grow with the prediction."
    r, names = rng(seed, "tests.use.growing"), [f"d{i}" for i in range(n)]
    mean = rng(7, "tests.use.growing").standard_normal((n, 200)) * rng(8, "tests.use.growing").exponential(0.2, 200)
    x = np.concatenate([mean * (1 + 0.5 * r.standard_normal(mean.shape)) + 0.02 * r.standard_normal(mean.shape) for _ in LINES])
    table = example_table(names * 3, x, np.repeat(LINES, n), genes=[f"ENSG{j:011d}" for j in range(200)])
    table.obs_names = table.obs.pert + "|" + table.obs.cell_line + f"|{seed}"
    return table


def test_widths_hold_among_the_largest_changes():
    train, val, new = (growing(150, s) for s in (1, 2, 3))
    m = calibrate(baseline("drug_mean").fit(train), val)
    r, y = m.names["residuals"], m.predict(new.obs)
    inside = np.abs(new.X - y) <= _half(r, y, 0.95)
    top = _largest(np.abs(y))
    one = np.abs(new.X - y) <= _widths(*_errors(m, val), np.arange(val.n_obs), 0.95)[0]
    assert r["growth"] > 0 and 0.94 < inside.mean() < 0.97 and inside[top].mean() > one[top].mean() + 0.05 and inside[top].mean() > 0.91
    np.testing.assert_allclose(r["held"]["0.95"], [inside.mean(), inside[top].mean()], atol=0.02)  # what was said beforehand
    assert json.loads(json.dumps(r)) == r
    for k in ("slope", "held", "growth"): r.pop(k)  # as an earlier release saved it
    old = predict_effect(m, drug="d1", cell_line="L1", dose_um=1.0)
    np.testing.assert_allclose(old.table.high - old.table.delta, r["half"]["0.95"], rtol=1e-4)
    assert "at least 95% of the errors" in old.interval and "largest" not in old.interval


def test_the_unit_follows_the_split(tmp_path):
    train, val = growing(60, 1), growing(60, 2)
    m = baseline("drug_mean").fit(train)
    m.split = {"name": "unseen_drug", "seed": 0, "hash": "x"}
    assert calibrate(m, val).names["residuals"]["unit"] == ["pert"] and m.names["residuals"]["n_units"] == 60
    assert "may be too narrow" not in predict_effect(m, drug="d1", cell_line="L1", dose_um=1.0).interval
    said = predict_effect(calibrate(m, val, ("pert", "cell_line")), drug="d1", cell_line="L1", dose_um=1.0).interval
    assert "the split held out pert" in said and "too narrow" in said
    assert calibrate(m, val, "cell_line").names["residuals"]["half"] == {}  # three lines carry no width
    none = predict_effect(m, drug="d1", cell_line="L1", dose_um=1.0)
    assert none.interval.startswith("none: the validation rows were too few")


def test_small_things_that_are_said(model, network):
    folder, drug = network
    for level in (np.float32(0.95), np.float64(0.95)): assert "95%" in predict_effect(folder / "models" / "seed0", drug=drug, cell_line="L1", dose_um=1.0, level=level).interval
    half = predict_effect(folder / "models" / "seed0", drug=drug, cell_line="L1", dose_um=1.0, level=0.5)
    assert half.interval.startswith("none: the model keeps widths for 80%, 90%, 95%, not for 50%") or half.interval.startswith("middle")
    names = ["Trametinib (DMSO_TF solvate)", *(f"drug {i}" for i in range(60))]
    assert _close("Trametinib", names) == "did you mean 'Trametinib (DMSO_TF solvate)'?"
    assert _close("nosuch", names).count("drug") == 4 and "there are 61" in _close("nosuch", names) and _close("drug", names).count("'") == 10
    with pytest.raises(PerturbError) as e: predict_effect(model, drug="zzz", cell_line="L1", dose_um=1.0)
    assert "there are 12, such as" in str(e.value)
