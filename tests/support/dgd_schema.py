# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What Kubernetes accepts as a ``DynamoGraphDeployment`` of ``nvidia.com/v1beta1``.

No package of Dynamo's carries the resource's definition. So the part of it that
manifests are made of is written down here, from the fields, bounds and patterns of the
operator's Go types (``deploy/operator/api/v1beta1`` of ai-dynamo/dynamo, Dynamo 1.6).
Pod templates are Kubernetes' own: they are compared with the types of its Python
client. Unknown fields are errors in both, as with ``kubectl apply --validate=strict``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jsonschema
from kubernetes.client import models

NAME = {
    "type": "string",
    "minLength": 1,
    "maxLength": 63,
    "pattern": "^[A-Za-z0-9]([-A-Za-z0-9]*[A-Za-z0-9])?$",
}
VERSION_FIELD = "runtimeVersionOverride"
VERSION = r"^(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})$"
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}

COMPONENT = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {
        "name": NAME,
        "type": {"enum": ["frontend", "worker", "prefill", "decode", "planner", "epp"]},
        VERSION_FIELD: {"type": "string", "pattern": VERSION},
        "globalDynamoNamespace": {"type": "boolean"},
        "podTemplate": {"type": "object"},
        "replicas": {"type": "integer", "minimum": 0},
        "minAvailable": {"type": "integer", "minimum": 1},
        "multinode": {"type": "object"},
        "sharedMemorySize": {"type": ["string", "integer"]},
        "modelRef": {"type": "object"},
        "scalingAdapter": {"type": "object"},
        "eppConfig": {"type": "object"},
        "frontendSidecar": {"type": "string"},
        "compilationCache": {"type": "object"},
        "topologyConstraint": {"type": "object"},
        "experimental": {"type": "object"},
    },
}
SCHEMA = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "nvidia.com/v1beta1"},
        "kind": {"const": "DynamoGraphDeployment"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "annotations": STRINGS,
                "labels": STRINGS,
                "priorityClassName": {"type": "string"},
                "components": {"type": "array", "maxItems": 25, "items": COMPONENT},
                "env": {"type": "array"},
                "backendFramework": {"enum": ["sglang", "vllm", "trtllm"]},
                "restart": {"type": "object"},
                "topologyConstraint": {"type": "object"},
                "experimental": {"type": "object"},
            },
        },
    },
}

#: Of Kubernetes' quantities: "500m", "48Gi", "2".
QUANTITY = re.compile(r"^[0-9]+(\.[0-9]+)?(m|[kMGTPE]i?|Ki)?$")


def faults(manifest: dict[str, Any]) -> list[str]:
    """What the API server would not accept, one line each."""
    validator = jsonschema.Draft202012Validator(SCHEMA)
    found = [f"{e.json_path}: {e.message}" for e in validator.iter_errors(manifest)]
    return found or list(_component_faults(manifest["spec"]["components"]))


def _component_faults(components: list[dict]) -> Iterator[str]:
    """What the schema's rules (CEL) and the operator's admission ask for."""
    names = [component["name"].lower() for component in components]
    if len(set(names)) < len(names):
        yield "names of components are not unique"
    for component in components:
        where = component["name"]
        template = component.get("podTemplate", {})
        yield from _typed("V1PodTemplateSpec", template, f"{where}.podTemplate")
        containers = template.get("spec", {}).get("containers", ())
        mains = [c for c in containers if c.get("name") == "main"]
        if len(mains) != 1 or not mains[0].get("image"):
            yield f"{where}: one container has to be named main, and have an image"
        elif not (_tells_version(mains[0]["image"]) or VERSION_FIELD in component):
            yield f"{where}: no version in the image's tag, and none given"


def _tells_version(image: str) -> bool:
    return re.search(r":v?\d+\.\d+\.\d+", image) is not None


def _typed(kind: str, value: Any, where: str) -> Iterator[str]:
    """Compare ``value`` with a type of Kubernetes' client, field by field."""
    if listed := re.fullmatch(r"list\[(.*)\]", kind):
        if not isinstance(value, list):
            yield f"{where}: no list"
            return
        for index, item in enumerate(value):
            yield from _typed(listed[1], item, f"{where}[{index}]")
    elif mapped := re.fullmatch(r"dict\(str, (.*)\)", kind):
        if not isinstance(value, dict):
            yield f"{where}: no mapping"
            return
        for key, item in value.items():
            yield from _typed(mapped[1], item, f"{where}.{key}")
            if where.endswith(("limits", "requests")) and not QUANTITY.match(str(item)):
                yield f"{where}.{key}: {item!r} is no quantity"
    elif hasattr(models, kind):
        yield from _fields(getattr(models, kind), value, where)
    else:
        python = {"str": str, "int": int, "bool": bool, "object": object}[kind]
        if not isinstance(value, python) or (kind == "int" and value is True):
            yield f"{where}: {value!r} is no {kind}"


def _fields(model: Any, value: Any, where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where}: no mapping"
        return
    kinds = {
        wire: model.openapi_types[name] for name, wire in model.attribute_map.items()
    }
    for field, item in value.items():
        if field not in kinds:
            yield f"{where}.{field}: unknown field"
        else:
            yield from _typed(kinds[field], item, f"{where}.{field}")
