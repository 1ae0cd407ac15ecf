"Tables of wells and plates: swapped, cut and hostile files end in one clear line; good ones come back whole."
import anndata as ad
import numpy as np
import pandas as pd
import pytest

from perturbnb.core import InputError, MissingFile, real_file, rng
from perturbnb.data import drugseq, plates
from perturbnb.data.drugseq import SCORES, check_wells, control_wells, read_tables, reversed_plates, target_facts, write_tables
from perturbnb.data.schema import check
from perturbnb.models.base import training_table


def screen(n_genes=12, seed=0):
    "Two copies of two layouts of 16 wells, two of them DMSO."
    draw, rows = rng(seed, "test_drugseq"), [(r, p, k) for r in ("tc1", "tc2") for p in ("A1", "B1") for k in range(16)]
    obs = pd.DataFrame(rows, columns=["replicate", "plate", "k"])
    obs["pert"] = np.where(obs.k < 14, "met " + obs.plate + " " + obs.k.astype(str), "DMSO")
    obs = obs.assign(pert_type=np.where(obs.pert.eq("DMSO"), "control", "metabolite"), cell_line="T cell", batch=obs.replicate + "_" + obs.plate, row=np.where(obs.k < 8, "A", "B"),
                     column=obs.k % 8 + 1, n_cells=1)
    obs.index = obs.batch + "_" + obs.row + obs.column.astype(str)
    z = draw.normal(size=(64, 3))
    obs[list(SCORES)] = z
    obs = obs.assign(label=(z[:, 0] > 0).astype(int), cluster=np.where(z[:, 0] > 0, "C0", "C1"), activation_old=z.sum(1)).drop(columns="k")
    genes = [f"G{j}" for j in range(n_genes)]
    return ad.AnnData(draw.normal(6, 1, (64, n_genes)), obs, pd.DataFrame({"symbol": genes}, index=genes), uns={"perturbnb": dict(scale="vst", reference="none", source="test", hash="0" * 64)})


@pytest.fixture
def folder(tmp_path):
    return write_tables(screen(), tmp_path / "screen")


def one_line(call, *words):
    "The call must fail with one line that holds all words."
    with pytest.raises((InputError, MissingFile)) as e: call()
    line = str(e.value)
    assert "\n" not in line and all(w in line for w in words), line
    return line


def test_there_and_back_through_csv_and_h5ad(folder, tmp_path):
    back = read_tables(folder)
    np.testing.assert_allclose(back.X, screen().X, rtol=1e-13)
    assert back.obs.pert.tolist() == screen().obs.pert.tolist() and len(list(folder.iterdir())) == 7
    assert (folder / "e.activation_score_old.csv").is_file() and (folder / "scores_3_z.csv").read_text().startswith('"pseudotime_z","cytoscore_z","Tscore_z"\n')
    back.write_h5ad(tmp_path / "w.h5ad")
    again = check_wells(ad.read_h5ad(tmp_path / "w.h5ad"), needs=("control_each", "position", "genes", *SCORES))
    assert target_facts(again)["labels"] == target_facts(back)["labels"] and training_table(again, controls=True).n_obs == 64
    assert write_tables(again, tmp_path / "twice").joinpath("expr_mat.csv").read_bytes() == (folder / "expr_mat.csv").read_bytes()


def test_scores_by_name_never_by_position(folder):
    t = pd.read_csv(folder / "scores_3_z.csv")
    t[["Tscore_z", "pseudotime_z", "cytoscore_z"]].to_csv(folder / "scores_3_z.csv", index=False)
    np.testing.assert_allclose(read_tables(folder).obs[list(SCORES)], screen().obs[list(SCORES)], rtol=1e-13)
    t.rename(columns={"cytoscore_z": "CytoTRACE_z"}).to_csv(folder / "scores_3_z.csv", index=False)
    one_line(lambda: read_tables(folder), "scores_3_z.csv", "no column 'cytoscore_z'", "CytoTRACE_z")
    t.assign(extra=1).to_csv(folder / "scores_3_z.csv", index=False)
    one_line(lambda: read_tables(folder), "a column 'extra'")


@pytest.mark.parametrize("name", ["meta_id.csv", "scores_3_z.csv", "labels_cls.csv", "cluster_id.csv", "e.activation_score_old.csv", "expr_mat.csv"])
def test_unequal_lengths_name_both_files(folder, name):
    lines = (folder / name).read_text().splitlines()
    (folder / name).write_text("\n".join(lines[:-1]) + "\n")
    one_line(lambda: read_tables(folder), f"{name} has 63 rows and well_id.csv has 64")


@pytest.mark.parametrize("a, b, words", [("meta_id.csv", "well_id.csv", "replicate_plate_well"), ("labels_cls.csv", "cluster_id.csv", "labels_cls.csv"), ("scores_3_z.csv", "labels_cls.csv", "scores_3_z.csv: no column"),
                                         ("expr_mat.csv", "scores_3_z.csv", "scores_3_z.csv: no column"), ("meta_id.csv", "labels_cls.csv", "names of metabolites")])
def test_files_under_each_others_names(folder, a, b, words):
    x, y = (folder / a).read_bytes(), (folder / b).read_bytes()
    (folder / a).write_bytes(y), (folder / b).write_bytes(x)
    one_line(lambda: read_tables(folder), words)


def test_genes_that_are_none(folder):
    t = pd.read_csv(folder / "expr_mat.csv").astype(object)
    def with_value(gene, row, value):
        new = t.copy()
        new.loc[row, gene] = value
        new.to_csv(folder / "expr_mat.csv", index=False)
    with_value("G3", 6, "high")
    one_line(lambda: read_tables(folder), "expr_mat.csv", "'G3'", "row 7", "'high'")
    with_value("G4", 0, np.nan)
    one_line(lambda: read_tables(folder), "'G4'", "row 1", "missing")
    with_value("G4", 0, np.inf)
    one_line(lambda: read_tables(folder), "'G4'", "row 1", "inf")
    t.assign(G5=1.0, G6=2.0).to_csv(folder / "expr_mat.csv", index=False)
    one_line(lambda: read_tables(folder), "2 of 12 genes have one value", "G5, G6", "constant='drop'")
    assert read_tables(folder, constant="drop").uns["perturbnb"]["dropped_genes"] == ["G5", "G6"] and read_tables(folder, constant="drop").n_vars == 10
    assert read_tables(folder, constant="keep").n_vars == 12 and read_tables(folder, expression=False).n_vars == 0
    one_line(lambda: read_tables(folder, constant="no"), "raise, drop or keep")
    t.assign(G5=True).to_csv(folder / "expr_mat.csv", index=False)
    one_line(lambda: read_tables(folder), "'G5'", "True")


def test_no_dmso_no_targets_and_missing_files(folder, tmp_path):
    text = (folder / "meta_id.csv").read_text()
    (folder / "meta_id.csv").write_text(text.replace("DMSO", "water blank"))
    one_line(lambda: read_tables(folder), "none of the 64 wells is DMSO")
    assert read_tables(folder, targets=False).obs.pert_type.eq("metabolite").all()
    (folder / "labels_cls.csv").unlink()
    one_line(lambda: read_tables(folder), "no labels_cls.csv", "targets=False")
    one_line(lambda: read_tables(tmp_path / "nowhere"), "no folder")
    (folder / "well_id.csv").unlink()
    one_line(lambda: read_tables(folder, targets=False), "no well_id.csv")
    lone = screen()[screen().obs.batch.ne("tc2_B1") | screen().obs.pert.ne("DMSO")].copy()
    one_line(lambda: check_wells(lone, needs=("control_each",)), "plate tc2_B1 has no DMSO well (1 of 4 plates)")
    one_line(lambda: plates.centre_plates(lone), "plate tc2_B1 has 0 DMSO wells", "missing='drop'")


def test_names_that_look_like_gaps_or_hold_quotes(tmp_path):
    w = screen()
    w.obs["pert"] = ['nan', 'N,N-"dimethyl"', "α-Ketoglutarate", *w.obs.pert[3:]]
    assert read_tables(write_tables(w, tmp_path / "odd")).obs.pert[:3].tolist() == ['nan', 'N,N-"dimethyl"', "α-Ketoglutarate"]


def many_layouts(shift, turned=()):
    "Five layouts of 32 positions in two copies; the first copy is higher by `shift`, in the layouts named `turned` lower."
    rows = [(r, f"L{p}", "AB"[k // 16], k % 16 + 1) for r in ("tc1", "tc2") for p in range(5) for k in range(32)]
    obs = pd.DataFrame(rows, columns=["replicate", "plate", "row", "column"])
    obs = obs.assign(batch=obs.replicate + "_" + obs.plate, pert="met " + obs.plate + obs.row + obs.column.astype(str), pert_type="metabolite", cell_line="T cell", n_cells=1)
    obs["score"] = rng(0, "test_drugseq.layouts").normal(size=len(obs)) + shift * obs.replicate.eq("tc1") * np.where(obs.plate.isin(turned), -1, 1)
    obs.index = obs.batch + "_" + obs.row + obs.column.astype(str)
    return ad.AnnData(np.zeros((len(obs), 0)), obs, pd.DataFrame({"symbol": []}, index=pd.Index([], dtype=object)), uns=screen().uns)


@pytest.mark.parametrize("shift, turned", [(1.5, ["L3"]), (1.5, []), (0, ["L3"])])
def test_a_reversed_layout_is_flagged_and_no_other(shift, turned):
    t = reversed_plates(many_layouts(shift, turned), "score", n_perm=999)
    assert t.plate[t.reversed].tolist() == (turned if shift else [])
    pd.testing.assert_frame_equal(t, reversed_plates(many_layouts(shift, turned), "score", n_perm=999))


def test_reversal_needs_two_copies_and_a_majority():
    one_line(lambda: reversed_plates(screen()[:32].copy()), "1 replicate(s)")
    assert not reversed_plates(subset(["L2", "L3"]), "score", n_perm=99).reversed.any()


def subset(layouts):
    w = many_layouts(1.5, ["L3"])
    return w[w.obs.plate.isin(layouts)].copy()


@pytest.mark.skipif(real_file("drugseq_tcell/dpf") is None, reason="the real tables are not on this machine")
def test_the_real_screen():
    real = read_tables(real_file("drugseq_tcell/dpf"))
    facts = target_facts(real)
    assert facts["labels"] == {0: 284, 1: 484} and facts["n_control"] == 40 and facts["replicate_label"]["n_agree"] == 263 and facts["replicate_label"]["n"] == 364
    assert facts["old_minus_sum"] < 1e-13 and facts["label_rule"]["mixed"] == []
    flagged = reversed_plates(real, n_perm=999)
    assert flagged.plate[flagged.reversed].tolist() == ["B2"] and "not confirmed" in flagged.says[flagged.reversed].iloc[0]


def plate(n=48, n_genes=120, seed=0):
    "Counts and sheet of one plate: 8 DMSO, 4 medium, 12 compounds in three wells."
    draw = rng(seed, "test_drugseq.plate")
    counts = pd.DataFrame(draw.poisson(np.exp(draw.normal(2, 1, n_genes)) * np.exp(draw.normal(0, .3, (n, 1)))), index=[f"s{i}" for i in range(n)], columns=[f"G{j}" for j in range(n_genes)])
    sheet = pd.DataFrame({"sample": counts.index, "Plate_ID": "p1", "Well_ID": [f"{'ABCD'[i // 12]}{i % 12 + 1:02d}" for i in range(n)], "Treatment_1": ["DMSO"] * 8 + ["Media"] * 4 + [f"cpd {k}" for k in range(12) for _ in range(3)],
                          "Concentration_1": [1.0] * 12 + [2500.0] * 36, "Unit_1": "nM", "Time": 24, "Unit": "h", "Cell_type": "L1"})
    return counts, sheet


@pytest.fixture
def written(tmp_path):
    counts, sheet = plate()
    counts.to_csv(tmp_path / "counts.csv"), sheet.to_csv(tmp_path / "sheet.csv", index=False)
    return tmp_path


def test_a_plate_from_counts_to_signatures(written):
    w = plates.read_plate(written / "counts.csv", written / "sheet.csv")
    assert set(w.obs.dose_um[w.obs.pert_type.eq("compound")]) == {2.5} and w.obs.dose_um[w.obs.pert_type.eq("control")].eq(0).all()
    assert control_wells(w).sum() == 8 and w.obs.pert.eq("medium").sum() == 4 and w.obs_names[0] == "p1_A01"
    s = check(plates.to_signatures(plates.normalise(w)))
    assert s.shape == (12, 120) and set(s.obs.n_cells) == {3} and s.uns["perturbnb"]["reference"] == "dmso_same_line_same_plate"
    assert check(plates.to_signatures(plates.normalise(w, "log1p_cp10k"))).uns["perturbnb"]["scale"] == "delta_log1p_cp10k"
    assert check(plates.to_signatures(plates.normalise(plates.read_plate(written / "counts.csv", written / "sheet.csv", pert_type="metabolite")))).obs.pert_type.eq("metabolite").all()
    by_medium = plates.read_plate(written / "counts.csv", written / "sheet.csv", control="Media")
    assert plates.to_signatures(plates.normalise(by_medium)).uns["perturbnb"]["reference"] == "medium_same_line_same_plate"
    np.testing.assert_allclose(s.X[0], (lambda v: v.X[12:15].mean(0) - v.X[:8].mean(0))(plates.normalise(w)), atol=1e-5)


def test_h5ad_and_its_sheet_must_agree(written):
    counts, sheet = plate()
    a = ad.AnnData(counts.to_numpy(np.float32), sheet.set_index("sample")[["Well_ID", "Plate_ID", "Treatment_1", "Cell_type"]], pd.DataFrame(index=counts.columns))
    a.write_h5ad(written / "p.h5ad")
    both = plates.read_plate(written / "p.h5ad", sheet.assign(Treatment_1="code 7"))
    assert both.obs.pert.nunique() == 14 and both.obs.time_h.eq(24).all()  # the file's treatments stay, the sheet adds time and dose
    one_line(lambda: plates.read_plate(written / "p.h5ad", sheet.assign(Well_ID=sheet.Well_ID.tolist()[::-1])), "'A01' in the counts and 'D12' in the sheet")
    one_line(lambda: plates.read_plate(written / "p.h5ad", sheet[5:]), "5 of 48 wells are not in the sheet")
    (written / "cut.h5ad").write_bytes((written / "p.h5ad").read_bytes()[:500])
    one_line(lambda: plates.read_plate(written / "cut.h5ad"), "cut.h5ad")


def test_plates_that_cannot_be_used(written):
    w = plates.read_plate(written / "counts.csv", written / "sheet.csv")
    v = plates.normalise(w)
    one_line(lambda: plates.to_signatures(v[~control_wells(v)].copy()), "plate p1 has 0 DMSO wells", "control=")
    one_line(lambda: plates.centre_plates(v[~control_wells(v)].copy()), "plate p1 has 0 DMSO wells", "missing=")
    one_line(lambda: plates.plate_effects(v), "no condition stands on two of the 1 plates")
    one_line(lambda: plates.size_factors(np.zeros((3, 20))), "has no counts (3 such wells)")
    one_line(lambda: plates.normalise(w[:, :5].copy()), "expected at least ten")
    empty = w.copy()
    empty.layers["counts"][2] = 0
    one_line(lambda: plates.normalise(empty), "well number 2 has no counts", "well_qc")
    assert plates.well_qc(empty).reason.iloc[2] == "no counts"
    one_line(lambda: plates.read_plate(written / "counts.csv", written / "sheet.csv", control="DMS0"), "did you mean 'DMSO'")
    one_line(lambda: plates.read_plate(written / "counts.txt", written / "sheet.csv"), "counts.txt")
    one_line(lambda: plates.read_plate(written / "counts.csv", written / "sheet.csv", columns={"pert": "Drug"}), "no column 'Drug'")


@pytest.mark.parametrize("share", [.2, 1.0])
def test_size_factors_follow_the_true_depth(share):
    draw = rng(0, "test_drugseq.depth")
    depth = np.exp(draw.normal(0, .5, 60))
    c = draw.poisson(np.exp(draw.normal(0, 2, 2000)) * depth[:, None] * share)
    slope, _ = np.polyfit(np.log(depth), np.log(plates.size_factors(c)), 1)
    assert .94 < slope < 1.06, slope


def test_the_order_of_wells_and_genes_does_not_matter(written):
    w = plates.expressed(plates.read_plate(written / "counts.csv", written / "sheet.csv"))
    order, genes = rng(0, "test_drugseq.order").permutation(w.n_obs), rng(1, "test_drugseq.order").permutation(w.n_vars)
    a, b = plates.normalise(w), plates.normalise(w[order][:, genes].copy())
    np.testing.assert_allclose(b[a.obs_names, a.var_names].X, a.X, atol=1e-5)
    np.testing.assert_allclose(plates.well_qc(w[order].copy()).loc[w.obs_names, "agreement"], plates.well_qc(w).agreement)


@pytest.mark.skipif(real_file("drugseq_tcell/macseq_PMMSq033_counts.h5ad") is None, reason="the real plates are not on this machine")
def test_the_real_plates():
    p = real_file("drugseq_tcell/macseq_PMMSq033_counts.h5ad")
    mac = plates.read_plate(p, p.with_name("macseq_PMMSq033_metadata.csv"))
    assert mac.shape == (245, 500) and control_wells(mac).sum() == 19 and not control_wells(mac)[mac.obs.pert.eq("Staurosporine")].any()
    q = real_file("drugseq_tcell/pan_t_activation_counts.parquet")
    pan = plates.read_plate(q, q.with_name("pan_t_activation_metadata.csv"), **plates.PAN_T)
    assert pan.shape == (33, 57133) and pan.obs.donor.value_counts().eq(11).all() and control_wells(pan).sum() == 18


def test_what_the_position_tells():
    w = many_layouts(0)
    w.obs["graded"] = w.obs.column + .5 * w.obs.score
    graded, noise = drugseq.position_facts(w, "graded", n_perm=49), drugseq.position_facts(w, "score", n_perm=49)
    assert graded["share"] > .9 and abs(graded["replicate_corr_left"]) < .3 < graded["replicate_corr"] and noise["share"] < .15
    shares = plates.position_effects(w, "graded", n_perm=49)
    assert (shares.column > .9).all() and (shares.row_p > .05).all()
    one_line(lambda: drugseq.position_facts(w[w.obs.plate == "L1"].copy(), "score"), "2 replicates of 1 layouts")
