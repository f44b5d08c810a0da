"""Scores of captions on cases worked by hand, and errors that name a missing library or program."""

import json
import shutil

import pytest
from picture_files import save_image

from deepinsert.controller.metrics.benchmark import benchmark, check_images
from deepinsert.controller.metrics.rules import caption_scores as captions

nltk = pytest.importorskip("nltk")
pytest.importorskip("rouge_score")
pytest.importorskip("sacrebleu")


@pytest.fixture
def chebi(tmp_path):
    path = tmp_path / "test.txt"
    path.write_text(
        'CID\tSMILES\tdescription\n7\tCCO\tThe molecule is "ethanol" that burns well.\n'
        "8\tO\tThe molecule is water and does not burn.\n"
    )
    return path


def molecules(tokenizer="words", metrics="bleu,rouge"):
    return benchmark("chebi20", tokenizer=tokenizer, metrics=metrics)


def test_molecules(chebi):
    """The second answer lacks one of its eight words.

    So 14 of 15 words and 11 of 13 pairs are right, and both answers are as long as their references.
    """
    examples = molecules().read(chebi, None)
    assert [e.prompt.id for e in examples] == ["7", "8"] and examples[0].references[0].count('"') == 2
    answers = [examples[0].references[0], "The molecule is WATER and does not burn."]
    score = molecules().score(answers, examples)
    assert score.unit == "BLEU-2" and score.items is None
    assert score.headline == pytest.approx(100 * (14 / 15 * 11 / 13) ** 0.5)
    assert score.details["ROUGE-1"] == pytest.approx(100)  # rouge-score ignores case
    assert set(score.details) == {"BLEU-2", "BLEU-4", "ROUGE-1", "ROUGE-2", "ROUGE-L"}


def test_rouge_counts_words_and_sequences(chebi):
    examples = molecules(metrics="rouge").read(chebi, None)[1:]
    score = molecules(metrics="rouge").score(["the molecule does burn"], examples)
    # All 4 words of the answer are right, of 8: F = 2 * 1 * (1/2) / (3/2). One of its 3 pairs is right, of 7:
    # F = 2 * (1/21) / (10/21).
    assert score.details["ROUGE-1"] == pytest.approx(100 * 2 / 3)
    assert score.details["ROUGE-2"] == pytest.approx(20)
    assert score.unit == "ROUGE-1"


def test_the_tokenizer_of_a_model(chebi, tmp_path):
    from deepinsert.backbones import load_backbone

    load_backbone("tiny", device="cpu").processor.tokenizer.save_pretrained(tmp_path / "tokens")
    rule = molecules(str(tmp_path / "tokens"), "bleu")
    examples = rule.read(chebi, None)
    assert rule.score([e.references[0] for e in examples], examples).headline == pytest.approx(100)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, "--tokenizer: BLEU and METEOR depend on it"),
        ({"tokenizer": "no/such"}, "--tokenizer no/such: "),
        (
            {"metrics": "blue"},
            "--metrics 'blue': 'blue' is no metric of this benchmark; choose among bleu, rouge, meteor",
        ),
        ({"metrics": ","}, "name at least one of"),
        ({"embedder": "tfidf"}, "--embedder tfidf: chebi20 has --tokenizer, --metrics"),
    ],
)
def test_unusable_settings_are_refused(chebi, settings, problem):
    examples = molecules().read(chebi, None)
    with pytest.raises(ValueError, match=problem):
        benchmark("chebi20", **settings).score(["a", "b"], examples)


def test_meteor_without_wordnet_names_the_command_that_installs_it(chebi, monkeypatch, tmp_path):
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nothing")])
    from nltk.corpus import wordnet

    if "_LazyCorpusLoader__name" not in wordnet.__dict__:
        pytest.skip("WordNet is loaded already")
    rule = molecules(metrics="meteor")
    with pytest.raises(ValueError, match=r"python -m nltk\.downloader wordnet"):
        rule.score(["a burning liquid", "water"], rule.read(chebi, None))


def test_a_missing_library_is_named():
    with pytest.raises(ValueError, match=r"no_such_library is not installed.*deepinsert\[metrics\]"):
        captions.library("no_such_library.part")


def test_captions_of_a_users_own(rendered_data):
    rule = benchmark("captions")
    examples = rule.read(rendered_data, None)[:8]
    score = rule.score([e.references[0] for e in examples], examples)
    assert score.unit == "BLEU-4" and score.details["BLEU-2"] == pytest.approx(100)
    assert score.details["ROUGE-L"] == pytest.approx(100)
    answers = [e.references[0][::-1] if row % 2 else e.references[0] for row, e in enumerate(examples)]
    assert rule.headline(answers, examples) == rule.score(answers, examples).headline < 100


def write_coco(folder):
    record = {
        "images": [{"id": 42, "file_name": "COCO_val2014_42.jpg"}, {"id": 43, "file_name": "b.jpg"}],
        "annotations": [
            {"image_id": 42, "id": 1, "caption": "A man rides a horse."},
            {"image_id": 42, "id": 2, "caption": "Someone on a brown horse"},
            {"image_id": 43, "id": 3, "caption": "A red bus in the city."},
        ],
    }
    path = folder / "captions_val2014.json"
    path.write_text(json.dumps(record))
    save_image(folder / "val2014" / "COCO_val2014_42.jpg")
    save_image(folder / "val2014" / "b.jpg")
    return path


def test_read_coco_captions(tmp_path):
    examples = benchmark("coco-captions").read(write_coco(tmp_path), None)
    check_images(examples)
    assert [e.prompt.id for e in examples] == ["42", "43"] and len(examples[0].references) == 2


def test_coco_without_java_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    rule = benchmark("coco-captions")
    with pytest.raises(ValueError, match="needs Java"):
        rule.score(["a", "b"], rule.read(write_coco(tmp_path), None))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_coco_captions(tmp_path):
    """An answer that equals a reference, apart from case and points, has the highest score."""
    pytest.importorskip("pycocoevalcap")
    rule = benchmark("coco-captions")
    examples = rule.read(write_coco(tmp_path), None)
    right = rule.score(["a man rides a horse", "A red bus in the city"], examples)
    wrong = rule.score(["a red bus in the city", "a man rides a horse"], examples)
    assert right.unit == "CIDEr" and right.details["BLEU-4"] == pytest.approx(100, abs=1e-3)
    assert right.details["METEOR"] == pytest.approx(100, abs=1e-3) and right.headline > 100
    assert wrong.headline < 5 and wrong.details["METEOR"] < 40
    odd = rule.score(["a man\u2028rides\ra\x0bhorse", "A red bus in the city"], examples)
    assert odd.details == right.details


@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_tokenized_captions_need_no_java_again(tmp_path, monkeypatch):
    """Bootstrap draws score the same texts hundreds of times."""
    pytest.importorskip("pycocoevalcap")
    rule = benchmark("coco-captions", metrics="cider,bleu")
    examples = rule.read(write_coco(tmp_path), None)
    answers = ["a man rides a horse", "A red bus in the city"]
    whole = rule.score(answers, examples)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert rule.headline(answers, examples) == whole.headline > 100
    # The score is that of the passed examples alone.
    assert rule.headline(answers[::-1], examples[::-1]) == pytest.approx(whole.headline)
    assert rule.headline(answers[:1], examples[:1]) != whole.headline
    with pytest.raises(ValueError, match="needs Java"):
        rule.headline(["a horse", answers[1]], examples)
