import copy

import pytest
import torch
from grid import DEVICE, EPOCH, Pair, assert_agree, build, embeddings, trained_on

from dystress_plugin import ContrastiveLoss
from dystress_plugin.key_queue import KeyQueue


def keys(*numbers, dim=3):
    return torch.tensor(numbers, dtype=torch.float32, device=DEVICE)[:, None].expand(-1, dim)


@pytest.mark.parametrize("batches", [[2, 2, 2], [3, 3, 3], [5, 1, 4], [7], [1, 12, 2], [5, 5], [4, 23, 3]])
def test_first_in_is_first_out(batches):
    queue, last, number = KeyQueue(5, 3).to(DEVICE), [], 0
    for size in batches:
        batch = range(number, number + size)
        number += size
        queue.push(keys(*batch))
        last = [*last, *batch][-5:]
        oldest = int(queue.position)
        in_order = queue.keys.roll(-oldest, 0)[5 - len(last) :, 0].tolist()
        assert in_order == last
        assert oldest == number % 5


def test_the_queue_begins_full_of_directions():
    torch.manual_seed(0)
    queue = KeyQueue(50, 8).to(DEVICE)
    assert torch.allclose(queue.keys.norm(dim=1), queue.keys.new_ones(50))
    assert (queue.keys @ queue.keys.T - torch.eye(50, device=DEVICE)).abs().max() < 0.99
    queue.push(keys(7, 7, dim=8))
    assert torch.allclose(queue.keys[2:].norm(dim=1), queue.keys.new_ones(48))


def test_what_was_read_is_not_written_to_later():
    queue = KeyQueue(4, 3).to(DEVICE)
    before = queue.read()
    kept = before.clone()
    queue.push(keys(1, 2))
    assert torch.equal(before, kept)


def test_pushing_takes_no_gradient_along():
    queue = KeyQueue(4, 3).to(DEVICE)
    queue.push(keys(1, 2).clone().requires_grad_())
    assert not queue.keys.requires_grad


@pytest.mark.parametrize("size", [4, 6, 20])
def test_the_loss_reads_before_it_pushes_and_keeps_normalised_keys(size):
    loss = ContrastiveLoss("simclr", queue_size=(size, 4)).to(DEVICE)
    before = loss.queue.keys.clone()
    z0, z1 = trained_on(embeddings(6, 4))
    value = loss(z0, z1)
    fresh = ContrastiveLoss("simclr", queue_size=(size, 4)).to(DEVICE).eval()
    fresh.queue.keys.copy_(before)
    assert torch.equal(fresh(z0, z1), value)
    pushed = torch.nn.functional.normalize(z1, dim=1).float()[-size:]
    slots = torch.arange(6, device=DEVICE)[-size:] % size
    assert torch.allclose(loss.queue.keys[slots], pushed)
    assert int(loss.queue.position) == 6 % size


def test_keys_of_the_batch_are_not_negatives():
    pair = Pair("constant", "ntxent", queue_size=(3, 4))
    views = embeddings(5, 4)
    together = pair.loss.eval()(*views)
    alone = [pair.loss(views[0][i : i + 1], views[1][i : i + 1]) for i in range(5)]
    assert torch.allclose(together, torch.stack(alone).mean(), rtol=1e-13)


def test_gradient_reaches_anchors_and_keys_after_the_queue_has_moved_on():
    pair = Pair("dystress-cosine", "ntxent", queue_size=(4, 4))
    for seed in range(4):  # wraps around, with batches larger than the queue
        assert_agree(pair, embeddings(6, 4, seed=seed), torch.arange(6, device=DEVICE))


def test_eval_mode_reads_and_does_not_push():
    loss = ContrastiveLoss("simclr", queue_size=(4, 4)).to(DEVICE).eval()
    before = copy.deepcopy(loss.state_dict())
    loss(*trained_on(embeddings(3, 4)))
    assert all(torch.equal(before[name], value) for name, value in loss.state_dict().items())


def test_queue_is_in_the_state_dict_and_resumes():
    loss, fresh = (ContrastiveLoss(build("dystress-cosine"), queue_size=(5, 4)).to(DEVICE) for _ in range(2))
    for seed in range(3):
        loss(*trained_on(embeddings(3, 4, seed=seed)))
    assert loss.queue.position == 4
    assert set(loss.state_dict()) == {"queue.keys", "queue.position"}
    fresh.load_state_dict(loss.state_dict())
    for seed in range(3, 5):
        batch = trained_on(embeddings(3, 4, seed=seed))
        assert torch.equal(loss(*batch, epoch=EPOCH), fresh(*batch, epoch=EPOCH))
    assert torch.equal(loss.queue.keys, fresh.queue.keys)


@pytest.mark.parametrize(
    ("size", "dim", "message"), [(0, 3, "keys"), (3, 0, "dim"), (True, 3, "keys"), (3, 1.5, "dim")]
)
def test_bad_sizes_raise_and_name_the_value(size, dim, message):
    with pytest.raises(ValueError, match=rf"queue_size=\({size}, {dim}\): {message} must be an int of at least 1"):
        KeyQueue(size, dim)


def test_repr_shows_the_size():
    assert repr(KeyQueue(5, 3)) == "KeyQueue(keys=5, dim=3)"
