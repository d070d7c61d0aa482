"""Check the custom resources of deploy/kubernetes as strictly as `kubectl apply` does."""

from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

KUBERNETES = "1.37"
# These schemas are files, since no package that fits the tests' Python has them: see the README in this folder.
FOLDER = Path(__file__).parent / "schemas"
KINDS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
Schema = dict[str, Any]


def closed(schema: Schema) -> Schema:
    """Return the schema of a CRD with unknown fields forbidden.

    A CRD doesn't forbid them: the API server drops them, and kubectl rejects an object that would lose a field.
    """
    result = dict(schema)
    for key in ("items", "additionalProperties"):  # of a list, of a map
        if isinstance(schema.get(key), dict):
            result[key] = closed(schema[key])
    if "properties" in schema:
        result["properties"] = {name: closed(field) for name, field in schema["properties"].items()}
        result.setdefault("additionalProperties", schema.get("x-kubernetes-preserve-unknown-fields", False))
    return result


def validate(resource: dict[str, Any]) -> None:
    """Raise jsonschema.ValidationError unless the API server's schema checks would accept this custom resource.

    The CRDs' rules in CEL (x-kubernetes-validations) are not checked.
    """
    schema = yaml.safe_load((FOLDER / f"{resource['kind']}.yaml").read_text())
    jsonschema.validate(resource, closed(schema), cls=jsonschema.Draft202012Validator)
    # The metadata are the same for every kind.
    same_metadata = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": resource["metadata"]}
    kubernetes_validate.validate(same_metadata, KUBERNETES, strict=True)
