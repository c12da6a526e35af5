"""Language models from a recipe to text."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

import gatewise
from gatewise.data.text.tokenizers import ByteTokenizer
from gatewise.errors import UserError
from gatewise.tasks import LanguageEvaluation, evaluate, generate, load_trained, train
from gatewise.tasks.language_modeling import prompt_tokens, read_samples
from gatewise.tasks.logs import read_log
from gatewise.tasks.sources import open_source
from gatewise.tasks.trained import build_model
from gatewise.tasks.training import _build_task, build_data, with_data
from tests.data.test_tokenizers import byte_level
from tests.tasks.conftest import assert_same_checkpoint
from tests.tasks.test_resume import Crash

ONE_EPOCH = {"trainer.epochs": 1, "trainer.limit_train_batches": 3}


@pytest.fixture
def make_task(text_recipe):
    def make(overrides=None):
        recipe = text_recipe(overrides)
        data = build_data(recipe)
        data.setup()
        recipe = with_data(recipe, data)
        return _build_task(recipe, build_model(recipe), data)

    return make


def without_speed(path):
    rows = [{k: v for k, v in row.items() if k != "train/tokens_per_second"} for row in read_log(path)]
    return [row for row in rows if len(row) > 2]


def test_training_learns_and_logs_loss_perplexity_bits_per_byte_and_speed(text_recipe):
    fields = {"trainer.epochs": 6, "trainer.limit_train_batches": None, "trainer.limit_val_batches": None}
    result = train(text_recipe(fields))
    losses = [row["val/loss"] for row in read_log(result.folder / "metrics.csv") if "val/loss" in row]
    # Five letters, ten digits and a blank make most of the text: a third of the nats of 256 equal bytes.
    assert losses[-1] < math.log(256) / 2.5
    assert result.metrics["val/loss"] == min(losses)
    assert result.metrics["val/perplexity"] == pytest.approx(math.exp(result.metrics["val/loss"]), rel=1e-5)
    speeds = [row for row in read_log(result.folder / "metrics.csv") if row.get("train/tokens_per_second", 0) > 0]
    assert len(speeds) >= result.steps - 2 * 6


def test_bits_per_byte_divide_by_the_bytes_of_the_text_alone(make_task):
    task = make_task()
    assert isinstance(task.data.tokenizer, ByteTokenizer)
    ratio = task.data.bytes_per_token("val")
    assert ratio < 1
    task.bits_per_byte.update(torch.tensor(2.0), weight=5)
    assert task.bits_per_byte.compute().item() == pytest.approx(2 / math.log(2) / ratio)


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_the_loss_is_the_cross_entropy_of_all_logits(make_task, packing):
    task = make_task({"data.packing": packing, "task.chunk_size": 5, "data.context": 150, "data.batch_size": 2})
    tokens, targets = next(iter(task.data.train_dataloader()))
    loss, hidden = task.loss(tokens, targets)
    assert hidden.shape == (2, 150, 16)
    rows = []
    for row in tokens:
        ends = [0, *((row == 0).nonzero()[:, 0] + 1).tolist(), 150] if packing == "documents" else [0, 150]
        pieces = [row[None, low:high] for low, high in pairwise(ends) if high > low]
        rows.append(torch.cat([task.model(piece) for piece in pieces], dim=1))
    expected = F.cross_entropy(torch.cat(rows).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert (packing == "documents") == bool((targets == -100).any())


def test_best_is_the_lowest_loss(text_recipe, monkeypatch):
    from gatewise.tasks.language_modeling import LanguageModeling

    scores = iter([0.5, 0.25, 0.75])
    monkeypatch.setattr(LanguageModeling, "monitor", "val/given")
    monkeypatch.setattr(LanguageModeling, "on_validation_epoch_end", lambda self: self.log("val/given", next(scores)))
    result = train(text_recipe({**ONE_EPOCH, "trainer.epochs": 3}))
    assert (result.metrics["val/given"], result.metrics["epoch"]) == (0.25, 1)


@pytest.mark.parametrize("steps", [4, 5, 12])
def test_a_run_of_steps_ends_after_them_with_a_validation(text_recipe, steps):
    result = train(text_recipe({"trainer.steps": steps, "trainer.epochs": 1}))
    assert result.steps == steps
    log = read_log(result.folder / "metrics.csv")
    assert [row["step"] for row in log if "val/loss" in row][-1] == steps - 1
    rates = [row["train/lr"] for row in log if "train/lr" in row]
    assert len(rates) == steps
    assert rates[-1] == pytest.approx(1e-2 * (1 + math.cos(math.pi * (steps - 1) / steps)) / 2)
    again = train(text_recipe({"trainer.steps": steps, "trainer.epochs": 1}), resume=True)
    assert (again.steps, again.metrics) == (steps, result.metrics)


# Updates 1 to 5 are epoch 0; last.ckpt is written after every second one, and after each validation.
@pytest.mark.parametrize(
    ("at", "fields"),
    [
        pytest.param(3, {}, id="mid-epoch"),
        pytest.param(5, {}, id="between-epochs"),
        pytest.param(7, {"trainer.steps": 9}, id="of-steps"),
        pytest.param(4, {"trainer.accumulate": 2, "trainer.checkpoint_every": 1}, id="accumulating"),
    ],
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(text_recipe, at, fields):
    everything = {
        "data.packing": "documents",
        "data.context": 100,
        "data.batch_size": 2,
        "task.sample_every": 1,
        "task.sample_tokens": 8,
        "trainer.ema": 0.9,
        "trainer.checkpoint_every": 2,
        "optim.warmup_steps": 3,
        **fields,
    }
    whole = train(text_recipe(everything, output="whole"))
    recipe = text_recipe(everything, output="parts")
    with pytest.raises(RuntimeError, match="power cut"):
        train(recipe, callbacks=[Crash(at)])
    parts = train(recipe, resume=True)
    assert_same_checkpoint(whole.last, parts.last)
    assert_same_checkpoint(whole.best, parts.best)
    assert (parts.metrics, parts.steps) == (whole.metrics, whole.steps)
    logs = [without_speed(run.folder / "metrics.csv") for run in (parts, whole)]
    assert logs[0] == logs[1]
    assert (parts.folder / "samples.jsonl").read_text() == (whole.folder / "samples.jsonl").read_text()


def test_a_network_writes_as_often_as_asked(text_recipe):
    fields = {"task.sample_every": 2, "task.sample_prompt": "3 times", "task.sample_tokens": 5, "trainer.epochs": 5}
    result = train(text_recipe({**ONE_EPOCH, **fields}))
    rows = [json.loads(line) for line in (result.folder / "samples.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 6), (3, 12)]
    assert all(row["text"].startswith("3 times") for row in rows)


def test_without_a_prompt_a_document_is_begun():
    assert prompt_tokens(ByteTokenizer(), "").tolist() == [[0]]
    assert prompt_tokens(ByteTokenizer(), "ab").tolist() == [[97, 98]]


def test_what_the_network_adds_to_the_loss_is_added(make_task):
    task = make_task()
    tokens, targets = next(iter(task.data.train_dataloader()))
    plain, _ = task.loss(tokens, targets)
    task.model.auxiliary_loss = lambda: torch.tensor(2.5)
    assert task.loss(tokens, targets)[0].item() == pytest.approx(plain.item() + 2.5)


def test_a_compiled_network_trains_to_the_same(text_recipe, monkeypatch):
    def eager_backend(function, **options):
        return compile_(function, backend="eager", **options)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", eager_backend)
    plain = train(text_recipe(ONE_EPOCH, output="plain"))
    compiled = train(text_recipe({**ONE_EPOCH, "trainer.compile": True}, output="compiled"))
    torch.testing.assert_close(
        load_trained(compiled.last).model.state_dict(), load_trained(plain.last).model.state_dict()
    )


def test_half_precision_trains(text_recipe):
    result = train(text_recipe({**ONE_EPOCH, "trainer.precision": "bf16-mixed"}))
    assert math.isfinite(result.metrics["val/loss"])


def test_a_vocabulary_may_be_larger_but_not_smaller(text_recipe):
    train(text_recipe({**ONE_EPOCH, "model.vocab_size": 300}, output="larger"))
    with pytest.raises(UserError, match=r"model\.vocab_size is 100, but the data \(text\) has 256"):
        train(text_recipe({**ONE_EPOCH, "model.vocab_size": 100}))


def test_a_checkpoint_says_all_about_its_network(text_recipe):
    result = train(text_recipe(ONE_EPOCH))
    trained = load_trained(result.best)
    assert trained.input_size == (16,)
    assert trained.model.config.vocab_size == 256
    assert isinstance(trained.tokenizer, ByteTokenizer)
    assert trained.class_names == []


def test_an_evaluation_is_what_validation_said(text_recipe):
    result = train(text_recipe({**ONE_EPOCH, "trainer.limit_val_batches": None}))
    network, data = open_source(checkpoint=result.best, assignments=["data.eval_batch_size=3"])
    found = evaluate(network, data, "val", device="cpu")
    assert isinstance(found, LanguageEvaluation)
    assert found.loss == pytest.approx(result.metrics["val/loss"], rel=1e-5)
    assert found.bits_per_byte == pytest.approx(result.metrics["val/bits_per_byte"], rel=1e-5)
    assert found.tokens == 16 * len(data.parts["val"])
    assert evaluate(network, data, "test", device="cpu").loss != found.loss


def test_a_network_is_evaluated_on_text_by_name(text_recipe, tmp_path):
    data = text_recipe().data.fields
    fields = {"dim": 16, "depth": 1, "gate_rank": 4}
    torch.save(gatewise.create_model("gla_tiny", **fields).state_dict(), tmp_path / "w.pth")
    words = [*(f"model.{name}={value}" for name, value in fields.items()), "data.name=text"]
    words += [f"data.{name}={data[name]}" for name in ("root", "cache_dir")]
    words += ["data.val_fraction=0.2", "data.test_fraction=0"]
    network, found = open_source("gla_tiny", weights=str(tmp_path / "w.pth"), assignments=words)
    assert found.context == 256
    # Fresh weights know nothing: 256 bytes alike likely.
    assert evaluate(network, found, "val", device="cpu").loss == pytest.approx(math.log(256), rel=0.05)


def test_a_vocabulary_that_is_too_small_cannot_be_evaluated(make_task):
    network = gatewise.create_model("gla_tiny", dim=16, depth=1, vocab_size=100)
    with pytest.raises(UserError, match="vocabulary of 100 tokens, too small for the 256 of the data"):
        evaluate(network, make_task().data, "val", device="cpu")


class Parrot(torch.nn.Module):
    """Says what it is given to say, and notes what it was asked."""

    def __init__(self, tokens) -> None:
        super().__init__()
        self.tokens = tokens
        self.asked: dict = {}

    def stream(self, prompt, max_new_tokens, **options):
        self.asked = {"prompt": prompt.tolist(), "max": max_new_tokens, **options}
        yield from (torch.tensor([token]) for token in self.tokens[:max_new_tokens])


def test_text_comes_in_whole_characters_and_ends_with_the_document():
    parrot = Parrot([*"héé".encode(), 0])
    pieces = list(generate(parrot, ByteTokenizer(), "say ", 20, temperature=0.5, top_k=3, seed=4, device="cpu"))
    assert pieces == ["h", "é", "é"]
    assert parrot.asked["prompt"] == [list(b"say ")]
    assert (parrot.asked["temperature"], parrot.asked["top_k"], parrot.asked["stop_tokens"]) == (0.5, 3, (0,))


def test_generation_repeats_itself_by_seed(text_recipe):
    trained = load_trained(train(text_recipe(ONE_EPOCH)).best)
    texts = ["".join(generate(trained.model, trained.tokenizer, "3", 12, seed=s, device="cpu")) for s in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("task.chunk_size", 0, "task.chunk_size must be at least 1, not 0"),
        ("task.sample_every", 0, "task.sample_every must be at least 1, not 0"),
        ("task.sample_temperature", -1.0, "task.sample_temperature must be at least 0"),
        ("task.sample_top_p", 0.0, "task.sample_top_p must be above 0 and at most 1"),
    ],
)
def test_settings_out_of_range_are_refused(text_recipe, field, value, message):
    with pytest.raises(UserError, match=message):
        text_recipe({field: value})


def test_a_checkpoint_brings_a_tokenizer_of_hugging_face_along(text_recipe, tmp_path):
    pytest.importorskip("tokenizers", reason="the extra `data` is not installed")
    path = tmp_path / "tokenizer.json"
    path.write_text(byte_level())
    result = train(text_recipe({**ONE_EPOCH, "data.tokenizer": str(path), "trainer.limit_val_batches": None}))
    path.unlink()
    trained = load_trained(result.best)
    assert trained.model.config.vocab_size == trained.tokenizer.vocab_size == 260
    network, data = open_source(checkpoint=result.best)
    found = evaluate(network, data, "val", device="cpu")
    assert found.bits_per_byte == pytest.approx(result.metrics["val/bits_per_byte"], rel=1e-5)
    assert isinstance("".join(generate(trained.model, trained.tokenizer, "the", 3, device="cpu")), str)


def test_an_unfinished_sample_is_left_out(tmp_path):
    path = tmp_path / "samples.jsonl"
    assert read_samples(path) == []
    path.write_text('{"epoch": 0, "text": "a"}\n{"epoch": 1, "te')
    assert read_samples(path) == [{"epoch": 0, "text": "a"}]


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"text": "a"}', '{"epoch": "0"}', "[" * 100_000])
def test_samples_that_are_damaged_are_refused_in_one_line(tmp_path, line):
    path = tmp_path / "samples.jsonl"
    path.write_text(f'{{"epoch": 0}}\n{line}\n')
    with pytest.raises(UserError, match=r"line 2 of .*samples\.jsonl") as caught:
        read_samples(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
