"""A large text is tokenised once and piece by piece, into the tokens that it has as a whole."""

import hashlib
import itertools
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peftc.data import cutting, open_data, remembered, stored, tokenised
from peftc.errors import DataError
from peftc.models.load import load
from peftc.models.tokenizer import tokenizer_of
from peftc.options import Reading, Windows
from peftc.store import cache
from peftc.tasks.language import encode_causal, encode_masked
from tests.data.large import treat_as_large
from tests.networks import WORDS

END = ["\n", "\n", "\n", "\n\n", "\n\n\n", " \n", "\n  ", "\n\t", ".\n", "!\n\n", "\r\n", "\n<s>", " <s> \n", "\n- "]


def story(seed: int, lines: int = 300) -> str:
    draw = random.Random(seed)
    words = [*WORDS, *(word.title() for word in WORDS), "42", "Übung", "日本語", "naïve", "'s", "---", "  ", "\u200b"]
    return "".join(
        " ".join(draw.choice(words) for _ in range(draw.randrange(12))) + draw.choice(END) for _ in range(lines)
    )


@pytest.fixture(autouse=True)
def _large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat small and young files as large and settled ones, and cut them into many pieces."""
    treat_as_large(tmp_path, monkeypatch)
    monkeypatch.setattr(cutting, "PIECE", 200)
    monkeypatch.setattr(cutting, "AT_ONCE", 700)
    monkeypatch.setattr(cutting, "CONTEXT", 40)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "train.txt"
    path.write_bytes(story(0).encode())
    return path


def made(kind: str) -> Any:
    """Return a tokenizer learnt from a story, of one of the kinds that models have."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    corpus, special = [story(seed) for seed in range(1, 4)], ["<unk>", "<s>"]
    if kind.startswith("unigram"):
        core = Tokenizer(models.Unigram())
        core.pre_tokenizer = pre_tokenizers.Metaspace()
        core.normalizer = normalizers.Replace(Regex(r"\s+" if kind.endswith("joined") else r"\s"), " ")
        trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>")
    elif kind == "pieces of words":
        core = Tokenizer(models.WordPiece(unk_token="<unk>"))
        core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special)
    else:
        core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False, fuse_unk=kind == "one word"))
        alphabet = pre_tokenizers.ByteLevel.alphabet() if kind.startswith("bytes") else []
        if kind == "bytes":
            core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        elif kind == "bytes, lines apart":
            apart = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
            split = pre_tokenizers.Split(apart, "isolated")
            core.pre_tokenizer = pre_tokenizers.Sequence(
                [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
            )
        elif kind == "by place":  # of which a piece depends on everything before it
            core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]{7}"), "isolated")
        else:
            core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            corpus = [part for each in corpus for part in (each.split("\n") if kind == "one word" else [each])]
            corpus += ["\n", "\n\n", "\n\n\n"] * 50
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    core.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>")


def pieces_of(tokenizer: Any, text: str) -> list[np.ndarray]:
    """Return the tokens of a text, piece by piece."""
    return list(cutting.tokens(partial(tokenizer, add_special_tokens=False, verbose=False), [text]))


LOCAL = ["unigram", "unigram, spaces joined", "pieces of words", "bytes", "bytes, lines apart", "one word"]


@pytest.mark.parametrize("kind", LOCAL)
def test_pieces_have_the_tokens_of_the_whole(kind: str) -> None:
    tokenizer = made(kind)
    assert cutting.can_cut(tokenizer)
    for seed in range(5):
        text = story(seed)
        found = pieces_of(tokenizer, text)
        assert len(found) > 5 and np.concatenate(found).tolist() == tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("kind", ["by place", "words over lines"])
def test_a_tokenizer_that_looks_further_gets_the_whole(
    kind: str, tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = made(kind)
    if kind == "by place":
        with pytest.raises(cutting.NotLocalError):
            pieces_of(tokenizer, story(0))
    else:
        assert not cutting.can_cut(tokenizer)
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    tokenizer.save_pretrained(folder)
    model, own = load(folder), tokenizer_of(load(folder))
    monkeypatch.setattr(tokenised, "refuse_unknown", lambda *given: None)
    monkeypatch.setattr("peftc.data.tokens.refuse_unknown", lambda *given: None)
    if kind == "by place":
        monkeypatch.setattr(cutting, "can_cut", lambda tokenizer: True)  # so that it is only found out at a cut
    found = tokenised.of_text(model, own, open_data(str(text), task="causal-lm"))
    whole = "".join(tokenised.rows_of(open_data(str(text), task="causal-lm")))
    assert found.between(0, len(found)).tolist() == own(whole, add_special_tokens=False).input_ids
    assert list(stored.home().glob("*/table"))


@pytest.mark.real
def test_pieces_have_the_tokens_of_the_whole_with_real_tokenizers(
    data_folder: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (data_folder / "sets" / "tinyshakespeare" / "input.txt").read_text()[:200_000] + story(0)
    for piece, context in ((500, 40), (20_000, 1024)):
        monkeypatch.setattr(cutting, "PIECE", piece)
        monkeypatch.setattr(cutting, "CONTEXT", context)
        for folder in (data_folder / "weights" / "stories260K", minilm):
            tokenizer = tokenizer_of(load(folder))
            assert cutting.can_cut(tokenizer)
            found = np.concatenate(pieces_of(tokenizer, text)).tolist()
            assert found == tokenizer(text, add_special_tokens=False, verbose=False).input_ids


@pytest.mark.parametrize("text", ["", "a", "\n", "no new line " * 100, "\n\n\n" * 200, "a\n" * 300, "one\ntwo"])
def test_texts_without_a_place_to_cut_are_one_piece(text: str) -> None:
    tokenizer = made("bytes")
    found = [part for each in pieces_of(tokenizer, text) for part in each.tolist()]
    assert found == tokenizer(text, add_special_tokens=False).input_ids


def old_key(windows: torch.Tensor) -> str:
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()


def in_memory(spec: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a data set as it is when it is small."""
    with monkeypatch.context() as patch:
        patch.setattr(remembered, "LARGE", 1 << 40)
        return open_data(str(spec), task="causal-lm")


READINGS = [Reading(max_length=16), Reading(max_length=16, num_samples=7, seed=3)]
CUTS = [Windows(protocol="gptq"), Windows(stride=5), Windows(protocol="gptq", first_token="text")]
ENCODERS = [
    *itertools.product([encode_causal], READINGS),
    *((encode_causal, Reading(max_length=16, windows=cut)) for cut in CUTS),
    (encode_causal, Reading(max_length=16, num_samples=9, windows=CUTS[1])),
    *itertools.product([encode_masked], READINGS),
]


@pytest.mark.parametrize("case", range(len(ENCODERS)))
def test_a_large_text_is_read_as_a_small_one(
    request: pytest.FixtureRequest, text: Path, monkeypatch: pytest.MonkeyPatch, case: int
) -> None:
    encode, reading = ENCODERS[case]
    model = load(request.getfixturevalue("tiny_bert" if encode is encode_masked else "tiny_llama"))
    small, large = in_memory(text, monkeypatch), open_data(str(text), task="causal-lm")
    assert (small.digest, small.sketch) == (large.digest, large.sketch)
    one, other, again = (encode(model, data, reading) for data in (small, large, open_data(str(text))))
    for each in (other, again):
        assert (each.key, each.size, each.notes, each.windows) == (one.key, one.size, one.notes, one.windows)
        for rows in ([0], [3, 1, one.size - 1], range(one.size)):
            batch, wanted = each.batch(rows), one.batch(rows)
            assert torch.equal(batch.targets, wanted.targets)
            assert torch.equal(batch.inputs["input_ids"], wanted.inputs["input_ids"])
    if not reading.windows.asked():
        assert one.key == old_key(one.batch(range(one.size)).inputs["input_ids"])


def test_keys_are_those_of_earlier_jobs(tiny_llama: Path, text: Path) -> None:
    """The window's key as it always was: over the tokens of the text, and how it was cut."""
    model = load(tiny_llama)
    tokenizer = tokenizer_of(model)
    ids = tokenizer(text.read_text() + ("" if text.read_text().endswith("\n") else "\n"), add_special_tokens=False)
    tokens = torch.tensor(ids["input_ids"])
    inner = tokens[: len(tokens) // 15 * 15].view(-1, 15)
    windows = torch.cat([torch.full((len(inner), 1), tokenizer.bos_token_id), inner], 1)
    assert encode_causal(model, open_data(str(text)), READINGS[0]).key == old_key(windows)


# what is kept


@pytest.fixture
def tokenise(tiny_llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[int], bool]]:
    """Tokenise the text, or another one; return the tokens, and whether they had to be made."""
    made, real = list[bool](), cutting.tokens

    def watched(*given: Any) -> Iterator[np.ndarray]:
        made.append(True)
        yield from real(*given)

    monkeypatch.setattr(cutting, "tokens", watched)

    def run(path: Path = text, folder: Path = tiny_llama, **how: Any) -> tuple[list[int], bool]:
        made.clear()
        model = load(folder)
        found = tokenised.of_text(model, tokenizer_of(model), open_data(str(path)), **how)
        return found.between(0, len(found)).tolist(), bool(made)

    return run


def test_a_text_is_tokenised_once(
    tokenise: Callable[..., Any], text: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, was_made = tokenise()
    assert was_made and tokenise() == (first, False)
    copy = shutil.copy(text, tmp_path / "copy.txt")
    assert tokenise(copy) == (first, False)  # the content counts, not the name
    other = shutil.copytree(tiny_llama, tmp_path / "model")
    assert tokenise(folder=other) == (first, False)
    about = other / "tokenizer_config.json"
    about.write_text(about.read_text() + " ")
    assert tokenise(folder=other) == (first, True)
    assert tokenise(special=True) == ([*tokenizer_of(load(tiny_llama))("a").input_ids[:1], *first], True)
    text.write_text(text.read_text() + "the cat\n")
    longer, was_made = tokenise()
    assert was_made and longer[: len(first) - 1] == first[:-1] and len(longer) > len(first)
    monkeypatch.setattr(remembered, "SETTLED", 1e9)
    assert tokenise() == (longer, True) and tokenise() == (longer, True)  # so young that it may change unseen


def cut_off(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def zeros(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def no_table(file: Path) -> None:
    file.with_name(stored.ABOUT).write_text("{")


@pytest.mark.parametrize("damage", [cut_off, zeros, no_table, Path.unlink])
def test_a_damaged_file_is_made_anew(tokenise: Callable[..., Any], damage: Callable[[Path], None]) -> None:
    first, _ = tokenise()
    (file,) = stored.home().glob(f"*/table/{stored.FILE}")
    damage(file)
    assert tokenise() == (first, True) and tokenise() == (first, False)


def test_a_cache_that_cannot_be_written_only_costs_time(tokenise: Callable[..., Any], tmp_path: Path) -> None:
    first, _ = tokenise()
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path / "train.txt" / "no folder")
    assert tokenise() == (first, True) and tokenise() == (first, True)


def test_without_any_place_on_disk_a_large_text_is_refused(
    tokenise: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path / "train.txt" / "no folder")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no folder"))
    with pytest.raises(DataError, match="cannot keep a large data set on disk"):
        tokenise()


def test_nothing_is_kept_of_a_text_that_changes_meanwhile(
    tiny_llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = load(tiny_llama), open_data(str(text))
    assert data.digest
    text.write_text(text.read_text() + "the cat\n")
    with pytest.raises(DataError, match="changed while it was read"):
        tokenised.of_text(model, tokenizer_of(model), data)
    assert not list(stored.home().glob("*/table"))


def test_a_token_that_the_model_does_not_know_is_refused(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    core = tokenizer_of(load(folder))
    core.add_tokens(["zebra"])
    core.save_pretrained(folder)
    text.write_text(text.read_text() + "the zebra\n")
    model = load(folder)
    with pytest.raises(DataError, match="gives the token"):
        tokenised.of_text(model, tokenizer_of(model), open_data(str(text)))


@pytest.mark.parametrize("content", [b"a line\n" * 99 + b"\xff", b"a line\n" * 99 + b"\0", b" \n" * 99])
def test_a_large_file_that_is_no_text_is_refused(tiny_llama: Path, text: Path, content: bytes) -> None:
    text.write_bytes(content)
    model = load(tiny_llama)
    with pytest.raises(DataError, match=f"cannot read `{text}`|`{text}` is empty"):
        tokenised.of_text(model, tokenizer_of(model), open_data(str(text)))
    assert not (cache.home() / remembered.FOLDER).is_dir()


def test_numbers_lie_in_parts() -> None:
    draw = random.Random(0)
    numbers = np.arange(100, dtype=np.int32)
    cuts = sorted(draw.choices(range(101), k=12))
    flat = stored.Flat([numbers[one:other] for one, other in itertools.pairwise([0, *cuts, 100])])
    assert len(flat) == 100
    for start, stop in itertools.combinations(range(101), 2):
        assert flat.between(start, stop).tolist() == list(range(start, stop))
    assert flat.windows([90, 3], 4).tolist() == [[90, 91, 92, 93], [3, 4, 5, 6]]
