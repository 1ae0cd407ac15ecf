"GCTX and Perturb-seq readers: damaged, cut and hostile files end in one clear line; good ones come back whole."
import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from perturbnb.core import InputError, MissingFile, record_hashes, rng
from perturbnb.data import lincs, perturbseq
from perturbnb.data.schema import check, delta, read, write


@pytest.fixture(scope="module")
def gctx(tmp_path_factory):
    "Forty signatures by thirty genes in shuffled order, as in the reference sheet."
    draw, path = rng(0, "test_readers"), tmp_path_factory.mktemp("gctx") / "level5.gctx"
    obs = pd.DataFrame({"pert_iname": [f"drug {i // 4}" for i in range(40)], "pert_id": [f"BRD-K{i // 4:08d}" for i in range(40)], "pert_type": "trt_cp",
                        "cell_id": np.resize(["A375", "MCF7"], 40), "pert_idose": np.resize(["10 uM", "10 uM", "500 nM", "500 nM"], 40), "pert_itime": "24 h",
                        "pct_self_rank_q25": [-666.0] + [5.0] * 39, "distil_nsample": 3}, index=[f"P_{i}:x" for i in draw.permutation(40)])
    return lincs.write_gctx(ad.AnnData(draw.normal(0, 1, (40, 30)).astype(np.float32), obs, pd.DataFrame({"pr_gene_symbol": [f"S{i}" for i in range(30)]}, index=[str(100 + i) for i in range(30)])), path)


def edited(path, tmp_path, change):
    new = tmp_path / "edited.gctx"
    new.write_bytes(path.read_bytes())
    with h5py.File(new, "r+") as f: change(f)
    return new


def put(f, key, value):
    del f[key]
    f[key] = value


def test_signatures_in_any_order_and_through_the_schema(gctx, tmp_path):
    whole = lincs.read_gctx(gctx)
    assert np.isnan(whole.obs.pct_self_rank_q25.iloc[0]) and whole.shape == (40, 30)
    ids = list(rng(1, "test_readers").permutation(whole.obs_names)[:17])
    part = lincs.read_gctx(gctx, ids, ["129", "100"])
    np.testing.assert_array_equal(part.X, whole[ids, ["129", "100"]].X)
    table = check(lincs.to_signatures(whole))
    assert read(write(table, tmp_path / "t.h5ad")).obs.pert.tolist() == table.obs.pert.tolist()
    assert table.uns["perturbnb"]["scale"] == "zscore" and sorted(table.obs.dose_um.unique()) == [0.5, 10]


def test_blocks_and_far_rows(gctx, monkeypatch):
    whole = lincs.read_gctx(gctx)
    monkeypatch.setattr(lincs, "_ROWS", 3)
    ids = [whole.obs_names[i] for i in (39, 0, 20, 7, 8, 9, 1)]
    np.testing.assert_array_equal(lincs.read_gctx(gctx, ids).X, whole[ids].X)


HOSTILE = {
    "points elsewhere": lambda f: (f.pop("0/META/COL/cell_id"), f["0/META/COL"].__setitem__("cell_id", h5py.ExternalLink("/etc/passwd", "x"))),
    "cell_id points elsewhere": lambda f: (f.pop("0/META/COL/cell_id"), f["0/META/COL"].__setitem__("cell_id", h5py.SoftLink("/0/META/COL/pert_id"))),
    "claims more": lambda f: (f.pop(lincs.MATRIX), f.create_dataset(lincs.MATRIX, shape=(40, 10**10), chunks=(1, 1000), dtype="f4", compression="gzip")),
    "for 40 signatures and 30 genes": lambda f: put(f, lincs.MATRIX, np.zeros((41, 30), "f4")),
    "the other way round": lambda f: put(f, lincs.MATRIX, np.zeros((30, 40), "f4")),
    "stands twice in 0/META/COL/id": lambda f: f["0/META/COL/id"].__setitem__(1, f["0/META/COL/id"][0]),
    "has shape (40, 2)": lambda f: put(f, "0/META/COL/cell_id", np.zeros((40, 2))),
    "has shape no array": lambda f: (f.pop("0/META/COL/cell_id"), f.create_group("0/META/COL/cell_id")),
    "a matrix of |S1": lambda f: put(f, lincs.MATRIX, np.full((40, 30), b"x")),
    "inf (1 such values)": lambda f: f[lincs.MATRIX].__setitem__((3, 4), np.inf),
    "nan (30 such values)": lambda f: f[lincs.MATRIX].__setitem__(5, np.nan),
    "no 0/META/ROW": lambda f: (f["0/META"].pop("ROW"), put(f, lincs.MATRIX, np.zeros((40, 0), "f4"))),
    "version none": lambda f: f.attrs.__delitem__("version"),
}


@pytest.mark.parametrize("words", HOSTILE)
def test_hostile_gctx(gctx, tmp_path, words):
    path = edited(gctx, tmp_path, HOSTILE[words])
    with pytest.raises(InputError) as e: lincs.read_gctx(path)
    assert words in str(e.value) and "edited.gctx" in str(e.value) and "\n" not in str(e.value)


def test_a_hard_link_in_a_circle_is_refused(gctx, tmp_path):
    def circle(f): f["0/META/loop"] = f["0"]
    with pytest.raises(InputError, match="edited.gctx"): lincs.read_gctx(edited(gctx, tmp_path, circle))


def test_every_cut_is_noticed(gctx, tmp_path):
    raw = gctx.read_bytes()
    for part in np.linspace(0, len(raw) - 1, 12).astype(int):
        (tmp_path / "cut.gctx").write_bytes(raw[:part])
        with pytest.raises(InputError): lincs.read_gctx(tmp_path / "cut.gctx")
    with pytest.raises(MissingFile): lincs.read_gctx(tmp_path / "none.gctx")


def test_recorded_hash_is_minded(gctx, tmp_path):
    (tmp_path / "a.gctx").write_bytes(gctx.read_bytes())
    record_hashes(tmp_path)
    with h5py.File(tmp_path / "a.gctx", "r+") as f: f[lincs.MATRIX][0, 0] = 9
    with pytest.raises(Exception, match="SHA-256"): lincs.read_gctx(tmp_path / "a.gctx")


def test_rows_that_cannot_be_used(gctx):
    a = lincs.read_gctx(gctx)
    a.obs["pert_type"] = ["trt_lig", *["trt_cp"] * 39]
    a.obs["pert_idose"] = [None, "7 furlongs", *["1 uM"] * 38]
    with pytest.raises(InputError, match="2 of 40 rows cannot be used"): lincs.to_signatures(a)
    out = lincs.to_signatures(a, missing="drop")
    assert len(out) == 38 and [d.split(": ")[1] for d in out.uns["perturbnb"]["dropped"]] == ["no known pert_type", "no dose in µM"]


def test_restricted_structures_and_several_mechanisms(tmp_path):
    (tmp_path / "c.txt").write_text("pert_id\tcmap_name\ttarget\tmoa\tcanonical_smiles\tinchi_key\nB1\tx\tT2\tm2\trestricted\t-666\nB1\tx\tT1\tm1\trestricted\t-666\nB2\tNA\t\t\tCCO\tK\n")
    t = lincs.read_compoundinfo(tmp_path / "c.txt")
    assert [t.moa["B1"], t.targets["B1"], t.smiles["B1"], t.inchi_key["B1"], t.pert["B2"]] == ["m2|m1", "T1+T2", None, None, "NA"]


def test_tables_that_are_none(tmp_path):
    (tmp_path / "bad.txt").write_text("a\tb\n1\t2\n")
    (tmp_path / "bad.gz").write_bytes(b"\x1f\x8bnothing")
    for path, words in (("bad.txt", "no column 'gene_id'"), ("bad.gz", "cannot be read as a table")):
        with pytest.raises(InputError, match=words): lincs.read_geneinfo(tmp_path / path)


@pytest.fixture(scope="module")
def dialects(tmp_path_factory):
    return perturbseq.write_dialects(tmp_path_factory.mktemp("dialects"), seed=3)


def test_three_dialects_are_one_screen(dialects):
    cells = {k: perturbseq.read_perturbseq(p) for k, p in dialects.items()}
    bulk = {k: delta(perturbseq.bulk_of(c, by=("pert", "batch")), min_control_cells=20) for k, c in cells.items()}
    for k in "BC":
        assert cells[k].obs.pert.tolist() == cells["A"].obs.pert.tolist()
        np.testing.assert_allclose(bulk[k].X, bulk["A"].X, atol=1e-5)
        assert bulk[k].obs.equals(bulk["A"].obs)
    assert bulk["A"].obs.pert_type.eq("crispra").all() and bulk["A"].obs.batch.nunique() == 2


@pytest.mark.parametrize("target", [10_000.0, 4_321.0, 54_321.5])
def test_the_target_is_found_with_counts_beside(tmp_path, target):
    c = perturbseq.read_perturbseq(perturbseq.write_dialects(tmp_path, seed=4, target=target)["C"])
    assert f"target {target:g}" in c.uns["perturbseq"]["state"]


def test_a_wrong_target_is_not_taken_for_10000():
    draw = rng(5, "test_readers")
    counts, total = draw.poisson(2, (300, 60)), draw.integers(2000, 20000, 300)
    right, wrong = (np.log1p(counts * (t / total)[:, None]).astype(np.float32) for t in (10_000, 11_500))
    assert perturbseq.value_state(right).target == 10_000
    with pytest.raises(InputError, match="do not tell"): perturbseq.value_state(wrong)
    assert perturbseq.value_state(wrong, target_sum=11_500).target == 11_500


def altered(dialects, tmp_path, change, kind="A"):
    a = ad.read_h5ad(dialects[kind])
    a = change(a) or a
    a.write_h5ad(tmp_path / "altered.h5ad")
    return tmp_path / "altered.h5ad"


BAD = {
    "has no perturbation (1 such": lambda a: ad.AnnData(a.X, a.obs.assign(perturbation=a.obs.perturbation.astype(object).where(a.obs_names != a.obs_names[3], None)), a.var),
    "negative or not finite": lambda a: setattr(a, "X", a.X.toarray() - 30),
    "all 0": lambda a: setattr(a, "X", sparse.csr_matrix(a.shape)),
    "the lane of cell": lambda a: ad.AnnData(a.X, a.obs.drop(columns="gemgroup").set_axis([f"c{i}" for i in range(a.n_obs)], axis=0), a.var),
    "no column of labels": lambda a: ad.AnnData(a.X, a.obs.drop(columns="perturbation"), a.var),
    "the file says cell_line A549": lambda a: a.obs.__setitem__("cell_line", "A549"),
    "different genes joined": lambda a: a.obs.__setitem__("perturbation", "A_A"),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_cells(dialects, tmp_path, words):
    path = altered(dialects, tmp_path, BAD[words])
    with pytest.raises(InputError) as e: perturbseq.read_perturbseq(path)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_lanes_are_pooled_unless_asked(dialects):
    effects = delta(perturbseq.bulk_of(perturbseq.read_perturbseq(dialects["A"])), min_control_cells=20)
    assert effects.obs.pert.is_unique and effects.obs.batch.eq("lanes pooled").all() and (effects.obs.n_cells == 20).all()


def test_counts_of_few_genes_need_their_totals(dialects, tmp_path):
    right = perturbseq.read_perturbseq(dialects["A"])
    assert "totals from obs.ncounts" in right.uns["perturbseq"]["state"] and "equal" not in right.uns["perturbseq"]["state"]
    path = altered(dialects, tmp_path, lambda a: ad.AnnData(a.X, a.obs.rename(columns={"ncounts": "mine"}).assign(low=a.obs.ncounts.where(a.obs_names != a.obs_names[5], 1)), a.var))
    with pytest.raises(InputError, match="counts of 12 genes and no column") as e: perturbseq.read_perturbseq(path)
    assert "totals=" in str(e.value) and "altered.h5ad" in str(e.value)
    with pytest.raises(InputError, match="obs.low that is missing or below"): perturbseq.read_perturbseq(path, totals="low")
    with pytest.raises(InputError, match="no column 'min' in obs; .*did you mean 'mine'"): perturbseq.read_perturbseq(path, totals="min")
    np.testing.assert_array_equal(perturbseq.read_perturbseq(path, totals="mine").X.toarray(), right.X.toarray())
    these = perturbseq.read_perturbseq(path, totals="these genes")
    assert "as the caller said" in these.uns["perturbseq"]["state"]
    np.testing.assert_allclose(np.expm1(these.X.toarray()).sum(1), 10_000, rtol=1e-4)


def test_a_whole_transcriptome_needs_no_totals(dialects, tmp_path):
    def wide(n):
        def change(a):
            x = sparse.hstack([a.X, sparse.csr_matrix((a.n_obs, n - a.n_vars), dtype=np.float32)]).tocsr()
            return ad.AnnData(x, a.obs.drop(columns="ncounts"), pd.DataFrame(index=[f"G{i}" for i in range(n)]))
        return altered(dialects, tmp_path, change)
    with pytest.raises(InputError, match="counts of 5,045 genes"): perturbseq.read_perturbseq(wide(5045))
    assert "the sums over these 6,000 genes" in perturbseq.read_perturbseq(wide(6000)).uns["perturbseq"]["state"]


def test_a_totals_column_below_the_sums_is_passed_over(dialects, tmp_path):
    path = altered(dialects, tmp_path, lambda a: ad.AnnData(a.X, a.obs.assign(total_counts=a.obs.ncounts, ncounts=1.0), a.var))
    assert "obs.total_counts" in perturbseq.read_perturbseq(path).uns["perturbseq"]["state"]


@pytest.mark.parametrize("name", ["AAVS1", "scramble", "scramble_guide", "intergenic", "UT"])
def test_controls_of_another_name(dialects, tmp_path, name):
    right = perturbseq.read_perturbseq(dialects["A"])
    path = altered(dialects, tmp_path, lambda a: ad.AnnData(a.X, a.obs.assign(perturbation=a.obs.perturbation.astype(str).replace("control", name)), a.var))
    with pytest.raises(InputError, match="no control among 17 labels") as e: perturbseq.read_perturbseq(path)
    assert f"control={name!r}" in str(e.value) and "non-targeting" in str(e.value) and "\n" not in str(e.value)
    for control in (name, [name]): assert perturbseq.read_perturbseq(path, control=control).obs.pert.equals(right.obs.pert)
    assert not perturbseq.read_perturbseq(path, control=()).obs.is_control.any()
    with pytest.raises(InputError, match="no label with the control 'GFP'"): perturbseq.read_perturbseq(path, control=[name, "GFP"])


def test_a_named_control_is_no_gene_as_a_partner(dialects, tmp_path):
    whole = lambda v: "AAVS1_AAVS1" if v == "control" else v if "_" in v else f"AAVS1_{v}"
    path = altered(dialects, tmp_path, lambda a: ad.AnnData(a.X, a.obs.assign(perturbation=a.obs.perturbation.astype(str).map(whole)), a.var))
    assert perturbseq.read_perturbseq(path, control="AAVS1").obs.pert.equals(perturbseq.read_perturbseq(dialects["A"]).obs.pert)
    a = perturbseq.parse_labels(pd.Series(["AAVS1B", "AAVS1"]), control="AAVS1")
    assert a.tolist() == ["AAVS1B", "control"]


def test_columns_of_the_file_keep_their_values(dialects, tmp_path):
    path = altered(dialects, tmp_path, lambda a: ad.AnnData(a.X, a.obs.assign(n_genes=11, batch="b7", n_genes_in_file=3), a.var))
    obs = perturbseq.read_perturbseq(path, batch="gemgroup").obs
    assert set(obs.n_genes) == {0, 1, 2} and (obs.n_genes_in_file == 3).all() and (obs.batch_in_file == "b7").all() and obs.columns.is_unique
    with pytest.raises(InputError, match="AnnData in place of a file"): perturbseq.read_perturbseq(ad.read_h5ad(path))


def test_h5ad_that_is_cut_or_points_elsewhere(dialects, tmp_path):
    raw = dialects["A"].read_bytes()
    for part in (0, 700, len(raw) // 2):
        (tmp_path / "cut.h5ad").write_bytes(raw[:part])
        with pytest.raises(InputError, match="cannot be read as h5ad"): perturbseq.read_perturbseq(tmp_path / "cut.h5ad")
    (tmp_path / "link.h5ad").write_bytes(raw)
    with h5py.File(tmp_path / "link.h5ad", "r+") as f:
        del f["obs/ncounts"]
        f["obs/ncounts"] = h5py.ExternalLink("other.h5", "x")
    with pytest.raises(InputError, match="points elsewhere"): perturbseq.read_perturbseq(tmp_path / "link.h5ad")
