import math

import pytest
import torch

from modules.scores import check_scores, gather_rows, score, texts_of

ROWS = [
    ("ein hund .", "a dog runs in the park .", "a dog runs in a park ."),
    ("zwei", "two men sit on a bench", "two men are sitting on the bench"),
]


def bleu_by_hand(rows):
    """Papineni et al. 2002, equation 3, of texts whose words are set apart by spaces."""
    matches, totals = [0] * 4, [0] * 4
    for _, target, prediction in rows:
        for n in range(4):
            found, wanted = ngrams(prediction, n + 1), ngrams(target, n + 1)
            matches[n] += sum(min(found.count(g), wanted.count(g)) for g in set(found))
            totals[n] += len(found)
    lengths = [sum(len(row[place].split()) for row in rows) for place in (1, 2)]
    brevity = min(0.0, 1 - lengths[0] / lengths[1])
    precisions = [math.log(m / t) for m, t in zip(matches, totals, strict=True)]
    return 100 * math.exp(brevity + sum(precisions) / 4)


def ngrams(text, size):
    words = text.split()
    return [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]


def test_bleu_is_that_of_the_whole_corpus():
    values, signatures = score(ROWS, ["bleu"], "13a")
    assert values["bleu"] == pytest.approx(bleu_by_hand(ROWS))
    single = [score([row], ["bleu"], "13a")[0]["bleu"] for row in ROWS]
    assert values["bleu"] != pytest.approx(sum(single) / 2, abs=1)  # no mean of sentences
    assert "tok:13a" in signatures["bleu"]
    assert "version:" in signatures["bleu"]


def test_scores_agree_on_what_is_perfect_and_what_is_worse():
    names = ["bleu", "chrf", "rouge"]
    perfect, signatures = score([(s, t, t) for s, t, _ in ROWS], names, "13a")
    assert perfect == pytest.approx(dict.fromkeys(perfect, 100.0))
    worse, _ = score(ROWS, names, "13a")
    assert {*worse} == {"bleu", "chrf", "rouge1", "rouge2", "rougeL"}
    assert all(worse[name] < 99 for name in worse)
    assert {*signatures} == {*names}


def test_rouge_counts_common_words():
    values, _ = score([("", "red green blue", "red green")], ["rouge"], "13a")
    assert values["rouge1"] == pytest.approx(100 * 2 * (1 * 2 / 3) / (1 + 2 / 3))


def test_unknown_score_is_refused():
    with pytest.raises(ValueError, match=r"module\.scores\.names=\['meteor'\] -> meteor"):
        check_scores(["meteor"], "13a")
    with pytest.raises(ValueError, match=r"bleu_tokenize=moses -> unknown"):
        check_scores(["bleu"], "moses")


def test_texts_without_spaces_are_scored_by_characters():
    rows = [("", "\u732b\u5728\u684c\u5b50\u4e0a", "\u732b\u5728\u684c\u5b50\u4e0b")]
    by_words, _ = score(rows, ["bleu"], "13a")
    by_characters, signatures = score(rows, ["bleu"], "zh")
    assert by_words["bleu"] < by_characters["bleu"]
    assert "tok:zh" in signatures["bleu"]


def test_rows_of_one_process_are_its_own():
    assert gather_rows(ROWS) == ROWS


class Letters:
    def decode(self, ids, skip_special_tokens=True):
        assert not skip_special_tokens
        return "".join(chr(97 + token) for token in ids)


def test_texts_of_tokens_leave_padding_out():
    batch = {
        "source": torch.tensor([[1, 2, 0], [3, 4, 5]]),
        "source_mask": torch.tensor([[True, True, False], [True, True, True]]),
        "inputs": torch.tensor([[9, 6], [9, 7]]),
        "targets": torch.tensor([[6, -100], [7, 8]]),
    }
    assert texts_of(batch, Letters(), Letters()) == [("bc", "g"), ("def", "hi")]
