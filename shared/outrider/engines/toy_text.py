"""The toy's vocabulary and chat template: the 256 bytes, an end token and a few control tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from outrider.core.engine import Vocabulary

END = 256
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|repo_name|>", "<|file_sep|>")
CONTROLS = ("<|end|>", *ROLES, "<|say|>", *FIM)
ASSISTANT, SAY = 259, 260
SMALLEST = 256 + len(CONTROLS)

# Tools in the form of the Hermes models. Asked something, it calls the first of them with what it
# was asked: what stands behind <|say|> is its answer, so that calls can be had without a model.
TEMPLATE = r"""
{%- if tools %}
    {{- "<|system|>You may call these functions:\n<tools>" }}
    {%- for tool in tools %}{{ "\n" + (tool | tojson) }}{% endfor %}
    {{- "\n</tools>\nCall one so: <tool_call>{\"name\": …, \"arguments\": …}</tool_call><|end|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {{- "<|user|><tool_response>" + message.content + "</tool_response><|end|>" }}
    {%- elif message.role in ("system", "user", "assistant") %}
        {{- "<|" + message.role + "|>" + message.content }}
        {%- for call in message.tool_calls %}
            {{- "\n<tool_call>\n" + ({"name": call.function.name,
                "arguments": call.function.arguments} | tojson) + "\n</tool_call>" }}
        {%- endfor %}
        {{- "<|end|>" }}
    {%- else %}
        {{- raise_exception("the template has no role " + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {%- if tools and messages and messages[-1].role == "user" %}
        {{- "<|say|><tool_call>\n" + ({"name": tools[0].function.name,
            "arguments": {"text": messages[-1].content}} | tojson) + "\n</tool_call>" }}
    {%- endif %}
    {{- "<|assistant|>" }}
{%- endif %}"""


def labels(size: int, variant: int) -> list[str]:
    """The labels of so many ids; each variant gives the last one another."""
    byte_labels = [
        chr(n) if chr(n).isprintable() and n < 128 else f"<0x{n:02X}>" for n in range(256)
    ]
    reserved = [f"<|reserved_{n}|>" for n in range(size - SMALLEST)]
    found = [*byte_labels, *CONTROLS, *reserved]
    if variant:
        found[-1] = f"<|variant_{variant}|>"
    return found


def vocabulary(labels: Sequence[str]) -> Vocabulary:
    """The fingerprint of a vocabulary with these labels."""
    digest = hashlib.sha256()
    for label in labels:
        text = label.encode()
        digest.update(len(text).to_bytes(4, "little") + text)
    return Vocabulary(
        kind="bytes",
        size=len(labels),
        bos=None,
        eos=END,
        adds_bos=False,
        adds_eos=False,
        ends=(END,),
        digest=digest.hexdigest(),
    )
