"""Writes tests/golden/chat_templates.json: conversations rendered by transformers' apply_chat_template.

Run with transformers installed: python scripts/golden_chat_templates.py
The templates are our own; together they use what the templates of published models use.
"""

import datetime
import json
import pathlib
import sys

import jinja2
import transformers
from transformers.utils import chat_template_utils

TODAY = datetime.datetime(2026, 1, 1, 12)


class FrozenClock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return TODAY


chat_template_utils.datetime = FrozenClock

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
SYSTEM = {"role": "system", "content": "  Be brief.  "}
USER = {"role": "user", "content": "What is 2 < 3 & \"four\"?\n"}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nTrue, é and 😀."}
PARTS = {"role": "user", "content": [{"type": "text", "text": "One "}, {"type": "text", "text": "two"}]}
CALL = {"role": "assistant", "content": None, "tool_calls": [
    {"type": "function", "function": {"name": "weather", "arguments": {"town": "Zürich", "days": 2, "hot": False, "x": 1.5, "none": None, "list": [1, "a"], "empty": {}}}}]}
RESULT = {"role": "tool", "name": "weather", "content": "{\"celsius\": 21}"}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Weather of a town.", "parameters": {
    "type": "object", "properties": {"town": {"type": "string", "description": "Name of the town"}, "days": {"type": "integer"}}, "required": ["town"]}}}]
CHATS = {
    "one turn": ([USER], None),
    "system and two turns": ([SYSTEM, USER, ANSWER, {"role": "user", "content": "Sure?"}], None),
    "tools": ([SYSTEM, USER, CALL, RESULT, ANSWER, {"role": "user", "content": "And tomorrow?"}], TOOLS),
    "parts": ([PARTS, ANSWER, PARTS], None),
    "two users": ([USER, USER], None),
}

TEMPLATES = {
    "chatml": """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "default system, first message": """{% for message in messages -%}
    {% if loop.first and messages[0]['role'] != 'system' %}
{{ bos_token }}system: You are helpful.
    {% endif %}
    {%- if message.content is string %}
{{ message.role | upper }}: {{ message.content | trim }}{{ eos_token }}
    {% elif message.content is none %}
(nothing)
    {%- else %}
        {%- for part in message.content %}{% if part.type == 'text' %}{{ part['text'] }}|{% endif %}{% endfor %}

    {% endif %}
{% endfor %}
""",
    "alternating roles": """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant/user') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and system_message is defined %}
            {{- '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' ~ message['content'] ~ '[/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}""",
    "headers, date and tools": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + strftime_now(", %A %B %Y-%m-%d %H:%M:%S %y %%") + "\\n\\n" }}
{%- if tools is not none %}
    {{- "Call with JSON.\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {%- for arg_name, arg_val in tool_call.arguments | items %}{{- arg_name + '=' + (arg_val | string) }}{%- if not loop.last %}{{- ", " }}{%- endif %}{%- endfor %}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "thinking and tool calls": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning_content)) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}{{- tool_call.arguments }}{%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""",
    "macros, loop controls, generation": """{%- macro text(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content is iterable and content is not mapping -%}
        {{- content | map(attribute='text') | join('+') -}}
    {%- else -%}
        {{- content | default('nothing', true) -}}
    {%- endif -%}
{%- endmacro -%}
{{ bos_token }}{% for message in messages if message.role != 'system' %}
{%- if message.role == 'tool' %}{% continue %}{% endif %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
<start_of_turn>{{ role }}
{% if message.role == 'assistant' %}{% generation %}{{ text(message.content) | trim }}{%- endgeneration -%}{% else %}{{ text(message['content']) | replace('four', 'five') }}{% endif %}<end_of_turn>
{% if loop.index >= 4 %}{% break %}{% endif %}
{% endfor %}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list -%}
{{ users | length }} {{ users[-1].role }} {{ messages[0].get('missing', 'x') }} {{ none }} {{ true }} {{ 1.0 }} {{ 7 // 2 }} {{ [1, 'a'] }} {{ {'b': 1, 'a': none} | tojson }} {{ missing }}{{ {'b': [1, {}], 'a': 'é'} | tojson(indent=2, sort_keys=true, ensure_ascii=true) }} {{ {'b': [1, 2]} | tojson(separators=(',', ':')) }}
{%- for key, value in {'z': 1, 'y': 2}.items() %} {{ loop.index0 }}{{ key }}{{ value }}{{ loop.previtem is defined }}{% endfor %}
{% if add_generation_prompt -%}
    <start_of_turn>model
{% endif %}""",
}


def main():
    cases = []
    for template_name, template in TEMPLATES.items():
        for chat_name, (messages, tools) in CHATS.items():
            for prompt in (True, False):
                case = {"name": f"{template_name} / {chat_name}", "template": template_name, "messages": messages,
                        "tools": tools or [], "add_generation_prompt": prompt}
                try:
                    rendered, _ = chat_template_utils.render_jinja_template(
                        [messages], tools=tools, chat_template=template, add_generation_prompt=prompt, **TOKENS)
                    case["text"] = rendered[0]
                except (jinja2.TemplateError, TypeError) as error:
                    case["refused"] = str(error)
                cases.append(case)
    made_by = f"transformers {transformers.__version__}, jinja2 {jinja2.__version__}"
    out = {"made_by": made_by, "tokens": TOKENS, "templates": TEMPLATES, "cases": cases}
    path = pathlib.Path(__file__).parent.parent / "tests/golden/chat_templates.json"
    path.write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n")
    print(f"{path}: {len(cases)} cases", file=sys.stderr)


main()
