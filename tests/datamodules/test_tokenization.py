import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from datamodules.tokenization import (
    build_tokenizer,
    byte_characters,
    encode_parts,
    load_tokenizer,
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
