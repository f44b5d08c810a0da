"""Captions: COCO's metrics by pycocoevalcap, ChEBI-20's by nltk and rouge-score as MolCA computes them, and
sacrebleu for captions of one's own.

The libraries come with `pip install deepinsert[metrics]` and are imported where they are used.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from deepinsert.controller.metrics.contract import Benchmark, Example, Score
from deepinsert.controller.metrics.formats.captions import read_chebi20, read_coco, read_own

TRUNCATED = 512
"""Tokens of a text that BLEU and METEOR see, as in MolT5's and MolCA's evaluation."""
WORDS = "words"
"""The tokenizer that divides at spaces."""


def library(name: str) -> Any:
    """A module of the extra `metrics`. Raises `ValueError` with the remedy where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f'{name.partition(".")[0]} is not installed; run "pip install deepinsert[metrics]"'
        ) from error


def chosen(metrics: str, known: Sequence[str]) -> list[str]:
    """The names in `metrics`. Raises `ValueError` for one that is not `known`."""
    names = [name.strip() for name in metrics.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ValueError(f"--metrics {metrics!r}: {name!r} is none; choose among {', '.join(known)}")
    if not names:
        raise ValueError(f"--metrics {metrics!r}: name at least one of {', '.join(known)}")
    return names


def rouge(answers: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """Mean F-measures of ROUGE-1, -2 and -L (rouge-score, no stemming), of the best reference, in percent."""
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = library("rouge_score.rouge_scorer").RougeScorer(kinds)
    best = []
    for answer, example in zip(answers, examples, strict=True):
        found = [scorer.score(reference, answer) for reference in example.references]
        best.append([max(one[kind].fmeasure for one in found) for kind in kinds])
    means = 100 * np.mean(best, axis=0)
    return dict(zip(("ROUGE-1", "ROUGE-2", "ROUGE-L"), map(float, means), strict=True))


def score_molecules(
    answers: Sequence[str],
    examples: Sequence[Example],
    tokenizer: str = "",
    metrics: str = "bleu,rouge,meteor",
) -> Score:
    """BLEU-2 (headline) and BLEU-4 by nltk's `corpus_bleu` over the tokens of `tokenizer`, METEOR over the
    same tokens, and ROUGE-1, -2 and -L; in percent.

    Published numbers depend on the tokenizer: MolT5 takes allenai/scibert_scivocab_uncased.
    """
    details: dict[str, float] = {}
    names = chosen(metrics, ("bleu", "rouge", "meteor"))
    if "bleu" in names or "meteor" in names:
        tokens = tokens_of(tokenizer)
        said = [tokens(answer) for answer in answers]
        wanted = [[tokens(reference) for reference in example.references] for example in examples]
    if "bleu" in names:
        corpus_bleu = library("nltk.translate.bleu_score").corpus_bleu
        details["BLEU-2"] = 100 * float(corpus_bleu(wanted, said, weights=(0.5, 0.5)))
        details["BLEU-4"] = 100 * float(corpus_bleu(wanted, said, weights=(0.25,) * 4))
    if "rouge" in names:
        details.update(rouge(answers, examples))
    if "meteor" in names:
        details["METEOR"] = nltk_meteor(wanted, said)
    unit = next(iter(details))
    return Score(details[unit], unit, None, details)


def nltk_meteor(wanted: Sequence[Sequence[list[str]]], said: Sequence[list[str]]) -> float:
    """Mean METEOR by nltk in percent. Raises `ValueError` where nltk's WordNet is not there."""
    meteor_score = library("nltk.translate.meteor_score").meteor_score
    try:
        found = [meteor_score(refs, hyp) for refs, hyp in zip(wanted, said, strict=True)]
    except LookupError as error:
        raise ValueError(
            'METEOR needs nltk\'s WordNet; run "python -m nltk.downloader wordnet omw-1.4", '
            "or leave it out with --metrics bleu,rouge"
        ) from error
    return 100 * float(np.mean(found))


def tokens_of(tokenizer: str) -> Callable[[str], list[str]]:
    """What divides texts: `"words"` at spaces, else the tokenizer of a model (folder or hub id)."""
    if tokenizer == WORDS:
        return lambda text: text.split()[:TRUNCATED]
    if not tokenizer:
        raise ValueError(
            "--tokenizer: BLEU and METEOR depend on it; give a model such as "
            f'allenai/scibert_scivocab_uncased (MolT5), or "{WORDS}" to divide at spaces'
        )
    from transformers import AutoTokenizer

    try:
        model = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise ValueError(f"--tokenizer {tokenizer}: {str(error).splitlines()[0]}") from error
    return lambda text: model.tokenize(text, truncation=True, max_length=TRUNCATED)


def score_coco(
    answers: Sequence[str],
    examples: Sequence[Example],
    metrics: str = "bleu,rouge,meteor,cider",
    details: bool = True,
) -> Score:
    """CIDEr (headline), BLEU-1 to -4, ROUGE-L, METEOR and, where asked for, SPICE over PTB tokens, times 100.

    As in COCO's caption evaluation (pycocoevalcap), which needs Java; SPICE downloads CoreNLP at first.
    Without `details` the first of these that was asked for is all.
    """
    names = chosen(metrics, ("bleu", "rouge", "meteor", "cider", "spice"))
    tokens = ptb_tokens([*answers, *(text for example in examples for text in example.references)])
    ids = [example.prompt.id for example in examples]
    said = {name: [tokens[text]] for name, text in zip(ids, answers, strict=True)}
    truth = {
        name: [tokens[text] for text in example.references]
        for name, example in zip(ids, examples, strict=True)
    }
    rooms = {
        "cider": ("cider.cider", "Cider", ["CIDEr"]),
        "bleu": ("bleu.bleu", "Bleu", ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"]),
        "rouge": ("rouge.rouge", "Rouge", ["ROUGE-L"]),
        "meteor": ("meteor.meteor", "Meteor", ["METEOR"]),
        "spice": ("spice.spice", "Spice", ["SPICE"]),
    }
    found: dict[str, float] = {}
    for name in [name for name in rooms if name in names][: None if details else 1]:
        module, kind, labels = rooms[name]
        values, _ = getattr(library(f"pycocoevalcap.{module}"), kind)().compute_score(truth, said)
        found.update(zip(labels, (100 * float(value) for value in np.ravel(values)), strict=True))
    unit = next(iter(found))
    return Score(found[unit], unit, None, found)


PTB_TOKENS: dict[str, str] = {}
"""Texts as they were divided, since Java takes a second to start and a bootstrap scores them often."""


def ptb_tokens(texts: Sequence[str]) -> dict[str, str]:
    """Each text as Stanford's PTBTokenizer divides it, with spaces between tokens.

    It takes a text a line, and sees new lines in characters that pycocoevalcap lets pass: they become
    spaces. Raises `ValueError` where it cannot run.
    """
    new = [text for text in dict.fromkeys(texts) if text not in PTB_TOKENS]
    if not new:
        return PTB_TOKENS
    if shutil.which("java") is None:
        raise ValueError(
            "COCO's captions are divided by Stanford's PTBTokenizer, which needs Java; install a runtime "
            '(such as the package default-jre-headless), or score them as "captions"'
        )
    divide = library("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer().tokenize
    try:
        divided = divide({place: [{"caption": " ".join(text.split())}] for place, text in enumerate(new)})
    except OSError as error:
        raise ValueError(
            f"pycocoevalcap cannot write beside itself ({error}); install it where you may"
        ) from error
    PTB_TOKENS.update((text, divided[place][0]) for place, text in enumerate(new))
    return PTB_TOKENS


def score_own(answers: Sequence[str], examples: Sequence[Example], details: bool = True) -> Score:
    """BLEU-4 (headline), and in the details BLEU-2, by sacrebleu with its tokenizer 13a, and ROUGE-1, -2 and
    -L; in percent."""
    metrics = library("sacrebleu.metrics")
    references = [[example.references[0] for example in examples]]
    found = {
        f"BLEU-{order}": float(
            metrics.BLEU(max_ngram_order=order).corpus_score(list(answers), references).score
        )
        for order in ((4, 2) if details else (4,))
    }
    if details:
        found.update(rouge(answers, examples))
    return Score(found["BLEU-4"], "BLEU-4", None, found)


BENCHMARKS = (
    Benchmark(
        "coco-captions",
        "github.com/salaniz/pycocoevalcap",
        read_coco,
        score_coco,
        {"metrics": "bleu,rouge,meteor,cider"},
        brief=partial(score_coco, details=False),
    ),
    Benchmark(
        "chebi20",
        "github.com/acharkq/MolCA: model/help_funcs.py",
        read_chebi20,
        score_molecules,
        {"tokenizer": "", "metrics": "bleu,rouge,meteor"},
        askable=False,
    ),
    Benchmark(
        "captions", "sacrebleu, rouge-score", read_own, score_own, brief=partial(score_own, details=False)
    ),
)
