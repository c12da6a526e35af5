"""Gated attention in miniature: what a gate behind attention makes of a decoder, and of a head with nothing to say.

A layer is taken apart for what the gate changes in principle. Then decoders of equal size learn text with and without
gates, at two learning rates. Last, one layer learns to speak rarely, where it could park its attention on the first
token, and where it could not.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from gatewise.claims.gated_attention.rare_copy import CONTENT, FLAG, RareCopy
from gatewise.claims.lab.base import Claim, Finding, Measured, Part, Published, at_least, at_most, between
from gatewise.claims.lab.checks import generator, relative_difference
from gatewise.claims.lab.intervals import exact, t_interval
from gatewise.claims.lab.plot import Bars
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.tokens import ByteText
from gatewise.claims.lab.training import Batch, Schedule, build, init_by_fan_in, train_side_by_side
from gatewise.gates.attention import NEAR_ZERO, attention_diagnostics
from gatewise.networks.sequence.gated_attention import Gate, GatedAttention, GatedAttentionConfig, GatedAttentionDecoder

SMALL: dict[str, Any] = {"dim": 32, "depth": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "hidden_dim": 48}
LINEAR: dict[str, Gate | None] = {"without a gate": None, "gate on keys": Gate("G3"), "gate on queries": Gate("G4")}
NON_LINEAR: dict[str, Gate | None] = {"gate behind attention": Gate("G1"), "gate on values": Gate("G2")}

_TABLE_1, _TABLE_4 = "table 1", "table 4"
PERPLEXITY = {
    "by head": Published("perplexity of 15B-A2.5B: no gate, by head", "6.026, 5.792", _TABLE_1),
    "by channel": Published("the same: no gate, by channel", "6.026, 5.761", _TABLE_1),
    "never below half": Published("the same: no gate, never below half", "6.026, 5.900", _TABLE_4),
}
FIRST = {
    "no gate": Published("first-token attention, no gate", "46.7 %", _TABLE_4, 46.7),
    "by head": Published("the same, by head", "7.3 %", _TABLE_4, 7.3),
    "by channel": Published("the same, by channel", "4.8 %", _TABLE_4, 4.8),
    "never below half": Published("the same, never below half", "45.1 %", _TABLE_4, 45.1),
}
SCORES = {
    "by head": Published("mean gate score, by head", "0.172", _TABLE_4),
    "by channel": Published("the same, by channel", "0.116", _TABLE_4),
}
LARGEST = Published("largest activation: no gate, by channel", "1053, 94", _TABLE_4)


def make_layer(seed: int, gate: Gate | None) -> GatedAttention:
    """A layer in float64; layers of one seed share all weights but those of the gate."""
    layer = GatedAttention(GatedAttentionConfig(vocab_size=1, gate=gate, **SMALL)).double()
    draw = generator(seed)
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"):
            projection = getattr(layer, name)
            if projection is not None and not (name == "gate_proj" and gate is not None and gate.init == "zeros"):
                weight = torch.randn(projection.weight.shape, generator=draw, dtype=torch.float64)
                projection.weight.copy_(weight / projection.in_features**0.5)
    return layer.eval()


@torch.no_grad()
def superposition_error(layer: GatedAttention, seed: int) -> float:
    """How far a layer that sees one token at a time is from linear: 0 for a linear map of the token."""
    x, y = torch.randn(2, 256, 1, SMALL["dim"], generator=generator(seed), dtype=torch.float64)
    separately = 0.7 * layer(x)[0] - 1.3 * layer(y)[0]
    return relative_difference(layer(0.7 * x - 1.3 * y)[0], separately)


@torch.no_grad()
def check_identities(run: Run) -> Finding:
    """Closed forms of the gate, the layer as a map of a single token, and decoding from a cache."""
    x = torch.randn(3, 17, SMALL["dim"], generator=generator(run.seed), dtype=torch.float64)
    plain, halved = (make_layer(run.seed, gate) for gate in (None, Gate(init="zeros")))
    half = relative_difference(halved.attention_output(x), plain.attention_output(x) / 2)
    by_head, by_channel = (make_layer(run.seed, Gate(granularity=kind)) for kind in ("headwise", "elementwise"))
    repeated = by_head.state_dict()
    repeated["gate_proj.weight"] = repeated["gate_proj.weight"].repeat_interleave(SMALL["head_dim"], dim=0)
    by_channel.load_state_dict(repeated)
    return Finding(
        measured=(
            Measured("gate with zero weights against half of no gate", exact(half), "", between(0, 0)),
            Measured(
                "gate by channel, rows repeated, against gate by head",
                exact(relative_difference(by_channel(x)[0], by_head(x)[0])),
                "",
                at_most(1e-12),
            ),
            Measured("prefill and decoding against the whole", exact(decoding_error(run.seed)), "", at_most(1e-12)),
            *(
                Measured(f"one token, {name}: from linear", exact(superposition_error(layer, run.seed)), "", expected)
                for gates, expected in ((LINEAR, at_most(1e-12)), (NON_LINEAR, at_least(0.1)))
                for name, layer in ((name, make_layer(run.seed, gate)) for name, gate in gates.items())
            ),
        ),
        remark="A token that sees itself alone attends to itself with weight 1: without a gate the layer is one linear "
        "map, whatever stands on queries and keys.",
    )


def decoding_error(seed: int) -> float:
    """Logits of a gated decoder, all tokens at once against a prompt and single tokens behind it."""
    config = GatedAttentionConfig(vocab_size=50, gate=Gate(), **SMALL)
    model = build(seed, lambda: init_by_fan_in(GatedAttentionDecoder(config))).double().eval()
    tokens = torch.randint(50, (2, 21), generator=generator(seed))
    hidden, state = model.forward_features(tokens[:, :9])
    pieces = [hidden]
    for token in tokens[:, 9:].split(1, dim=1):
        hidden, state = model.forward_features(token, state)
        pieces.append(hidden)
    return relative_difference(model.logits(torch.cat(pieces, dim=1)), model(tokens))


KINDS: dict[str, Gate | None] = {
    "no gate": None,
    "by head": Gate(granularity="headwise"),
    "by channel": Gate(),
    "never below half": Gate(activation="ns_sigmoid"),
}
JUDGED = ("by head", "by channel")

CONTEXT = 64
RATES = {"normal": 4e-3, "tenfold": 4e-2}
STEPS, WINDOWS = 600, 8
# As wide as keeps the number of parameters equal, as in the paper's dense models.
PERCEPTRONS = {"no gate": 150, "by head": 149, "by channel": 128, "never below half": 128}


def make_decoder(kind: str) -> GatedAttentionDecoder:
    """Two blocks of width 64."""
    config = GatedAttentionConfig(
        vocab_size=256,
        dim=64,
        depth=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        hidden_dim=PERCEPTRONS[kind],
        gate=KINDS[kind],
    )
    return init_by_fan_in(GatedAttentionDecoder(config))


def uniform_first_token(length: int) -> float:
    """Return the share of uniform attention on the first token, averaged over all later queries."""
    return statistics.fmean(1 / (t + 1) for t in range(1, length))


def read_decoder(model: GatedAttentionDecoder, task: ByteText) -> dict[str, float]:
    """Validation loss and diagnostics of a trained decoder."""
    found = attention_diagnostics(model, task.validation_batches(32, 1)[0][0])
    small = [layer.near_zero[NEAR_ZERO[0]] for layer in found.layers if layer.near_zero is not None]
    return {
        "loss": task.validation_loss(model),
        "first": 100 * found.first_token_attention,
        "largest": found.largest_activation,
        "gate": found.gate_score,
        "near zero": 100 * statistics.fmean(small),
    }


Readings = Mapping[str, Mapping[str, float]]
"""Kind -> figure, of one seed."""


def values(seeds: Sequence[Readings], kind: str, figure: str) -> list[float]:
    """One figure over the seeds."""
    return [one[kind][figure] for one in seeds]


def excess(seeds: Sequence[Readings], more: str, less: str, figure: str) -> list[float]:
    """By how much a figure of one kind exceeds that of another, within each seed."""
    return [a - b for a, b in zip(values(seeds, more, figure), values(seeds, less, figure), strict=True)]


def bars(title: str, unit: str, points: Mapping[str, Sequence[float]], **options: Any) -> Bars:
    """A bar with its interval for each label."""
    intervals = {label: t_interval(sample) for label, sample in points.items()}
    ends = {label: (one.value, one.low, one.high) for label, one in intervals.items()}
    return Bars(title, unit, ends, points, **options)


def compare_on_text(run: Run) -> Finding:
    """Loss, attention to the first token and gates after equal training at both rates."""
    task = ByteText(CONTEXT)

    def once(seed: int) -> dict[str, Readings]:
        found: dict[str, Readings] = {}
        for name, rate in RATES.items():
            models = {kind: build(seed, partial(make_decoder, kind)) for kind in KINDS}
            train_side_by_side(models, task, Schedule(STEPS, WINDOWS, rate), seed=seed, run=run)
            found[name] = {kind: read_decoder(model, task) for kind, model in models.items()}
        return found

    seeds = run.repeat(4, once)
    return report_text(*([one[rate] for one in seeds] for rate in RATES))


def report_text(normal: Sequence[Readings], tenfold: Sequence[Readings]) -> Finding:
    """Figures over seeds at the normal rate and at ten times that."""
    gains = {
        f"{rate} rate: {kind}": excess(seeds, "no gate", kind, "loss")
        for rate, seeds in (("normal", normal), ("tenfold", tenfold))
        for kind in KINDS
        if kind != "no gate"
    }
    steadier = [b - a for a, b in zip(gains["normal rate: by channel"], gains["tenfold rate: by channel"], strict=True)]
    first = {kind: values(normal, kind, "first") for kind in KINDS}
    return Finding(
        measured=(
            Measured("loss, normal rate, no gate", t_interval(values(normal, "no gate", "loss")), "nats/byte"),
            Measured("loss, tenfold rate, no gate", t_interval(values(tenfold, "no gate", "loss")), "nats/byte"),
            *(_gain(name, gain) for name, gain in gains.items()),
            Measured("what by channel gains more at the tenfold rate", t_interval(steadier), "nats/byte", at_least(0)),
            *(
                Measured(f"first-token attention, {kind}", t_interval(first[kind]), "%", None, FIRST[kind])
                for kind in KINDS
            ),
            Measured("the same of uniform attention", exact(100 * uniform_first_token(CONTEXT)), "%"),
            *(
                Measured(f"gate score, {kind}", t_interval(values(normal, kind, "gate")), "", None, SCORES[kind])
                for kind in JUDGED
            ),
            *(
                Measured(f"head outputs below 0.01, {kind}", t_interval(values(normal, kind, "near zero")), "%")
                for kind in KINDS
            ),
            *(
                Measured(f"largest activation, {kind}", t_interval(values(normal, kind, "largest")), "", None, LARGEST)
                for kind in ("no gate", "by channel")
            ),
        ),
        charts=(
            bars("What a gate gains on text", "nats per byte, no gate minus gate", gains, limit=0),
            bars(
                "Attention on the first token, text",
                "%, first query left out",
                first,
                published={kind: one.value for kind, one in FIRST.items() if one.value is not None},
                limit=100 * uniform_first_token(CONTEXT),
                limit_label="uniform attention",
                x_range=(0, 60),
            ),
        ),
        remark="Less on the first token than uniform attention gives it is no sink: at this size none forms, with or "
        "without a gate, nor do massive activations. Their figures are reported, not judged.",
    )


def _gain(name: str, gain: Sequence[float]) -> Measured:
    rate, _, kind = name.partition(" rate: ")
    return Measured(
        f"gain, {rate} rate, {kind}",
        t_interval(gain),
        "nats/byte",
        at_least(0) if kind in JUDGED else None,
        PERPLEXITY[kind] if rate == "normal" else None,
    )


SPEAKING = Schedule(steps=600, batch_size=32, lr=5e-3)


def make_speaker(kind: str) -> GatedAttention:
    """A single layer, without a residual or MLP that could undo its output, and without positions."""
    config = GatedAttentionConfig(
        vocab_size=1,
        dim=CONTENT + 3 * FLAG,
        depth=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        hidden_dim=1,
        rope_theta=None,
        gate=KINDS[kind],
    )
    return init_by_fan_in(GatedAttention(config))


@torch.no_grad()
def read_speaker(layer: GatedAttention, task: RareCopy, batch: Batch) -> dict[str, float]:
    """Return the missed share in % (100 if always silent), attention on the first token in %, and gate scores.

    The last two are means over ordinary tokens, where nothing is asked.
    """
    inputs, targets, triggers = batch
    ordinary = ~triggers
    # The first query can look nowhere else.
    ordinary[:, 0] = False
    first = layer.attention_weights(inputs)[..., 0].mean(dim=1)
    found = {
        "missed": 100 * (task.loss(layer, batch) / targets.square().sum(dim=-1).mean()).item(),
        "first": 100 * first[ordinary].mean().item(),
    }
    scores = layer.gate_scores(inputs)
    if scores is not None:
        scores = scores.mean(dim=(-2, -1))
        found |= {"gate": scores[ordinary].mean().item(), "gate at triggers": scores[triggers].mean().item()}
    return found


def learn_to_speak(run: Run, constant_first: bool) -> list[Readings]:
    """Return the readings of layers of all kinds after equal training, one per seed."""
    task = RareCopy(constant_first)

    def once(seed: int) -> Readings:
        layers = {kind: build(seed, partial(make_speaker, kind)) for kind in KINDS}
        train_side_by_side(layers, task, SPEAKING, seed=seed, run=run)
        unseen = task.batch(400, generator(seed + 500))
        return {kind: read_speaker(layer, task, unseen) for kind, layer in layers.items()}

    return run.repeat(5, once)


def offer_a_sink(run: Run) -> Finding:
    """Layers that can park their attention on a constant first token."""
    seeds = learn_to_speak(run, constant_first=True)
    first = {kind: values(seeds, kind, "first") for kind in KINDS}
    return Finding(
        measured=(
            Measured(
                "first-token attention, no gate", t_interval(first["no gate"]), "%", at_least(50), FIRST["no gate"]
            ),
            Measured(
                "first-token attention, no gate minus by channel",
                t_interval(excess(seeds, "no gate", "by channel", "first")),
                "points",
                at_least(30, 0),
                FIRST["by channel"],
            ),
            Measured("gate where nothing is asked, by channel", t_interval(values(seeds, "by channel", "gate"))),
            Measured("gate at triggers, by channel", t_interval(values(seeds, "by channel", "gate at triggers"))),
            *(Measured(f"missed, {kind}", t_interval(values(seeds, kind, "missed")), "%") for kind in KINDS),
        ),
        charts=(bars("A sink on offer: attention on it where nothing is asked", "%", first, x_range=(0, 105)),),
        remark="Every kind of layer learns the sink that stands ready, within a hundred steps; then nothing is left to "
        "be gained by closing a gate further. That gates keep sinks away is not what a single layer shows.",
    )


def offer_no_sink(run: Run) -> Finding:
    """Layers that have nowhere to park their attention."""
    seeds = learn_to_speak(run, constant_first=False)
    missed = {kind: values(seeds, kind, "missed") for kind in KINDS}
    opened = [one["by channel"]["gate at triggers"] - one["by channel"]["gate"] for one in seeds]
    return Finding(
        measured=(
            *(Measured(f"missed, {kind}", t_interval(sample), "%") for kind, sample in missed.items()),
            *(
                Measured(
                    f"missed, no gate minus {kind}",
                    t_interval(excess(seeds, "no gate", kind, "missed")),
                    "points",
                    at_least(30, 0),
                )
                for kind in JUDGED
            ),
            Measured(
                "missed, never below half minus by channel",
                t_interval(excess(seeds, "never below half", "by channel", "missed")),
                "points",
                at_least(10, 0),
            ),
            Measured("gate at triggers minus elsewhere, by channel", t_interval(opened), "", at_least(0.3, 0)),
        ),
        charts=(bars("No sink on offer: what is missed", "%; 100 is always silent", missed, x_range=(0, 105)),),
        remark="Weights that add up to 1 must read something: without a gate the layer says less at triggers so as to "
        "be less wrong elsewhere. A gate that closes takes the place of the sink; one that stops at a half does not.",
    )


CLAIM = Claim(
    statement="A sigmoid gate on the output of softmax attention lowers the loss, keeps training calm at large "
    "learning rates, and lets a head say nothing, so that attention needs no sink on the first token.",
    source="Qiu et al. 2025, abstract and sections 3 and 4",
    published=(
        Published("perplexity of 15B-A2.5B: no gate, by head, by channel", "6.026, 5.792, 5.761", _TABLE_1),
        Published("perplexity of 48 layers at rates 4e-3 and 8e-3, no gate", "7.421, 9.195", "table 2"),
        Published("the same, by head", "7.370, 7.325", "table 2"),
        Published("first-token attention: no gate, by head, by channel", "46.7, 7.3, 4.8 %", _TABLE_4),
        Published("RULER at 128k after YaRN: no gate, gated", "31.65, 58.82", "table 5"),
    ),
    design="A layer is examined: closed gate, one token at a time, decoding. Then decoders (two blocks of width 64, "
    "equal parameters) learn bytes of Python's standard library at a learning rate and at ten times that. Last, a "
    "single layer is to repeat a vector at rare triggers and to give zeros everywhere else: with a constant first "
    "token, on which attention can be parked, and without one. Gates are by head, by channel, and by channel but never "
    "below one half (0.5 + 0.5 sigmoid).",
    limits="Two blocks and a few hundred steps: on text no sink forms at this size, so that none can be removed; a "
    "single layer must stand for the mechanism. The paper's networks are ten thousand times larger.",
    cautions=(
        "First-token attention of small or briefly trained networks says little: compare it with uniform attention.",
        "A gate added to a trained network does not remove the sink that is there already, as the paper reports.",
        "A gate by channel adds a projection as large as that of the queries: compare at equal parameters, as here.",
    ),
    budget_s=230,
    parts=(
        Part(
            "Identities", "Closed gates, superposition of single tokens, and decoding, in float64.", check_identities, 2
        ),
        Part(
            "Text",
            f"Four decoders, {STEPS} steps of {WINDOWS} windows of {CONTEXT} bytes at rates "
            f"{' and '.join(f'{rate:g}' for rate in RATES.values())}; differences within a seed.",
            compare_on_text,
            160,
        ),
        Part(
            "A sink on offer",
            f"One layer, silent but at triggers, with a constant first token: {SPEAKING.steps} steps of "
            f"{SPEAKING.batch_size} sequences of {RareCopy.length} vectors.",
            offer_a_sink,
            27,
        ),
        Part("No sink on offer", "The same with an ordinary first token.", offer_no_sink, 27),
    ),
)
