"""Chat templates in the shapes of current families, written for these tests.

`m` is a message. Each entry's facts are known by its construction, not asked of minalign.
"""

from typing import NamedTuple


def each(body):
    return "{% for m in messages %}" + body + "{% endfor %}"


def cue(text):
    return "{% if add_generation_prompt %}" + text + "{% endif %}"


def by_role(**bodies):
    """{% if m.role == 'system' %}...: a body for each role, and nothing for others."""
    tests = [f"m.role == '{role}' %}}{body}" for role, body in bodies.items()]
    return "{% if " + "{% elif ".join(tests) + "{% endif %}"


def refuse(test, words):
    return "{% if " + test + " %}{{ raise_exception('" + words + "') }}{% endif %}"


def chatml(content="{{ m.content }}"):
    return each("<|im_start|>{{ m.role }}\n" + content + "<|im_end|>\n")


START = "<|im_start|>assistant\n"
STRICT = refuse("(m.role == 'user') != (loop.index0 % 2 == 0)", "roles must alternate")
# Thought in an answer is kept in the last turn only, as Qwen3's template does.
THINK_LAST = (
    "{% set a = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set t = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') "
    "if '</think>' in m.content else '' %}"
    "{% if loop.last %}<think>\n{{ t }}\n</think>\n\n{{ a }}{% else %}{{ a }}{% endif %}"
)
PART = "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}"


class Family(NamedTuple):
    """A template and what is true of it.

    system: "kept" in its own place, "user's" (goes before the user's text), or "lost".
    parts: roles whose content goes in parts.
    anew: whether a whole dialogue is another text than prompt, answer and ending in a row.
    bos: whether its tokenizer has a begin token: "written", "forgotten" or "".
    asked: `system` of a prompt without an answer, where that differs.
    """

    template: str | dict
    system: str = "kept"
    parts: tuple = ()
    anew: bool = False
    bos: str = ""
    asked: str = ""


LLAMA3 = each(
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
) + cue("<|start_header_id|>assistant<|end_header_id|>\n\n")
FAMILIES = {
    "chatml": Family(chatml() + cue(START)),
    "chatml that forgets bos": Family(chatml() + cue(START), bos="forgotten"),
    "internlm2, bos and chatml": Family("{{ bos_token }}" + chatml() + cue(START), bos="written"),
    "qwen2.5, a system of its own": Family(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n"
        "{% endif %}" + chatml() + cue(START)
    ),
    "qwen3, think in the last answer": Family(
        chatml(
            "{% if m.role == 'assistant' %}" + THINK_LAST + "{% else %}{{ m.content }}{% endif %}"
        )
        + cue(START),
        anew=True,
    ),
    "qwen3 thinking, an open think in the cue": Family(
        chatml(
            "{% if m.role == 'assistant' %}" + THINK_LAST + "{% else %}{{ m.content }}{% endif %}"
        )
        + cue(START + "<think>\n"),
        anew=True,
    ),
    "qwen3 instruct, thought is left out": Family(
        chatml("{{ m.content.split('</think>')[-1].lstrip('\n') }}") + cue(START)
    ),
    "deepseek r1": Family(
        "{{ bos_token }}"
        + each(
            by_role(
                system="{{ m.content }}",
                user="<|User|>{{ m.content }}",
                assistant="<|Assistant|>{{ m.content.split('</think>')[-1] }}<|end_of_sentence|>",
            )
        )
        + cue("<|Assistant|><think>\n"),
        anew=True,
        bos="written",
    ),
    "deepseek v3.1, a closed think in both": Family(
        "{{ bos_token }}"
        + each(
            by_role(
                system="{{ m.content }}",
                user="<|User|>{{ m.content }}",
                assistant="<|Assistant|></think>{{ m.content }}<|end_of_sentence|>",
            )
        )
        + cue("<|Assistant|></think>"),
        bos="written",
    ),
    "llama2": Family(
        "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>\n' + messages[0].content + "
        "'\n<</SYS>>\n\n' %}{% set ms = messages[1:] %}{% else %}{% set s = '' %}"
        "{% set ms = messages %}{% endif %}{% for m in ms %}"
        + STRICT
        + by_role(
            user="{{ bos_token + '[INST] ' + (s if loop.first else '') + m.content.strip() "
            "+ ' [/INST]' }}",
            assistant="{{ ' ' + m.content.strip() + ' ' + eos_token }}",
        )
        + "{% endfor %}",
        bos="written",
    ),
    "llama3": Family("{{ bos_token }}" + LLAMA3, bos="written"),
    "llama3.1, a header with dates": Family(
        "{{- bos_token }}{% if messages[0].role == 'system' %}"
        "{% set s = messages[0].content | trim %}"
        "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
        "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: {{ strftime_now('%d %b %Y') }}\n\n{{ s }}<|eot_id|>" + LLAMA3,
        bos="written",
    ),
    "gemma, model and no system": Family(
        "{{ bos_token }}"
        + refuse("messages[0].role == 'system'", "System role not supported")
        + each(
            STRICT + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
            "{{ m.content | trim }}<end_of_turn>\n"
        )
        + cue("<start_of_turn>model\n"),
        system="user's",
        bos="written",
    ),
    "gemma3, texts or parts, the system in the user's turn": Family(
        "{{ bos_token }}{% if messages[0].role == 'system' %}"
        "{% set s = messages[0].content + '\n\n' %}"
        "{% set ms = messages[1:] %}{% else %}{% set s = '' %}{% set ms = messages %}{% endif %}"
        "{% for m in ms %}"
        + STRICT
        + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ s if loop.first else '' }}{% if m.content is string %}{{ m.content | trim }}{% else %}"
        + PART
        + "{% endif %}<end_of_turn>\n{% endfor %}"
        + cue("<start_of_turn>model\n"),
        bos="written",
    ),
    "mistral 0.1, strict": Family(
        "{{ bos_token }}"
        + each(
            STRICT
            + by_role(
                user="[INST] {{ m.content }} [/INST]", assistant=" {{ m.content }}{{ eos_token }}"
            )
        ),
        system="user's",
        bos="written",
    ),
    "mistral nemo, the system in the last user's turn": Family(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
        "{% set ms = messages[1:] %}{% else %}{% set ms = messages %}{% endif %}{% for m in ms %}"
        + by_role(
            user="[INST]{% if loop.last and s is defined %}{{ s + '\n\n' }}{% endif %}"
            "{{ m.content }}[/INST]",
            assistant="{{ m.content }}{{ eos_token }}",
        )
        + "{% endfor %}",
        system="user's",
        asked="kept",
        bos="written",
    ),
    "mistral small, a system prompt with a date": Family(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
        "{% set ms = messages[1:] %}{% else %}{% set s = 'Today is ' + strftime_now('%Y-%m-%d') %}"
        "{% set ms = messages %}{% endif %}[SYSTEM_PROMPT]{{ s }}[/SYSTEM_PROMPT]"
        "{% for m in ms %}"
        + by_role(user="[INST]{{ m.content }}[/INST]", assistant="{{ m.content }}{{ eos_token }}")
        + "{% endfor %}",
        bos="written",
    ),
    "gpt-oss, channels": Family(
        "<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}<|end|>"
        + each(
            by_role(
                system="<|start|>developer<|message|># Instructions\n\n{{ m.content }}<|end|>",
                user="<|start|>user<|message|>{{ m.content }}<|end|>",
                assistant=refuse("'<|channel|>' in m.content", "channels in the content")
                + "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
                "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}",
            )
        )
        + cue("<|start|>assistant"),
        anew=True,
    ),
    "phi3": Family(each("<|{{ m.role }}|>\n{{ m.content }}<|end|>\n") + cue("<|assistant|>\n")),
    "phi3, an end where there is no cue": Family(
        each("<|{{ m.role }}|>\n{{ m.content }}<|end|>\n")
        + "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
    ),
    "phi4": Family(
        each("<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>")
        + cue("<|im_start|>assistant<|im_sep|>")
    ),
    "command r": Family(
        "{{ bos_token }}"
        + each(
            "<|START_OF_TURN_TOKEN|><|{{ {'system': 'SYSTEM', 'user': 'USER', "
            "'assistant': 'CHATBOT'}[m.role] }}_TOKEN|>{{ m.content.strip() }}"
            "<|END_OF_TURN_TOKEN|>"
        )
        + cue("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"),
        bos="written",
    ),
    "command r7b, an answer in tags": Family(
        "{{ bos_token }}<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|># Preamble<|END_OF_TURN_TOKEN|>"
        + each(
            "<|START_OF_TURN_TOKEN|>"
            + by_role(
                system="<|SYSTEM_TOKEN|>{{ m.content }}",
                user="<|USER_TOKEN|>{{ m.content }}",
                assistant="<|CHATBOT_TOKEN|><|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>",
            )
            + "<|END_OF_TURN_TOKEN|>"
        )
        + cue("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"),
        anew=True,
        bos="written",
    ),
    "granite": Family(
        "{% if messages[0].role != 'system' %}<|start_of_role|>system<|end_of_role|>Today is "
        "{{ strftime_now('%B %d, %Y') }}.<|end_of_text|>\n{% endif %}"
        + each("<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n")
        + cue("<|start_of_role|>assistant<|end_of_role|>")
    ),
    "olmo, the end after the last answer alone": Family(
        "{{ bos_token }}"
        + each(
            by_role(
                system="<|system|>\n{{ m.content }}\n",
                user="<|user|>\n{{ m.content }}\n",
                assistant="<|assistant|>\n{{ m.content }}{{ eos_token if loop.last else '\n' }}",
            )
        )
        + cue("<|assistant|>\n"),
        bos="written",
    ),
    "smollm3, /no_think in the system": Family(
        "<|im_start|>system\n## Metadata\n\nToday Date: {{ strftime_now('%d %B %Y') }}\n"
        "{% if messages[0].role == 'system' %}{{ messages[0].content.replace('/no_think', '') }}"
        "{% set ms = messages[1:] %}{% else %}{% set ms = messages %}{% endif %}<|im_end|>\n"
        "{% for m in ms %}"
        + by_role(
            user="<|im_start|>user\n{{ m.content }}<|im_end|>\n",
            assistant=START + "{{ m.content.lstrip('\n') }}<|im_end|>\n",
        )
        + "{% endfor %}"
        + cue(START)
    ),
    "zephyr": Family(
        each("<|{{ m.role }}|>\n{{ m.content + eos_token }}\n") + cue("<|assistant|>\n")
    ),
    "vicuna": Family(
        "{{ bos_token }}"
        + each(
            by_role(
                system="{{ m.content }} ",
                user="USER: {{ m.content }} ",
                assistant="ASSISTANT: {{ m.content }}{{ eos_token }}",
            )
        )
        + cue("ASSISTANT:"),
        bos="written",
    ),
    "alpaca, no system": Family(
        each(
            by_role(
                user="### Instruction:\n{{ m.content }}\n\n",
                assistant="### Response:\n{{ m.content }}\n\n",
            )
        )
        + cue("### Response:\n"),
        system="lost",
    ),
    "falcon, nothing after an answer": Family(
        each(
            by_role(
                system="{{ m.content }}\n",
                user="User: {{ m.content }}\n",
                assistant="Falcon: {{ m.content }}",
            )
        )
        + cue("Falcon:")
    ),
    "nemotron 3, an empty think in history": Family(
        chatml(
            "{% if m.role == 'assistant' and '<think>' not in m.content %}<think></think>"
            "{% endif %}{{ m.content }}"
        )
        + cue(START + "<think>\n"),
        anew=True,
    ),
    "glm4": Family(
        "[gMASK]<sop>" + each("<|{{ m.role }}|>\n{{ m.content }}") + cue("<|assistant|>\n")
    ),
    "glm4.5, a closed think": Family(
        "[gMASK]<sop>"
        + each(
            by_role(
                system="<|system|>\n{{ m.content }}",
                user="<|user|>\n{{ m.content }}",
                assistant="<|assistant|>\n<think></think>\n"
                "{{ m.content.split('</think>')[-1].strip() }}",
            )
        )
        + cue("<|assistant|>"),
        anew=True,
    ),
    "minimax": Family(
        each(
            "<beginning_of_sentence>{{ {'assistant': 'ai'}.get(m.role, m.role) }} "
            "name={{ m.role }}\n{{ m.content }}<end_of_sentence>\n"
        )
        + cue("<beginning_of_sentence>ai name=assistant\n")
    ),
    "kimi k2": Family(
        each("<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>{{ m.content }}<|im_end|>")
        + cue("<|im_assistant|>assistant<|im_middle|>")
    ),
    "smolvlm, parts": Family(
        each("{{ m.role | capitalize }}: " + PART + "<end_of_utterance>\n") + cue("Assistant: "),
        parts=("system", "user", "assistant"),
    ),
    "idefics2, parts by their first": Family(
        each(
            "{{ m.role | capitalize }}"
            "{{ ':' if m.content[0]['type'] == 'image' else ': ' }}{% for p in m.content %}"
            "{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}"
            "<end_of_utterance>\n"
        )
        + cue("Assistant:"),
        parts=("system", "user", "assistant"),
    ),
    "llava next, parts that are indexed": Family(
        each("{{ m.role.upper() }}: {{ m.content[0].text + ' ' }}") + cue("ASSISTANT:"),
        parts=("system", "user", "assistant"),
    ),
    "parts for the user, texts for the assistant": Family(
        each(
            "<|im_start|>{{ m.role }}\n{% if m.role == 'user' %}"
            + PART
            + "{% else %}{{ m.content + '' }}{% endif %}<|im_end|>\n"
        )
        + cue(START),
        parts=("user",),
    ),
    "no cue": Family(chatml(), anew=True),
    "generation tags": Family(
        each(
            "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
            "{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}{{ m.content }}<|im_end|>\n"
            "{% endif %}"
        )
        + cue(START)
    ),
    "macros that trim": Family(
        "{% macro turn(role, text) %}<|{{ role }}|>{{ text | trim }}</s>{% endmacro %}"
        + each("{{ turn(m.role, m.content) }}")
        + cue("<|assistant|>")
    ),
    "named, with a default": Family(
        {"default": chatml() + cue(START), "tool_use": "{{ raise_exception('no tools') }}"}
    ),
}
