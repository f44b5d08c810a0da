"""Benchmarks of sounds: the nearest label, mean average precision, and readers of their label files."""

import json

import numpy as np
import pytest

from deepinsert.controller.metrics.benchmark import BENCHMARKS, benchmark, promptable_benchmark
from deepinsert.controller.metrics.rules.embedders import similarities
from deepinsert.controller.metrics.rules.sound_labels import answer_text, label_text, mean_average_precision
from deepinsert.envs.data.media import DatasetError


def test_answers_and_labels_have_the_same_form():
    assert answer_text('Audio caption: "A Dog barks".') == "sound of a dog barks."
    assert label_text("Dog_bark") == "sound of dog bark"


def test_mean_average_precision():
    """The first class has hits at ranks 1 and 3: (1/1 + 2/3) / 2 = 5/6. The second has one at rank 2: 1/2.

    No clip has the third class.
    """
    true = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=bool)
    scores = np.array([[0.9, 0.8, 0.5], [0.8, 0.7, 0.5], [0.7, 0.1, 0.5], [0.1, 0.0, 0.5]])
    score = mean_average_precision(true, scores)
    assert score.headline == pytest.approx(100 * (5 / 6 + 1 / 2) / 2)
    assert score.unit == "mAP" and score.items is None and score.details == {"classes": 2}


def test_tfidf_prefers_the_label_with_the_words_of_the_answer():
    labels = ["sound of dog", "sound of church bells", "sound of clock tick"]
    cosines = similarities(["sound of a clock ticking", "sound of dogs", "sound of dogs"], labels, "tfidf")
    assert cosines.shape == (3, 3) and cosines.argmax(axis=1).tolist() == [2, 0, 0]
    assert similarities(labels, labels, "tfidf").diagonal() == pytest.approx(1)


def test_an_embedder_must_be_named():
    with pytest.raises(ValueError, match=r'--embedder: .*"tfidf"'):
        similarities(["a"], ["b"], "")
    with pytest.raises(ValueError, match="--embedder no/such"):
        similarities(["a"], ["b"], "no/such")
    with pytest.raises(ValueError, match="--embedder tfidf: pope has no setting"):
        benchmark("pope", embedder="tfidf")


def test_sounds_are_only_scored():
    names = ("esc50", "vocalsound", "vggsound", "fsd50k", "audioset")
    assert not any(BENCHMARKS[name].promptable for name in names)
    with pytest.raises(ValueError, match=r"--benchmark esc50: .*deepinsert score"):
        promptable_benchmark("esc50")
    assert promptable_benchmark("pope").name == "pope"


def test_esc50(tmp_path):
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    lines += [
        f"1-{n}-A-{n}.wav,1,{n},{label},True,1,A" for n, label in enumerate(["dog", "church_bells", "rain"])
    ]
    (tmp_path / "esc50.csv").write_text("\n".join(lines))
    rule = benchmark("esc50", embedder="tfidf")
    examples = rule.read(tmp_path / "esc50.csv", None)
    assert [e.prompt.id for e in examples] == ["1-0-A-0", "1-1-A-1", "1-2-A-2"]
    score = rule.score(["A dog.", "bells of a church", "a dog"], examples)
    assert score.items.tolist() == [1, 1, 0] and rule.settings == {"embedder": "tfidf"}
    (tmp_path / "esc50.csv").write_text("file,category\na.wav,dog\n")
    with pytest.raises(
        DatasetError, match=r"esc50\.csv: the first line has no column 'filename'; it has: file, category"
    ):
        rule.read(tmp_path / "esc50.csv", None)


def test_an_answer_that_is_similar_to_no_label_is_wrong(tmp_path):
    (tmp_path / "esc50.csv").write_text("filename,category\na.wav,dog\nb.wav,rain\n")
    rule = benchmark("esc50", embedder="tfidf")
    examples = rule.read(tmp_path / "esc50.csv", None)
    labels = ["dog", "rain"]
    cosines = similarities(["zzzz"], labels, "tfidf")
    assert cosines.max() == 0
    assert rule.score(["dog", "rain"], examples).headline == 100


def test_vocalsound(tmp_path):
    (tmp_path / "datafiles").mkdir()
    (tmp_path / "class_labels_indices_vs.csv").write_text(
        'index,mid,display_name\n0,/m/01j3sz,"Laughter"\n1,/m/01b_21,"Throat clearing"\n'
    )
    row = {"wav": "/data/f0003_0_throatclearing.wav", "labels": "/m/01b_21"}
    path = tmp_path / "datafiles" / "te.json"
    path.write_text(json.dumps({"data": [row]}))
    rule = benchmark("vocalsound", embedder="tfidf")
    (example,) = rule.read(path, None)
    assert example.prompt.id == "f0003_0_throatclearing" and example.references == ("Throat clearing",)
    assert rule.score(["someone clearing the throat"], [example]).headline == 100
    path.write_text(json.dumps({"data": [{**row, "labels": "/m/x"}]}))
    with pytest.raises(DatasetError, match=r"data\[0\], field 'labels': '/m/x' is no label"):
        rule.read(path, None)


def test_vggsound(tmp_path):
    path = tmp_path / "vggsound.csv"
    path.write_text(
        'a1,30,"female speech, woman speaking",test\nb2,5,dog barking,train\nc3,0,dog barking,test\n'
    )
    rule = benchmark("vggsound", embedder="tfidf")
    examples = rule.read(path, None)
    assert [e.prompt.id for e in examples] == ["a1_000030", "c3_000000"]
    assert rule.score(["a woman speaks", "a woman speaks"], examples).headline == 50
    path.write_text("a1,30,dog\n")
    with pytest.raises(DatasetError, match="line 1: the line has 3 columns, 4 are expected"):
        rule.read(path, None)


def test_fsd50k(tmp_path):
    (tmp_path / "vocabulary.csv").write_text("0,Dog,/m/1\n1,Church_bell,/m/2\n2,Rain,/m/3\n")
    (tmp_path / "eval.csv").write_text(
        'fname,labels,mids\n37199,"Dog,Rain","/m/1,/m/3"\n37200,Church_bell,/m/2\n'
    )
    rule = benchmark("fsd50k", embedder="tfidf")
    examples = rule.read(tmp_path / "eval.csv", None)
    assert examples[0].prompt.id == "37199" and examples[0].references == ("Dog", "Rain")
    score = rule.score(["a dog in the rain", "a church bell"], examples)
    assert score.headline == 100 and score.details == {"classes": 3}


def test_audioset(tmp_path):
    (tmp_path / "class_labels_indices.csv").write_text(
        'index,mid,display_name\n0,/m/09x0r,"Speech"\n'
        '1,/m/05zppz,"Male speech, man speaking"\n2,/m/0k4j,Car\n'
    )
    (tmp_path / "eval_segments.csv").write_text(
        "# Segments csv created\n# num_ytids=2\n# YTID, start_seconds, end_seconds, positive_labels\n"
        '--4gqARaEJE, 0.000, 10.000, "/m/09x0r,/m/05zppz"\n-2, 30.0, 40.0, "/m/0k4j"\n'
    )
    rule = benchmark("audioset", embedder="tfidf")
    examples = rule.read(tmp_path / "eval_segments.csv", None)
    assert examples[0].prompt.id == "--4gqARaEJE"
    assert examples[0].references == ("Speech", "Male speech, man speaking")
    assert rule.score(["speech of a man speaking", "a car"], examples).headline == 100
