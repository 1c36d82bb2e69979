"""Tokenizers: always one `tokenizer.json` of the `tokenizers` library, whatever their kind."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

BYTE, CHAR, BPE, WORD = KINDS = ("byte", "char", "bpe", "word")

UNKNOWN = "<|unknown|>"
"""Token of the words that a `word` vocabulary lacks. It is no special token: decoding shows it."""

_SENTINEL = "<extra_id_{}>"  # as in T5
_ALL_WORDS = 2**32  # more than there are

PART_CHARACTERS = 2**16
"""Longer documents are encoded in parts: the library's time and memory grow with the text."""


def build_tokenizer(
    kind: str,
    *,
    vocab_size: int | None,
    end_token: str | None,
    documents: Iterable[str],
    start_token: str | None = None,
    min_frequency: int | None = None,
    lowercase: bool = False,
    num_sentinels: int = 0,
) -> Tokenizer:
    """Build a tokenizer of one of our kinds, or read an existing one.

    Args:
        kind: `byte`: the 256 bytes; `char`: the characters of the documents; `bpe`: byte-level
            byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909; over bytes as in Radford
            et al. 2019, GPT-2) trained on the documents; `word`: their words, which are runs of
            letters, digits and `_`, and runs of anything else but white space, and `UNKNOWN`, which
            is token 0; else the path of a `tokenizer.json`.
        vocab_size: tokens of a `bpe` or `word` vocabulary, end and start token among them, but not
            the sentinels; None takes every word.
        end_token: token that ends a document, added where the vocabulary lacks it; None for none.
        documents: the text to learn from.
        start_token: token that a decoder begins with, added likewise.
        min_frequency: how often a word, or a pair of tokens to be merged, must occur.
        lowercase: lower-case a text before it is encoded.
        num_sentinels: tokens `<extra_id_0>`, ... to be there, added likewise, the last ones.

    Returns:
        The tokenizer; encoding treats special tokens in a text as text.

    Raises:
        ValueError: `kind` is none of these, or the size of the vocabulary is impossible.
    """
    special = list(dict.fromkeys(token for token in (end_token, start_token) if token is not None))
    if lowercase:
        documents = map(lower_case, documents)
    if min_frequency is not None and kind in (BYTE, CHAR):
        raise ValueError(
            f"corpus.min_frequency={min_frequency} -> corpus.tokenizer={kind} learns no words -> "
            f"set it to null, or choose {BPE} or {WORD}"
        )
    if kind == BYTE:
        tokenizer = _byte_level(models.BPE({c: b for b, c in enumerate(byte_characters())}, []))
    elif kind == CHAR:
        characters: set[str] = set()
        for document in documents:
            characters.update(document)
        numbers = {character: number for number, character in enumerate(sorted(characters))}
        tokenizer = Tokenizer(models.WordLevel(numbers))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
    elif kind == BPE:
        tokenizer = _train_bpe(vocab_size, min_frequency, special, documents)
    elif kind == WORD:
        tokenizer = _train_words(vocab_size, min_frequency, special, documents)
    else:
        tokenizer = _read(kind)
    if lowercase:
        own = [tokenizer.normalizer] if tokenizer.normalizer is not None else []
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    sentinels = [_SENTINEL.format(number) for number in range(num_sentinels)]
    tokenizer.add_special_tokens([*special, *sentinels])
    tokenizer.encode_special_tokens = True
    return tokenizer


def check_sentinels(num_sentinels: int) -> None:
    """Refuse a number of sentinels that is none.

    Raises:
        ValueError: it is negative or no integer.
    """
    if not isinstance(num_sentinels, int) or isinstance(num_sentinels, bool) or num_sentinels < 0:
        raise ValueError(
            f"corpus.num_sentinels={num_sentinels} -> no number of tokens -> give 0 for none, or "
            "as many as a row can have corrupted spans"
        )


def find_sentinels(tokenizer: Tokenizer) -> list[int]:
    """List the numbers of the tokens `<extra_id_0>`, `<extra_id_1>`, ... that a vocabulary has."""
    numbers: list[int] = []
    while (number := tokenizer.token_to_id(_SENTINEL.format(len(numbers)))) is not None:
        numbers.append(number)
    return numbers


def lower_case(text: str) -> str:
    """Lower-case a text character by character, as a tokenizer built with `lowercase` does.

    Python's own table is that of another version of Unicode, so that some letters would differ.
    """
    return text.lower() if text.isascii() else normalizers.Lowercase().normalize_str(text)


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json` so that special tokens in a text are encoded as text."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode_parts(tokenizer: Tokenizer, text: str) -> Iterable[list[int]]:
    """Encode a document, long ones in parts.

    A part ends after a newline between two visible characters, where no token of the tokenizers
    that are built here crosses, so splitting changes nothing for them. Text without such a place
    is cut at the limit; `word` then makes two words of one that the limit divides.

    Raises:
        ValueError: the vocabulary lacks something that is in the text.
    """
    start = 0
    while start < len(text):
        stop = _part_end(text, start)
        try:
            (part,) = tokenizer.encode_batch_fast([text[start:stop]], add_special_tokens=False)
        except Exception as err:  # the library raises nothing more precise
            raise ValueError(
                f"corpus.tokenizer -> it has no tokens for some of {text[start : start + 40]!r}... "
                f"({err}) -> use byte, bpe or word, which have tokens for every text"
            ) from err
        yield part.ids
        start = stop


def byte_characters() -> list[str]:
    """List the printable character that stands for each byte in byte-level vocabularies.

    Printable bytes of Latin-1 stand for themselves, the others for the characters from U+0100 on,
    in order: the table of GPT-2 (Radford et al. 2019), which `tokenizers` follows.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _train_bpe(
    vocab_size: int | None,
    min_frequency: int | None,
    special: list[str],
    documents: Iterable[str],
) -> Tokenizer:
    if vocab_size is None or vocab_size < 256 + len(special):
        raise ValueError(
            f"corpus.vocab_size={vocab_size} -> a bpe vocabulary begins with 256 bytes and "
            f"{len(special)} special tokens -> set at least {256 + len(special)}"
        )
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency or 0,
        special_tokens=special,
        initial_alphabet=byte_characters(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _train_words(
    vocab_size: int | None,
    min_frequency: int | None,
    special: list[str],
    documents: Iterable[str],
) -> Tokenizer:
    first = [UNKNOWN, *special]
    if vocab_size is not None and vocab_size <= len(first):
        raise ValueError(
            f"corpus.vocab_size={vocab_size} -> a word vocabulary begins with {', '.join(first)} "
            f"-> set at least {len(first) + 1}, or null for every word"
        )
    counter = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    counter.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size or _ALL_WORDS,
        min_frequency=min_frequency or 0,
        special_tokens=first,
        show_progress=False,
    )
    counter.train_from_iterator(documents, trainer)
    # Anew: what trained it holds the unknown token for a special one, which decoding leaves out.
    tokenizer = Tokenizer(models.WordLevel(counter.get_vocab(), UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer  # without a decoder, words are joined by spaces


def _read(path: str) -> Tokenizer:
    if not Path(path).is_file():
        raise ValueError(
            f"corpus.tokenizer={path} -> neither {', '.join(KINDS)} nor a file -> choose one "
            "of the four or give the path of a tokenizer.json"
        )
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as err:  # the library raises nothing more precise
        raise ValueError(
            f"corpus.tokenizer={path} -> the tokenizers library cannot read it ({err}) -> give a "
            "tokenizer.json that Tokenizer.save wrote"
        ) from err
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _part_end(text: str, start: int) -> int:
    limit = start + PART_CHARACTERS
    if limit >= len(text):
        return len(text)
    end = limit
    while (end := text.rfind("\n", start + 1, end)) >= 0:
        if not text[end - 1].isspace() and not text[end + 1].isspace():
            return end + 1
    return limit
