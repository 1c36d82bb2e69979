"""Tokenizers: always one `tokenizer.json` of the `tokenizers` library, whatever their kind."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

BYTE, CHAR, BPE = "byte", "char", "bpe"

PART_CHARACTERS = 2**16
"""Longer documents are encoded in parts: the library's time and memory grow with the text."""


def build_tokenizer(
    kind: str, *, vocab_size: int | None, end_token: str | None, documents: Iterable[str]
) -> Tokenizer:
    """Build a tokenizer of one of our kinds, or read an existing one.

    Args:
        kind: `byte`: the 256 bytes; `char`: the characters of the documents; `bpe`: byte-level
            byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909; over bytes as in Radford
            et al. 2019, GPT-2) trained on the documents; else the path of a `tokenizer.json`.
        vocab_size: tokens of a `bpe` vocabulary, the end token among them.
        end_token: token that ends a document, added where the vocabulary lacks it; None for none.
        documents: the text to learn from.

    Returns:
        The tokenizer; encoding treats special tokens in a text as text.

    Raises:
        ValueError: `kind` is none of these, or the size of the vocabulary is impossible.
    """
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
        tokenizer = _train_bpe(vocab_size, end_token, documents)
    else:
        tokenizer = _read(kind)
    if end_token is not None:
        tokenizer.add_special_tokens([end_token])
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json` so that special tokens in a text are encoded as text."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode_parts(tokenizer: Tokenizer, text: str) -> Iterable[list[int]]:
    """Encode a document, long ones in parts.

    A part ends after a newline between two visible characters, where no token of the tokenizers
    that are built here crosses, so splitting changes nothing for them. Text without such a place
    is cut at the limit.

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
                f"({err}) -> use byte or bpe, which have tokens for every text"
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
    vocab_size: int | None, end_token: str | None, documents: Iterable[str]
) -> Tokenizer:
    special = [end_token] if end_token is not None else []
    if vocab_size is None or vocab_size < 256 + len(special):
        raise ValueError(
            f"corpus.vocab_size={vocab_size} -> a bpe vocabulary begins with 256 bytes and "
            f"{len(special)} end token -> set at least {256 + len(special)}"
        )
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=byte_characters(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _read(path: str) -> Tokenizer:
    if not Path(path).is_file():
        raise ValueError(
            f"corpus.tokenizer={path} -> neither {BYTE}, {CHAR}, {BPE} nor a file -> choose one "
            "of the three or give the path of a tokenizer.json"
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
