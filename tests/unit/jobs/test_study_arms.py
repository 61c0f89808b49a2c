"""Arms of a study by the chat template of its base model."""

import pytest

from tests.support import tiny_models
from trimtab.data.prompt import Prompt
from trimtab.jobs.study.baselines import build_study_arms
from trimtab.types import BASE_ARM, EMPTY_ARM, TEXT_ARM


@pytest.mark.parametrize(("family", "adds_system_message"), [("qwen2", True), ("qwen3", False)])
def test_empty_system_prompt_is_an_arm_where_the_template_adds_a_system_message(tmp_path, family, adds_system_message):
    base = tiny_models.make_base_model(tiny_models.FAMILIES[family], tmp_path / family)
    arms = {arm.name: arm for arm in build_study_arms(base, {})}
    expected = [BASE_ARM, EMPTY_ARM, TEXT_ARM] if adds_system_message else [BASE_ARM, TEXT_ARM]
    assert list(arms) == expected
    if adds_system_message:
        prompt = Prompt("Hello", "benign_easy", "test", "Hello")
        assert arms[EMPTY_ARM].build_conversation(prompt).messages[0] == {"role": "system", "content": ""}
