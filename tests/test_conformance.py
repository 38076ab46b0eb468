"""Numbers computed once from the papers' equations, apart from this package and from its tests' double loop."""

import math

import oracle
import pytest
import torch

from dystress_plugin import ContrastiveLoss
from dystress_plugin.temperature import Constant, CosineSchedule, DySTreSS, Individual, ModelAware, TemperatureFree
from dystress_plugin.temperature.base import Batch
from dystress_plugin.temperature.profiles import PROFILES, monotone_limit


def circle(*degrees):
    angle = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack([angle.cos(), angle.sin()], 1)


VIEWS = circle(0, 90, 200), circle(30, 150, 215)  # positives have cosines .866025, .5, .965926


def printed(value, digits):
    return [f"{x:.{digits}f}" for x in torch.as_tensor(value).flatten().tolist()]


def maps(temperature, positive_cosine=None):
    if positive_cosine is None:
        positive_cosine = torch.ones(6, 1)
    return temperature.prepare(Batch(positive_cosine, None, None, 2, torch.mean)).positive


# Losses

TABLE = [
    (Constant(0.10), oracle.constant(0.10), "0.415604", "-3.240754"),
    (Constant(0.15), oracle.constant(0.15), "0.394763", "-2.129544"),
    (Constant(0.20), oracle.constant(0.20), "0.411579", "-1.554698"),
    (Constant(0.50), oracle.constant(0.50), "0.626782", "-0.289197"),
    (DySTreSS(), oracle.quotient(*oracle.cosine(0.1, 0.2), True), "0.441121", "-1.247698"),
    (DySTreSS(profile="shifted"), oracle.quotient(*oracle.shifted(0.1, 0.2), True), "0.409712", "-1.561521"),
    (
        DySTreSS(profile="cosine_constant"),
        oracle.quotient(*oracle.cosine_constant(0.1, 0.2), True),
        "0.410872",
        "-1.563527",
    ),
    (DySTreSS(profile="exponential"), oracle.quotient(*oracle.exponential(0.1, 0.2), True), "0.412859", "-1.515577"),
    (TemperatureFree(), oracle.log_odds(1e-6), "0.438549", "-1.322671"),
]


@pytest.mark.parametrize(("temperature", "map_", "ntxent", "dcl"), TABLE, ids=lambda x: getattr(x, "profile", None))
def test_ntxent_and_dcl_of_six_vectors(temperature, map_, ntxent, dcl):
    assert printed(ContrastiveLoss(temperature)(*VIEWS), 6) == [ntxent]
    assert printed(ContrastiveLoss(temperature, objective="dcl")(*VIEWS), 6) == [dcl]


@pytest.mark.parametrize("profile", list(PROFILES))
def test_ntxent_value_does_not_depend_on_detaching(profile):
    value = ContrastiveLoss(DySTreSS(profile=profile))(*VIEWS)
    assert torch.equal(ContrastiveLoss(DySTreSS(profile=profile, detach=False))(*VIEWS), value)


@pytest.mark.parametrize(("_", "map_", "ntxent", "dcl"), TABLE)
def test_double_loop_itself_gives_the_numbers(_, map_, ntxent, dcl):
    views = [view.tolist() for view in VIEWS]
    assert printed(oracle.loss(views, lambda image, a: (map_, map_), "ntxent").value, 6) == [ntxent]
    assert printed(oracle.loss(views, lambda image, a: (map_, map_), "dcl").value, 6) == [dcl]


@pytest.mark.parametrize(
    ("tau", "alpha", "threshold", "moved", "value", "dcl"),
    [(0.1, 0.5, 0.0, "0.138866", "1.233513", "-2.309802"), (0.05, 2.0, 0.8, "0.047732", "1.431437", "-6.827175")],
)
def test_macl_of_six_vectors(tau, alpha, threshold, moved, value, dcl):
    temperature = ModelAware(tau, alpha, threshold)
    cosine = (VIEWS[0] * VIEWS[1]).sum(1)
    assert printed(cosine.mean(), 6) == ["0.777317"]
    map_ = maps(temperature, cosine.repeat(2)[:, None])
    assert printed(map_.temperature(cosine), 6) == [moved] * 3
    assert printed(ContrastiveLoss(temperature)(*VIEWS), 6) == [value]
    assert printed(ContrastiveLoss(temperature, objective="dcl")(*VIEWS), 6) == [dcl]

    def map_of(image, alignment):
        return (oracle.model_aware(alignment, tau, alpha, threshold),) * 2

    views = [view.tolist() for view in VIEWS]
    assert printed([oracle.loss(views, map_of, name).value for name in ("macl", "dcl")], 6) == [value, dcl]


FIRST_VISIT = ("-0.660603", ["-0.983499", "-0.802889", "-0.985715"], ["0.114752", "0.112043", "0.114786"])
FROM_AN_EMPTY_MEAN = ("-0.437095", ["-1.831016", "-2.422651", "-2.540484"], ["0.127465", "0.136340", "0.138107"])


@pytest.mark.parametrize(("visited", "expected"), [(False, FIRST_VISIT), (True, FROM_AN_EMPTY_MEAN)])
def test_isogclr_step_of_six_vectors(visited, expected):
    temperature = Individual(3)
    if visited:  # a running mean of 0 that counts: what the released code starts from
        temperature.visited.fill_(True)
        temperature.log_s.fill_(-torch.inf)
    views = [view.clone().requires_grad_() for view in VIEWS]
    value = ContrastiveLoss(temperature)(*views, index=torch.arange(3))
    assert (*printed(value, 6), printed(temperature.u / temperature.beta, 6), printed(temperature.tau, 6)) == expected
    assert temperature.visited.all()


# Temperatures

COSINES = [-1, -0.75, -0.5, -0.4, -0.3, -0.2, 0, 0.2, 0.4, 0.5, 0.75, 1]
PRINTED = {
    "cosine": ".2000 .1854 .1500 .1345 .1206 .1095 .1000 .1095 .1345 .1500 .1854 .2000",
    "shifted": ".2000 .1717 .1188 .1050 .1000 .1050 .1389 .1812 .2000 .2000 .2000 .2000",
    "cosine_constant": ".1000 .1222 .1691 .1854 .1962 .2000 .2000 .2000 .2000 .2000 .2000 .2000",
}


@pytest.mark.parametrize("profile", PRINTED)
def test_profile_of_dystress(profile):
    tau = maps(DySTreSS(0.1, 0.2, profile)).temperature(torch.tensor(COSINES, dtype=torch.float64))
    assert printed(tau, 4) == [f"0{x}" for x in PRINTED[profile].split()]


def test_exponential_profile_of_dystress():
    tau = maps(DySTreSS(profile="exponential")).temperature(torch.tensor([-1.0, 0.0, 1.0]))
    assert printed(tau, 3) == ["0.197", "0.100", "0.197"]


def test_gradient_through_the_temperature_weakens_pairs_of_medium_similarity():
    s = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    ratio = maps(DySTreSS(detach=False)).slope(s) / maps(DySTreSS(detach=True)).slope(s)
    assert printed(ratio, 3) == ["0.953", "0.758", "0.476", "0.551", "0.779"]


def test_root_profile_of_temo():
    tau = maps(DySTreSS(0.01, 0.05, "root")).temperature(torch.tensor([-0.5, 0.0, 0.5, 1.0], dtype=torch.float64))
    assert printed(tau, 6) == ["0.030000", "0.038284", "0.044641", "0.050000"]


def own_limit(profile):
    return monotone_limit(profile, **PROFILES[profile].defaults)


def test_logits_of_the_cosine_profile_are_monotone_up_to_a_ratio_of_about_4_51():
    # s f' - f is largest at s = 1/2, where it is pi/4 - 1/2.
    assert own_limit("cosine") == pytest.approx(1 + 1 / (math.pi / 4 - 0.5), rel=1e-12)
    assert own_limit("cosine") == pytest.approx(4.51, abs=0.01)


def test_logits_of_the_shifted_profile_are_monotone_up_to_a_ratio_of_about_2_04():
    assert printed(own_limit("shifted"), 2) == ["2.04"]


@pytest.mark.parametrize("profile", ["cosine_constant", "exponential", "linear", "root"])
def test_logits_of_the_other_profiles_are_monotone_at_any_ratio(profile):
    assert own_limit(profile) == math.inf


@pytest.mark.parametrize(
    ("low", "high", "cosine", "shifted"),
    [
        (0.1, 0.2, "0.0", "0.0"),
        (0.07, 0.2, "0.0", "17.8"),
        (0.05, 0.2, "0.0", "22.3"),
        (0.1, 0.3, "0.0", "18.7"),
        (0.1, 0.5, "19.4", "24.1"),
        (0.1, 1.0, "46.6", "27.1"),
        (0.07, 0.1, "0.0", "0.0"),
        (0.04, 0.05, "0.0", "0.0"),
    ],
)
def test_share_of_cosines_where_the_logit_falls(low, high, cosine, shifted):
    s = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    for profile, share in (("cosine", cosine), ("shifted", shifted)):
        arguments = {"profile": profile, "detach": False}
        if share == "0.0":
            temperature = DySTreSS(low, high, **arguments)
        else:
            with pytest.warns(UserWarning, match="limit"):
                temperature = DySTreSS(low, high, **arguments)
        logit = maps(temperature).logit(s)
        assert printed((logit.diff() < 0).double().mean() * 100, 1) == [share]


def test_temperature_free_logit_and_local_temperature():
    s = torch.tensor([0, 0.5, 0.9, 0.99, 0.999, 1 - 1e-6], dtype=torch.float64)
    map_ = maps(TemperatureFree())
    assert printed(map_.logit(s), 3) == ["0.000", "1.099", "2.944", "5.293", "7.600", "14.509"]
    assert [f"{x:.4g}" for x in map_.temperature(s).tolist()] == [
        "0.5",
        "0.375",
        "0.095",
        "0.00995",
        "0.0009995",
        "1e-06",
    ]


def test_schedule_starts_at_the_top_and_is_lowest_after_half_a_period():
    schedule = CosineSchedule(0.1, 1.0, period=400)
    assert [round(schedule.tau(epoch), 12) for epoch in (0, 100, 200, 300, 400, 2000)] == [1, 0.55, 0.1, 0.55, 1, 1]
