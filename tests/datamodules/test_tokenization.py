import random
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from datamodules.tokenization import (
    build_tokenizer,
    byte_characters,
    encode_parts,
    find_sentinels,
    load_tokenizer,
    lower_case,
)

END = "<|endoftext|>"


def build(kind: str, documents: list[str]) -> Tokenizer:
    size = 400 if kind == "bpe" else None
    return build_tokenizer(kind, vocab_size=size, end_token=END, documents=documents)


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_text_survives_a_saved_tokenizer(kind: str, documents: list[str], tmp_path: Path) -> None:
    texts = [*documents, "", " lead and trail  ", END]
    build(kind, texts).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    for text in texts:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_to_id(END) not in ids  # its spelling in a text is text


def test_byte_tokens_are_the_bytes(documents: list[str]) -> None:
    tokenizer = build("byte", [])
    text = "".join(documents) + "".join(map(chr, range(256)))
    assert tokenizer.encode(text).ids == list(text.encode())
    assert set(byte_characters()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert tokenizer.token_to_id(END) == 256 == tokenizer.get_vocab_size() - 1


def test_char_tokens_are_the_sorted_characters(documents: list[str]) -> None:
    tokenizer = build("char", documents)
    characters = sorted(set("".join(documents)))
    assert [tokenizer.id_to_token(i) for i in range(len(characters))] == characters
    assert tokenizer.get_vocab_size() == len(characters) + 1


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_parts_of_a_long_text_give_the_tokens_of_the_whole(
    kind: str, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = build(kind, [*documents, "it's x"])
    pieces = ["it's", " ", "  ", "\n", "\n\n", "naïve", "x", ".", "  \n", "\n  ", "日本"]
    text = "".join(random.Random(1).choices(pieces, k=6000))
    whole = tokenizer.encode(text).ids
    monkeypatch.setattr("datamodules.tokenization.PART_CHARACTERS", 2000)
    parts = list(encode_parts(tokenizer, text))
    assert len(parts) > 5
    assert [token for part in parts for token in part] == whole


def test_text_without_lines_is_cut_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.tokenization.PART_CHARACTERS", 100)
    parts = list(encode_parts(build("byte", []), "a" * 250))
    assert [len(part) for part in parts] == [100, 100, 50]


def test_end_token_is_added_to_an_existing_tokenizer_that_lacks_it(tmp_path: Path) -> None:
    existing = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}))
    existing.pre_tokenizer = pre_tokenizers.Whitespace()
    existing.enable_truncation(1)
    existing.enable_padding(length=8)
    existing.save(str(tmp_path / "tokenizer.json"))
    settings = {"vocab_size": None, "documents": []}
    path = str(tmp_path / "tokenizer.json")
    known = build_tokenizer(path, end_token="</s>", **settings)
    assert (known.get_vocab_size(), known.token_to_id("</s>")) == (3, 2)
    added = build_tokenizer(path, end_token=END, **settings)
    assert (added.get_vocab_size(), added.token_to_id(END)) == (4, 3)
    assert added.encode("a b a").ids == [0, 1, 0]


def test_text_that_a_vocabulary_lacks_is_refused() -> None:
    tokenizer = build_tokenizer("char", vocab_size=None, end_token=None, documents=["abc"])
    assert list(encode_parts(tokenizer, "cab")) == [[2, 0, 1]]
    with pytest.raises(ValueError, match=r"corpus.tokenizer -> it has no tokens for some of 'abc"):
        list(encode_parts(tokenizer, "abcd"))


def split_words(text: str) -> list[str]:
    """Runs of word characters, and runs of anything else but white space."""
    return re.findall(r"\w+|[^\w\s]+", text)


@pytest.mark.parametrize("lowercase", [False, True])
def test_word_vocabulary_is_that_of_a_counter(lowercase: bool, documents: list[str]) -> None:
    texts = [*documents, "Ein Mann, der (laut) singt.", "ein  Mann"]
    settings = {"end_token": END, "lowercase": lowercase, "documents": texts}
    tokenizer = build_tokenizer("word", vocab_size=None, min_frequency=2, **settings)
    lower = [text.lower() if lowercase else text for text in texts]
    counts = Counter(word for text in lower for word in split_words(text))
    words = sorted((w for w in counts if counts[w] >= 2), key=lambda w: (-counts[w], w))
    assert len(words) < len(counts)
    numbers = tokenizer.get_vocab()
    assert sorted(numbers, key=lambda word: numbers[word]) == ["<|unknown|>", END, *words]
    capped = build_tokenizer("word", vocab_size=5, **settings)
    assert set(capped.get_vocab()) == {"<|unknown|>", END, *words[:3]}
    text = "ein MANN, <|endoftext|> <|unknown|> der"
    expected = split_words(text.lower() if lowercase else text)
    known = [word if counts[word] >= 2 else "<|unknown|>" for word in expected]
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == " ".join(known)
    assert numbers[END] not in ids


@pytest.mark.parametrize("kind", ["byte", "char", "bpe", "word"])
def test_tokenizer_lower_cases_as_the_text_was(kind: str, tmp_path: Path) -> None:
    text = "Ä\u0130 ΣΑΣ \u1c89Ⅷ AB"  # U+1C89: a capital since Unicode 16
    size = 300 if kind == "bpe" else None
    built = build_tokenizer(kind, vocab_size=size, end_token=END, documents=[text], lowercase=True)
    built.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.encode(text).ids == tokenizer.encode(lower_case(text)).ids
    assert tokenizer.decode(tokenizer.encode(text).ids) == lower_case(text)
    characters = [c for c in map(chr, range(0x3000)) if unicodedata.category(c) != "Cn"]
    assert [lower_case(c) for c in characters] == [c.lower() for c in characters]


@pytest.mark.parametrize("kind", ["byte", "char", "bpe", "word"])
def test_sentinels_are_the_last_tokens(kind: str, documents: list[str]) -> None:
    size = 400 if kind in ("bpe", "word") else None
    spelled = "<extra_id_0> <extra_id_1>x"
    settings = {"vocab_size": size, "end_token": END, "documents": [*documents, spelled]}
    plain = build_tokenizer(kind, **settings)
    tokenizer = build_tokenizer(kind, num_sentinels=3, start_token="<s>", **settings)
    numbers = find_sentinels(tokenizer)
    size = tokenizer.get_vocab_size()
    assert numbers == [size - 3, size - 2, size - 1]
    assert find_sentinels(plain) == []
    assert tokenizer.token_to_id("<s>") not in (None, tokenizer.token_to_id(END))
    assert not set(numbers) & set(tokenizer.encode(spelled).ids)


def test_existing_special_tokens_are_taken_and_not_added(tmp_path: Path) -> None:
    existing = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "a": 2, "<unk>": 3}, "<unk>"))
    existing.add_special_tokens(["<extra_id_1>", "<extra_id_0>"])  # the order of T5
    existing.save(str(tmp_path / "tokenizer.json"))
    settings = {"vocab_size": None, "documents": [], "end_token": "</s>", "start_token": "<pad>"}
    known = build_tokenizer(str(tmp_path / "tokenizer.json"), num_sentinels=1, **settings)
    assert known.get_vocab() == existing.get_vocab()
    assert find_sentinels(known) == [5, 4]
    more = build_tokenizer(str(tmp_path / "tokenizer.json"), num_sentinels=3, **settings)
    assert find_sentinels(more) == [5, 4, 6]


def test_vocabulary_too_small_for_its_special_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"corpus.vocab_size=2 -> .* set at least 3"):
        build_tokenizer("word", vocab_size=2, end_token=END, documents=["a"])
