"""f_p and the two towers: what is promised of any model, on a table small enough for seconds."""
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from perturbnb.core import InputError, rng
from perturbnb.models.base import example_table, load_model
from perturbnb.models.f_p import ResponseModel, distinct_batches, similarities, without_own
from perturbnb.models.f_p_evaluate import candidate_drugs, drug_baselines, drug_relevance, response_differences, response_table, response_values
from perturbnb.models.two_tower import TwoTower

torch.set_num_threads(1)
NET = dict(width=8, heads=2, n_tokens=6, epochs=2)
SMILES = ["CCOc1ccccc1", "CCOc1ccccc1C", "CCCCN1CCNCC1", "CCCCN1CCNCC1C", "OC(=O)C1CCCCC1", None]
pytestmark = pytest.mark.filterwarnings("ignore:.*have no morgan features")


@pytest.fixture(scope="module")
def table():
    "Six drugs of three classes in four lines at two doses; each class moves its own genes and its target."
    draw, rows = rng(0, "tests.f_p"), [(d, line, u) for d in range(6) for line in ("L1", "L2", "L3", "L4") for u in (1.0, 10.0)]
    x = np.array([[(1.0 + (u > 1)) * (j // 4 == d // 2) for j in range(12)] for d, _, u in rows])
    t = example_table([f"drug{d + 1}" for d, *_ in rows], x + draw.normal(0, .2, x.shape), [line for _, line, _ in rows],
                      smiles=[SMILES[d] for d, *_ in rows], targets=[f"G{1 + 4 * (d // 2)}" for d, *_ in rows], moa=[f"class {d // 2}" for d, *_ in rows])
    t.obs["dose_um"] = [u for *_, u in rows]
    t.obs_names = [f"{d}|{line}|{u:g}" for d, line, u in zip(t.obs.pert, t.obs.cell_line, t.obs.dose_um)]
    t.layers["se"] = np.full(t.shape, .2)
    return t


@pytest.mark.parametrize("make", [lambda: ResponseModel(**NET), lambda: ResponseModel(as_published=True, **{**NET, "layers": 1}), lambda: ResponseModel(cell="learned", **NET),
                                  lambda: TwoTower(**NET), lambda: TwoTower(cell="learned", **NET)], ids=["f_p", "published", "cell", "two_tower", "two_tower_cell"])
def test_same_seed_same_bytes_and_saved_is_loaded(table, make, tmp_path):
    m = make().fit(table)
    again = load_model(m.save(tmp_path / "m"))
    assert again.predict(table).tobytes() == m.predict(table).tobytes()
    twin = make().fit(table[rng(0, "tests.f_p order").permutation(table.n_obs)].copy())
    assert twin.predict(table).tobytes() == m.predict(table).tobytes()
    assert np.isfinite(m.predict(table)).all() and m.predict(table).shape == (table.n_obs, len(m.classes_))


def test_a_killed_fit_goes_on(table, tmp_path):
    whole = ResponseModel(**NET).fit(table)
    part = ResponseModel(**NET).fit(table, dir=tmp_path / "run")
    assert part.predict(table).tobytes() == whole.predict(table).tobytes() and (tmp_path / "run/checkpoint.pt").exists()


def test_labels_of_the_query_are_not_read(table):
    blind = table.copy()
    blind.obs = blind.obs.assign(pert="x", dose_um=7.0, smiles="C", targets="G2", moa="y")
    for m in (ResponseModel(**NET).fit(table), TwoTower(**NET).fit(table)):
        assert m.predict(blind).tobytes() == m.predict(table).tobytes()
    f_p = ResponseModel(**NET).fit(table)
    assert f_p.rank_genes(blind).to_numpy().tobytes() == f_p.rank_genes(table).to_numpy().tobytes()


def test_unseen_drugs_are_ranked_by_structure(table):
    m = ResponseModel(candidate_drugs(table), **NET).fit(table[table.obs.pert != "drug2"].copy())
    assert "drug2" in m.classes_ and not m.arrays["seen"][m.classes_.index("drug2")]
    asked = pd.DataFrame({"drug": ["drug2", "new", "nothing"], "smiles": [None, "CCOc1ccccc1F", None]})
    out = m.rank_drugs(table[:1].copy(), asked)
    assert out.score.isna().tolist() == [False, False, True] and out.drug.iloc[-1] == "nothing"
    two = TwoTower(candidate_drugs(table), **NET).fit(table[table.obs.pert != "drug2"].copy())
    assert two.rank_conditions(table[:1].copy(), n=99).score.isna().sum() == 2  # the drug without a structure at two doses


def test_batches_hold_distinct_structures():
    group = np.repeat(np.arange(5), [9, 1, 3, 3, 2])
    made = distinct_batches(group, 3, rng(0, "tests.f_p"))
    assert len(made) == 6 and all(len(set(group[b])) == 3 for b in made)
    with pytest.raises(InputError, match="batches of 6 with 5 distinct drugs"): distinct_batches(group, 6, rng(0, "tests.f_p"))


def test_enantiomers_are_one_structure():
    from perturbnb.data.drugs import morgan
    x = morgan(["C[C@H](N)C(=O)O", "C[C@@H](N)C(=O)O", "CCO"], counts=True)
    s = without_own(torch.from_numpy(similarities(x, x, counts=True)))
    assert s[0, 1] == 0 and s[0, 2] > 0


@pytest.mark.parametrize("change,says", [
    (dict(targets=None), "no training drug has a measured target"), (dict(targets="nowhere"), "no training drug has a measured target"),
    (dict(targets="G1"), "1 candidate target gene"), (dict(smiles=None), "none of 6 training drugs has morgan features"),
    (dict(pert="drug1", smiles="CCO"), "1 distinct structure")])
def test_what_cannot_be_learned_is_one_line(table, change, says):
    t = table.copy()
    t.obs = t.obs.assign(**change)
    with warnings.catch_warnings(), pytest.raises(InputError, match=says) as e:
        warnings.simplefilter("ignore")
        ResponseModel(**NET).fit(t)
    assert "\n" not in str(e.value)


def test_bad_queries_are_one_line(table):
    m = ResponseModel(**NET).fit(table)
    holed = table.copy(); holed.X[3, 2] = np.nan
    for bad, says in ((table[:, 1:].copy(), "lacks 1 of 12 genes"), (holed, "X is nan in row")):
        for ask in (m.predict, m.rank_genes, m.rank_drugs):
            with pytest.raises(InputError, match=says): ask(bad)
    with pytest.raises(InputError, match="not fitted"): ResponseModel().rank_genes(table)


def test_without_targets_the_structure_half_works(table):
    t = table.copy(); t.obs = t.obs.assign(targets=None)
    m = ResponseModel(losses=dict(match=0, nce=0), **NET).fit(t)
    assert np.isfinite(m.predict(t)).all()
    with pytest.raises(InputError, match="without candidate target genes"): m.rank_genes(t)


def test_evaluation_is_of_audited_splits(table):
    v = response_values(table, "unseen_cell_line", models={"f_p": NET}, test=0.25)
    assert any(line.startswith("proved") for line in v.attrs["audit"][0])
    t = response_table(v)
    assert {"f_p", "random", "nearest_profile", "nearest_compound", "connectivity", "frequency", "own_change"} <= set(t.model)
    assert {"median_rank", "reciprocal_rank@1", "hit_at_1@1", "ap_at_10@1", "ndcg_at_20@1", "recall_at_5@1"} <= set(t.id)
    assert np.allclose(t[t.model == "random"].query("id != 'median_rank'").value, t[t.model == "random"].query("id != 'median_rank'").chance)
    assert set(response_differences(v).verdict) <= {"better", "worse", "cannot tell"}


def test_baselines_know_nothing_of_a_drug_that_was_never_measured(table):
    train, test = table[table.obs.pert != "drug2"].copy(), table[table.obs.pert == "drug2"].copy()
    c = candidate_drugs(table)
    b, right = drug_baselines(train, test, c, n_top=2), drug_relevance(test.obs, c, c.drug.ne("drug2").to_numpy())
    j = c.drug.tolist().index("drug2")
    assert all((b[k][:, j] == b[k].min(1)).all() for k in ("nearest_profile", "mean_profile", "connectivity"))
    assert (b["nearest_compound"][:, j] > -1).all() and (right["new_drug"] >= 0).sum() == len(test)
