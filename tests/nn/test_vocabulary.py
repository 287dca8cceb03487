"""Logits that are never whole give what whole ones give."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peftc.nn import vocabulary
from peftc.nn.vocabulary import Unread, by_rows, differ, nll, pulls, tiles_of

WORDS, WIDTH, ROWS = 100, 8, 12


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "WORDS", 16)  # the last is not full
    monkeypatch.setattr(vocabulary, "BLOCK", 3 * WORDS)


def drawn(seed: int = 0, *, scale: float = 3.0, bias: bool = True, dtype: torch.dtype = torch.float32) -> Unread:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, offset = (
        torch.randn(*shape, generator=generator) for shape in ((ROWS, WIDTH), (WORDS, WIDTH), (WORDS,))
    )
    return Unread(hidden.to(dtype), scale * weight, offset if bias else None)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1e-3, 3.0, 300.0])
def test_likelihoods_are_those_of_whole_logits(scale: float, bias: bool) -> None:
    logits, targets = drawn(scale=scale, bias=bias), torch.arange(ROWS) * 9 % WORDS
    whole = F.cross_entropy(logits.whole(), targets, reduction="none")
    torch.testing.assert_close(nll(logits, targets), whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(nll(logits.whole(), targets), whole)


def test_gradients_are_those_of_whole_logits() -> None:
    targets = torch.arange(ROWS) * 9 % WORDS

    def gradients(of: Callable[[Unread], Tensor]) -> list[Tensor]:
        start = drawn()
        leaves = [each.clone().requires_grad_() for each in (start.hidden, start.weight, start.bias)]  # type: ignore[union-attr]
        of(Unread(*leaves)).sum().backward()
        return [leaf.grad for leaf in leaves]  # type: ignore[misc]

    parts = gradients(lambda logits: nll(logits, targets))
    whole = gradients(lambda logits: F.cross_entropy(logits.whole(), targets, reduction="none"))
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gap", [1e-3, 1.0, 30.0])
def test_divergences_are_those_of_whole_logits(gap: float) -> None:
    one = drawn()
    other = replace(one, hidden=one.hidden + gap * drawn(1).hidden)
    kl, same = differ(one, other)
    whole, first = differ(one.whole(), other.whole())
    torch.testing.assert_close(kl, whole, rtol=1e-4, atol=1e-6)
    assert torch.equal(same, first)
    assert differ(one, one)[0].max() < 1e-6


def test_no_whole_logits_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    widest, linear = [0], F.linear

    def watched(*given: Tensor) -> Tensor:
        found = linear(*given)
        widest[0] = max(widest[0], found.shape[-1])
        return found

    monkeypatch.setattr(F, "linear", watched)
    logits = drawn()
    nll(logits, torch.zeros(ROWS, dtype=torch.long))
    differ(logits, logits)
    pulls(logits, torch.rand(ROWS, tiles_of(WORDS), 2))
    assert widest == [16]


def test_pulls_are_gradients_of_what_was_drawn() -> None:
    logits = drawn()
    chances = torch.rand(ROWS, tiles_of(WORDS), 3, generator=torch.Generator().manual_seed(3))
    mean = logits.whole().softmax(1) @ logits.weight
    for pull in pulls(logits, chances):
        distance = torch.cdist(mean - pull, logits.weight)
        assert distance.min(1).values.max() < 0.05  # the rest is the row of one word
        words = distance.argmin(1)
        hidden = logits.hidden.clone().requires_grad_()
        F.cross_entropy(F.linear(hidden, logits.weight, logits.bias), words, reduction="sum").backward()
        torch.testing.assert_close(pull, hidden.grad, rtol=1e-4, atol=1e-4)


def test_words_are_drawn_from_their_distribution() -> None:
    one = drawn(scale=0.5)
    number = 20_000
    many = replace(one, hidden=one.hidden[:1].expand(number, -1))
    chances = torch.rand(number, tiles_of(WORDS), 1, generator=torch.Generator().manual_seed(5))
    distribution = one[:1].whole().softmax(1)[0]
    words = torch.cdist(distribution @ one.weight - pulls(many, chances)[0], one.weight).argmin(1)
    counted = torch.bincount(words, minlength=WORDS)
    spread = (number * distribution * (1 - distribution)).sqrt()
    assert ((counted - number * distribution).abs() < 5 * spread + 1).all()


def test_a_function_of_rows_sees_every_row_once() -> None:
    logits, others = drawn(), torch.arange(ROWS)
    seen: list[Tensor] = []

    def function(whole: Tensor, some: Tensor) -> Tensor:
        seen.append(some)
        return whole.sum(1) + some

    found = by_rows(function, [logits], others)
    torch.testing.assert_close(found, logits.whole().sum(1) + others)
    assert torch.equal(torch.cat(seen), others) and len(seen) == 4


def test_half_precision_multiplies_as_it_is_stored() -> None:
    logits, targets = drawn(dtype=torch.bfloat16), torch.arange(ROWS)
    whole = F.cross_entropy(logits.whole().float(), targets, reduction="none")
    assert logits.whole().dtype == torch.bfloat16
    torch.testing.assert_close(nll(logits, targets), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_likeliest_words_and_all_others_are_one_distribution(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    unread = Unread(torch.randn(2, 3, 8), torch.randn(50, 8), torch.randn(50))
    logs = (unread.whole() / temperature).log_softmax(-1)
    monkeypatch.setattr(vocabulary, "BLOCK", 100)  # two rows at a time
    for logits in (unread, unread.whole()):
        found = vocabulary.foremost(logits, 4, temperature)
        assert found.words.shape == (2, 3, 4) and found.logs.shape == (2, 3, 5)
        torch.testing.assert_close(found.logs[..., :4], logs.topk(4).values)
        torch.testing.assert_close(found.logs.exp().sum(-1), torch.ones(2, 3))
    assert vocabulary.foremost(unread, 80).words.shape == (2, 3, 49)
