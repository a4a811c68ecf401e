"""Random JSON schemas of what usual schemas have; each can be met, and by short answers."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Schemas = st.SearchStrategy[dict[str, Any]]

NAMES = ["a", "name", "größe"]
VALUES: list[Any] = [
    "", "x", "blue river", 'a "quote"\\', "ü", 0, -7, 1.5, True, None, [], {}, [1, "x"], {"a": 1},
]  # fmt: skip
PATTERNS = ["^[a-c]{2,4}$", "^(x|yz)+$", "^[0-9]{3}-[0-9]{2}$"]


def fields(**some: st.SearchStrategy[Any]) -> Schemas:
    """Schemas with some of these keywords."""
    return st.fixed_dictionaries({}, optional=some)


def typed(name: str, **some: st.SearchStrategy[Any]) -> Schemas:
    return fields(**some).map(lambda found: {"type": name, **found})


leaves: Schemas = st.one_of(
    st.sampled_from(["boolean", "null"]).map(lambda name: {"type": name}),
    typed("integer", minimum=st.integers(-40, 3), maximum=st.integers(3, 99)),
    typed("number", minimum=st.integers(-9, 0), exclusiveMaximum=st.integers(1, 9)),
    typed("string", minLength=st.integers(0, 3), maxLength=st.integers(3, 8)),
    st.sampled_from(PATTERNS).map(lambda pattern: {"type": "string", "pattern": pattern}),
    st.sampled_from(["date", "uuid"]).map(lambda name: {"type": "string", "format": name}),
    st.sampled_from(VALUES).map(lambda value: {"const": value}),
    st.lists(st.sampled_from(VALUES), min_size=1, max_size=4).map(lambda some: {"enum": some}),
)


def objects(inner: Schemas) -> Schemas:
    properties = st.dictionaries(st.sampled_from(NAMES), inner)

    def of(some: dict[str, Any]) -> Schemas:
        required = st.lists(st.sampled_from(sorted(some)), unique=True) if some else st.just([])
        more = fields(additionalProperties=st.one_of(st.just(False), inner))
        return st.builds(
            lambda names, more: {"type": "object", "properties": some, "required": names, **more},
            required,
            more,
        )

    return properties.flatmap(of)


def composed(inner: Schemas) -> Schemas:
    def arrays(items: Any, least: int, more: dict[str, Any]) -> dict[str, Any]:
        return {"type": "array", "items": items, "minItems": least, **more}

    several = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        st.builds(arrays, inner, st.integers(0, 2), fields(maxItems=st.integers(2, 3))),
        several.map(lambda some: {"type": "array", "prefixItems": some, "items": False}),
        objects(inner),
        objects(inner),
        several.map(lambda some: {"anyOf": some}),
    )


def nested(depth: int) -> Schemas:
    return st.one_of(leaves, composed(nested(depth - 1))) if depth else leaves


def referring(inner: Schemas) -> Schemas:
    """A tree, whose schema refers to itself."""
    tree = {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}
    return inner.map(
        lambda one: {"$defs": {"tree": {"anyOf": [one, tree]}}, "$ref": "#/$defs/tree"}
    )


schemas = st.one_of(leaves, composed(nested(2)), composed(nested(1)), referring(nested(1)))
