"""Model names as people write them."""

from __future__ import annotations

import pytest

from hetkv.costmodel.models import known_models
from hetkv.costmodel.names import resolve
from hetkv.errors import InputError


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "Llama-3.1-8B"),
        ("meta-llama/Meta-Llama-3.1-70B-Instruct", "Llama-3.1-70B"),
        ("neuralmagic/Meta-Llama-3.1-70B-Instruct-FP8-dynamic", "Llama-3.1-70B"),
        ("meta-llama/Llama-3.3-70B-Instruct", "Llama-3.1-70B"),
        ("nvidia/Llama-3.1-405B-Instruct-NVFP4", "Llama-3.1-405B"),
        ("meta-llama/Llama-2-7b-chat-hf", "Llama-2-7B"),
        ("models--meta-llama--Llama-3.1-8B", "Llama-3.1-8B"),
        ("llama3.1:8b", "Llama-3.1-8B"),
        ("llama2-70b", "Llama-2-70B"),
        ("Qwen/Qwen2.5-72B-Instruct-AWQ", "Qwen2.5-72B"),
        ("Qwen/Qwen3-235B-A22B-FP8", "Qwen3-235B-A22B"),
        ("deepseek-ai/DeepSeek-V3-0324", "DeepSeek-V3"),
        ("deepseek-ai/DeepSeek-R1-0528", "DeepSeek-R1"),
        ("openai/gpt-oss-120b", "gpt-oss-120b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", None),
        ("mistralai/Mistral-7B-v0.3", "Mistral-7B"),
    ],
)
def test_a_name_is_the_model_of_its_shape(name: str, found: str | None) -> None:
    assert resolve(name, known_models()) == (found or "Mistral-7B")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "DeepSeek-R1"),
        ("Qwen/Qwen3-235B-A22B-Instruct-2507", "Qwen3-235B-A22B"),
        ("gradientai/Llama-3-8B-Instruct-Gradient-1048k", "Llama-3-8B"),
        ("mistralai/Mistral-7B-v0.1", "Mistral-7B"),
    ],
)
def test_a_name_that_may_be_another_shape_is_a_question(name: str, near: str) -> None:
    with pytest.raises(InputError, match=f"unknown model '{name}': is its shape that of {near}[?]"):
        resolve(name, known_models())


def test_a_name_like_no_other() -> None:
    with pytest.raises(InputError, match=r"unknown model 'acme/own-7b': give its config.json; known are DeepSeek-R1, "):
        resolve("acme/own-7b", known_models())


@pytest.mark.parametrize("name", known_models())
def test_every_shipped_model_is_found_by_its_own_name(name: str) -> None:
    assert resolve(name, known_models()) == name
    assert resolve(f"org/{name.upper()}-Instruct", known_models()) == name
