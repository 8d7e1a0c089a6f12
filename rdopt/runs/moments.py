"""The second moments of a run: measured once on its calibration text and kept in its folder."""

from collections.abc import Callable
from pathlib import Path

from rdopt.calibration.moments import Moments
from rdopt.calibration.subject import Corpus, Subject, corpus_moments, load_moments, save_moments
from rdopt.config.schema import TextConfig

MOMENTS = "moments.safetensors"


def moments_of(
    folder: Path,
    subject: Subject,
    corpus: Corpus,
    text: TextConfig,
    progress: Callable[[int, int], None] | None = None,
) -> Moments:
    """The moments of a model on its calibration text.

    Args:
        folder: of the run; kept there under MOMENTS, those of another model or text are measured again.
        subject: the model.
        corpus: its text.
        text: the text's configuration, whose seed draws the labels.
        progress: called with (sequences, of how many) while they are measured.
    """
    key = f"{subject.fingerprint} {corpus.fingerprint} {text.seed}"
    path = folder / MOMENTS
    moments = load_moments(path, key)
    if moments is None:
        path.unlink(missing_ok=True)
        moments = corpus_moments(subject, corpus, text, progress)
        save_moments(path, moments, key)
    return moments
