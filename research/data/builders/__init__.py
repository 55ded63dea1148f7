"""TFDS builders: data sets prepared once per content, as ArrayRecord files, and served by random access."""

from research.data.builders.base import Prepared, RecordSource
from research.data.builders.chat_sft import ChatSpec, prepare_chat_sft
from research.data.builders.file import FileSpec
from research.data.builders.preferences import (
    prepare_arithmetic_preferences,
    prepare_judged,
    prepare_preferences,
)
from research.data.builders.rankings import prepare_arithmetic_rankings, prepare_rankings
from research.data.builders.steps import prepare_arithmetic_steps, prepare_steps
from research.data.builders.text_corpus import TextSpec, prepare_text_corpus
from research.tasks.arithmetic.build import prepare_arithmetic

__all__ = [
    "ChatSpec",
    "FileSpec",
    "Prepared",
    "RecordSource",
    "TextSpec",
    "prepare_arithmetic",
    "prepare_arithmetic_preferences",
    "prepare_arithmetic_rankings",
    "prepare_arithmetic_steps",
    "prepare_chat_sft",
    "prepare_judged",
    "prepare_preferences",
    "prepare_rankings",
    "prepare_steps",
    "prepare_text_corpus",
]
