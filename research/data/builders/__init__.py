"""TFDS builders: data sets prepared once per content, as ArrayRecord files, and served by random access."""

from research.data.builders.arithmetic import prepare_arithmetic
from research.data.builders.base import Prepared, RecordSource
from research.data.builders.chat_sft import ChatSpec, prepare_chat_sft
from research.data.builders.preferences import PreferenceSpec, prepare_preferences
from research.data.builders.text_corpus import TextSpec, prepare_text_corpus

__all__ = [
    "ChatSpec",
    "PreferenceSpec",
    "Prepared",
    "RecordSource",
    "TextSpec",
    "prepare_arithmetic",
    "prepare_chat_sft",
    "prepare_preferences",
    "prepare_text_corpus",
]
