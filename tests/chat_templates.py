"""Chat templates that behave as those of well-known models do, and some that mean harm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from outrider.errors import BadRequest
from outrider.wire.messages import Tools
from outrider_services.templates import sandbox

CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# no system; turns alternate; contents are trimmed
GEMMA = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

# a default for the system with a date; tools as JSON in the first message of the user
LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday Date: " + date_string + "\n\n" }}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {%- if tools is not none and loop.first %}
            {{- 'Respond in the format {"name": function name, "parameters": arguments}.\n\n' }}
            {%- for t in tools %}{{ t | tojson(indent=4) + "\n\n" }}{% endfor %}
        {%- endif %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' + (tool_call.arguments | tojson) + "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" + message.content | tojson + "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

# the system's words stand in the last message of the user; ids of calls have nine letters
MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and tools is defined and tools is not none %}
            {{- "[AVAILABLE_TOOLS] " + (tools | tojson) + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" and message.tool_calls %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- if not tool_call.id is defined or tool_call.id | length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- tool_call.function | tojson + ("]" if loop.last else ", ") }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}"""

# as Hermes 2 Pro's `tool_use`: Python signatures, made of the types in the schema
HERMES = """\
{%- macro json_to_python_type(json_spec) %}
    {%- set basic_type_map = {"string": "str", "number": "float", "integer": "int"} %}
    {%- if basic_type_map[json_spec.type] is defined %}
        {{- basic_type_map[json_spec.type] }}
    {%- elif json_spec.type == "array" %}
        {{- "list[" + json_to_python_type(json_spec["items"]) + "]" }}
    {%- else %}
        {{- "Any" }}
    {%- endif %}
{%- endmacro %}
{{- bos_token }}
{{- '<|im_start|>system\nYou are a function calling AI model. <tools> ' }}
{%- for tool in tools %}
    {%- if tool.function is defined %}{% set tool = tool.function %}{% endif %}
    {{- '{"type": "function", "function": {"name": "' + tool.name + '", ' }}
    {{- '"description": "' + tool.name + '(' }}
    {%- for param_name, param_fields in tool.parameters.properties | items %}
        {{- param_name + ": " + json_to_python_type(param_fields) }}
        {%- if not loop.last %}{{ ", " }}{% endif %}
    {%- endfor %}
    {{- ') ' + (tool.description or '') + '", "parameters": ' + tool.parameters | tojson + '}}' }}
{%- endfor %}
{{- ' </tools> For each call return <tool_call>\n{"name": <name>, "arguments": <dict>}\n</tool_call>' }}
{{- '<|im_end|>\n' }}
{%- for message in messages %}
    {%- if message.role in ("user", "system") or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- for tool_call in message.tool_calls %}
            {{- '\n<tool_call>\n' }}
            {%- if tool_call.function is defined %}{% set tool_call = tool_call.function %}{% endif %}
            {{- '{"name": "' + tool_call.name + '", "arguments": ' + tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>tool\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# its calls begin like those of Hermes, but are no JSON
XML_CALLS = """\
{%- for tool in tools %}<function>{{ tool.function.name }}</function>{% endfor %}
{{- "Call so: <tool_call>\n<function=name>\n</function>\n</tool_call>" }}
{%- for message in messages %}
    {{- "<|im_start|>" + message.role + "\n" + message.content }}
    {%- for call in message.tool_calls %}
        {{- "<tool_call>\n<function=" + call.function.name + ">\n</function>\n</tool_call>" }}
    {%- endfor %}
{%- endfor %}"""

# says what must be called, where it is told
CHOOSING = HERMES + "{% if tool_choice == 'required' %}{{ '(call one)' }}{% endif %}"

HOSTILE = {
    "an-endless-loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a-long-text": "{% for a in range(99999) %}{{ 'abcdefghi' * 99 }}{% endfor %}",
    "much-memory": "{% set a = 'a' * 10000000 %}{{ (a * 10000) | length }}",
    "growing-memory": "{% set n = namespace(l=[]) %}{% for a in range(99999) %}"
    "{% set n.l = n.l + [('a' ~ a) * 9999] %}{% endfor %}",
    "a-large-number": "{% set n = messages | length %}{{ (9 ** (n * 9 ** 9)) | string | length }}",
    "a-large-constant": "{{ 9 ** (9 ** 9) }}",
    "recursion": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "an-attribute": "{{ messages.__class__.__mro__ }}",
    "a-function's-world": "{{ raise_exception.__globals__['os'].getpid() }}",
    "a-format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "a-change": "{{ messages.append(1) }}",
    "an-import": "{% include '/etc/passwd' %}",
    "a-broken-one": "{% if %}",
}


class Here:
    """A template that is applied in this process; for those that mean no harm."""

    def __init__(self, source: str) -> None:
        self.source = source

    def check(self, tools: Tools) -> None:
        pass

    def render(self, messages: Sequence[Any], functions: Sequence[Any], choice: Any) -> str:
        variables = {
            "messages": messages, "tools": functions or None, "add_generation_prompt": True,
            "bos_token": "<s>", "eos_token": "</s>",
        }  # fmt: skip
        found = sandbox.answer({"source": self.source, "variables": variables, "most": 1 << 20})
        if "error" in found:
            raise BadRequest(found["error"], "messages")
        return str(found["text"])
