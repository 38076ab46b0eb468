"""The losses as double loops over float64 numbers, from the papers' equations and from nothing in the package.

Only `math` is used. A temperature is a pair of functions of the cosine s, its logit and the slope of that logit; a
loss is a loop over anchors, and its gradient is the chain rule by hand: coefficient of every cosine, then the
derivative of a cosine of two unnormalised vectors.
"""

import math
from dataclasses import dataclass, field
from operator import mul
from typing import NamedTuple


class Map(NamedTuple):
    logit: object
    slope: object
    by_log_tau: object = None  # derivative of the logit in the logarithm of a learned temperature
    own: object = None  # from a row and SogCLR's running means to the derivative of a loss of its own


class Row(NamedTuple):
    way: int  # number of the anchor's view or side
    image: int
    anchor: int
    positives: list  # node numbers, then their cosines
    positive_cosine: list
    negatives: list
    negative_cosine: list


class Result(NamedTuple):
    value: float
    gradients: list  # one (batch, dim) list of lists per view
    log_tau: float  # gradient of a learned temperature


# Temperatures. DySTreSS, https://arxiv.org/abs/2308.01140


def quotient(tau, tau_slope, detach):
    def slope(s):
        direct = 1 / tau(s)
        return direct if detach else direct * (1 - s * tau_slope(s) / tau(s))

    return Map(lambda s: s / tau(s), slope)


def cosine(low, high):
    return (
        lambda s: low + (high - low) / 2 * (1 + math.cos(math.pi * (1 + s))),
        lambda s: (high - low) / 2 * math.pi * math.sin(math.pi * s),
    )


def shifted(low, high, shift=-0.4, scale=0.7):
    def tau(s):
        return high if s > -shift else low + (high - low) / 2 * (1 + math.cos(math.pi * (s + shift) / scale))

    def tau_slope(s):
        omega = math.pi / scale
        return 0.0 if s > -shift else -(high - low) / 2 * omega * math.sin(omega * (s + shift))

    return tau, tau_slope


def cosine_constant(low, high, start=-0.2, scale=0.8):
    def tau(s):
        return high if s > start else low + (high - low) / 2 * (1 + math.cos(math.pi * (s - start) / scale))

    def tau_slope(s):
        omega = math.pi / scale
        return 0.0 if s > start else -(high - low) / 2 * omega * math.sin(omega * (s - start))

    return tau, tau_slope


def sign(s):
    return 0.0 if s == 0 else math.copysign(1.0, s)


def exponential(low, high, rate=3.5):
    return (
        lambda s: high - (high - low) * math.exp(-rate * abs(s)),
        lambda s: (high - low) * rate * sign(s) * math.exp(-rate * abs(s)),
    )


def linear(low, high):
    return lambda s: low + (high - low) * abs(s), lambda s: (high - low) * sign(s)


def root(low, high):
    """TeMo, https://openreview.net/forum?id=rIv5ftmR3v, with a root of at least 0.001"""

    def tau_slope(s):
        return (high - low) / 4 / math.sqrt((s + 1) / 2) if (s + 1) / 2 > 1e-6 else 0.0

    return lambda s: low + (high - low) * math.sqrt(max((s + 1) / 2, 1e-6)), tau_slope


def constant(tau):
    return Map(lambda s: s / tau, lambda s: 1 / tau)


def model_aware(alignment, tau, alpha, threshold):
    """MACL, https://arxiv.org/abs/2207.07874"""
    return constant(tau * (1 + alpha * (alignment - threshold)))


def scheduled(epoch, low, high, period):
    """Temperature Schedules, https://arxiv.org/abs/2303.13664"""
    return constant(low + (high - low) * (1 + math.cos(math.pi * epoch / (period / 2))) / 2)


def shifted_by_count(epoch, low, high, period, amplitude, share):
    """MM-TS, https://arxiv.org/abs/2603.08202: `share` is where a count lies between the least and the largest"""
    tau = low + (high - low) * share + amplitude / 2 * math.cos(2 * math.pi * epoch / period)
    return constant(min(max(tau, low), high))


def stepped(epoch, low, high, period):
    """The same paper's other schedule, as the package defines it."""
    return constant(high if math.floor(2 * epoch / period) % 2 == 0 else low)


def lifted(epoch, epochs, low, high):
    """DySTreSS's "stabilisation": the range whose lower end has moved towards the upper one."""
    return low + epoch / epochs * (high - low), high


def learnable(tau):
    """CLIP's logit scale, https://arxiv.org/abs/2103.00020: d(s / tau) / dlog tau = -s / tau"""
    return Map(lambda s: s / tau, lambda s: 1 / tau, lambda s: -s / tau)


def robust(tau, rho, released=False):
    """FastCLIP-v3, https://arxiv.org/abs/2407.01445: log_tau descends on tau mean_i log u_i + rho tau"""

    def own(row, running):
        s_p = math.fsum(row.positive_cosine) / len(row.positive_cosine)
        h = [s - s_p for s in row.negative_cosine]
        energy = [math.exp(x / tau) for x in h]
        u = running.mean(row, math.fsum(energy) / len(h))
        tilt = math.fsum(e / u * x / tau for e, x in zip(energy, h, strict=True)) / len(h)
        return tau * (rho + math.log(u) - (2 if released else 1) * tilt)

    return Map(lambda s: s / tau, lambda s: 1 / tau, None, own)


def weighted(strength, map_):
    """Hardness weighting, https://arxiv.org/abs/2503.04812, equation 5: strength s, a constant in the gradient"""
    return Map(lambda s: map_.logit(s) + strength * s, map_.slope, map_.by_log_tau)


def warm_up(share, tau, arrival):
    return Map(
        lambda s: (1 - share) * s / tau + share * arrival.logit(s),
        lambda s: (1 - share) / tau + share * arrival.slope(s),
        arrival.by_log_tau and (lambda s: share * arrival.by_log_tau(s)),
    )


def log_odds(clamp):
    """Temperature-Free Loss, https://arxiv.org/abs/2501.17683"""

    def logit(s):
        s = min(max(s, clamp - 1), 1 - clamp)
        return math.log1p(s) - math.log1p(-s)

    return Map(logit, lambda s: 2 / (1 - s * s) if abs(s) < 1 - clamp else 0.0)


# Rows


def unit(z):
    peak = max(map(abs, z))
    if peak == 0:
        return [0.0] * len(z), math.inf
    length = peak * math.sqrt(math.fsum((x / peak) ** 2 for x in z))
    return [x / peak / (length / peak) for x in z], length


def dot(a, b):
    return math.fsum(map(mul, a, b))


def compared(images, nodes, keys, sides, labels=None):
    """(anchor, positives, negatives) as node numbers. Node v * images + i is view v of image i; keys follow."""
    if labels:
        of = [labels[j % images] for j in range(nodes)]
        return [
            (
                i,
                [j for j in range(nodes) if of[j] == of[i] and j != i],
                [j for j in range(nodes) if of[j] != of[i]],
            )
            for i in range(nodes)
        ]
    if keys:
        return [(i, [images + i], list(range(nodes, nodes + keys))) for i in range(images)]
    if sides != "views":  # two sides: 0 to 1, and 1 to 0
        ways = {"one_way": [(0, 1)], "both_ways": [(0, 1), (1, 0)]}[sides]
        return [
            (a * images + i, [c * images + i], [c * images + j for j in range(images) if j != i])
            for a, c in ways
            for i in range(images)
        ]
    return [
        (
            i,
            [j for j in range(nodes) if j % images == i % images and j != i],
            [j for j in range(nodes) if j % images != i % images],
        )
        for i in range(nodes)
    ]


def layout(views, keys=None, sides="views", labels=None):
    """Nodes (unit vectors), their lengths, and what every anchor is compared with."""
    images = len(views[0])
    pairs = [unit(z) for view in views for z in view]
    nodes, lengths = [u for u, _ in pairs], [length for _, length in pairs]
    rows = [(*divmod(i, images), i, p, n) for i, p, n in compared(images, len(nodes), len(keys or []), sides, labels)]
    nodes = nodes + [list(key) for key in keys or []]
    rows = [
        Row(way, image, i, p, [dot(nodes[i], nodes[j]) for j in p], n, [dot(nodes[i], nodes[j]) for j in n])
        for way, image, i, p, n in rows
    ]
    return nodes, lengths, rows


def alignment(rows):
    """Every anchor weighs the same, however many positives it has."""
    return math.fsum(math.fsum(row.positive_cosine) / len(row.positive_cosine) for row in rows) / len(rows)


# Objectives: from one anchor's cosines to (value, slope for every positive, slope for every negative). `running` and
# `weight` are SogCLR's and DCLW's.


def exponentials(map_, cosines):
    logits = [map_.logit(s) for s in cosines]
    peak = max(logits)
    shares = [math.exp(a - peak) for a in logits]
    total = math.fsum(shares)
    return peak + math.log(total), [share / total for share in shares]


def distance(row, positive, negative):
    """d = logsumexp(negatives) - logsumexp(positives), and its slopes."""
    upper, p_share = exponentials(positive, row.positive_cosine)
    lower, n_share = exponentials(negative, row.negative_cosine)
    return (
        lower - upper,
        [-w * positive.slope(s) for w, s in zip(p_share, row.positive_cosine, strict=True)],
        [w * negative.slope(s) for w, s in zip(n_share, row.negative_cosine, strict=True)],
    )


def ntxent(row, positive, negative, running, weight):
    d, up, down = distance(row, positive, negative)
    wrong = 1 / (1 + math.exp(-d))  # probability of the negatives
    return math.log1p(math.exp(d)), [wrong * c for c in up], [wrong * c for c in down]


def macl(row, positive, negative, running, weight):
    d, up, down = distance(row, positive, negative)
    odds = math.exp(d)
    # -V log p with p = 1/(1 + odds), V = 1/(1 - p) held constant
    return math.log1p(odds) * (1 + odds) / odds if odds > 0 else 1.0, up, down


def dcl(row, positive, negative, running, weight):
    """Decoupled contrastive learning, https://arxiv.org/abs/2110.06848"""
    return distance(row, positive, negative)


def dclw(row, positive, negative, running, weight):
    upper, _ = exponentials(positive, row.positive_cosine)
    lower, _ = exponentials(negative, row.negative_cosine)
    _, up, down = distance(row, positive, negative)
    return lower - weight * upper, [weight * c for c in up], down


def dual(row, positive, negative, running, weight, ratio=10.0):
    """SimCo, https://arxiv.org/abs/2203.17248: -sg[(1 - P(ratio tau)) / (1 - P(tau))] log P(tau)"""

    def probability(by):
        p = math.fsum(math.exp(positive.logit(s) / by) for s in row.positive_cosine)
        return p / (p + math.fsum(math.exp(negative.logit(s) / by) for s in row.negative_cosine))

    soft = 1 - probability(ratio)
    value, _, _ = macl(row, positive, negative, running, weight)  # -log P / (1 - P), which keeps its digits
    _, up, down = distance(row, positive, negative)
    return soft * value, [soft * c for c in up], [soft * c for c in down]


def von_mises_fisher(rows, sigma):
    """2 - B softmax_i(s_i / sigma) over the positives' cosines of the whole batch, constants in the gradient."""
    energy = [math.exp(math.fsum(row.positive_cosine) / len(row.positive_cosine) / sigma) for row in rows]
    return [2 - len(rows) * e / math.fsum(energy) for e in energy]


class Running(NamedTuple):
    """A running mean for SogCLR; the default is the batch's own."""

    mean: object = lambda row, g: g
    offset: object = lambda row: 0.0  # what is subtracted from the logits in it
    difference: object = lambda row: False  # whether the loss is of s_j - s_positive


def sogclr(row, positive, negative, running, weight):
    """SogCLR_DRO of iSogCLR, https://arxiv.org/abs/2305.11965: sum_j W_j s_j / n - s_positive with W = exp(a) / s."""
    energy = [math.exp(negative.logit(s) - running.offset(row)) for s in row.negative_cosine]
    g = math.fsum(energy) / len(energy)
    weights = [e / running.mean(row, g) / len(energy) for e in energy]
    share = 1 / len(row.positive_cosine)
    if running.difference(row):
        share *= math.fsum(weights)
    value = math.fsum(map(mul, weights, row.negative_cosine)) - share * math.fsum(row.positive_cosine)
    return value, [-share for _ in row.positives], weights


OBJECTIVES = {"ntxent": ntxent, "macl": macl, "sogclr": sogclr, "gcl": sogclr, "dcl": dcl, "dclw": dclw, "dual": dual}


def one_by_one(row, positive, compete):
    """The row of each positive alone, beside the others of which it competes with them."""
    for p, s in zip(row.positives, row.positive_cosine, strict=True):
        others = [(q, t) for q, t in zip(row.positives, row.positive_cosine, strict=True) if q != p]
        yield row._replace(positives=[p], positive_cosine=[s]), others if compete else []


def supcon(row, others, positive, negative):
    """-log( e^p / (e^p + other positives + negatives) ), https://arxiv.org/abs/2004.11362, equation 2."""
    rivals = [(positive, s) for _, s in others] + [(negative, s) for s in row.negative_cosine]
    (s,) = row.positive_cosine
    logits = [map_.logit(t) for map_, t in [(positive, s), *rivals]]
    total = math.fsum(math.exp(a) for a in logits)
    shares = [math.exp(a) / total for a in logits]
    slopes = [w * map_.slope(t) for w, (map_, t) in zip(shares[1:], rivals, strict=True)]
    return math.log(total) - logits[0], [(shares[0] - 1) * positive.slope(s)], slopes


def averaged(objective, row, positive, negative, running, weights):
    """An objective of every positive alone, averaged: as a value, and slopes for the row's positives and negatives."""
    m = len(row.positives)
    value, up, down = 0.0, dict.fromkeys(row.positives, 0.0), [0.0] * len(row.negatives)
    for (alone, others), weight in zip(one_by_one(row, positive, objective == "ntxent"), weights, strict=True):
        if objective == "ntxent":
            own, (by_own,), rest = supcon(alone, others, positive, negative)
        else:
            own, (by_own,), rest = OBJECTIVES[objective](alone, positive, negative, running, weight)
        value += own / m
        up[alone.positives[0]] += by_own / m
        for (q, _), c in zip(others, rest, strict=False):
            up[q] += c / m
        down = [a + c / m for a, c in zip(down, rest[len(others) :], strict=True)]
    return value, list(up.values()), down


def loss(views, maps, objective, *, keys=None, sides="views", running=None, sigma=0.5, positives="sum", labels=None):
    """The mean over anchors, but for sogclr the mean over images of the sum over views.

    `maps(row, alignment)` gives the maps of positives and negatives, `running` the means that SogCLR divides by.
    With `keys`: a queue, anchors are view 0. `sides` other than "views": anchors of a side, candidates of the other.
    With `labels`: positives are all others of an anchor's class.
    """
    nodes, lengths, rows = layout(views, keys, sides, labels)
    aligned = alignment(rows)
    images = len(views[0])
    scale = 1 / (images if objective == "sogclr" else len(rows))
    values, log_tau, pull = [], [0.0], [[0.0] * len(nodes) for _ in lengths]
    pairs = iter(von_mises_fisher([r._replace(positive_cosine=[s]) for r in rows for s in r.positive_cosine], sigma))
    each = [[next(pairs) for _ in row.positives] for row in rows]
    for row, weight, weights in zip(rows, von_mises_fisher(rows, sigma), each, strict=True):
        positive, negative = maps(row, aligned)
        if positives == "mean" and objective not in ("sogclr", "gcl"):  # which average their cosines as they are
            value, up, down = averaged(objective, row, positive, negative, running or Running(), weights)
        else:
            value, up, down = OBJECTIVES[objective](row, positive, negative, running or Running(), weight)
        values.append(value)
        for j, c in zip(row.positives + row.negatives, up + down, strict=True):
            pull[row.anchor][j] += scale * c
            if j < len(lengths):
                pull[j][row.anchor] += scale * c
        if positive.own:
            log_tau.append(scale * positive.own(row, running or Running()))
        if positive.by_log_tau and objective not in (
            "sogclr",
            "gcl",
        ):  # constant weights, bare cosines
            cosines, both = row.positive_cosine + row.negative_cosine, [positive] * len(up) + [negative] * len(down)
            for map_, s, c in zip(both, cosines, up + down, strict=True):
                log_tau.append(scale * c / map_.slope(s) * map_.by_log_tau(s))
    columns = list(zip(*nodes, strict=True))
    gradients = []
    for i, length in enumerate(lengths):
        sphere = [dot(pull[i], column) for column in columns]
        radial = dot(sphere, nodes[i])
        gradients.append([(g - radial * u) / length for g, u in zip(sphere, nodes[i], strict=True)])
    by_view = [gradients[v * images : (v + 1) * images] for v in range(len(views))]
    return Result(scale * math.fsum(values), by_view, math.fsum(log_tau))


# iSogCLR's tables


@dataclass
class Individual:
    num_samples: int
    tau_init: float = 0.1
    tau_min: float = 0.05
    tau_max: float = 1.0
    rho: float = 0.4
    gamma: float = 0.8
    beta: float = 0.5
    eta: float = 0.03
    clip: float = 3.0
    gradient: str = "cosine"  # or "difference": s_j - s_positive in place of s_j, the bimodal code's form
    released: bool = False  # the positive is counted, and the first visit is gamma g, as in that code
    hardness: float = 0.0  # strength with which negatives are weighted
    tau: list = field(init=False)
    s: list = field(init=False)  # None before the first visit
    u: list = field(init=False)

    def __post_init__(self):
        self.tau = [self.tau_init] * self.num_samples
        self.s = [None] * self.num_samples
        self.u = [0.0] * self.num_samples

    def mean(self, sample, g):
        old = self.s[sample]
        if self.released:
            return (1 - self.gamma) * (old or 0.0) + self.gamma * g
        return g if old is None else (1 - self.gamma) * old + self.gamma * g

    def subtracted(self, row):
        if self.gradient == "cosine":
            return 0.0
        return math.fsum(row.positive_cosine) / len(row.positive_cosine)

    def counted(self, row, g):
        return g + 1 / len(row.negatives) if self.released else g

    def update(self, index, rows):
        found = {}
        for image, sample in enumerate(index):
            tau = self.tau[sample]
            running, gradient = [], []
            for row in rows:
                if row.image == image:
                    h = [s - self.subtracted(row) for s in row.negative_cosine]
                    weighted = zip(h, row.negative_cosine, strict=True)
                    energy = [math.exp(x / tau + self.hardness * s) for x, s in weighted]
                    s = self.mean(sample, self.counted(row, math.fsum(energy) / len(h)))
                    tilt = math.fsum(e / s * x / tau for e, x in zip(energy, h, strict=True)) / len(h)
                    running.append(s)
                    gradient.append(math.log(s) + self.rho - tilt)
            mean = math.fsum(gradient) / len(gradient)
            found.setdefault(sample, []).append(
                (math.fsum(running) / len(running), min(max(mean, -self.clip), self.clip))
            )
        for sample, seen in found.items():
            self.s[sample] = math.fsum(s for s, _ in seen) / len(seen)
            mean = math.fsum(g for _, g in seen) / len(seen)
            self.u[sample] = (1 - self.beta) * self.u[sample] + self.beta * mean
            moved = self.tau[sample] - self.eta * self.u[sample]
            self.tau[sample] = min(max(moved, self.tau_min), self.tau_max)


class Tables:
    """One table for all anchors, or one a side, each with its index or with the same."""

    def __init__(self, *tables):
        self.tables = tables

    def of(self, row, indices):
        """The anchor's table, and its sample."""
        return self.tables[row.way % len(self.tables)], indices[row.way % len(indices)][row.image]

    def tau(self, row, indices):
        table, sample = self.of(row, indices)
        return table.tau[sample]

    def running(self, indices):
        def mean(row, g):
            table, sample = self.of(row, indices)
            return table.mean(sample, table.counted(row, g))

        def offset(row):
            table, sample = self.of(row, indices)
            return table.subtracted(row) / table.tau[sample]

        return Running(mean, offset, lambda row: self.of(row, indices)[0].gradient == "difference")

    def update(self, indices, views, **where):
        _, _, rows = layout(views, **where)
        for number, table in enumerate(self.tables):
            own = rows if len(self.tables) == 1 else [row for row in rows if row.way == number]
            table.update(indices[number % len(indices)], own)


# What an engine computes


def naive_row_stats(anchors, candidates, positives, excluded, logit):
    """(P, L, s, N) of every anchor, as `RowStats` calls them; `positives` and `excluded` are lists of columns."""
    result = []
    for i, anchor in enumerate(anchors):
        cosine = [sum(a * c for a, c in zip(anchor, candidate, strict=True)) for candidate in candidates]
        negatives = [j for j in range(len(candidates)) if j not in excluded[i]]
        total = sum(math.exp(logit(cosine[j])) for j in negatives)
        result.append(
            (
                math.log(sum(math.exp(logit(cosine[j])) for j in positives[i])),
                math.log(total),
                sum(cosine[j] for j in positives[i]) / len(positives[i]),
                sum(math.exp(logit(cosine[j])) * cosine[j] for j in negatives) / total,
            )
        )
    return result
