"Simulated DRUG-seq plates: the seven files, the layout, equal bytes, and a truth that fits what was written."
import json

import numpy as np
import pandas as pd
import pytest
from conftest import tree

from perturbnb.core import ChangedFile, InputError, MissingFile, OutputError
from perturbnb.data.demo import SIMULATIONS, check_hashes
from perturbnb.data.simulate_drugseq import ACTIVE, CONTROL, SCORES, read_activation, read_drivers, read_wells, simulate_drugseq, stabilised


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return simulate_drugseq(tmp_path_factory.mktemp("drugseq") / "tiny", 3, "tiny")


def column(root, name): return pd.read_csv(root / f"{name}.csv")["x"]


def test_seven_tables_fit_together(tiny):
    tables = {p.stem: pd.read_csv(p) for p in tiny.glob("*.csv")}
    assert set(tables) == {"expr_mat", "scores_3_z", "labels_cls", "meta_id", "well_id", "cluster_id", "e.activation_score_old"}
    assert {len(t) for t in tables.values()} == {192} and list(tables["scores_3_z"]) == list(SCORES)
    assert all(list(t) == ["x"] for n, t in tables.items() if n not in ("expr_mat", "scores_3_z"))
    np.testing.assert_allclose(tables["e.activation_score_old"]["x"], tables["scores_3_z"].sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(tables["scores_3_z"].std(), 1)
    assert (column(tiny, "labels_cls") == column(tiny, "cluster_id").isin(ACTIVE)).all()
    assert tables["expr_mat"].shape == (192, 60) and np.isfinite(tables["expr_mat"].to_numpy()).all()


def test_copies_of_a_metabolite_share_their_place(tiny):
    at = column(tiny, "well_id").str.split("_", expand=True).set_axis(["replicate", "plate", "place"], axis=1).assign(pert=column(tiny, "meta_id"))
    assert column(tiny, "well_id").is_unique and list(column(tiny, "well_id")) == sorted(column(tiny, "well_id"))
    assert (at[at.pert == CONTROL].groupby("replicate").size() == 5).all()
    pairs = at[at.pert != CONTROL].groupby("pert")
    assert (pairs.place.nunique() == 1).all() and (pairs.replicate.nunique() == 2).all() and pairs.ngroups == 91


def test_text_is_quoted_and_numbers_are_not(tiny):
    assert (tiny / "meta_id.csv").read_text().splitlines()[3] == '"2,6-Diaminoheptanedioic acid"'
    assert (tiny / "labels_cls.csv").read_text().splitlines()[1] in ("0", "1")
    head, first = (tiny / "expr_mat.csv").read_text().splitlines()[:2]
    assert head.startswith('"') and '"' not in first and first.count(",") == 59


def test_counts_give_the_matrix(tiny):
    import anndata as ad
    counts = ad.read_h5ad(tiny / "counts.h5ad")
    expr = pd.read_csv(tiny / "expr_mat.csv")
    assert list(counts.var_names) == list(expr) and list(counts.obs_names) == list(column(tiny, "well_id"))
    assert list(counts.obs.pert) == list(column(tiny, "meta_id")) and counts.X.min() >= 0 and counts.X.dtype.kind == "i"
    np.testing.assert_allclose(stabilised(counts.X), expr, atol=5.1e-5)


def test_truth_fits(tiny):
    drivers, activation, wells = read_drivers(tiny), read_activation(tiny), read_wells(tiny)
    assert list(drivers.index) == list(pd.read_csv(tiny / "expr_mat.csv")) and drivers.driver.sum() == 5 and (drivers.weight < 0).any()
    pert = pd.Series(column(tiny, "meta_id").to_numpy(), column(tiny, "well_id"))
    np.testing.assert_allclose(wells.metabolite_part, pert.map(activation).fillna(0))
    assert (activation == 0).mean() > 0.6 and (activation > 0).sum() > (activation < 0).sum() > 5
    pseudotime = pd.read_csv(tiny / "scores_3_z.csv").pseudotime_z
    assert pd.Series(wells.activation.to_numpy()).corr(pseudotime, method="spearman") > 0.97
    about = json.loads((tiny / "truth/truth.json").read_text())
    assert (about["simulation"], about["n_wells"], about["n_drivers"], about["inert"]) == ("drugseq", 192, 5, int((activation == 0).sum()))


def test_bytes_repeat_and_damage_is_named(tiny, tmp_path):
    again = SIMULATIONS["drugseq"](tmp_path / "again", 3, "tiny")
    assert tree(again) == tree(tiny)
    assert check_hashes(again) == 12
    other = simulate_drugseq(tmp_path / "other", 4, "tiny")
    assert (other / "expr_mat.csv").read_bytes() != (tiny / "expr_mat.csv").read_bytes()
    victim = again / "truth/genes.parquet"
    data = bytearray(victim.read_bytes()); data[len(data) // 2] ^= 1; victim.write_bytes(data)
    with pytest.raises(ChangedFile, match="genes.parquet"): read_drivers(again)


def test_bad_wishes_are_refused(tiny, tmp_path):
    with pytest.raises(InputError, match="size 'huge'"): simulate_drugseq(tmp_path / "x", size="huge")
    with pytest.raises(InputError, match="seed"): simulate_drugseq(tmp_path / "x", seed=1.5)
    with pytest.raises(OutputError, match="is there already"): simulate_drugseq(tiny, 3, "tiny")
    with pytest.raises(MissingFile): read_activation(tmp_path)
    assert not (tmp_path / "x").exists()
