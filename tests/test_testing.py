"""check_temperature passes our own temperatures and a third party's, and finds what is wrong with a faulty one."""

import copy
import sys
from pathlib import Path

import pytest
from grid import CASES, assert_close, build

from dystress_plugin.temperature import Individual, TempNet, WarmUp
from dystress_plugin.testing import ContractError, check_temperature

THIRD_PARTY = str(Path(__file__).parent / "third_party")


@pytest.fixture(scope="module")
def theirs():
    """The third party's module, and that of its faults, for this process and those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(THIRD_PARTY)
        import faults
        import third_party

        yield third_party, faults
    for name in ("faults", "third_party"):
        del sys.modules[name]


@pytest.mark.parametrize("name", CASES)
def test_our_own_temperatures_keep_the_contract(name):
    check_temperature(lambda: build(name), distributed=False)


def test_a_temperature_with_a_table_within_another_keeps_the_contract():
    check_temperature(lambda: WarmUp(Individual(50), epochs=10), distributed=False)


@pytest.mark.parametrize("settings", [{}, {"gamma": 0.6, "num_samples": 50}])
def test_a_network_with_dropout_keeps_the_contract_on_two_ranks_too(settings):
    check_temperature(lambda: TempNet(5, **settings), distributed=bool(settings))


def test_a_third_partys_table_with_a_schedule_keeps_the_contract_on_two_ranks_too(theirs):
    check_temperature(theirs[0].Familiar(50))


def test_an_instance_is_left_as_it_is(theirs):
    temperature = theirs[0].Familiar(50)
    temperature.alike[3] = 0.5
    before = copy.deepcopy(temperature.state_dict())
    check_temperature(temperature, distributed=False)
    assert temperature.state_dict().keys() == before.keys()
    assert_close(temperature.alike, before["alike"], 0.0)


FAULTS = {
    "WrongSlope": r"WrongSlope's Map.slope: is off by 0.33 from the derivative .* in `logit`. Give that one",
    "NoCut": r"NoCut's Map.rows: does not cut: .* Return the map with each \(rows, 1\) tensor cut to tensor\[rows\]",
    "NoPickle": r"NoPickle: does not survive pickle.* Keep no lambda, generator or open file in it",
    "OutsideOfState": "does not go on as before after a state_dict. Register all that `update` moves as a buffer",
    "LearnsInPrepare": "LearnsInPrepare.prepare: leaves a trace: .* Move state in `update` alone",
    "KeepsGraph": r"KeepsGraph.update: keeps the graph of a batch in its state. Decorate it with torch.no_grad\(\)",
    "LowBound": "LowBound's Scaled.bound: is 1, and a logit is 5. Give a number that no",
    "Undeclared": "what needs_epoch = False says it can do without raised TypeError.* Set needs_epoch = True",
    "ByPlace": "same images in another order another loss. Find a sample in a table by `batch.index`",
    "SaysRowless": "SaysRowless's Map.rowless: is True, .* Return False where a parameter is",
    "InheritsParts": "InheritsParts's Map.parts: gives pieces that from_parts makes another Scaled of. Give both, or",
    "UntrainedParameter": "disagree in gradients by parameters. Give the map `parts` and `parameter_term`, or compose",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_with_what_to_do(theirs, name):
    with pytest.raises(ContractError, match=FAULTS[name]) as caught:
        check_temperature(lambda: getattr(theirs[1], name)(50), distributed=False)
    assert "\n" not in str(caught.value)


def test_an_update_that_differs_between_ranks_is_found(theirs):
    check_temperature(theirs[1].OwnRankOnly(50), distributed=False)  # one process alone shows nothing
    message = "OwnRankOnly.update: differs between ranks, .* after three batches alike do. Move state by what all ranks"
    with pytest.raises(ContractError, match=message):
        check_temperature(theirs[1].OwnRankOnly(50))


@pytest.mark.parametrize("thing", ["dystress", 0.1, None, dict])
def test_what_is_no_temperature_is_refused(thing):
    with pytest.raises(TypeError, match="must be a Temperature, or a function that builds one"):
        check_temperature(thing)
