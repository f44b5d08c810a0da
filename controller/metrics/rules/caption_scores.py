"""Scores of captions by the libraries that their papers use.

COCO's captions are scored by pycocoevalcap, ChEBI-20's by nltk and rouge-score as in MolCA, and a user's own
by sacrebleu and rouge-score. The libraries come with `pip install deepinsert[metrics]` and are imported where
they are used.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from deepinsert.controller.metrics.contract import Benchmark, Example, Score
from deepinsert.controller.metrics.formats.captions import (
    read_chebi20,
    read_coco,
    read_instruction_captions,
)

TRUNCATED = 512
"""Tokens of a text that BLEU and METEOR see, as in MolT5's and MolCA's evaluation."""
WORDS = "words"
"""The name of the tokenizer that splits at spaces."""


def library(name: str) -> Any:
    """Import a module of the extra `metrics`; raise `ValueError` with the remedy if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f'{name.partition(".")[0]} is not installed; run "pip install deepinsert[metrics]"'
        ) from error


def metric_names(metrics: str, choices: Sequence[str]) -> list[str]:
    """Return the names in `metrics`, which commas separate; raise `ValueError` unless they are `choices`."""
    names = [name.strip() for name in metrics.split(",") if name.strip()]
    for name in names:
        if name not in choices:
            raise ValueError(
                f"--metrics {metrics!r}: {name!r} is no metric of this benchmark; choose among "
                f"{', '.join(choices)}"
            )
    if not names:
        raise ValueError(f"--metrics {metrics!r}: name at least one of {', '.join(choices)}")
    return names


def rouge_scores(answers: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """Return the mean F-measures of ROUGE-1, -2 and -L for the best reference, in percent.

    They are those of rouge-score without stemming.
    """
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = library("rouge_score.rouge_scorer").RougeScorer(kinds)
    best = []
    for answer, example in zip(answers, examples, strict=True):
        scores = [scorer.score(reference, answer) for reference in example.references]
        best.append([max(score[kind].fmeasure for score in scores) for kind in kinds])
    means = 100 * np.mean(best, axis=0)
    return dict(zip(("ROUGE-1", "ROUGE-2", "ROUGE-L"), map(float, means), strict=True))


def score_molecules(
    answers: Sequence[str],
    examples: Sequence[Example],
    tokenizer: str = "",
    metrics: str = "bleu,rouge,meteor",
) -> Score:
    """Return BLEU-2 (headline), BLEU-4, METEOR, and ROUGE-1, -2 and -L, in percent.

    BLEU (nltk's `corpus_bleu`) and METEOR compare tokens, so published numbers depend on the tokenizer: MolT5
    uses allenai/scibert_scivocab_uncased.

    Args:
        answers: one answer per example.
        examples: the questions (P).
        tokenizer: "words", or the model whose tokenizer is used (folder or hub id).
        metrics: the metrics to compute, separated by commas.
    """
    details: dict[str, float] = {}
    names = metric_names(metrics, ("bleu", "rouge", "meteor"))
    if "bleu" in names or "meteor" in names:
        split = splitter(tokenizer)
        hypotheses = [split(answer) for answer in answers]
        references = [[split(reference) for reference in example.references] for example in examples]
    if "bleu" in names:
        corpus_bleu = library("nltk.translate.bleu_score").corpus_bleu
        details["BLEU-2"] = 100 * float(corpus_bleu(references, hypotheses, weights=(0.5, 0.5)))
        details["BLEU-4"] = 100 * float(corpus_bleu(references, hypotheses, weights=(0.25,) * 4))
    if "rouge" in names:
        details.update(rouge_scores(answers, examples))
    if "meteor" in names:
        details["METEOR"] = nltk_meteor(references, hypotheses)
    unit = next(iter(details))
    return Score(details[unit], unit, None, details)


def nltk_meteor(references: Sequence[Sequence[list[str]]], hypotheses: Sequence[list[str]]) -> float:
    """Return the mean METEOR by nltk in percent; raise `ValueError` if nltk's WordNet is missing."""
    meteor_score = library("nltk.translate.meteor_score").meteor_score
    try:
        scores = [meteor_score(*pair) for pair in zip(references, hypotheses, strict=True)]
    except LookupError as error:
        raise ValueError(
            'METEOR needs nltk\'s WordNet; run "python -m nltk.downloader wordnet omw-1.4", '
            "or leave it out with --metrics bleu,rouge"
        ) from error
    return 100 * float(np.mean(scores))


def splitter(tokenizer: str) -> Callable[[str], list[str]]:
    """Return a function that splits texts into tokens.

    `"words"` splits at spaces; any other `tokenizer` is a model's (folder or hub id).

    Raises:
        ValueError: `tokenizer` is empty or cannot be loaded.
    """
    if tokenizer == WORDS:
        return lambda text: text.split()[:TRUNCATED]
    if not tokenizer:
        raise ValueError(
            "--tokenizer: BLEU and METEOR depend on it; give a model such as "
            f'allenai/scibert_scivocab_uncased (MolT5), or "{WORDS}" to split at spaces'
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
    """Return CIDEr (headline), BLEU-1 to -4, ROUGE-L, METEOR and SPICE over PTB tokens, times 100.

    They are those of COCO's caption evaluation (pycocoevalcap), which needs Java; SPICE first downloads
    CoreNLP.

    Args:
        answers: one answer per example.
        examples: the images (P).
        metrics: the metrics to compute, separated by commas.
        details: whether to compute all of them, or only the first, which is the headline.
    """
    names = metric_names(metrics, ("bleu", "rouge", "meteor", "cider", "spice"))
    tokens = ptb_tokens([*answers, *(text for example in examples for text in example.references)])
    ids = [example.prompt.id for example in examples]
    hypotheses = {name: [tokens[text]] for name, text in zip(ids, answers, strict=True)}
    references = {
        name: [tokens[text] for text in example.references]
        for name, example in zip(ids, examples, strict=True)
    }
    scorers = {
        "cider": ("cider.cider", "Cider", ["CIDEr"]),
        "bleu": ("bleu.bleu", "Bleu", ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"]),
        "rouge": ("rouge.rouge", "Rouge", ["ROUGE-L"]),
        "meteor": ("meteor.meteor", "Meteor", ["METEOR"]),
        "spice": ("spice.spice", "Spice", ["SPICE"]),
    }
    scores: dict[str, float] = {}
    for name in [name for name in scorers if name in names][: None if details else 1]:
        module, kind, labels = scorers[name]
        values, _ = getattr(library(f"pycocoevalcap.{module}"), kind)().compute_score(references, hypotheses)
        scores.update(zip(labels, (100 * float(value) for value in np.ravel(values)), strict=True))
    unit = next(iter(scores))
    return Score(scores[unit], unit, None, scores)


PTB_TOKENS: dict[str, str] = {}
"""Cache of tokenized texts: Java takes a second to start, and a bootstrap scores the same texts often."""


def ptb_tokens(texts: Sequence[str]) -> dict[str, str]:
    """Return the tokens of each text by Stanford's PTBTokenizer, with spaces between them.

    The tokenizer takes one text per line. It also breaks lines at characters that pycocoevalcap does not
    replace, so these become spaces here.

    Raises:
        ValueError: the tokenizer cannot run.
    """
    missing = [text for text in dict.fromkeys(texts) if text not in PTB_TOKENS]
    if not missing:
        return PTB_TOKENS
    if shutil.which("java") is None:
        raise ValueError(
            "COCO's captions are tokenized by Stanford's PTBTokenizer, which needs Java; install a runtime "
            '(such as the package default-jre-headless), or score them as "captions"'
        )
    tokenize = library("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer().tokenize
    captions = {row: [{"caption": " ".join(text.split())}] for row, text in enumerate(missing)}
    try:
        tokens = tokenize(captions)
    except OSError as error:
        raise ValueError(
            f"pycocoevalcap cannot write to its own folder ({error}); install it where you have write access"
        ) from error
    PTB_TOKENS.update((text, tokens[row][0]) for row, text in enumerate(missing))
    return PTB_TOKENS


def score_instruction_captions(
    answers: Sequence[str], examples: Sequence[Example], details: bool = True
) -> Score:
    """Return BLEU-4 (headline), BLEU-2, and ROUGE-1, -2 and -L, in percent.

    BLEU is sacrebleu's with its tokenizer 13a. Without `details` only BLEU-4 is computed.
    """
    metrics = library("sacrebleu.metrics")
    references = [[example.references[0] for example in examples]]
    scores = {
        f"BLEU-{order}": float(
            metrics.BLEU(max_ngram_order=order).corpus_score(list(answers), references).score
        )
        for order in ((4, 2) if details else (4,))
    }
    if details:
        scores.update(rouge_scores(answers, examples))
    return Score(scores["BLEU-4"], "BLEU-4", None, scores)


BENCHMARKS = (
    Benchmark(
        "coco-captions",
        "github.com/salaniz/pycocoevalcap",
        read_coco,
        score_coco,
        {"metrics": "bleu,rouge,meteor,cider"},
        score_without_details=partial(score_coco, details=False),
    ),
    Benchmark(
        "chebi20",
        "github.com/acharkq/MolCA: model/help_funcs.py",
        read_chebi20,
        score_molecules,
        {"tokenizer": "", "metrics": "bleu,rouge,meteor"},
        promptable=False,
    ),
    Benchmark(
        "captions",
        "sacrebleu, rouge-score",
        read_instruction_captions,
        score_instruction_captions,
        score_without_details=partial(score_instruction_captions, details=False),
    ),
)
