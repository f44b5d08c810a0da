"""What turns texts into vectors, to find the label that an answer means.

"tfidf" needs nothing but scikit-learn and sees spelling alone; any other name is a model of
sentence-transformers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

TFIDF = "tfidf"
CHOICES = f'"{TFIDF}" (spelling only, offline) or a sentence-transformers model such as all-MiniLM-L6-v2'


def similarities(texts: Sequence[str], labels: Sequence[str], embedder: str) -> NDArray[np.float64]:
    """Cosine of each text and label: (texts, labels). Raises `ValueError` where `embedder` names none."""
    if not embedder:
        raise ValueError(f"--embedder: answers are compared with labels by a text embedder; give {CHOICES}")
    known, which = np.unique(np.array(texts, dtype=object), return_inverse=True)
    both = _tfidf(list(known), labels) if embedder == TFIDF else _sentences(list(known), labels, embedder)
    mine, theirs = (part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12) for part in both)
    return (mine @ theirs.T)[which]


def _tfidf(texts: list[str], labels: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Words and their parts of three to five letters, weighted by how few labels have them."""
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer

    own, other = [], []
    for analyzer, sizes in (("word", (1, 2)), ("char_wb", (3, 5))):
        vectors = TfidfVectorizer(analyzer=analyzer, ngram_range=sizes, sublinear_tf=True).fit(labels)
        own.append(vectors.transform(texts))
        other.append(vectors.transform(labels))
    return hstack(own).toarray(), hstack(other).toarray()


def _sentences(
    texts: list[str], labels: Sequence[str], name: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
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
    return tuple(  # type: ignore[return-value]
        np.asarray(model.encode(list(part), show_progress_bar=False), dtype=np.float64)
        for part in (texts, labels)
    )
