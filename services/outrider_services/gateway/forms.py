"""Fields of requests whose answers keep to a form, or call tools; the library judges both."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, Field

from outrider.client import tool_calls
from outrider.client.chat import IDS, MOST_TOOLS, NAMES
from outrider.core.constraints import CONSTRAINT_LIMIT, Constraint
from outrider.errors import BadRequest
from outrider_services.gateway.fields import Flag

Name: TypeAlias = Annotated[str, Field(pattern=f"^{NAMES.pattern}$")]
CallId: TypeAlias = Annotated[str, Field(pattern=f"^{IDS.pattern}$")]
Grammar: TypeAlias = Annotated[str, Field(max_length=CONSTRAINT_LIMIT)]
JsonSchema: TypeAlias = dict[str, Any] | Flag
Plain: TypeAlias = dict[str, Any]  # as the library takes it


# ---- forms --------------------------------------------------------------------------------------


class NamedSchema(BaseModel):
    """A JSON schema; `strict` changes nothing, for every answer keeps to it."""

    name: Annotated[str, Field(max_length=256)] | None = None
    description: str | None = None
    definition: JsonSchema = Field(alias="schema")
    strict: Flag | None = None


class ResponseFormat(BaseModel):
    """OpenAI's; llama-server's "json_object" may bring a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    definition: JsonSchema | None = Field(None, alias="schema")

    def plain(self) -> Plain:
        inner = self.json_schema and {"schema": self.json_schema.definition}
        return {"type": self.type, "json_schema": inner, "schema": self.definition}


class Constrained(BaseModel):
    """Fields of requests whose answers keep to a form."""

    response_format: ResponseFormat | None = None
    grammar: Grammar | None = None
    json_schema: JsonSchema | None = None

    def form(self) -> Plain:
        """As settings of the library."""
        return {
            "response_format": self.response_format and self.response_format.plain(),
            "grammar": self.grammar,
            "json_schema": self.json_schema,
        }


# ---- tools --------------------------------------------------------------------------------------


class Function(BaseModel):
    """What a model may call; `parameters` is a JSON schema."""

    name: Name
    description: str | None = None
    parameters: Plain | None = None
    strict: Flag | None = None


class Tool(BaseModel):
    type: Literal["function"]
    function: Function

    def plain(self) -> Plain:
        function = self.function
        said = {
            "name": function.name,
            "description": function.description,
            "parameters": function.parameters,
        }
        return {
            "type": self.type,
            "function": {name: value for name, value in said.items() if value is not None},
        }


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

    id: CallId
    type: Literal["function"]
    function: CalledFunction


class WithTools(BaseModel):
    """Fields of requests whose answers may call tools."""

    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: Flag | None = None

    def offered(self) -> list[Plain] | None:
        """The tools as the library takes them."""
        return None if self.tools is None else [tool.plain() for tool in self.tools]

    def choice(self) -> Any:
        """The same for the choice."""
        given = self.tool_choice
        return given.model_dump() if isinstance(given, ToolChoice) else given

    def one_call(self) -> Constraint | None:
        """That the answer is one call, if no more than that is asked for.

        Raises BadRequest where it need not be a call: nothing could be held to that number.
        """
        if self.parallel_tool_calls is not False or not self.tools or self.tool_choice == "none":
            return None
        if self.tool_choice in (None, "auto"):
            raise BadRequest(
                "parallel_tool_calls can only be false where tool_choice asks for a call",
                "parallel_tool_calls",
            )
        return tool_calls(self.offered() or (), self.choice(), parallel=False)
