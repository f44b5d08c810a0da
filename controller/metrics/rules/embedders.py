"""Text embedders, which find the label that a free answer means.

"tfidf" needs only scikit-learn and compares spelling alone; any other name is a model of
sentence-transformers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

TFIDF = "tfidf"
CHOICES = f'"{TFIDF}" (spelling only, offline) or a sentence-transformers model such as all-MiniLM-L6-v2'

FloatArray = NDArray[np.float64]


def similarities(texts: Sequence[str], labels: Sequence[str], embedder: str) -> FloatArray:
    """Return the cosine of each text and label, (texts, labels).

    Raises:
        ValueError: `embedder` is empty, or names no model that can be loaded.
    """
    if not embedder:
        raise ValueError(f"--embedder: answers are compared with labels by a text embedder; give {CHOICES}")
    distinct_texts, rows = np.unique(np.array(texts, dtype=object), return_inverse=True)
    embed = _tfidf if embedder == TFIDF else _sentences
    text_vectors, label_vectors = (
        vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        for vectors in embed(list(distinct_texts), labels, embedder)
    )
    cosines: FloatArray = (text_vectors @ label_vectors.T)[rows]
    return cosines


def _tfidf(texts: list[str], labels: Sequence[str], name: str) -> tuple[FloatArray, FloatArray]:
    """Embed texts and labels by words and by parts of three to five letters; rare parts weigh more."""
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer

    text_parts, label_parts = [], []
    for analyzer, sizes in (("word", (1, 2)), ("char_wb", (3, 5))):
        vectors = TfidfVectorizer(analyzer=analyzer, ngram_range=sizes, sublinear_tf=True).fit(labels)
        text_parts.append(vectors.transform(texts))
        label_parts.append(vectors.transform(labels))
    return hstack(text_parts).toarray(), hstack(label_parts).toarray()


def _sentences(texts: list[str], labels: Sequence[str], name: str) -> tuple[FloatArray, FloatArray]:
    """Embed texts and labels by the model `name` of sentence-transformers."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ValueError(
            f"--embedder {name}: it needs the package sentence-transformers; run "
            f'"pip install sentence-transformers", or give "{TFIDF}"'
        ) from error
    try:
        model = SentenceTransformer(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--embedder {name}: it cannot be loaded ({str(error).splitlines()[0]}); give {CHOICES}"
        ) from error

    def embed(parts: Sequence[str]) -> FloatArray:
        return np.asarray(model.encode(list(parts), show_progress_bar=False), dtype=np.float64)

    return embed(texts), embed(labels)
