"""Zoology in miniature: which mixers can look up what stands beside a key.

The generator and the operators are held against their definitions. Then decoders that differ in their mixers alone
learn to recall up to eight pairs at three widths: gated convolutions, recurrences with a state, attention, and
attention at a few positions only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gatewise.claims.lab.base import Claim, Finding, Measured, Part, Published, at_least, at_most, between
from gatewise.claims.lab.checks import generator, randomise, relative_difference
from gatewise.claims.lab.intervals import Interval, exact, t_interval
from gatewise.claims.lab.plot import Bars, Lines
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.tokens import IGNORED, Recall, asked
from gatewise.claims.lab.training import Batch, Schedule, build, init_by_fan_in, train_side_by_side
from gatewise.data.text.mqar import Rules, Segment, exact_examples, fast_examples, segment_seeds
from gatewise.networks.sequence._base import LanguageModel
from gatewise.networks.sequence.mixers.sparse_attention import occurred_before
from gatewise.networks.sequence.zoology import MIXERS, ZoologyConfig, ZoologyNet
from gatewise.ops.long_convolution import long_convolution, long_convolution_reference
from gatewise.ops.taylor_linear_attention import taylor_linear_attention, taylor_linear_attention_reference
from gatewise.ops.weighted_key_value import weighted_key_value, weighted_key_value_reference

EXAMPLE_INPUTS = (3, 45, 30, 44, 0, 0, 30, 0, 3)
EXAMPLE_TARGETS = {6: 44, 8: 45}
"""The first row of 2 pairs in 16 tokens of 64 from seed 0, as the published generator draws it; later tokens are 0."""

PUBLISHED_SEEDS = (843828734, 914636141, 1228959102, 3987752258, 3121803228, 2967327842)
"""Of three segments for training and three for validation, from seed 123."""

NO_RECALL = Published("recall of gated convolutions", "above 90 % once the width reaches the length", "figure 2")
STATE = Published("recall of networks with a state", "more pairs need a larger state", "figure 2 and section 4")
CLOSED = Published("gap closed by sparse attention", "97.4 %", "section 5, table 2")
AT_RANDOM = Published("perplexity of recall tokens: random, by rule", "6.17, 2.35", "table 2")

PAIRS, LENGTH, VOCABULARY = 8, 32, 64


def check_generator(run: Run) -> Finding:
    """The worked example, the seeds of segments, answers, and the fast generator's distribution."""
    inputs, targets = (torch.from_numpy(array) for array in exact_examples(Segment(2, 16, 4), Rules(64), seed=0))
    expected_inputs, expected_targets = torch.zeros(16, dtype=torch.int64), torch.full((16,), IGNORED)
    expected_inputs[: len(EXAMPLE_INPUTS)] = torch.tensor(EXAMPLE_INPUTS)
    expected_targets[list(EXAMPLE_TARGETS)] = torch.tensor(list(EXAMPLE_TARGETS.values()))
    wrong = int((inputs[0] != expected_inputs).sum() + (targets[0] != expected_targets).sum())
    train, val = segment_seeds(123, 3, 3)
    other = sum(ours != theirs for ours, theirs in zip([*train, *val], PUBLISHED_SEEDS, strict=True))
    drawn = [_drawn(make, run.seed) for make in (exact_examples, fast_examples)]
    places = [pair_at_place(batch) for batch in drawn]
    return Finding(
        measured=(
            Measured("tokens that differ from the worked example", exact(wrong), "", between(0, 0)),
            Measured("segment seeds that differ from the published ones", exact(other), "", between(0, 0)),
            Measured(
                "questions whose answer is not beside the key",
                exact(sum(map(misled, drawn))),
                "",
                between(0, 0),
            ),
            # A share of 4,000 examples deviates by 0.008 at most; 64 differences of two hardly reach 0.05.
            Measured(
                "largest difference of a share, exact and fast generator",
                exact((places[0] - places[1]).abs().max().item()),
                "",
                at_most(0.05),
            ),
        ),
    )


def _drawn(make: Callable[..., Any], seed: int) -> Batch:
    return tuple(torch.from_numpy(array) for array in make(Segment(PAIRS, LENGTH, 4000), Rules(VOCABULARY), seed))


def misled(batch: Batch) -> int:
    """Questions whose target is not the token behind their key among the pairs."""
    inputs, targets = batch
    rows, places = (targets != IGNORED).nonzero(as_tuple=True)
    keys, values = inputs[rows, 0 : 2 * PAIRS : 2], inputs[rows, 1 : 2 * PAIRS : 2]
    found = (keys == inputs[rows, places][:, None]) & (values == targets[rows, places][:, None])
    return int((found.sum(dim=1) != 1).sum())


def pair_at_place(batch: Batch) -> Tensor:
    """Share of all sequences that ask for a pair (column, in the order given) at a place behind the pairs (row)."""
    inputs, targets = batch
    values = inputs[:, 1 : 2 * PAIRS : 2]
    asks_for = targets[:, 2 * PAIRS :, None] == values[:, None]
    return asks_for.float().mean(dim=0)


def by_place_alone(task: Recall) -> float:
    """% right of naming at each place the pair that is most often asked for there, whatever the key is."""
    batch = task.batch(4000, generator(0))
    return 100 * pair_at_place(batch).amax(dim=1).sum().item() / PAIRS


def check_mixers(run: Run) -> Finding:
    """Operators against their definitions; every mixer's causality; sparse against full attention."""
    draw = generator(run.seed)
    x, taps = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((2, 50, 8), (50, 8)))
    q, k, v = (torch.randn(2, 150, 2, width, generator=draw, dtype=torch.float64) for width in (8, 8, 16))
    fading = (x, x.flip(1), -torch.rand(8, generator=draw, dtype=torch.float64), taps[0])
    operators = {
        "FFT against direct convolution": (long_convolution(x, taps), long_convolution_reference(x, taps)),
        "Based, linear against quadratic view": (
            taylor_linear_attention(q, k, v)[0],
            taylor_linear_attention_reference(q, k, v),
        ),
        "RWKV, recurrence against direct sum": (weighted_key_value(*fading)[0], weighted_key_value_reference(*fading)),
    }
    changes = [changes_around(name, run.seed) for name in MIXERS]
    sparse = sparse_errors(run.seed)
    return Finding(
        measured=(
            *(
                Measured(what, exact(relative_difference(ours, theirs)), "", at_most(1e-12))
                for what, (ours, theirs) in operators.items()
            ),
            Measured(
                f"change before a changed token, largest of {len(MIXERS)} mixers",
                exact(max(before for before, _ in changes)),
                "",
                at_most(1e-12),
            ),
            Measured("change from there on, smallest", exact(min(after for _, after in changes)), "", at_least(0.01)),
            *(
                Measured(
                    f"attention by the rule against full, {where}",
                    exact(error),
                    "",
                    at_least(0.01) if where == "elsewhere" else at_most(1e-4),
                )
                for where, error in sparse.items()
            ),
        ),
        remark="In float64, but for the last three lines. The rule is that a token attends if it occurred before. Keys "
        "that are asked for did, and attention in the last layer matters where something is asked: the rule loses "
        "nothing, in training neither.",
    )


@torch.no_grad()
def changes_around(mixers: str, seed: int) -> tuple[float, float]:
    """The largest change of the hidden states before a token that is changed, and from there on."""
    config = ZoologyConfig(VOCABULARY, 16, mixers=mixers, max_length=24, linear_heads=2, kernel_size=(3, -1))
    network = randomise(build(seed, lambda: ZoologyNet(config)), seed).double()
    tokens = torch.randint(VOCABULARY, (2, 24), generator=generator(seed))
    changed = tokens.clone()
    changed[:, 13] = (changed[:, 13] + 1) % VOCABULARY
    ours, theirs = (network.forward_features(row)[0] for row in (tokens, changed))
    return relative_difference(ours[:, :13], theirs[:, :13]), relative_difference(ours[:, 13:], theirs[:, 13:])


def sparse_errors(seed: int) -> dict[str, float]:
    """How far attention by the rule is from full attention of equal weights, in logits and gradients."""
    rule = randomise(build(seed, partial(make_network, RULE, 32)), seed)
    full = with_mixers(rule, FULL)
    batch = TASK.batch(50, generator(seed))
    with torch.no_grad():
        ours, theirs = rule(batch[0]), full(batch[0])
    asks = batch[1] != IGNORED
    gradients = []
    for network in (rule, full):
        TASK.loss(network, batch).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    return {
        "at questions": relative_difference(ours[asks], theirs[asks]),
        "gradients of the loss": relative_difference(*gradients),
        "elsewhere": relative_difference(ours[~asks], theirs[~asks]),
    }


FULL, RULE, LEARNED = "BaseConv + attention", "attention by the rule", "attention by score"
KINDS = {
    FULL: "base_conv,attention",
    "BaseConv + Based": "base_conv,based",
    "BaseConv + GLA": "base_conv,gla",
    "BaseConv": "base_conv",
    "attention alone": "attention",
}
SPARSE = {RULE: "base_conv,sparse_programmatic", LEARNED: "base_conv,sparse_learned"}

DIMS = (16, 32, 64)
NARROWEST, MIDDLE, WIDEST = DIMS
SCHEDULE = Schedule(steps=600, batch_size=32, lr=7e-3)


class MixedRecall(Recall):
    """Recall in batches of 2, 4 or 8 pairs: on the easy ones the first steps are learnt sooner."""

    def __init__(self) -> None:
        super().__init__(PAIRS, LENGTH, VOCABULARY)
        self.segments = [Recall(pairs, LENGTH, VOCABULARY) for pairs in (2, 4, PAIRS)]

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        return self.segments[int(torch.randint(len(self.segments), (), generator=generator))].batch(size, generator)

    def loss(self, model: LanguageModel, batch: Batch) -> Tensor:
        """With the penalty of attention by score."""
        loss = super().loss(model, batch)
        return loss + model.auxiliary_loss() if isinstance(model, ZoologyNet) else loss


TASK = Recall(PAIRS, LENGTH, VOCABULARY)
"""Sequences on which accuracy is measured."""


def make_network(kind: str, dim: int) -> ZoologyNet:
    """Two layers without MLPs and without dropout, because no example is seen twice."""
    config = ZoologyConfig(
        vocab_size=VOCABULARY,
        dim=dim,
        mixers=(KINDS | SPARSE)[kind],
        max_length=LENGTH,
        # Attention alone does not know the order.
        max_positions=LENGTH if kind == "attention alone" else 0,
        kernel_size=(3, -1),
        feature_dim=8,
        # As many as there are questions.
        selected=PAIRS,
        embed_dropout=0.0,
        attention_dropout=0.0,
    )
    return init_by_fan_in(ZoologyNet(config))


def with_mixers(network: ZoologyNet, kind: str) -> ZoologyNet:
    """A network of another kind with the same weights, in eval mode."""
    other = build(0, partial(make_network, kind, network.config.dim))
    other.load_state_dict(network.state_dict())
    return other.eval()


Networks = Mapping[str, ZoologyNet]
"""By `cell`."""

Accuracies = dict[str, float]
"""% right, of one seed."""


def cell(kind: str, dim: int) -> str:
    """The name of a network in a comparison."""
    return f"{kind}, {dim}"


def train_and_test(
    run: Run, cells: Sequence[tuple[str, int]], repetitions: int, test: Callable[[Networks, Batch, int], Accuracies]
) -> list[Accuracies]:
    """Return the result of `test` on networks of these kinds and widths after equal training."""

    def once(seed: int) -> Accuracies:
        networks = {cell(kind, dim): build(seed, partial(make_network, kind, dim)) for kind, dim in cells}
        train_side_by_side(networks, MixedRecall(), SCHEDULE, seed=seed, run=run)
        return test(networks, TASK.batch(400, generator(seed + 500)), seed)

    return run.repeat(repetitions, once)


def minus(more: Sequence[float], less: Sequence[float]) -> Interval:
    """The difference within a seed."""
    return t_interval([a - b for a, b in zip(more, less, strict=True)])


def bars(title: str, points: Mapping[str, Sequence[float]]) -> Bars:
    """A bar with its interval for each label."""
    intervals = {label: t_interval(sample) for label, sample in points.items()}
    ends = {label: (one.value, one.low, one.high) for label, one in intervals.items()}
    chance, label = 100 / PAIRS, "one of the values, by chance"
    return Bars(title, "% right", ends, points, limit=chance, limit_label=label, x_range=(0, 105))


def compare_mixers(run: Run) -> Finding:
    """Accuracy of all mixers at all widths; attention by the rule has the weights of full attention."""

    def test(networks: Networks, unseen: Batch, seed: int) -> Accuracies:
        by_rule = {cell(RULE, dim): with_mixers(networks[cell(FULL, dim)], RULE) for dim in DIMS}
        return {name: TASK.percent_right(network, unseen) for name, network in {**networks, **by_rule}.items()}

    # The slowest first, so that none is left for the end.
    cells = [(kind, dim) for dim in reversed(DIMS) for kind in KINDS]
    return report_mixers(train_and_test(run, cells, 4, test))


def report_mixers(seeds: Sequence[Accuracies]) -> Finding:
    """Figures over seeds."""
    kinds = (FULL, RULE, *(kind for kind in KINDS if kind != FULL))
    accuracy = {kind: {dim: [one[cell(kind, dim)] for one in seeds] for dim in DIMS} for kind in kinds}
    full, gla, plain = accuracy[FULL], accuracy["BaseConv + GLA"], accuracy["BaseConv"]
    middle = {kind: row[MIDDLE] for kind, row in accuracy.items()}
    return Finding(
        measured=(
            *(Measured(f"accuracy, dim {MIDDLE}, {kind}", t_interval(middle[kind]), "%") for kind in kinds),
            Measured("one of the values in sight, by chance", exact(100 / PAIRS), "%"),
            Measured("the value asked for most often at this place", exact(by_place_alone(TASK)), "%"),
            Measured(
                f"accuracy, dim {NARROWEST}, BaseConv + attention", t_interval(full[NARROWEST]), "%", at_least(90, 50)
            ),
            Measured(f"accuracy, dim {WIDEST}, BaseConv", t_interval(plain[WIDEST]), "%", at_most(50), NO_RECALL),
            Measured(
                f"attention minus BaseConv, dim {WIDEST}", minus(full[WIDEST], plain[WIDEST]), "points", at_least(50, 0)
            ),
            Measured(
                f"attention minus GLA, dim {MIDDLE}", minus(full[MIDDLE], gla[MIDDLE]), "points", at_least(20, 0), STATE
            ),
            Measured(
                f"GLA, dim {WIDEST} minus dim {NARROWEST}",
                minus(gla[WIDEST], gla[NARROWEST]),
                "points",
                at_least(30, 0),
                STATE,
            ),
        ),
        charts=(
            Lines(
                f"Recall of {PAIRS} pairs in {LENGTH} tokens, mean over seeds",
                "dim",
                "% right",
                DIMS,
                {kind: [t_interval(row[dim]).value for dim in DIMS] for kind, row in accuracy.items()},
                log="x",
                y_range=(0, 105),
            ),
            bars(f"The same at dim {MIDDLE}", middle),
        ),
        remark="Two layers of attention alone wait for a jump that takes thousands of steps: that they fail here is no "
        "sign that they cannot recall. Attention by the rule is what full attention is, as shown above.",
    )


RANDOM, EVERYWHERE = "attention at random", "attention by score, everywhere as in training"


def choose_positions(run: Run) -> Finding:
    """Attention everywhere, by the rule, by a learned score and at random positions, at the middle width."""

    def test(networks: Networks, unseen: Batch, seed: int) -> Accuracies:
        kinds = {name: networks[cell(name, MIDDLE)] for name in (FULL, LEARNED, "BaseConv")}
        kinds[RULE] = with_mixers(kinds[FULL], RULE)
        found = {name: TASK.percent_right(network, unseen) for name, network in kinds.items()}
        found[RANDOM] = at_random_positions(kinds[RULE], unseen, seed)
        return found | {EVERYWHERE: TASK.percent_right(kinds[LEARNED].train(), unseen)}

    cells = [(kind, MIDDLE) for kind in (LEARNED, FULL, "BaseConv")]
    return report_choices(train_and_test(run, cells, 5, test))


@torch.no_grad()
def at_random_positions(network: ZoologyNet, batch: Batch, seed: int) -> float:
    """% right of attention by the rule if as many positions attend as the rule chooses in each sequence, but any."""
    tokens, targets = batch
    counts = occurred_before(tokens).sum(dim=1, keepdim=True)
    order = torch.rand(tokens.shape, generator=generator(seed)).argsort(dim=1).argsort(dim=1)
    hidden, _ = network.mix(network.embed(tokens), [None] * network.config.depth, None, order < counts)
    right = network.logits(hidden[targets != IGNORED]).argmax(dim=-1) == asked(batch)
    return 100 * right.float().mean().item()


def report_choices(seeds: Sequence[Accuracies]) -> Finding:
    """Figures over seeds."""
    names = (FULL, RULE, RANDOM, LEARNED, EVERYWHERE, "BaseConv")
    accuracy = {name: [one[name] for one in seeds] for name in names}
    return Finding(
        measured=(
            *(Measured(f"accuracy, {name}", t_interval(sample), "%") for name, sample in accuracy.items()),
            *_shares(accuracy),
            Measured(
                "by the rule minus at random, as many positions",
                minus(accuracy[RULE], accuracy[RANDOM]),
                "points",
                at_least(20, 0),
                AT_RANDOM,
            ),
        ),
        charts=(bars(f"Where to attend, dim {MIDDLE}", {n: s for n, s in accuracy.items() if n != EVERYWHERE}),),
        remark="The rule loses nothing by design, since attention stands in the last layer. Scores are trained with "
        "attention everywhere, and a few hundred steps hardly teach them which positions to choose.",
    )


def _shares(accuracy: Mapping[str, Sequence[float]]) -> Iterator[Measured]:
    """How much of the gap between attention and BaseConv is closed, in %, where there is one."""
    for kind in SPARSE:
        rows = zip(accuracy[FULL], accuracy[kind], accuracy["BaseConv"], strict=True)
        shares = [100 * (sparse - plain) / (full - plain) for full, sparse, plain in rows if full > plain]
        if shares:
            what = f"share of the gap that {kind} closes"
            yield Measured(what, t_interval(shares), "%", at_least(80, 0), CLOSED)


CLAIM = Claim(
    statement="Recall tells sequence mixers apart: attention looks up any pair at a constant width, gated convolutions "
    "need width that grows with the length and recurrences a state that grows with the pairs, and attention at a few "
    "positions, chosen by what stands there, closes the gap.",
    source="Arora et al. 2023, abstract and sections 4 and 5",
    published=(
        Published("share of the perplexity gap to attention that is recall", "82 % on average", "table 1"),
        Published("perplexity, 360M: attention, Hyena, RWKV-4", "9.44, 10.07, 9.79", "table 1"),
        Published("the same on recall tokens", "1.98, 3.83, 3.82", "table 1"),
        CLOSED,
    ),
    design="The generator is held against its worked example, the operators against their definitions, and every mixer "
    f"is tested for looking ahead. Then decoders of two layers learn to recall 2, 4 or {PAIRS} pairs within {LENGTH} "
    f"tokens at widths of 16, 32 and 64, and are tested on {PAIRS}. Behind a short gated convolution (BaseConv), which "
    "can join a key to its value, the second layer is a long BaseConv, GLA, Based, attention, or attention at a few "
    f"positions: by the rule that the token occurred before, or at those with the {PAIRS} highest learned scores.",
    limits="One learning rate, a few hundred steps and sequences of 32 tokens, where the paper takes the best of four "
    "rates, 64 epochs and up to 512 tokens: this shows which mixers learn recall quickly, not which can learn it at "
    "all. Positions chosen by the rule include fillers, so that nearly half of all attend. Text is not part of it.",
    cautions=(
        "Two layers of attention alone, with learned positions, stay at chance for thousands of steps and then learn "
        "the task in a jump: to check a set-up quickly, take BaseConv + attention.",
        "A mixer that fails here at some width may need more steps, or another learning rate.",
        "Trained on 8 pairs alone, BaseConv + attention jumps early or late from seed to seed; easier sequences among "
        "the hard ones make it come early.",
    ),
    budget_s=230,
    parts=(
        Part("Generator", "The published example and seeds; answers; the fast generator.", check_generator, 2),
        Part("Mixers", "Operators and mixers against their definitions.", check_mixers, 2),
        Part(
            "Recall",
            f"Five pairs of layers at three widths, {SCHEDULE.steps} steps of {SCHEDULE.batch_size} sequences; "
            "accuracy on 400 new ones.",
            compare_mixers,
            165,
        ),
        Part(
            "Where to attend",
            f"Attention at positions chosen by the rule, by score and at random; width {MIDDLE}, as many steps.",
            choose_positions,
            45,
        ),
    ),
)
