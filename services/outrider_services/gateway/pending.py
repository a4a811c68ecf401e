"""What requests can say already and the pipeline cannot do yet: this is the one place to open."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, Field

from outrider.errors import BadRequest
from outrider_services.gateway.fields import Count, Flag

Name: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Grammar: TypeAlias = Annotated[str, Field(max_length=1 << 16)]


class Function(BaseModel):
    """What a model may call; `parameters` is a JSON schema."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Flag | None = None


class Tool(BaseModel):
    type: Literal["function"]
    function: Function


class FunctionName(BaseModel):
    name: Name


class ToolChoice(BaseModel):
    type: Literal["function"]
    function: FunctionName


class CalledFunction(BaseModel):
    name: Name
    arguments: str


class ToolCall(BaseModel):
    """A call that an earlier answer made."""

    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"]
    function: CalledFunction


class Schema(BaseModel):
    name: Name
    description: str | None = None
    definition: dict[str, Any] | None = Field(None, alias="schema")
    strict: Flag | None = None


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None


class Constrained(BaseModel):
    """Fields of requests whose answers keep to a form."""

    response_format: ResponseFormat | None = None
    grammar: Grammar | None = None
    json_schema: dict[str, Any] | None = None

    def check_form(self) -> None:
        """Raise BadRequest if a form is asked for."""
        if self.response_format is not None and self.response_format.type != "text":
            kind = self.response_format.type
            raise BadRequest(f"response_format {kind} is not supported yet", "response_format")
        if self.grammar:
            raise BadRequest("grammar is not supported yet", "grammar")
        if self.json_schema:
            raise BadRequest("json_schema is not supported yet", "json_schema")


class WithTools(BaseModel):
    """Fields of requests whose answers may call tools."""

    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None

    def check_tools(self) -> None:
        """Raise BadRequest if a tool may be, or must be, called."""
        if self.tools and self.tool_choice != "none":
            raise BadRequest("tools are not supported yet", "tools")
        if self.tool_choice not in (None, "none", "auto"):
            raise BadRequest("tool_choice is not supported yet", "tool_choice")


def check_tops(name: str, count: Count | None) -> None:
    """Raise BadRequest if the probabilities of tokens that were not chosen are asked for.

    `openai_answers.tops` is where they will be told.
    """
    if count:
        raise BadRequest(
            f"{name} must be 0: only the chosen tokens' probabilities are known yet", name
        )
