"""The rows of the zoo: (task, model type) pairs from the auto-mappings of transformers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SAMPLE = Path(__file__).parent / "sample.txt"


@dataclass(frozen=True)
class Task:
    """A task of the zoo.

    Attributes:
        mapping: the auto-mapping ``MODEL_FOR_…_MAPPING_NAMES``.
        auto: the auto-class that finds a config's model.
        inputs: what is explained: ``text``, ``image``, ``audio`` or ``image-text`` (both).
        labels: whether the head has ``num_labels`` classes.
    """

    mapping: str
    auto: str
    inputs: str = "text"
    labels: bool = False


TASKS: dict[str, Task] = {
    "causal_lm": Task("CAUSAL_LM", "AutoModelForCausalLM"),
    "masked_lm": Task("MASKED_LM", "AutoModelForMaskedLM"),
    "seq2seq": Task("SEQ_TO_SEQ_CAUSAL_LM", "AutoModelForSeq2SeqLM"),
    "image_cls": Task("IMAGE_CLASSIFICATION", "AutoModelForImageClassification", "image", labels=True),
    "audio_cls": Task("AUDIO_CLASSIFICATION", "AutoModelForAudioClassification", "audio", labels=True),
    "seq_cls": Task("SEQUENCE_CLASSIFICATION", "AutoModelForSequenceClassification", labels=True),
    "token_cls": Task("TOKEN_CLASSIFICATION", "AutoModelForTokenClassification", labels=True),
    "qa": Task("QUESTION_ANSWERING", "AutoModelForQuestionAnswering"),
    "itt": Task("IMAGE_TEXT_TO_TEXT", "AutoModelForImageTextToText"),
    "itt_img": Task("IMAGE_TEXT_TO_TEXT", "AutoModelForImageTextToText", "image-text"),
}


@dataclass(frozen=True, order=True)
class Row:
    """One architecture under one task."""

    task: str
    model: str

    @property
    def inputs(self) -> str:
        """What is explained; see :class:`Task`."""
        return TASKS[self.task].inputs

    def __str__(self) -> str:
        return f"{self.task}/{self.model}"


def rows(tasks: Iterable[str] = (), models: Iterable[str] = ()) -> list[Row]:
    """All rows, or those of some tasks and model types, in the order of tasks and mappings."""
    from transformers.models.auto import modeling_auto

    tasks, models = set(tasks) or set(TASKS), set(models)
    return [
        Row(name, model)
        for name, task in TASKS.items()
        if name in tasks
        for model in getattr(modeling_auto, f"MODEL_FOR_{task.mapping}_MAPPING_NAMES")
        if not models or model in models
    ]


def sample(path: Path = SAMPLE) -> dict[Row, tuple[str, ...]]:
    """The rows that a file lists, and the rules for whose sake each is there.

    A line holds the task, the model type and names of rules; ``#`` begins a comment.
    """
    lines = (line.split("#")[0].split() for line in path.read_text().splitlines())
    return {Row(*line[:2]): tuple(line[2:]) for line in lines if line}
