"Activation scores of wells: centres, distances, the axis, what two wells can prove, and where it refuses."
import numpy as np
import pandas as pd
import pytest

from perturbnb.core import InputError
from perturbnb.interpret.activation import (
    axis, comparable, control_wells, distances, dmso_centre, dose_response, metabolite_table, needed_at_floor, place_agreement, project, replicate_agreement)


@pytest.fixture(scope="module")
def wells():
    "Two replicates of two plates, 5 x 8 wells, DMSO in the last column."
    rows = [(f"{t}_{p}_{r}{c}", t, p, f"{t}_{p}", r, c, "DMSO" if c == 8 else f"m{p}{r}{c}")
            for t in ("tc1", "tc2") for p in ("A1", "A2") for r in "ABCDE" for c in range(1, 9)]
    obs = pd.DataFrame(rows, columns=["well", "replicate", "plate", "batch", "row", "column", "pert"]).set_index("well")
    return obs.assign(pert_type=np.where(obs.pert == "DMSO", "control", "metabolite"))


def noise(obs, seed=0): return np.random.default_rng(seed).normal(size=len(obs)) + obs.batch.map({"tc1_A1": 3, "tc1_A2": -1, "tc2_A1": 0, "tc2_A2": 7}).to_numpy()


def test_centre_leaves_the_well_itself_out(wells):
    z = np.random.default_rng(1).normal(size=(160, 4))
    plate = dmso_centre(z, wells, "plate")
    found = control_wells(wells)
    on = (wells.batch == "tc2_A1").to_numpy() & found
    i, j = np.flatnonzero(on)[0], np.flatnonzero((wells.batch == "tc2_A1").to_numpy() & ~found)[0]
    np.testing.assert_allclose(plate[j], z[on].mean(0))
    np.testing.assert_allclose(plate[i], np.delete(z[on], 0, axis=0).mean(0))
    np.testing.assert_allclose(dmso_centre(z, wells, "plate", leave_out=False)[i], z[on].mean(0))
    np.testing.assert_allclose(dmso_centre(z, wells, list(wells.index[:3]))[100], z[:3].mean(0))


def test_distances_of_a_dmso_well_are_like_those_of_an_inert_metabolite(wells):
    d = np.mean([distances(np.random.default_rng(s).normal(size=(160, 8)), wells, "plate").Latent_Euclid.groupby(control_wells(wells)).mean() for s in range(20)], axis=0)
    assert abs(d[0] / d[1] - 1) < 0.04
    biased = distances(np.random.default_rng(0).normal(size=(160, 8)), wells, "plate", leave_out=False).Latent_Euclid.groupby(control_wells(wells)).mean()
    assert biased[False] > 1.15 * biased[True]


def test_distances_have_the_published_names_and_survive_zeros(wells):
    d = distances(np.zeros((160, 3)), wells)
    assert list(d) == ["Meta", "Latent_Euclid", "Latent_Cosine", "LatentScore"] and d.index.name == "Well"
    assert (d.Latent_Euclid == 0).all() and (d.Latent_Cosine == 1).all()
    moved = distances(np.zeros((160, 3)), wells, np.array([0.0, 3.0, 4.0]))
    assert (moved.Latent_Euclid == 5).all()


@pytest.mark.parametrize("call", [lambda z, o: distances(z, o), lambda z, o: distances(z, o, "plate"), lambda z, o: metabolite_table(z[:, 0], o), lambda z, o: comparable(z[:, 0], o)])
def test_no_dmso_is_refused_in_one_line(wells, call):
    treated = wells[~control_wells(wells)]
    with pytest.raises(InputError, match="no DMSO well") as e: call(np.ones((len(treated), 2)), treated)
    assert "name a reference" in str(e.value) and "\n" not in str(e.value)


def test_one_plate_without_dmso_is_refused_unless_a_reference_is_named(wells):
    some = wells[~(control_wells(wells) & (wells.batch == "tc2_A2"))]
    z = np.random.default_rng(0).normal(size=(len(some), 3))
    with pytest.raises(InputError, match="plate 'tc2_A2' has no DMSO"): distances(z, some, "plate")
    with pytest.raises(InputError, match="plate 'tc2_A2' has 0 reference"): metabolite_table(z[:, 0], some)
    assert np.isfinite(distances(z, some, list(some.index[control_wells(some)])).Latent_Euclid).all()
    assert metabolite_table(z[:, 0], some, adjust="plate").p.notna().all()


def test_axis_uses_the_given_rows_only_and_points_to_activated(wells):
    draw = np.random.default_rng(2)
    label = draw.integers(0, 2, 160)
    z = draw.normal(size=(160, 5)) + np.outer(label, [3, 0, 0, 0, 0]) + 20 * (wells.replicate == "tc2").to_numpy()[:, None] * [0, 1, 0, 0, 0]
    obs, tc1 = wells.assign(label=label), (wells.replicate == "tc1").to_numpy()
    line = axis(z[tc1], obs[tc1])
    changed = z.copy(); changed[~tc1] = 99
    np.testing.assert_array_equal(line.weights, axis(changed[tc1], obs[tc1]).weights)
    p = project(z, line)
    np.testing.assert_allclose(line.step @ line.weights, 1)
    assert p[tc1 & (label == 1)].mean() - p[tc1 & (label == 0)].mean() > 0.8 and line.n == (int((label[tc1] == 0).sum()), int(label[tc1].sum()))
    with pytest.raises(InputError, match="0 and 1"): axis(z, obs.assign(label="active"))
    with pytest.raises(InputError, match="no column 'label'"): axis(z, wells)
    with pytest.raises(InputError, match="features"): project(z[:, :2], line)


def test_table_finds_what_acts_and_leaves_the_rest(wells):
    strong = {"mA1A1": 9.0, "mA1B2": 9.0, "mA2C3": 9.0, "mA1D4": -9.0, "mA2A5": -9.0, "mA2B6": -9.0, "mA2D1": 9.0, "mA2E2": -9.0}
    y = noise(wells) + wells.pert.map(strong).fillna(0).to_numpy()
    t = metabolite_table(y, wells, n_perm=20_000)
    assert t.attrs["needed_at_floor"] == needed_at_floor(1 / 231, 70) == 7 and t.p_floor.eq(1 / 231).all()
    named = t[t.direction != "not told apart"]
    assert {k: {1: "activating", -1: "inhibiting"}[np.sign(v)] for k, v in strong.items()} == named.direction.to_dict()
    assert (t.effect.is_monotonic_decreasing) and t.n.eq(2).all() and sum(t.lo[k] < v < t.hi[k] for k, v in strong.items()) >= 6
    own = metabolite_table(y, wells, test="own")
    assert own.p_floor.eq(1 / 36).all() and (own.direction == "not told apart").all()


def test_table_is_about_right_on_inert_wells(wells):
    tables = [metabolite_table(noise(wells, s), wells) for s in range(60)]
    assert 0.02 < np.mean([(t.p <= 0.05).mean() for t in tables]) < 0.08
    assert 0.92 < np.mean([((t.lo <= 0) & (t.hi >= 0)).mean() for t in tables]) < 0.98
    assert np.mean([(t.fdr <= 0.05).any() for t in tables]) < 0.1


def test_table_does_not_care_for_order_or_a_plate_shift(wells):
    y = pd.Series(noise(wells), wells.index)
    t = metabolite_table(y, wells)
    mixed = wells.sample(frac=1, random_state=0)
    again = metabolite_table(y.loc[mixed.index] + mixed.batch.map({b: i for i, b in enumerate(wells.batch.unique())}), mixed)
    for c in ("effect", "p", "lo"): np.testing.assert_allclose(again.loc[t.index, c], t[c], atol=1e-9)
    with pytest.raises(InputError, match="same order"): metabolite_table(y, mixed)


def test_several_wells_on_one_plate_are_exchanged_there():
    obs = pd.DataFrame({"pert": ["DMSO"] * 8 + ["m"] * 4, "batch": "p"}, index=[f"w{i}" for i in range(12)])
    y = np.r_[np.arange(8.0), [20, 21, 22, 23]]
    assert metabolite_table(y, obs).loc["m", ["p", "p_floor"]].tolist() == [1 / 495, 1 / 495]
    assert 0.0005 < metabolite_table(y, obs, n_perm=200).loc["m", "p"] <= 4 / 201
    assert metabolite_table(-y, obs, side="greater").loc["m", "p"] == 1


def test_place_is_taken_out_and_told(wells):
    place = wells.column.to_numpy() * 2.0
    y = noise(wells, 3) + place
    assert comparable(y, wells, "place").groupby(wells.column).median().abs().max() < 0.6
    found = place_agreement(y, wells)
    assert found.value["same place"] > 0.8 and found.low["difference"] < 0 < found.high["difference"] and found.n.eq(35).all()
    acting = wells.pert.map(dict(zip(wells.pert.unique(), np.random.default_rng(0).normal(0, 3, 71)))).to_numpy()
    found = place_agreement(noise(wells, 3) + acting, wells)
    assert found.low["difference"] > 0.4 and abs(found.value["same place"]) < 0.3
    assert replicate_agreement(noise(wells, 3) + acting, wells, adjust="plate").low > 0.5
    with pytest.raises(InputError, match="one place"): comparable(y, wells.assign(row="A"), "place")


def test_dose_response_refuses_and_finds():
    doses = np.repeat([0.1, 0.3, 1, 3, 10, 30], 2)
    obs = pd.DataFrame({"pert": ["up"] * 12 + ["flat"] * 12 + ["DMSO"] * 6, "dose_um": [*doses, *doses, *[0] * 6], "batch": "p"})
    y = np.r_[-4 / (1 + (2 / doses) ** 1.5), np.zeros(18)] + np.random.default_rng(0).normal(0, 0.2, 30)
    t = dose_response(y, obs)
    assert t.trend["up"] < -0.8 and t.p["up"] < 0.01 and t.lo["up"] < 2 < t.hi["up"] and t.effect["up"] < -3
    assert np.isnan(t.ec50["flat"]) and t.note["flat"]
    with pytest.raises(InputError, match="without doses"): dose_response(y, obs.drop(columns="dose_um"))
    with pytest.raises(InputError, match="three doses"): dose_response(y, obs.assign(dose_um=np.where(obs.dose_um > 0, 10, 0)))


@pytest.mark.parametrize("how, words", [(dict(adjust="plates"), "did you mean 'plate'"), (dict(test="perm"), "test='perm'"), (dict(reference=["zz"]), "reference well 'zz'"),
                                        (dict(reference="water"), "no 'water' well")])
def test_bad_wishes(wells, how, words):
    with pytest.raises(InputError, match=words): metabolite_table(noise(wells), wells, **how)


def test_agreement_needs_no_dmso(wells):
    treated = wells[~control_wells(wells)]
    y = noise(treated, 5)
    assert -1 < replicate_agreement(y, treated, n_boot=100).value < 1 and np.isfinite(place_agreement(y, treated, n_boot=100).value).all()
    with pytest.raises(InputError, match="no DMSO"): replicate_agreement(y, treated, adjust="control")
