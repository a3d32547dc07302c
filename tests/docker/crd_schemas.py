"""Schemas of Kubernetes resources as JSON schemas that know no other fields than theirs."""

from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

# What every object has; a CRD leaves it to Kubernetes.
_METADATA = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,40}[a-z0-9])?$"},
        "namespace": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}


def validator_of(crd: Path, version: str) -> Draft202012Validator:
    """A validator for one version of a custom resource.

    A cluster prunes fields that the schema doesn't have and goes on without them, so that a misspelt key is a setting
    that silently isn't made; here it is an error.
    """
    # The file has a million characters, too many for the loader that is written in Python.
    definition = yaml.load(crd.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    (schema,) = (
        entry["schema"]["openAPIV3Schema"] for entry in definition["spec"]["versions"] if entry["name"] == version
    )
    schema["properties"]["metadata"] = _METADATA
    return Draft202012Validator(_strict(schema))


def _strict(schema: Any) -> Any:
    """The structural schema as JSON schema: `int-or-string` spelt out, and closed where it lists its properties."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    # Properties may have any name, keywords among them.
    strict = {
        key: {name: _strict(value) for name, value in content.items()} if key == "properties" else _strict(content)
        for key, content in schema.items()
    }
    if schema.get("x-kubernetes-int-or-string"):
        strict["type"] = ["integer", "string"]
    is_object = schema.get("type") == "object"
    if is_object and "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict["additionalProperties"] = False
    return strict
