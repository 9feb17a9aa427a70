"""Every rendered conversation ends where the assistant speaks, continues its last turn, or is refused with a reason."""

import itertools

import pytest

from model.text.chat.template import TEMPLATE
from tests.bento.openai_service import CHAT_TEMPLATE, refusal, running_service
from tests.support.tiny import PLAIN_TEMPLATE

PATH = "/v1/chat/completions"
SYSTEM, USER, ASSISTANT = (
    {"role": "system", "content": "Be terse."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because"},
)
TEMPLATES = {
    "the project's own": TEMPLATE,
    "of its checkpoints without marks": PLAIN_TEMPLATE,
    "with a generation prompt": CHAT_TEMPLATE,
}


@pytest.fixture(scope="module", params=TEMPLATES.values(), ids=TEMPLATES.keys())
def service(request):
    with running_service(chat_template=request.param) as running:
        yield running


def prompt_of(service, messages, **more) -> str:
    answer = service.post(PATH, messages=messages, max_tokens=1, return_token_ids=True, **more)
    assert answer.status_code == 200, answer.text
    return service.tokenizer.decode(answer.json()["choices"][0]["prompt_token_ids"])


def conversations():
    for length in (1, 2, 3):
        yield from itertools.product((SYSTEM, USER, ASSISTANT), repeat=length)


@pytest.mark.parametrize("messages", conversations(), ids=lambda turns: "".join(turn["role"][0] for turn in turns))
def test_every_order_of_roles_is_defined(service, messages):
    answer = service.post(PATH, messages=list(messages), max_tokens=1, return_token_ids=True)
    if answer.status_code == 400:
        error = refusal(answer)
        assert error["code"] in ("no_assistant_turn", "chat_template") and error["param"] == "messages"
        assert messages[-1]["role"] != "user", "a conversation that ends with the user can be answered"
        return
    prompt = service.tokenizer.decode(answer.json()["choices"][0]["prompt_token_ids"])
    render = service.tokenizer.apply_chat_template
    whole = render([*messages, {"role": "assistant", "content": "ANSWER"}], tokenize=False)
    assert whole.startswith(prompt + "ANSWER")


def test_the_last_message_of_the_assistant_can_be_continued(service):
    prompt = prompt_of(service, [USER, ASSISTANT], continue_final_message=True)
    assert prompt.endswith("Because")
    assert prompt_of(service, [USER, ASSISTANT], continue_final_message=True, add_generation_prompt=False) == prompt
    spaced = [USER, {**ASSISTANT, "content": "Because "}]
    assert prompt_of(service, spaced, continue_final_message=True) == prompt + " "
    started = prompt_of(service, [USER])
    assert prompt == started + "Because"


def test_an_empty_turn_can_be_continued_and_is_the_opened_one(service):
    assert prompt_of(service, [USER, {**ASSISTANT, "content": ""}], continue_final_message=True) == prompt_of(
        service, [USER]
    )


@pytest.mark.parametrize(
    ("messages", "more", "param"),
    [
        ([USER], {"continue_final_message": True}, "continue_final_message"),
        ([USER, ASSISTANT], {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ([USER, ASSISTANT], {"add_generation_prompt": False}, "messages"),
        ([USER], {"continue_final_message": "yes"}, "continue_final_message"),
    ],
    ids=str,
)
def test_a_conversation_without_an_open_assistant_turn_is_refused(service, messages, more, param):
    assert refusal(service.post(PATH, messages=messages, **more))["param"] == param


def test_a_template_without_the_assistants_turn_is_refused_and_not_answered_with_junk():
    with running_service(chat_template="{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}") as service:
        error = refusal(service.post(PATH, messages=[USER]))
        assert error["code"] == "no_assistant_turn" and "'user'" in error["message"]
        assert prompt_of(service, [USER, ASSISTANT], continue_final_message=True).endswith("[assistant]Because")


THINKING = (
    "{%- for m in messages %}<|pad|>{{ m.role }}:{{ m.content }}<|endoftext|>{% endfor -%}"
    "{%- if add_generation_prompt %}<|pad|>assistant:{% generation %}{% endgeneration %}"
    "{%- if enable_thinking is defined and not enable_thinking %}(no thoughts){% endif -%}"
    "{%- if style == 'long' %}(long){% elif style is mapping %}({{ style.name }}){% endif -%}"
    "{%- for doc in documents or [] %}[{{ doc.text }}]{% endfor -%}{%- if size %}{{ 7 // (size - 1) }}{% endif -%}"
    "{%- endif -%}"
)


@pytest.fixture(scope="module")
def thinking():
    with running_service(chat_template=THINKING) as running:
        yield running


@pytest.mark.parametrize(
    ("values", "ending"),
    [
        (None, "assistant:"),
        ({}, "assistant:"),
        ({"enable_thinking": True}, "assistant:"),
        ({"enable_thinking": False}, "assistant:(no thoughts)"),
        ({"enable_thinking": False, "no_template_reads_this": [1, "<|endoftext|>"]}, "assistant:(no thoughts)"),
        ({"style": "long", "add_generation_prompt": True}, "assistant:(long)"),
        ({"style": {"name": "größer"}, "continue_final_message": False}, "assistant:(größer)"),
        ({"documents": [{"text": "a"}, {"text": "b"}]}, "assistant:[a][b]"),
    ],
)
def test_values_of_the_templates_variables_reach_it(thinking, values, ending):
    assert prompt_of(thinking, [USER], chat_template_kwargs=values).endswith(ending)
    tokens = thinking.post("/tokenize", messages=[USER], chat_template_kwargs=values).json()["tokens"]
    assert thinking.tokenizer.decode(tokens).endswith(ending)


@pytest.mark.parametrize(
    "values",
    [
        {"chat_template": "{{ 1 }}"},
        {"tokenize": True},
        {"messages": []},
        {"tools": []},
        {"add_generation_prompt": False},
        {"continue_final_message": True},
        {"style": "<|endoftext|>"},
        {"documents": [{"text": {"<|pad|>": 1}}]},
        "enable_thinking",
    ],
)
def test_values_that_the_request_may_not_set_are_refused(thinking, values):
    answer = thinking.post(PATH, messages=[USER], max_tokens=1, chat_template_kwargs=values)
    assert refusal(answer)["param"] == "chat_template_kwargs"


@pytest.mark.parametrize("values", [{"size": 1}, {"size": "x"}, {"documents": 7}, {"documents": [None]}])
def test_values_that_the_template_fails_on_are_the_requests_fault(thinking, values):
    answer = thinking.post(PATH, messages=[USER], max_tokens=1, chat_template_kwargs=values)
    assert refusal(answer)["code"] == "chat_template"


def test_values_need_messages_and_every_template_takes_unknown_ones(service):
    plain = prompt_of(service, [USER])
    assert prompt_of(service, [USER], chat_template_kwargs={"enable_thinking": True}) == plain
    answer = service.post("/tokenize", prompt="x", chat_template_kwargs={"enable_thinking": True})
    assert refusal(answer)["param"] == "chat_template_kwargs"
