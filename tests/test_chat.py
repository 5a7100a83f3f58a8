"""Chat templates: transformers' text, one BOS, and errors of one line."""

import json

import pytest
from conftest import hugging_face
from test_tokenizer import tables
from test_tokenizer_model import directory

from minillm import data
from minillm.model import tokenizer as tokenizers
from minillm.model.tokenizer import BytePair

TURNS = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi {{ x }}"},
         {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello."},
         {"role": "user", "content": "<b>why</b>?\n"}]
ANSWER = {"role": "assistant", "content": "So."}

CHATML = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA3 = """\
{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}{{- "Environment: ipython\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\n\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] %}{%- set turns = messages[1:] %}
{%- else %}{%- set turns = messages %}{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant\nin order') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system is defined %}
            {{- "[INST] " + system + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
    {%- else %}{{- " " + message["content"] + eos_token}}{%- endif %}
{%- endfor %}"""
QWEN3 = """\
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and not message.content.startswith('<tool_response>') %}
        {%- set ns.last = index %}{%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "assistant" and '</think>' in content and loop.index0 < ns.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
{%- endfor %}
{{- {"a": "<é>", "b": [1, none]} | tojson(indent=2) }}{{- messages[0] | tojson }}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
GENERATION = """\
{% for m in messages %}{% if m.role == 'assistant' %}
{% generation %}{% set end = '!' %}{{ m.content + end }}
{% endgeneration %}
{% else %}{{ m.role }}: {{ m.content }}{{ end }}
{% endif %}{% endfor %}{% if add_generation_prompt %}{%- generation -%} go {%- endgeneration -%}
{% endif %}"""
TEMPLATES = dict(chatml=CHATML, llama3=LLAMA3, mistral=MISTRAL, qwen3=QWEN3, generation=GENERATION)


def with_template(template):
    tokenizer = BytePair.from_gguf(tables("smollm"))
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parity
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(tmp_path, name):
    ours = with_template(TEMPLATES[name])
    ours.save(tmp_path)
    theirs = hugging_face().AutoTokenizer.from_pretrained(tmp_path)
    for messages in (TURNS, TURNS[:2], TURNS[1:], [*TURNS, ANSWER], TURNS[1:2]):
        for generate in (False, True):
            wanted = theirs.apply_chat_template(messages, tokenize=False,
                                                add_generation_prompt=generate)
            text, ids, offsets = ours.chat_spans(messages, generate)
            assert ours.chat(messages, generate) == text == wanted and wanted
            assert ids == theirs.apply_chat_template(messages, add_generation_prompt=generate,
                                                     return_dict=False)
            assert len(ids) == len(offsets)


# --- one BOS ------------------------------------------------------------------------------------


def adds_bos(tmp_path, template):
    """A tokenizer that adds BOS to a text, with a template that writes BOS or not."""
    tokenizer = tokenizers.load(directory(tmp_path, dict(add_bos_token=True)))
    tokenizer.chat_template = template
    return tokenizer


PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("template", [MISTRAL, PLAIN])
def test_a_conversation_has_the_bos_of_its_template(tmp_path, template):
    tokenizer = adds_bos(tmp_path, template)
    count = template.count("bos_token")
    assert tokenizer.encode("a").count(1) == 1
    assert tokenizer.encode("a", special=False).count(1) == 0
    text, ids, _ = tokenizer.chat_spans(TURNS[1:3])
    assert ids.count(1) == count and tokenizer.encode(text, special=False) == ids
    example = data.conversation(TURNS[1:3], tokenizer, 200)
    assert example.ids == ids


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("template, message", [
    ("{{ raise_exception('no system') }}", "refuses these messages: no system$"),
    ("{{ raise_exception('two\nlines') }}", "refuses these messages: two lines$"),
    ("{{ messages[0].name.first }}", r"fails on these messages \(UndefinedError: 'dict object' "),
    ("{{ messages[9].content }}", r"fails on these messages \(UndefinedError: "),
    ("{{ 'a' + 1 }}", r"fails on these messages \(TypeError: can only concatenate"),
    ("{{ 1 / 0 }}", r"fails on these messages \(ZeroDivisionError: "),
    ("{{ messages.append(1) }}", r"fails on these messages \(SecurityError: "),
    ("{{ messages | tojson(indent=messages) }}", r"fails on these messages \(TypeError: "),
    ("{{ messages | nonsense }}", "is no valid Jinja: No filter named 'nonsense'"),
    ("{% for m in messages %}", "is no valid Jinja: Unexpected end of template"),
    ("{% generation %}", "is no valid Jinja: Unexpected end of template"),
    ("{{ " + "(" * 4000 + "1" + ")" * 4000 + " }}", "chat template "),
    (5, "the chat template is 5, not a text"),
    ({"rag": "", "tool": ""}, "have the names 'rag', 'tool', and none is the 'default'"),
])
def test_a_bad_template_is_one_line(template, message):
    tokenizer = with_template(template)
    with pytest.raises(ValueError, match=message) as caught:
        tokenizer.chat(TURNS)
    assert "\n" not in str(caught.value)


def test_named_templates_and_a_template_file(tmp_path):
    with_template(None).save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())

    def found(template):
        path.write_text(json.dumps({**config, "chat_template": template}))
        return tokenizers.load(tmp_path)

    named = [dict(name="rag", template="rag"), dict(name="default", template="plain")]
    assert found(named).chat([]) == "plain"
    only = found(named[:1])
    with pytest.raises(ValueError, match="have the names 'rag', and none is the 'default'"):
        only.chat([])
    only.save(tmp_path)
    assert tokenizers.load(tmp_path).chat_template == {"rag": "rag"}
    for wrong, message in (([1], "a list of other things"), (5, "is 5, not a text")):
        with pytest.raises(ValueError, match=message):
            found(wrong)
    (tmp_path / "chat_template.jinja").write_text("file")
    assert found(5).chat([]) == "file"
