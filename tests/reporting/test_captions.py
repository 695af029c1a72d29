"""Every caption says what is shown, how many, what the marks are, and how to read it."""

import re
import string

import pytest
from references.pages import LEAST_WORDS

from pulmo_jax.reporting.captions import TRAINING_CAPTIONS
from pulmo_jax.tasks.anomalies.captions import CAPTIONS as ANOMALIES
from pulmo_jax.tasks.classification.captions import CAPTIONS as CLASSIFICATION
from pulmo_jax.tasks.landmarks.captions import CAPTIONS as LANDMARKS
from pulmo_jax.tasks.point_sources.captions import CAPTIONS as POINT_SOURCES
from pulmo_jax.tasks.segmentation.captions import CAPTIONS as SEGMENTATION

TABLES = {"training": TRAINING_CAPTIONS, "anomalies": ANOMALIES, "classification": CLASSIFICATION,
          "landmarks": LANDMARKS, "point_sources": POINT_SOURCES, "segmentation": SEGMENTATION}  # fmt: skip
CAPTIONS = [
    pytest.param(name, text, id=f"{task}-{name}") for task, table in TABLES.items() for name, text in table.items()
]
COUNTLESS = {"profile"}  # of a trace, whose length the axis label gives


@pytest.mark.parametrize(("name", "text"), CAPTIONS)
def test_a_caption_is_a_text_with_numbers_and_advice(name, text):
    fields = {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}
    assert fields or name in COUNTLESS
    assert len(text.split()) >= LEAST_WORDS + 10
    assert name.lower() not in (text.lower(), text.lower().replace(" ", "_"))
    assert not re.search(r"\.(png|pdf)", text)
    assert text.count(". ") >= 1  # what is shown, and how to read it


@pytest.mark.parametrize(("name", "text"), [case for case in CAPTIONS if "anomalies" in str(case.id)])
def test_findings_are_the_models_and_lesions_the_ground_truths(name, text):
    assert not re.search(r"\b[Dd]etections?\b|\bhits?\b|suspicious", text)
    for sentence in re.split(r"[.:;] ", text):
        assert not (re.search("finding", sentence) and re.search("ground truth", sentence)), sentence
